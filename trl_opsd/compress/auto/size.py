"""Fewer parameters: students of one ratio after the other, until one is no longer as good."""

from pathlib import Path

from ...evaluate.compare import Answer, compare_measurements
from ...evaluate.results_file import Measurement
from ..chain import Stage, StageError
from .plan import recovery_rates
from .runner import Runner


# Rollouts that importance is measured on
CALIBRATION = 128


def shrink(runner: Runner, teacher: str, base: Measurement) -> list[str]:
    """
    Prunes to each ratio, recovers, and looks. Returns the folders of the students that are still as good, the smallest
    first.
    """
    plan, good = runner.plan, []
    margin = plan.arguments.max_accuracy_drop
    level = 1 - 0.05 / len(plan.ratios)
    bank = runner.fill_bank(teacher, "bank")
    for ratio in plan.ratios:
        numbers = {"ratio": ratio}
        try:
            folder = make_student(runner, teacher, bank, ratio)
        except StageError as error:
            if error.status != 2:
                raise  # a crash says nothing of the ratio
            runner.decide("stop", f"{ratio:.0%} of the parameters cannot be removed: {error}", **numbers)
            break
        found = runner.measure(Path(folder).name, folder, "guard")
        comparison = compare_measurements(base, found, margin, level)
        numbers |= {"parameters": found.row.parameters, "accuracy": found.row.accuracy, "level": level}
        numbers |= {"mean_tokens": found.row.mean_tokens, "difference": comparison.difference}
        runner.decide("look", f"{ratio:.0%} removed: {comparison.short()}", answer=comparison.answer.text, **numbers)
        if comparison.answer is Answer.WORSE or -comparison.difference[0] > margin:
            runner.decide(
                "stop", f"with {ratio:.0%} removed it is no longer as good: that student is not taken", **numbers
            )
            break
        good.insert(0, folder)
    else:
        runner.decide("stop", "all ratios were tried", ratios=plan.ratios)
    return good


def make_student(runner: Runner, teacher: str, bank: str, ratio: float) -> str:
    """
    A model with fewer parameters, which its teacher has taught to answer again: by its logits on its own rollouts, then on
    the student's. Returns its folder.
    """
    plan = runner.plan
    percent = f"{100 * ratio:g}"
    pruned, recovered, small = (runner.root / f"{name}-{percent}" for name in ("pruned", "recovered", "small"))
    recipe = {"calibration_samples": CALIBRATION, "dtype": "float32"}
    options = {"model_name_or_path": teacher, "calibration_dataset": bank, "target_ratio": ratio}
    options["output_dir"] = str(pruned)
    path = runner.write_recipe("prune", recipe)
    runner.run(Stage(pruned.name, f"removing {ratio:.0%}", "trl_opsd.prune", path, options, pruned, launched=False))

    rates = recovery_rates(round((1 - ratio) * plan.fit.parameters))
    common = plan.recipe | {
        "teacher_weights": "external",
        "max_steps": plan.recovery_updates,
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
        options |= {"output_dir": str(output), "seed": plan.config.seed}
        path = runner.write_recipe(f"opsd_{output.name}", recipe | {"learning_rate": rate})
        try:
            runner.run(Stage(output.name, what, "trl_opsd.opsd", path, options, output))
        except StageError as error:
            if error.status != 3:
                raise
            sentence = f"an alarm ended {output.name}, so {student.name} is looked at: {error}"
            runner.decide("training stopped", sentence, ratio=ratio)
            return str(student)
    return str(small)
