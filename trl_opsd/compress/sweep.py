"""What a size sweep came to: its rows, by ratio and method, and what the methods had in common."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluate.charts import Axis
from ..evaluate.results_file import Measurement, load_results
from ..evaluate.schema import Column, ResultRow, number, percent, whole
from ..evaluate.table import Derived
from .chain import Stage
from .config import METHODS, CompressConfig, rollouts_per_update
from .stages import EVALUATION, label


#: The methods in which the student writes the rollouts.
WRITES = ("rlvr", "opsd", "opsd-concise")


FLOPS = Axis("answer_flops", "FLOPs per answer (2 × parameters × tokens)", "flops")

# Median seconds of an answer at the lowest concurrency measured, and tokens per second at the highest
SPEED: list[Derived] = [
    (
        Column("an answer alone, ms", whole, place=2),
        lambda row: 1e3 * row.serving[0].total_p50_s if row.serving else None,
    ),
    (
        Column("tokens/s in a batch", whole, place=2),
        lambda row: row.serving[-1].tokens_per_s if row.serving else None,
    ),
]


@dataclass(kw_only=True)
class SweepRow(ResultRow):
    """
    A row of the evaluation, and what the sweep knows of its checkpoint.

    Args:
        non_embedding_parameters (`int`):
            Parameters of what is pruned, mostly: shown here.
        ratio (`float`):
            Share of the parameters that was to be removed.
        method (`str`):
            How it was trained; `"teacher"`, `"pruned"` and `"cold"` (after the cold start) are there to compare with.
        kept (`float`):
            Accuracy as a share of the teacher's.
        answer_flops (`float`):
            Two for each parameter and token of a mean answer; of experts, for those that the token is sent to.
        updates (`int`):
            Optimizer steps since pruning.
        rollouts (`int`):
            Completions that the method's own updates were given.
        generated_tokens (`int`):
            Tokens of those of them that the student wrote.
    """

    non_embedding_parameters: int = number(Column("without embeddings", whole, place=0))
    ratio: float = number(Column("removed", lambda share: f"{100 * share:g}%", place=0), most=1)
    method: str = field(metadata={"column": Column("method", str, place=0)})
    kept: float = number(Column("of the teacher's", percent, place=0))
    answer_flops: float = number(Column("MFLOPs per answer", lambda flops: f"{flops / 1e6:.1f}"))
    updates: int = number(Column("updates", whole))
    rollouts: int = number()
    generated_tokens: int = number(Column("generated in training, k tokens", lambda tokens: f"{tokens / 1e3:.0f}"))

    @property
    def line(self) -> str:
        return self.method


def sweep_measurements(config: CompressConfig, stages: list[Stage]) -> list[Measurement]:
    """
    Returns what a sweep came to.

    Args:
        config ([`CompressConfig`]):
            Configuration with `ratios`.
        stages (`list[Stage]`):
            Its chain, all of which has run.

    Returns:
        `list[Measurement]`: Those of the evaluation, the teacher's first, each with a [`SweepRow`].
    """
    measured: dict[str, list[Measurement]] = {}
    for stage in stages:
        if stage.module == EVALUATION:
            for item in load_results(stage.output):
                measured.setdefault(item.row.stage, []).append(item)
    models = [(config.compressed_from, "teacher", 0.0)]
    models += [
        (label(method, ratio), method, ratio)
        for ratio in config.ratios
        for method in ("pruned", "cold", *config.methods)
    ]
    accuracy = {item.row.decoding: item.row.accuracy for item in measured[models[0][0]]}
    found = []
    for name, method, ratio in models:
        trained = method in METHODS
        rollouts = config.updates * rollouts_per_update(config.student_sft) if trained else 0
        log = Path(config.output_dir) / name / ("rlvr.json" if method == "rlvr" else "opsd.json")
        generated = _generated_tokens(log, rollouts) if method in WRITES else 0
        for item in measured[name]:
            row = SweepRow(
                **vars(item.row),
                method=method,
                ratio=ratio,
                updates=(config.cold_start_steps if trained or method == "cold" else 0) + config.updates * trained,
                rollouts=rollouts,
                generated_tokens=generated,
                kept=item.row.accuracy / accuracy[item.row.decoding],
                answer_flops=2 * _passed(item.row) * item.row.mean_tokens,
            )
            found.append(dataclasses.replace(item, row=row))
    return found


def _passed(row: ResultRow) -> int:
    idle = 0 if row.active_parameters is None else row.non_embedding_parameters - row.active_parameters
    return row.parameters - idle


def conditions(config: CompressConfig) -> str:
    """Says what the methods of a sweep had in common."""
    size = rollouts_per_update(config.student_sft)
    return (
        f"Every method starts from the same pruned model after {config.cold_start_steps} updates of supervised "
        f"fine-tuning on the teacher's verified rollouts (`cold`), and makes {config.updates} more, of {size} rollouts "
        f"each: {config.updates * size:,} rollouts that the student writes (`rlvr`, `opsd`, `opsd-concise`) or the "
        "teacher wrote (`sft`, `offline`)."
    )


def _generated_tokens(log: Path, rollouts: int) -> int:
    """Tokens that the student of a run wrote, from the mean lengths in its log."""
    logs = json.loads(log.read_text())["rows"]
    total, last = 0.0, 0
    for log in logs:
        if "completions/mean_length" in log:
            total, last = total + log["completions/mean_length"] * (log["step"] - last), log["step"]
    return round(total * rollouts / last)
