"""The embedded default: its task, tokenizer, model and warm start."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from trl_opsd.cli import parse
from trl_opsd.tiny import TEMPLATES, TinyConfig, make_model, problems, row, sft, sft_rows, warm_start
from trl_opsd.tiny.__main__ import main
from trl_opsd.tiny.sft import StopAtAccuracy, encode, measure, train
from trl_opsd.tiny.tokenizer import make_tokenizer


ROOT = Path(__file__).parents[1]
CONFIG = TinyConfig()
LONG = TinyConfig(max_ops=24, median_ops=6, verbosity=2)
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


def sft_config(folder, **changes) -> SFTConfig:
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
    }
    return SFTConfig(output_dir=str(folder), **{**defaults, **changes})


def work_out(problem: str, modulus: int) -> tuple[list[int], str]:
    """Evaluates a problem's text with none of the package's code: all values, and the concise chain."""
    start, *steps = problem.split()
    values, chain = [int(start)], start
    for step in steps:
        values.append(eval(f"{values[-1]} {step[2:]}") % modulus)
        chain += f" {step}={values[-1]}"
    return values, f"{chain} \\boxed{{{values[-1]}}}"


def check_reply(mode: str, problem: str, reply: str, modulus: int, verbosity: int = 1) -> None:
    values, concise = work_out(problem, modulus)
    box = f"\\boxed{{{values[-1]}}}"
    if mode in ("brief", "answer"):
        assert reply == box
    elif mode in ("concise", "solution"):
        assert reply == concise
    else:
        restated, chain = reply.split(". ")
        assert restated == problem
        assert re.sub(r"\? \d ([a-x]):..=\d", "", chain) == concise
        for value, step, result in zip(values, problem.split()[1:], values[1:], strict=False):
            assert chain.count(f"? {value} {step}={result}") == verbosity


@pytest.mark.parametrize(
    "config",
    [CONFIG, TinyConfig(modulus=10, min_ops=2, max_ops=8, verbosity=2, test_size=200, train_size=200), LONG],
    ids=["default", "other", "long"],
)
def test_every_reply_is_right_in_its_form(config):
    seen = Counter()
    for example in islice(sft_rows(replace(config, style_blur=0.0), seed=0), 2000):
        mode, prompt, reply = example["mode"], example["prompt"][0]["content"], example["completion"][0]["content"]
        problem = re.match(r"\d( [a-x]:[+*-]\d)+", prompt)[0]
        values, solution = work_out(problem, config.modulus)
        assert prompt == TEMPLATES[mode].format(prompt=problem, answer=values[-1], solution=solution)
        check_reply(mode, problem, reply, config.modulus, config.verbosity)
        seen[mode] += 1
        seen[problem.count(":")] += 1
    assert set(seen) == {*TEMPLATES, *range(config.min_ops, config.max_ops + 1)}


def test_short_ways_can_be_taught_on_short_problems_only():
    config, seen = replace(CONFIG, short_ways_max_ops=3), {True: Counter(), False: Counter()}
    for example in islice(sft_rows(config, seed=0), 2000):
        num_ops = example["prompt"][0]["content"].split("solution")[0].count(":")
        seen[num_ops <= 3][example["mode"]] += 1
    assert set(seen[True]) == set(TEMPLATES) and set(seen[False]) == {"plain"}
    assert all(config.teaches(mode, 3) and config.teaches(mode, 4) == (mode == "plain") for mode in TEMPLATES)
    # Learning ends by what is taught, and not by what is not
    stop = StopAtAccuracy(config, None, seed=0)
    measured = {}

    def measure(model, tokenizer, tasks, mode, length):
        measured[mode] = {len(task.ops) for task in tasks}
        return {"accuracy": 1.0}

    with mock.patch("trl_opsd.tiny.sft.measure", measure):
        state = SimpleNamespace(global_step=config.accuracy_steps, max_steps=0, log_history=[])
        stop.on_step_end(SimpleNamespace(save_strategy="no"), state, SimpleNamespace(should_save=False))
    assert measured == {"plain": {1, 2, 3, 4, 5, 6}, "concise": {1, 2, 3}}
    with pytest.raises(ValueError, match="`short_ways_max_ops` is 7 and must lie between `min_ops` 1 and `max_ops` 6"):
        replace(CONFIG, short_ways_max_ops=7)


def test_blur_moves_redundancy_and_nothing_else():
    pieces, redundant = Counter(), Counter()
    for example in islice(sft_rows(replace(CONFIG, style_blur=0.2), seed=0), 4000):
        mode, prompt, reply = example["mode"], example["prompt"][0]["content"], example["completion"][0]["content"]
        if mode in ("brief", "answer"):
            continue
        problem = re.match(r"\d( [a-x]:[+*-]\d)+", prompt)[0]
        restated, _, chain = reply.rpartition(". ")
        assert restated in ("", problem)
        assert re.sub(r"\? \d ([a-x]):..=\d", "", chain) == work_out(problem, 7)[1]
        pieces[mode] += 1 + problem.count(":")
        redundant[mode] += bool(restated) + chain.count("?")
    shares = {mode: redundant[mode] / pieces[mode] for mode in pieces}
    assert shares == {
        "plain": pytest.approx(0.8, abs=0.03),
        "concise": pytest.approx(0.2, abs=0.03),
        "solution": pytest.approx(0.2, abs=0.03),
    }


def test_rows_hold_the_data_contract():
    for problem in problems(CONFIG, "test", 500, seed=0):
        example = row(problem)
        text = example["prompt"][0]["content"]
        values, solution = work_out(text, 7)
        assert (example["answer"], example["solution"]) == (str(values[-1]), solution)
        assert example["num_ops"] == text.count(":") and example["prompt"][0]["role"] == "user"


def test_splits_share_no_problem():
    rows = islice(sft_rows(CONFIG, seed=3), 20000)
    texts = {"sft": {re.match(r"\d( [a-x]:[+*-]\d)+", row["prompt"][0]["content"])[0] for row in rows}}
    for split, size in (("train", 4096), ("test", 2048), ("validation", 240)):
        drawn = [problem.text for problem in problems(CONFIG, split, size, seed=1)]
        texts[split] = set(drawn)
        assert len(texts[split]) == size
    assert len(set.union(*texts.values())) == sum(map(len, texts.values()))


def test_operations_are_spread_as_evenly_as_there_are_problems():
    counts = Counter(len(problem.ops) for problem in problems(CONFIG, "test", 2048, seed=0))
    assert max(counts.values()) - min(counts[n] for n in range(2, 7)) <= 1
    assert 15 < counts[1] < 50  # a fifth of the 140 that exist


def test_operations_are_spread_log_normally():
    drawn = problems(LONG, "test", 2048, seed=0)
    # Those of the warm start are drawn another way, and from the same shares
    texts = [
        re.match(r"\d( [a-x]:[+*-]\d)+", example["prompt"][0]["content"])[0]
        for example in islice(sft_rows(LONG, seed=0), 2048)
    ]
    assert len({problem.text for problem in drawn}) == 2048

    def below(n: float) -> float:
        """The share of a log-normal distribution of median 6 that is below `n`."""
        return 0.5 * (1 + math.erf(math.log(n / 6) / 0.7 / math.sqrt(2)))

    whole = below(24.5) - below(0.5)
    for numbers in ([len(problem.ops) for problem in drawn], [text.count(":") for text in texts]):
        for low, high in ((1, 3), (4, 6), (7, 9), (10, 14), (15, 24)):
            share = sum(low <= n <= high for n in numbers) / len(numbers)
            assert share == pytest.approx((below(high + 0.5) - below(low - 0.5)) / whole, abs=0.025)
    # Every digit of a large number is drawn, to the last operation
    longest = [problem for problem in drawn if len(problem.ops) >= 20]
    assert len({problem.ops[-1] for problem in longest}) > 10


@pytest.mark.parametrize("config", [CONFIG, LONG], ids=["default", "long"])
def test_the_longest_reply_is_as_long_as_is_said(config):
    tokenizer = make_tokenizer(24)
    longest = max(problems(config, "test", 2048, seed=0), key=lambda problem: len(problem.ops))
    reply = longest.reply("plain", verbosity=config.verbosity) + tokenizer.eos_token
    assert len(tokenizer(reply)["input_ids"]) == config.max_reply_length
    # What vLLM is told to be the longest sequence: the prompt of a mode and its reply
    for mode in TEMPLATES:
        chat = [{"role": "user", "content": longest.ask(mode)}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        reply = longest.reply(mode, verbosity=config.verbosity) + tokenizer.eos_token
        assert len(prompt) + len(tokenizer(reply)["input_ids"]) <= 512


def test_problems_of_eight_operations_have_one_vocabulary():
    assert make_tokenizer().get_vocab() == make_tokenizer(8).get_vocab()
    assert len(make_tokenizer(24)) == len(make_tokenizer()) + 16


def test_the_seed_decides_the_rows():
    draw = lambda seed: list(islice(sft_rows(CONFIG, seed, 0.2), 50))  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    assert problems(CONFIG, "train", 50, 1) == problems(CONFIG, "train", 50, 1) != problems(CONFIG, "train", 50, 2)


def test_a_slip_is_carried_on():
    rng, slipped, steps = random.Random(0), 0, 0
    for problem in problems(CONFIG, "sft", 400, seed=0):
        results = problem.results(0.2, rng)
        value = problem.start
        for (op, x), result in zip(problem.ops, results, strict=True):
            slipped += result != eval(f"{value} {op} {x}") % 7
            steps += 1
            value = result  # the next step goes on from what was written
        for mode in ("plain", "concise"):
            reply = problem.reply(mode, results)
            assert reply.endswith(f"={value} \\boxed{{{value}}}")
    assert 0.15 < slipped / steps < 0.25


def test_only_chains_slip():
    for example in islice(sft_rows(replace(CONFIG, style_blur=0.0), 0, slip_probability=1.0), 200):
        prompt, reply = example["prompt"][0]["content"], example["completion"][0]["content"]
        problem = re.match(r"\d( [a-x]:[+*-]\d)+", prompt)[0]
        _, solution = work_out(problem, 7)
        if example["mode"] in ("plain", "concise"):
            assert not reply.endswith(solution)
        else:
            assert solution.endswith(reply)


def test_the_tokenizer_round_trips(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.pad_token_id != loaded.eos_token_id and len(loaded) == len(tokenizer)
    for problem in problems(CONFIG, "train", 50, seed=0):
        for mode in TEMPLATES:
            for text in (problem.ask(mode), problem.reply(mode)):
                assert loaded.decode(loaded(text)["input_ids"]) == text
                assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_text_of_another_world_is_an_error(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer("hello")


def test_the_chat_template_keeps_prefixes_and_marks_the_assistant(tokenizer):
    chat = next(sft_rows(CONFIG, 0))
    prompt = tokenizer.apply_chat_template(chat["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(
        chat["prompt"] + chat["completion"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert whole["input_ids"][: len(prompt)] == prompt
    marked = [t for t, m in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == chat["completion"][0]["content"] + tokenizer.eos_token
    encoded = encode([chat], tokenizer)[0]
    assert [t for t in encoded["labels"] if t != -100] == marked
    assert encoded["input_ids"] == whole["input_ids"][: len(encoded["input_ids"])]


def test_concise_is_less_than_half_of_verbose(tokenizer):
    tasks = problems(CONFIG, "test", 600, seed=0)
    mean = {
        mode: sum(len(tokenizer(task.reply(mode))["input_ids"]) + 1 for task in tasks) / len(tasks)
        for mode in TEMPLATES
    }
    assert 50 < mean["plain"] < 80 and mean["concise"] < 0.42 * mean["plain"] and mean["brief"] == 4


def test_a_saved_model_computes_the_same(tokenizer, tmp_path):
    model = make_model(CONFIG, tokenizer, seed=0)
    assert 150_000 < model.num_parameters() < 180_000
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), make_model(CONFIG, tokenizer, 0).parameters(), strict=True)
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("3 a:+4 b:*2")["input_ids"]])
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id


def test_training_lowers_the_loss_and_repeats(tokenizer, tmp_path):
    weights = []
    for run in range(2):
        model = make_model(TinyConfig(**SMALL), tokenizer, seed=0)
        trainer = train(model, tokenizer, sft_rows(CONFIG, 0), sft_config(tmp_path / str(run), learning_rate=1e-2))
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert float(losses[-1]) < 0.8 * float(losses[0])
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_measure_counts_only_finished_right_answers(tokenizer, small_model, monkeypatch):
    tasks = problems(CONFIG, "test", 3, seed=0)
    model = small_model()

    def generate(input_ids, **kwargs):
        right, endless, wrong = (task.reply("concise") for task in tasks)
        wrong = wrong[:-2] + str((int(wrong[-2]) + 1) % 7) + "}"
        texts = [right + tokenizer.eos_token, endless, wrong + tokenizer.eos_token]
        replies = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, replies], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert measure(model, tokenizer, tasks, "concise", 128)["accuracy"] == pytest.approx(1 / 3)


def test_training_stops_when_the_target_is_reached(tokenizer, tmp_path, monkeypatch):
    config = TinyConfig(**SMALL, accuracy_steps=5, accuracy_problems=20, target_accuracy=0.9)
    accuracies = iter([1.0, 0.8, 0.9, 0.95])  # plain, concise, plain, concise
    monkeypatch.setattr("trl_opsd.tiny.sft.measure", lambda *args, **kwargs: {"accuracy": next(accuracies)})
    stop = StopAtAccuracy(config, tokenizer, seed=0)
    model = make_model(config, tokenizer, 0)
    trainer = train(model, tokenizer, sft_rows(config, 0), sft_config(tmp_path), [stop])
    assert trainer.state.global_step == 10


def test_the_command_line_writes_a_whole_checkpoint(tmp_path, capsys):
    out = tmp_path / "sft"
    options = {**SMALL, "output_dir": out, "max_steps": 4, "slip_steps": 2, "target_accuracy": 0, "test_size": 64}
    options |= {"train_size": 64, "accuracy_problems": 20, "per_device_train_batch_size": 4, "disable_tqdm": "true"}
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    main(["--config", str(ROOT / "recipes/tiny/sft.yaml"), *arguments])
    assert "solution  sampled" in capsys.readouterr().out
    assert sorted(file.name for file in out.parent.iterdir()) == ["sft"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert measure(model, tokenizer, problems(CONFIG, "test", 4, 0), "plain", 128)["n"] == 4
    splits = {
        split: {json.loads(line)["prompt"][0]["content"] for line in (out / f"data/{split}.jsonl").open()}
        for split in ("train", "test")
    }
    assert len(splits["train"]) == len(splits["test"]) == 64 and not splits["train"] & splits["test"]
    results = json.loads((out / "sft.json").read_text())
    assert {row["mode"] for row in results["rows"] if row["phase"] == "final"} == set(TEMPLATES)

    with pytest.raises(SystemExit) as end:  # nothing that is there is overwritten
        main(["--config", str(ROOT / "recipes/tiny/sft.yaml"), *arguments])
    assert end.value.code == 2 and "exists already" in capsys.readouterr().err


class Killed(BaseException):
    """The process goes away: nothing is said or written any more."""


def test_an_interrupted_warm_start_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Killed while it learns the chain, between that and the slips, while it learns these, and at the very end."""
    config = TinyConfig(
        **SMALL,
        max_ops=2,
        target_accuracy=0.0,
        accuracy_steps=4,
        accuracy_problems=8,
        slip_steps=4,
        train_size=8,
        test_size=8,
    )
    steps, take, write = [], AcceleratedOptimizer.step, sft.write_results
    end = [None]  # steps that are taken before the process is killed

    def step(self, *args, **kwargs):
        if [len(steps)] == end:
            raise Killed
        steps.append(1)
        return take(self, *args, **kwargs)

    def written(*args):
        if end == ["written"]:
            raise Killed
        write(*args)

    def run(name):
        steps.clear()
        warm_start(
            config,
            sft_config(tmp_path / name, save_strategy="steps", save_steps=3, resume_from_checkpoint="true"),
        )
        rows = json.loads((tmp_path / name / "sft.json").read_text())["rows"]
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        return [{key: value for key, value in row.items() if key != "wall_s"} for row in rows], weights

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    monkeypatch.setattr(sft, "write_results", written)
    rows, weights = run("whole")
    assert len(steps) == 4 + 4 and rows[0]["step"] == 4
    assert sorted(path.name for path in (tmp_path / "whole").iterdir() if path.is_dir()) == ["data"]

    # No step is taken again, because the last one of the chain has a checkpoint too
    taken = []
    for end[0] in (3, 1, 3, "written"):
        with pytest.raises(Killed):
            run("killed")
        taken.append(len(steps))
    end[0] = None
    again, same = run("killed")
    assert [*taken, len(steps)] == [3, 1, 3, 1, 0]
    assert again == rows
    assert weights.keys() == same.keys() and all(torch.equal(value, same[name]) for name, value in weights.items())


def test_a_target_that_is_not_reached_leaves_nothing(tmp_path, capsys):
    given = {**SMALL, "accuracy_problems": 20, "train_size": 64, "test_size": 64, "max_steps": 2}
    given |= {"output_dir": tmp_path / "sft", "use_cpu": "true", "bf16": "false", "disable_tqdm": "true"}
    with pytest.raises(SystemExit) as end:
        main([f"--{name}={value}" for name, value in given.items()])
    assert end.value.code == 2 and "error: The accuracy after `max_steps` 2 is " in capsys.readouterr().err
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--modulus", "11"], "`modulus` is 11 and must be from 2 to 10"),
        (["--min_ops", "7"], "`min_ops` is 7 and `max_ops` is 6"),
        (["--median_ops", "7"], "`median_ops` is 7"),
        (["--max_ops", "25"], "`max_ops` is 25"),
        (["--verbosity", "0"], "`verbosity` is 0"),
        (["--target_accuracy", "97"], "`target_accuracy` is 97.0 and must be from 0 to 1"),
        (["--max_ops", "1"], "ask for fewer, or raise `max_ops`"),
        (["--max_steps", "-1"], "`max_steps` is missing"),
        (
            ["--resume_from_checkpoint", "checkpoint-3"],
            "goes on from checkpoints of its own, and not from `checkpoint-3`",
        ),
        (["--config", "nowhere.yaml"], "There is no config file at `nowhere.yaml`"),
    ],
)
def test_a_mistake_is_one_sentence(options, message, capsys, monkeypatch, tmp_path):
    def built(*args, **kwargs):
        raise AssertionError("a model was built before the mistake was found")

    monkeypatch.setattr("trl_opsd.tiny.sft.make_model", built)
    recipe = [] if "--config" in options else ["--config", str(ROOT / "recipes/tiny/sft.yaml")]
    with pytest.raises(SystemExit) as end:
        main([*recipe, "--output_dir", str(tmp_path / "sft"), *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_recipe_parses():
    config, args = parse((TinyConfig, SFTConfig), ["--config", str(ROOT / "recipes/tiny/sft.yaml")])
    assert config.test_size >= 2000 and args.max_steps > 0
