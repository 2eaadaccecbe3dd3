"""The same numbers on one process and on two, whatever was gated out where."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch


TESTS = Path(__file__).parent
# What is kept of the eight rows of a batch. On two processes the second one has the last four: of those all are gated
# out, some are, and in the last case nothing is left anywhere
GATES = ["11010000", "01100111", "00000000"]
# In which round it passes: of the second process some in the second and third, of the first nothing is rejected
REFILLS = ["11110230", "20311111"]
# The same batch twice, with what is not solved skipped the second time
SKIPS = ["s11110110", "s00010111"]
# All are kept, and the teacher is right in its context on some, of the second process on none, of both on some
TEACHERS = ["t11010000", "t01100111"]
# Whose divergence is not finite in both steps, of the second process one, and both of a micro-batch
FAULTS = ["n11110111", "n11010011"]
CASES = GATES + REFILLS + SKIPS + TEACHERS + FAULTS


def run(output, processes, per_device, accumulation, *options):
    command = [sys.executable, "-m"]
    command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(TESTS / "distributed_worker.py"), "--output", str(output), "--kept", *CASES]
    command += ["--per_device", str(per_device), "--accumulation", str(accumulation), *options]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def runs(folder):
    return {
        "one": run(folder / "one.pt", 1, 8, 1),
        "two": run(folder / "two.pt", 2, 2, 2),
        # Rollouts change places, and each process has several forward passes for each of its steps
        "budget": run(folder / "budget.pt", 2, 2, 2, "--max_tokens", "50"),
    }


@pytest.mark.parametrize("case", range(len(CASES)), ids=CASES)
@pytest.mark.parametrize("other", ["two", "budget"])
def test_two_processes_do_what_one_does(runs, case, other):
    one, two = runs["one"][case], runs[other][case]
    gate = CASES[case]
    # Without these, two processes may silently be one
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["wrapper"] == "DistributedDataParallel"
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=1e-6)
    assert one["pass_rates"] == two["pass_rates"]
    # All processes count alike, so that all of them end together
    assert {*one["in_a_row"], *two["in_a_row"]} == {2 if gate in FAULTS else 0}
    for name in ("contexts", "counts", "tokens"):
        assert one["teacher_gate"].get(name) == two["teacher_gate"].get(name)
    for step, (ours, theirs) in enumerate(zip(one["logs"], two["logs"], strict=True)):
        skips = gate.startswith("s")
        if gate in TEACHERS:
            assert ours["opsd/correct"] == ours["opsd/kept"] == theirs["opsd/kept"] == 1
            assert ours["opsd/anchored"] == theirs["opsd/anchored"] == gate.count("0") / 8
            # Eight prompts in each step, three rollouts of three tokens each, dealt evenly
            assert ours["opsd/teacher_gate_tokens"] == theirs["opsd/teacher_gate_tokens"] == 72 * (step + 1)
            assert sum(one["calls"]) == 48 and sum(two["calls"]) == 24
        elif gate in FAULTS:
            assert ours["opsd/kept"] == 1 and ours["grad_norm"] > 0 and theirs["grad_norm"] > 0
        else:
            assert ours["opsd/correct"] == gate.count("1") / 8
            assert ours["opsd/kept"] == (1 if skips and step == 1 else 1 - gate.count("0") / 8)
        if gate in REFILLS:
            assert ours["opsd/generation_rounds"] == 3
            # What is asked again is dealt evenly, though one process has all of it
            again = {"11110230": (4, 3), "20311111": (3, 2)}[gate]
            assert one["calls"] == 2 * [8, *again]
            assert two["calls"] == 2 * [4, *((number + 1) // 2 for number in again)]
        if skips:
            assert ours["opsd/skipped"] == step * gate.count("0") / 8
        for key in (
            "loss",
            "opsd/correct",
            "opsd/kept",
            "opsd/kl",
            "opsd/student_entropy",
            "opsd/top1_agreement",
            "opsd/generation_rounds",
            "opsd/skipped",
            "opsd/anchored",
            "completions/mean_length",
        ):
            assert (key in ours) == (key in theirs)
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("other", ["two", "budget"])
@pytest.mark.parametrize("gate", GATES + REFILLS)
def test_the_table_of_two_processes_is_that_of_one(runs, folder, gate, other):
    one, two = (
        pd.read_parquet(folder / run / gate / "completions" / "completions_00002.parquet") for run in ("one", other)
    )
    pd.testing.assert_frame_equal(one, two, rtol=1e-4)
    assert one["kept"].tolist() == [keep != "0" for keep in gate]
    # What was logged of a rollout is still beside it, whoever wrote it and whoever judged it
    assert one["ids"].map(lambda ids: ids.count(",") + 1).tolist() == one["tokens"].tolist()
    assert one["kl"].notna().tolist() == one["kept"].tolist()


@pytest.mark.parametrize("gate", GATES)
def test_the_page_of_two_processes_is_that_of_one(runs, folder, gate):
    """And only what is on it, with the values of its tokens, has come to the main process, and nothing to the others."""
    pages = {
        run: [
            re.sub(r"[0-9.e-]+ nats", "nats", (folder / run / gate / "rollouts" / f"step-{step}.html").read_text())
            for step in (1, 2)
        ]
        for run in ("one", "two", "budget")
    }
    assert pages["one"] == pages["two"] == pages["budget"] and "nats" in pages["one"][0]
    case, kept = GATES.index(gate), gate.count("1")
    for run in ("two", "budget"):
        for main, other in runs[run][case]["gathered"][:2]:
            assert main == [8, kept, 3, min(kept, 3)] and other == [0, 0, 0, 0]
