"""The line of an evaluation: plan → run → score → estimate → results file."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cli import UserError
from .config import EvaluateConfig
from .estimate import Samples, bytes_per_correct, summarize
from .parallel import Processes
from .plan import Job, plan
from .results_file import write_completions
from .run import Generated, Runner
from .schema import CompletionRecord, ResultRow, to_json
from .score import same_answer, score


def evaluate(
    config: EvaluateConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Evaluates checkpoints on tasks: accuracy, tokens, memory and, where asked for, latency and throughput.

    Args:
        config ([`EvaluateConfig`]):
            What to evaluate and how.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model to evaluate as it is, on its own device. Defaults to the checkpoints of the configuration. Its
            generations are not kept: nothing says whose they are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. Defaults to the checkpoint's.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total. Defaults to a progress bar with the time left.

    Returns:
        `list[dict]`: One row per checkpoint, context, task and way of decoding, as it stands in a results file:
        [`~trl_opsd.evaluate.schema.ResultRow`] says what is in it.

    Raises:
        ValueError: If the checkpoints, the data, the verifiers or the tokenizers do not fit, before a model is loaded.
    """
    return [to_json(row) for row in evaluate_jobs(plan(config, model, tokenizer), progress)]


def evaluate_jobs(jobs: Sequence[Job], progress: Callable[[int, int], None] | None = None) -> list[ResultRow]:
    """
    Runs, scores and estimates what [`~trl_opsd.evaluate.plan.plan`] returns, and writes the completions beside the
    `output` of the configuration.

    Args:
        jobs (`Sequence[Job]`):
            What there is to do.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total. Defaults to a progress bar with the time left.

    Returns:
        `list[ResultRow]`: One for each job and way of decoding, in every process.
    """
    rows, completions, processes = [], [], Processes(jobs)
    with closing(Runner(jobs, processes, progress)) as runner:
        for job in jobs:
            for generated in runner.run(job):
                if not processes.is_first:
                    continue
                records = score(job, generated.decoding, generated.requests, generated.completion_ids)
                rows.append(_row(job, generated, records))
                completions += records
    if processes.is_first and jobs[0].config.output is not None and jobs[0].config.save_completions:
        write_completions(jobs[0].config.output, completions)
    return processes.tell([rows])[0]


def _row(job: Job, generated: Generated, records: list[CompletionRecord]) -> ResultRow:
    config, checkpoint, sampling = job.config, job.checkpoint, generated.sampling
    bits, moved = checkpoint.weight_bits(config), (None, None, None)
    try:
        samples = Samples.from_records(records)
        summary = summarize(samples, same_answer(job.reward_funcs), config.pass_at_k)
    except ValueError as error:
        raise UserError(f"`{config.task}`: {error}") from None
    if bits is not None:
        moved = bytes_per_correct(samples, checkpoint.passed_parameters, bits)
    return ResultRow(
        **job.labels(generated.decoding),
        **vars(summary),
        backend=config.backend,
        parameters=checkpoint.parameters,
        non_embedding_parameters=checkpoint.non_embedding_parameters,
        active_parameters=checkpoint.active_parameters,
        weight_bits=bits,
        bytes_per_correct=moved[0],
        bytes_per_correct_low=moved[1],
        bytes_per_correct_high=moved[2],
        weights_bytes=checkpoint.weights_bytes,
        peak_memory_bytes=generated.peak_memory_bytes,
        generation_s=generated.generation_s,
        serving=generated.serving,
        cached=generated.cached,
        cache_lines_skipped=generated.cache_lines_skipped,
        too_long=job.too_long,
        checkpoint_hash=checkpoint.hash,
        seed=config.seed,
        task_version=config.task_version,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p or None,
        stop=config.stop,
        max_completion_length=config.max_completion_length,
        thinking_budget=config.thinking_budget,
        reward_funcs=config.reward_funcs,
        wall_s=round(time.perf_counter() - generated.started, 3),
    )
