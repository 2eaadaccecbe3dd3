"""The end: the verdict, and what is left after it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...adapters import merged
from ...evaluate.card import write_card
from ...evaluate.compare import Answer
from ...evaluate.decide import decide
from ...evaluate.report import write_report
from ...evaluate.results_file import Measurement, write_rows
from ...hub import push
from ..chain import move_aside
from .export import export
from .runner import Runner


def conclude(runner: Runner, folders: Sequence[str]) -> Answer:
    """
    The verdict on problems that nothing has seen, and if it is not that of a loss the folder `compressed`: the first of the
    candidates that is as good, or if none is the last that is not worse for sure.
    """
    plan = runner.plan
    base = runner.measure("base", plan.config.model_name_or_path, "final")
    margins = {None: plan.arguments.max_accuracy_drop}
    verdicts = []
    for folder in folders:
        whole = merged(folder, str(runner.root / f"{Path(folder).name}-merged"))
        found = runner.measure(Path(folder).name, whole, "final")
        more = runner.root / "evaluation" / f"{Path(folder).name}-decided-final.json"
        # Of several candidates each verdict may err by its share alone
        conclusion = decide(
            str(base.file), str(found.file), plan.arguments.decide, more, margins, runner.say, 0.05 / len(folders)
        )
        answer, comparison = conclusion.answer, conclusion.pooled
        runner.decide("verdict", comparison.sentence(), answer=answer.text, difference=comparison.difference)
        verdicts.append((answer, whole, comparison))
        if answer is Answer.AS_GOOD:
            break
    kept = [verdict for verdict in verdicts if verdict[0] is not Answer.WORSE]
    answer, whole, comparison = (kept or verdicts)[-1]
    if answer is Answer.WORSE:
        sentence = "it is worse on the problems of the verdict: nothing is left, and nothing lost"
        runner.decide("end", sentence, difference=comparison.difference)
        report(runner, [comparison.before, comparison.after])
        leave_nothing(runner)
        return answer
    report(runner, [comparison.before, comparison.after])
    place(runner.root, whole)
    files = dict.fromkeys([comparison.before.file, comparison.after.file])
    write_card(list(files), runner.root / "compressed", comparison.after.label, comparison.before.label, margins)
    runner.say(f"{runner.root / 'compressed'}: the model; report.html: the evidence")
    if plan.arguments.push_to_hub:
        upload(runner, answer)
    if plan.artefacts:
        exported = export(runner)
        report(runner, [comparison.before, comparison.after])
        answer = exported if answer is Answer.AS_GOOD else answer
    return answer


def leave_nothing(runner: Runner) -> None:
    """Moves what an earlier run has left aside: this is not the verdict of that."""
    if (runner.root / "compressed").exists():
        move_aside(runner.root / "compressed")


def report(runner: Runner, measurements: Sequence[Measurement]) -> None:
    """The results, and the report with the reasons that there are so far."""
    plan = runner.plan
    write_rows(runner.root / "results.json", [item.row for item in measurements], plan.config)
    reasons = [line["sentence"] for line in map(json.loads, runner.log.read_text().splitlines())]
    margins = {None: plan.arguments.max_accuracy_drop}
    write_report(measurements, runner.root, "base", margins, remarks=reasons)


def place(root: Path, folder: str) -> None:
    """Copies a model to `compressed`, whole or not at all."""
    final, staging = root / "compressed", root / ".compressed.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(folder, staging, ignore=shutil.ignore_patterns("checkpoint-*", "runs", "start"))
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)


def upload(runner: Runner, answer: Answer) -> None:
    """Uploads `compressed`, if it is as good."""
    name = runner.plan.arguments.hub_model_id
    if answer is not Answer.AS_GOOD:
        runner.decide("not pushed", f"it is {answer.text}, so nothing is at `{name}`", answer=answer.text)
        return
    runner.decide("pushed", f"it is at {push(runner.root / 'compressed', name)}", repository=name)
