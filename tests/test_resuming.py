"""Which checkpoint a run goes on from, whose its output folder is, and what a SIGTERM leaves."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trl_opsd.opsd.__main__ import main as opsd
from trl_opsd.resuming import CHECKSUMS, INTERRUPTED, StopOnSignal, find_checkpoint, hash_files, why_broken
from trl_opsd.rlvr.__main__ import main as rlvr
from trl_opsd.tiny.task import CONCISE_TEMPLATE


@pytest.fixture
def whole(tmp_path):
    """A folder as a trainer leaves it, in two shards."""

    def write(step: int):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for number in (1, 2):
            save_file({f"w{number}": torch.ones(64)}, folder / f"model-{number}.safetensors")
        weight_map = {f"w{number}": f"model-{number}.safetensors" for number in (1, 2)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        return folder

    return write


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = {
    "has no trainer_state.json": lambda folder: (folder / "trainer_state.json").unlink(),
    "its trainer_state.json is not whole": lambda folder: truncate(folder / "trainer_state.json"),
    "its shard model-2.safetensors is missing": lambda folder: (folder / "model-2.safetensors").unlink(),
    "its model-1.safetensors is damaged": lambda folder: truncate(folder / "model-1.safetensors"),
    "its model-2.safetensors is damaged": lambda folder: (folder / "model-2.safetensors").write_bytes(b""),
    "its model.safetensors.index.json is not whole": lambda folder: truncate(folder / "model.safetensors.index.json"),
    "it is not a folder": shutil.rmtree,
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, whole, reason, caplog):
    for step in (2, 10, 9):  # by number, not by name
        assert why_broken(whole(step)) is None
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-10")
    DAMAGE[reason](tmp_path / "checkpoint-10")
    assert reason in why_broken(tmp_path / "checkpoint-10")
    assert find_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-9")
    assert ("checkpoint-10` is left aside" in caplog.text) == (reason != "it is not a folder")
    with pytest.raises(
        ValueError, match=f"`resume_from_checkpoint`: .*checkpoint-10` cannot be resumed from, .*{reason}"
    ):
        find_checkpoint(str(tmp_path / "checkpoint-10"), str(tmp_path))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


SEALED_DAMAGE = {
    "its model-1.safetensors is damaged": lambda folder: flip(folder / "model-1.safetensors", -1),  # in a weight
    "its optimizer.pt is damaged": lambda folder: flip(folder / "optimizer.pt", 20),
    "its optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "its checksums.json is not whole": lambda folder: truncate(folder / CHECKSUMS),
}


@pytest.mark.parametrize("reason", SEALED_DAMAGE)
def test_a_checkpoint_of_which_a_byte_has_changed_is_not_gone_on_from(tmp_path, whole, reason):
    for step in (3, 4):
        folder = whole(step)
        torch.save({"state": torch.ones(8)}, folder / "optimizer.pt")
        (folder / CHECKSUMS).write_text(json.dumps(hash_files(folder)))
        assert why_broken(folder) is None
    SEALED_DAMAGE[reason](tmp_path / "checkpoint-4")
    assert why_broken(tmp_path / "checkpoint-4") == reason
    assert find_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("wish", ["true", "True", True])
def test_without_a_whole_checkpoint_the_run_begins_anew(tmp_path, whole, wish):
    assert find_checkpoint(wish, str(tmp_path / "nowhere")) is None
    (whole(3) / "trainer_state.json").unlink()
    assert find_checkpoint(wish, str(tmp_path)) is None


@pytest.mark.parametrize("wish", [None, "false", "False", False])
def test_nothing_is_resumed_that_was_not_asked_for(tmp_path, whole, wish):
    whole(3)
    assert find_checkpoint(wish, str(tmp_path)) is None


STAGES = {"opsd": opsd, "rlvr": rlvr}


@pytest.fixture
def recipe(tmp_path, checkpoint, rows):
    """Writes a recipe for six steps, three passes, of a stage on a small model, and returns its options."""
    rows.select(range(4)).to_json(tmp_path / "train.jsonl")

    def write(stage: str, out: str, **changes) -> list[str]:
        config = {
            "model_name_or_path": checkpoint(),
            "dataset_name": str(tmp_path / "train.jsonl"),
            "output_dir": str(tmp_path / out),
            "reward_funcs": ["math_reward", "test_resuming.even"],
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 8,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            **changes,
        }
        if stage == "opsd":
            config |= {"teacher_prompt_template": CONCISE_TEMPLATE, "gate": "all", "probe_prompts": 0}
            config |= {"teacher_weights": "ema"}
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["--config", str(path)]

    return write


def even(completions, completion_ids, **kwargs):
    """Something that differs within a group, so that there is a gradient."""
    return [float(len(ids) % 2 == 0) - 0.1 * ids[0] for ids in completion_ids]


class KillAt(TrainerCallback):
    """Sends this process SIGTERM in the middle of a step, as a scheduler does."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def killed(monkeypatch):
    """Kills the next run in the given step."""
    on_train_begin = StopOnSignal.on_train_begin

    def at(step):
        killer = KillAt(step)

        def begin(self, *args, **kwargs):
            on_train_begin(self, *args, **kwargs)
            monkeypatch.setattr(
                StopOnSignal, "on_pre_optimizer_step", lambda self, *a, **k: killer.on_pre_optimizer_step(*a, **k)
            )

        monkeypatch.setattr(StopOnSignal, "on_train_begin", begin)

    return at


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_sent_sigterm_goes_on_with_the_same_command(
    tmp_path, recipe, killed, stage, capsys, monkeypatch
):
    STAGES[stage](recipe(stage, "alone"))
    killed(3)
    with pytest.raises(SystemExit) as end:
        STAGES[stage](recipe(stage, "stopped"))
    monkeypatch.undo()
    assert end.value.code == INTERRUPTED == 143
    stopped = tmp_path / "stopped"
    sealed = json.loads((stopped / "checkpoint-3" / CHECKSUMS).read_text())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= sealed.keys()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: Ended by SIGTERM after step 3") and f"{stopped}/checkpoint-3" in error
    assert not (stopped / "model.safetensors").exists() and not (stopped / "config.json").exists()
    shutil.copytree(stopped / "checkpoint-3", stopped / "checkpoint-4")  # half-written by a later kill
    (stopped / "checkpoint-4" / "trainer_state.json").unlink()
    held_out = stopped / "held_out.json"  # what is evaluated on meanwhile does not take rows from under the sampler
    assert json.loads(held_out.read_text()) == []
    held_out.write_text('["none"]')
    STAGES[stage]([*recipe(stage, "stopped"), "--resume_from_checkpoint", "true"])
    assert "held out: nothing, as when the run began" in capsys.readouterr().out
    alone, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "stopped"))
    start = load_file(tmp_path / "stopped" / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(alone[name], resumed[name]) for name in alone)
    assert not all(torch.equal(alone[name], start[name]) for name in alone)
    losses = [
        [row["loss"] for row in json.loads((tmp_path / name / f"{stage}.json").read_text())["rows"] if "loss" in row]
        for name in ("alone", "stopped")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_after_its_last_step_makes_no_other(tmp_path, recipe, stage):
    """Three steps of four in an epoch, and after them what a kill leaves: a checkpoint, and nothing under the final name."""
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    line = recipe(stage, "out", **options, lr_scheduler_type="constant")
    STAGES[stage](line)
    out = tmp_path / "out"
    files = out / "model.safetensors", out / f"{stage}.json"
    weights, rows = load_file(files[0]), json.loads(files[1].read_text())["rows"]
    for file in (*files, out / "config.json"):
        file.unlink()
    STAGES[stage]([*line, "--resume_from_checkpoint", "true"])
    assert all(torch.equal(value, load_file(files[0])[name]) for name, value in weights.items())
    again = json.loads(files[1].read_text())["rows"]
    assert again[:-1] == rows[:-1] and again[-1]["step"] == 3  # the last has the time that it took


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, recipe, killed):
    killed(6)
    opsd(recipe("opsd", "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


HOLD = """
import sys, time
from types import SimpleNamespace
from trl_opsd.resuming import claim
claim(SimpleNamespace(process_index=0, output_dir=sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_that_another_run_writes_into(tmp_path, recipe, capsys):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(SystemExit) as end:
                opsd(recipe("opsd", "out"))
        finally:
            other.kill()
    assert end.value.code == 2
    assert f"error: `output_dir`: another run is writing into `{out}`" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    opsd([*recipe("opsd", "out"), "--max_steps", "1"])  # the lock went with its process


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "options, message",
    [
        (["--output_dir", "/proc/nowhere"], "`output_dir`: the folder `/proc/nowhere` cannot be written"),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint`: `nowhere` cannot be resumed from"),
        (["--lora_r", "4", "--use_peft", "true", "--lora_target_modules", "nothing"], "Target modules"),
    ],
)
def test_what_is_found_late_is_a_sentence_too(recipe, stage, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        STAGES[stage]([*recipe(stage, "out"), *options])
    assert end.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_without_vllm_the_command_says_how_to_get_it(recipe, monkeypatch, capsys):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "vllm" else own(name, *args))
    with pytest.raises(SystemExit) as end:
        opsd([*recipe("opsd", "out"), "--use_vllm", "true"])
    assert end.value.code == 2
    assert "error: `use_vllm` needs vLLM: run `pip install vllm`" in capsys.readouterr().err
