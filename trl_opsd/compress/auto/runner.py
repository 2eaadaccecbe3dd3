"""The running of a plan: stages, measurements, and decisions with the numbers that they rest on."""

import json
import time
from dataclasses import replace
from pathlib import Path

import yaml
from rich.console import Console

from ...evaluate.checkpoint import base_of, count_checkpoint
from ...evaluate.results_file import Measurement, load_results
from ...opsd.context import TEACHER_PROMPT_TEMPLATES
from ...results import write_text
from ..chain import Stage, run_chain
from .plan import Plan


class Runner:
    """
    Runs the stages of a plan and writes down what is decided. It goes on where an earlier run was interrupted: a stage that
    is finished is not run again, and its decision follows from the same numbers.

    Args:
        plan ([`Plan`]):
            What to run.
    """

    def __init__(self, plan: Plan):
        self.plan, self.root = plan, plan.root
        self.log = self.root / "decisions.jsonl"
        self._console = Console()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

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

    def write_recipe(self, name: str, recipe: dict) -> str:
        path = self.root / "recipes" / f"{name}.yaml"
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))
        return str(path)

    def run(self, stage: Stage, *before: Stage) -> None:
        """Runs a stage, unless it is finished, since what it goes on from: `before`, in order."""
        self.say(f"  {stage.what}")
        run_chain([*before, stage], self.root / "logs", self.plan.launch.command, lambda *progress: None)

    def measure(self, name: str, model: str, part: str, context: str | None = None) -> Measurement:
        """Accuracy and tokens of a checkpoint on a part of the data, sampled."""
        plan = self.plan
        recipe = {
            "reward_funcs": plan.reward_funcs,
            "decoding": ["sampled"],
            "temperature": 1.0,
            "num_samples": plan.arguments.samples,
            "max_completion_length": plan.arguments.max_completion_length,
            "batch_size": plan.fit.batch_size,
            "prompt_only": False,
            "task": part,
            "seed": plan.config.seed,
        }
        output = self.root / "evaluation" / f"{name}-{part}.json"
        options = {
            "model_name_or_path": model,
            "dataset_name": plan.part(part),
            "stage": name,
            "output": str(output),
        }
        if context is not None:
            options["prompt_template"] = TEACHER_PROMPT_TEMPLATES.get(context, context)
        path = self.write_recipe(f"evaluate_{part}", recipe)
        self.run(Stage(f"{name}-{part}", f"measuring {name} on {part}", "trl_opsd.evaluate", path, options, output))
        (found,) = load_results(output)
        if base_of(model) != model:  # an adapter adds nothing to the size of what it is merged into in the end
            found.row = replace(found.row, **count_checkpoint(base_of(model)))
        return found

    def fill_bank(self, model: str, name: str) -> str:
        """Has a model write verified rollouts on the problems of training. Returns their folder."""
        plan = self.plan
        recipe = {
            "reward_funcs": plan.reward_funcs,
            "temperature": 1.0,
            "max_completion_length": plan.arguments.max_completion_length,
            "batch_size": plan.fit.batch_size,
            "max_samples": plan.banked,
            "seed": plan.config.seed,
        }
        bank, output = str(self.root / name), self.root / f"{name}.json"
        options = {"model_name_or_path": model, "dataset_name": plan.part("train"), "bank": bank}
        options["output"] = str(output)
        what, path = f"{Path(model).name} writes verified rollouts", self.write_recipe(name, recipe)
        self.run(Stage(name, what, "trl_opsd.compress.bank", path, options, output))
        return bank
