"""The model card of a checkpoint, from what was measured: metrics as structured results, the recipe, limitations."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..cli import UserError
from ..data.sources import SOURCES
from .checkpoint import open_checkpoint
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

#: What of a stage's configuration, some 160 values, makes its result
RECIPE = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "reward_funcs",
    "teacher_weights",
    "teacher_context",
    "teacher_prompt_template",
    "teacher_gate",
    "teacher_gate_rollouts",
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
#: Stages that leave a checkpoint, the last one first
STAGES = ("opsd", "prune", "rlvr", "sft")
# The last line of a card that this module has written, with a hash of what is above it
_OURS = re.compile(r"\n<!-- Written by trl_opsd\.evaluate from measured results; sha256 of the above: (\w+) -->\n\Z")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    results_files: Sequence[str | Path],
    folder: str | Path,
    stage: str | None = None,
    before: str | None = None,
    margins: Mapping[str | None, float] | None = None,
    licence: str | None = None,
    weights: str | None = None,
) -> Path:
    """
    Writes `README.md`, a model card that the Hub reads, into the folder of a checkpoint.

    It speaks of the weights in that folder only, which the results know by their hash, and replaces no README but its own,
    if nobody has changed it since. The card that TRL's trainers leave is kept as README.trl.md.

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
        licence (`str`, *optional*):
            Licence of the checkpoint, as the Hub calls it. Defaults to that of the model it was made from, where the card
            of one of its folders says it.
        weights (`str`, *optional*):
            Hash of what is in the folder, where that is no checkpoint of transformers'. By default it is read.

    Returns:
        `Path`: The card.

    Raises:
        UserError: If a file is missing or damaged, the results do not hold the stage or are of other weights, or there is
            a README that a person wrote.
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
    _check_weights(folder, chosen, weights)
    path = folder / "README.md"
    replaced = _replaced(path)
    origin = find_origin(folder)
    keys, name = {item.key for item in chosen}, folder.resolve().name
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        license=licence or origin.licence,
        base_model=origin.base_model,
        datasets=list(
            dict.fromkeys(name for names in origin.datasets.values() for name in names if _HUB_ID.fullmatch(name))
        )
        or None,
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
    lines += ["## Origin", "", *[f"- {sentence}" for sentence in origin.sentences(licence)], ""]
    lines += ["## Recipe", "", *_recipe(folder), ""]
    lines += ["## Limitations", "", *[f"- {sentence}" for sentence in _limitations(chosen)], ""]
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))
    text = text.encode("utf-8", "replace").decode()
    if replaced is not None:
        path.replace(replaced)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_page(
        path, f"{text}\n<!-- Written by trl_opsd.evaluate from measured results; sha256 of the above: {digest} -->\n"
    )
    return path


def _check_weights(folder: Path, chosen: Sequence[Measurement], weights: str | None) -> None:
    """Only of the weights in a folder its card may speak."""
    found = weights or open_checkpoint(str(folder)).hash
    for item in chosen:
        if item.row.checkpoint_hash is None:
            raise UserError(
                f"`{item.file}` does not say which weights `{item.label}` are: evaluate `{folder}` from its folder."
            )
        if item.row.checkpoint_hash != found:
            raise UserError(
                f"`{item.file}` has measured other weights as `{item.label}` than those in `{folder}`: evaluate that folder, "
                "or name its stage with `--stage`."
            )


def _replaced(path: Path) -> Path | None:
    """Checks that no README of a person's would be overwritten, and says where one of TRL's is kept."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    ours = _OURS.search(text)
    if ours is not None and hashlib.sha256(text[: ours.start()].encode()).hexdigest() == ours[1]:
        return None
    kept = path.with_name("README.trl.md")
    if ours is None and "generated_from_trainer" in _metadata(path).get("tags", []) and not kept.exists():
        return kept
    raise UserError(
        f"`{path}` was written, or changed, by a person, and is not overwritten: give it another name, and take from it what "
        "the card does not say."
    )


@dataclass
class Origin:
    """
    What a checkpoint was made from, as far back as its folders say.

    Args:
        base_model (`str`, *optional*):
            Model on the Hub that the first of its folders was made from.
        licence (`str`, *optional*):
            Licence that the card of one of the folders states.
        datasets (`dict[str, list[str]]`):
            Data that each stage was trained on, last stage first: ids on the Hub, or what the recipe calls them.
    """

    base_model: str | None = None
    licence: str | None = None
    datasets: dict[str, list[str]] = field(default_factory=dict)

    def sentences(self, licence: str | None) -> list[str]:
        """What the card says of it."""
        licence = licence or self.licence
        base = f"`{self.base_model}`" if self.base_model else "no model on the Hub that the records name"
        data = [f"{stage} on {', '.join(f'`{name}`' for name in names)}" for stage, names in self.datasets.items()]
        return [
            f"Made from: {base}.",
            f"Trained: {'; '.join(data) if data else 'on data that no record names'}.",
            f"Licence: {licence}."
            if licence
            else "Licence: not recorded. That of the model it was made from, and those of the data, apply.",
        ]


def find_origin(folder: Path) -> Origin:
    """Follows the records of stages back from the folder of a checkpoint."""
    origin, seen = Origin(), set()
    while folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        card = _metadata(folder / "README.md")
        origin.licence = origin.licence or _text(card.get("license"))
        stage = next((name for name in STAGES if (folder / f"{name}.json").is_file()), None)
        config = {} if stage is None else read_record(folder / f"{stage}.json")["run"]["config"]
        name = _text(config.get("dataset_name"))
        if name:
            source = SOURCES.get(name.partition(":")[0])
            origin.datasets.setdefault(stage, []).append(source.hub_id if source else name)
        start = _text(config.get("model_name_or_path")) or _text(card.get("base_model"))
        if start is None:
            break
        if not Path(start).is_dir():
            origin.base_model = start if _HUB_ID.fullmatch(start) else None
            break
        folder = Path(start)
    return origin


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _metadata(path: Path) -> dict:
    """The head of a model card; empty where there is none that can be read."""
    if not path.is_file():
        return {}
    head = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def read_record(file: Path) -> dict:
    """What a stage has recorded."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        _ = results["run"]["config"].get, results["run"]["commit"], results["environment"]["versions"].get
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"`{file}` is damaged: it is no record of a stage.") from None
    return results


def _results(item: Measurement) -> list[EvalResult]:
    row = item.row
    values, estimator = to_json(row), row.estimator or "mean@1"

    def cut(quantile: float) -> str:
        return ", at least (some were cut at the limit)" if row.is_cut(quantile) else ""

    names = {
        "accuracy": f"{estimator}, strict, {row.decoding}",
        "accuracy_flexible": f"{estimator}, flexible, {row.decoding}",
        "mean_tokens": f"completion tokens, mean, {row.decoding}{cut(1)}",
        "p90_tokens": f"completion tokens, 90th percentile, {row.decoding}{cut(0.9)}",
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
    file = next((folder / f"{stage}.json" for stage in STAGES if (folder / f"{stage}.json").is_file()), None)
    if file is None:
        return ["The checkpoint has no record of the stage that made it."]
    results = read_record(file)
    config, commit, versions = results["run"]["config"], results["run"]["commit"], results["environment"]["versions"]
    recipe = {name: config[name] for name in RECIPE if config.get(name) is not None}
    names = ", ".join(f"{name} {versions.get(name)}" for name in ("trl-opsd", "trl", "transformers", "torch"))
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
