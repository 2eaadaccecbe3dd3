"""
A thousand damaged inputs, drawn with a seed: each ends in one sentence, or in a counted skip, or in the number that an
independent reading of the same bytes gives.
"""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from evaluation_world import Adder, make_tokenizer, save_checkpoint, sum_rows, write_rows
from transformers import AutoModelForCausalLM

from trl_opsd.cli import UserError
from trl_opsd.evaluate import EvaluateConfig
from trl_opsd.evaluate.backends import load_engine
from trl_opsd.evaluate.pipeline import evaluate_jobs
from trl_opsd.evaluate.plan import load_task, plan
from trl_opsd.evaluate.score import verify


FILES, CHECKPOINTS, CACHES = 600, 200, 200
VALUES = [None, True, 0, -1, 7, 1.5, 10**30, 1e308, "", " ", "7", "x" * 100_000, "\ud800", [], {}, ["7"], {"a": 1}]
VALUES += [
    float("nan"),
    float("inf"),
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": 3, "content": "1"}],
]


def check_sentence(error: UserError) -> None:
    text = str(error)
    assert 20 < len(text) < 900 and "\n" not in text and "Traceback" not in text, text


def damage_text(text: str, draw: random.Random) -> bytes:
    """JSON Lines, damaged in one of the ways in which files are."""
    lines = text.splitlines()
    kind = draw.randrange(10)
    data = text.encode()
    if kind == 0:  # cut
        return data[: draw.randrange(len(data))]
    if kind == 1:  # a flipped byte
        position = draw.randrange(len(data))
        return data[:position] + bytes([data[position] ^ (1 << draw.randrange(8))]) + data[position + 1 :]
    if kind == 2:  # a piece lost
        start = draw.randrange(len(data))
        return data[:start] + data[start + draw.randrange(1, 40) :]
    number = draw.randrange(len(lines))
    row = json.loads(lines[number])
    if kind in (3, 4, 5):  # a value of the wrong type
        row[draw.choice(["prompt", "answer", "solution", "extra"])] = draw.choice(VALUES)
        lines[number] = json.dumps(row)
    elif kind == 6:  # a column lost
        del row[draw.choice(["prompt", "answer"])]
        lines[number] = json.dumps(row)
    elif kind == 7:  # the same row or the same name twice
        lines[number] = draw.choice([lines[number] + "\n" + lines[number], lines[number][:-1] + ', "answer": "9"}'])
    elif kind == 8:  # no object
        lines[number] = draw.choice(["[]", "7", "null", '"text"', "[" * 5000, "{" * 50, "}", "NaN", "", "9" * 5000])
    else:  # no text, or not this one
        return draw.choice(
            [b"", b"\n\n", b"\xff\xfe" + data, b"\x00" * 50, b"[", b"[]", b"{}", data.replace(b"\n", b",")]
        )
    return "\n".join(lines).encode()


def read_independently(data: bytes) -> list[tuple[str, str | None]] | None:
    """The problems and reference answers that damaged JSON Lines hold, or `None` where they are not all readable."""
    twice = []

    def pairs(items):
        if len({name for name, _ in items}) < len(items):
            twice.append(items)
        return dict(items)

    rows = []
    try:
        for line in data.decode("utf-8").lstrip("\ufeff").split("\n"):
            if line.strip():
                rows.append(json.loads(line, object_pairs_hook=pairs, parse_constant=lambda name: 1 / 0))
    except (ValueError, RecursionError, ZeroDivisionError):
        return None
    if twice or not rows or not all(isinstance(row, dict) for row in rows):
        return None
    found = []
    for row in rows:
        prompt, answer = row.get("prompt"), row.get("answer")
        try:
            question = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        except (TypeError, KeyError):
            return None
        found.append((question, None if answer is None else str(answer)))
    return found


def test_damaged_data(tmp_path, monkeypatch):
    draw = random.Random(0)
    text = "".join(json.dumps({**row, "solution": "add"}) + "\n" for row in sum_rows() * 2)
    tokenizer, engine = make_tokenizer(), Adder()
    loaded = refused = 0
    for number in range(FILES):
        data = damage_text(text, draw)
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(data)
        config = EvaluateConfig(dataset_name=str(path))
        try:
            dataset, reward_funcs = load_task(config)
        except UserError as error:
            check_sentence(error)
            refused += 1
            continue
        loaded += 1
        expected = read_independently(data)
        assert expected is not None, (number, data[:200])
        questions = [p if isinstance(p, str) else "".join(m["content"] for m in p) for p in dataset["prompt"]]
        assert questions == [question for question, _ in expected], number
        # what a right answer to each problem as it stands scores against the reference answer as it stands
        ids = [engine.completion(tokenizer(text=question)["input_ids"]) for question in questions]
        for sample, (question, gold) in zip(verify(dataset, reward_funcs, ids, tokenizer, [1]), expected, strict=True):
            given = tokenizer.decode(ids[questions.index(question)]).removeprefix("\\boxed{").split("}")[0]
            if gold is None or not gold.strip():
                assert sample.correct is None
            elif gold.strip().isdigit():
                assert sample.correct == (given.isdigit() and int(given) == int(gold)), (number, question, gold)
    assert loaded > 50 and refused > 300


def damage_checkpoint(folder: Path, draw: random.Random) -> str:
    kind = draw.choice(["lost", "cut", "header", "nan", "json", "index", "tensor", "value"])
    shards = sorted(folder.glob("*.safetensors"))
    shard = draw.choice(shards)
    if kind == "lost":
        shard.unlink()
    elif kind == "cut":
        data = shard.read_bytes()
        shard.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "header":
        data = bytearray(shard.read_bytes())
        data[draw.randrange(min(len(data), 400))] ^= 1 << draw.randrange(8)
        shard.write_bytes(data)
    elif kind == "nan":
        data = bytearray(shard.read_bytes())
        start = 8 + struct.unpack("<Q", data[:8])[0]
        position = start + 4 * draw.randrange((len(data) - start) // 4)
        data[position : position + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf")]))
        shard.write_bytes(data)
    elif kind == "json":
        file = folder / draw.choice(
            ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        )
        data = file.read_bytes()
        file.write_bytes(draw.choice([data[: draw.randrange(len(data))], b"", b"[]", b"7", b"\xff", b"null"]))
    elif kind == "index":
        file = next(folder.glob("*.index.json"))
        index = json.loads(file.read_text())
        names = sorted(index["weight_map"])
        if draw.random() < 0.5:
            index["weight_map"][draw.choice(names)] = draw.choice(["model-00009-of-00002.safetensors", 7, None])
        else:
            index["weight_map"] = draw.choice([None, [], 7, {}])
        file.write_text(json.dumps(index))
    elif kind == "tensor":  # config.json speaks of another model than the weights
        config = json.loads((folder / "config.json").read_text())
        config[draw.choice(["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])] *= 2
        if draw.random() < 0.3:
            config |= {"hidden_size": 16, "num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        config = json.loads((folder / "config.json").read_text())
        name = draw.choice(
            ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size", "rms_norm_eps"]
        )
        config[name] = draw.choice([None, "x", [], {}, -1, 0, 10**12])
        (folder / "config.json").write_text(json.dumps(config))
    return kind


def test_damaged_checkpoints(tmp_path):
    draw = random.Random(1)
    whole = tmp_path / "whole"
    save_checkpoint(whole, max_shard_size="8KB")
    problems = write_rows(tmp_path / "sums.jsonl", sum_rows())
    reference = AutoModelForCausalLM.from_pretrained(whole)
    ids = torch.arange(8)[None]
    logits = reference(ids).logits
    refused, kinds = 0, set()
    for number in range(CHECKPOINTS):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        kind = damage_checkpoint(folder, draw)
        config = EvaluateConfig(model_name_or_path=str(folder), dataset_name=problems)
        try:
            (job,) = plan(config)
            model = load_engine(config, job.checkpoint, job.tokenizer).model
        except UserError as error:
            check_sentence(error)
            refused += 1
            kinds.add(kind)
        else:  # only what changes nothing may pass
            assert torch.equal(model(ids).logits, logits), (number, kind)
            assert job.prompt_ids == [
                make_tokenizer()(text=f"{q}=")["input_ids"] for q in ("3+4", "3+5", "12+4", "12+5")
            ]
        shutil.rmtree(folder)
    assert refused > 150 and len(kinds) == 8


@pytest.mark.parametrize("part", range(4))
def test_damaged_cache(tmp_path, monkeypatch, part):
    draw = random.Random(2 + part)
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    problems = write_rows(tmp_path / "sums.jsonl", sum_rows())
    monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: Adder())
    config = EvaluateConfig(
        model_name_or_path=checkpoint,
        dataset_name=problems,
        cache_dir=str(tmp_path / "cache"),
        max_completion_length=9,
    )
    jobs = plan(config)
    (whole,) = evaluate_jobs(jobs, progress=lambda done, total: None)
    (file,) = (tmp_path / "cache").iterdir()
    intact = file.read_bytes()
    for number in range(CACHES // 4):
        lines = intact.splitlines(keepends=True)
        place, kind = draw.randrange(len(lines)), draw.randrange(6)
        line = lines[place]
        if kind == 0:
            position = draw.randrange(len(line) - 1)
            lines[place] = line[:position] + bytes([line[position] ^ (1 << draw.randrange(7))]) + line[position + 1 :]
        elif kind == 1:
            lines[place] = line[: draw.randrange(1, len(line) - 1)] + b"\n"
        elif kind == 2:
            lines[place] = draw.choice(
                [b"[]\n", b"7\n", b"{}\n", b"null\n", b"[" * 3000 + b"\n", b"\xff\xfe\n", b'["a", "b"]\n']
            )
        elif kind == 3:
            lines[place] = line.replace(b",1]", b",1,1]", 1).replace(b"[1", b"[2", 1)
        elif kind == 4:  # the completion of another problem under this key
            lines[place] = line[:35] + lines[(place + 1) % len(lines)][35:]
        else:  # written twice, as two runs at once may
            lines[place] = line + line
        file.write_bytes(b"".join(lines))
        (row,) = evaluate_jobs(jobs, progress=lambda done, total: None)
        assert (row.accuracy, row.mean_tokens, row.n) == (1.0, whole.mean_tokens, 4), (number, kind)
        damaged = kind != 5 and lines[place] != line
        assert row.cached == 4 - damaged, (number, kind, lines[place])
        assert row.cache_lines_skipped >= damaged and (damaged or not row.cache_lines_skipped)
