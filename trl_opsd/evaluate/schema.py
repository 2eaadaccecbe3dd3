"""
What an evaluation leaves, defined once: [`CompletionRecord`], a line of the completions file, and [`ResultRow`], a row
of the results file. Reading, writing and checking them, what two rows must share to be compared, and the columns of
the tables all follow from the fields here.
"""

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..cli import UserError


@dataclass(frozen=True)
class Column:
    """
    How a number is shown in a table.

    Args:
        heading (`str`):
            Heading of the column.
        text (`Callable[[Any], str]`):
            Makes the text of a cell.
        place (`int`, *optional*, defaults to `1`):
            0 for what people look at first, 2 for what it took to measure, 1 for the rest.
        trivial (`int`, *optional*):
            Value that says nothing: a column that holds no other is left out.
        beside (`str`, *optional*):
            Heading of the column without which it says nothing either.
        length (`float`, *optional*):
            Where it is a quantile of lengths, which; 1 for their mean. A completion that was cut at the limit has no length,
            so that where such are among those that it rests on, the number is a lower bound and shown as one.
    """

    heading: str
    text: Callable[[Any], str]
    place: int = 1
    trivial: int | None = None
    beside: str | None = None
    length: float | None = None


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def tenth(value: float) -> str:
    return f"{value:,.1f}"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.1f}"


_MOST = 2**53  # what is larger is no count, and no number of seconds


def number(column: Column | None = None, most: float = _MOST, above_zero: bool = False, **default) -> Any:
    """
    Declares a field that holds a number of at least 0.

    Args:
        column ([`Column`], *optional*):
            How tables show it, if they do.
        most (`float`, *optional*, defaults to 2⁵³):
            What it cannot exceed.
        above_zero (`bool`, *optional*, defaults to `False`):
            Whether it cannot be 0 either.
        **default:
            For [`~dataclasses.field`]. A field without a default is one that every row must have.

    Returns:
        [`~dataclasses.Field`]: Field.
    """
    return field(metadata={"column": column, "most": most, "above_zero": above_zero}, **default)


def setting(kind: str) -> Any:
    """Declares a field that two rows must share to be compared; `kind` says in an error what differs otherwise."""
    return field(default=None, metadata={"setting": kind})


@dataclass(kw_only=True)
class Labels:
    """
    What was measured: what ties the completions to their row.

    Args:
        stage (`str`, *optional*):
            Name of the checkpoint.
        checkpoint (`str`, *optional*):
            Where it was.
        task (`str`):
            Name of the data set.
        decoding (`str`):
            `"greedy"` or `"sampled"`.
        prompt (`str`):
            `"plain"`, or the template that the prompts were put in.
    """

    stage: str | None
    checkpoint: str | None
    task: str
    decoding: str
    prompt: str

    @property
    def labels(self) -> tuple:
        return self.stage, self.checkpoint, self.task, self.decoding, self.prompt


@dataclass(kw_only=True)
class Verdict:
    """
    What the verifiers say of a completion.

    Args:
        completion (`str`):
            Its text.
        tokens (`int`):
            Its number of tokens, with the one that ends it.
        thinking_tokens (`int`):
            Those of them up to the tag that closes the thinking block; all of them if it never comes.
        truncated (`bool`):
            Whether it had not ended at the limit.
        correct (`bool`, *optional*):
            By the strict scorer; `None` where no verdict is possible.
        correct_flexible (`bool`, *optional*):
            By the flexible scorer; `None` where there is none, too.
        answer (`str`, *optional*):
            What it boxes last.
    """

    completion: str
    tokens: int = number(above_zero=True)
    thinking_tokens: int = number()
    truncated: bool
    correct: bool | None
    correct_flexible: bool | None
    answer: str | None


@dataclass(kw_only=True)
class CompletionRecord(Verdict, Labels):
    """
    A completion with its verdict: a line of the completions file.

    Args:
        id (`str` or `int`):
            Name of the problem.
        sample (`int`):
            Number of the completion among those of the problem.
        question (`str`):
            Text of the problem.
        seed (`int`, *optional*):
            Seed of its random numbers.
    """

    id: str | int = field(metadata={"must_be": "a number or a text"})
    sample: int = number()
    question: str
    seed: int | None = None


@dataclass(kw_only=True)
class Serving:
    """
    Latency and throughput while `concurrency` requests are under way.

    Args:
        concurrency (`int`):
            Number of requests under way at a time.
        requests (`int`, *optional*):
            Number of requests in all.
        tokens (`int`, *optional*):
            Number of their tokens.
        first_token_p50_s, first_token_p95_s (`float`, *optional*):
            Seconds from handing a request over to its first token, over requests.
        total_p50_s, total_p95_s (`float`):
            The same to its last; the second is optional.
        tokens_per_s, requests_per_s (`float`):
            From the first request to the last token; the second is optional.
        correct (`int`, *optional*):
            Number of the answers of this load that the verifiers find correct, where they were kept.
        correct_per_s (`float`, *optional*):
            The same in a second.
        meter (`str`, *optional*):
            What measured it, if not [`~trl_opsd.evaluate.serving.measure_serving`].
    """

    concurrency: int = number(above_zero=True)
    requests: int | None = number(default=None)
    tokens: int | None = number(default=None)
    first_token_p50_s: float | None = number(default=None)
    first_token_p95_s: float | None = number(default=None)
    total_p50_s: float = number()
    total_p95_s: float | None = number(default=None)
    tokens_per_s: float = number()
    requests_per_s: float | None = number(default=None)
    correct: int | None = number(default=None)
    correct_per_s: float | None = number(default=None)
    meter: str | None = None


@dataclass(kw_only=True)
class Summary:
    """
    What the verdicts of a row come to; see [`~trl_opsd.evaluate.estimate.summarize`]. A file of an older version, or
    of another tool, may lack what has a default.

    Args:
        n (`int`):
            Problems that count.
        samples (`int`, *optional*):
            Samples of each.
        unverified (`int`, *optional*):
            Problems without a verdict, which do not count.
        estimator (`str`, *optional*):
            What `accuracy` is: `mean@n`, a problem's share of correct samples, averaged over problems.
        accuracy, accuracy_low, accuracy_high (`float`):
            Strict accuracy and its 95% interval.
        accuracy_flexible (`float`, *optional*):
            Accuracy by the flexible scorer.
        strict_only, flexible_only (`int`, *optional*):
            Samples that only one of the scorers accepts.
        at_k (`dict[str, float]`, *optional*):
            `pass@k` and `maj@n` by name. In a file each has a key of its own. `maj@n` is missing where no answer was
            extracted, as of programs.
        at_k_bounds (`dict[str, list[float]]`, *optional*):
            95% interval of each `pass@k`, two bounds by name.
        mean_tokens, mean_tokens_low, mean_tokens_high (`float`):
            Mean completion tokens and its 95% interval. Of a truncated completion what it has up to the limit, so that
            these are tokens paid for, and as lengths lower bounds; see [`Summary.is_cut`].
        median_tokens, p90_tokens, p99_tokens (`float`):
            Percentiles over all samples, of the same.
        mean_thinking_tokens, mean_answer_tokens (`float`, *optional*):
            The parts of `mean_tokens` before and after `</think>`.
        truncated (`float`):
            Share of the samples that had not ended at the limit.
        markers_per_1000_tokens (`float`, *optional*):
            Words that announce another check, per 1,000 tokens.
    """

    n: int = number(Column("problems", whole), above_zero=True)
    samples: int | None = number(Column("samples each", whole, trivial=1), default=None)
    unverified: int | None = number(Column("not verifiable", whole, trivial=0), default=None)
    estimator: str | None = None
    accuracy: float = number(Column("accuracy (95% interval)", percent, place=0), most=1)
    accuracy_low: float = number(most=1)
    accuracy_high: float = number(most=1)
    accuracy_flexible: float | None = number(Column("flexible", percent), most=1, default=None)
    strict_only: int | None = number(Column("right by strict only", whole), default=None)
    flexible_only: int | None = number(Column("right by flexible only", whole), default=None)
    at_k: dict[str, float | None] = number(Column("", percent), most=1, default_factory=dict)
    at_k_bounds: dict = field(default_factory=dict)
    mean_tokens: float = number(Column("tokens, mean", tenth, place=0, length=1), above_zero=True)
    mean_tokens_low: float | None = number(default=None)
    mean_tokens_high: float | None = number(default=None)
    median_tokens: float | None = number(Column("tokens, median", whole, length=0.5), default=None)
    p90_tokens: float = number(Column("p90", whole, length=0.9))
    p99_tokens: float | None = number(Column("p99", whole, length=0.99), default=None)
    mean_thinking_tokens: float | None = number(Column("thinking tokens", tenth, trivial=0, length=1), default=None)
    mean_answer_tokens: float | None = number(
        Column("answer tokens", tenth, beside="thinking tokens", length=1), default=None
    )
    truncated: float = number(Column("truncated", percent, place=0), most=1)
    markers_per_1000_tokens: float | None = number(Column("markers per 1,000 tokens", tenth), default=None)

    def is_cut(self, quantile: float) -> bool:
        """
        Says whether a number of lengths rests on completions that were cut at the limit.

        Args:
            quantile (`float`):
                Which quantile; 1 for the mean.

        Returns:
            `bool`: Whether the number is a lower bound. (The longest are those that were cut: all have the same limit.)
        """
        total = self.n * (self.samples or 1)
        return math.ceil((total - 1) * quantile) >= total - round(self.truncated * total)


@dataclass(kw_only=True)
class ResultRow(Summary, Labels):
    """
    One checkpoint on one task in one way of decoding: a row of the results file.

    Args:
        backend (`str`, *optional*, defaults to `"transformers"`):
            What generated.
        parameters (`int`):
            Parameters of the checkpoint.
        non_embedding_parameters (`int`, *optional*):
            Those that are neither the table of input embeddings nor the output layer.
        active_parameters (`int`, *optional*):
            Those of them that a token passes: fewer in a mixture of experts.
        weight_bits (`float`, *optional*):
            Bits of a parameter as it was served; `None` of a server that does not say.
        bytes_per_correct, bytes_per_correct_low, bytes_per_correct_high (`float`, *optional*):
            Bytes of weights that are moved for a correct answer of a request by itself, and their 95% interval; see
            [`~trl_opsd.evaluate.estimate.bytes_per_correct`].
        peak_memory_bytes (`int`, *optional*):
            While this row was generated, of all processes that held the model (see
            [`~trl_opsd.evaluate.memory.peak_memory`]); `None` if not all of it was in this run, and of a server. Where
            several processes have a model each, the largest of theirs.
        weights_bytes (`int`, *optional*):
            Size of its weight files.
        generation_s (`float`, *optional*):
            Seconds of generating; `None` if not all of it was in this run. What it cost, on a machine that may have
            had other things to do: speed is what `serving` has.
        wall_s (`float`):
            Seconds of this run.
        serving (`list[Serving]`, *optional*):
            One for each level of concurrency that was measured.
        cached (`int`, *optional*):
            Completions that an earlier run had generated.
        cache_lines_skipped (`int`, *optional*):
            Damaged lines of the cache.
        too_long (`int`, *optional*):
            Problems left out because the prompt alone fills the model's positions.
        checkpoint_hash (`str`, *optional*):
            Which checkpoint exactly; `None` of a model that was given loaded.
        seed (`int`, *optional*):
            Seed.
        task_version, temperature, top_p, top_k, min_p, stop, max_completion_length, thinking_budget, reward_funcs (*optional*):
            What two rows must share to be compared. A row without them was measured as its run's configuration says.
    """

    backend: str = "transformers"
    parameters: int = number(Column("parameters", whole, place=0), above_zero=True)
    non_embedding_parameters: int | None = number(default=None)
    active_parameters: int | None = number(default=None)
    weight_bits: float | None = number(Column("bits", lambda bits: f"{bits:.3g}", place=2), default=None)
    bytes_per_correct: float | None = number(
        Column("bytes moved per correct answer", "{:.3g}".format), most=1e30, default=None
    )
    bytes_per_correct_low: float | None = number(most=1e30, default=None)
    bytes_per_correct_high: float | None = number(most=1e30, default=None)
    peak_memory_bytes: int | None = number(Column("peak memory, MiB", mebibytes, place=2), default=None)
    weights_bytes: int | None = number(Column("weights, MiB", mebibytes, place=2), default=None)
    generation_s: float | None = number(default=None)
    wall_s: float = number(Column("seconds in all", whole, place=2))
    serving: list[Serving] = field(default_factory=list)
    cached: int | None = number(default=None)
    cache_lines_skipped: int | None = number(default=None)
    too_long: int | None = number(Column("prompt too long", whole, trivial=0), default=None)
    checkpoint_hash: str | None = None
    seed: int | None = None
    task_version: str | int | None = setting("task version")
    temperature: float | None = setting("decoding")
    top_p: float | None = setting("decoding")
    top_k: int | None = setting("decoding")
    min_p: float | None = setting("decoding")
    stop: list | None = setting("decoding")
    max_completion_length: int | None = setting("decoding")
    thinking_budget: int | None = setting("decoding")
    reward_funcs: list | None = setting("scoring")

    @property
    def line(self) -> str | None:
        """What joins it with other checkpoints in a chart; `None` where it stands for itself."""
        return None


def to_json(record: Any) -> dict[str, Any]:
    """
    Returns a record, or a row, as it stands in its file.

    Args:
        record ([`CompletionRecord`], [`Summary`], [`ResultRow`] or [`Serving`]):
            What to write.

    Returns:
        `dict`: Names and values; `at_k` spread out.
    """
    values = {}
    for name, value in vars(record).items():
        if name == "at_k":
            values |= value
        else:
            values[name] = [to_json(level) for level in value] if name == "serving" else value
    return values


def from_json(cls: type, values: Any, where: str) -> Any:
    """
    Reads what [`to_json`] returns, and checks it.

    Args:
        cls (`type`):
            [`CompletionRecord`], [`ResultRow`] or [`Serving`], or a class that adds fields to one of them.
        values (`dict`):
            Names and values. Those that the class does not know are passed over.
        where (`str`):
            File and line, for an error.

    Returns:
        An instance of `cls`.

    Raises:
        UserError: If something is missing, of the wrong type or out of range, naming it.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a mapping of names to values, but {values!r:.80}.")
    types, found = typing.get_type_hints(cls), {}
    for declared in dataclasses.fields(cls):
        name = declared.name
        if name == "at_k":
            found[name] = {key: value for key, value in values.items() if "@" in key}
            for key, value in found[name].items():
                _check(key, value, float | None, declared.metadata, where)
        elif name == "at_k_bounds":
            found[name] = values.get(name, {})
            _check(name, found[name], dict, {}, where)
            for key, bounds in found[name].items():
                _check(f"{name}` of `{key}", bounds, list, {}, where)
                for bound in bounds:
                    _check(f"{name}` of `{key}", bound, float, number(most=1).metadata, where)
                if len(bounds) != 2:
                    raise UserError(f"{where}: `{name}` of `{key}` must be two bounds, and is {bounds!r:.80}.")
        elif name not in values:
            if declared.default is declared.default_factory is dataclasses.MISSING:
                raise UserError(f"{where}: `{name}` is missing.")
        elif name == "serving":
            _check(name, values[name], list, {}, where)
            found[name] = [from_json(Serving, level, f"{where}, `serving`") for level in values[name]]
        else:
            _check(name, values[name], types[name], declared.metadata, where)
            found[name] = values[name]
    return cls(**found)


def _check(name: str, value: Any, kind: Any, limits: typing.Mapping[str, Any], where: str) -> None:
    accepted = typing.get_args(kind) or (kind,)
    fits = isinstance(value, accepted) or (float in accepted and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in accepted):
        if "must_be" in limits:
            raise UserError(f"{where}: `{name}` must be {limits['must_be']}, and is {value!r:.80}.")
        raise UserError(f"{where}: `{name}` has a value of the wrong type, {value!r:.80}.")
    if "most" in limits and value is not None:
        if not 0 <= value <= limits["most"] or (value == 0 and limits["above_zero"]):
            raise UserError(f"{where}: `{name}` cannot be {value!r:.80}.")
