"""Whether an artefact that is quantised is as good: evaluated in its engine, and judged by the verdict of `evaluate`."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluate.backends import Request
from ..evaluate.compare import Answer as Verdict
from ..evaluate.compare import Conclusion, compare_files
from ..evaluate.config import EvaluateConfig
from ..evaluate.estimate import Samples, bytes_per_correct, summarize
from ..evaluate.pipeline import evaluate_jobs
from ..evaluate.plan import Job
from ..evaluate.results_file import write_completions, write_rows
from ..evaluate.schema import ResultRow
from ..evaluate.score import same_answer, score


CHECKPOINT = "checkpoint"


class Judge:
    """
    Judges artefacts against the checkpoint, greedily, on the tasks that it was given.

    Args:
        config ([`~trl_opsd.evaluate.EvaluateConfig`]):
            What to evaluate on.
        jobs (`Sequence[Job]`):
            The checkpoint on each task.
        folder (`Path`):
            Folder for the results, one file for the checkpoint and each artefact.
        margins (`Mapping`):
            Loss of accuracy that still counts as none, by task.
    """

    def __init__(self, config: EvaluateConfig, jobs: Sequence[Job], folder: Path, margins: Mapping[str | None, float]):
        self.config, self.jobs, self.folder, self.margins = config, jobs, folder, margins
        self.rows: list[ResultRow] = []

    @property
    def prompts(self) -> list[tuple[list[int], int]]:
        """Token ids of all problems, and how many tokens may follow each."""
        return [(ids, limit) for job in self.jobs for ids, limit in zip(job.prompt_ids, job.limits, strict=True)]

    def file(self, name: str) -> Path:
        """Returns the results file of an artefact."""
        return self.folder / f"{name}.json"

    def measure(self) -> None:
        """Evaluates the checkpoint, unless it is kept from an earlier run."""
        self.rows = evaluate_jobs(self.jobs)
        write_rows(self.file(CHECKPOINT), self.rows, self.config)

    def judge(
        self, name: str, backend: str, completions: list[list[int]], seconds: float, size: int, digest: str
    ) -> Conclusion:
        """
        Judges what an artefact has written.

        Args:
            name (`str`):
                Name of the artefact.
            backend (`str`):
                What wrote it.
            completions (`list[list[int]]`):
                One for each of `prompts`.
            seconds (`float`):
                What they took.
            size (`int`):
                Bytes of its folder.
            digest (`str`):
                Its hash.

        Returns:
            [`~trl_opsd.evaluate.compare.Conclusion`]: The verdict.
        """
        rows, everything, start = [], [], 0
        for job, before in zip(self.jobs, self.rows, strict=True):
            own = copy.copy(job)
            own.config = dataclasses.replace(job.config, stage=name)
            part = completions[start : start + len(job.names)]
            start += len(job.names)
            requests = [Request(ids, 0, limit) for ids, limit in zip(job.prompt_ids, job.limits, strict=True)]
            records = score(own, "greedy", requests, part)
            samples = Samples.from_records(records)
            summary = summarize(samples, same_answer(own.reward_funcs), own.config.pass_at_k)
            bits = 8 * size / before.parameters  # with what lies beside the weights
            moved = bytes_per_correct(samples, job.checkpoint.passed_parameters, bits)
            rows.append(
                dataclasses.replace(
                    before,
                    **vars(summary),
                    stage=name,
                    backend=backend,
                    weights_bytes=size,
                    weight_bits=bits,
                    bytes_per_correct=moved[0],
                    bytes_per_correct_low=moved[1],
                    bytes_per_correct_high=moved[2],
                    checkpoint_hash=digest,
                    peak_memory_bytes=None,
                    generation_s=round(seconds, 3),
                    wall_s=round(seconds, 3),
                    cached=0,
                    cache_lines_skipped=0,
                )
            )
            everything += records
        write_completions(self.file(name), everything)
        write_rows(self.file(name), rows, dataclasses.replace(self.config, stage=name))
        return Conclusion(compare_files(str(self.file(CHECKPOINT)), str(self.file(name)), self.margins))


def folder_suffix(verdict: Verdict) -> str:
    """What the name of an artefact that is not as good ends in."""
    return "" if verdict is Verdict.AS_GOOD else f".{verdict.text}"
