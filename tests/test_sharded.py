"""
The same numbers however the work is cut up: rows, accumulation steps, processes, shards of the weights.

Rollouts are fixed and written by nobody, so that every run trains on the same ones. One pair of processes runs all cases
of a backend (tests/sharded_worker.py), because starting it takes longer than they do.
"""

import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_opsd.opsd.__main__ import main
from trl_opsd.opsd.teacher import ADAPTER
from trl_opsd.tiny import TinyConfig, make_model


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "recipes" / "accelerate_configs"

# One step for each: of the eight rows all are trained on; some; none of the last four, which are those of the second
# process; none at all; and some again, after a step that must have left no trace
GATES = ["11111111", "01011010", "11110000", "00000000", "01100111"]
NOTHING = GATES.index("00000000")

WEIGHTS = [(lora, teacher) for lora in (False, True) for teacher in ("initial", "ema", "snapshot", "external")]
CASES = {f"{'lora' if lora else 'full'}-{teacher}": {"lora": lora, "teacher": teacher} for lora, teacher in WEIGHTS}
CASES |= {
    "tied": {"model": "tied", "teacher": "initial"},
    "checkpointing": {"lora": True, "teacher": "initial", "gradient_checkpointing": True},
    "evaluated": {"teacher": "snapshot", "eval": True},
}
EQUAL = list(CASES)
CASES |= {
    "bf16": {"teacher": "external", "bf16": True},
    "full-whole": {"teacher": "ema", "save_steps": 2, "save": True},
    "full-resumed": {"teacher": "ema", "resume": "full-whole/checkpoint-2"},
    "lora-whole": {"lora": True, "teacher": "ema", "save_steps": 2, "save": True},
    "lora-resumed": {"lora": True, "teacher": "ema", "resume": "lora-whole/checkpoint-2"},
    "full-rlvr": {"teacher": None, "save": True},
    "lora-rlvr": {"lora": True, "teacher": None, "save": True},
    "dead": {"teacher": "external", "external": "dead"},
}
# Half of the cases cut the four rows of a process into two accumulation steps
SHAPES = {name: (4, 1) if i % 2 == 0 else (2, 2) for i, name in enumerate(CASES)}
SHAPES["full-rlvr"] = SHAPES["lora-rlvr"] = (4, 1)

# Under ZeRO-3 in bfloat16, where the average is kept in float32, each process its shards of it
HALF = {
    f"{kind}-{run}": CASES[f"{kind}-{run}"] | {"half": True, "save_steps": 2}
    for kind in ("full", "lora")
    for run in ("whole", "resumed")
}

# What transformers then logs is the norm of the shards that a process has: `item` of a tensor in shards is of those
NORMS_OF_SHARDS = Version(torch.__version__) < Version("2.9")

deepspeed = pytest.mark.deepspeed
BACKENDS = ["ddp", "fsdp2", pytest.param("zero2", marks=deepspeed), pytest.param("zero3", marks=deepspeed)]


# ---------------------------------------------------------------------------------------------------------------------
# The configurations say what they are for
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_key(path):
    config = load_config_from_file(str(path))  # which refuses keys it does not know, of the first level
    known = {action.dest for action in launch_command_parser()._actions}
    for key in config.fsdp_config:
        assert key in known
    for key in config.deepspeed_config:
        assert key in known


@pytest.mark.parametrize(
    "name, kind, processes, machines, sharding",
    [
        ("single_gpu", "NO", 1, 1, None),
        ("ddp", "MULTI_GPU", 8, 1, None),
        ("fsdp2", "FSDP", 8, 1, 2),
        ("zero2", "DEEPSPEED", 8, 1, 2),
        ("zero3", "DEEPSPEED", 8, 1, 3),
        ("multi_node", "FSDP", 16, 2, 2),
        ("cpu_ddp", "MULTI_GPU", 2, 1, None),
        ("cpu_fsdp2", "FSDP", 2, 1, 2),
        ("cpu_zero2", "DEEPSPEED", 2, 1, 2),
        ("cpu_zero3", "DEEPSPEED", 2, 1, 3),
    ],
)
def test_a_configuration_is_what_its_name_says(name, kind, processes, machines, sharding):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert {**config.fsdp_config, **config.deepspeed_config}.get(
        "fsdp_version" if kind == "FSDP" else "zero_stage"
    ) == sharding
    assert config.mixed_precision == ("no" if name.startswith("cpu_") else "bf16")
    # With it, accelerate launches one process, whatever `num_processes` says
    assert not config.use_cpu
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"  # or nothing is saved at the end
    if sharding == 3:
        assert config.deepspeed_config["zero3_save_16bit_model"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_tested_configuration_is_the_one_for_gpus(name):
    ours, tested = (yaml.safe_load((CONFIGS / f"{prefix}{name}.yaml").read_text()) for prefix in ("", "cpu_"))
    for config in (ours, tested):
        del config["num_processes"], config["mixed_precision"]
    assert ours == tested


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    for seed, name, changes in (
        (0, "student", {}),
        (0, "tied", {"tie_word_embeddings": True}),
        (1, "teacher", {"hidden_size": 48, "num_layers": 3}),
        (1, "dead", {}),
    ):
        model = make_model(TinyConfig(**{**sizes, **changes}), tokenizer, seed)
        with torch.no_grad():
            model.lm_head.weight.mul_(0 if name == "dead" else 4)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


class Runs(dict):
    """
    Results of all cases, by the name of a backend. `one` is one process, with a batch of eight rows, and of one row in
    eight accumulation steps.
    """

    def __init__(self, models, folder):
        self.models, self.folder = models, folder

    def __missing__(self, backend):
        output = self.folder / backend
        output.mkdir(exist_ok=True)  # of one that failed, what it says is said again
        shapes, all_cases = SHAPES, CASES
        if backend == "zero3 bf16":
            shapes, all_cases = dict.fromkeys(HALF, (4, 1)), HALF
        if backend == "one":
            shapes = dict.fromkeys([*EQUAL, "bf16"], (8, 1)) | {f"{name} in steps": (1, 8) for name in EQUAL}
        cases = [
            {"name": name, "gates": GATES, "per_device": per_device, "accumulation": accumulation}
            | all_cases[name.removesuffix(" in steps")]
            for name, (per_device, accumulation) in shapes.items()
            if name != "bf16" or not backend.startswith("zero")
        ]
        torch.save(cases, output / "cases.pt")
        command = [sys.executable]
        if backend != "one":
            name, *precision = backend.split()
            config = CONFIGS / f"cpu_{name}.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
            command += ["--mixed_precision", *precision] if precision else []
        command += [str(TESTS / "sharded_worker.py"), "--cases", str(output / "cases.pt")]
        command += ["--models", str(self.models), "--output", str(output)]
        device = {"DS_ACCELERATOR": "cpu"} if backend.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
        environment = {**os.environ, **device, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        self[backend] = torch.load(output / "results.pt", weights_only=False)
        return self[backend]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    return Runs(models, tmp_path_factory.mktemp("runs"))


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: name + text)


def assert_same_logs(ours, theirs, cut_up, backend=None):
    """Every number but those of time; with `cut_up`, but those that the base class averages over pieces of a batch."""
    assert len(ours) == len(theirs)
    for our_log, their_log in zip(ours, theirs, strict=True):
        assert our_log.keys() >= their_log.keys() - {"entropy"}
        for name, value in their_log.items():
            by_piece = name in ("entropy", "eval_loss") and cut_up
            if by_piece or name == "step_time" or name.endswith(("_runtime", "_per_second")):
                continue
            if name == "grad_norm" and (their_log["opsd/kept"] == 0 or (backend == "fsdp2" and NORMS_OF_SHARDS)):
                continue  # DeepSpeed has that of the last step that it took
            assert our_log[name] == pytest.approx(value, rel=1e-4, abs=2e-6, nan_ok=True), (name, their_log["step"])


def assert_trained(run):
    """What makes the comparison one: the weights moved, and the rows and the gate were those that we mean."""
    kept = [log["opsd/kept"] for log in run["logs"] if "opsd/kept" in log]
    assert kept == [gate.count("1") / 8 for gate in GATES]
    for step, (before, after) in enumerate(zip(run["steps"], run["steps"][1:], strict=False)):
        names = [name for name in before if f".{ADAPTER}." not in name]
        moved = max((after[name] - before[name]).abs().max().item() for name in names)
        assert moved == 0 if step == NOTHING else moved > 5e-4
    norms = [log["grad_norm"] for log in run["logs"] if "grad_norm" in log]
    assert min(norms[:NOTHING] + norms[NOTHING + 1 :]) > 0.1


def test_the_processes_and_shards_are_there(runs, backend):
    wrapper, held, zero_stage = {
        "ddp": ("DistributedDataParallel", 1, 0),
        "fsdp2": ("FSDP", 0.5, 0),
        "zero2": ("DeepSpeedEngine", 1, 2),
        "zero3": ("DeepSpeedEngine", 0.5, 3),
    }[backend]
    assert len(runs[backend]) >= len(CASES) - 1
    for run in runs[backend].values():
        assert run["num_processes"] == 2
        assert run["wrapper"].startswith(wrapper)
        assert run["zero_stage"] == zero_stage
        assert run["held"] == pytest.approx(held, abs=0.01)
        assert run["teacher_held"] is None or run["teacher_held"] == pytest.approx(held, abs=0.01)
        assert run["rank_difference"] == 0
    with_copy = [name for name, run in runs[backend].items() if run["teacher_held"] is not None]
    assert {"full-initial", "full-ema", "full-snapshot", "full-external", "lora-external"} <= set(with_copy)
    assert not {"lora-initial", "lora-ema", "lora-snapshot"} & set(with_copy)


@pytest.mark.parametrize("case", EQUAL)
def test_one_process_gives_the_same_in_eight_steps(runs, case):
    one, steps = runs["one"][case], runs["one"][f"{case} in steps"]
    assert_trained(one)
    assert_same_logs(steps["logs"], one["logs"], cut_up=True)
    for ours, theirs in zip(steps["steps"], one["steps"], strict=True):
        assert_same_weights(ours, theirs)
    assert_same_weights(steps["teacher"], one["teacher"])


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_give_the_same(runs, backend, case):
    one, two = runs["one"][case], runs[backend][case]
    assert_trained(two)
    assert_same_logs(two["logs"], one["logs"], SHAPES[case] != (4, 1) or "eval" in CASES[case], backend)
    for ours, theirs in zip(two["steps"], one["steps"], strict=True):
        assert_same_weights(ours, theirs)
    assert_same_weights(two["teacher"], one["teacher"])


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])  # transformers refuses bfloat16 under DeepSpeed on a CPU
def test_mixed_precision_gives_nearly_the_same(runs, backend):
    # In the first step. After it one process has bfloat16 weights where FSDP2 keeps them in float32
    ours, theirs = (runs[name]["bf16"]["logs"][0] for name in (backend, "one"))
    norm = [] if backend == "fsdp2" and NORMS_OF_SHARDS else ["grad_norm"]
    for name in ("loss", *norm, "opsd/kl", "opsd/student_entropy", "opsd/teacher_entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.03), name


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_goes_on_with_its_teacher(runs, backend, kind):
    if (backend, kind) == ("fsdp2", "lora") and Version(version("accelerate")) < Version("1.15"):
        pytest.skip(
            "accelerate gives the adapter back to one process alone, and our command lines refuse to go on with that"
        )
    whole, resumed = runs[backend][f"{kind}-whole"], runs[backend][f"{kind}-resumed"]
    assert len(resumed["steps"]) == len(whole["steps"]) - 2
    # The adapters of student and teacher, or the student. What is recorded after a step is the teacher of before it, so
    # at the start of the resumed run, which has that of after it, there is nothing to compare it with
    for step, (ours, theirs) in enumerate(zip(resumed["steps"], whole["steps"][2:], strict=True)):
        names = [name for name in theirs if step > 0 or f".{ADAPTER}." not in name]
        assert_same_weights({name: ours[name] for name in names}, {name: theirs[name] for name in names})
    assert_same_weights(resumed["teacher"], whole["teacher"])
    assert_same_logs(resumed["logs"], whole["logs"], cut_up=True)

    folder = runs.folder / backend / f"{kind}-whole" / "checkpoint-2"
    assert not (folder / "teacher").exists()
    saved = load_file(folder / "teacher.safetensors")
    moving = [name for name in whole["steps"][0] if kind == "full" or ".default." in name]
    assert set(saved) == set(moving)
    for name in moving:
        assert saved[name].shape == whole["steps"][0][name].shape


@deepspeed
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_average_in_bf16_is_one_in_float32_under_zero3(runs, kind):
    """Computed again from the student's weights after each step, and gone on with after a checkpoint."""
    whole = runs["zero3 bf16"][f"{kind}-whole"]
    assert whole["zero_stage"] == 3 and whole["held"] == pytest.approx(0.5, abs=0.01)
    names = [name for name in whole["steps"][0] if kind == "full" or ".default." in name]
    assert names and all(value.dtype == torch.bfloat16 for value in whole["steps"][0].values())
    saved = {
        run: load_file(runs.folder / "zero3 bf16" / f"{kind}-{run}" / f"checkpoint-{step}" / "teacher.safetensors")
        for run, step in (("whole", 2), ("resumed", 4))
    }
    saved["whole to the end"] = load_file(
        runs.folder / "zero3 bf16" / f"{kind}-whole" / "checkpoint-4" / "teacher.safetensors"
    )
    for run, step in (("whole", 2), ("whole to the end", 4), ("resumed", 4)):
        for name in names:
            average = whole["steps"][0][name].float()
            for number, student in enumerate(whole["steps"][1 : step + 1]):
                if number != NOTHING:
                    average = average.lerp(student[name].float(), 0.5)
            torch.testing.assert_close(saved[run][name], average, rtol=1e-6, atol=0)
    rounded = sum((average != average.bfloat16()).any() for average in saved["whole"].values())
    assert rounded > len(names) / 2  # else it could as well have been kept in bfloat16


@pytest.mark.parametrize("kind", ["full-whole", "lora-whole", "full-rlvr", "lora-rlvr"])
def test_the_saved_model_is_the_trained_one(runs, backend, kind):
    run, folder = runs[backend][kind], runs.folder / backend / kind
    if kind.startswith("full"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()
        expected = run["steps"][-1]
    else:
        loaded = load_file(folder / "adapter_model.safetensors")
        last = {name: value for name, value in run["steps"][-1].items() if ".default." in name}
        expected = {name.replace(".default.", "."): value for name, value in last.items()}
    assert set(expected) <= set(loaded)
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_rlvr_trains(runs, backend, kind):
    run = runs[backend][f"{kind}-rlvr"]
    assert len(run["steps"]) == 3
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in run["logs"])
    assert max((run["steps"][-1][name] - value).abs().max() for name, value in run["steps"][0].items()) > 1e-3


def test_a_dead_teacher_ends_the_run_before_a_step(runs, backend):
    run = runs[backend]["dead"]
    assert "The teacher is dead: in step 1" in run["alarm"]
    assert_same_weights(run["steps"][1], run["steps"][0])


@pytest.mark.parametrize("kind", ["FSDP", pytest.param("DeepSpeed", marks=deepspeed)])
def test_a_probe_is_refused_before_a_model_is_loaded(models, tmp_path, monkeypatch, capsys, kind):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")  # as accelerate launch says it
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "1 a:+1", "answer": "2"}\n' * 8)
    options = {"model_name_or_path": models / "student", "dataset_name": data, "output_dir": tmp_path / "out"}
    options |= {
        "teacher_prompt_template": "{prompt} concise",
        "gate": "all",
        "bf16": "false",
        "report_to": "none",
        "max_completion_length": 64,
    }
    if kind == "FSDP":
        options |= {"use_cpu": "true"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: The probe") and kind in error and "`probe_prompts: 0`" in error
    with pytest.raises(AssertionError, match="a model was loaded"):
        main([*words, "--probe_prompts", "0"])
