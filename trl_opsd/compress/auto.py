"""
The chain that chooses for itself: from a checkpoint and prompts to a model that is as good in fewer tokens.

What it does is written down before it is done (the plan, and a recipe for each stage, in `recipes/`), and why afterwards
(`decisions.jsonl`, each with the numbers that it rests on). It trains from the context that promises most, looks at
problems that training has not seen after every round, and stops when there is no more to be had or something is lost. The
verdict is on problems that nothing before it has seen. With `ratio` it goes on to the smallest student that is still as
good, and with `export_formats` to what an engine serves.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import AutoTokenizer

from ..adapters import merged
from ..cli import UserError, check_checkpoint, user_errors
from ..data import SOURCES, check_columns, load_prompts
from ..data.contamination import normalize, problem_text
from ..data.gym import REASONING_GYM
from ..data.prompts import NoSplit
from ..evaluate.card import write_card
from ..evaluate.checkpoint import base_of, count_checkpoint, open_checkpoint
from ..evaluate.compare import Answer, Comparison, compare_measurements
from ..evaluate.decide import decide
from ..evaluate.report import write_report
from ..evaluate.results_file import Measurement, load_results, write_rows
from ..export.formats import parse_formats
from ..export.origin import check_checkpoint_ends
from ..export.run import line as export_line
from ..hub import push
from ..opsd.context import TEACHER_PROMPT_TEMPLATES, TeacherContext
from ..plan.memory import Training, cache_bytes, empty_model, parts
from ..plan.run import GIB, read_config, read_launch
from ..results import write_text
from ..rewards import load_reward_funcs, required_columns
from .auto_config import AUTO
from .auto_config import AutoConfig as Arguments
from .chain import Stage, StageError, move_aside, run_chain
from .config import CompressConfig


# A round that saves less than this share of the tokens of the one before is the last
LEAST_GAIN = 0.03
# Share of the accuracy without it from which on a context is worth a gate that sorts out where it is wrong
USABLE = 0.8
# Shares of the parameters that `ratio: auto` removes, one after the other until a student is no longer as good
RATIOS = (0.25, 0.5, 0.75, 0.9)
# Rollouts that importance is measured on
CALIBRATION = 128
# Of the adapter, where the weights themselves do not fit
LORA = {"use_peft": True, "lora_r": 64, "lora_alpha": 128, "lora_target_modules": ["all-linear"]}


def learning_rate(parameters: int, has_adapter: bool) -> float:
    """
    The rate where none is given: 1e-6 for 1.7B parameters (https://huggingface.co/papers/2603.05433) and 3e-4 for the tiny
    reasoner's 166 thousand, on a line between the two in logarithms, which is all that is known; 1e-4 for an adapter.
    """
    return 1e-4 if has_adapter else float(f"{1e-6 * (1.7e9 / parameters) ** 0.62:.1e}")


def recovery_rates(parameters: int) -> tuple[float, float]:
    """
    The rates of what was pruned: to learn to answer again from its teacher's logits, and then on its own rollouts. On lines
    in logarithms between what is known of 1.7B parameters (1e-4 and 1e-5, recipes/recover.yaml and recipes/opsd_pruned.yaml)
    and of the tiny reasoner (3e-3 at 83 thousand, 1e-3 at 260 thousand).
    """
    return tuple(
        float(f"{large * (1.7e9 / parameters) ** power:.1e}") for large, power in ((1e-4, 0.34), (1e-5, 0.52))
    )


@dataclass
class Promise:
    """
    What a context would give, measured on the guard's problems.

    Args:
        context (`str`):
            Name or template.
        comparison ([`~trl_opsd.evaluate.compare.Comparison`]):
            The checkpoint in this context against itself without.
        as_right, usable (`list[bool]`):
            For each third of the problems, by the length of its replies without: whether it is as right as without, within
            twice the error, and whether it is nearly so, at least `USABLE` times.
        saving (`float`):
            Share of the tokens that go if it is used in the thirds in which it is usable and nowhere else.
    """

    context: str
    comparison: Comparison
    as_right: list[bool]
    usable: list[bool]
    saving: float

    @classmethod
    def of(cls, context: str, before: Measurement, after: Measurement, margin: float) -> "Promise":
        place = {name: row for row, name in enumerate(after.samples.ids)}
        both = [(row, place[name]) for row, name in enumerate(before.samples.ids) if name in place]
        rows, others = (list(side) for side in zip(*both, strict=True))
        tokens = [m.samples.tokens[index].mean(axis=1) for m, index in ((before, rows), (after, others))]
        correct = [m.samples.correct[index].mean(axis=1) for m, index in ((before, rows), (after, others))]
        as_right, usable, left = [], [], 0.0
        for third in np.array_split(np.argsort(tokens[0], kind="stable"), 3):
            lost = correct[0][third] - correct[1][third]
            error = lost.std() / max(len(third), 1) ** 0.5
            as_right.append(bool(lost.mean() <= 2 * error))
            usable.append(as_right[-1] or bool(correct[1][third].mean() >= USABLE * correct[0][third].mean()))
            left += tokens[1 if usable[-1] else 0][third].sum()
        comparison = compare_measurements(before, after, margin)
        return cls(context, comparison, as_right, usable, float(1 - left / tokens[0].sum()))

    @property
    def needs_gate(self) -> bool:
        """Whether it is wrong where the student is right, so that a gate of the teacher's has to choose the problems."""
        return not all(self.as_right)


class Automatic:
    """
    One run of it, which goes on where an earlier one was interrupted: a stage that is finished is not run again, and its
    decision follows from the same numbers.

    Args:
        config ([`~trl_opsd.compress.config.CompressConfig`]):
            Checkpoint, prompts, folder, launcher and seed.
        arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
            The rest.
    """

    def __init__(self, config: CompressConfig, arguments: Arguments):
        self.config, self.arguments = config, arguments
        self.root = Path(config.output_dir)
        self.console = Console()
        self.log = self.root / "decisions.jsonl"
        check_checkpoint(config.model_name_or_path, "model_name_or_path")
        self.has_gpu = torch.cuda.is_available()
        self.sharding, self.processes, self.launcher = self._read_launcher()
        self.data, self.reward_funcs = self._divide()
        self.recipe = self._recipe()
        self.ratios = self._ratios()
        self.artefacts = parse_formats(arguments.export_formats) if arguments.export_formats else []
        if self.artefacts:
            path = config.model_name_or_path
            check_checkpoint_ends(open_checkpoint(path), AutoTokenizer.from_pretrained(path))

    # What is known before anything is loaded

    def _read_launcher(self) -> tuple[str, int, list[str]]:
        """What the processes of training share, how many they are, and the command that starts them."""
        if self.config.launcher is None:
            count = torch.cuda.device_count()
            if count < 2:
                return "ddp", 1, [sys.executable]
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
            return "ddp", count, [*launch, "--num_processes", str(count)]
        words = shlex.split(self.config.launcher)
        if not words or shutil.which(words[0]) is None:
            raise UserError(f"`launcher`: there is no command `{words[0] if words else ''}`: check its name.")
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config_file", "--config-file")
        # Of accelerate and of torchrun
        parser.add_argument("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node")
        given, _ = parser.parse_known_args(words)
        number = given.num_processes
        if number is not None and not (number.isdecimal() and int(number) > 0):
            raise UserError(f"`launcher` starts `{number}` processes, and that is to be a number, at least 1.")
        is_launch = any(word == "launch" or word.endswith(".launch") for word in words)
        if number is None and given.config_file is None and is_launch:
            raise UserError(
                "`launcher` does not say how many processes it starts, by which rollouts and memory are shared out: add "
                "`--num_processes N` or `--config_file FILE`."
            )
        return *read_launch(given.config_file, None if number is None else int(number)), words

    def _divide(self) -> tuple[dict[str, Dataset], list[str]]:
        """Problems to train on, to watch by, and for the verdict, none of which is in two, nor twice in one."""
        arguments, name = self.arguments, self.config.dataset_name
        train = load_prompts(name, "train")
        verifiers = arguments.reward_funcs or self._verifiers(train)
        for verifier, func in zip(verifiers, load_reward_funcs(verifiers), strict=True):
            check_columns(train, required_columns(func), f"The verifier `{verifier}`")
        try:
            final = load_prompts(name, "test")
        except NoSplit:
            final = None
        if final is not None and list(final["prompt"]) == list(train["prompt"]):
            final = None  # a single file, which is there whole whatever the split
        seen = set()

        def first_of_each(rows: Dataset) -> Dataset:
            kept = []
            for row, prompt in enumerate(rows["prompt"]):
                problem = normalize(problem_text(prompt)) or json.dumps(prompt)
                if problem not in seen:
                    seen.add(problem)
                    kept.append(row)
            return rows.select(kept)

        # Shuffled by the division's own seed, whatever the run's. What is in both is kept for the verdict
        final = None if final is None else first_of_each(final.shuffle(seed=0))
        train = first_of_each(train.shuffle(seed=0))
        if final is None:
            share = min(arguments.final_problems, len(train) // 5)
            final, train = train.select(range(share)), train.select(range(share, len(train)))
        final = final.select(range(min(arguments.final_problems, len(final))))
        guard = min(arguments.guard_problems, len(train) // 4)
        guard, train = train.select(range(guard)), train.select(range(guard, len(train)))
        if len(train) < arguments.rollouts or min(len(guard), len(final)) < 30:
            raise UserError(
                f"`{name}` leaves {len(train)} problems to train on, {len(guard)} to watch by and {len(final)} for the "
                f"verdict, each counted once, and {arguments.rollouts}, 30 and 30 are the least: give more data, raise "
                "`guard_problems` and `final_problems` where they are below, or lower `rollouts`."
            )
        return {"train": train, "guard": guard, "final": final}, verifiers

    def _verifiers(self, rows: Dataset) -> list[str]:
        """The verifier that the data are made for."""
        name = self.config.dataset_name.partition(":")[0]
        if name == REASONING_GYM:
            return ["reasoning_gym_reward"]
        if name in SOURCES and not Path(name).exists():
            return [SOURCES[name].verifier]
        for column, verifier in (("answer", "math_reward"), ("tests", "code_reward")):
            if column in rows.column_names:
                return [verifier]
        raise UserError(
            f"`{self.config.dataset_name}` has neither `answer` nor `tests`, so nothing says which verifier it is for: name "
            "it with `--reward_funcs`."
        )

    def _recipe(self) -> dict:
        """The recipe of training, but for the context."""
        arguments, model = self.arguments, self.config.model_name_or_path
        config = read_config(model, None, False)
        count = sum(p.numel() for p in empty_model(config, torch.float32).parameters())
        prompt = 512 if self.has_gpu else 128
        length = arguments.max_completion_length + prompt
        budget = max(length, 16384 if self.has_gpu else 4096)
        capacity = arguments.gpu_memory
        if capacity is None:
            capacity = torch.cuda.get_device_properties(0).total_memory / GIB if self.has_gpu else _ram() / GIB

        def planned(peft_config) -> dict[str, float]:
            dtype = torch.bfloat16 if peft_config is not None and self.has_gpu else torch.float32
            training = Training(
                student=config,
                teacher=None if peft_config is not None else config,
                dtype=dtype,
                teacher_dtype=dtype,
                autocast=self.has_gpu,
                peft_config=peft_config,
                gradient_checkpointing=self.has_gpu,
                rows=max(1.0, budget / length),
                length=length,
                completion=arguments.max_completion_length,
                several=True,
                sharding=self.sharding,
                processes=self.processes,
                device="cuda" if self.has_gpu else "cpu",
            )
            return {name: value / GIB for name, value in parts(training).items()}

        rollouts = max(1, arguments.rollouts // self.processes)
        cache = length * cache_bytes(config, 2 if self.has_gpu else 4) / GIB  # of a rollout

        def most(memory: dict[str, float]) -> float:
            """While it trains, or while it writes rollouts."""
            resting = memory["weights"] + memory["teacher"] + memory["moments"]
            return max(sum(memory.values()), resting + rollouts * cache)

        full, has_adapter = planned(None), False
        memory = full
        if most(full) > 0.9 * capacity:
            memory, has_adapter = planned(LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")), True
            if most(memory) > 0.9 * capacity:
                raise UserError(
                    f"An adapter on `{model}` takes {most(memory):.3g} GiB and of a device {0.9 * capacity:.3g} are used: "
                    "shard it over several with `--launcher 'accelerate launch --config_file "
                    "recipes/accelerate_configs/fsdp2.yaml'`, or lower `max_completion_length` or `rollouts`."
                )
        # Of an evaluation, which holds the weights in float32 at most
        self.batch_size = int(max(1, min(256, (0.9 * capacity - 4 * count / GIB) // cache)))
        self.parameters, self.capacity, self.memory, self.full = count, capacity, memory, full
        rate = arguments.learning_rate
        if rate is None:
            rate = learning_rate(count, has_adapter)
        recipe = {
            "model_name_or_path": model,
            "dataset_name": str(self.root / "data" / "train.parquet"),
            "reward_funcs": self.reward_funcs,
            "teacher_weights": "initial",
            "gate": "correct",
            "beta": 1.0,
            "temperature": 1.0,
            "max_completion_length": arguments.max_completion_length,
            "per_device_train_batch_size": rollouts,
            "gradient_accumulation_steps": 1,
            "max_tokens_per_microbatch": budget,
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "save_strategy": "steps",
            "save_steps": arguments.round_steps,
            "logging_steps": 1,
            "probe_prompts": 0,  # measured beforehand, on the guard's problems
            "report_to": "none",
            "dtype": "bfloat16" if has_adapter and self.has_gpu else "float32",
            "bf16": self.has_gpu,
            "use_cpu": not self.has_gpu,
            "gradient_checkpointing": self.has_gpu,
            **(LORA if has_adapter else {}),
        }
        return recipe

    def _ratios(self) -> tuple[float, ...]:
        """Shares of the parameters to try to remove."""
        ratio = self.arguments.ratio
        if ratio is None:
            return ()
        if "use_peft" in self.recipe:
            raise UserError(
                f"`ratio`: what was pruned is trained with all weights, which beside its teacher takes up to "
                f"{sum(self.full.values()):.3g} GiB, and of a device {0.9 * self.capacity:.3g} are used: shard it over several "
                "with `launcher`, or leave `ratio` out."
            )
        return RATIOS if ratio == AUTO else (float(ratio),)

    @property
    def recovery_updates(self) -> int:
        """Updates of each of the two ways in which a pruned model is trained: as many as length gets."""
        return self.arguments.max_rounds * self.arguments.round_steps

    @property
    def banked(self) -> int:
        """Problems that the bank is asked: as many as recovery sees rollouts, if there are so many."""
        return min(len(self.data["train"]), self.recovery_updates * self.arguments.rollouts)

    @property
    def contexts(self) -> list[str]:
        given = self.arguments.contexts
        if given is not None:
            for context in given:
                template = TeacherContext(TEACHER_PROMPT_TEMPLATES.get(context, context))
                if "sibling" in template.fields:
                    raise UserError(
                        f"The context {context!r} is known only when the rollouts are written, and contexts are measured "
                        "before: train from it with a recipe of `opsd`."
                    )
                for rows in self.data.values():
                    template.check_columns(rows.column_names)
            return list(dict.fromkeys(given))
        names = ["concise", "concise_by_difficulty"]
        every = all("solution" in rows.column_names and None not in rows["solution"] for rows in self.data.values())
        return names + (["solution"] if every else [])

    def plan(self) -> str:
        """What will be done, why, and what it takes, from the sizes alone."""
        arguments, recipe = self.arguments, self.recipe
        sizes = {name: len(rows) for name, rows in self.data.items()}
        memory = ", ".join(f"{name} {value:.2f}" for name, value in self.memory.items() if value > 0.005)
        rollouts = arguments.round_steps * arguments.rollouts
        looks = (1 + len(self.contexts) + arguments.max_rounds) * sizes["guard"] + 2 * sizes["final"]
        how = (
            "an adapter, because full training takes " + f"{sum(self.full.values()):.1f} GiB"
            if "use_peft" in recipe
            else "all weights"
        )
        # Of a round the model, and a checkpoint with the moments; at the end the model again
        trained = self.parameters
        if "use_peft" in recipe:
            trained = self.memory["moments"] * GIB / 8 * (1 if self.sharding == "ddp" else self.processes)
        disk = arguments.max_rounds * 16 * trained + 4 * self.parameters
        # Of a ratio the model thrice, and of two trainings the last two checkpoints; of artefacts what they were made of too
        disk += sum((1 - ratio) * self.parameters * (3 * 4 + 4 * 16) for ratio in self.ratios)
        disk += self.parameters * (sum(artefact.bits for artefact in self.artefacts) + 64 * bool(self.artefacts)) / 8
        measured = looks * arguments.samples + len(self.ratios) * (sizes["guard"] + sizes["final"]) * arguments.samples
        measured += sizes["final"] * len(self.artefacts)
        written = arguments.max_rounds * rollouts
        written += (self.banked + len(self.ratios) * self.recovery_updates * arguments.rollouts) * bool(self.ratios)
        lines = [
            f"{self.config.model_name_or_path}: {self.parameters / 1e6:,.1f}M parameters, on "
            f"{self.processes} {'GPU' if self.has_gpu else 'CPU process'}{'s' * (self.processes > 1)} of {self.capacity:.0f} GiB",
            f"1. measure it on {sizes['guard']} problems kept out of training, plain and in each of {len(self.contexts)} "
            f"contexts ({', '.join(map(repr, self.contexts))}), and take the one that promises most; below "
            f"{arguments.min_saving:.0%} of the tokens: {'leave the length' if self.ratios else 'end, with nothing lost'}",
            f"2. train {how}, on {sizes['train']:,} problems, up to {arguments.max_rounds} rounds of {arguments.round_steps} "
            f"updates × {arguments.rollouts} rollouts at a rate of {recipe['learning_rate']:.1e}; after each look at the "
            f"{sizes['guard']} problems; stop when a round saves less than {LEAST_GAIN:.0%}, or something is lost",
            *self._further(),
            f"memory of training: {sum(self.memory.values()):.2f} GiB ({memory})",
            f"disk: about {disk / GIB:.2g} GiB at most",
            f"rollouts: at most {written:,} to train on and {measured:,} to measure; "
            "how long that takes is said when the first are written",
        ]
        return "\n".join(lines)

    def _further(self) -> list[str]:
        """The lines of the plan that follow training."""
        sizes = {name: len(rows) for name, rows in self.data.items()}
        lines = []
        if self.ratios:
            removed = ", ".join(f"{ratio:.0%}" for ratio in self.ratios)
            rates = [
                recovery_rates(round((1 - ratio) * self.parameters)) for ratio in (self.ratios[0], self.ratios[-1])
            ]
            recover, own = (
                "–".join(dict.fromkeys(f"{rate:.1e}" for rate in side)) for side in zip(*rates, strict=True)
            )
            lines.append(
                f"make it smaller: remove {removed} of the parameters, each of them from what 2 has left, by what matters on its "
                f"verified rollouts to {self.banked:,} problems; recover by its logits on those ({self.recovery_updates} updates "
                f"at {recover}), then on the student's own rollouts (as many at {own}); look at the {sizes['guard']} problems, and "
                "stop at the first that is no longer as good"
            )
        tries = "" if not self.ratios else ", the smallest first, until one is as good"
        lines.append(
            f"the verdict, on {sizes['final']} problems that nothing has seen{tries}: at most "
            f"{100 * self.arguments.max_accuracy_drop:g} points lost"
        )
        if self.artefacts:
            names = ", ".join(artefact.name for artefact in self.artefacts)
            lines.append(
                f"export it as {names}, each checked in its engine, and judged on the same {sizes['final']} problems, greedily; "
                "engines that are not there are installed"
            )
        return [f"{number}. {line}" for number, line in enumerate(lines, start=3)]

    # What is done

    def decide(self, what: str, sentence: str, **because) -> None:
        """Writes a decision down, with the numbers it rests on, and says it."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "decision": what,
            "because": because,
            "sentence": sentence,
        }
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.say(f"→ {sentence}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def write_recipe(self, name: str, recipe: dict) -> str:
        path = self.root / "recipes" / f"{name}.yaml"
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))
        return str(path)

    def measure(self, name: str, model: str, split: str, context: str | None = None) -> Measurement:
        """Accuracy and tokens of a checkpoint, sampled."""
        recipe = {
            "reward_funcs": self.reward_funcs,
            "decoding": ["sampled"],
            "temperature": 1.0,
            "num_samples": self.arguments.samples,
            "max_completion_length": self.arguments.max_completion_length,
            "batch_size": self.batch_size,
            "prompt_only": False,
            "task": split,
            "seed": self.config.seed,
        }
        output = self.root / "evaluation" / f"{name}-{split}.json"
        options = {
            "model_name_or_path": model,
            "dataset_name": str(self.root / "data" / f"{split}.parquet"),
            "stage": name,
            "output": str(output),
        }
        if context is not None:
            options["prompt_template"] = TEACHER_PROMPT_TEMPLATES.get(context, context)
        recipe = self.write_recipe(f"evaluate_{split}", recipe)
        self.run(
            Stage(f"{name}-{split}", f"measuring {name} on {split}", "trl_opsd.evaluate", recipe, options, output)
        )
        (found,) = load_results(output)
        if base_of(model) != model:  # an adapter adds nothing to the size of what it is merged into in the end
            found.row = replace(found.row, **count_checkpoint(base_of(model)))
        return found

    def run(self, stage: Stage, *before: Stage) -> None:
        """Runs a stage, unless it is finished, since what it goes on from: `before`, in order."""
        self.say(f"  {stage.what}")
        run_chain([*before, stage], self.root / "logs", self.launcher, lambda *progress: None)

    def choose(self, base: Measurement) -> Promise | None:
        """The context that promises most, if any promises enough."""
        if base.row.accuracy == 0:
            self.decide(
                "no training",
                f"of {base.row.n} problems none is answered right, so that there is no rollout to train on: is the answer where "
                f"the verifier ({', '.join(self.reward_funcs)}) looks, and is `max_completion_length` enough?",
                accuracy=0.0,
                truncated=base.row.truncated,
            )
            return None
        promises = []
        for number, context in enumerate(self.contexts, start=1):
            try:
                found = self.measure(f"context-{number}", self.config.model_name_or_path, "guard", context)
            except StageError as error:
                if error.status != 2:
                    raise  # a crash says nothing of the context
                self.decide(
                    "context left out", f"the context {context!r} cannot be measured: {error}", context=context
                )
                continue
            promise = Promise.of(context, base, found, self.arguments.max_accuracy_drop)
            promises.append(promise)
            signs = zip(promise.as_right, promise.usable, strict=True)
            thirds = " ".join("✓" if right else "~" if usable else "✗" for right, usable in signs)
            self.decide(
                "context measured",
                f"{context!r}: {100 * found.row.accuracy:.1f}% in {found.row.mean_tokens:.1f} tokens (plain "
                f"{100 * base.row.accuracy:.1f}% in {base.row.mean_tokens:.1f}); as right as plain from the third with the shortest replies to that with the longest {thirds}; "
                f"promises {promise.saving:.0%} of the tokens",
                context=context,
                accuracy=found.row.accuracy,
                mean_tokens=found.row.mean_tokens,
                as_right=promise.as_right,
                usable=promise.usable,
                saving=promise.saving,
            )
        best = max(promises, key=lambda promise: promise.saving, default=None)
        if best is None or best.saving < self.arguments.min_saving:
            promised = "nothing" if best is None else f"{best.saving:.0%}"
            self.decide(
                "no training",
                f"no context promises {self.arguments.min_saving:.0%} of the tokens where it keeps the accuracy (the best: "
                f"{promised}): nothing is trained",
                saving=None if best is None else best.saving,
            )
            return None
        gate = "" if not best.needs_gate else ", used where the teacher is right in it (`teacher_gate`)"
        self.decide("context", f"the teacher sees {best.context!r}{gate}", context=best.context, saving=best.saving)
        return best

    def train(self, promise: Promise, base: Measurement) -> str | None:
        """
        Rounds, until one is the last. Returns the folder of the round to take: of those that have not lost more than the
        margin the shortest, else the most accurate of those that are not worse for sure.
        """
        arguments = self.arguments
        recipe = dict(self.recipe)
        is_name = promise.context in TEACHER_PROMPT_TEMPLATES
        recipe["teacher_context" if is_name else "teacher_prompt_template"] = promise.context
        if promise.needs_gate:
            recipe["teacher_gate"] = 0.5
        path = self.write_recipe("opsd", recipe)
        good, last, stages = [], base.row.mean_tokens, []
        level = 1 - 0.05 / arguments.max_rounds
        for number in range(1, arguments.max_rounds + 1):
            output, steps = self.root / f"round-{number}", number * arguments.round_steps
            options = {"output_dir": str(output), "max_steps": steps, "seed": self.config.seed}
            if number > 1:
                before = self.root / f"round-{number - 1}" / f"checkpoint-{steps - arguments.round_steps}"
                options["resume_from_checkpoint"] = str(before)
            stage = Stage(f"round-{number}", f"training to update {steps}", "trl_opsd.opsd", path, options, output)
            try:
                self.run(stage, *stages)
            except StageError as error:
                if error.status != 3:
                    raise  # a crash says nothing of the model
                self.decide("training stopped", f"an alarm ended round {number}: {error}", round=number)
                break
            stages.append(stage)
            found = self.measure(f"round-{number}", str(output), "guard")
            comparison = compare_measurements(base, found, arguments.max_accuracy_drop, level)
            tokens, lost = found.row.mean_tokens, -comparison.difference[0]
            numbers = {"round": number, "accuracy": found.row.accuracy, "mean_tokens": tokens, "level": level}
            numbers["difference"] = comparison.difference
            self.decide("look", f"round {number}: {comparison.short()}", answer=comparison.answer.text, **numbers)
            if comparison.answer is Answer.WORSE:
                self.decide("stop", f"round {number} is worse than the start: it is not taken", **numbers)
                break
            good.append((max(lost, arguments.max_accuracy_drop), tokens, str(output)))
            if tokens > (1 - LEAST_GAIN) * last and lost <= arguments.max_accuracy_drop:
                self.decide(
                    "stop", f"round {number} saved {1 - tokens / last:.1%}: there is no more to be had", **numbers
                )
                break
            last = tokens
        else:
            self.decide("stop", f"`max_rounds` {arguments.max_rounds} are done", max_rounds=arguments.max_rounds)
        if not good:
            self.decide("end", "no round kept the accuracy: nothing is left, and nothing lost")
            return None
        lost, tokens, folder = min(good)
        self.decide(
            "round", f"{Path(folder).name} is taken, in {tokens:.1f} tokens", mean_tokens=tokens, lost_at_most=lost
        )
        return folder

    def shrink(self, teacher: str, base: Measurement) -> list[str]:
        """
        Prunes to each ratio, recovers, and looks. Returns the folders of the students that are still as good, the smallest
        first.
        """
        arguments, good = self.arguments, []
        level = 1 - 0.05 / len(self.ratios)
        bank = self._fill_bank(teacher, "bank")
        for ratio in self.ratios:
            numbers = {"ratio": ratio}
            try:
                folder = self._student(teacher, bank, ratio)
            except StageError as error:
                if error.status != 2:
                    raise  # a crash says nothing of the ratio
                self.decide("stop", f"{ratio:.0%} of the parameters cannot be removed: {error}", **numbers)
                break
            found = self.measure(Path(folder).name, folder, "guard")
            comparison = compare_measurements(base, found, arguments.max_accuracy_drop, level)
            numbers |= {"parameters": found.row.parameters, "accuracy": found.row.accuracy, "level": level}
            numbers |= {"mean_tokens": found.row.mean_tokens, "difference": comparison.difference}
            self.decide("look", f"{ratio:.0%} removed: {comparison.short()}", answer=comparison.answer.text, **numbers)
            if comparison.answer is Answer.WORSE or -comparison.difference[0] > arguments.max_accuracy_drop:
                self.decide(
                    "stop", f"with {ratio:.0%} removed it is no longer as good: that student is not taken", **numbers
                )
                break
            good.insert(0, folder)
        else:
            self.decide("stop", "all ratios were tried", ratios=self.ratios)
        return good

    def _fill_bank(self, model: str, name: str) -> str:
        """Has a model write verified rollouts on the problems of training. Returns their folder."""
        recipe = {
            "reward_funcs": self.reward_funcs,
            "temperature": 1.0,
            "max_completion_length": self.arguments.max_completion_length,
            "batch_size": self.batch_size,
            "max_samples": self.banked,
            "seed": self.config.seed,
        }
        output = self.root / f"{name}.json"
        options = {"model_name_or_path": model, "dataset_name": str(self.root / "data" / "train.parquet")}
        options |= {"bank": str(self.root / name), "output": str(output)}
        what, recipe = f"{Path(model).name} writes verified rollouts", self.write_recipe(name, recipe)
        self.run(Stage(name, what, "trl_opsd.compress.bank", recipe, options, output))
        return options["bank"]

    def _student(self, teacher: str, bank: str, ratio: float) -> str:
        """
        A model with fewer parameters, which its teacher has taught to answer again: by its logits on its own rollouts, then on
        the student's. Returns its folder.
        """
        percent = f"{100 * ratio:g}"
        pruned, recovered, small = (self.root / f"{name}-{percent}" for name in ("pruned", "recovered", "small"))
        recipe = {"calibration_samples": CALIBRATION, "dtype": "float32"}
        options = {"model_name_or_path": teacher, "calibration_dataset": bank, "target_ratio": ratio}
        options["output_dir"] = str(pruned)
        path = self.write_recipe("prune", recipe)
        self.run(Stage(pruned.name, f"removing {ratio:.0%}", "trl_opsd.prune", path, options, pruned, launched=False))

        rates = recovery_rates(round((1 - ratio) * self.parameters))
        common = self.recipe | {
            "teacher_weights": "external",
            "max_steps": self.recovery_updates,
            "save_total_limit": 2,
        }
        common |= {"lr_scheduler_type": "cosine", "warmup_steps": 10}
        by_logits = common | {"dataset_name": bank, "lmbda": 0.0, "gate": "all", "beta": 0.0}
        del by_logits["reward_funcs"]  # what is in the bank is verified
        for student, output, recipe, rate, what in (
            (pruned, recovered, by_logits, rates[0], "recovering by its teacher's logits"),
            (recovered, small, common, rates[1], "recovering on its own rollouts"),
        ):
            options = {"model_name_or_path": str(student), "teacher_model_name_or_path": teacher}
            options |= {"output_dir": str(output), "seed": self.config.seed}
            path = self.write_recipe(f"opsd_{output.name}", recipe | {"learning_rate": rate})
            try:
                self.run(Stage(output.name, what, "trl_opsd.opsd", path, options, output))
            except StageError as error:
                if error.status != 3:
                    raise
                sentence = f"an alarm ended {output.name}, so {student.name} is looked at: {error}"
                self.decide("training stopped", sentence, ratio=ratio)
                return str(student)
        return str(small)

    def conclude(self, folders: Sequence[str]) -> Answer:
        """
        The verdict on problems that nothing has seen, and if it is not that of a loss the folder `compressed`: the first of the
        candidates that is as good, or if none is the last that is not worse for sure.
        """
        base = self.measure("base", self.config.model_name_or_path, "final")
        margins = {None: self.arguments.max_accuracy_drop}
        verdicts = []
        for folder in folders:
            whole = merged(folder, str(self.root / f"{Path(folder).name}-merged"))
            found = self.measure(Path(folder).name, whole, "final")
            more = self.root / "evaluation" / f"{Path(folder).name}-decided-final.json"
            # Of several candidates each verdict may err by its share alone
            conclusion = decide(
                str(base.file), str(found.file), self.arguments.decide, more, margins, self.say, 0.05 / len(folders)
            )
            answer, comparison = conclusion.answer, conclusion.pooled
            self.decide("verdict", comparison.sentence(), answer=answer.text, difference=comparison.difference)
            verdicts.append((answer, whole, comparison))
            if answer is Answer.AS_GOOD:
                break
        kept = [verdict for verdict in verdicts if verdict[0] is not Answer.WORSE]
        answer, whole, comparison = (kept or verdicts)[-1]
        if answer is Answer.WORSE:
            sentence = "it is worse on the problems of the verdict: nothing is left, and nothing lost"
            self.decide("end", sentence, difference=comparison.difference)
            self.report([comparison.before, comparison.after])
            self._leave_nothing()
            return answer
        self.report([comparison.before, comparison.after])
        self.place(whole)
        files = dict.fromkeys([comparison.before.file, comparison.after.file])
        write_card(list(files), self.root / "compressed", comparison.after.label, comparison.before.label, margins)
        self.say(f"{self.root / 'compressed'}: the model; report.html: the evidence")
        if self.arguments.push_to_hub:
            self.upload(answer)
        if self.artefacts:
            exported = self.export()
            self.report([comparison.before, comparison.after])
            answer = exported if answer is Answer.AS_GOOD else answer
        return answer

    def _leave_nothing(self) -> None:
        """Moves what an earlier run has left aside: this is not the verdict of that."""
        if (self.root / "compressed").exists():
            move_aside(self.root / "compressed")

    def report(self, measurements: Sequence[Measurement]) -> None:
        """The results, and the report with the reasons that there are so far."""
        write_rows(self.root / "results.json", [item.row for item in measurements], self.config)
        reasons = [line["sentence"] for line in map(json.loads, self.log.read_text().splitlines())]
        margins = {None: self.arguments.max_accuracy_drop}
        write_report(measurements, self.root, "base", margins, remarks=reasons)

    def place(self, folder: str) -> None:
        """Copies a model to `compressed`, whole or not at all."""
        final, staging = self.root / "compressed", self.root / ".compressed.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(folder, staging, ignore=shutil.ignore_patterns("checkpoint-*", "runs", "merged"))
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)

    def upload(self, answer: Answer) -> None:
        """Uploads `compressed`, if it is as good."""
        name = self.arguments.hub_model_id
        if answer is not Answer.AS_GOOD:
            self.decide("not pushed", f"it is {answer.text}, so nothing is at `{name}`", answer=answer.text)
            return
        self.decide("pushed", f"it is at {push(self.root / 'compressed', name)}", repository=name)

    def export(self) -> Answer:
        """
        Makes the artefacts of `compressed`, checked in their engines and judged on the problems of the verdict. Returns the
        worst of their verdicts; one that could not be made is a worse one.
        """
        model, folder = str(self.root / "compressed"), self.root / "export"
        recipe = {
            "dataset_name": str(self.root / "data" / "final.parquet"),
            "task": "final",
            "reward_funcs": self.reward_funcs,
            "max_completion_length": self.arguments.max_completion_length,
            "batch_size": min(64, self.batch_size),
            "margin": [str(self.arguments.max_accuracy_drop)],
            "seed": self.config.seed,
        }
        options = {"model_name_or_path": model, "output_dir": str(folder)}
        path = self.write_recipe("export", recipe)
        output = folder / "export.json"
        stage = Stage("export", "exporting it", "trl_opsd.export", path, options, output)
        # What was made of another model, or judged by another measure, is not gone on with; other formats are
        made_of, known = stage.fingerprint(""), self.root / ".export.made_of"
        if folder.exists() and (not known.is_file() or known.read_text() != made_of):
            move_aside(folder)
        write_text(known, made_of)
        if any(artefact.is_calibrated for artefact in self.artefacts):
            options = options | {"bank": self._fill_bank(model, "export-bank")}
        options = options | {"formats": self.arguments.export_formats}
        if self.arguments.push_to_hub:
            options = options | {"push_to_hub": True, "hub_model_id": self.arguments.hub_model_id}
        stage = replace(stage, arguments=options)
        try:
            self.run(stage)
        except StageError as error:
            rows = json.loads(output.read_text())["rows"] if output.is_file() else []
            made = {row["artefact"] for row in rows}
            if error.status not in (1, 3) or not made >= {artefact.name for artefact in self.artefacts}:
                raise  # a mistake, or a crash, and no verdict
            write_text(stage.marker, stage.fingerprint(""))  # to be told, and not made, again
        asked = {artefact.name for artefact in self.artefacts}
        rows = [row for row in json.loads(output.read_text())["rows"] if row["artefact"] in asked]
        for row in rows:
            numbers = {
                name: row.get(name) for name in ("artefact", "answer", "bytes", "accuracy", "tokens_per_s", "prefix")
            }
            self.decide("exported", export_line(row), **numbers)
        answers = {row["answer"] for row in rows}
        if answers & {"failed", Answer.WORSE.text}:
            return Answer.WORSE
        return Answer.UNDECIDED if Answer.UNDECIDED.text in answers else Answer.AS_GOOD

    def __call__(self) -> int:
        """Runs it. Returns the exit status: 0 as good, 1 worse, 3 undecided or nothing to be had."""
        for name, rows in self.data.items():
            write_parquet(rows, self.root / "data" / f"{name}.parquet")
        # They follow from the results again, which are kept
        for name in ("decisions.jsonl", "results.json", "report.html", "report.md"):
            (self.root / name).unlink(missing_ok=True)
        start = time.monotonic()
        model = self.config.model_name_or_path
        base = self.measure("base", model, "guard")
        self.tell_time(base, time.monotonic() - start)
        promise = self.choose(base)
        folder = None if promise is None else self.train(promise, base)
        candidates = [] if folder is None else [folder]
        if self.ratios and base.row.accuracy > 0:
            teacher = merged(model, str(self.root / "base-merged")) if folder is None else folder
            candidates = [*self.shrink(teacher, base), *candidates]
        if candidates:
            status = self.conclude(candidates).status
        else:
            status = 3 if promise is None and not self.ratios else Answer.WORSE.status
            self._leave_nothing()
        self.say(
            f"{(time.monotonic() - start) / 60:.1f} minutes in all, what was there from an earlier run not counted"
        )
        return status

    def tell_time(self, base: Measurement, seconds: float) -> None:
        """How long the rest will take, from the tokens that were just written."""
        if base.row.generation_s is None or seconds < base.row.generation_s:  # they were there already
            return
        arguments = self.arguments
        written = base.row.n * arguments.samples * base.row.mean_tokens
        speed = written / max(base.row.generation_s, 1e-3)
        sizes = {name: len(rows) for name, rows in self.data.items()}
        measured = (len(self.contexts) + arguments.max_rounds) * sizes["guard"] + 2 * sizes["final"]
        # Training an update takes about as long as writing its rollouts, and an export writes each of the last problems once
        trained = 2 * arguments.max_rounds * arguments.round_steps * arguments.rollouts
        if self.ratios:
            measured += len(self.ratios) * (sizes["guard"] + sizes["final"])
            trained += self.banked + 3 * len(self.ratios) * self.recovery_updates * arguments.rollouts
        trained += len(self.artefacts) * sizes["final"]
        left = (measured * arguments.samples + trained) * base.row.mean_tokens / speed
        self.decide(
            "time",
            f"{speed:,.0f} tokens a second: at most {left / 60:.0f} minutes from here, if replies stay as long as they are",
            tokens_per_s=speed,
            seconds_at_most=left,
            first_s=seconds,
        )


def write_parquet(rows: Dataset, path: Path) -> None:
    """Writes rows with their types, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pyarrow.parquet.write_table(rows.with_format("arrow")[:].replace_schema_metadata(None), temporary)
    temporary.replace(path)


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run(config: CompressConfig, arguments: Arguments) -> None:
    """
    Plans, and unless it is a dry run does it.

    Args:
        config ([`~trl_opsd.compress.config.CompressConfig`]):
            Checkpoint, prompts, folder, launcher and seed.
        arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
            The rest.
    """
    with user_errors():
        automatic = Automatic(config, arguments)
        automatic.say(automatic.plan())
        if arguments.dry_run:
            return
        try:
            status = automatic()
        except KeyboardInterrupt:
            Console(stderr=True).print("\nInterrupted: the same command goes on from here.")
            raise SystemExit(130) from None
    if status:
        raise SystemExit(status)
