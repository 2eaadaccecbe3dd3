"""From jobs to completions, through the cache: a checkpoint is loaded when its first completion is missing there."""

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..cli import UserError
from .backends import Engine, Request, Sampling, has_vllm, load_engine
from .budget import generate_within_budget
from .cache import GenerationCache, cache_key
from .parallel import Processes
from .plan import Job
from .schema import Serving
from .score import verify
from .serving import bench_serving, measure_serving
from .thinking import is_opened, read_thinking


@dataclass
class Generated:
    """
    The completions of a job in one way of decoding, problem by problem.

    Args:
        decoding (`str`):
            `"greedy"` or `"sampled"`.
        samples (`int`):
            Completions per problem.
        sampling ([`~trl_opsd.evaluate.backends.Sampling`]):
            How they were drawn.
        requests (`list[Request]`):
            What was asked, with the seed of each completion.
        completion_ids (`list[list[int]]`):
            Token ids, one list for each request.
        generation_s (`float`, *optional*):
            Seconds that they took, if all of them were generated now.
        cached (`int`):
            Number of them that an earlier run had generated.
        cache_lines_skipped (`int`):
            Damaged lines of the cache.
        serving (`list[Serving]`):
            Latency and throughput, if asked for.
        peak_memory_bytes (`int`, *optional*):
            Most memory held meanwhile, if all of them were generated now.
        started (`float`):
            When this way of decoding began, by `time.perf_counter`.
    """

    decoding: str
    samples: int
    sampling: Sampling
    requests: list[Request]
    completion_ids: list[list[int]]
    generation_s: float | None
    cached: int
    cache_lines_skipped: int
    serving: list[Serving]
    peak_memory_bytes: int | None
    started: float


class Runner:
    """
    Generates what jobs ask for, with one checkpoint in memory at a time.

    Args:
        jobs (`Sequence[Job]`):
            What there is to do.
        processes ([`~trl_opsd.evaluate.parallel.Processes`]):
            Those that share the work.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total. Defaults to a progress bar with the time left.
    """

    def __init__(self, jobs: Sequence[Job], processes: Processes, progress: Callable[[int, int], None] | None = None):
        self.processes = processes
        self.total = sum(len(job.dataset) * job.samples(name) for job in jobs for name in job.config.decoding)
        self.done, self.progress = 0, progress
        self.bar = tqdm(
            total=self.total,
            unit="completion",
            desc="evaluate",
            disable=progress is not None or not processes.is_first,
        )
        self.checkpoint, self.engine = None, None

    def run(self, job: Job) -> Iterator[Generated]:
        """
        Generates the completions of a job that the cache does not have.

        Args:
            job ([`~trl_opsd.evaluate.plan.Job`]):
                What to generate.

        Yields:
            [`Generated`]: One for each way of decoding.

        Raises:
            UserError: If the checkpoint cannot be loaded, its backend fails, or `rescore` forbids to generate.
        """
        if job.checkpoint is not self.checkpoint:
            self._unload()  # before the next one is loaded
            self.checkpoint = job.checkpoint
        config = job.config
        cache = GenerationCache(_cache_file(job), self.processes.index)
        self.processes.wait()  # until all have read what none writes yet
        # Everything that decides a completion
        origin = {"checkpoint": job.checkpoint.hash, "task": config.task, "version": config.task_version}
        origin |= {"backend": config.backend, "dtype": config.dtype, "own_code": config.trust_remote_code}
        if config.backend == "vllm":
            origin["vllm_kwargs"] = config.vllm_kwargs  # a quantisation, for instance
        elif config.starts_server:
            origin["vllm_kwargs"] = config.vllm_kwargs
        elif config.backend == "server":
            # The name alone may be given to other weights; how much room there is, each limit says
            origin["served"] = {name: value for name, value in job.served.items() if name != "max_model_len"}
            origin["server_api"] = config.server_api
            if config.server_api == "chat":
                origin["chat_template_kwargs"] = config.chat_template_kwargs
        if config.thinking_budget is not None:
            origin["thinking"] = [config.thinking_budget, job.tags.start, job.tags.end]
        for decoding in config.decoding:
            started = time.perf_counter()
            sampling, width = job.sampling(decoding), job.samples(decoding)
            requests, keys = [], []
            problems = zip(job.names, job.prompts, job.prompt_ids, job.limits, strict=True)
            by_messages = config.backend == "server" and config.server_api == "chat"
            for name, prompt, ids, limit in problems:
                for sample in range(width):
                    seed = int(hashlib.sha256(f"{config.seed} {name} {sample}".encode()).hexdigest()[:8], 16)
                    drawn = {"seed": config.seed, "sample": sample} if decoding == "sampled" else {}
                    keys.append(cache_key(**origin, prompt_ids=ids, limit=limit, sampling=vars(sampling), **drawn))
                    requests.append(Request(ids, seed, limit, prompt if by_messages else None))
            found = {index: entry for index, key in enumerate(keys) if (entry := cache.get(key)) is not None}
            if config.rescore and len(found) < len(keys):
                raise UserError(
                    f"`rescore`: {len(keys) - len(found)} of {len(keys)} completions of `{config.task}` ({decoding}) "
                    f"are not in `{config.cache_dir}`: run without `rescore`, with the same configuration."
                )
            mine = self.processes.mine(len(requests))
            cached, peak = sum(index in found for index in mine), None
            done = set(range(len(requests))).difference(mine).union(found)
            self._tick(len(found))
            if len(done) < len(requests):
                engine = self._engine(job)
                engine.reset_peak_memory()
                for index, ids, seconds in _timed(_generate(engine, job, requests, sampling, done)):
                    cache.add(keys[index], ids, seconds)
                    found[index] = (ids, seconds)
                    self._tick(1)
                peak = engine.peak_memory()
            ticked = len(found)
            found, cached, peak = self.processes.join(found, cached, peak)
            self._tick(len(found) - ticked)
            if cached:  # of some of the completions, it would depend on which ones were left
                peak = None
            serving = []
            measured = config.concurrency and decoding == config.decoding[0] and not config.rescore
            if measured and self.processes.is_first:
                first = requests[::width][: config.serving_requests]
                serving = [self._measure(job, first, sampling, level) for level in config.concurrency]
            yield Generated(
                decoding=decoding,
                samples=width,
                sampling=sampling,
                requests=requests,
                completion_ids=[found[index][0] for index in range(len(requests))],
                generation_s=None if cached else round(sum(seconds for _, seconds in found.values()), 3),
                cached=cached,
                cache_lines_skipped=cache.damaged,
                serving=serving,
                peak_memory_bytes=peak,
                started=started,
            )

    def close(self) -> None:
        """Frees the checkpoint that is loaded."""
        self.bar.close()
        self._unload()

    def _unload(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def _engine(self, job: Job) -> Engine:
        if self.engine is None:
            self.engine = load_engine(job.config, job.checkpoint, job.tokenizer)
        return self.engine

    def _measure(self, job: Job, requests: list[Request], sampling: Sampling, concurrency: int) -> Serving:
        config = job.config
        engine = self._engine(job)
        if config.backend != "server" or config.server_api != "tokens" or not has_vllm():
            return measure_serving(engine, requests, sampling, concurrency)
        path = job.tokenizer.name_or_path
        level, answers = bench_serving(engine.url, engine.model, job.tokenizer, path, requests, sampling, concurrency)
        verdicts = verify(
            job.dataset.select(range(len(requests))),
            job.reward_funcs,
            answers,
            job.tokenizer,
            job.eos_ids,
            [is_opened(request.prompt_ids, job.tokenizer, job.tags) for request in requests],
            job.tags,
            config.stop or (),
        )
        correct = sum(bool(verdict.correct) for verdict in verdicts)
        seconds = len(requests) / level.requests_per_s
        return dataclasses.replace(level, correct=correct, correct_per_s=correct / seconds)

    def _tick(self, number: int) -> None:
        self.done += number
        self.bar.update(number)
        if self.progress is not None and number:
            self.progress(self.done, self.total)


def _generate(
    engine: Engine, job: Job, requests: list[Request], sampling: Sampling, done: set[int]
) -> Iterator[tuple[int, list[int]]]:
    if job.config.thinking_budget is None:
        yield from engine.generate(requests, sampling, done)
        return
    tokenizer, tags = job.tokenizer, job.tags

    def is_open(index: int, ids: list[int]) -> bool:
        opened = is_opened(requests[index].prompt_ids, tokenizer, tags)
        return read_thinking(ids, tokenizer, tags, opened).is_open

    def has_ended(ids: list[int]) -> bool:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return ids[-1] in sampling.eos_ids or any(mark in text for mark in sampling.stop)

    closing = tokenizer(f"\n{tags.end}\n\n", add_special_tokens=False)["input_ids"]
    budget = job.config.thinking_budget
    yield from generate_within_budget(engine, requests, sampling, budget, closing, is_open, has_ended, done)


def _timed(generated: Iterator[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int], float]]:
    """Adds the seconds since the one before, which add up to the time that all took."""
    before = time.perf_counter()
    for index, ids in generated:
        now = time.perf_counter()
        yield index, ids, now - before
        before = now


def _cache_file(job: Job) -> Path | None:
    config, identity = job.config, job.checkpoint.hash
    if config.cache_dir is None or identity is None:
        return None
    return Path(config.cache_dir) / f"{identity[:16]}-{re.sub(r'[^A-Za-z0-9]+', '-', config.task)[-40:]}.jsonl"
