"""
Every stage killed at random moments: does the continued run end as the undisturbed one?

    OMP_NUM_THREADS=1 python -m scripts.experiments.kills

Each case is a command of the package at a tiny size. It runs once undisturbed. Then it is sent SIGKILL in a moment that is drawn
(an activity of the undisturbed run, one of its occurrences, and how far into it), and is given the same command again; that one
is killed too, and so on for a number of times that is drawn, up to five, as on a machine that is taken away again and again.
What the last one leaves is compared with what the undisturbed one left: weights, optimizer, random numbers, the order of
prompts and all other files bitwise, logs in everything but times. Commands run in copies of one process that has imported what
they need, which saves nine tenths of the time, and so do the stages that `compress` starts.

Each stage is killed as often as `--kills` says, its cases taking turns. Writes recipes/results/kills/kills.json and table.md
after each run. Interrupted, the same command goes on with those that are missing (`--seed` for further moments, whose rows are
added; `--cases` for some of them; `--minutes` to end in time; `--report`: only the table).
"""

import argparse
import gc
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm
from transformers.trainer_pt_utils import safe_globals

from scripts.harness.results import RESULTS, ROOT, read, write_results, write_text
from scripts.harness.tables import markdown
from trl_opsd.tiny.model import make_model
from trl_opsd.tiny.task import CONCISE_TEMPLATE, TinyConfig, problems, row
from trl_opsd.tiny.tokenizer import make_tokenizer


SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
# What a log says of time, which no run repeats
TIMES = (
    "time",
    "runtime",
    "per_second",
    "per_s",
    "profiling",
    "seconds",
    "wall_s",
    "memory",
    "generation_s",
    "scoring_s",
)
# And the mean that transformers takes at the end over what was trained since the run was resumed
TIMES += ("train_loss",)
# And how much of an evaluation an earlier run had generated
TIMES += ("cached",)
# And where and how it was run, of which a chain gives the stage that it goes on with the checkpoint
HOW = ("environment", "commit", "logging_dir", "resume_from_checkpoint")

TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "max_completion_length": 32,
    "max_steps": 6,  # of four steps an epoch
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": 1,
    "save_total_limit": 3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "log_completions": True,  # which says what was asked in each step
    "num_completions_to_print": 0,
    "reward_funcs": ["scripts.experiments.kills.even"],
    "resume_from_checkpoint": True,
}
OPSD = {**TRAINING, "teacher_prompt_template": CONCISE_TEMPLATE, "probe_prompts": 0, "alarm_correct_drop": 1.0}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
BUDGET = {"max_tokens_per_microbatch": 150}
REFILL = {"max_generation_rounds": 3}
PASS_RATES = {"min_pass_rate": 0.1, "max_pass_rate": 0.9, "pass_rate_rollouts": 2}
EMA = {"teacher_weights": "ema", "teacher_update_rate": 0.1}
SNAPSHOT = {"teacher_weights": "snapshot", "teacher_sync_steps": 3}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}  # of one alone TRL makes a pattern
GIVEN = {"dataset_name": "WORLD/given", "num_generations": 1}
TWO = {"per_device_train_batch_size": 2}
EVALUATION = {
    "model_name_or_path": "WORLD/model",
    "dataset_name": "WORLD/data",
    "dataset_split": "test",
    "task": "tiny",
    "output": "OUT/results.json",
    "cache_dir": "OUT/cache",
    "prompt_only": False,
    "reward_funcs": ["math_reward"],
    "decoding": ["greedy", "sampled"],
    "max_completion_length": 20,
    "batch_size": 4,
}

# Stage, options and number of processes of each case
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "opsd, initial teacher, evaluated": ("opsd", {**OPSD, **EVALUATED}, 1),
    "opsd, ema teacher, budget, refill": ("opsd", {**OPSD, **BUDGET, **EMA, **REFILL}, 1),
    "opsd, snapshot teacher, pass rates, adaptive limit": (
        "opsd",
        {**OPSD, **SNAPSHOT, **PASS_RATES, "completion_limit_quantile": 0.9},
        1,
    ),
    "opsd, external teacher": ("opsd", {**OPSD, "teacher_model_name_or_path": "WORLD/teacher", "gate": "all"}, 1),
    "opsd, teacher's gate": ("opsd", {**OPSD, "teacher_gate": 0.5, "teacher_gate_rollouts": 2}, 1),
    "opsd, LoRA": ("opsd", {**OPSD, **BUDGET, **LORA}, 1),
    "opsd, LoRA with dropout, ema teacher, refill": (
        "opsd",
        {**OPSD, **EMA, **REFILL, **LORA, "lora_dropout": 0.1},
        1,
    ),
    "opsd, first on given rollouts": ("opsd", {**OPSD, **GIVEN, "off_policy_steps": 3}, 1),
    "opsd, half on given rollouts, LoRA": ("opsd", {**OPSD, **LORA, **GIVEN, "lmbda": 0.5}, 1),
    "opsd, two processes": ("opsd", {**OPSD, **BUDGET, "teacher_weights": "ema", **TWO}, 2),
    "opsd, two processes, LoRA, snapshot teacher": ("opsd", {**OPSD, **TWO, **LORA, **SNAPSHOT}, 2),
    "opsd, two processes, external teacher, refill, pass rates, adaptive limit": (
        "opsd",
        {
            **OPSD,
            **TWO,
            **REFILL,
            **PASS_RATES,
            "teacher_model_name_or_path": "WORLD/teacher",
            "completion_limit_quantile": 0.9,
        },
        2,
    ),
    "opsd, two processes, first on given rollouts": (
        "opsd",
        {**OPSD, **TWO, **GIVEN, "off_policy_steps": 3},
        2,
    ),
    "rlvr": ("rlvr", {**TRAINING, **EVALUATED}, 1),
    "rlvr, refill, LoRA": ("rlvr", {**TRAINING, **REFILL, **LORA}, 1),
    "rlvr, two processes": ("rlvr", {**TRAINING, **TWO}, 2),
    "tiny": (
        "tiny",
        {
            **SIZES,
            "max_ops": 2,
            "train_size": 32,
            "test_size": 32,
            "target_accuracy": 0.0,
            "accuracy_problems": 16,
            "accuracy_steps": 5,
            "max_steps": 10,
            "slip_steps": 4,
            "per_device_train_batch_size": 8,
            **{name: TRAINING[name] for name in ("use_cpu", "bf16", "gradient_checkpointing", "report_to")},
            "save_strategy": "no",
        },
        1,
    ),
    "small": (
        "small",
        {
            **SIZES,
            "head_dim": 16,
            "train_size": 21,
            "test_size": 21,
            "accuracy_problems": 21,
            "accuracy_steps": 8,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "save_steps": 1,
            "save_total_limit": 3,
            "logging_steps": 1,
            "resume_from_checkpoint": True,
            **{name: TRAINING[name] for name in ("use_cpu", "bf16", "gradient_checkpointing", "report_to")},
        },
        1,
    ),
    "prune": (
        "prune",
        {
            "model_name_or_path": "WORLD/model",
            "calibration_dataset": "WORLD/data",
            "num_layers": 1,
            "intermediate_size": 32,
            "calibration_samples": 8,
            "max_completion_length": 24,
        },
        1,
    ),
    "evaluate": ("evaluate", EVALUATION, 1),
    "evaluate, two processes": ("evaluate", {**EVALUATION, "decoding": ["sampled"]}, 2),
    "export": (
        "export",
        {
            "formats": ["safetensors"],
            "model_name_or_path": "WORLD/model",
            "dataset_name": "WORLD/data",
            "dataset_split": "test",
            "task": "tiny",
            "reward_funcs": ["math_reward"],
            "max_completion_length": 24,
            "conversion_prompts": 4,
            "conversion_tokens": 8,
        },
        1,
    ),
    "compress": (
        "compress",
        {name: f"WORLD/{name}.yaml" for name in ("sft", "rlvr", "opsd", "evaluate")}
        | {"prompt_only_template": CONCISE_TEMPLATE},
        1,
    ),
}


# Exit statuses of commands that have done what they were asked for: an export may leave a verdict open
DONE = {"export": (0, 3)}


def even(completions, completion_ids, **kwargs) -> list[float]:
    """A reward that a model of random weights earns on some rollouts and not on others."""
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


# ---------------------------------------------------------------------------------------------------------------------
# The world, and one run in it
# ---------------------------------------------------------------------------------------------------------------------


def make_world(folder: Path) -> None:
    """Two checkpoints of random weights, problems, completions of them, and the recipes of a chain."""
    tokenizer, config = make_tokenizer(), TinyConfig(**SIZES)
    for seed, name in enumerate(("model", "teacher")):
        model = make_model(config, tokenizer, seed)
        with torch.no_grad():
            model.lm_head.weight.mul_(4)  # so that distributions differ
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    for name in ("data", "given"):
        (folder / name).mkdir()
        for split in ("train", "test"):
            rows = [row(problem) for problem in problems(config, split, 16, seed=0)]
            if name == "given":
                for one in rows:
                    one["completion_ids"] = [draw.randrange(8, 20) for _ in range(draw.randrange(3, 9))]
                    one["completion_ids"].append(tokenizer.eos_token_id)
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    chain = {name: CASES[case][1] for name, case in (("sft", "tiny"), ("rlvr", "rlvr"), ("evaluate", "evaluate"))}
    chain["opsd"] = CASES["opsd, external teacher"][1]
    left_out = ("output", "cache_dir", "model_name_or_path", "dataset_name", "resume_from_checkpoint")
    for name, options in chain.items():
        options = {key: at(value, folder, folder) for key, value in options.items() if key not in left_out}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options | {"seed": 0}))


def at(value: Any, world: Path, out: Path) -> Any:
    """An option with the folders in the place of their names."""
    return value.replace("WORLD", str(world)).replace("OUT", str(out)) if isinstance(value, str) else value


def arguments(case: str, world: Path, out: Path) -> list[str]:
    """The command line of a case."""
    stage, options, _ = CASES[case]
    if stage in ("opsd", "rlvr"):
        options = {"model_name_or_path": "WORLD/model", "dataset_name": "WORLD/data", **options}
    if "output" not in options:
        options = {**options, "output_dir": "OUT/out"}
    recipe = out / "recipe.yaml"
    options = {name: at(value, world, out) for name, value in options.items() if value is not None}
    recipe.write_text(yaml.safe_dump(options))
    return ["--config", str(recipe)]


@contextmanager
def told(tell: Callable[[str], None]) -> Iterator[None]:
    """Has the activities of a run told, as `+name` and `-name`."""
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer

    from trl_opsd import cli, results
    from trl_opsd.evaluate import run as evaluate
    from trl_opsd.evaluate.backends.transformers import TransformersEngine
    from trl_opsd.evaluate.cache import GenerationCache
    from trl_opsd.export import run as export
    from trl_opsd.opsd.trainer import OPSDTrainer
    from trl_opsd.prune import run as prune
    from trl_opsd.rlvr.trainer import RLVRTrainer
    from trl_opsd.small import sft as small
    from trl_opsd.tiny import sft as tiny

    watched = {
        "generating": [(OPSDTrainer, "_generate_single_turn"), (RLVRTrainer, "_generate_single_turn")],
        "forward": [(OPSDTrainer, "compute_loss"), (RLVRTrainer, "compute_loss"), (Trainer, "compute_loss")],
        "optimizer step": [(AcceleratedOptimizer, "step")],
        "writing a checkpoint": [(OPSDTrainer, "_save_checkpoint"), (Trainer, "_save_checkpoint")],
        "evaluating": [
            (Trainer, "evaluate"),
            (tiny, "measure"),
            (small, "measure_families"),
            (TransformersEngine, "generate"),
            (evaluate, "verify"),
        ],
        "keeping a completion": [(GenerationCache, "add")],
        "calibrating": [(prune, "collect"), (prune, "make_rollouts")],
        "pruning": [(prune, "slice_model")],
        "converting": [(export, "plain_checkpoint"), (export, "save_as")],
        "saving the model": [(results, "save_final"), (small, "save_final"), (cli, "publish"), (prune, "publish")],
        "writing the results": [(module, "write_results") for module in (results, small, tiny, prune, export)],
    }
    depth = Counter()

    def wrap(function: Callable, activity: str) -> Callable:
        def wrapped(*args, **kwargs):
            depth[activity] += 1
            if depth[activity] == 1:  # none within itself
                tell(f"+{activity}")
            try:
                return function(*args, **kwargs)
            finally:
                depth[activity] -= 1
                if not depth[activity]:
                    tell(f"-{activity}")

        return wrapped

    with ExitStack() as patches:
        for activity, places in watched.items():
            for owner, name in places:
                patches.enter_context(patch.object(owner, name, wrap(getattr(owner, name), activity)))
        yield


def start(case: str, world: Path, out: Path) -> tuple[list[int], int]:
    """Starts the command of a case in copies of this process. Returns their ids, and where the first tells what it does."""
    stage, _, number = CASES[case]
    out.mkdir(parents=True, exist_ok=True)
    line = arguments(case, world, out)
    gc.freeze()  # a copy that looks for garbage would else get pages of its own of everything
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    reader, writer = os.pipe()

    def command(rank: int) -> int:
        os.setsid()
        if number > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        return run(stage, line, writer if rank == 0 else None)

    processes = []
    for rank in range(number):
        log = os.open(out / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        processes.append(copy(partial(command, rank), log))
        os.close(log)
    os.close(writer)
    return processes, reader


def run(stage: str, line: list[str], writer: int | None) -> int:
    """A command of the package, in this process, which tells what it does. Returns its exit status."""
    from trl_opsd.compress import chain
    from trl_opsd.small import sft as small

    def tell(text: str) -> None:
        if writer is not None:
            os.write(writer, f"{text} {time.monotonic()}\n".encode())

    shorter = patch.multiple(small, MAX_NEW_TOKENS=16, TOKENIZER_ROWS=300)
    with shorter, patch.object(chain, "start", Copy), told(tell):
        return call(stage, line)


def call(stage: str, line: list[str]) -> int:
    """A command of the package. Returns its exit status."""
    try:
        import_module(f"trl_opsd.{stage}.__main__").main(line)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # as Python does
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    return 0


def copy(command: Callable[[], int], said: int) -> int:
    """Runs something that returns an exit status in a copy of this process, which speaks into a file. Returns its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            for stream in (1, 2):
                os.dup2(said, stream)
            tqdm.set_lock(threading.RLock())  # its own is shared by all copies, and one is killed with it in its hands
            status = command()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return process


class Copy:
    """
    A stage that `compress` starts, in a copy of this process where it would start a new one. It has of
    [`subprocess.Popen`] what the chain uses.

    Args:
        command (`list[str]`):
            Command of the stage, without a launcher.
        **options:
            As of [`subprocess.Popen`]; what it prints is always read, as one text.
    """

    def __init__(self, command: list[str], **options):
        _, _, module, *line = command
        out, there = os.pipe()
        self._status = None
        self._process = copy(partial(call, module.removeprefix("trl_opsd."), line), there)
        os.close(there)
        self.stdout = os.fdopen(out)

    def poll(self) -> int | None:
        return self._status

    def wait(self) -> int:
        self._status = wait([self._process])[0]
        return self._status

    def terminate(self) -> None:
        os.kill(self._process, signal.SIGTERM)


def wait(processes: list[int]) -> list[int]:
    """Waits for processes. Returns their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def done(case: str, statuses: list[int]) -> bool:
    """Whether the processes of a case have done what they were asked for."""
    return all(status in DONE.get(CASES[case][0], (0,)) for status in statuses)


def undisturbed(case: str, world: Path, out: Path) -> tuple[float, dict[str, list[float]]]:
    """Runs a case. Returns the seconds it took, and the seconds of each occurrence of its activities."""
    begin = time.monotonic()
    processes, reader = start(case, world, out)
    began, seconds = {}, defaultdict(list)
    with os.fdopen(reader) as told_by:
        for text in told_by:
            sign, (activity, moment) = text[0], text[1:].rsplit(maxsplit=1)
            if sign == "+":
                began[activity] = float(moment)
            elif activity in began:
                seconds[activity].append(float(moment) - began.pop(activity))
    statuses = wait(processes)
    if not done(case, statuses):
        raise RuntimeError(f"`{case}` ended with {statuses}:\n{(out / 'log-0').read_text()[-3000:]}")
    return time.monotonic() - begin, dict(seconds)


def kill(processes: list[int]) -> None:
    """As a machine that goes away: all of them, and what they have started."""
    for process in processes:
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:  # before it had a group of its own, or at its end
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass


def interrupted(
    case: str, world: Path, out: Path, total: float, seconds: dict[str, list[float]], draw: random.Random, again: bool
) -> tuple[dict[str, Any], list[int]]:
    """Starts a case and kills it. Returns in what and after how long, and the exit statuses of its processes."""
    activity = draw.choice([*sorted(seconds), "anything"])
    begin = time.monotonic()
    processes, reader = start(case, world, out)
    with os.fdopen(reader) as told_by:
        if activity == "anything":
            time.sleep(draw.random() * total)
        else:
            # One that goes on from a checkpoint has fewer of each before it
            occurrence = draw.randrange(min(len(seconds[activity]), 2 if again else len(seconds[activity])))
            delay, seen = draw.random() * seconds[activity][occurrence], 0
            for text in told_by:
                seen += text.startswith(f"+{activity} ")
                if seen > occurrence:
                    time.sleep(delay)
                    break
        kill(processes)
        after = time.monotonic() - begin
    statuses = wait(processes)
    return {"activity": activity, "after_s": round(after, 3), "was_running": statuses[0] == -signal.SIGKILL}, statuses


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves
# ---------------------------------------------------------------------------------------------------------------------


def timeless(value: Any, out: Path) -> Any:
    """JSON without times and without the folder of the run."""
    if isinstance(value, dict):
        return {
            name: timeless(part, out)
            for name, part in value.items()
            if not any(time in name for time in TIMES) and name not in HOW
        }
    if isinstance(value, list):
        return [timeless(part, out) for part in value]
    return value.replace(str(out), "OUT") if isinstance(value, str) else value


def differences(alone: Path, continued: Path) -> list[str]:
    """Files of two runs that say different things: weights and data bitwise, results in everything but times."""
    found = []
    patterns = ("*.safetensors", "*.json", "*.jsonl", "*.parquet", "*.pt", "*.pth")
    names = [{file.relative_to(folder) for p in patterns for file in folder.rglob(p)} for folder in (alone, continued)]
    # Checkpoints on the way, hashes of what has times in it, generations that are kept, and what a chain keeps for itself
    last = f"checkpoint-{OPSD['max_steps']}", f"checkpoint-{CASES['small'][1]['max_steps']}"
    skipped = ("checkpoint-", "checksums.json", "cache", ".", "generations", "logs", "start")
    names = [
        {name for name in side if not any(part.startswith(skipped) and part not in last for part in name.parts)}
        for side in names
    ]
    found += [f"{name} is there in one only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        files = alone / name, continued / name
        if name.suffix == ".safetensors":
            same = _same(*(load_file(file) for file in files))
        elif name.suffix in (".pt", ".pth"):
            with safe_globals():
                same = _same(*(torch.load(file, weights_only=True) for file in files))
        elif name.suffix in (".json", ".jsonl"):
            same = _same_json([file.read_text() for file in files], name, (alone, continued))
        else:
            same = files[0].read_bytes() == files[1].read_bytes()
        if not same:
            found.append(f"{name} differs")
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two collections of tensors are the same in every bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return one.dtype == other.dtype and bool((one == other).all())
    return one == other


def _same_json(texts: list[str], name: Path, folders: tuple[Path, Path]) -> bool:
    sides = []
    for text, folder in zip(texts, folders, strict=True):
        lines = [text] if name.suffix == ".json" else text.splitlines()
        sides.append([timeless(json.loads(line), folder) for line in lines])
    return sides[0] == sides[1]


class Case:
    """
    A case in a folder of its own, beside what it leaves when nothing disturbs it.

    Args:
        name (`str`):
            Which of `CASES`.
        runs (`Path`):
            Folder for the runs.
    """

    def __init__(self, name: str, runs: Path):
        self.name = name
        self.folder = runs / "".join(letter if letter.isalnum() else "-" for letter in name)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.world = self.folder / "world"
        self.world.mkdir(parents=True)
        make_world(self.world)
        self.total, self.seconds = undisturbed(name, self.world, self.folder / "alone")
        counts = {activity: len(times) for activity, times in self.seconds.items()}
        print(f"{name}: {self.total:.1f} s alone, {counts}", flush=True)

    def kill(self, seed: int, number: int) -> dict[str, Any]:
        """Kills it, up to five times, lets it go on to its end, and compares. Returns what came of it."""
        draw, out = random.Random(f"{seed} {self.name} {number}"), self.folder / f"kill-{number}"
        killed, statuses = [], [-signal.SIGKILL]
        for again in range(draw.randint(1, 5)):
            one, statuses = interrupted(self.name, self.world, out, self.total, self.seconds, draw, again=again > 0)
            killed.append(one)
            if not one["was_running"]:  # it had come to its end
                break
        went_on = sorted(int(path.name.rpartition("-")[2]) for path in (out / "out").glob("checkpoint-*"))
        if killed[-1]["was_running"]:
            processes, reader = start(self.name, self.world, out)
            with os.fdopen(reader) as told_by:
                told_by.read()
            statuses = wait(processes)
        lost = [f"ended with {statuses}"]
        if done(self.name, statuses):
            lost = differences(self.folder / "alone", out)
        result = {
            "case": self.name,
            "seed": seed,
            "number": number,
            "killed": killed,
            "checkpoints": went_on,
            "lost": lost,
        }
        print(json.dumps(result), flush=True)
        if not lost:
            shutil.rmtree(out)  # what differs stays, to be looked at
        return result


def kills_of(row: dict[str, Any]) -> list[str]:
    """The activities in which a run was killed. None where it had ended before."""
    return [one["activity"] for one in row["killed"] if one["was_running"]]


def kills_of_stage(rows: list[dict[str, Any]], stage: str) -> int:
    """How often a stage has been killed."""
    return sum(len(kills_of(row)) for row in rows if CASES[row["case"]][0] == stage)


def table(rows: list[dict[str, Any]]) -> str:
    """How often each case was killed in which activity, and what was lost."""
    lines = []
    for case in CASES:
        own = [one for one in rows if one["case"] == case and kills_of(one)]
        if own:
            activities = Counter(activity for one in own for activity in kills_of(one))
            counts = ", ".join(f"{name} {count}" for name, count in sorted(activities.items()))
            lost = sum(bool(one["lost"]) for one in own)
            lines.append([case, str(activities.total()), counts, str(lost)])
    for stage in (*dict.fromkeys(stage for stage, _, _ in CASES.values()), "all"):
        of_it = [line for line in lines if line[0] in CASES and stage in (CASES[line[0]][0], "all")]
        if of_it:
            sums = [str(sum(int(line[column]) for line in of_it)) for column in (1, 3)]
            lines.append([f"**{stage}**", sums[0], "", sums[1]])
    return markdown(["case", "kills", "killed while", "continued runs that ended otherwise"], lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often each stage is killed")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="which of them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="none is begun after so many")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "kills"), help="folder for the runs")
    parser.add_argument("--output_dir", default=str(RESULTS / "kills"), help="folder for the results")
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    file = Path(args.output_dir) / "kills.json"
    rows = read(file) if file.is_file() else []
    if not args.report:
        for stage in sorted({stage for stage, _, _ in CASES.values()}):
            import_module(f"trl_opsd.{stage}.{'sft' if stage in ('tiny', 'small') else 'run'}")
        end = time.monotonic() + 60 * args.minutes
        cases: dict[str, Case] = {}
        for number in itertools.count():
            for name in args.cases:
                is_there = (name, args.seed, number) in {(one["case"], one["seed"], one["number"]) for one in rows}
                if is_there or kills_of_stage(rows, CASES[name][0]) >= args.kills or time.monotonic() > end:
                    continue
                if name not in cases:
                    cases[name] = Case(name, Path(args.runs))
                rows.append(cases[name].kill(args.seed, number))
                write_results(file, rows, {"kills": args.kills, "seed": args.seed})
                write_text(file.with_name("table.md"), table(rows))
            stages = {CASES[name][0] for name in args.cases}
            if time.monotonic() > end or all(kills_of_stage(rows, stage) >= args.kills for stage in stages):
                break
    write_text(Path(args.output_dir) / "table.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
