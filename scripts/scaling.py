"""
What a step of OPSD costs in time and memory, on paper, and how that paper does against what was measured on a CPU.

    OMP_NUM_THREADS=1 python scripts/scaling.py --measure     # a few processor minutes; writes recipes/results/scaling/cpu.json
    python scripts/scaling.py                                 # prints the tables of recipes/README.md

No GPU has run this: what the tables say of GPUs are the formulas below with the `ASSUMED` constants.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from trl_opsd.results import write_results


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
MIB, GB = 1 << 20, 1e9
ASSUMED = {
    "peak": 989e12,  # FLOP/s of an H100 in bfloat16
    "mfu": 0.4,  # share of it that training reaches
    "memory": 3.35e12,  # bytes/s
    "mbu": 0.6,  # share of it that decoding reaches
    "nvlink": 300e9,  # bytes/s of each GPU within a node of eight, reached
    "network": 40e9,  # and between nodes
    "capacity": 80e9,
}


@dataclass
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False

    @property
    def body(self) -> int:
        """Parameters of the matrices of all layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def total(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)

    def forward(self, lengths: list[int], causal: bool = True) -> float:
        """FLOPs without the head. Attention without a causal kernel computes the upper triangle too."""
        attention = (2 if causal else 4) * self.layers * self.heads * self.head_dim
        return 2 * self.body * sum(lengths) + attention * sum(length**2 for length in lengths)

    def loss(self, tokens: int) -> int:
        """FLOPs: the logits of both, and the gradients of the student's states and head."""
        return 8 * self.head * tokens

    @property
    def layer_activations(self) -> int:
        """Numbers that the backward pass of one layer needs of each token: norms, projections, attention, MLP."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 8 * self.hidden + 8 * q + 3 * kv + 4 * self.intermediate

    @property
    def cache(self) -> int:
        """Bytes of keys and values of a token in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


QWEN3 = {
    "8B": Shape(4096, 36, 32, 8, 128, 12288, 151936),
    "32B": Shape(5120, 64, 64, 8, 128, 25600, 151936),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measured on a CPU
# ---------------------------------------------------------------------------------------------------------------------

BASE = {"hidden_size": 128, "num_layers": 4, "rollouts": 12, "median_length": 150, "max_length": 1024, "budget": 2048}
CASES = {
    "base": {},
    "twice the width": {"hidden_size": 256},
    "twice the layers": {"num_layers": 8},
    "traces twice as long": {"median_length": 300},
    "twice the rollouts": {"rollouts": 24},
}
ARM = "ours, context, correct"


def shape_of(size: dict) -> Shape:
    """As scripts/benchmark_step.py makes it."""
    hidden = size["hidden_size"]
    return Shape(
        hidden, size["num_layers"], hidden // 64, max(hidden // 128, 1), 64, 3 * hidden, size["vocab_size"], True
    )


def measure_step(name: str, output: Path) -> None:
    """One case, in a process of its own."""
    import benchmark_step

    from trl_opsd.opsd.alarms import AlarmCallback

    size = benchmark_step.SIZES["cpu"]
    size |= BASE | CASES[name]
    options = argparse.Namespace(device="cpu", per_device=4, seed=0, output=str(output))
    with mock.patch.object(AlarmCallback, "check_divergence"):  # random weights are not a dead teacher
        benchmark_step.work(ARM, options)
    completions, correct = benchmark_step.rollouts(size, 0)
    row = json.loads(Path(f"{output}.0").read_text())["rows"][0]
    row |= {"case": name, "size": size, "lengths": [len(ids) for ids in completions], "correct": correct}
    write_results(output, [row], {})


def measure_reuse() -> dict:
    """A group of eight with a teacher's prompt as long as the completions: one prefill for all, against one for each."""
    import torch
    from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

    group, length = 8, 256
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval().model
    prompt = torch.randint(0, 512, (1, length)).expand(group, -1)
    completions = torch.randint(0, 512, (group, length))

    def whole():
        return model(torch.cat([prompt, completions], 1), use_cache=False).last_hidden_state[:, length - 1 : -1]

    def shared():
        cache = DynamicCache(config=config)
        first = model(prompt[:1], past_key_values=cache).last_hidden_state[:, -1:].expand(group, -1, -1)
        cache.batch_repeat_interleave(group)
        rest = model(completions[:, :-1], past_key_values=cache).last_hidden_state
        return torch.cat([first, rest], 1)

    seconds = {"whole": [], "shared": []}
    with torch.no_grad():
        difference = (whole() - shared()).abs().max().item()
        for _ in range(5):
            for function in (whole, shared):
                start = time.process_time()
                function()
                seconds[function.__name__].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"case": "prompt reuse", "group": group, "length": length, "difference": difference, **medians}


def measure() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        for name in CASES:
            subprocess.run(
                [sys.executable, __file__, "--work", name, "--output", str(output)],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            rows += json.loads(output.read_text())["rows"]
            print(name, [round(m["seconds"], 2) for m in rows[-1]["measured"]], flush=True)
    rows.append(measure_reuse())
    print(rows[-1])
    write_results(RESULTS / "scaling" / "cpu.json", rows, {"base": BASE, "arm": ARM, "seed": 0})


def predicted_parts(row: dict) -> dict[str, float]:
    """FLOPs of the parts of a step."""
    shape = shape_of(row["size"])
    kept = [length for length, verdict in zip(row["lengths"], row["correct"], strict=True) if verdict]
    # The prompts of scripts/benchmark_step.py, in tokens of one character each
    student = shape.forward([length + 82 for length in kept], causal=False)
    teacher = shape.forward([length + 322 for length in kept], causal=False)
    return {"teacher": teacher, "student": student, "loss": shape.loss(sum(kept)), "backward": 2 * student}


def table(heading: list[str], lines: list[list[str]]) -> None:
    print("\n| " + " | ".join(heading) + " |\n|" + "---|" * len(heading))
    for cells in lines:
        print("| " + " | ".join(cells) + " |")


def check() -> None:
    """Prints how the formulas do against what was measured."""
    rows = json.loads((RESULTS / "scaling" / "cpu.json").read_text())["rows"]
    steps, reuse = [row for row in rows if "measured" in row], rows[-1]
    measured = {}
    for row in steps:
        parts = [m["parts"] for m in row["measured"]]
        measured[row["case"]] = {name: statistics.median(p[name] for p in parts) for name in predicted_parts(row)}
    # One constant for all: what this CPU reaches in the first case
    speed = sum(predicted_parts(steps[0]).values()) / sum(measured["base"].values())
    lines = []
    for row in steps:
        parts, found = predicted_parts(row), measured[row["case"]]
        ratio = {name: parts[name] / speed / found[name] for name in parts}
        total = sum(found.values())
        cells = [f"{total:.2f}", f"{sum(parts.values()) / speed / total:.2f}", *(f"{r:.2f}" for r in ratio.values())]
        lines.append([row["case"], *cells])
    print(f"At {speed / 1e9:.0f} GFLOP/s, which is what the first case comes to:")
    table(["step", "measured, s", "predicted / measured", *predicted_parts(steps[0])], lines)

    lines = []
    products = json.loads((RESULTS / "divergence" / "cpu.json").read_text())
    config = products["run"]["config"]
    head = config["hidden_size"] * config["vocab_size"]
    fused = next(r for r in products["rows"] if r["backend"] == "fused" and r["beta"] == 1.0 and r["kl_clip"] is None)
    predicted = (4 * head + 4 * config["hidden_size"] * config["tokens"] + (96 << 20)) / MIB
    lines.append(["loss", "gradient of head and states, tile", predicted, fused["peak_extra_mib"]])
    memory = json.loads((RESULTS / "teacher_memory" / "cpu.json").read_text())
    config = memory["run"]["config"]
    for row in memory["rows"]:
        if row["case"] == "full opsd initial":
            hidden, vocab = config["hidden_size"], row["vocab_size"]
            shape = Shape(hidden, config["num_layers"], hidden // 64, hidden // 128, 64, 3 * hidden, vocab, tied=True)
            tokens = config["rows"] * (config["completion_length"] + 30)
            activations = 4 * shape.layers * shape.layer_activations * tokens
            loss = 4 * shape.head + min(96 << 20, 8 * tokens * vocab)
            predicted = (4 * 4 * shape.total + activations + loss) / MIB
            found = row["peak_mib"]
            lines.append([f"full, V {vocab:,}", "student, teacher, two moments, activations, loss", predicted, found])
    table(
        ["memory", "of what", "predicted, MiB", "measured, MiB", "ratio"],
        [[a, b, f"{c:.0f}", f"{d:.0f}", f"{c / d:.2f}"] for a, b, c, d in lines],
    )

    group, length = reuse["group"], reuse["length"]
    print(
        f"\nPrompt of a group of {group}, as long as its completions, once instead of {group} times: teacher forward "
        f"{reuse['whole'] / reuse['shared']:.2f} times as fast (by count "
        f"{2 * group * length / (length + group * length):.2f}), largest difference {reuse['difference']:.0e}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# On paper
# ---------------------------------------------------------------------------------------------------------------------


def prompt_share() -> None:
    """Share of forward tokens, and of a step's training FLOPs, that repeat a prompt which a group shares."""
    shape, lines = QWEN3["8B"], []
    for context, student, teacher, completion in (
        ("concise", 150, 200, 4000),
        ("concise, short traces", 150, 200, 1000),
        ("solution of 500 tokens", 150, 750, 4000),
        ("sibling or solution half as long", 150, 2250, 4000),
        ("solution as long as the trace", 150, 4250, 4000),
    ):
        cells = [context, f"{student} / {teacher} / {completion}"]
        for group in (4, 8):
            repeated = (group - 1) / group
            flops = {
                "student": 4 * shape.forward([student + completion]),
                "teacher": shape.forward([teacher + completion]),
                "loss": shape.loss(completion),
            }
            saved = shape.forward([teacher]) * repeated
            cells += [f"{repeated * teacher / (teacher + completion):.0%}", f"{saved / sum(flops.values()):.1%}"]
        lines.append(cells)
    heading = ["context", "tokens of prompt / teacher's prompt / completion"]
    heading += [f"G {g}: {what}" for g in (4, 8) for what in ("teacher tokens that repeat it", "of training FLOPs")]
    table(heading, lines)


def step(shape: Shape, gpus: int, rollouts: int, length: int, longest: int, budget: int) -> dict[str, float]:
    """Seconds and bytes of a step on `gpus`, FSDP2 with checkpointing, an engine on each node's GPUs or on each of them."""
    prompt, context, kept = 150, 200, 0.7
    a = ASSUMED
    # One engine on as few GPUs as hold the weights in half their memory
    tensor_parallel = 1
    while 2 * shape.total / tensor_parallel > a["capacity"] / 2:
        tensor_parallel *= 2
    each = rollouts * tensor_parallel / gpus
    read = longest * 2 * shape.total + each * length * (prompt + length / 2) * shape.cache
    generation = read / (tensor_parallel * a["memory"] * a["mbu"])
    trained = rollouts * kept
    flops = trained * (shape.forward([context + length]) + 4 * shape.forward([prompt + length]) + shape.loss(length))
    compute = flops / (gpus * a["peak"] * a["mfu"])
    # Gathered for the forward and the backward pass, reduced, and gathered for the teacher, in every micro-batch
    micro_batches = max(1.0, trained * (context + length) / (budget * gpus))
    bandwidth = a["nvlink"] if gpus <= 8 else a["network"]
    communication = micro_batches * 4 * 2 * shape.total * (gpus - 1) / gpus / bandwidth
    memory = (16 + 2) * shape.total / gpus  # weights, gradient and moments in float32; the teacher in bfloat16
    memory += 3 * 2 * 2 * shape.body / shape.layers  # a layer of each in use and the next on its way
    memory += (2 * 2 + 4) * shape.head  # both heads whole, and the gradient of one
    memory += 2 * budget * (shape.layers * shape.hidden + shape.layer_activations) + (2 << 30)
    return {
        "generation": generation,
        "compute": compute,
        "communication": communication,
        "memory": memory,
        "engine": tensor_parallel,
    }


def extrapolate() -> None:
    lines = []
    for name, gpus, rollouts, length, longest in (
        ("8B", 8, 32, 4000, 8192),
        ("8B", 8, 256, 4000, 8192),
        ("8B", 8, 256, 8000, 16384),
        ("8B", 64, 256, 4000, 8192),
        ("32B", 8, 256, 4000, 8192),
        ("32B", 16, 256, 4000, 8192),
        ("32B", 64, 256, 4000, 8192),
        ("32B", 64, 2048, 4000, 8192),
    ):
        found = step(QWEN3[name], gpus, rollouts, length, longest, budget=16384)
        train = max(found["compute"], found["communication"])
        gb = found["memory"] / GB
        lines.append(
            [name, str(gpus), f"{rollouts}", f"{length:,} / {longest:,}", f"{found['generation']:.0f}"]
            + [f"{found['compute']:.1f}", f"{found['communication']:.1f}", f"{found['generation'] + train:.0f}"]
            + [f"{gb:.0f}" + (" (does not fit)" if found["memory"] > 0.95 * ASSUMED["capacity"] else "")]
        )
    table(
        ["model", "GPUs", "rollouts", "tokens, mean / longest", "generation, s", "training, s", "FSDP traffic, s"]
        + ["step, s", "GB on each GPU"],
        lines,
    )
    for where in ("nvlink", "network"):
        ratio = 8 * ASSUMED["peak"] * ASSUMED["mfu"] / (10 * ASSUMED[where])
        print(f"\nTraffic ({where}) hides behind micro-batches from {ratio:,.0f} tokens on.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return measure_step(args.work, args.output)
    if args.measure:
        measure()
    check()
    prompt_share()
    extrapolate()


if __name__ == "__main__":
    main()
