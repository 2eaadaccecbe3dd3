"""The harness that runs TRL's tests with our trainers (`trl_swap`), on a test file made up here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parent

MADE_UP = """
import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

MODEL = "trl-internal-testing/tiny-Phi3ForCausalLM-3.5"


class TestMadeUp:
    def test_swapped(self):
        names = [c.__name__ for c in (DistillationTrainer, DistillationConfig, GRPOTrainer, GRPOConfig)]
        assert names == ["OPSDTrainer", "OPSDConfig", "RLVRTrainer", "RLVRConfig"], " ".join(names)

    def test_resolves(self):
        rows = load_dataset("trl-internal-testing/zen", "standard_prompt_only")
        assert {split: len(part) for split, part in rows.items()} == {"train": 17, "test": 2}
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        assert tokenizer.convert_tokens_to_ids("<|end|>") == 32007
        assert tokenizer.decode(tokenizer("Now is better")["input_ids"]) == "Now is better"
        assert AutoModelForCausalLM.from_pretrained(MODEL).config.vocab_size == 32011

    @pytest.mark.parametrize("model", ["trl-internal-testing/tiny-SmolVLMForConditionalGeneration"])
    def test_not_built(self, model):
        raise AssertionError("not skipped")

    def test_deviates(self):
        raise AssertionError("what we changed")

    def test_passes_all_the_same(self):
        pass
"""

# Several runs of pytest in one process, because importing torch and TRL is what takes the time
RUNS = """
import sys
import pytest
import trl_swap

def run(name, deviations, *arguments):
    trl_swap.DEVIATIONS = deviations
    options = ["-p", "trl_swap", "-p", "no:cacheprovider", "-c", sys.argv[1], "-rA", "--tb=line"]
    print("status", int(pytest.main([*options, f"{sys.argv[2]}/{name}.py", *arguments])), "of", name, flush=True)
    print("=" * 3 + " end of run", flush=True)

deviates, passes = "TestMadeUp::test_deviates", "TestMadeUp::test_passes_all_the_same"
run("test_listed", {deviates: "we changed it", "TestOther::test": "of another file"})
run("test_passing", {deviates: "we changed it", passes: "we say so"})
run("test_gone", {deviates: "we changed it", "TestMadeUp::test_of_another_version": "gone"})
run("test_control", {deviates: "we changed it"}, "--trl-control", "-k", "swapped or deviates")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[str]:
    """What each of the runs printed."""
    folder = tmp_path_factory.mktemp("trl")
    for name in ("listed", "passing", "gone", "control"):  # one file each, since a process imports a file once
        (folder / f"test_{name}.py").write_text(MADE_UP)
    result = subprocess.run(
        [sys.executable, "-c", RUNS, str(TESTS.parent / "pyproject.toml"), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout
    return result.stdout.split("=== end of run")


def test_trainers_are_swapped_names_resolve_and_a_listed_test_may_fail(outputs):
    assert "status 0 of test_listed" in outputs[0]
    assert "3 passed, 1 skipped, 1 xfailed" in outputs[0]
    assert "tiny-SmolVLMForConditionalGeneration is not built here" in outputs[0]


def test_a_listed_test_that_passes_fails_the_run(outputs):
    assert "status 1 of test_passing" in outputs[1]
    assert "1 failed, 2 passed, 1 skipped, 1 xfailed" in outputs[1]
    assert "[XPASS(strict)] we say so" in outputs[1]


def test_a_listed_test_that_is_gone_fails_the_run(outputs):
    assert "status 4 of test_gone" in outputs[2]
    assert "['TestMadeUp::test_of_another_version']" in outputs[2]


def test_the_control_leaves_the_trainers_of_trl(outputs):
    assert "status 1 of test_control" in outputs[3]
    assert "2 failed" in outputs[3] and "xfailed" not in outputs[3]
    assert "DistillationTrainer DistillationConfig GRPOTrainer GRPOConfig" in outputs[3]
