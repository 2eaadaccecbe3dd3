"""Many checkpoints × tasks, the cache, adapters, the meter, and a server."""

import importlib.machinery
import json
import os
import shutil
import socket
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_world import Adder, make_model, make_tokenizer, save_checkpoint, sum_rows, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from trl_opsd.cli import UserError
from trl_opsd.data import SOURCES
from trl_opsd.evaluate import EvaluateConfig, evaluate
from trl_opsd.evaluate import checkpoint as checkpoints
from trl_opsd.evaluate.backends import (
    Request,
    Sampling,
    ServerEngine,
    StartedServer,
    TransformersEngine,
    VllmEngine,
    load_engine,
)
from trl_opsd.evaluate.backends.server import ChatFormat, base_url, served_model
from trl_opsd.evaluate.backends.started import server_options
from trl_opsd.evaluate.checkpoint import count_checkpoint, open_checkpoint, weights_bytes
from trl_opsd.evaluate.memory import WorkerMemory, peak_memory, reset_peak_memory
from trl_opsd.evaluate.plan import expand, plan, problem_ids
from trl_opsd.evaluate.serving import bench_serving, measure_serving
from trl_opsd.evaluate.tasks import TASKS, find_task
from trl_opsd.evaluate.thinking import ThinkingTags
from trl_opsd.rewards import logic_reward


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def problems(tmp_path):
    return write_rows(tmp_path / "sums.jsonl", sum_rows())


@pytest.fixture
def adder(monkeypatch):
    """Makes an [`Adder`] stand in for every checkpoint, and tells which were loaded."""

    def install(limit=None):
        loaded = []

        def load_engine(config, checkpoint, tokenizer):
            loaded.append(config.model_name_or_path)
            return Adder(limit)

        monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", load_engine)
        return loaded

    return install


def same(rows):
    """What must not depend on when and how often a run was interrupted."""
    timed = ("wall_s", "generation_s", "peak_memory_bytes", "cached", "cache_lines_skipped")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


class TestRuns:
    def test_checkpoints_by_tasks_with_the_baseline_that_costs_nothing(self, checkpoint, problems, tmp_path, adder):
        loaded = adder()
        other = save_checkpoint(tmp_path / "other", seed=1)
        rows = evaluate(
            EvaluateConfig(
                checkpoints=[f"before={checkpoint}", other],
                tasks=[f"{problems}[:3]", "reasoning-gym:basic_arithmetic:size=2"],
                decoding=["greedy"],
                max_completion_length=9,
            ),
            progress=lambda done, total: None,
        )
        assert [(row["stage"], row["task"], row["n"]) for row in rows] == [
            (stage, task, n)
            for stage in ("before", "prompt-only", "other")
            for task, n in ((problems, 3), ("reasoning-gym:basic_arithmetic", 2))
        ]
        assert [row["prompt"] for row in rows] == ["plain"] * 2 + ["concise"] * 2 + ["plain"] * 2
        assert loaded == [checkpoint, other]  # once each
        assert [row["accuracy"] for row in rows[::2]] == [1.0] * 3

    def test_a_task_brings_its_values_and_options_override_them(self):
        config = EvaluateConfig(checkpoints=["c"], tasks=["aime24", "humaneval", "x.jsonl[:7]"], num_samples=3)
        aime, code, other = expand(config)
        assert (aime.dataset_split, aime.decoding, aime.temperature) == ("train", ["sampled"], 0.6)
        assert (aime.num_samples, code.reward_funcs, code.max_completion_length) == (3, ["code_reward"], 16384)
        assert (other.dataset_name, other.max_samples, other.task) == ("x.jsonl", 7, "x.jsonl")
        assert (other.decoding, other.max_completion_length, aime.max_samples) == (["greedy"], 1024, None)

    def test_every_task_is_a_source_with_its_verifier(self):
        for name, task in TASKS.items():
            if name in SOURCES:
                assert (SOURCES[name].verifier,) == task.reward_funcs and task.dataset_split in SOURCES[name].splits
        assert find_task("bbh:word_sorting")[0] == "bbh:word_sorting" and find_task("bbh:a/folder")[0] == "bbh"
        with pytest.raises(UserError, match="`dapo-math-17k` is a source to train on"):
            find_task("dapo-math-17k")

    @pytest.mark.parametrize(
        ("checkpoints", "message"), [(["a=x", "a=y"], "a label twice"), (["x/a", "y/a"], "a label twice")]
    )
    def test_labels_are_told_apart(self, checkpoints, message):
        with pytest.raises(ValueError, match=message):
            expand(EvaluateConfig(checkpoints=checkpoints, tasks=["gsm8k"]))

    def test_a_subset_takes_from_every_part(self):
        (config,) = expand(
            EvaluateConfig(model_name_or_path="x", tasks=[f"bbh:{SHARED / 'bbh'}[:54]"], decoding=["greedy"])
        )
        from trl_opsd.evaluate.plan import load_task

        parts = load_task(config)[0]["task"]
        assert len(set(parts)) == 27 and {parts.count(part) for part in parts} == {2}

    def test_several_samples(self, checkpoint, problems, tmp_path):
        config = EvaluateConfig(
            model_name_or_path=checkpoint,
            dataset_name=problems,
            decoding=["sampled", "greedy"],
            num_samples=4,
            max_completion_length=5,
            output=str(tmp_path / "a" / "r.json"),
        )
        sampled, greedy = evaluate(config, progress=lambda done, total: None)
        assert (sampled["samples"], greedy["samples"], sampled["n"]) == (4, 1, 4)
        assert {"pass@2", "pass@4"} <= set(sampled) and "maj@4" not in sampled  # nothing was boxed
        records = [json.loads(line) for line in (tmp_path / "a" / "r.completions.jsonl").open()]
        drawn = [record for record in records if record["decoding"] == "sampled"]
        assert [record["sample"] for record in drawn] == [0, 1, 2, 3] * 4
        for name in {record["id"] for record in drawn}:
            assert len({record["completion"] for record in drawn if record["id"] == name}) > 1
        assert len({record["seed"] for record in drawn}) == 16

    def test_votes_are_counted_as_the_verifier_compares(self, checkpoint, tmp_path, monkeypatch):
        class Voter(Adder):
            def completion(self, prompt_ids):
                answers = ("07", "7", "8", "8", "007")
                return self.tokenizer(rf"\boxed{{{answers[self.answered % 5]}}}<eos>")["input_ids"]

        monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: Voter())
        problems = write_rows(tmp_path / "sums.jsonl", sum_rows()[:1])  # 3 + 4
        config = {"decoding": ["sampled"], "num_samples": 5, "max_completion_length": 6}
        (row,) = evaluate(
            EvaluateConfig(model_name_or_path=checkpoint, dataset_name=problems, **config),
            progress=lambda done, total: None,
        )
        assert (row["accuracy"], row["maj@5"]) == (0.6, 1.0)

    def test_problems_keep_their_names(self):
        from datasets import Dataset

        rows = sum_rows()
        names = problem_ids(Dataset.from_list(rows))
        again = problem_ids(Dataset.from_list([rows[2], rows[0], rows[2]]))
        assert again == [names[2], names[0], names[2] + "-2"]
        # Of a message's keys files have one order, and older versions of datasets another
        turned = [{**row, "prompt": [dict(reversed(turn.items())) for turn in row["prompt"]]} for row in rows]
        assert list(turned[0]["prompt"][0]) != list(rows[0]["prompt"][0])
        assert problem_ids(turned) == problem_ids(rows) == names
        # Where another row has a key, Arrow gives it to all of them
        more = [{**row, "prompt": [{**turn, "name": None} for turn in row["prompt"]]} for row in rows]
        assert problem_ids(more) == names


class TestCache:
    def config(self, checkpoint, problems, tmp_path, **kwargs):
        kwargs = {"decoding": ["sampled"], "num_samples": 3, "max_completion_length": 6, "batch_size": 5} | kwargs
        return EvaluateConfig(
            model_name_or_path=checkpoint, dataset_name=problems, cache_dir=str(tmp_path / "cache"), **kwargs
        )

    def rows(self, *args, **kwargs):
        return evaluate(self.config(*args, **kwargs), progress=lambda done, total: None)

    def test_nothing_is_generated_twice(self, checkpoint, problems, tmp_path, adder):
        first = self.rows(checkpoint, problems, tmp_path)
        loaded = adder()
        again = self.rows(checkpoint, problems, tmp_path)
        assert loaded == [] and again[0]["cached"] == 12 and first[0]["cached"] == 0
        assert same(first) == same(again)
        assert first[0]["generation_s"] > 0 and first[0]["peak_memory_bytes"] > 0
        assert (again[0]["generation_s"], again[0]["peak_memory_bytes"]) == (None, None)  # no speed of this run

    def test_an_interrupted_run_goes_on_to_the_same_end(self, checkpoint, problems, tmp_path, monkeypatch):
        whole = self.rows(checkpoint, problems, tmp_path / "whole")
        batch, calls = TransformersEngine._batch, []

        def interrupted(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return batch(self, *args, **kwargs)

        monkeypatch.setattr(TransformersEngine, "_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.rows(checkpoint, problems, tmp_path)
        rest = self.rows(checkpoint, problems, tmp_path)
        assert rest[0]["cached"] == 10 and len(calls) == 4
        assert same(rest) == same(whole)

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"max_completion_length": 7}]
        + [{"dtype": "bfloat16"}, {"prompt_template": "{prompt} x"}, {"decoding": ["greedy"]}],
    )
    def test_what_decides_a_completion_is_in_the_key(self, checkpoint, problems, tmp_path, change):
        self.rows(checkpoint, problems, tmp_path)
        assert self.rows(checkpoint, problems, tmp_path, **change)[0]["cached"] == 0

    @pytest.mark.parametrize(
        "change",
        [
            {"vllm_kwargs": {"quantization": "fp8"}},
            {"vllm_kwargs": {"max_model_len": 64}},
            {"trust_remote_code": True},
        ],
    )
    def test_what_vllm_is_told_is_in_the_key(self, checkpoint, problems, tmp_path, adder, change):
        adder()
        first = {"backend": "vllm", "vllm_kwargs": {"max_model_len": 128}}
        assert [self.rows(checkpoint, problems, tmp_path, **first)[0]["cached"] for _ in range(2)] == [0, 12]
        assert self.rows(checkpoint, problems, tmp_path, **(first | change))[0]["cached"] == 0

    def test_what_a_server_has_is_in_the_key(self, checkpoint, problems, tmp_path, server):
        asked = {"backend": "server", "server_url": server}
        FakeServer.models = {"quantised": "runs/fp8", "adapter": "runs/lora"}
        for name in FakeServer.models:
            assert self.rows(checkpoint, problems, tmp_path, server_model=name, **asked)[0]["cached"] == 0
        again = self.rows(checkpoint, problems, tmp_path, server_model="adapter", **asked)
        assert again[0]["cached"] == 12
        FakeServer.models = {"adapter": "runs/lora"}
        assert self.rows(checkpoint, problems, tmp_path, **asked)[0]["cached"] == 12  # the only one, not named
        FakeServer.models = {"adapter": "runs/other"}  # started again, with other weights under the same name
        assert self.rows(checkpoint, problems, tmp_path, **asked)[0]["cached"] == 0
        same_place = server.replace("127.0.0.1", "localhost")  # may be another server for all that is known
        assert self.rows(checkpoint, problems, tmp_path, backend="server", server_url=same_place)[0]["cached"] == 0

    @pytest.mark.parametrize("name", ["modeling_own.py", "hf_quant_config.json"])
    def test_files_that_change_what_a_folder_is(self, checkpoint, name):
        before = open_checkpoint(checkpoint).hash
        Path(checkpoint, name).write_text("{}")
        assert open_checkpoint(checkpoint).hash != before

    def test_an_adapter_on_the_hub_is_its_own_commit(self, checkpoint, monkeypatch):
        base, found = open_checkpoint(checkpoint), set()
        for commit in ("a" * 40, "b" * 40):
            file = f"/cache/models--me--adapter/snapshots/{commit}/adapter_config.json"
            monkeypatch.setattr(checkpoints, "find_adapter_config_file", lambda path, file=file: file)
            adapter = checkpoints.Checkpoint("me/adapter", base.generation_config, 9, 9, 9, 9, base=base)
            found.add(adapter.hash)
        assert len(found) == 2

    def test_another_checkpoint_in_the_same_place(self, checkpoint, problems, tmp_path):
        self.rows(checkpoint, problems, tmp_path)
        before = open_checkpoint(checkpoint).hash
        save_checkpoint(Path(checkpoint), seed=1)
        assert open_checkpoint(checkpoint).hash != before
        assert self.rows(checkpoint, problems, tmp_path)[0]["cached"] == 0

    def test_rescoring_needs_no_model(self, checkpoint, problems, tmp_path, adder):
        adder()
        self.rows(checkpoint, problems, tmp_path)
        adder(limit=0)
        rows = sum_rows()
        rows[0]["answer"] = "8"  # the key was wrong
        write_rows(Path(problems), rows)
        (row,) = self.rows(checkpoint, problems, tmp_path, rescore=True)
        assert (row["accuracy"], row["cached"]) == (0.75, 12)
        with pytest.raises(UserError, match="12 of 12 completions of .* are not in"):
            self.rows(checkpoint, problems, tmp_path, rescore=True, seed=7)

    def test_a_line_that_was_cut_damages_no_other(self, checkpoint, problems, tmp_path):
        whole = self.rows(checkpoint, problems, tmp_path)
        (file,) = (tmp_path / "cache").iterdir()
        file.write_bytes(file.read_bytes()[:-9])
        cut = self.rows(checkpoint, problems, tmp_path)
        assert (cut[0]["cached"], cut[0]["cache_lines_skipped"]) == (11, 1)
        again = self.rows(checkpoint, problems, tmp_path)
        assert (again[0]["cached"], again[0]["cache_lines_skipped"]) == (12, 1)
        assert same(whole) == same(cut) == same(again)


class TestCheckpoints:
    @pytest.fixture
    def adapter(self, checkpoint, tmp_path):
        torch.manual_seed(5)
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    def test_an_adapter_is_what_it_merges_to(self, checkpoint, adapter, problems, tmp_path):
        merged = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(checkpoint), adapter
        ).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        make_tokenizer().save_pretrained(tmp_path / "merged")
        config = EvaluateConfig(
            checkpoints=[f"base={checkpoint}", f"lora={adapter}", f"merged={tmp_path / 'merged'}"],
            tasks=[problems],
            prompt_only=False,
            max_completion_length=12,
            output=str(tmp_path / "out" / "r.json"),
        )
        rows = evaluate(config, progress=lambda done, total: None)
        records = [json.loads(line) for line in (tmp_path / "out" / "r.completions.jsonl").open()]
        texts = {row["stage"]: [r["completion"] for r in records if r["stage"] == row["stage"]] for row in rows}
        assert texts["lora"] == texts["merged"] != texts["base"]
        base, lora, merged = rows
        added = sum(p.numel() for name, p in _adapter_weights(adapter))
        assert lora["parameters"] == base["parameters"] + added == merged["parameters"] + added
        assert lora["weights_bytes"] > base["weights_bytes"]
        assert len({row["checkpoint_hash"] for row in rows}) == 3

    def test_weights_are_read_once(self, checkpoint, adapter, problems, monkeypatch):
        read, folders = checkpoints.read_folder, []
        monkeypatch.setattr(checkpoints, "read_folder", lambda *args: folders.append(args[1]) or read(*args))
        config = EvaluateConfig(
            checkpoints=[f"base={checkpoint}", f"lora={adapter}"], tasks=[problems, f"{problems}[:1]"]
        )
        assert len(evaluate(config, progress=lambda done, total: None)) == 6  # with the baseline that costs nothing
        assert folders == [checkpoint, adapter]

    def test_size(self, checkpoint):
        model = make_model(make_tokenizer())
        total = sum(parameter.numel() for parameter in model.parameters())
        outer = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
        assert count_checkpoint(checkpoint) == {
            "parameters": total,
            "non_embedding_parameters": total - outer,
            "active_parameters": total - outer,
        }
        assert 4 * total < weights_bytes(checkpoint) < 4 * total + 4096

    @pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig])
    def test_of_experts_those_that_a_token_is_sent_to_are_active(self, tmp_path, config_class):
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
        experts = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
        inner = {"intermediate_size": 24, "moe_intermediate_size": 24}
        config_class(vocab_size=32, **sizes, **experts, **inner).save_pretrained(tmp_path)
        counts = count_checkpoint(str(tmp_path))
        # gate, up and down of six of eight experts in each of three layers
        assert counts["non_embedding_parameters"] - counts["active_parameters"] == 3 * 6 * 3 * 16 * 24

    def test_what_a_trainer_left_beside_the_weights_is_none_of_them(self, checkpoint):
        counts, size, digest = (
            count_checkpoint(checkpoint),
            weights_bytes(checkpoint),
            open_checkpoint(checkpoint).hash,
        )
        # Its arguments, the state of its optimizer, and a teacher that followed the student
        for name in ("training_args.bin", "optimizer.pt", "optimizer.bin"):
            (Path(checkpoint) / name).write_bytes(b"x" * 99)
        (Path(checkpoint) / "teacher.safetensors").write_bytes((Path(checkpoint) / "model.safetensors").read_bytes())
        assert count_checkpoint(checkpoint) == counts
        assert weights_bytes(checkpoint) == size and open_checkpoint(checkpoint).hash == digest

    @pytest.mark.parametrize(
        ("options", "bits"),
        [
            ({}, 32.0),
            ({"dtype": "bfloat16"}, 16.0),
            ({"backend": "vllm"}, 16.0),  # which halves float32 by itself
            ({"backend": "vllm", "dtype": "float32"}, 32.0),
            ({"backend": "vllm", "vllm_kwargs": {"max_num_seqs": 8}}, 16.0),
            ({"backend": "vllm", "vllm_kwargs": {"quantization": "fp8"}}, None),
            ({"backend": "server", "server_url": "http://localhost:1"}, None),
        ],
    )
    def test_bits_of_a_weight_are_those_that_serve(self, checkpoint, problems, options, bits):
        config = EvaluateConfig(model_name_or_path=checkpoint, dataset_name=problems, **options)
        assert open_checkpoint(checkpoint).weight_bits(config) == bits

    def test_tied_embeddings_count_once(self, tmp_path):
        model = make_model(make_tokenizer())
        model.config.tie_word_embeddings = True
        model.config.save_pretrained(tmp_path)
        counts = count_checkpoint(str(tmp_path))
        assert counts["parameters"] - counts["non_embedding_parameters"] == model.lm_head.weight.numel()


class TestStored:
    """What both backends refuse before they load it."""

    @pytest.fixture
    def fake_vllm(self, monkeypatch):
        """vLLM as far as its constructor, and what that was given."""
        started = []
        modules = {name: types.ModuleType(name) for name in ("vllm", "vllm.lora.request", "vllm.sampling_params")}
        modules["vllm"].SamplingParams = modules["vllm.sampling_params"].RequestOutputKind = object
        modules["vllm"].__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        modules["vllm"].LLM = lambda **kwargs: started.append(kwargs) or types.SimpleNamespace(llm_engine=None)
        modules["vllm.lora.request"].LoRARequest = lambda *args: args
        for name, module in {**modules, "vllm.lora": types.ModuleType("vllm.lora")}.items():
            monkeypatch.setitem(sys.modules, name, module)
        return started

    @pytest.fixture
    def adapter(self, checkpoint, tmp_path):
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    @pytest.mark.parametrize("backend", ["transformers", "vllm"])
    @pytest.mark.parametrize("loaded", ["checkpoint", "adapter"])
    @pytest.mark.parametrize("damaged", ["checkpoint", "adapter"])
    @pytest.mark.parametrize(
        ("damage", "message"),
        [("missing", "lacks the weight"), ("nan", "not finite in"), ("inf", "not finite in")]
        + [("extra", "does not have"), ("shape", "cannot be loaded"), (None, None)],
    )
    def test_damaged_weights(
        self, checkpoint, adapter, problems, fake_vllm, backend, loaded, damaged, damage, message
    ):
        path, file = Path(checkpoint), "model.safetensors"
        if damaged == "adapter":
            path, file = Path(adapter), "adapter_model.safetensors"
        weights = load_file(path / file)
        name = sorted(weights)[-1]
        if damage == "missing":
            del weights[name]
        elif damage == "extra":
            weights[name.replace("1", "7").replace("model.norm", "model.other")] = weights[name].clone()
        elif damage == "shape":
            weights[name] = weights[name][:-1].clone()
        elif damage is not None:
            weights[name].view(-1)[-1] = float(damage)
        save_file(weights, path / file, metadata={"format": "pt"})
        model = checkpoint if loaded == "checkpoint" else adapter
        config = EvaluateConfig(model_name_or_path=model, dataset_name=problems, backend=backend)
        (job,) = plan(config)  # which reads no weights
        if damage is None or (damaged == "adapter" and loaded == "checkpoint"):
            load_engine(config, job.checkpoint, job.tokenizer)
            assert [kwargs["model"] for kwargs in fake_vllm] == [checkpoint] * (backend == "vllm")
            assert all(kwargs["worker_extension_cls"].endswith(".memory.WorkerMemory") for kwargs in fake_vllm)
        else:
            with pytest.raises(UserError, match=f"`{path}` .*{message}"):
                load_engine(config, job.checkpoint, job.tokenizer)
            assert fake_vllm == []

    def test_older_files(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        (Path(checkpoint) / "model.safetensors").unlink()
        for zipped in (True, False):
            torch.save(
                model.state_dict(), Path(checkpoint) / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
            )
            open_checkpoint(checkpoint).check_loadable()
        model.lm_head.weight.data[0, 0] = torch.nan
        torch.save(model.state_dict(), Path(checkpoint) / "pytorch_model.bin")
        with pytest.raises(UserError, match="not finite in `lm_head.weight`"):
            open_checkpoint(checkpoint).check_loadable()

    def test_the_weights_of_a_quantised_checkpoint_are_named_by_its_quantiser(self, checkpoint):
        file = Path(checkpoint) / "config.json"
        quantised = {**json.loads(file.read_text()), "quantization_config": {"quant_method": "compressed-tensors"}}
        file.write_text(json.dumps(quantised))
        weights = {
            f"{name}_packed": weight for name, weight in load_file(Path(checkpoint, "model.safetensors")).items()
        }
        save_file(weights, Path(checkpoint, "model.safetensors"), metadata={"format": "pt"})
        open_checkpoint(checkpoint).check_loadable()
        weights["lm_head.weight_packed"][0, 0] = torch.inf
        save_file(weights, Path(checkpoint, "model.safetensors"), metadata={"format": "pt"})
        with pytest.raises(UserError, match="not finite in `lm_head.weight_packed`"):
            open_checkpoint(checkpoint).check_loadable()


def _adapter_weights(adapter):
    return load_file(Path(adapter) / "adapter_model.safetensors").items()


class FakeEngine:
    """
    Answers in simulated time: the first token of a request after `first` seconds, each further one after `gap`, its
    first call slower by `cold`. `lengths` are the tokens of each request.
    """

    def __init__(self, lengths, first=0.5, gap=0.1, cold=100.0):
        self.lengths, self.first, self.gap, self.cold = lengths, first, gap, cold
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def serve(self, requests, sampling, concurrency, on_start, on_token):
        self.calls.append((len(requests), concurrency))
        self.now += self.cold
        self.cold = 0.0
        lanes, events = [self.now] * concurrency, []
        for index in range(len(requests)):
            lane = lanes.index(min(lanes))
            start = lanes[lane]
            events.append((start, 0, index, on_start))
            moments = [start + self.first + self.gap * token for token in range(self.lengths[index])]
            events += [(moment, 1, index, on_token) for moment in moments]
            lanes[lane] = moments[-1]
        for moment, _, index, call in sorted(events, key=lambda event: event[:3]):
            self.now = moment
            call(index)


class TestMeter:
    sampling = Sampling(0.0, 1.0, 0, 32, (1,))

    @pytest.mark.parametrize("concurrency", [1, 2, 4])
    def test_known_delays(self, concurrency):
        engine = FakeEngine([10] * 8)
        result = vars(measure_serving(engine, [Request([1], 0)] * 8, self.sampling, concurrency, engine.clock))
        rounds = 8 / concurrency
        assert engine.calls == [(concurrency, concurrency), (8, concurrency)]  # warm-up, then the measurement
        assert result == {
            "concurrency": concurrency,
            "requests": 8,
            "tokens": 80,
            "first_token_p50_s": pytest.approx(0.5),
            "first_token_p95_s": pytest.approx(0.5),
            "total_p50_s": pytest.approx(1.4),
            "total_p95_s": pytest.approx(1.4),
            "tokens_per_s": pytest.approx(80 / (rounds * 1.4)),
            "requests_per_s": pytest.approx(8 / (rounds * 1.4)),
            "meter": None,
            "correct": None,
            "correct_per_s": None,
        }

    def test_percentiles(self):
        lengths = list(range(1, 22))
        engine = FakeEngine(lengths, first=1.0, gap=1.0)
        result = vars(measure_serving(engine, [Request([1], 0)] * 21, self.sampling, 1, engine.clock))
        assert (result["total_p50_s"], result["total_p95_s"]) == (pytest.approx(11), pytest.approx(20))
        assert result["tokens_per_s"] == pytest.approx(1.0) and result["first_token_p95_s"] == pytest.approx(1.0)

    def test_transformers_serves_what_it_generates_in_batches_of_the_concurrency(self):
        tokenizer = make_tokenizer()
        engine = TransformersEngine(make_model(tokenizer), tokenizer.pad_token_id, 64)
        requests = [Request(tokenizer(text)["input_ids"], 0) for text in ("1+2=", "7-", "3+3+3=", "1", "9=")]
        sampling = Sampling(0.0, 1.0, 0, 12, (1, 7, 11))
        wanted = {index: len(ids) for index, ids in engine.generate(requests, sampling)}
        events = []
        engine.serve(
            requests, sampling, 2, lambda i: events.append(("start", i)), lambda i: events.append(("token", i))
        )
        counts = {index: events.count(("token", index)) for index in range(5)}
        assert counts == wanted and len(set(wanted.values())) > 1
        starts = [position for position, event in enumerate(events) if event[0] == "start"]
        assert [events[p][1] for p in starts] == [0, 1, 2, 3, 4]
        assert starts[1] == 1 and events[2][0] == "token" and starts[3] == starts[2] + 1

    def test_nothing_is_answered_from_the_cache_of_an_earlier_measurement(self, server):
        engine = ServerEngine(server, None, 2)
        for level in (1, 2):
            measure_serving(engine, [Request([5], 0)] * 3, self.sampling, level)
        list(engine.generate([Request([5], 0)], self.sampling))
        salts = [body.get("cache_salt") for body in FakeServer.bodies]
        # a warm-up of one and of two, each followed by three: alike within, and new for each
        parts = [salts[:1], salts[1:4], salts[4:6], salts[6:9], salts[9:]]
        assert [len(set(part)) for part in parts] == [1] * 5 == [len(parts[n]) > 0 for n in range(5)]
        assert len({part[0] for part in parts}) == 5 and salts[9:] == [None]

    def test_memory_is_that_of_the_processes_that_hold_the_model(self):
        engine, asked = object.__new__(VllmEngine), []
        workers = {"reset_worker_memory": [None, None], "worker_memory": [3, 4]}
        engine.engine = types.SimpleNamespace(collective_rpc=lambda name: asked.append(name) or workers[name])
        engine.reset_peak_memory()
        assert engine.peak_memory() == 7 and asked == list(workers)
        assert all(hasattr(WorkerMemory, name) for name in workers)

    def test_memory_of_a_row_is_its_own(self, checkpoint, problems, tmp_path, monkeypatch):
        held = {"greedy": 5, "sampled": 50}

        class Holds(Adder):
            peak = 0

            def generate(self, requests, sampling, done=()):
                self.peak = max(self.peak, held["sampled" if sampling.temperature else "greedy"])
                return super().generate(requests, sampling, done)

            def serve(self, requests, sampling, concurrency, on_start, on_token):
                self.peak = 1000
                for index in range(len(requests)):
                    on_start(index)
                    on_token(index)

            def reset_peak_memory(self):
                self.peak = 0

            def peak_memory(self):
                return self.peak

        monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: Holds())
        for order in (["greedy", "sampled"], ["sampled", "greedy"]):
            config = EvaluateConfig(
                model_name_or_path=checkpoint, dataset_name=problems, decoding=order, concurrency=[2]
            )
            rows = evaluate(config, progress=lambda done, total: None)
            assert {row["decoding"]: row["peak_memory_bytes"] for row in rows} == held

    def test_in_the_results(self, checkpoint, problems):
        config = EvaluateConfig(
            model_name_or_path=checkpoint,
            dataset_name=problems,
            decoding=["greedy", "sampled"],
            max_completion_length=4,
            concurrency=[1, 3],
            serving_requests=3,
        )
        greedy, sampled = evaluate(config, progress=lambda done, total: None)
        assert [level["concurrency"] for level in greedy["serving"]] == [1, 3] and sampled["serving"] == []
        for level in greedy["serving"]:
            assert level["requests"] == 3 and 3 <= level["tokens"] <= 12
            assert 0 < level["first_token_p50_s"] <= level["total_p50_s"] <= level["total_p95_s"]

    def test_peak_memory_sees_what_was_freed_and_starts_anew(self):
        reset_peak_memory()
        before = peak_memory()
        np.ones(50_000_000).sum()
        peak = peak_memory()
        reset_peak_memory()
        assert 390e6 < peak - before < 500e6 and peak_memory() < peak - 300e6


class FakeServer(BaseHTTPRequestHandler):
    """
    A vLLM server that repeats the last token of the prompt `repeat` times and ends with token 1. Asked by messages, it
    says `says`, piece by piece, after `thinks`, which it sends apart.
    """

    protocol_version = "HTTP/1.1"
    mode, repeat, delay, lock = "good", 3, 0.0, threading.Lock()
    under_way, most, bodies, keys, failures = 0, 0, [], [], 0
    thinks, says, counts = "", "", None

    def do_GET(self):
        self.keys.append(self.headers["Authorization"])
        models = [{"id": name, "root": root, "object": "model"} for name, root in self.models.items()]
        self.reply(json.dumps({"object": "list", "data": models}))

    models = {"served": "runs/served"}

    def do_POST(self):
        cls = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            cls.under_way += 1
            cls.most = max(cls.most, cls.under_way)
            cls.bodies.append(body)
            busy, cls.failures = cls.failures > 0, cls.failures - 1
        if busy:
            self.leave()
            self.reply("busy", {"busy": 503, "limited": 429}[self.mode])
        elif self.mode == "refuses":
            self.leave()
            self.reply("too long", 400)
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            events = self.completion(body) if self.path == "/v1/completions" else self.answer()
            for position, event in enumerate(events):
                time.sleep(self.delay)
                last = position == len(events) - 1
                if last:
                    self.leave()
                if self.mode == "text only":
                    del event["choices"][0]["token_ids"]
                if self.mode == "breaks off" and last:
                    break
                if self.mode == "hangs up" and last:
                    self.close_connection = True
                    return
                if self.mode == "errs" and last:
                    event = {"error": {"message": "out of memory", "code": 500}}
                self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

    def completion(self, body):
        tokens = [body["prompt"][-1]] * self.repeat + [1]
        ends = [None] * self.repeat + ["stop"]
        return [
            {"choices": [{"text": "x", "token_ids": [token], "finish_reason": end}]}
            for token, end in zip(tokens, ends, strict=True)
        ]

    def answer(self):
        deltas = [{"reasoning_content": self.thinks}] * bool(self.thinks) + [{"content": c} for c in self.says]
        events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        usage = {"completion_tokens": self.counts, "prompt_tokens": 1, "total_tokens": 1}
        return [*events, {"choices": [], "usage": usage}] if self.counts is not None else events

    def leave(self):
        # Before the client is told the last token: it may come back at once
        with self.lock:
            type(self).under_way -= 1

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def reply(self, text, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    FakeServer.mode, FakeServer.repeat, FakeServer.delay, FakeServer.models = "good", 3, 0.0, {"served": "runs/served"}
    FakeServer.under_way, FakeServer.most, FakeServer.bodies, FakeServer.keys = 0, 0, [], []
    FakeServer.failures, FakeServer.thinks, FakeServer.says, FakeServer.counts = 0, "", "", None
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


class TestServer:
    sampling = Sampling(0.5, 0.9, 7, 32, (1, 2))

    def test_token_ids_in_and_out(self, server):
        engine = ServerEngine(server, None, 2)
        found = dict(engine.generate([Request([5, 6], 11), Request([7], 12), Request([8], 13)], self.sampling, {1}))
        assert found == {0: [6, 6, 6, 1], 2: [8, 8, 8, 1]}
        body = next(body for body in FakeServer.bodies if body["prompt"] == [5, 6])
        assert body["model"] == "served" and body["stop_token_ids"] == [1, 2] and body["seed"] == 11
        assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.5, 0.9, 7, 32)

    def test_meter(self, server):
        FakeServer.delay = 0.04
        engine = ServerEngine(server + "/v1/", None, 2)
        result = vars(measure_serving(engine, [Request([5], 0)] * 6, self.sampling, 3))
        assert FakeServer.most == 3 and result["tokens"] == 24
        # four tokens, one every 0.04 s, each told when it comes
        assert 0.04 <= result["first_token_p50_s"] < 0.6 * result["total_p50_s"] and result["total_p50_s"] >= 0.16
        assert result["requests_per_s"] == pytest.approx(result["tokens_per_s"] / 4)
        assert result["requests_per_s"] <= 6 / 0.32

    @pytest.mark.parametrize(
        ("mode", "message"),
        [
            ("refuses", r"refuses a request \(400\): too long"),
            ("text only", "gives text and no token ids: ask it by `server_api: chat`"),
            ("breaks off", r"broke off an answer 3 times \(finish_reason None\)"),
            ("hangs up", r"broke off an answer 3 times"),
            ("errs", r"broke off an answer 3 times \(.*out of memory"),
        ],
    )
    def test_what_goes_wrong_is_told(self, server, mode, message):
        FakeServer.mode = mode
        with pytest.raises(UserError, match=message):
            list(ServerEngine(server, None, 2).generate([Request([5], 0)], self.sampling))

    def test_which_model(self, server, monkeypatch):
        with pytest.raises(UserError, match="has no model `other`: it lists served"):
            ServerEngine(server, "other", 2)
        FakeServer.models = {"a": "x", "b": "x"}
        with pytest.raises(UserError, match="lists a, b: name one"):
            ServerEngine(server, None, 2)
        monkeypatch.setattr("trl_opsd.evaluate.backends.server._RETRIES", 0)
        with pytest.raises(UserError, match="There is no server at http://127.0.0.1:9"):
            ServerEngine("http://127.0.0.1:9", None, 2)

    @pytest.mark.parametrize("mode", ["busy", "limited"])
    def test_what_is_refused_for_now_is_asked_again(self, server, mode):
        FakeServer.mode, FakeServer.failures = mode, 3
        assert dict(ServerEngine(server, None, 1).generate([Request([5], 0)], self.sampling)) == {0: [5, 5, 5, 1]}
        assert len(FakeServer.bodies) == 4

    def test_the_key_is_that_of_the_environment(self, server, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        served_model(server)
        assert FakeServer.keys == ["Bearer secret"]

    def test_addresses(self):
        for url, base in (
            ("http://localhost:8000", "http://localhost:8000/v1"),
            ("http://localhost:8000/", "http://localhost:8000/v1"),
            ("https://api.example.com/v1/", "https://api.example.com/v1"),
            ("https://api.example.com/v1beta/openai", "https://api.example.com/v1beta/openai"),
        ):
            assert base_url(url) == base

    @pytest.mark.parametrize("thinks", ["", "1+2"])
    def test_any_server_by_messages(self, server, checkpoint, problems, tmp_path, thinks):
        FakeServer.thinks, FakeServer.says = thinks, [r"\boxed{7", "}"]
        FakeServer.counts = 4 + len(thinks)
        config = EvaluateConfig(
            model_name_or_path=checkpoint,
            dataset_name=problems,
            backend="server",
            server_url=server,
            server_api="chat",
            system_prompt="x",
            stop=["?"],
            decoding=["sampled"],
            top_k=5,
            chat_template_kwargs={"terse": True},
            concurrency=[2],
            output=str(tmp_path / "r.json"),
        )
        (row,) = evaluate(config, progress=lambda done, total: None)
        # `\boxed{`, 7, `}` and the end, and thinking in its tags
        tokens = 4 + (2 + len(thinks) if thinks else 0)
        assert (row["accuracy"], row["truncated"], row["mean_tokens"]) == (0.25, 0.0, tokens)
        assert row["mean_thinking_tokens"] == (tokens - 4 if thinks else 0)
        body = next(body for body in FakeServer.bodies if body["messages"][1]["content"] == "12+5")
        assert body["messages"][0] == {"role": "system", "content": "x"} and body["stop"] == ["?"]
        assert body["top_k"] == 5 and "min_p" not in body and body["chat_template_kwargs"] == {"terse": True}
        # tokens as the server counts them, of four requests after an unmeasured two
        assert (row["serving"][0]["tokens"], len(FakeServer.bodies)) == (4 * FakeServer.counts, 4 + 2 + 4)

    def test_thinking_that_a_server_keeps_to_itself(self, server):
        FakeServer.says, FakeServer.counts = "7", 500
        chat = ChatFormat(make_tokenizer(), ThinkingTags())
        engine = ServerEngine(server, None, 1, chat)
        request = Request([5], 0, None, [{"role": "user", "content": "3+4"}])
        with pytest.raises(UserError, match="says that an answer has 500 tokens, and its text has 2"):
            list(engine.generate([request], self.sampling))

    def test_whole_evaluation(self, server, checkpoint, problems):
        FakeServer.repeat = 1
        config = EvaluateConfig(
            model_name_or_path=checkpoint, dataset_name=problems, backend="server", server_url=server
        )
        (row,) = evaluate(config, progress=lambda done, total: None)
        assert (row["backend"], row["mean_tokens"], row["truncated"]) == ("server", 2.0, 0.0)
        assert row["peak_memory_bytes"] is None and row["parameters"] > 0


class TestVllmBench:
    """The load that `vllm bench serve` makes, where vLLM is installed; here its command is a script that notes its options."""

    def test_measured_by_it(self, server, checkpoint, problems, tmp_path, monkeypatch):
        FakeServer.repeat = 1
        told = tmp_path / "told.json"
        script = tmp_path / "bench.py"
        script.write_text(BENCH.replace("TOLD", repr(str(told))))
        monkeypatch.setattr("trl_opsd.evaluate.serving.VLLM_BENCH", [sys.executable, str(script)])
        monkeypatch.setattr("trl_opsd.evaluate.run.has_vllm", lambda: True)
        config = EvaluateConfig(
            model_name_or_path=checkpoint,
            dataset_name=problems,
            backend="server",
            server_url=server,
            concurrency=[2, 4],
            decoding=["sampled"],
            top_p=0.5,
        )
        (row,) = evaluate(config, progress=lambda done, total: None)
        assert [level["concurrency"] for level in row["serving"]] == [2, 4]
        assert row["serving"][0] == {
            "concurrency": 2,
            "requests": 4,
            "tokens": 40,
            "first_token_p50_s": 0.05,
            "first_token_p95_s": 0.06,
            "total_p50_s": 0.5,
            "total_p95_s": 0.6,
            "tokens_per_s": 80.0,
            "requests_per_s": 8.0,
            # Of the four answers one is right and has ended, one is right and was cut
            "correct": 1,
            "correct_per_s": 2.0,
            "meter": "vllm bench serve",
        }
        calls = [json.loads(line) for line in told.read_text().splitlines()]
        options, prompts = calls[-1]
        assert prompts[0] == {"prompt": "3+4=", "output_tokens": 1024} and len(prompts) == 4
        assert options["--max-concurrency"] == "4" and options["--model"] == "served"
        assert options["--tokenizer"] == checkpoint and options["--base-url"] == server
        assert (options["--temperature"], options["--top-p"], options["--num-prompts"]) == ("1.0", "0.5", "4")
        body = json.loads(options["--extra-body"])
        assert body["stop_token_ids"] == [1] and body["cache_salt"]
        assert body["add_special_tokens"] is False  # those of the prompt are in its text
        assert len({json.loads(call[0]["--extra-body"])["cache_salt"] for call in calls}) == 2  # cold, each

    def test_a_benchmark_that_fails_says_why(self, server, checkpoint, problems, tmp_path, monkeypatch):
        FakeServer.repeat = 1
        (tmp_path / "bench.py").write_text("raise SystemExit('no such tokenizer')")
        monkeypatch.setattr("trl_opsd.evaluate.serving.VLLM_BENCH", [sys.executable, str(tmp_path / "bench.py")])
        monkeypatch.setattr("trl_opsd.evaluate.run.has_vllm", lambda: True)
        config = EvaluateConfig(
            model_name_or_path=checkpoint, dataset_name=problems, backend="server", server_url=server, concurrency=[1]
        )
        with pytest.raises(UserError, match="`vllm bench serve` failed: no such tokenizer"):
            evaluate(config, progress=lambda done, total: None)

    def test_requests_that_failed_are_no_measurement(self, monkeypatch, tmp_path):
        (tmp_path / "bench.py").write_text(
            BENCH.replace("TOLD", "'/dev/null'").replace('"completed": 4', '"completed": 3')
        )
        monkeypatch.setattr("trl_opsd.evaluate.serving.VLLM_BENCH", [sys.executable, str(tmp_path / "bench.py")])
        with pytest.raises(UserError, match="answered 3 of 4 requests"):
            bench_serving("http://x/v1", "m", make_tokenizer(), "t", [Request([5], 0)] * 4, TestServer.sampling, 2)


BENCH = r"""
import json, sys
ANSWERS = ["\\boxed{7}", "\\boxed{8}", "\\boxed{3}", ""]
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
prompts = [json.loads(line) for line in open(options["--dataset-path"])]
with open(TOLD, "a") as file:
    file.write(json.dumps([options, prompts]) + "\n")
with open(options["--result-dir"] + "/" + options["--result-filename"], "w") as file:
    json.dump({"completed": 4, "total_output_tokens": 40, "p50_ttft_ms": 50.0, "p95_ttft_ms": 60.0, "p50_e2el_ms": 500.0,
        "p95_e2el_ms": 600.0, "output_throughput": 80.0, "request_throughput": 8.0,
        "generated_texts": ANSWERS, "output_lens": [4, 1024, 4, 4]}, file)
"""


STARTED = r"""
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(TOLD, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")
with open(TOLD + ".worker", "w") as file:
    file.write(str(subprocess.Popen(["sleep", "600"]).pid))
if FAILS == "early":
    print("WARNING 11-26 this may cause OSError: too many files")
    print("(Worker pid=7) ERROR ValueError: no such quantisation")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")


class Server(BaseHTTPRequestHandler):
    def reply(self, text, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        model = {"id": options["--served-model-name"], "object": "model"}
        self.reply("" if self.path == "/health" else json.dumps({"object": "list", "data": [model]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if FAILS == "late":
            os.write(1, b"EngineDeadError: out of memory\n")  # in one piece: requests come side by side
            os._exit(1)
        choice = {"text": "x", "token_ids": [body["prompt"][-1], 1], "finish_reason": "stop"}
        self.reply("data: " + json.dumps({"choices": [choice]}) + "\n\ndata: [DONE]\n\n", "text/event-stream")

    def log_message(self, *args):
        pass


ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Server).serve_forever()
"""


class TestStartedServer:
    """vLLM's server, started on each checkpoint; here its command is a script that notes its options."""

    @pytest.fixture
    def started(self, tmp_path, monkeypatch):
        monkeypatch.setattr("trl_opsd.evaluate.plan.check_vllm", lambda *args: None)
        monkeypatch.setattr("trl_opsd.evaluate.run.has_vllm", lambda: False)  # and no load
        told, script = tmp_path / "told.json", tmp_path / "server.py"

        def start(fails: str | None = None):
            script.write_text(STARTED.replace("TOLD", repr(str(told))).replace("FAILS", repr(fails)))
            monkeypatch.setattr("trl_opsd.evaluate.backends.started._SERVER", [sys.executable, str(script)])
            return lambda: [json.loads(line) for line in told.read_text().splitlines()]

        return start

    def test_each_checkpoint_has_its_own_and_it_ends_with_it(self, started, checkpoint, problems, tmp_path):
        told = started()
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        save_file({k: v + 1 for k, v in load_file(copy / "model.safetensors").items()}, copy / "model.safetensors")
        config = EvaluateConfig(
            checkpoints=[f"before={checkpoint}", f"after={copy}"],
            prompt_only=False,
            dataset_name=problems,
            backend="server",
            dtype="float32",
            output=str(tmp_path / "r.json"),
        )
        before, after = evaluate(config, progress=lambda done, total: None)
        assert (before["stage"], before["mean_tokens"], after["backend"]) == ("before", 2.0, "server")
        assert [options[options.index("--model") + 1] for options in told()] == [checkpoint, str(copy)]
        for options in told():
            port = int(options[options.index("--port") + 1])
            with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
        # What it wrote is kept, and the server is not needed again
        again = evaluate(config, progress=lambda done, total: None)
        assert [row["cached"] for row in again] == [4, 4] and len(told()) == 2

    def test_one_that_does_not_start_says_why(self, started, checkpoint, problems):
        started(fails="early")
        config = EvaluateConfig(model_name_or_path=checkpoint, dataset_name=problems, backend="server")
        with pytest.raises(UserError, match=r"did not start \(ValueError: no such quantisation\)"):
            evaluate(config, progress=lambda done, total: None)

    def test_one_that_ends_in_the_middle_says_why(self, started, checkpoint, problems, monkeypatch):
        monkeypatch.setattr("trl_opsd.evaluate.backends.server._RETRIES", 0)
        started(fails="late")
        config = EvaluateConfig(model_name_or_path=checkpoint, dataset_name=problems, backend="server")
        with pytest.raises(UserError, match=r"vLLM's server has ended \(EngineDeadError: out of memory\)"):
            evaluate(config, progress=lambda done, total: None)

    def test_nothing_of_it_is_left_and_no_proxy_is_asked_for_it(self, started, checkpoint, tmp_path, monkeypatch):
        for name, value in {"http_proxy": "http://127.0.0.1:9", "no_proxy": "b", "NO_PROXY": "b"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("trl_opsd.evaluate.backends.started._PATIENCE", 10)
        started()
        config = EvaluateConfig(model_name_or_path=checkpoint, dataset_name="x", backend="server")
        for _ in range(2):
            engine = StartedServer(config)
            worker = Path("/proc", (tmp_path / "told.json.worker").read_text())
            assert dict(engine.generate([Request([5], 0)], TestServer.sampling)) == {0: [5, 1]}
            assert worker.exists()
            engine.close()
            time.sleep(0.2)
            assert not worker.exists() or "State:\tZ" in (worker / "status").read_text()
        assert os.environ["no_proxy"] == "b,127.0.0.1"

    def test_its_options(self, checkpoint, problems, tmp_path):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": checkpoint, "r": 8}))
        config = EvaluateConfig(
            model_name_or_path=str(adapter),
            dataset_name=problems,
            backend="server",
            dtype="bfloat16",
            batch_size=16,
            concurrency=[1, 64],
            vllm_kwargs={"enforce_eager": True, "enable_prefix_caching": False, "hf_overrides": {"a": 1}},
        )
        words = server_options(config, 7)
        options = dict(zip(words[::1], words[1:], strict=False))
        assert (options["--model"], options["--served-model-name"]) == (checkpoint, "base")
        assert (options["--lora-modules"], options["--max-lora-rank"]) == (f"model={adapter}", "8")
        assert (options["--dtype"], options["--max-num-seqs"], options["--port"]) == ("bfloat16", "64", "7")
        assert options["--hf-overrides"] == '{"a": 1}'
        assert {"--enforce-eager", "--no-enable-prefix-caching", "--no-trust-remote-code", "--enable-lora"} <= set(
            words
        )


class TestVerifiers:
    def score(self, text, gold, question="", **kwargs):
        return logic_reward([text], [gold], prompts=[question], **kwargs)[0]

    options = "Which?\nOptions:\n(A) 12/11/1937\n(B) 12/25/1937\n(C) the red one"

    @pytest.mark.parametrize(
        ("text", "gold", "strict", "flexible"),
        [
            (r"\boxed{(B)}", "(B)", 1, 1),
            (r"\boxed{B}", "(B)", 1, 1),
            (r"\boxed{12/25/1937}", "(B)", 1, 1),
            (r"\boxed{(B) 12/25/1937}", "(B)", 1, 1),
            (r"\boxed{(A) 12/25/1937}", "(B)", 0, 0),
            (r"\boxed{12/11/1937}", "(B)", 0, 0),
            (r"\boxed{\text{the red one}}", "(C)", 1, 1),
            ("So the answer is (B).", "(B)", 0, 1),
            ("So the answer is 12/25/1937.", "(B)", 0, 1),
            ("It is (A)? No: (B)", "(B)", 0, 1),
            ("It is (B)? No: (A)", "(B)", 0, 0),
            ("<think>(B)</think> Hm.", "(B)", 0, 0),
            ("<think>(B)", "(B)", 0, 0),
            (r"\boxed{(A)} or (B)", "(B)", 0, 0),
            (r"\boxed{True}", "True", 1, 1),
            ("not False, so True.", "True", 0, 1),
            ("It is invalid.", "valid", 0, 0),
            ("It is valid.", "valid", 0, 1),
            (r"\boxed{] ] )}", "] ] )", 1, 1),
            (r"\boxed{barn damp it&t}", "barn damp it&t", 1, 1),
            (r"\boxed{-35}", "-35", 1, 1),
            (r"\boxed{35}", "-35", 0, 0),
        ],
    )
    def test_logic(self, text, gold, strict, flexible):
        question = self.options if gold.startswith("(") else ""
        assert self.score(text, gold, question) == strict
        assert self.score(text, gold, question, flexible=True) == flexible

    def test_every_reference_answer_of_bbh_is_accepted_and_the_next_one_is_not(self):
        from trl_opsd.data import load_prompts

        dataset = load_prompts(f"bbh:{SHARED / 'bbh'}", "test")
        golds, prompts, tasks = dataset["answer"], dataset["prompt"], dataset["task"]
        right = logic_reward([rf"\boxed{{{gold}}}" for gold in golds], golds, prompts=prompts)
        # brackets that a box cannot hold: `}` without its `{`
        odd = {index for index, gold in enumerate(golds) if gold.count("{") != gold.count("}")}
        assert len(odd) == 99 and {tasks[index] for index in odd} == {"dyck_languages"}
        assert [index for index, score in enumerate(right) if score != 1 and index not in odd] == []
        pairs = [
            (index, other)
            for index in range(len(golds) - 1)
            if golds[other := index + 1] != golds[index] and not {index, other} & odd
        ]
        wrong = logic_reward(
            [rf"\boxed{{{golds[other]}}}" for _, other in pairs],
            [golds[index] for index, _ in pairs],
            prompts=[prompts[index] for index, _ in pairs],
        )
        assert len(pairs) > 3000 and sum(wrong) == 0

    def test_ifeval_through_the_library(self, monkeypatch):
        seen = []

        def process_results(doc, results):
            seen.append((doc["instruction_id_list"], doc["kwargs"], doc["prompt"], results[0]))
            return {"prompt_level_strict_acc": results[0] == "YES", "prompt_level_loose_acc": "YES" in results[0]}

        utils = types.SimpleNamespace(process_results=process_results)
        factory = types.SimpleNamespace(DetectorFactory=types.SimpleNamespace(seed=None))
        monkeypatch.setitem(sys.modules, "langdetect", factory)
        for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", utils)
        monkeypatch.delitem(sys.modules, "trl_opsd.evaluate.ifeval", raising=False)
        from trl_opsd.evaluate.ifeval import ifeval_reward

        raw = {"key": 1, "prompt": "Shout.", "instruction_id_list": ["case"], "kwargs": [{"n": 2}]}
        row = SOURCES["ifeval"].to_row(raw)
        texts = ["<think>no</think>YES", "*YES*", "<think>YES"]
        columns = {"prompts": [row["prompt"]] * 3, "instructions": [row["instructions"]] * 3}
        assert ifeval_reward(texts, **columns) == [1.0, 0.0, 0.0]
        assert ifeval_reward(texts, **columns, flexible=True) == [1.0, 1.0, 0.0]
        assert seen[0] == (["case"], [{"n": 2}], "Shout.", "YES") and factory.DetectorFactory.seed == 0
        monkeypatch.delitem(sys.modules, "trl_opsd.evaluate.ifeval")


class TestSources:
    def test_competitions(self):
        amc = SOURCES["amc23"].to_row({"id": 0, "question": "How many?", "answer": 27.0})
        assert amc["answer"] == "27" and amc["prompt"][0]["content"].startswith("How many?")
        aime = SOURCES["aime24"].to_row({"problem": "Find n.", "answer": "073", "solution": "..."})
        assert aime["answer"] == "073"
        assert SOURCES["aime25"].to_row({"problem": "Find n.", "answer": "73"})["answer"] == "73"
