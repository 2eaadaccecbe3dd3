"""vLLM against transformers, token by token (bash scripts/test.sh -m vllm)."""

import dataclasses
import os
import socket
import subprocess
import sys
import time

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trl_opsd.evaluate import EvaluateConfig, evaluate
from trl_opsd.evaluate.backends import (
    Request,
    Sampling,
    ServerEngine,
    StartedServer,
    TransformersEngine,
    VllmEngine,
)


pytestmark = pytest.mark.vllm

KWARGS = {"enforce_eager": True, "max_model_len": 256}
# One process and little memory, on a CPU; elsewhere these are not read
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A model with heads of a size that vLLM has kernels for, and logits that are far enough apart."""
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
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("vllm") / "checkpoint"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, checkpoint):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("vllm") / "adapter"
    model.save_pretrained(folder)
    return str(folder)


def config(checkpoint, **kwargs):
    return EvaluateConfig(
        model_name_or_path=checkpoint, dataset_name="x", backend="vllm", dtype="float32", vllm_kwargs=KWARGS, **kwargs
    )


@pytest.fixture(scope="module")
def asked(rows, tokenizer):
    texts = [row["prompt"] for row in rows.select(range(12))]
    ids = tokenizer.apply_chat_template(texts, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    return [Request(prompt, seed) for seed, prompt in enumerate(ids)]


def greedy(tokenizer, max_tokens=24):
    return Sampling(0.0, 1.0, 0, max_tokens, (tokenizer.eos_token_id,))


def by_transformers(path, asked, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return dict(TransformersEngine(model, tokenizer.pad_token_id, 5).generate(asked, greedy(tokenizer)))


def test_tokens_are_those_of_transformers(checkpoint, asked, tokenizer):
    engine = VllmEngine(config(checkpoint))
    engine.reset_peak_memory()
    found = dict(engine.generate(asked, greedy(tokenizer)))
    assert engine.peak_memory() > 100e6  # of the workers, which on one CPU are this process
    assert found == by_transformers(checkpoint, asked, tokenizer)
    ended = [ids[-1] == tokenizer.eos_token_id for ids in found.values()]
    assert any(ended) and len(set(map(tuple, found.values()))) > 6  # the token that ends it is there, and counts

    mark = tokenizer.decode(found[0][3:5])
    for by in (engine, TransformersEngine(AutoModelForCausalLM.from_pretrained(checkpoint), 0, 5, tokenizer)):
        stopped = dict(by.generate(asked[:3], dataclasses.replace(greedy(tokenizer), stop=(mark,))))
        assert stopped[0] == found[0][:5]  # with the tokens that made the text whole

    limited = [dataclasses.replace(request, max_tokens=2) for request in asked[:2]]
    assert [len(ids) for _, ids in engine.generate(limited, greedy(tokenizer))] == [2, 2]

    sampling = Sampling(1.0, 0.9, 20, 24, (tokenizer.eos_token_id,), min_p=0.02)
    first, again = (dict(engine.generate(asked, sampling)) for _ in range(2))
    other = dict(engine.generate([Request(r.prompt_ids, r.seed + 100) for r in asked], sampling))
    assert first == again != other

    events = []
    engine.serve(asked, greedy(tokenizer), 3, lambda i: events.append((i, 0)), lambda i: events.append((i, 1)))
    assert {i: events.count((i, 1)) for i in found} == {i: len(ids) for i, ids in found.items()}
    started = [sum(1 for event in events[:p] if event[1] == 0) for p, event in enumerate(events) if event[1] == 1]
    assert started[0] == 3  # three under way before the first token
    engine.close()


def test_an_adapter_after_its_base_in_one_run(checkpoint, adapter, rows, tokenizer, tmp_path):
    rows.select(range(12)).to_json(tmp_path / "rows.jsonl")
    texts = {}
    for backend in ("vllm", "transformers"):
        measured = evaluate(
            EvaluateConfig(
                checkpoints=[f"base={checkpoint}", f"adapter={adapter}"],
                tasks=[str(tmp_path / "rows.jsonl")],
                prompt_only=False,
                backend=backend,
                dtype="float32",
                vllm_kwargs=KWARGS,
                max_completion_length=24,
                concurrency=[2],
                serving_requests=4,
                output=str(tmp_path / backend / "r.json"),
            ),
            progress=lambda done, total: None,
        )
        assert [row["serving"][0]["requests"] for row in measured] == [4, 4]
        texts[backend] = (tmp_path / backend / "r.completions.jsonl").read_text()
    assert texts["vllm"] == texts["transformers"]
    lines = texts["vllm"].splitlines()
    assert len(lines) == 24 and lines[:12] != [line.replace("adapter", "base") for line in lines[12:]]


def test_a_running_server(checkpoint, asked, tokenizer, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # not the `vllm` command, which fails where the distribution is vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                try:
                    requests.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except requests.RequestException:
                    time.sleep(1)
            engine = ServerEngine(url, None, 4)
            assert dict(engine.generate(asked, greedy(tokenizer))) == by_transformers(checkpoint, asked, tokenizer)
        finally:
            process.terminate()
            process.wait(60)


def test_a_server_that_is_started(checkpoint, adapter, asked, tokenizer):
    for path in (checkpoint, adapter):
        given = EvaluateConfig(
            model_name_or_path=path, dataset_name="x", backend="server", dtype="float32", vllm_kwargs=KWARGS
        )
        engine = StartedServer(given)
        try:
            assert dict(engine.generate(asked, greedy(tokenizer))) == by_transformers(path, asked, tokenizer)
        finally:
            engine.close()
        assert engine.process.poll() is not None
