"""
Times the train phase of one optimizer step on the same rollouts: TRL's DistillationTrainer and SDFTTrainer, and ours.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.step                  # CPU
    OMP_NUM_THREADS=1 python -m scripts.benchmarks.step --processes 2    # two processes, and how long they wait
    python -m scripts.benchmarks.step --device cuda                      # GPU: 0.6 B parameters, traces of up to 8k tokens

The rollouts are written in advance, with a long-tailed distribution of lengths, and half of them are correct. What
counts are useful tokens: those of correct rollouts. Every arm has a process of its own and the arms take turns. TRL's
loss is given the valid positions only, as it does itself where it finds Triton. Of several processes, the seconds are
those of the clock, and a process is idle while its processor does nothing for it: give them a quiet machine. Results and
plot go to recipes/results/step/<device>.{json,png}; processes and seed are in the name where they are not 1 and 0.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer, sdft_trainer
from trl.trainer import distillation_trainer

from scripts.harness.meter import Meter
from scripts.harness.plots import plt, save
from scripts.harness.processes import run_distributed
from scripts.harness.results import RESULTS, write_results
from scripts.harness.shapes import ASSUMED, QWEN3, Shape, small
from scripts.harness.tables import markdown
from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd import trainer as opsd_trainer
from trl_opsd.tiny.tokenizer import make_tokenizer


SIZES = {
    # The head has about a quarter of the parameters, as in a 1.7 B model with a vocabulary of 152k
    "cpu": {
        "hidden_size": 128,
        "num_layers": 6,
        "vocab_size": 4096,
        "rollouts": 32,
        "median_length": 200,
        "max_length": 2048,
        "budget": 2048,
        "steps": 2,
    },
    "cuda": {
        "hidden_size": 1024,
        "num_layers": 28,
        "vocab_size": 151936,
        "rollouts": 64,
        "median_length": 1500,
        "max_length": 8192,
        "budget": 16384,
        "steps": 3,
    },
}
PARTS = ("teacher", "student", "loss", "backward", "optimizer", "idle", "rest")
CONTEXT = "{prompt}{privileged_context}"
ARMS = {
    "TRL Distillation": ("distillation", {}),
    "ours, external teacher, all, no budget": ("ours", {"external": True, "gate": "all"}),
    "ours, external teacher, all": ("ours", {"external": True, "gate": "all", "budget": True}),
    "ours, external teacher, correct, no budget": ("ours", {"external": True, "gate": "correct"}),
    "ours, external teacher, correct": ("ours", {"external": True, "gate": "correct", "budget": True}),
    "TRL SDFT, full logits": ("sdft", {"distillation_mode": "full_logits"}),
    "TRL SDFT, top 100": ("sdft", {"distillation_mode": "topk_logits"}),
    "ours, context, all": ("ours", {"gate": "all", "budget": True}),
    "ours, context, correct": ("ours", {"gate": "correct", "budget": True}),
}


def rollouts(size: dict, seed: int) -> tuple[list[list[int]], list[bool]]:
    """Completions as token ids, log-normal in length with a spread as reasoning traces have it, and which are correct."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(size["rollouts"], generator=generator).mul(0.9).exp()
    lengths = (size["median_length"] * spread).clamp(16, size["max_length"]).int().tolist()
    eos = make_tokenizer().eos_token_id
    completions = [[*torch.randint(5, 60, (length - 1,), generator=generator).tolist(), eos] for length in lengths]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    correct = [position < len(lengths) // 2 for position in order]
    return completions, correct


class Shares:
    """Seconds spent in the parts of a step."""

    def __init__(self, cuda: bool):
        self.cuda, self.seconds = cuda, defaultdict(float)

    @contextmanager
    def part(self, name: str):
        if self.cuda:
            torch.cuda.synchronize()
        start = time.process_time() if not self.cuda else time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[name] += (time.process_time() if not self.cuda else time.perf_counter()) - start

    def timed(self, name: str, function):
        def wrapper(*args, **kwargs):
            with self.part(name if name != "forward" else "student" if torch.is_grad_enabled() else "teacher"):
                return function(*args, **kwargs)

        return wrapper


class Steps(TrainerCallback):
    """Measures every step but the first."""

    def __init__(self, device: str, shares: Shares):
        self.device, self.shares, self.meters, self.parts = device, shares, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.shares.seconds.clear()
        self.meter = Meter(self.device)
        self.meter.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.__exit__()
        if state.global_step > 1:
            self.meters.append(self.meter)
            self.parts.append(dict(self.shares.seconds))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_part = self.shares.part("optimizer")
        self.optimizer_part.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_part.__exit__(None, None, None)


def shape_of(size: dict) -> Shape:
    """The shape of a size: of a model that there is, if it names one."""
    if "model" in size:
        return QWEN3[size["model"]]
    return small(size["hidden_size"], size["num_layers"], size["vocab_size"])


def checkpoints(size: dict, device: str, folder: str) -> tuple[str, str]:
    """Writes student and teacher, with random weights, unless they are there. Returns their folders."""
    tokenizer = make_tokenizer()
    config = shape_of(size).config(
        max_position_embeddings=2 * size["max_length"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    paths = Path(folder, "student"), Path(folder, "teacher")
    for seed, path in enumerate(paths):
        if not path.exists():
            torch.manual_seed(seed)
            with torch.device(device):
                model = Qwen3ForCausalLM(config)
            model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(path)
            tokenizer.save_pretrained(path)
    return str(paths[0]), str(paths[1])


def attempt(*args) -> dict | None:
    """[`work`], or `None` where the memory of the GPU is not enough."""
    try:
        return work(*args)
    except torch.OutOfMemoryError:
        return None


def work(arm: str, size: dict, device: str, per_device: int, seed: int, folder: str | None = None) -> dict:
    """
    One arm, in a process of its own or in several: the row of its numbers, with what every step has `measured`. `folder`
    has the checkpoints, or takes them up.
    """
    cuda = device == "cuda"
    kind, options = ARMS[arm][0], dict(ARMS[arm][1])
    world = int(os.environ.get("WORLD_SIZE", 1))
    completions, correct = rollouts(size, seed)
    tokenizer = make_tokenizer()
    shape = shape_of(size)
    rows = [
        {"prompt": f"{index}" + "+2=3" * 20, "privileged_context": "*4=5" * 60, "correct": float(verdict)}
        for index, verdict in enumerate(correct)
    ]
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": len(rows) // (per_device * world),
        "max_steps": size["steps"] + 1,
        "max_completion_length": size["max_length"],
        "shuffle_dataset": False,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "bf16": cuda,
        "use_cpu": not cuda,
        "ddp_backend": "gloo" if world > 1 and not cuda else None,
        "gradient_checkpointing": cuda,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
    }
    shares = Shares(cuda)
    steps = Steps(device, shares)
    student, teacher = checkpoints(
        size, device, folder or tempfile.mkdtemp()
    )  # before a configuration starts the processes' group
    common = {"model": student, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    common["callbacks"] = [steps]
    budget = size["budget"] if options.pop("budget", False) else None
    has_context = kind == "sdft" or (kind == "ours" and "external" not in options)
    if kind == "sdft":
        # Reverse KL over the vocabulary, from the initial weights: the objective of the others
        settings |= {"distillation_alpha": 1.0, "num_generations": 1, "teacher_prompt_template": CONTEXT, **options}
        trainer = SDFTTrainer(args=SDFTConfig(**settings), **common)
    elif kind == "distillation":
        trainer = DistillationTrainer(args=DistillationConfig(**settings, beta=1.0), teacher_model=teacher, **common)
    else:
        external = options.pop("external", False)
        trainer = OPSDTrainer(
            args=OPSDConfig(
                **settings,
                **options,
                beta=1.0,
                max_tokens_per_microbatch=budget,
                teacher_prompt_template=None if external else CONTEXT,
            ),
            teacher_model=teacher if external else None,
            reward_funcs=lambda correct, **kwargs: correct,
            **common,
        )

    def written(self, prompt_ids, *args, **kwargs):
        return [completions[int(tokenizer.decode(ids).split("+")[0])] for ids in prompt_ids]

    for network in {id(m): m for m in (trainer.model, trainer.teacher_model) if m is not None}.values():
        network.base_model.forward = shares.timed("forward", network.base_model.forward)
    trainer.accelerator.backward = shares.timed("backward", trainer.accelerator.backward)
    loss = shares.timed("loss", distillation_trainer._chunked_divergence_loss)
    our_loss = shares.timed("loss", opsd_trainer.linear_divergence_with_metrics)
    with (
        mock.patch.object(DistillationTrainer, "_generate_single_turn", written),
        mock.patch.object(SDFTTrainer, "_generate", lambda self, prompt_ids: (prompt_ids, written(self, prompt_ids))),
        mock.patch.object(distillation_trainer, "_use_triton", lambda device: True),
        mock.patch.object(distillation_trainer, "_chunked_divergence_loss", loss),
        mock.patch.object(opsd_trainer, "linear_divergence_with_metrics", our_loss),
        mock.patch.object(
            sdft_trainer,
            "compute_full_logit_self_distillation_loss",
            shares.timed("loss", sdft_trainer.compute_full_logit_self_distillation_loss),
        ),
        mock.patch.object(
            sdft_trainer,
            "compute_topk_self_distillation_loss",
            shares.timed("loss", sdft_trainer.compute_topk_self_distillation_loss),
        ),
    ):
        trainer.train()
    useful = sum(len(ids) for ids, verdict in zip(completions, correct, strict=True) if verdict)
    written_tokens = sum(map(len, completions))
    trained = written_tokens if options.get("gate", "all") == "all" else useful
    # What the models have to compute of the rollouts trained on, without padding and recomputation
    flops = shape.loss(trained)
    for row, ids, verdict in zip(rows, completions, correct, strict=True):
        if verdict or trained == written_tokens:
            prompt = len(tokenizer(row["prompt"])["input_ids"])
            context = len(tokenizer(row["privileged_context"])["input_ids"]) if has_context else 0
            flops += 3 * shape.forward([prompt + len(ids)])
            flops += shape.forward([prompt + context + len(ids)])
    measured = []
    for meter, parts in zip(steps.meters, steps.parts, strict=True):
        # Where other jobs share the machine the processor's time is the fair one; on a GPU it is the clock's
        seconds = meter.seconds if cuda or world > 1 else meter.cpu_seconds
        if world > 1 and not cuda:
            parts["idle"] = meter.seconds - meter.cpu_seconds
        parts["rest"] = seconds - sum(parts.values())
        measured.append({"seconds": seconds, "wall_s": meter.seconds, "peak_mib": meter.peak_mib, "parts": parts})
    return {
        "arm": arm,
        "per_device": per_device,
        "processes": world,
        "budget": budget,
        "rollouts": len(rows),
        "tokens_written": written_tokens,
        "tokens_useful": useful,
        "tokens_trained": trained,
        "model_flops": flops,
        "parameters": trainer.model.num_parameters(),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "measured": measured,
    }


def combined(ranks: tuple[dict, ...]) -> dict:
    """What a step took of all processes: as long as the slowest, the memory of the largest, and the parts' means."""
    step = {name: max(rank[name] for rank in ranks) for name in ("seconds", "wall_s", "peak_mib")}
    parts = {part: statistics.mean(rank["parts"].get(part, 0.0) for rank in ranks) for part in PARTS}
    return {**step, "parts": parts}


def measure(
    arms: list[str],
    size: dict,
    device: str,
    per_device: int,
    seed: int,
    processes: int = 1,
    repeats: int = 1,
    folder: str | None = None,
    deadline: float = math.inf,
) -> list[dict]:
    """
    Rows of the arms, which take turns. An arm that does not fit in the memory of the GPU has `out_of_memory` in the place
    of numbers, and one whose turn comes after the deadline (of `time.monotonic`) has `out_of_time`.
    """
    found, missing = defaultdict(list), {}
    for turn in range(repeats):
        for arm in arms:
            if time.monotonic() > deadline:
                missing.setdefault(arm, "out_of_time")
                continue
            ranks = run_distributed(processes, attempt, arm, size, device, per_device, seed, folder)
            if None in ranks:
                missing[arm] = "out_of_memory"
                print(turn, arm, "out of memory", flush=True)
                continue
            assert all(rank["processes"] == processes for rank in ranks)
            steps = zip(*(rank.pop("measured") for rank in ranks), strict=True)
            found[arm].append({**ranks[0], "measured": [combined(step) for step in steps]})
            last = found[arm][-1]["measured"]
            print(turn, arm, [(round(m["seconds"], 2), round(m["peak_mib"])) for m in last], flush=True)
    rows = []
    for turns in found.values():
        measured = [m for turn in turns for m in turn.pop("measured")]
        seconds = statistics.median(m["seconds"] for m in measured)
        rows.append(
            {
                **turns[0],
                "seconds": seconds,
                "seconds_all": [m["seconds"] for m in measured],
                "wall_s": statistics.median(m["wall_s"] for m in measured),
                "useful_per_s": turns[0]["tokens_useful"] / seconds,
                "tflop_per_s": turns[0]["model_flops"] / seconds / 1e12,
                "peak_mib": statistics.median(m["peak_mib"] for m in measured),
                "parts": {part: statistics.median(m["parts"].get(part, 0.0) for m in measured) for part in PARTS},
            }
        )
    for row in rows:
        if device == "cuda":  # an H100 or H200, in bfloat16
            row["mfu"] = row["tflop_per_s"] * 1e12 / (ASSUMED["peak"] * processes)
        peer = "TRL SDFT, full logits" if "context" in row["arm"] or "SDFT" in row["arm"] else "TRL Distillation"
        for other in rows:
            if other["arm"] == peer:
                row["peer"] = peer
                row["speed_to_peer"] = row["useful_per_s"] / other["useful_per_s"]
                row["memory_to_peer"] = row["peak_mib"] / other["peak_mib"]
        print(
            row["arm"],
            {
                k: round(row[k], 2)
                for k in (
                    "seconds",
                    "useful_per_s",
                    "tflop_per_s",
                    "mfu",
                    "peak_mib",
                    "speed_to_peer",
                    "memory_to_peer",
                )
                if k in row
            },
        )
    return rows + [{"arm": arm, why: True} for arm, why in missing.items() if arm not in found]


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.2))
    names = [row["arm"] for row in rows][::-1]
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["parts"][part] for row in rows][::-1]
        axes.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, end, row in zip(names, left, rows[::-1], strict=True):
        axes.text(end, name, f" {row['useful_per_s']:.0f} useful tokens/s, {row['peak_mib']:.0f} MiB", va="center")
    axes.set_xlim(0, 1.75 * max(left))
    axes.set_xlabel("seconds of an optimizer step, without generation")
    axes.legend(loc="lower right", ncols=2, fontsize=8)
    save(figure, path, dpi=120)


def table() -> str:
    """The train phase on a CPU, beside TRL's own trainers."""
    results = json.loads((RESULTS / "step" / "cpu.json").read_text())
    config, rows = results["run"]["config"], results["rows"]
    lines = []
    for row in rows:
        shares = " / ".join(
            f"{100 * row['parts'][part] / row['seconds']:.0f}" for part in ("teacher", "student", "loss", "backward")
        )
        cells = [row["arm"], f"{row['useful_per_s']:.0f}", f"{row['speed_to_peer']:.2f}", f"{row['peak_mib']:.0f}"]
        lines.append([*cells, f"{row['memory_to_peer']:.2f}", shares])
    head = (
        f"The same {config['rollouts']} rollouts (log-normal lengths, median {config['median_length']}, at most "
        f"{config['max_length']:,} tokens), half of them correct, {rows[0]['parameters'] / 1e6:.1f}M parameters on a CPU, "
        "generation left out. Useful tokens are those of correct rollouts. The peer of an external teacher is TRL's "
        "DistillationTrainer, that of a teacher in context its SDFTTrainer with full logits. Processor time, median of "
        f"{len(rows[0]['seconds_all'])} steps."
    )
    heading = ["", "useful tokens/s", "to the peer", "peak memory, MiB", "to the peer"]
    return f"{head}\n\n{markdown([*heading, 'teacher / student / loss / backward, %'], lines)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--repeats", type=int, default=2, help="turns of every arm")
    parser.add_argument("--per_device", type=int, default=4, help="rollouts of a micro-batch without a budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output_dir", type=Path, default=RESULTS / "step")
    args = parser.parse_args(argv)
    if args.processes > 1 and args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    size = SIZES[args.device]
    rows = measure(args.arms, size, args.device, args.per_device, args.seed, args.processes, args.repeats)
    name = args.device
    name += f"-{args.processes}-processes" if args.processes > 1 else ""
    name += f"-seed-{args.seed}" if args.seed else ""
    output = args.output_dir / f"{name}.json"
    config = {k: v for k, v in vars(args).items() if k != "output_dir"} | size
    write_results(output, rows, config | {"load": os.getloadavg()[0]})
    plot(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
