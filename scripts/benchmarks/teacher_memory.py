"""
Takes the peak memory of training with a teacher, beside supervised fine-tuning (SFT) of the same model on the same tokens.

    python -m scripts.benchmarks.teacher_memory

Every case has a process of its own on the CPU: a Qwen3 model with random weights, two optimizer steps with AdamW, float32,
no gradient checkpointing. The rollouts are given, so that nothing is generated and every case trains on the same tokens;
the teacher sees a longer prompt. `teacher forward` is what a forward pass of the teacher takes on the same batch, above the
weights. Both losses go through the logits in pieces, but SFT's pieces are larger than this batch, so with a vocabulary of
16,384 it holds its logits whole and ours does not. With one of 256 neither loss counts, and what is left is the teacher.
Results go to recipes/results/teacher_memory/cpu.json.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from scripts.harness.meter import MIB, peak, restart_peak
from scripts.harness.processes import run_alone
from scripts.harness.results import RESULTS, read, write_results
from scripts.harness.shapes import small
from scripts.harness.tables import markdown
from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny import TinyConfig, problems, row
from trl_opsd.tiny.tokenizer import make_tokenizer


# What is measured, and what it is compared with
CASES = {
    "teacher forward": None,
    "lora sft": None,
    "lora opsd initial": "lora sft",
    "full sft": None,
    "full opsd initial": "full sft",
}


def work(case: str, vocab_size: int, args: argparse.Namespace) -> dict:
    """One case, in a process of its own: the row of its numbers."""
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    prompts = [row(problem)["prompt"] for problem in problems(TinyConfig(), "train", args.rows, seed=args.seed)]
    prompt_ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
    completion_ids = torch.randint(3, len(tokenizer), (args.rows, args.completion_length)).tolist()
    settings = {
        "per_device_train_batch_size": args.rows,
        "max_steps": args.steps,
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": args.seed,
    }
    peft_config = LoraConfig(r=args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    shape = small(args.hidden_size, args.num_layers, vocab_size)
    before = restart_peak()
    model = Qwen3ForCausalLM(shape.config(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    with torch.no_grad():
        model.model.norm.weight.fill_(8)  # spreads the logits, or the alarm takes the teacher for a dead one
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / MIB
    if case == "teacher forward":
        model = get_peft_model(model, peft_config).eval()
        # As long as the teacher's, which are padded to the longest
        ids = torch.randint(3, len(tokenizer), (args.rows, args.completion_length + max(map(len, prompt_ids)) + 8))
        before = restart_peak()
        with torch.no_grad(), model.disable_adapter():
            hidden = model.get_base_model().model(input_ids=ids).last_hidden_state[:, -args.completion_length - 1 : -1]
        kept = hidden.numel() * hidden.element_size() / MIB
        return {"case": case, "weights_mib": weights, "peak_mib": peak() - before, "hidden_mib": kept}
    peft_config = peft_config if case.startswith("lora") else None
    with tempfile.TemporaryDirectory() as folder:
        if "sft" in case:
            data = [
                {"input_ids": ids + answer, "completion_mask": [0] * len(ids) + [1] * len(answer)}
                for ids, answer in zip(prompt_ids, completion_ids, strict=True)
            ]
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(folder, completion_only_loss=True, **settings),
                train_dataset=Dataset.from_list(data * args.steps),
                processing_class=tokenizer,
                peft_config=peft_config,
            )
        else:
            data = [
                {"prompt": prompt, "completion_ids": answer}
                for prompt, answer in zip(prompts, completion_ids, strict=True)
            ]
            trainer = OPSDTrainer(
                model=model,
                args=OPSDConfig(
                    folder,
                    teacher_weights=case.split()[-1],
                    teacher_prompt_template="{prompt} concise",
                    lmbda=0.0,
                    max_completion_length=args.completion_length,
                    **settings,
                ),
                train_dataset=Dataset.from_list(data * args.steps),
                processing_class=tokenizer,
                peft_config=peft_config,
            )
        built = restart_peak() - before
        trainer.train()
    optimized = sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values())
    return {
        "case": case,
        "weights_mib": weights,
        "optimized_parameters": optimized,
        "before_training_mib": built,
        "peak_mib": peak() - before,
    }


def table() -> str:
    """Peaks, and what a teacher adds to them."""
    lines = [
        [
            f"{row['vocab_size']:,}",
            row["case"],
            f"{row['weights_mib']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['above_sft_mib']:.0f}" if "above_sft_mib" in row else "",
        ]
        for row in read(RESULTS / "teacher_memory" / "cpu.json")
    ]
    return markdown(["vocabulary", "case", "weights, MiB", "peak, MiB", "above SFT, MiB"], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=640)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[256, 16384])
    parser.add_argument("--rows", type=int, default=4, help="rollouts in a batch")
    parser.add_argument("--completion_length", type=int, default=224, help="tokens of each")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "teacher_memory" / "cpu.json")
    args = parser.parse_args(argv)

    # Every tensor of note is mapped by itself and handed back at once, so that what is resident is what is in use
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    rows = []
    for vocab_size in args.vocab_sizes:
        found = {}
        for case, reference in CASES.items():
            found[case] = {"vocab_size": vocab_size, **run_alone(work, case, vocab_size, args)}
            if reference is not None:
                found[case]["above_sft_mib"] = found[case]["peak_mib"] - found[reference]["peak_mib"]
            print(
                " ".join(f"{name}={value:.1f}" for name, value in found[case].items() if name != "case"), f"[{case}]"
            )
        opsd, activations = found["lora opsd initial"], found["teacher forward"]["peak_mib"]
        opsd["within_teacher_activations"] = opsd["above_sft_mib"] <= activations
        print(
            f"vocabulary of {vocab_size}: LoRA with the teacher `initial` takes {opsd['above_sft_mib']:.1f} MiB more than "
            f"LoRA SFT, and the teacher's activations {activations:.1f} MiB"
        )
        rows += found.values()
    config = {name: value for name, value in vars(args).items() if name != "output"}
    write_results(args.output, rows, config)
    print(args.output)


if __name__ == "__main__":
    main()
