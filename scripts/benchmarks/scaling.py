"""
What a step of OPSD costs in time and memory, on paper, and how that paper does against what was measured on a CPU.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.scaling --measure     # a few processor minutes
    python -m scripts.benchmarks.scaling               # prints the tables from what was measured

No GPU has run this: what the tables say of GPUs are the formulas below with the `ASSUMED` constants.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import DynamicCache, Qwen3ForCausalLM

from scripts.benchmarks.step import SIZES, rollouts, work
from scripts.harness.meter import MIB
from scripts.harness.processes import run_alone
from scripts.harness.results import RESULTS, read, write_results
from scripts.harness.shapes import ASSUMED, QWEN3, Shape, small
from scripts.harness.tables import markdown


GB = 1e9

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


def measure_step(name: str) -> dict:
    """One case."""
    size = SIZES["cpu"] | BASE | CASES[name]
    completions, correct = rollouts(size, seed=0)
    row = run_alone(work, ARM, size, "cpu", 4, 0)
    return row | {"case": name, "size": size, "lengths": [len(ids) for ids in completions], "correct": correct}


def measure_reuse() -> dict:
    """A group of eight with a teacher's prompt as long as the completions: one prefill for all, against one for each."""
    group, length = 8, 256
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(small(256, 8, 512, tied=False).config()).eval().model
    prompt = torch.randint(0, 512, (1, length)).expand(group, -1)
    completions = torch.randint(0, 512, (group, length))

    def whole():
        return model(torch.cat([prompt, completions], 1), use_cache=False).last_hidden_state[:, length - 1 : -1]

    def shared():
        cache = DynamicCache(config=model.config)
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
    for name in CASES:
        rows.append(measure_step(name))
        print(name, [round(m["seconds"], 2) for m in rows[-1]["measured"]], flush=True)
    rows.append(measure_reuse())
    print(rows[-1])
    write_results(RESULTS / "scaling" / "cpu.json", rows, {"base": BASE, "arm": ARM, "seed": 0})


def predicted_parts(row: dict) -> dict[str, float]:
    """FLOPs of the parts of a step."""
    shape = small(*(row["size"][name] for name in ("hidden_size", "num_layers", "vocab_size")))
    kept = [length for length, verdict in zip(row["lengths"], row["correct"], strict=True) if verdict]
    # The prompts of the step benchmark, in tokens of one character each
    student = shape.forward([length + 82 for length in kept], causal=False)
    teacher = shape.forward([length + 322 for length in kept], causal=False)
    return {"teacher": teacher, "student": student, "loss": shape.loss(sum(kept)), "backward": 2 * student}


def step_table() -> str:
    """How the formulas of the time do against what was measured."""
    steps = [row for row in read(RESULTS / "scaling" / "cpu.json") if "measured" in row]
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
    heading = ["step", "measured, s", "predicted / measured", *predicted_parts(steps[0])]
    return f"At {speed / 1e9:.0f} GFLOP/s, which is what the first case comes to:\n\n{markdown(heading, lines)}"


def memory_table() -> str:
    """How the formulas of the memory do against what was measured."""
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
            vocab = row["vocab_size"]
            shape = small(config["hidden_size"], config["num_layers"], vocab)
            tokens = config["rows"] * (config["completion_length"] + 30)
            activations = 4 * shape.layers * shape.layer_activations * tokens
            loss = 4 * shape.head + min(96 << 20, 8 * tokens * vocab)
            predicted = (4 * 4 * shape.total + activations + loss) / MIB
            found = row["peak_mib"]
            lines.append([f"full, V {vocab:,}", "student, teacher, two moments, activations, loss", predicted, found])
    return markdown(
        ["memory", "of what", "predicted, MiB", "measured, MiB", "ratio"],
        [[a, b, f"{c:.0f}", f"{d:.0f}", f"{c / d:.2f}"] for a, b, c, d in lines],
    )


def reuse_line() -> str:
    """What one prefill for a group was worth when it was tried."""
    reuse = read(RESULTS / "scaling" / "cpu.json")[-1]
    group, length = reuse["group"], reuse["length"]
    return (
        f"Prompt of a group of {group}, as long as its completions, once instead of {group} times: teacher forward "
        f"{reuse['whole'] / reuse['shared']:.2f} times as fast (by count "
        f"{2 * group * length / (length + group * length):.2f}), largest difference {reuse['difference']:.0e}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# On paper
# ---------------------------------------------------------------------------------------------------------------------


def prompt_table() -> str:
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
    return markdown(heading, lines)


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


def extrapolation_table() -> str:
    """Steps that nobody has run."""
    lines = []
    for name, gpus, batch, length, longest in (
        ("8B", 8, 32, 4000, 8192),
        ("8B", 8, 256, 4000, 8192),
        ("8B", 8, 256, 8000, 16384),
        ("8B", 64, 256, 4000, 8192),
        ("32B", 8, 256, 4000, 8192),
        ("32B", 16, 256, 4000, 8192),
        ("32B", 64, 256, 4000, 8192),
        ("32B", 64, 2048, 4000, 8192),
    ):
        found = step(QWEN3[name], gpus, batch, length, longest, budget=16384)
        train = max(found["compute"], found["communication"])
        gb = found["memory"] / GB
        lines.append(
            [name, str(gpus), str(batch), f"{length:,} / {longest:,}", f"{found['generation']:.0f}"]
            + [f"{found['compute']:.1f}", f"{found['communication']:.1f}", f"{found['generation'] + train:.0f}"]
            + [f"{gb:.0f}" + (" (does not fit)" if found["memory"] > 0.95 * ASSUMED["capacity"] else "")]
        )
    heading = [
        "model",
        "GPUs",
        "rollouts",
        "tokens, mean / longest",
        "generation, s",
        "training, s",
        "FSDP traffic, s",
    ]
    return markdown([*heading, "step, s", "GB on each GPU"], lines)


def traffic_line() -> str:
    """From how many tokens on a micro-batch hides the traffic, within a node and between nodes."""
    computed = 8 * ASSUMED["peak"] * ASSUMED["mfu"] / 10
    near, far = (computed / ASSUMED[where] for where in ("nvlink", "network"))
    return f"Traffic hides behind micro-batches from {near:,.0f} tokens on within a node, {far:,.0f} between nodes."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure first: recipes/results/scaling/cpu.json")
    args = parser.parse_args(argv)
    if args.measure:
        measure()
    parts = (step_table, memory_table, reuse_line, prompt_table, extrapolation_table, traffic_line)
    print("\n\n".join(part() for part in parts))


if __name__ == "__main__":
    main()
