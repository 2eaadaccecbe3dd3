"""
Training on rollouts that vLLM writes (bash scripts/test.sh -m vllm): the command lines as a user runs them, and that the
engine has the weights of the student at every step.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from trl.import_utils import is_vllm_available

from trl_opsd import OPSDConfig, OPSDTrainer, RLVRConfig, RLVRTrainer


ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not is_vllm_available(), reason="bash scripts/test.sh -m vllm")]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CPU = not torch.cuda.is_available()

# One process and little memory, on a CPU; elsewhere these are not read
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# Dropout, which TRL sets to 0.05 where nothing is said, is part of the policy that is trained and not of the engine's
ADAPTER = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_dropout", "0.0"]
MISMATCH = "sampling/sampling_logp_difference/max"
ENDS = (2, 30)  # the tokenizer's, and one more of the model's


def make(folder: Path, tokenizer, tied: bool = False) -> str:
    """A checkpoint that knows nothing, with heads of a size that vLLM has kernels for, whose rollouts end now and then."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=list(ENDS), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer, rows) -> Path:
    folder = tmp_path_factory.mktemp("vllm-training")
    make(folder / "untied", tokenizer)
    make(folder / "tied", tokenizer, tied=True)
    rows.to_json(folder / "rows.jsonl")
    return folder


def environment() -> dict[str, str]:
    """That of a user, who has launched nothing."""
    given = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    own = {name: value for name, value in os.environ.items() if name not in given}
    return {**own, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command(stage: str, world: Path, output: Path, *more: str, model: str = "untied") -> list[str]:
    """Arguments of a stage on the recipe of the tiny reasoner, a few steps long, each of which changes the model a lot."""
    options = {
        "model_name_or_path": str(world / model),
        "dataset_name": str(world / "rows.jsonl"),
        "output_dir": str(output),
        "reward_funcs": "vllm_worker.even",
        "per_device_train_batch_size": "16",
        "num_generations": "4",
        "max_completion_length": "40",
        "max_steps": "4",
        "learning_rate": "0.02",
        "lr_scheduler_type": "constant",
        "logging_steps": "1",
        "use_cpu": str(CPU),
        "use_vllm": "true",
        "vllm_max_model_length": "256",
        "log_engine_mismatch": "true",
    }
    if stage == "opsd":
        options |= {"probe_prompts": "8", "alarm_correct_drop": "1.0", "max_generation_rounds": "2"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["--config", f"recipes/tiny/{stage}.yaml", *arguments, *more]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500
    )


def log_of(output: Path, stage: str) -> list[dict]:
    return [row for row in json.loads((output / f"{stage}.json").read_text())["rows"] if MISMATCH in row]


# -- the command lines


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["rlvr", "opsd"])
def test_the_command_lines_end_well_and_every_step_is_on_policy(tmp_path, world, stage, lora):
    """
    What the engine thinks of its tokens is what the student thinks of them at the same step, after updates that change
    both a lot: its weights are new, whole, and in the training's precision. With the gate, and several rollouts of a
    prompt in several rounds.
    """
    done = run("-m", f"trl_opsd.{stage}", *command(stage, world, tmp_path / "out", *(ADAPTER if lora else [])))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Model saved to {tmp_path / 'out'}." in done.stdout
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert (tmp_path / "out" / ("adapter_model.safetensors" if lora else "model.safetensors")).is_file()
    log = log_of(tmp_path / "out", stage)
    assert len(log) == 4
    assert all(row[MISMATCH] < 1e-3 and 0 <= row["sampling/kl"] < 1e-6 for row in log)
    if stage == "opsd":
        assert all(row["opsd/kept"] > row["opsd/correct"] > 0 for row in log)  # some were asked again
        assert {row["opsd/generation_rounds"] for row in log} == {2}


def test_bfloat16_is_generated_in_bfloat16(tmp_path, world):
    more = ["--bf16", "true", "--max_steps", "2", "--probe_prompts", "0"]
    done = run("-m", "trl_opsd.opsd", *command("opsd", world, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    log = log_of(tmp_path / "out", "opsd")
    assert all(1e-4 < row[MISMATCH] < 1 for row in log)  # two ways of rounding, and one model


@pytest.mark.parametrize("stage", ["rlvr", "opsd"])
def test_two_processes(tmp_path, world, stage):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", f"trl_opsd.{stage}"]
    more = ["--per_device_train_batch_size", "8", "--ddp_backend", "gloo", "--max_steps", "2"]
    done = run(*launch, *command(stage, world, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    log = log_of(tmp_path / "out", stage)
    assert len(log) == 2 and all(row[MISMATCH] < 1e-3 for row in log)
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert args.distributed_state.num_processes == 2


# -- weights, ends and seeds


def build(kind, world, output, tokenizer, rows, lora=False, model="untied", **changes):
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 24,
        "learning_rate": 0.0,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": CPU,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_vllm": True,
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_max_model_length": 256,
        "generation_kwargs": {"temperature": 0.0},  # greedy: in TRL's options it must be positive
        "save_strategy": "no",
        **changes,
    }
    if kind == "opsd":
        config, trainer, own = OPSDConfig, OPSDTrainer, {"teacher_prompt_template": "{prompt} concise", "gate": "all"}
    else:
        config, trainer, own = RLVRConfig, RLVRTrainer, {"bank_rollouts_per_prompt": 0}
    return trainer(
        model=str(world / model),
        reward_funcs=lambda completions, **_: [float(len(c[0]["content"]) % 2 == 0) for c in completions],
        args=config(**{**own, **settings}),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )


@pytest.fixture
def started():
    """Trainers whose engine ends with the test."""
    trainers = []
    yield lambda trainer: trainers.append(trainer) or trainer
    for trainer in trainers:
        trainer.vllm_generation.close()


def prompts_of(rows, tokenizer, number=16) -> list[list[int]]:
    texts = [row["prompt"] for row in rows.select(range(number))]
    return tokenizer.apply_chat_template(texts, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def by_transformers(model, prompts, tokenizer, max_new_tokens=24) -> list[list[int]]:
    """Greedy, one at a time and without padding."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(ENDS),
                    pad_token_id=tokenizer.pad_token_id,
                ),
            )
        found.append(output[0, len(prompt) :].tolist())
    return found


def by_engine(trainer, prompts) -> list[list[int]]:
    if isinstance(trainer, RLVRTrainer):
        return trainer._generate_single_turn(prompts, None, {}, 1)[0]
    return trainer._generate_single_turn(prompts, None, {})


def destroy(model) -> None:
    """An update after which hardly a token is the same."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)


@pytest.mark.parametrize(
    "kind, lora, model",
    [("opsd", False, "untied"), ("opsd", False, "tied"), ("opsd", True, "untied"), ("rlvr", True, "untied")],
)
@pytest.mark.parametrize("sleeps", [False, pytest.param(True, marks=needs_gpu)], ids=["", "asleep"])
def test_after_a_destructive_update_the_engine_has_the_new_weights(
    tmp_path, world, tokenizer, rows, started, kind, lora, model, sleeps
):
    trainer = started(build(kind, world, tmp_path, tokenizer, rows, lora, model, vllm_enable_sleep_mode=sleeps))
    prompts = prompts_of(rows, tokenizer)
    before = by_engine(trainer, prompts)
    assert before == by_transformers(trainer.model, prompts, tokenizer)
    destroy(trainer.model)
    trainer.state.global_step += 1
    after = by_engine(trainer, prompts)
    assert after == by_transformers(trainer.model, prompts, tokenizer)
    same = [a[:8] == b[:8] for a, b in zip(before, after, strict=True)]
    assert sum(same) < len(same) / 4
    # Asked once more in the same step, as a further round does
    assert by_engine(trainer, prompts) == after


def test_after_a_resume_the_engine_has_the_weights_of_the_checkpoint(tmp_path, world, tokenizer, rows, started):
    options = {"learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    first = started(build("opsd", world, tmp_path, tokenizer, rows, max_steps=2, **options))
    first.train()
    first.vllm_generation.close()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    untrained = AutoModelForCausalLM.from_pretrained(world / "untied")

    second = build("opsd", world, tmp_path, tokenizer, rows, max_steps=2, **options)
    written, generate = [], second.vllm_generation.generate

    def recorded(prompts, *args, **kwargs):
        outputs = generate(prompts, *args, **kwargs)
        written.append((prompts, outputs[1]))
        return outputs

    second.vllm_generation.generate = recorded
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    started(second)
    ((prompts, completions),) = written  # of the one step that was left
    assert list(map(list, completions)) == by_transformers(student, prompts, tokenizer)
    assert list(map(list, completions)) != by_transformers(untrained, prompts, tokenizer)


def test_a_rollout_ends_where_the_trainer_says_and_else_is_truncated(tmp_path, world, tokenizer, rows, started):
    trainer = started(build("opsd", world, tmp_path, tokenizer, rows, generation_kwargs=None))
    assert sorted(trainer.eos_token_ids) == sorted(ENDS)
    completions = by_engine(trainer, prompts_of(rows, tokenizer, 64) * 4)
    assert {ids[-1] for ids in completions if len(ids) < 24} == set(ENDS)
    assert all(end not in ids[:-1] for ids in completions for end in ENDS)
    assert any(len(ids) == 24 and ids[-1] not in ENDS for ids in completions)
    trainer.args.max_steps = 1
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "opsd/correct" in row]
    assert row["completions/max_length"] <= 24 and row["opsd/correct"] <= 1 - row["completions/clipped_ratio"]


def test_the_seed_of_the_training_is_that_of_the_rollouts(tmp_path, world, tokenizer, rows, started):
    prompts, written = prompts_of(rows, tokenizer), []
    for seed in (3, 4, 3):
        trainer = build("opsd", world, tmp_path, tokenizer, rows, generation_kwargs=None, seed=seed)
        written.append(by_engine(trainer, prompts))
        trainer.vllm_generation.close()
    assert written[0] == written[2] != written[1]


# -- accidents


def the_last_checkpoint_is_whole(output: Path, done: subprocess.CompletedProcess, what: str) -> None:
    assert done.returncode == 1, done.stderr[-3000:]
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert what in last and f"--resume_from_checkpoint {output / 'checkpoint-2'}`." in last
    assert not (output / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_engine_that_dies(tmp_path, world):
    saves = ["--save_strategy", "steps", "--save_steps", "1", "--max_generation_rounds", "1", "--probe_prompts", "0"]
    arguments = command("opsd", world, tmp_path / "out", *saves)
    done = run("tests/vllm_worker.py", "opsd", "engine dies", *arguments)
    the_last_checkpoint_is_whole(tmp_path / "out", done, "failed: RuntimeError: EngineCore encountered an issue.")
    done = run("-m", "trl_opsd.opsd", *arguments, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(log_of(tmp_path / "out", "opsd")) == 4


@pytest.fixture(scope="module")
def server(world):
    """What TRL's guide says to start, in float32."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # not the `vllm` command, which fails where the distribution is vllm-cpu
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world / "untied")]
    arguments += ["--port", str(port), "--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
    arguments += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    arguments += ["--weight-transfer-config", '{"backend": "nccl"}']
    with (world / "server.log").open("w") as log:
        process = subprocess.Popen(
            arguments, stdout=log, stderr=log, env={**environment(), "VLLM_SERVER_DEV_MODE": "1"}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(900):
                assert process.poll() is None, (world / "server.log").read_text()[-3000:]
                try:
                    requests.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except requests.RequestException:
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def at(server: str) -> list[str]:
    return ["--vllm_mode", "server", "--vllm_server_base_url", server, "--vllm_server_timeout", "20"]


@pytest.mark.parametrize("stage", ["rlvr", "opsd"])
def test_a_server_writes_the_rollouts(tmp_path, world, server, stage):
    """Up to the transfer of the weights, which takes a GPU: it still has those of the start."""
    more = [*at(server), "--max_steps", "1", "--learning_rate", "0.0"]
    done = run("tests/vllm_worker.py", stage, "server", *command(stage, world, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = log_of(tmp_path / "out", stage)
    assert row[MISMATCH] < 1e-3
    assert "computes in" not in done.stderr


def test_a_server_of_another_precision_is_warned_of(tmp_path, world, server):
    more = [*at(server), "--max_steps", "1", "--bf16", "true", "--probe_prompts", "0"]
    done = run("tests/vllm_worker.py", "opsd", "server", *command("opsd", world, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The vLLM server computes in float32 and the training in bfloat16" in done.stderr + done.stdout


def test_a_server_that_goes_away(tmp_path, world, server):
    more = [*at(server), "--save_strategy", "steps", "--save_steps", "1"]
    more += ["--max_generation_rounds", "1", "--probe_prompts", "0"]
    done = run("tests/vllm_worker.py", "opsd", "server goes", *command("opsd", world, tmp_path / "out", *more))
    the_last_checkpoint_is_whole(tmp_path / "out", done, "failed: ConnectionError")


def test_a_server_that_is_not_there(tmp_path, world):
    more = ["--vllm_mode", "server", "--vllm_server_base_url", "http://127.0.0.1:9", "--vllm_server_timeout", "1"]
    done = run("tests/vllm_worker.py", "opsd", "server", *command("opsd", world, tmp_path / "out", *more))
    assert done.returncode == 1 and "did not start: ConnectionError: The vLLM server can't be reached" in done.stderr


@pytest.mark.skipif(not CPU, reason="what a machine without a GPU says")
@pytest.mark.parametrize("option", ["vllm_mode", "vllm_enable_sleep_mode"])
def test_what_takes_a_gpu_is_said_before_a_model_is_loaded(tmp_path, world, option):
    value = "server" if option == "vllm_mode" else "true"
    done = run("-m", "trl_opsd.opsd", *command("opsd", world, tmp_path / "out", f"--{option}", value))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: `{option}") and not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: one trains, one serves")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["rlvr", "opsd"])
def test_the_weights_reach_the_server(tmp_path, world, server, stage, lora):
    more = [*at(server), *(ADAPTER if lora else [])]
    arguments = ["-m", f"trl_opsd.{stage}", *command(stage, world, tmp_path / "out", *more)]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment(), "CUDA_VISIBLE_DEVICES": "1"},  # the server has the first
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = log_of(tmp_path / "out", stage)
    assert len(log) == 4 and all(row[MISMATCH] < 1e-2 for row in log)


# -- a real model


@pytest.mark.slow
def test_smollm2_with_lora(tmp_path):
    """Two steps of OPSD on sums: after each of them the engine has the adapter's weights, at the level of bfloat16."""
    run("scripts/smollm2.py", "--output_dir", str(tmp_path / "smollm2")).check_returncode()
    sums = [(a, b) for a in range(10, 18) for b in (3, 5)]
    rows = [{"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)} for a, b in sums]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": str(tmp_path / "smollm2"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "teacher_prompt_template": "{prompt} Be as brief as possible.",
        "gate": "all",
        "reward_funcs": "vllm_worker.even",
        "per_device_train_batch_size": "4",
        "max_completion_length": "24",
        "max_steps": "3",
        "learning_rate": "1e-3",
        "logging_steps": "1",
        "probe_prompts": "0",
        "use_cpu": str(CPU),
        "use_vllm": "true",
        "vllm_max_model_length": "256",
        "use_peft": "true",
        "lora_target_modules": "all-linear",
        "log_engine_mismatch": "true",
        "dtype": "bfloat16",
        "save_strategy": "no",
        "report_to": "none",
    }
    done = run("-m", "trl_opsd.opsd", *[part for name, value in options.items() for part in (f"--{name}", value)])
    assert done.returncode == 0, done.stderr[-3000:]
    log = log_of(tmp_path / "out", "opsd")
    assert len(log) == 3 and all(row["sampling/kl"] < 0.01 for row in log)
    assert log[0]["opsd/kl"] > log[-1]["opsd/kl"] > 0
