"""Several processes that evaluate together come to the numbers of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_world import save_checkpoint, sum_rows, write_rows

from trl_opsd.evaluate.__main__ import main


ROOT = Path(__file__).parents[1]
TIMED = ("wall_s", "generation_s", "peak_memory_bytes", "serving", "cached")


def options(folder, name, *more):
    arguments = ["--model_name_or_path", str(folder / "checkpoint"), "--dataset_name", str(folder / "rows.jsonl")]
    arguments += ["--output", str(folder / name / "r.json"), "--decoding", "greedy", "sampled", "--num_samples", "3"]
    return [*arguments, "--max_completion_length", "9", *more]


def rows(folder, name):
    return json.loads((folder / name / "r.json").read_text())["rows"]


def one_process(folder, name):
    main(options(folder, name))
    return rows(folder, name)


def two_processes(folder, name, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "trl_opsd.evaluate", *options(folder, name, *more)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout, rows(folder, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    save_checkpoint(folder / "checkpoint")
    write_rows(folder / "rows.jsonl", sum_rows())
    return folder


def test_two_processes_come_to_what_one_does(folder):
    one = one_process(folder, "one")
    said, two = two_processes(folder, "two", "--concurrency", "2")
    assert said.count("mean@") == 2  # of the first process alone
    files = sorted((folder / "two" / "generations").iterdir())
    lines = [len(file.read_text().splitlines()) for file in files]
    assert lines == [8, 8]  # each has generated half of 4 + 12, and kept it: without this, two may silently be one
    for ours, theirs in zip(one, two, strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMED} == {k: v for k, v in theirs.items() if k not in TIMED}
    completions = [(folder / name / "r.completions.jsonl").read_text() for name in ("one", "two")]
    assert completions[0] == completions[1] and len(completions[0].splitlines()) == 16
    assert [len(row["serving"]) for row in two] == [1, 0] and two[0]["peak_memory_bytes"] > 0

    # One process goes on from what two have kept, where a part of it is lost
    files[1].unlink()
    rest = one_process(folder, "two")
    assert [row["cached"] for row in rest] == [2, 6]
    assert (folder / "two" / "r.completions.jsonl").read_text() == completions[0]
