"""
More samples until it is decided: a comparison of three answers as a sequential test, with a budget.

The samples of every problem are doubled, up to the budget, and after each doubling the comparison is looked at. So that
looking several times does not make an error more likely, a look may err as often as its share of the budget: of looks at
1, 2, 4 and 8 times the samples the intervals are at 1 − 0.05 · (⅛, ⅛, ¼, ½). That is the spending function α·t of Kim and
DeMets (Biometrika 74, 1987), spent by Bonferroni's inequality, which holds however the looks depend on each other, as they
do, all being of the same problems.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..cli import UserError
from .compare import Answer, Comparison, Conclusion, compare_files, compare_measurements
from .config import EvaluateConfig
from .results_file import Measurement, load_results


def looks(budget: int, error: float = 0.05) -> list[tuple[int, float]]:
    """
    Returns when a sequential comparison is looked at, and the level of its intervals there.

    Args:
        budget (`int`):
            How many times the first samples there may be, at least 2.
        error (`float`, *optional*, defaults to `0.05`):
            What the levels leave to error in all.

    Returns:
        `list[tuple[int, float]]`: Times the first samples, and the level.
    """
    times = [2**power for power in range(budget.bit_length()) if 2**power < budget] + [budget]
    return [(now, 1 - error * (now - before) / budget) for before, now in zip([0, *times], times, strict=False)]


def decide(
    before: str,
    after: str,
    budget: int,
    output: str | Path,
    margins: Mapping[str | None, float] | None = None,
    say: Callable[[str], None] = lambda text: None,
    error: float = 0.05,
) -> Conclusion:
    """
    Compares two results files, and draws more samples of the same problems until the answer is decided.

    Args:
        before (`str`):
            Results file to compare with, or `FILE:STAGE` for one of several checkpoints in it.
        after (`str`):
            The same of what is judged.
        budget (`int`):
            How many times the samples that are there may be drawn, those included; at least 2.
        output (`str` or `Path`):
            JSON file for the results with more samples; the completions are written beside it.
        margins (`Mapping`, *optional*):
            Loss of accuracy that still counts as none, by task. Defaults to 0.01 for all.
        say (`Callable[[str], None]`, *optional*):
            Told what each look came to.
        error (`float`, *optional*, defaults to `0.05`):
            What the intervals of all looks leave to error: less where this is one of several decisions.

    Returns:
        [`Conclusion`]: That of the last look.

    Raises:
        UserError: If nothing was sampled, if a file was not written by the evaluation, if the two cannot be compared, or
            if weights or problems are no longer those that were measured.
    """
    if budget < 2:
        raise UserError(f"`decide` is how many times the samples there may be, at least 2, and is {budget}.")
    found = None
    for (times, level), singles in zip(
        looks(budget, error), _drawn(before, after, budget, Path(output), margins), strict=False
    ):
        found = Conclusion([Comparison(one.pairs, one.margins, level) for one in singles], level)
        say(f"{times} of {budget} times the samples: {found.pooled.sentence()}")
        if found.answer is not Answer.UNDECIDED:
            break
    return found


def _drawn(
    before: str, after: str, budget: int, output: Path, margins: Mapping[str | None, float] | None
) -> Iterator[list[Comparison]]:
    """Yields the comparisons at each look, with more samples each time."""
    # What is imported when it is needed takes seconds, and a comparison alone does not need it
    from .pipeline import evaluate_jobs
    from .plan import plan
    from .results_file import write_rows

    first = compare_files(before, after, margins)
    sampled = [single for single in first if single.before.row.decoding == "sampled"]
    if not sampled:
        raise UserError(
            "`decide` draws more samples of the same problems, and greedy decoding has one of each: evaluate both with "
            "`decoding: [sampled]`, or on more problems."
        )
    items = [item for single in sampled for item in single.pairs[0]]
    runs = [_run_of(item, output) for item in items]
    measured = {run.model_name_or_path: item for run, item in zip(runs, items, strict=True)}
    if output.resolve() in {item.file.resolve() for single in first for item in single.pairs[0]}:
        raise UserError(f"`output`: `{output}` is one of the files that are compared: give another name.")
    yield first
    opened = {}  # each checkpoint once, so that it is read and loaded once for all its tasks
    for times, _ in looks(budget)[1:]:
        more = [dataclasses.replace(run, num_samples=times * run.num_samples) for run in runs]
        more.sort(key=lambda run: str(run.model_name_or_path))  # one after the other, so that each is loaded once
        jobs = [job for run in more for job in plan(run)]
        for job in jobs:
            job.checkpoint = opened.setdefault(job.checkpoint.path, job.checkpoint)
            item = measured[job.config.model_name_or_path]
            if job.checkpoint.hash != item.row.checkpoint_hash:
                raise UserError(
                    f"`{job.checkpoint.path}` has other weights than those that `{item.file}` has measured: evaluate it "
                    "again."
                )
        rows = evaluate_jobs(jobs)
        write_rows(output, rows, more[0])
        again = {
            (item.row.stage, item.row.checkpoint, item.row.prompt, *item.key): item for item in load_results(output)
        }
        singles = []
        for single in first:
            pair = [again.get((i.row.stage, i.row.checkpoint, i.row.prompt, *i.key), i) for i in single.pairs[0]]
            if any(new.questions != old.questions for new, old in zip(pair, single.pairs[0], strict=True)):
                raise UserError(f"{single.where}: its problems have changed since they were measured: evaluate again.")
            singles.append(compare_measurements(*pair, single.margin))
        yield singles


def _run_of(item: Measurement, output: Path) -> EvaluateConfig:
    """The configuration that measured something, with its values filled in."""
    from .plan import expand

    names = {declared.name for declared in dataclasses.fields(EvaluateConfig)}
    config = item.run["config"]
    if not config.keys() <= names or "decoding" not in config:
        raise UserError(
            f"`{item.file}` was not written by `python -m trl_opsd.evaluate`, so that there is nothing to draw more samples "
            "with: evaluate the checkpoints with it."
        )
    try:
        runs = expand(EvaluateConfig(**config))
    except (TypeError, ValueError) as error:
        raise UserError(f"`{item.file}` has a configuration that cannot be run: {error}") from None
    row = item.row
    for run in runs:
        labels = run.stage, run.model_name_or_path, run.task, run.prompt_template or "plain"
        if labels == (row.stage, row.checkpoint, row.task, row.prompt):
            changes = {"decoding": ["sampled"], "concurrency": None, "output": str(output), "save_completions": True}
            return dataclasses.replace(run, **changes, rescore=False, num_samples=row.samples)
    raise UserError(f"`{item.file}` does not say how {item.label} on {row.task} was measured: evaluate it again.")
