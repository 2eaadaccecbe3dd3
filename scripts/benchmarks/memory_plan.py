"""
The peak memory that `python -m trl_opsd.plan` says a training step takes, beside what it took, at several shapes.

    python -m scripts.benchmarks.memory_plan

Every case has a process of its own on the CPU: a Qwen3 model with random weights, three optimizer steps with AdamW on rollouts
that are given. What is measured is the resident memory above that before the model was built, so that libraries do not
count. Results go to recipes/results/memory_plan/cpu.json. Two steps on a GPU: the page of results.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from scripts.harness.meter import MIB, peak, restart_peak
from scripts.harness.processes import run_alone
from scripts.harness.results import RESULTS, read, write_results
from scripts.harness.shapes import small
from scripts.harness.tables import markdown
from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.plan.memory import Training, parts
from trl_opsd.tiny.tokenizer import make_tokenizer


BASE = {
    "hidden": 640,
    "layers": 12,
    "vocab": 16384,
    "rows": 4,
    "completion": 224,
    "accumulation": 1,
    "dtype": "float32",
    "bf16": False,
    "lora": False,
    "checkpointing": False,
    "teacher_layers": None,
}
CASES = {
    "full": {},
    "full, twice the rollouts": {"rows": 8},
    "full, traces four times as long": {"rows": 2, "completion": 896},
    "full, four micro-batches": {"accumulation": 4},
    "full, checkpointing": {"checkpointing": True, "rows": 8},
    "full, bf16 from float32": {"bf16": True, "rows": 8},
    "full, bf16 and checkpointing": {"bf16": True, "checkpointing": True, "rows": 8},
    "full, bfloat16 weights": {"dtype": "bfloat16", "bf16": True},
    "full, wide": {"hidden": 1024, "layers": 6},
    "full, deep": {"hidden": 384, "layers": 24},
    "full, large vocabulary": {"vocab": 65536, "layers": 6},
    "full, larger teacher": {"teacher_layers": 24, "layers": 6},
    "LoRA": {"lora": True},
    "LoRA, four micro-batches": {"lora": True, "accumulation": 4},
    "LoRA, bfloat16 base": {"lora": True, "dtype": "bfloat16", "bf16": True, "rows": 8},
    "LoRA, checkpointing": {"lora": True, "checkpointing": True, "rows": 8},
}
PARTS = ("weights", "teacher", "moments", "gradients", "activations", "loss")
PROMPT = [{"role": "user", "content": "6 a:-3 b:*4"}]


def shape(size: dict, layers: int) -> Qwen3Config:
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return small(size["hidden"], layers, size["vocab"]).config(dtype=size["dtype"], **ids)


def adapter(size: dict) -> LoraConfig | None:
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if size["lora"] else None


def planned(size: dict) -> dict[str, float]:
    """What the plan says of a case, in MiB."""
    prompt = len(make_tokenizer().apply_chat_template(PROMPT, add_generation_prompt=True)["input_ids"])
    dtype, teacher_layers = getattr(torch, size["dtype"]), size["teacher_layers"]
    training = Training(
        student=shape(size, size["layers"]),
        teacher=shape(size, teacher_layers or size["layers"]) if teacher_layers or not size["lora"] else None,
        dtype=dtype,
        teacher_dtype=dtype,
        autocast=size["bf16"],
        peft_config=adapter(size),
        gradient_checkpointing=size["checkpointing"],
        rows=size["rows"],
        length=prompt + size["completion"],
        completion=size["completion"],
        several=size["accumulation"] > 1,
        device="cpu",
    )
    return {name: value / MIB for name, value in parts(training).items()}


def work(case: str) -> dict:
    """What a case took, in MiB, in a process of its own."""
    size = BASE | CASES[case]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer, teacher_layers = make_tokenizer(), size["teacher_layers"]

    def build(layers: int) -> Qwen3ForCausalLM:
        model = Qwen3ForCausalLM(shape(size, layers)).to(getattr(torch, size["dtype"]))
        with torch.no_grad():
            model.model.norm.weight.fill_(8)  # spreads the logits, or the alarm takes the teacher for a dead one
        return model

    rows = size["rows"] * size["accumulation"] * 3
    ids = torch.randint(3, len(tokenizer), (rows, size["completion"])).tolist()
    # What is loaded once whatever the model is
    torch.nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 8, 8))
    before = restart_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = OPSDTrainer(
            model=build(size["layers"]),
            teacher_model=build(teacher_layers) if teacher_layers else None,
            args=OPSDConfig(
                folder,
                teacher_prompt_template="{prompt} concise",
                lmbda=0.0,
                max_completion_length=size["completion"],
                per_device_train_batch_size=size["rows"],
                gradient_accumulation_steps=size["accumulation"],
                max_steps=3,
                learning_rate=1e-5,
                gradient_checkpointing=size["checkpointing"],
                bf16=size["bf16"],
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": PROMPT, "completion_ids": row} for row in ids]),
            processing_class=tokenizer,
            peft_config=adapter(size),
        )
        trainer.train()
        found = peak() - before
    return {"case": case, "size": size, "peak_mib": found}


def table() -> str:
    """Planned beside measured."""
    lines = []
    for row in read(RESULTS / "memory_plan" / "cpu.json"):
        found = planned(row["size"])
        total = sum(found.values())
        cells = [f"{total:,.0f}", f"{row['peak_mib']:,.0f}", f"{total / row['peak_mib']:.2f}"]
        lines.append([row["case"], *cells, *(f"{found[name]:,.0f}" for name in PARTS)])
    return markdown(["training step", "planned, MiB", "measured, MiB", "ratio", *PARTS], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_plan" / "cpu.json")
    args = parser.parse_args(argv)
    # Every tensor of note is mapped by itself and handed back at once, so that what is resident is what is in use
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    rows = []
    for case in args.cases:
        rows.append(run_alone(work, case))
        total = sum(planned(rows[-1]["size"]).values())
        print(f"{case}: planned {total:.0f} MiB, took {rows[-1]['peak_mib']:.0f}", flush=True)
    write_results(args.output, rows, {"base": BASE, "cases": args.cases})


if __name__ == "__main__":
    main()
