"""The same numbers on one process and on two, whatever was gated out where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


TESTS = Path(__file__).parent
# What is kept of the eight rows of a batch. On two processes the second one has the last four: of those all are gated
# out, some are, and in the last case nothing is left anywhere
GATES = ["11010000", "01100111", "00000000"]


def run(output, processes, per_device, accumulation):
    command = [sys.executable, "-m"]
    command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(TESTS / "distributed_worker.py"), "--output", str(output), "--kept", *GATES]
    command += ["--per_device", str(per_device), "--accumulation", str(accumulation)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return run(folder / "one.pt", 1, 8, 1), run(folder / "two.pt", 2, 2, 2)


@pytest.mark.parametrize("gate", range(len(GATES)), ids=GATES)
def test_two_processes_do_what_one_does(runs, gate):
    one, two = (results[gate] for results in runs)
    # Without these, two processes may silently be one
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["wrapper"] == "DistributedDataParallel"
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(one["logs"], two["logs"], strict=True):
        assert ours["opsd/kept"] == GATES[gate].count("1") / 8
        for key in ("loss", "opsd/kept", "opsd/kl", "opsd/student_entropy", "opsd/top1_agreement"):
            assert (key in ours) == (key in theirs)
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-6), key
