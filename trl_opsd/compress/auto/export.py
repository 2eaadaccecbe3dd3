"""What engines serve, of the model that is left."""

import json
from dataclasses import replace

from ...evaluate.compare import Answer
from ...export.run import line as export_line
from ...results import write_text
from ..chain import Stage, StageError, move_aside
from .runner import Runner


def export(runner: Runner) -> Answer:
    """
    Makes the artefacts of `compressed`, checked in their engines and judged on the problems of the verdict. Returns the
    worst of their verdicts; one that could not be made is a worse one.
    """
    plan = runner.plan
    model, folder = str(runner.root / "compressed"), runner.root / "export"
    recipe = {
        "dataset_name": plan.part("final"),
        "task": "final",
        "reward_funcs": plan.reward_funcs,
        "max_completion_length": plan.arguments.max_completion_length,
        "batch_size": min(64, plan.fit.batch_size),
        "margin": [str(plan.arguments.max_accuracy_drop)],
        "seed": plan.config.seed,
    }
    options = {"model_name_or_path": model, "output_dir": str(folder)}
    path = runner.write_recipe("export", recipe)
    output = folder / "export.json"
    stage = Stage("export", "exporting it", "trl_opsd.export", path, options, output)
    # What was made of another model, or judged by another measure, is not gone on with; other formats are
    made_of, known = stage.fingerprint(""), runner.root / ".export.made_of"
    if folder.exists() and (not known.is_file() or known.read_text() != made_of):
        move_aside(folder)
    write_text(known, made_of)
    if any(artefact.is_calibrated for artefact in plan.artefacts):
        options = options | {"bank": runner.fill_bank(model, "export-bank")}
    options = options | {"formats": plan.arguments.export_formats}
    if plan.arguments.push_to_hub:
        options = options | {"push_to_hub": True, "hub_model_id": plan.arguments.hub_model_id}
    stage = replace(stage, arguments=options)
    try:
        runner.run(stage)
    except StageError as error:
        rows = json.loads(output.read_text())["rows"] if output.is_file() else []
        made = {row["artefact"] for row in rows}
        if error.status not in (1, 3) or not made >= {artefact.name for artefact in plan.artefacts}:
            raise  # a mistake, or a crash, and no verdict
        write_text(stage.marker, stage.fingerprint(""))  # to be told, and not made, again
    asked = {artefact.name for artefact in plan.artefacts}
    rows = [row for row in json.loads(output.read_text())["rows"] if row["artefact"] in asked]
    for row in rows:
        numbers = {
            name: row.get(name) for name in ("artefact", "answer", "bytes", "accuracy", "tokens_per_s", "prefix")
        }
        runner.decide("exported", export_line(row), **numbers)
    answers = {row["answer"] for row in rows}
    if answers & {"failed", Answer.WORSE.text}:
        return Answer.WORSE
    return Answer.UNDECIDED if Answer.UNDECIDED.text in answers else Answer.AS_GOOD
