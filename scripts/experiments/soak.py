"""
Two thousand steps of OPSD on a machine on which everything goes wrong: what grows, what stays behind, what is missing?

    OMP_NUM_THREADS=1 python -m scripts.experiments.soak

One command of the package, on a model of the tiny reasoner's architecture with random weights, at a learning rate that leaves
it as it is. In single steps the divergence of a rollout is made nan or the verifier takes a while, and every 25th step has a
program judged in the sandbox. Every 100 to 300 steps the run ends: by SIGTERM, by SIGKILL, by a verifier that raises or takes
longer than its time, or by a disk that is full when a checkpoint is written, in turn; the same command then goes on. After each
step the process says how much memory it holds, and how many file handles, threads, children and zombies.

Writes recipes/results/soak/soak.json and table.md. Interrupted, the same command goes on (`--report`: only these two, of what
is there so far).
"""

import argparse
import errno
import importlib
import json
import math
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml

from scripts.experiments import kills
from scripts.harness.results import RESULTS, ROOT, read, write_results, write_text
from scripts.harness.tables import markdown
from trl_opsd.evaluate.estimate import student_quantile


ENDS = ("SIGTERM", "SIGKILL", "verifier raises", "verifier hangs", "disk full")
# What the process says of those that all end with the status 1, as an error of this script would
WORDS = {
    "verifier raises": "raised RuntimeError (trouble)",
    "verifier hangs": "took more than 20 seconds",
    "disk full": "No space left on device",
}
# Steps of a process that are not looked at: caches fill, and the allocator finds its size
WARM_UP = 50
OPTIONS = {
    **kills.OPSD,
    "model_name_or_path": "WORLD/model",
    "dataset_name": "WORLD/data",
    "output_dir": "OUT/out",
    "reward_funcs": ["scripts.experiments.soak.judged"],
    "gradient_accumulation_steps": 1,
    "max_completion_length": 16,
    "learning_rate": 1e-6,
    "save_steps": 20,
    "save_total_limit": 2,
    "log_completions": False,
    "disable_tqdm": True,
    "ddp_timeout": 20,  # seconds that a verifier may take
}
# What is measured after each step, and its unit in the table
MEASURED = {"memory": "MiB", "handles": "", "threads": "", "children": "", "zombies": ""}


class Plan:
    """
    What goes wrong, and when: the same for a step that is made again, but for what ends the process.

    Args:
        seed (`int`):
            Seed.
        segment (`int`):
            How many processes have ended before this one.
        first (`int`):
            Step that it begins after.
    """

    def __init__(self, seed: int, segment: int, first: int):
        self.seed = seed
        self.end = ENDS[segment % len(ENDS)]
        self.end_step = first + random.Random(f"{seed} {segment}").randrange(100, 300)

    def draws(self, what: str, step: int, share: float) -> bool:
        return random.Random(f"{self.seed} {what} {step}").random() < share

    def ends(self, how: str, step: int) -> bool:
        return self.end == how and step >= self.end_step


plan: Plan | None = None  # of this process


def judged(completions, completion_ids, trainer_state, **kwargs) -> list[float]:
    """A verifier with trouble of its own."""
    from trl_opsd.rewards import code_reward

    step = trainer_state.global_step + 1
    if plan.ends("verifier raises", step):
        raise RuntimeError("trouble")
    if plan.ends("verifier hangs", step):
        time.sleep(600)
    if plan.draws("slow", step, 0.01):
        time.sleep(1)
    if step % 25 == 0:  # whatever it says: on a busy machine a program may be late
        code_reward(["```python\nprint(1)\n```"], tests=["assert True"])
    return kills.even(completions, completion_ids)


def state_of_process() -> dict[str, float]:
    """What this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
    found = Counter()
    for pid in children:
        try:
            found["zombies"] += Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:  # it has ended in between
            pass
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": len(children),
        "zombies": found["zombies"],
    }


@contextmanager
def troubled(segment: int, file: Path) -> Iterator[None]:
    """Has things go wrong, and writes what the process holds after each step."""
    from trl_opsd.opsd.trainer import OPSDTrainer

    divergence, log, save = OPSDTrainer._compute_divergence, OPSDTrainer.log, OPSDTrainer._save_checkpoint
    poisoned = set()

    def compute_divergence(self, *args, **kwargs):
        tokens, valid = divergence(self, *args, **kwargs)
        step = self.state.global_step + 1
        if step not in poisoned and len(valid) > 1 and plan.draws("nan", step, 0.02):
            poisoned.add(step)
            of_first = valid.nonzero()[:, 0] == valid.nonzero()[0, 0]
            tokens = tokens._replace(divergence=torch.where(of_first, torch.nan, tokens.divergence))
        return tokens, valid

    def logged(self, logs, *args, **kwargs):
        log(self, logs, *args, **kwargs)
        step = self.state.global_step
        if "loss" not in logs:
            return
        line = {"segment": segment, "step": step, **state_of_process()}
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        for name in ("SIGTERM", "SIGKILL"):
            if plan.ends(name, step):
                os.kill(os.getpid(), signal.Signals[name])

    def save_checkpoint(self, *args, **kwargs):
        if not plan.ends("disk full", self.state.global_step):
            return save(self, *args, **kwargs)
        with patch("torch.save", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            return save(self, *args, **kwargs)

    with ExitStack() as patches:
        for name, function in (
            ("_compute_divergence", compute_divergence),
            ("log", logged),
            ("_save_checkpoint", save_checkpoint),
        ):
            patches.enter_context(patch.object(OPSDTrainer, name, function))
        yield


def segment_of(out: Path, world: Path, number: int, seed: int, steps: int) -> int:
    """Runs the command in a copy of this process until it ends. Returns its exit status."""
    global plan
    from trl_opsd.resuming import find_checkpoint

    last = find_checkpoint(True, str(out / "out"))
    plan = Plan(seed, number, 0 if last is None else int(last.rpartition("-")[2]))
    options = {**OPTIONS, "max_steps": steps, "seed": seed}
    (out / "recipe.yaml").write_text(
        yaml.safe_dump({name: kills.at(value, world, out) for name, value in options.items()})
    )
    process = os.fork()
    if process == 0:
        status = 1
        try:
            log = os.open(out / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            with troubled(number, out / "samples.jsonl"):
                status = kills.run("opsd", ["--config", str(out / "recipe.yaml")], None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def slope(samples: list[dict[str, Any]], name: str) -> tuple[float | None, float | None, int]:
    """
    How much something grows in 1,000 steps: the mean over processes of what a line through each says, half of its 95% interval
    (Student's), and the number of processes.
    """
    by_segment = defaultdict(list)
    for sample in samples:
        by_segment[sample["segment"]].append((sample["step"], sample[name]))
    found = []
    for points in by_segment.values():
        steps, values = np.array(points[WARM_UP:]).T if len(points) > WARM_UP + 20 else (None, None)
        if steps is not None:
            found.append(1000 * float(np.polyfit(steps, values, 1)[0]))
    if len(found) < 2:
        return None, None, len(found)
    half = student_quantile(len(found) - 1) * stdev(found) / math.sqrt(len(found))
    return fmean(found), float(half), len(found)


def gaps(log: list[dict[str, Any]], steps: int) -> list[str]:
    """What is wrong with the metrics of a run: steps that are missing, twice there, or without a finite loss."""
    rows = [row for row in log if "loss" in row]
    count = Counter(row["step"] for row in rows)
    found = [f"step {step} is there {count[step]} times" for step in range(1, steps + 1) if count[step] != 1]
    found += [f"the loss of step {row['step']} is not finite" for row in rows if not math.isfinite(row["loss"])]
    tokens = [row["num_tokens"] for row in rows]
    return found + ["the number of tokens falls"] * (tokens != sorted(tokens))


def result(out: Path, steps: int) -> dict[str, Any]:
    """What came of the run so far."""
    from trl_opsd.resuming import find_checkpoint

    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    ends = [json.loads(line) for line in (out / "ends.jsonl").read_text().splitlines()]
    done, last = (out / "out" / "opsd.json").is_file(), find_checkpoint(True, str(out / "out"))
    steps = steps if done else int(last.rpartition("-")[2])
    log = (
        read(out / "out" / "opsd.json")
        if done
        else json.loads((Path(last) / "trainer_state.json").read_text())["log_history"]
    )
    left_out = out / "out" / "left_out.jsonl"
    return {
        "steps": steps,
        "finished": done,
        "steps_made": len(samples),
        "processes": len(ends),
        "ended_by": dict(Counter(end["by"] for end in ends)),
        "statuses": {
            by: sorted({end["status"] for end in ends if end["by"] == by}) for by in {end["by"] for end in ends}
        },
        "left_out": len(left_out.read_text().splitlines()) if left_out.is_file() else 0,
        "gaps": gaps(log, steps),
        "measured": {
            name: {
                "lowest": min(sample[name] for sample in samples),
                "highest": max(sample[name] for sample in samples),
                **dict(zip(("per_1000_steps", "half_interval", "processes"), slope(samples, name), strict=True)),
            }
            for name in MEASURED
        },
    }


def table(row: dict[str, Any]) -> str:
    """The page of a run."""
    lines = []
    for name, unit in MEASURED.items():
        one = row["measured"][name]
        label = f"{name}, {unit}" if unit else name
        known = one["half_interval"] is not None
        grows = f"{one['per_1000_steps']:+.2f} ± {one['half_interval']:.2f}" if known else "unknown"
        lines.append([label, f"{one['lowest']:.0f}", f"{one['highest']:.0f}", grows])
    ends = ", ".join(f"{by} {number}" for by, number in sorted(row["ended_by"].items()))
    return (
        markdown(["", "lowest", "highest", "growth in 1,000 steps"], lines)
        + f"\n\n{row['steps']:,} steps in {row['processes']} processes, one after the other, of {row['steps_made']:,} that were "
        f"made (what a kill undoes is made again). They ended by: {ends}. Rollouts whose divergence was made nan, and that were "
        f"left out: {row['left_out']}. Gaps in the metrics: {len(row['gaps'])}. The growth is the mean over the "
        f"{row['measured']['memory']['processes']} processes that took more than {WARM_UP + 20} steps, the first {WARM_UP} of "
        "each left aside, with its 95% interval.\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run, and of what goes wrong")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "soak"), help="folder for the run")
    parser.add_argument("--output_dir", default=str(RESULTS / "soak"), help="folder for the results")
    parser.add_argument("--report", action="store_true", help="only write the results of what is there")
    args = parser.parse_args(argv)
    runs = Path(args.runs)
    world, ends = runs / "world", runs / "ends.jsonl"
    if not world.is_dir():
        making = runs / "world.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        kills.make_world(making)
        making.rename(world)
    if not args.report:
        import trl_opsd.opsd.run  # noqa: F401 - before the processes that need it

        expected = {"SIGTERM": 143, "SIGKILL": -signal.SIGKILL}
        while not (runs / "out" / "opsd.json").is_file():
            number = len(ends.read_text().splitlines()) if ends.is_file() else 0
            before = os.path.getsize(runs / "log") if (runs / "log").is_file() else 0
            status = segment_of(runs, world, number, args.seed, args.steps)
            by = "its last step" if status == 0 else plan.end
            with open(runs / "log") as said:
                said.seek(before)
                is_expected = status == expected.get(plan.end, 1) and WORDS.get(plan.end, "") in said.read()
            if status != 0 and not is_expected:
                raise RuntimeError(f"`{plan.end}` ended the process with status {status}: see {runs / 'log'}.")
            with ends.open("a") as lines:
                lines.write(json.dumps({"by": by, "status": status, "at": plan.end_step}) + "\n")
            print(f"process {number} ended by {by}, status {status}, about step {plan.end_step}", flush=True)
    row = result(runs, args.steps)
    write_results(Path(args.output_dir) / "soak.json", [row], {**OPTIONS, "max_steps": args.steps, "seed": args.seed})
    write_text(Path(args.output_dir) / "table.md", table(row))
    print(table(row))


if __name__ == "__main__":
    # By the name that the verifier is found by, which reads `plan` there
    importlib.import_module("scripts.experiments.soak").main()
