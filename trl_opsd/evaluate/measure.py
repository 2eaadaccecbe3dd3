"""Generates, verifies and counts: one row of results per checkpoint, task and way of decoding."""

import hashlib
import inspect
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..cli import UserError
from ..data import check_columns, load_prompts
from ..data.contamination import problem_text
from ..results import write_text
from ..rewards import (
    code_reward,
    extract_answer,
    load_reward_funcs,
    logic_reward,
    math_reward,
    required_columns,
)
from .cache import GenerationCache, cache_key
from .checkpoint import (
    base_of,
    check_evaluated,
    checkpoint_hash,
    count_checkpoint,
    count_parameters,
    load_generation_config,
    weights_bytes,
)
from .config import EvaluateConfig
from .engines import (
    Engine,
    Request,
    Sampling,
    ServerEngine,
    TransformersEngine,
    VllmEngine,
    eos_token_ids,
    load_model,
)
from .estimators import Samples, summarize
from .meter import measure_serving, peak_memory, reset_peak_memory


@dataclass
class Job:
    """
    One checkpoint on one task, checked and ready to be measured.

    Args:
        config ([`EvaluateConfig`]):
            With all values filled in.
        dataset ([`~datasets.Dataset`]):
            Problems.
        reward_funcs (`list[Callable]`):
            Verifiers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the checkpoint.
        positions (`int`):
            Positions that the model has.

    Attributes:
        prompt_ids (`list[list[int]]`):
            Token ids of the prompts, in the context of `config.prompt_template`.

    Raises:
        UserError: If a prompt with its completion has more tokens than the model has positions.
    """

    config: EvaluateConfig
    dataset: Dataset
    reward_funcs: list[Callable]
    tokenizer: PreTrainedTokenizerBase
    positions: int

    def __post_init__(self):
        config, context = self.config, self.config.context()
        prompts = self.dataset["prompt"] if context is None else [context.prompt(row) for row in self.dataset]
        self.prompt_ids = tokenize(prompts, self.tokenizer, config.chat_template_kwargs)
        row = max(range(len(prompts)), key=lambda index: len(self.prompt_ids[index]))
        longest = len(self.prompt_ids[row])
        if longest + config.max_completion_length > self.positions:
            raise UserError(
                f"The prompt of row {row + 1} of `{config.dataset_name}` has {longest} tokens, and with "
                f"`max_completion_length` {config.max_completion_length} that is more than the {self.positions} "
                "positions of the model: lower it, or remove the row."
            )


def evaluate(
    config: EvaluateConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Measures checkpoints on tasks: accuracy, tokens, memory and, where asked for, latency and throughput.

    Args:
        config ([`EvaluateConfig`]):
            What to measure and how.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model to measure as it is, on its own device. Defaults to the checkpoints of the configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. Defaults to the checkpoint's.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total. Defaults to a progress bar with the time left.

    Returns:
        `list[dict]`: One row per checkpoint, context, task and way of decoding; see [`measure`].

    Raises:
        ValueError: If the checkpoints, the data, the verifiers or the tokenizers do not fit, before a model is loaded.
    """
    if model is None:
        return run(prepare(config), progress)
    dataset, reward_funcs = load_task(config)
    tokenizer = load_tokenizer(config, dataset) if tokenizer is None else tokenizer
    return measure(config, dataset, reward_funcs, model, tokenizer, progress)


def prepare(config: EvaluateConfig) -> list[Job]:
    """
    Checks all that can be checked before a model is loaded.

    Args:
        config ([`EvaluateConfig`]):
            What to measure.

    Returns:
        `list[Job]`: What there is to do, those of one checkpoint after each other.

    Raises:
        ValueError: If something is missing or does not fit.
    """
    jobs, positions = [], {}
    for part in config.runs():
        path = part.model_name_or_path
        if path not in positions:
            check_evaluated(path, part.trust_remote_code)
            architecture = AutoConfig.from_pretrained(base_of(path), trust_remote_code=part.trust_remote_code)
            positions[path] = architecture.get_text_config().max_position_embeddings
        dataset, reward_funcs = load_task(part)
        jobs.append(Job(part, dataset, reward_funcs, load_tokenizer(part, dataset), positions[path]))
    return jobs


def run(jobs: list[Job], progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """
    Measures what [`prepare`] returns. A checkpoint is loaded when its first completion is missing from the cache.

    Args:
        jobs (`list[Job]`):
            What there is to do.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total. Defaults to a progress bar with the time left.

    Returns:
        `list[dict]`: Rows of results.
    """
    rows, records = [], []
    completions = sum(_completions(job.config, len(job.dataset)) for job in jobs)
    tick = _Ticker(completions, progress)
    subject = None
    with tick.bar:
        for job in jobs:
            path = job.config.model_name_or_path
            if subject is None or path != subject.path:
                if subject is not None:
                    subject.close()  # before the next one is loaded
                subject = _Subject(
                    path,
                    lambda job=job: load_engine(job.config, job.tokenizer),
                    eos_token_ids(load_generation_config(path, job.config.trust_remote_code), job.tokenizer),
                    {"weights_bytes": weights_bytes(path), **count_checkpoint(path, job.config.trust_remote_code)},
                    checkpoint_hash(path),
                )
            new_rows, new_records = _measure(job, subject, tick)
            rows += new_rows
            records += new_records
    subject.close()
    _save(jobs[0].config, records)
    return rows


def measure(
    config: EvaluateConfig,
    dataset: Dataset,
    reward_funcs: list[Callable],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Measures a loaded model on loaded problems. Its generations are not kept: nothing says whose they are.

    Args:
        config ([`EvaluateConfig`]):
            How to decode, and the labels; one task.
        dataset ([`~datasets.Dataset`]):
            Problems, from [`load_task`].
        reward_funcs (`list[Callable]`):
            Verifiers, from [`load_task`].
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total.

    Returns:
        `list[dict]`: One row per way of decoding. Labels: `stage`, `checkpoint`, `task`, `decoding`, `prompt`,
        `backend`. Numbers: those of [`~trl_opsd.evaluate.estimators.summarize`]; `parameters`,
        `non_embedding_parameters`, `weights_bytes`; `peak_memory_bytes` (see
        [`~trl_opsd.evaluate.meter.peak_memory`]) while the checkpoint was loaded and generated, `None` if it did not in
        this run; `serving` (see [`~trl_opsd.evaluate.meter.measure_serving`]), one for each level of concurrency;
        `generation_s` (seconds of generating, those of an earlier run included where `cached` completions are from
        it), `wall_s` (seconds of this run), `cache_lines_skipped` (damaged ones). And what the numbers depend on:
        `checkpoint_hash`, `task_version`, `seed`, `temperature`, `top_p`, `top_k`, `max_completion_length`,
        `reward_funcs`.
    """
    (part,) = config.runs()
    tick = _Ticker(_completions(part, len(dataset)), progress)
    subject = _Subject(
        part.model_name_or_path,
        lambda: TransformersEngine(model, tokenizer.pad_token_id, part.batch_size),
        eos_token_ids(model.generation_config, tokenizer),
        {"weights_bytes": None, **count_parameters(model)},
    )
    job = Job(part, dataset, reward_funcs, tokenizer, model.config.get_text_config().max_position_embeddings)
    with tick.bar:
        rows, records = _measure(job, subject, tick)
    _save(part, records)
    return rows


def load_task(config: EvaluateConfig) -> tuple[Dataset, list[Callable]]:
    """
    Loads the problems and their verifiers, and checks that they fit each other.

    Args:
        config ([`EvaluateConfig`]):
            What to measure, one task.

    Returns:
        `tuple`: Problems and reward functions.

    Raises:
        ValueError: If a file, a column or a reward function is missing.
    """
    reward_funcs = load_reward_funcs(config.reward_funcs)
    dataset = load_prompts(config.dataset_name, config.dataset_split)
    for name, func in zip(config.reward_funcs, reward_funcs, strict=True):
        check_columns(dataset, required_columns(func), f"The verifier `{name}`")
    if config.max_samples is not None:
        dataset = dataset.select(_first(dataset, config.max_samples))
    context = config.context()
    if context is not None:
        context.check_columns(dataset.column_names)
    return dataset, reward_funcs


def _first(dataset: Dataset, number: int) -> list[int]:
    """The first rows, equally many of each task where the set is made of several (`Source.tasks`)."""
    parts = dataset["task"] if "task" in dataset.column_names else [None] * len(dataset)
    seen, ranks = Counter(), []
    for index, part in enumerate(parts):
        ranks.append((seen[part], index))
        seen[part] += 1
    return sorted(index for _, index in sorted(ranks)[:number])


def load_tokenizer(config: EvaluateConfig, dataset: Dataset) -> PreTrainedTokenizerBase:
    """
    Loads the tokenizer of the checkpoint and checks that it can write the prompts.

    Args:
        config ([`EvaluateConfig`]):
            Where the checkpoint is.
        dataset ([`~datasets.Dataset`]):
            Problems.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: Tokenizer.

    Raises:
        UserError: If there is none, or it has no chat template and the prompts need one.
    """
    path = config.model_name_or_path
    if path and Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of(path)  # an adapter need not have one of its own
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"`{path}` has no tokenizer that can be loaded ({reason}).") from None
    if not isinstance(dataset[0]["prompt"], str) and tokenizer.chat_template is None:
        raise UserError(
            f"The prompts are conversations, and the tokenizer of `{path}` has no chat template: add one to the "
            "checkpoint, or use prompts that are plain strings."
        )
    return tokenizer


def load_engine(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """
    Loads the checkpoint in its backend.

    Args:
        config ([`EvaluateConfig`]):
            Which checkpoint, which backend.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        [`~trl_opsd.evaluate.engines.Engine`]: What generates.
    """
    if config.backend == "server":
        return ServerEngine(config.server_url, config.server_model, config.batch_size)
    if config.backend == "vllm":
        return VllmEngine(config)
    return TransformersEngine(load_model(config), tokenizer.pad_token_id, config.batch_size)


def tokenize(
    prompts: list, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Returns the token ids of prompts, up to where the completion starts: the same ids that TRL's trainers roll out from.

    Args:
        prompts (`list[list[dict]]` or `list[str]`):
            Prompts, conversational or plain.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the chat template.

    Returns:
        `list[list[int]]`: Token ids, not padded.
    """
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def verify(
    dataset: Dataset,
    reward_funcs: list[Callable],
    completion_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: list[int],
    opened: list[bool] | None = None,
) -> list[dict[str, Any]]:
    """
    Decides for each completion whether it is correct.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems, one for each completion.
        reward_funcs (`list[Callable]`):
            Verifiers; each must score a completion at least 1.0. One with a parameter `flexible` is asked twice.
        completion_ids (`list[list[int]]`):
            Token ids of the completions, in the order of the problems.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        eos_ids (`list[int]`):
            Tokens that end a completion.
        opened (`list[bool]`, *optional*):
            Whether the prompt ends in an open thinking block, which the completion then closes.

    Returns:
        `list[dict]`: Per completion its text (`completion`), `tokens` and `thinking_tokens` of them (up to `</think>`;
        all of them if it never comes), `truncated`, `correct` and `correct_flexible`, the last two `None` where no
        verdict is possible, and `answer` (what it boxes last, or `None`).
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    columns = {
        name: list(dataset[name]) for name in dataset.column_names if name not in ("completion", "completion_ids")
    }
    prompts = columns.pop("prompt")
    completions = texts
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]

    def scores(**flexible) -> list[tuple]:
        each = [
            func(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids,
                **columns,
                **(flexible if "flexible" in inspect.signature(func).parameters else {}),
            )
            for func in reward_funcs
        ]
        return list(zip(*each, strict=True))

    strict = scores()
    any_flexible = any("flexible" in inspect.signature(func).parameters for func in reward_funcs)
    flexible = scores(flexible=True) if any_flexible else [(None,)] * len(texts)

    def verdict(values: tuple, truncated: bool) -> bool | None:
        return None if None in values else not truncated and all(value >= 1 for value in values)

    samples = []
    for index, (text, ids) in enumerate(zip(texts, completion_ids, strict=True)):
        truncated = ids[-1] not in eos_ids
        samples.append(
            {
                "completion": text,
                "tokens": len(ids),
                "thinking_tokens": _thinking_tokens(text, ids, tokenizer, opened is not None and opened[index]),
                "truncated": truncated,
                "correct": verdict(strict[index], truncated),
                "correct_flexible": verdict(flexible[index], truncated),
                "answer": None if code_reward in reward_funcs else extract_answer(text),
            }
        )
    return samples


def same_answer(reward_funcs: list[Callable]) -> Callable[[str, str, str], bool] | None:
    r"""
    Returns what says whether two answers are one: if the verifier of math or logic takes either where the other is the
    reference answer.

    Args:
        reward_funcs (`list[Callable]`):
            Verifiers.

    Returns:
        `Callable[[str, str, str], bool]` or `None`: Function of a question and two answers; `None` where no verifier
        compares answers.
    """
    func = next((func for func in reward_funcs if func in (math_reward, logic_reward)), None)

    def takes(question: str, answer: str, reference: str) -> bool:
        return func(prompts=[question], completions=[f"\\boxed{{{answer}}}"], answer=[reference]) == [1.0]

    def same(question: str, one: str, other: str) -> bool:
        # An answer that the verifier cannot even read costs seconds, and is like no other
        if not takes(question, one, one) or not takes(question, other, other):
            return False
        return takes(question, one, other) or takes(question, other, one)

    return func and same


def _thinking_tokens(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, opened: bool) -> int:
    before, closed, _ = text.rpartition("</think>")
    if not closed:
        return len(ids) if opened or "<think>" in text else 0
    # the fewest tokens whose text has the closing tag, by halving: more tokens never have less text
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(ids[:middle], skip_special_tokens=True)) >= len(before + closed):
            high = middle
        else:
            low = middle + 1
    return low


class _Subject:
    """A checkpoint, loaded when something has to be generated."""

    def __init__(
        self,
        path: str | None,
        load: Callable[[], Engine],
        eos_ids: list[int],
        facts: dict[str, int | None],
        identity: str | None = None,
    ):
        self.path, self.load, self.eos_ids = path, load, eos_ids
        self.facts, self.identity, self.loaded = facts, identity, None

    def engine(self) -> Engine:
        if self.loaded is None:
            reset_peak_memory()
            self.loaded = self.load()
        return self.loaded

    def close(self) -> None:
        if self.loaded is not None:
            self.loaded.close()
            self.loaded = None


def _measure(job: Job, subject: _Subject, tick: "_Ticker") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    config, dataset, tokenizer, eos_ids = job.config, job.dataset, job.tokenizer, subject.eos_ids
    opened = [tokenizer.decode(ids[-8:]).rstrip().endswith("<think>") for ids in job.prompt_ids]
    names = problem_ids(dataset)
    questions = [problem_text(prompt) for prompt in dataset["prompt"]]
    cache = GenerationCache(_cache_file(config, subject.identity))
    # Everything that decides a completion
    origin = {"checkpoint": subject.identity, "task": config.task, "version": config.task_version}
    origin |= {"backend": config.backend, "dtype": config.dtype}
    rows, records = [], []
    for decoding in config.decoding:
        start = time.perf_counter()
        sampling = Sampling.of(config, decoding, eos_ids)
        width = config.num_samples if decoding == "sampled" else 1
        requests, keys = [], []
        for name, ids in zip(names, job.prompt_ids, strict=True):
            for sample in range(width):
                seed = int(hashlib.sha256(f"{config.seed} {name} {sample}".encode()).hexdigest()[:8], 16)
                drawn = {"seed": config.seed, "sample": sample} if decoding == "sampled" else {}
                keys.append(cache_key(**origin, prompt_ids=ids, sampling=vars(sampling), **drawn))
                requests.append(Request(ids, seed))
        found = {index: entry for index, key in enumerate(keys) if (entry := cache.get(key)) is not None}
        if config.rescore and len(found) < len(keys):
            raise UserError(
                f"`rescore`: {len(keys) - len(found)} of {len(keys)} completions of `{config.task}` ({decoding}) are "
                f"not in `{config.cache_dir}`: run without `rescore`, with the same configuration."
            )
        cached = len(found)
        tick(cached)
        if cached < len(requests):
            for index, ids, seconds in _timed(subject.engine().generate(requests, sampling, set(found))):
                cache.add(keys[index], ids, seconds)
                found[index] = (ids, seconds)
                tick(1)
        places = [place for place in range(len(names)) for _ in range(width)]
        samples = verify(
            dataset.select(places),
            job.reward_funcs,
            [found[index][0] for index in range(len(requests))],
            tokenizer,
            eos_ids,
            [opened[place] for place in places],
        )
        labels = {
            "stage": config.stage,
            "checkpoint": config.model_name_or_path,
            "task": config.task,
            "decoding": decoding,
            "prompt": config.prompt_template or "plain",
        }
        named = [
            {
                **labels,
                "id": names[place],
                "sample": index % width,
                "question": questions[place],
                **sample,
                "seed": requests[index].seed,
            }
            for index, (place, sample) in enumerate(zip(places, samples, strict=True))
        ]
        try:
            summary = summarize(Samples.from_records(named), same_answer(job.reward_funcs))
        except ValueError as error:
            raise UserError(f"`{config.task}`: {error}") from None
        serving = []
        if config.concurrency and decoding == config.decoding[0] and not config.rescore:
            first = [requests[width * place] for place in range(min(len(names), config.serving_requests))]
            serving = [measure_serving(subject.engine(), first, sampling, level) for level in config.concurrency]
        generated = cached < len(requests) or serving
        rows.append(
            {
                **labels,
                "backend": config.backend,
                **summary,
                **subject.facts,
                "peak_memory_bytes": peak_memory() if generated and config.backend != "server" else None,
                "serving": serving,
                "generation_s": round(sum(seconds for _, seconds in found.values()), 3),
                "wall_s": round(time.perf_counter() - start, 3),
                "cached": cached,
                "cache_lines_skipped": cache.damaged,
                "checkpoint_hash": subject.identity,
                "task_version": config.task_version,
                "seed": config.seed,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_completion_length": config.max_completion_length,
                "reward_funcs": config.reward_funcs,
            }
        )
        records += named
    return rows, records


def problem_ids(dataset: Dataset) -> list[str]:
    """
    Returns a name for each problem that is the same wherever the problem is: a hash of its prompt and reference
    answer. The second of two problems that are the same is told apart by a number, and counts.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems.

    Returns:
        `list[str]`: Names, all different.
    """
    seen, names = Counter(), []
    for row in dataset:
        parts = [row["prompt"], row.get("answer"), row.get("tests"), row.get("instructions"), row.get("metadata")]
        name = hashlib.sha256(json.dumps(parts, ensure_ascii=False, default=str).encode()).hexdigest()[:12]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


class _Ticker:
    """Counts completions, for a progress bar or for a function."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None):
        self.done, self.total, self.progress = 0, total, progress
        self.bar = tqdm(total=total, unit="completion", desc="evaluate", disable=progress is not None)

    def __call__(self, number: int) -> None:
        self.done += number
        self.bar.update(number)
        if self.progress is not None and number:
            self.progress(self.done, self.total)


def _completions(config: EvaluateConfig, problems: int) -> int:
    return sum(problems * (config.num_samples if decoding == "sampled" else 1) for decoding in config.decoding)


def _timed(generated: Iterator[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int], float]]:
    """Adds the seconds since the one before, which add up to the time that all took."""
    before = time.perf_counter()
    for index, ids in generated:
        now = time.perf_counter()
        yield index, ids, now - before
        before = now


def _cache_file(config: EvaluateConfig, identity: str | None) -> Path | None:
    if config.cache_dir is None or identity is None:
        return None
    return Path(config.cache_dir) / f"{identity[:16]}-{re.sub(r'[^A-Za-z0-9]+', '-', config.task)[-40:]}.jsonl"


def _save(config: EvaluateConfig, records: list[dict[str, Any]]) -> None:
    if config.output is not None and config.save_completions:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(Path(config.output).with_suffix(".completions.jsonl"), lines)
