"""
What the models that people have take on the GPUs that people have: memory by the plan, time by the formulas of scaling.py.

    python -m scripts.benchmarks.what_fits        # nothing is loaded, and no GPU is needed

Each row is recipes/opsd.yaml with the options of `options_of`, by the first of `SETUPS` that fits; the configurations of the
models are written down here, so that no hub is asked. **Nobody has run any of it.** Results go to
recipes/results/what_fits/plan.json.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from scripts.benchmarks.scaling import step
from scripts.harness.results import RESULTS, ROOT, read, write_results
from scripts.harness.shapes import QWEN3, Shape
from scripts.harness.tables import markdown
from trl_opsd.cli import parse
from trl_opsd.plan.__main__ import ARGUMENTS
from trl_opsd.plan.run import Plan, plan


PRUNED = "Qwen3-8B, half of its layers"
FOUR_B = Shape(2560, 36, 32, 8, 128, 9728, 151936, tied=True)
HALF_OF_8B = Shape(4096, 17, 32, 8, 128, 12288, 151936)  # an 8B with 17 of its 36 layers
R1 = {
    "R1-Distill-Qwen-1.5B": (Shape(1536, 28, 12, 2, 128, 8960, 151936), Qwen2Config),
    "R1-Distill-Qwen-7B": (Shape(3584, 28, 28, 4, 128, 18944, 152064), Qwen2Config),
    "R1-Distill-Llama-8B": (Shape(4096, 32, 32, 8, 128, 14336, 128256), LlamaConfig),
}
MODELS = {
    "Qwen3-1.7B": (QWEN3["1.7B"], None),
    "Qwen3-4B": (FOUR_B, None),
    "Qwen3-8B": (QWEN3["8B"], None),
    **R1,
    PRUNED: (HALF_OF_8B, None),
}
#: GPUs, configuration of accelerate (by what is given without one each holds everything), and whether an adapter is trained
SETUPS = ((1, None, True), (4, None, False), (4, "fsdp2", False), (8, None, False), (8, "fsdp2", False))
LORA = (
    "--use_peft true --lora_r 64 --lora_alpha 128 --lora_target_modules all-linear --dtype bfloat16 --learning_rate 1e-5"
).split()
ROLLOUTS, LENGTH, LONGEST, STEPS = 32, 4000, 12288, 100


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model."""
    shape, kind = MODELS[name]
    if kind is None:
        return shape.config(dtype="bfloat16")
    return kind(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        dtype="bfloat16",
    )


def options_of(gpus: int, launch: str | None, is_adapter: bool) -> list[str]:
    """The options beside recipes/opsd.yaml: 32 rollouts a step on any number of GPUs."""
    options = ["--gradient_accumulation_steps", str(ROLLOUTS // gpus)]
    if launch is not None:
        options += ["--dtype", "bfloat16", "--probe_prompts", "0"]
    return options + (LORA if is_adapter else [])


def planned(name: str, gpus: int, launch: str | None, is_adapter: bool) -> Plan:
    """The plan of a row."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for which in (name, "Qwen3-8B"):
            paths[which] = str(Path(folder, which))
            config_of(which).save_pretrained(paths[which])
        options = ["--model_name_or_path", paths[name], *options_of(gpus, launch, is_adapter)]
        if name == PRUNED:
            options += ["--teacher_weights", "external", "--teacher_model_name_or_path", paths["Qwen3-8B"]]
            options += ["--teacher_model_init_kwargs", '{"dtype": "bfloat16"}']
        options += ["--num_processes", str(gpus), "--use_cpu", "true"]
        if launch is not None:
            options += ["--accelerate_config", str(ROOT / "recipes" / "accelerate_configs" / f"{launch}.yaml")]
        arguments, _, args, model_args = parse(
            ARGUMENTS, ["--config", str(ROOT / "recipes" / "opsd.yaml"), *options], prog="trl_opsd.plan"
        )
        return plan(arguments, args, model_args)


def row(name: str, gpus: int) -> dict:
    """A model on a number of GPUs."""
    shape, _ = MODELS[name]
    for setup in (setup for setup in SETUPS if setup[0] == gpus):
        found = planned(name, *setup)
        if found.fits:
            break
    _, launch, is_adapter = setup
    seconds = step(shape, gpus, ROLLOUTS, LENGTH, LONGEST, budget=20480)
    training = max(seconds["compute"], seconds["communication"] if launch else 0.0)
    return {
        "model": name,
        "gpus": gpus,
        "weights": "LoRA" if is_adapter else "full",
        "launch": launch or "ddp",
        "training_gib": found.train,
        "generating_gib": found.generate,
        "fits": found.fits,
        "hours": STEPS * (seconds["generation"] + training) / 3600,
    }


def table() -> str:
    """A line for each row of the results."""
    lines = [
        [
            r["model"],
            str(r["gpus"]),
            r["weights"],
            r["launch"],
            f"{r['training_gib']:.0f}",
            f"{r['generating_gib']:.0f}",
        ]
        + [f"{r['hours']:.1f}" if r["fits"] else "does not fit"]
        for r in read(RESULTS / "what_fits" / "plan.json")
    ]
    heading = [
        "model",
        "GPUs of 80 GB",
        "trained",
        "what they share",
        "GiB, training",
        "GiB, generating",
        "hours, 100 updates",
    ]
    return markdown(heading, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    # An adapter on what was pruned has no way back to what it was
    rows = [row(name, gpus) for name in MODELS for gpus in (1, 4, 8) if name != PRUNED or gpus > 1]
    settings = {"rollouts": ROLLOUTS, "mean_tokens": LENGTH, "longest": LONGEST, "updates": STEPS}
    write_results(RESULTS / "what_fits" / "plan.json", rows, settings)
    print(table())


if __name__ == "__main__":
    main()
