"""The model card of a checkpoint, from what was measured: metrics as structured results, the recipe, limitations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..cli import UserError
from .compare import Conclusion, compare_measurements, margin_finder, warnings_of
from .report import write_page
from .results_file import Measurement, load_results
from .schema import to_json
from .table import markdown_table, markdown_text, table_of


# What of a row is a structured result, and how the Hub's metrics call it
_METRICS = {
    "accuracy": "accuracy",
    "accuracy_flexible": "accuracy",
    "mean_tokens": "mean_tokens",
    "p90_tokens": "p90_tokens",
    "truncated": "truncated_share",
}

# What of a stage's configuration, some 160 values, makes its result
_RECIPE = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "reward_funcs",
    "teacher_weights",
    "teacher_context",
    "teacher_prompt_template",
    "teacher_update_rate",
    "teacher_sync_steps",
    "gate",
    "gate_threshold",
    "beta",
    "kl_clip",
    "num_generations",
    "temperature",
    "max_completion_length",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
# Stages that leave a checkpoint, the last one first
_STAGES = ("opsd", "prune", "rlvr", "sft")


def write_card(
    results_files: Sequence[str | Path],
    folder: str | Path,
    stage: str | None = None,
    before: str | None = None,
    margins: Mapping[str | None, float] | None = None,
) -> Path:
    """
    Writes `README.md`, a model card that the Hub reads, into the folder of a checkpoint.

    Args:
        results_files (`Sequence[str]`):
            JSON files of the evaluation.
        folder (`str` or `Path`):
            Folder of the checkpoint. What its stage recorded of its configuration is the recipe in the card.
        stage (`str`, *optional*):
            Label of the checkpoint in the results. Defaults to the last there is.
        before (`str`, *optional*):
            Label of the checkpoint that it is compared with. Defaults to the first there is.
        margins (`Mapping`, *optional*):
            Loss of accuracy that still counts as none, by task, as [`~trl_opsd.evaluate.compare.margins_of`] reads it.
            Defaults to 0.01 for all.

    Returns:
        `Path`: The card.

    Raises:
        UserError: If a file is missing or damaged, or the results do not hold the stage.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no checkpoint at `{folder}`: give its folder with `--output_dir`.")
    measurements = [item for file in results_files for item in load_results(file)]
    if not measurements:
        raise UserError("A card needs at least one results file.")
    labels = list(dict.fromkeys(item.label for item in measurements))
    stage, before = labels[-1] if stage is None else stage, labels[0] if before is None else before
    for label in (stage, before):
        if label not in labels:
            raise UserError(f"There is no `{label}` in the results: they hold {', '.join(labels)}.")
    chosen = [item for item in measurements if item.label == stage]
    keys, name = {item.key for item in chosen}, folder.resolve().name
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["trl", "trl-opsd", "on-policy-distillation", "reasoning"],
        eval_results=[result for item in chosen for result in _results(item)],
    )
    starts = {item.key: item for item in measurements if item.label == before}
    find_margin = margin_finder(margins, [item.row.task for item in measurements])
    singles = [
        compare_measurements(starts[item.key], item, find_margin(item.row.task), unpaired=True)
        for item in chosen
        if item.key in starts and starts[item.key].label != item.label
    ]
    sentences = Conclusion(singles).sentences() if singles else []
    sentences += [f"{what}: {'; '.join(places)}." for what, places in warnings_of(singles)]
    lines = [
        f"# {name}",
        "",
        "Compressed after reinforcement learning by on-policy self-distillation, with trl-opsd.",
        "",
    ]
    table = table_of([item for item in measurements if item.key in keys])
    lines += ["## Results", "", *[f"- {sentence}" for sentence in map(markdown_text, sentences)], ""]
    lines += [*markdown_table(table.headings, table.lines), ""]
    lines += ["## Recipe", "", *_recipe(folder), ""]
    lines += ["## Limitations", "", *[f"- {sentence}" for sentence in _limitations(chosen)], ""]
    path = folder / "README.md"
    write_page(path, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))))
    return path


def _results(item: Measurement) -> list[EvalResult]:
    row = item.row
    values, estimator = to_json(row), row.estimator or "mean@1"
    names = {
        "accuracy": f"{estimator}, strict, {row.decoding}",
        "accuracy_flexible": f"{estimator}, flexible, {row.decoding}",
        "mean_tokens": f"completion tokens, mean, {row.decoding}",
        "p90_tokens": f"completion tokens, 90th percentile, {row.decoding}",
        "truncated": f"share of truncated completions, {row.decoding}",
        **{key: f"{key}, {row.decoding}" for key in row.at_k},
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.task,
            dataset_name=row.task,
            dataset_split=item.setting("dataset_split"),
            metric_type=_METRICS.get(key, key),
            metric_name=name,
            metric_value=values[key],
            metric_args={
                "problems": row.n,
                **{
                    bound: values[f"{key}_{bound}"]
                    for bound in ("low", "high")
                    if values.get(f"{key}_{bound}") is not None
                },
            },
        )
        for key, name in names.items()
        if values[key] is not None
    ]


def _recipe(folder: Path) -> list[str]:
    file = next((folder / f"{stage}.json" for stage in _STAGES if (folder / f"{stage}.json").is_file()), None)
    if file is None:
        return ["The checkpoint has no record of the stage that made it."]
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        config, commit, versions = (
            results["run"]["config"],
            results["run"]["commit"],
            results["environment"]["versions"],
        )
        recipe = {name: config[name] for name in _RECIPE if config.get(name) is not None}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"`{file}` is damaged: it is no record of a stage.") from None
    names = ", ".join(f"{name} {versions[name]}" for name in ("trl-opsd", "trl", "transformers", "torch"))
    return [
        f"Stage `{file.stem}`, with {names}" + (f", commit {commit}" if commit else "") + ":",
        "",
        "```yaml",
        *yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).splitlines(),
        "```",
    ]


def _limitations(chosen: Sequence[Measurement]) -> list[str]:
    tasks = ", ".join(dict.fromkeys(item.row.task for item in chosen))
    sentences = [
        f"Measured on {markdown_text(tasks)} only; what compression may have cost elsewhere, in other languages, in "
        "dialogue or in safety, has not been looked at.",
        "Trained on the model's own rollouts, so it keeps the errors and biases of the model it was made from.",
        "The intervals are about the choice of problems. Another training seed would give another checkpoint.",
    ]
    for item in chosen:
        row, where = item.row, markdown_text(", ".join(item.key))
        if row.truncated > 0:
            sentences.append(
                f"On {where}, {100 * row.truncated:.1f}% of the completions had not ended at their limit."
            )
        if row.unverified:
            sentences.append(f"On {where}, {row.unverified:,} problems could not be verified and are not counted.")
        disagree = (row.strict_only or 0) + (row.flexible_only or 0)
        if disagree:
            sentences.append(f"On {where}, the strict and the flexible scorer disagree on {disagree:,} completions.")
    return sentences
