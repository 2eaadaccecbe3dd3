"""Results files of made-up evaluations, in the schema of the real ones."""

import json
from pathlib import Path

import numpy as np

from trl_opsd.evaluate.estimate import Samples, summarize
from trl_opsd.evaluate.results_file import Measurement
from trl_opsd.evaluate.schema import CompletionRecord, ResultRow, to_json
from trl_opsd.results import write_results


CONFIG = {"reward_funcs": ["math_reward"], "max_completion_length": 64, "top_p": 1.0, "top_k": 0, "seed": 0}


def records(stage, correct, tokens, **changes):
    """One record per sample; `correct` and `tokens` broadcast to (problems, samples)."""
    correct, tokens = np.broadcast_arrays(correct, tokens)
    base = {
        "stage": stage,
        "checkpoint": f"runs/{stage}",
        "task": "sums",
        "decoding": "greedy",
        "prompt": "plain",
        "thinking_tokens": 0,
        "truncated": False,
        "answer": "1",
    }
    return [
        {
            **base,
            "id": f"p{problem}",
            "sample": sample,
            "question": f"What is {problem} + 1?",
            "completion": f"wait, {problem}",
            "tokens": int(tokens[problem, sample]),
            "correct": None if correct[problem, sample] is None else bool(correct[problem, sample]),
            "correct_flexible": None if correct[problem, sample] is None else bool(correct[problem, sample]),
            **changes,
        }
        for problem, sample in np.ndindex(correct.shape)
    ]


def write_run(path, samples, config=CONFIG, save=True, **values):
    """Writes what an evaluation would have written for these samples, of one or several rows."""
    groups = {}
    for sample in samples:
        labels = {name: sample[name] for name in ("stage", "checkpoint", "task", "decoding", "prompt")}
        groups.setdefault(tuple(labels.items()), []).append(sample)
    rows = [
        {
            **dict(labels),
            **to_json(summarize(Samples.from_records(CompletionRecord(**sample) for sample in group))),
            "parameters": 1000,
            "wall_s": 1.5,
            "seed": 0,
            "temperature": 0.0,
            **values,
        }
        for labels, group in groups.items()
    ]
    write_results(path, rows, config)
    if save:
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        path.with_suffix(".completions.jsonl").write_text(lines)
    return path


def measured(stage, task, correct, tokens=10, **changes):
    """What reading back the run of these samples gives, without the files."""
    samples = [CompletionRecord(**sample) for sample in records(stage, correct, tokens, task=task, **changes)]
    found = Samples.from_records(samples)
    labels = {name: vars(samples[0])[name] for name in ("stage", "checkpoint", "task", "decoding", "prompt")}
    row = ResultRow(**labels, **vars(summarize(found)), parameters=1000, wall_s=1.5)
    questions = {sample.id: sample.question for sample in samples}
    return Measurement(row, {"config": CONFIG}, {}, Path(f"{stage}.json"), found, questions)
