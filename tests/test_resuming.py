"""Which checkpoint a run goes on from, whose its output folder is, and what a SIGTERM leaves."""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_opsd_alarms import build, falling
from test_opsd_trainer import same_rollouts
from transformers import ProcessorMixin, TrainerCallback

from trl_opsd import resuming
from trl_opsd.cli import save_final
from trl_opsd.opsd.__main__ import main as opsd
from trl_opsd.resuming import CHECKSUMS, INTERRUPTED, StopOnSignal, find_checkpoint, hash_files, train, why_broken
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
def test_the_same_seed_gives_the_same_numbers(tmp_path, recipe, stage):
    """On a CPU, bitwise, whatever the process has drawn before; and another seed gives others."""
    weights, logs = {}, {}
    for out, seed in (("one", 7), ("same", 7), ("other", 8)):
        STAGES[stage](recipe(stage, out, seed=seed, max_steps=2))
        weights[out] = load_file(tmp_path / out / "model.safetensors")
        rows = json.loads((tmp_path / out / f"{stage}.json").read_text())["rows"]
        logs[out] = [
            {name: row[name] for name in row if "time" not in name and "per_second" not in name} for row in rows
        ]
        torch.rand(3)
    assert "loss" in logs["one"][0] and "completions/mean_length" in logs["one"][0]
    assert logs["one"] == logs["same"] and logs["one"] != logs["other"]
    assert all(torch.equal(value, weights["same"][name]) for name, value in weights["one"].items())
    assert not all(torch.equal(value, weights["other"][name]) for name, value in weights["one"].items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_after_its_last_step_makes_no_other(tmp_path, recipe, stage):
    """Three steps of four in an epoch, and after them what a kill leaves: a checkpoint, and nothing under the final name."""
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    line = recipe(stage, "out", **options, lr_scheduler_type="constant", log_completions=True)
    STAGES[stage](line)
    out = tmp_path / "out"
    tables = {file: file.read_bytes() for file in (out / "completions").iterdir()}
    files = out / "model.safetensors", out / f"{stage}.json"
    weights, rows = load_file(files[0]), json.loads(files[1].read_text())["rows"]
    for file in (*files, out / "config.json"):
        file.unlink()
    STAGES[stage]([*line, "--resume_from_checkpoint", "true"])
    assert all(torch.equal(value, load_file(files[0])[name]) for name, value in weights.items())
    assert tables == {file: file.read_bytes() for file in (out / "completions").iterdir()} and len(tables) == 3
    again = json.loads(files[1].read_text())["rows"]
    assert again[:-1] == rows[:-1] and again[-1]["step"] == 3  # the last has the time that it took


def test_the_checkpoint_of_a_signal_stays_beside_a_better_one(tmp_path, recipe, killed, capsys):
    """Of which `save_total_limit` keeps one when a run ends."""
    killed(3)
    with pytest.raises(SystemExit) as end:
        opsd(recipe("opsd", "out", save_strategy="steps", save_steps=1, save_total_limit=1, learning_rate=0.0))
    assert end.value.code == INTERRUPTED
    assert f"{tmp_path}/out/checkpoint-3" in capsys.readouterr().err
    folders = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert "checkpoint-3" in folders and len(folders) == 2  # and the best


def test_a_resumed_run_watches_as_one_that_was_left_alone(tmp_path, small_model, tokenizer, rows):
    """What the log does not say: single steps of a mean over two, whose completions were given, and what the probe found."""
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    given = rows.add_column("completion_ids", [completions[0]] * len(rows))
    options = {
        "learning_rate": 1e-4,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 2,
        "off_policy_steps": 1,
    }
    watched = []
    for folder in ("alone", "resumed"):
        options |= {"output_dir": str(tmp_path / folder), "num_generations": 1, "save_total_limit": 2, "max_steps": 8}
        with same_rollouts(completions):
            reward = falling(1.0, 5, 0.75)
            for resume_from in [None] if folder == "alone" else [None, str(tmp_path / folder / "checkpoint-4")]:
                trainer = build(tmp_path, small_model(0), tokenizer, given, reward_funcs=reward, **options)
                trainer.alarms.probed = None if resume_from else (32, 31)
                if folder == "resumed" and resume_from is None:
                    trainer.add_callback(StopAfter(4))
                trainer.train(resume_from_checkpoint=resume_from)
        state = trainer.alarms.state_dict()
        watched.append([state, trainer.alarms._correct_at_start(), Path(trainer.state.best_model_checkpoint).name])
        assert len(state["correct"]) == len(state["lengths"]) == 8 and math.isnan(state["lengths"][0])
    assert json.dumps(watched[0]) == json.dumps(watched[1])
    # Kept by the resumed run too, when it wrote its next one
    assert (tmp_path / "alone" / watched[0][2]).is_dir() and (tmp_path / "resumed" / watched[0][2]).is_dir()


class StopAfter(TrainerCallback):
    """Ends a run after a step, whose checkpoint is there."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, recipe, killed):
    killed(6)
    opsd(recipe("opsd", "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def dying(completions, trainer_state, **kwargs):
    """Of two processes one is killed in the second step, as by a machine that has no memory left."""
    if os.environ.get("RANK") == "1" and trainer_state.global_step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return even(completions, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_process_does_not_outlive_another_by_a_minute(tmp_path, recipe, stage):
    rewards = ["math_reward", "test_resuming.dying"]
    line = recipe(
        stage, "out", reward_funcs=rewards, per_device_train_batch_size=2, save_strategy="steps", save_steps=1
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Each by itself, as on two machines: a launcher would end the other one
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    shared["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"trl_opsd.{stage}", *line],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / f"err-{rank}").open("w"),
        )
        for rank in range(2)
    ]
    assert processes[1].wait(timeout=600) == -signal.SIGKILL, (tmp_path / "err-1").read_text()
    assert processes[0].wait(timeout=60) == 1
    # The bar of the progress is drawn once more behind it
    text = (tmp_path / "err-0").read_text()
    (error,) = [line for line in text.splitlines() if line.startswith("error: Another process of the run has died")]
    assert error.endswith(
        f"go on from the last checkpoint with `--resume_from_checkpoint {tmp_path}/out/checkpoint-1`."
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("world_size, words", [(1, "Connection closed by peer"), (2, "shape mismatch")])
def test_other_errors_stay_what_they_are(tmp_path, world_size, words):
    def fail(resume_from_checkpoint):
        raise RuntimeError(words)

    args = SimpleNamespace(world_size=world_size, output_dir=str(tmp_path))
    trainer = SimpleNamespace(args=args, accelerator=None, add_callback=lambda callback: None, train=fail)
    with pytest.raises(RuntimeError, match=words):
        train(trainer, None)
    args.world_size, words = 2, "[pair.cc:553] Connection closed by peer [127.0.0.1]:8075."
    with pytest.raises(SystemExit, match="Another process of the run has died, .*there is no checkpoint yet"):
        train(trainer, None)


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


@pytest.mark.parametrize(
    ("accelerate", "sharding", "is_adapter", "refused"),
    [
        ("1.14.0", "launcher", True, True),
        ("1.14.0", "option", True, True),
        ("1.15.0", "launcher", True, False),
        ("1.14.0", None, True, False),
        ("1.14.0", "launcher", False, False),
    ],
)
def test_an_adapter_in_shards_needs_an_accelerate_that_loads_them(
    whole, tmp_path, monkeypatch, accelerate, sharding, is_adapter, refused
):
    """Before 1.15 the first process alone got it back (tests/test_sharded.py has the weights)."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: accelerate)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharding == "launcher").lower())
    folder = whole(2)
    if is_adapter:
        (folder / "adapter_config.json").write_text("{}")
    args = SimpleNamespace(process_index=0, resume_from_checkpoint="true", output_dir=str(tmp_path))
    args.fsdp_plugin_args = {"fsdp_version": 2} if sharding == "option" else None
    with pytest.raises(ValueError, match="install accelerate 1.15 or newer") if refused else contextlib.nullcontext():
        assert resuming.agreed_checkpoint(args) == str(folder)


def test_only_the_main_process_reads_a_checkpoint(tmp_path, monkeypatch):
    """The others take its word, also that the one that was asked for is broken."""
    args = types.SimpleNamespace(
        process_index=0,
        resume_from_checkpoint=str(tmp_path / "gone"),
        output_dir=str(tmp_path),
        fsdp_plugin_args=None,
    )
    sent = []
    monkeypatch.setattr(resuming, "broadcast_object_list", lambda objects: sent.append(list(objects)))
    with pytest.raises(ValueError, match="cannot be resumed from") as told:
        resuming.agreed_checkpoint(args)
    args.resume_from_checkpoint = "true"
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert resuming.agreed_checkpoint(args) == str(tmp_path / "checkpoint-2")

    def receive(objects):
        objects[:] = sent.pop(0)

    args.process_index = 1
    monkeypatch.setattr(resuming, "broadcast_object_list", receive)
    monkeypatch.setattr(resuming, "find_checkpoint", lambda *args: pytest.fail("it was read again"))
    with pytest.raises(ValueError) as heard:
        resuming.agreed_checkpoint(args)
    assert str(heard.value) == str(told.value)
    assert resuming.agreed_checkpoint(args) == str(tmp_path / "checkpoint-2")


def test_a_file_that_the_main_process_cannot_read_ends_all_of_them(monkeypatch):
    def denied(*args):
        raise PermissionError("Permission denied: 'optimizer.pt'")

    sent = []
    monkeypatch.setattr(resuming, "find_checkpoint", denied)
    monkeypatch.setattr(resuming, "broadcast_object_list", lambda objects: sent.append(list(objects)))
    with pytest.raises(ValueError, match=r"optimizer\.pt"):
        resuming.agreed_checkpoint(SimpleNamespace(process_index=0, resume_from_checkpoint=True, output_dir="out"))
    assert sent == [[None, "Permission denied: 'optimizer.pt'"]]


def test_what_the_main_process_finds_is_looked_for_by_no_other(monkeypatch):
    sent = []
    monkeypatch.setattr(resuming, "broadcast_object_list", lambda objects: sent.append(list(objects)))
    assert resuming.agreed(SimpleNamespace(process_index=0), lambda: [3]) == [3]

    def refused():
        raise ValueError("row 3")

    with pytest.raises(ValueError, match="^row 3$"):
        resuming.agreed(SimpleNamespace(process_index=0), refused)

    def receive(objects):
        objects[:] = sent.pop(0)

    monkeypatch.setattr(resuming, "broadcast_object_list", receive)
    assert resuming.agreed(SimpleNamespace(process_index=1), lambda: pytest.fail("it looked itself")) == [3]
    with pytest.raises(ValueError, match="^row 3$"):
        resuming.agreed(SimpleNamespace(process_index=1), lambda: pytest.fail("it looked itself"))


@pytest.mark.parametrize("is_in_processor", [False, True])
def test_what_is_saved_pads_no_batch(tmp_path, tokenizer, is_in_processor):
    """A run that went on after its last step has padded none, and leaves the same files."""
    tokenizer(["1", "1+2="], padding=True, truncation=True, max_length=3)
    processor = tokenizer
    if is_in_processor:
        processor = type("Processor", (ProcessorMixin,), {"__init__": lambda self: None})()
        processor.tokenizer = tokenizer

    def save_model(folder):
        tokenizer.save_pretrained(folder)
        Path(folder, "config.json").write_text("{}")

    accelerator = SimpleNamespace(wait_for_everyone=lambda: None, is_main_process=True)
    args = SimpleNamespace(output_dir=str(tmp_path))
    save_final(SimpleNamespace(args=args, processing_class=processor, save_model=save_model, accelerator=accelerator))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (saved["padding"], saved["truncation"]) == (None, None)
    assert (tmp_path / "config.json").is_file()
