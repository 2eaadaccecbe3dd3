"""The small reasoner: its chains, its ways of answering, its tokenizer, its warm start and its recipes."""

import copy
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from reasoning_gym.factory import create_dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, SFTConfig

from trl_opsd.cli import parse
from trl_opsd.rewards import math_reward
from trl_opsd.small import TEMPLATES, SmallConfig, sft
from trl_opsd.small.__main__ import main
from trl_opsd.small.families import FAMILIES
from trl_opsd.small.task import STYLES, Problem, Writer, problems, row, sft_rows
from trl_opsd.tiny.sft import encode


ROOT = Path(__file__).parents[1]
CONFIG = SmallConfig()
LEVELS = [(task, level) for task in FAMILIES for level in (1, 2, 3)]
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SMALL |= {"intermediate_size": 32, "train_size": 21, "test_size": 21, "accuracy_problems": 21}


def boxed(reply: str) -> str:
    return re.fullmatch(r".*\\boxed\{(.*)\}", reply)[1]


def is_true(step: str) -> bool:
    """Whether a written step holds, by Python's own arithmetic."""
    if " against " in step:
        number, limit, relation = re.fullmatch(r"(.+) against (.+): (\w+), (?:keep|remove)", step).groups()
        # What follows from it depends on the question
        return (
            relation == ("equal", "larger", "smaller")[(float(number) > float(limit)) - (float(number) < float(limit))]
        )
    left, right = step.rpartition(": ")[2].split("=")
    if " r " in right:
        return right == "{} r {}".format(*divmod(*map(int, left.split("/"))))
    return eval(left.replace("mod", "%")) == int(right)


@pytest.mark.parametrize(("task", "level"), LEVELS, ids=lambda value: str(value))
def test_every_chain_is_true_and_ends_in_the_answer_of_the_generator(task, level):
    entries = create_dataset(task, seed=5_000_000, size=400, **FAMILIES[task].levels[level - 1])
    kept = [entry for entry in entries if FAMILIES[task].keep(entry)]
    assert len(kept) > 50
    for index, entry in enumerate(kept[:150]):
        problem = Problem(task, level, entry["question"].strip(), entry["answer"], entry["metadata"])
        writers = [Writer(0.0, random.Random(0)), Writer(1.0, random.Random(index))]
        for writer in writers:
            assert entries.score_answer(boxed(problem.reply(writer)), entry) == 1.0
            assert all(map(is_true, writer.steps))
        assert problem.solution == ". ".join([*writers[0].steps, f"\\boxed{{{entry['answer']}}}"])


@pytest.fixture(scope="module")
def rows():
    return list(islice(sft_rows(CONFIG, seed=1), 3000))


@pytest.fixture(scope="module")
def tokenizer(rows):
    texts = [message["content"] for row in rows for message in row["prompt"] + row["completion"]]
    return sft.make_tokenizer([*texts, "user\n", "assistant\n"], CONFIG.vocab_size)


def test_the_verifier_of_the_recipes_takes_the_answers_and_no_others():
    tasks = problems("test", 96, seed=0)
    asked = {"completions": [[{"role": "assistant", "content": task.solution}] for task in tasks]}
    assert math_reward(**asked, answer=[task.answer for task in tasks]) == [1.0] * len(tasks)
    others = {task.task: [other.answer for other in tasks if other.task == task.task] for task in tasks}
    wrong = [next(answer for answer in others[task.task] if answer != task.answer) for task in tasks]
    assert math_reward(**asked, answer=wrong) == [0.0] * len(tasks)


def test_only_the_plain_way_is_taught_everywhere(rows):
    modes = defaultdict(Counter)
    for example in (example for example in rows if example["mode"] != "drill"):
        modes[example["task"], example["difficulty"]][example["mode"]] += 1
    assert set(modes) == set(LEVELS)
    for (task, level), counts in modes.items():
        taught = task in CONFIG.taught and level <= 2
        assert set(counts) == (set(TEMPLATES) if taught else {"plain"})
    assert 0 < len(CONFIG.taught) < len(FAMILIES)


def test_a_warm_start_of_some_families_and_difficulties_learns_no_others():
    config = SmallConfig(
        families=["chain_sum", "gcd"], difficulty=2, taught=["chain_sum"], posed=["chain_sum", "gcd"], drill_share=0.2
    )
    seen = Counter((row["task"], row["difficulty"]) for row in islice(sft_rows(config, 0), 400))
    learned = {(task, level) for task in ("chain_sum", "gcd") for level in (1, 2)}
    assert set(seen) == learned | {("drill", 0)} and min(seen[key] for key in learned) > 40


def test_each_way_is_asked_for_in_its_own_words_and_answered_in_its_own_form(rows):
    asked = {"concise": "as concisely as", "solution": "A reference solution: ", "sibling": "A short and correct way"}
    for example in (example for example in rows if example["mode"] != "drill"):
        prompt, reply = example["prompt"][0]["content"], example["completion"][0]["content"]
        assert {mode for mode, words in asked.items() if words in prompt} == {example["mode"]} - {"plain"}
        if example["mode"] in ("solution", "sibling"):
            assert f": {reply}\n" in prompt  # what it is shown, which ends right
        assert reply.count("\\boxed{") == 1


def test_drills_are_true_single_steps(rows):
    drills = [example for example in rows if example["mode"] == "drill"]
    assert len(drills) / len(rows) == pytest.approx(CONFIG.drill_share, abs=0.05)
    for example in drills:
        asked = example["prompt"][0]["content"].removeprefix("Work out each of these: ").split(", ")
        steps = example["completion"][0]["content"].removesuffix(".").split(". ")
        assert [step.partition("=")[0] for step in steps] == asked and len(asked) == 6
        assert all(map(is_true, steps))
    assert not any(example["mode"] == "drill" for example in islice(sft_rows(SmallConfig(drill_share=0), 0), 50))


def test_some_checks_are_needed_and_most_of_the_text_is_not(tokenizer):
    right, tokens, needed = defaultdict(list), defaultdict(list), 0
    generator = random.Random(0)
    for problem in problems("validation", 252, seed=0):
        plain = Writer(1.0, generator, CONFIG.slip_probability, CONFIG.notice_probability)
        reply = problem.reply(plain)
        right["plain"].append(boxed(reply) == problem.answer)
        tokens["plain"].append(len(tokenizer(reply)["input_ids"]) + 1)
        words = [phrase.partition("{")[0] for phrase in STYLES[FAMILIES[problem.task].style].corrections]
        needed += any(phrase in reply for phrase in words)
        concise = Writer(0.0, generator, CONFIG.slip_probability, CONFIG.notice_probability)
        right["concise"].append(boxed(problem.reply(concise)) == problem.answer)
        tokens["concise"].append(len(tokenizer(problem.solution)["input_ids"]) + 1)
    mean = {name: sum(values) / len(values) for name, values in right.items()}
    length = {name: sum(values) / len(values) for name, values in tokens.items()}
    assert 0.9 < mean["plain"] < 0.99 and mean["concise"] < mean["plain"] - 0.03
    assert needed > 0.05 * 252
    assert length["concise"] < 0.4 * length["plain"] and 80 < length["plain"] < 180


def test_a_slip_that_nobody_notices_is_carried_on_and_one_that_is_noticed_is_not():
    for problem in problems("validation", 96, seed=1):
        noticed = Writer(1.0, random.Random(0), slip_probability=1.0, notice_probability=1.0)
        assert boxed(problem.reply(noticed)) == problem.answer
        assert all(map(is_true, noticed.steps))
        missed = Writer(1.0, random.Random(0), slip_probability=1.0)
        text = problem.reply(missed)
        assert not any("keep" not in step and "remove" not in step and is_true(step) for step in missed.steps)
        # The check repeats what it confirms
        for step in missed.steps:
            assert any(f"{check}{step}. " in text for check in missed.style.checks)


def test_words_around_the_steps_are_those_of_the_family():
    words = {
        name: {phrase.partition("{")[0] for phrases in vars(style).values() for phrase in phrases}
        for name, style in STYLES.items()
    }
    assert not words["common"] & words["other"]
    for problem in problems("validation", 48, seed=2):
        reply = problem.reply(Writer(1.0, random.Random(0)))
        found = {name for name, phrases in words.items() if any(phrase in reply for phrase in phrases)}
        assert found == {FAMILIES[problem.task].style}
    # Taught in the one style alone; elsewhere there are both
    assert {FAMILIES[task].style for task in CONFIG.taught} == {"common"}
    assert Counter(FAMILIES[task].style for task in set(FAMILIES) - set(CONFIG.taught)) == {"common": 2, "other": 2}


def test_splits_share_no_problem_and_the_test_rows_are_those_of_every_seed():
    drawn = {split: {problem.question for problem in problems(split, 210, seed=0)} for split in ("test", "train")}
    assert not drawn["test"] & drawn["train"]
    assert len(drawn["test"]) == 210
    questions = {example["prompt"][0]["content"] for example in islice(sft_rows(CONFIG, seed=2), 300)}
    assert not questions & (drawn["test"] | drawn["train"])
    example = row(problems("test", 21, seed=0)[0])
    assert set(example) == {"prompt", "answer", "solution", "task", "difficulty"}


def test_a_checkpoint_that_cannot_be_taught_ends_it_before_anything(tmp_path, tokenizer):
    args = SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=1)
    start = ModelConfig(model_name_or_path=str(tmp_path / "start"))

    def refused(sentence, model_args=start):
        with pytest.raises(ValueError, match=sentence):
            sft.check(CONFIG, args, model_args)

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1023, **sizes))
    model.save_pretrained(tmp_path / "start")
    refused("has 1023 positions, and prompts and replies are given 1024")
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "start")
    refused("has no tokenizer that can be loaded")
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    own.save_pretrained(tmp_path / "start")
    refused("has no chat template")
    tokenizer.save_pretrained(tmp_path / "start")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    refused("`output_dir`: .* has a model already")


def test_a_tokenizer_adds_nothing_that_the_template_has_not_written(tokenizer, rows):
    own = copy.deepcopy(tokenizer)
    end = own.eos_token
    own._tokenizer.post_processor = TemplateProcessing(f"$A {end}", special_tokens=[(end, own.eos_token_id)])
    assert own("3")["input_ids"] == [*tokenizer("3")["input_ids"], own.eos_token_id]
    assert encode(rows[:20], own).to_dict() == encode(rows[:20], tokenizer).to_dict()


@pytest.mark.parametrize("starts_from_adapter", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_can_be_taught_instead(tmp_path, monkeypatch, tokenizer, adapter, starts_from_adapter):
    """One whose tokenizer pads with the token that ends a reply, on the right, as SmolLM2's does."""
    own = copy.deepcopy(tokenizer)
    own.pad_token, own.padding_side = own.eos_token, "right"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(own), eos_token_id=own.eos_token_id, pad_token_id=own.eos_token_id, **sizes)
    start = LlamaForCausalLM(config)
    start.save_pretrained(tmp_path / "start")
    own.save_pretrained(tmp_path / "start")
    given = tmp_path / "start"
    if starts_from_adapter:
        given = tmp_path / "adapter"
        based = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(based, lora).save_pretrained(given)
        start = AutoPeftModelForCausalLM.from_pretrained(given).merge_and_unload()
    monkeypatch.setattr(sft, "MAX_NEW_TOKENS", 1)
    sides, answer = [], sft.answer

    def watched(model, tokenizer, *args):
        sides.append(tokenizer.padding_side)
        return answer(model, tokenizer, *args)

    monkeypatch.setattr(sft, "answer", watched)
    options = {**SMALL, "max_steps": 2, "accuracy_steps": 5, "per_device_train_batch_size": 2, "warmup_steps": 0}
    options |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": "{}", "disable_tqdm": "true"}
    options |= {"learning_rate": 1e-9, "model_name_or_path": given, "output_dir": tmp_path / "taught"}
    if adapter:
        options |= {"use_peft": "true", "lora_target_modules": "all-linear"}
    main(["--config", str(ROOT / "recipes/small/sft.yaml"), *(f"--{key}={value}" for key, value in options.items())])
    results = json.loads((tmp_path / "taught" / "sft.json").read_text())["rows"]
    assert all(result["mean_tokens"] == 1 for result in results)  # a reply that is only an end counts, too
    assert (tmp_path / "taught" / "adapter_config.json").is_file() is adapter
    assert (tmp_path / "taught" / "data" / "train.jsonl").is_file()
    assert sides == ["left"] * 8
    taught = AutoModelForCausalLM.from_pretrained(tmp_path / "taught")
    assert isinstance(taught, LlamaForCausalLM)
    # At such a rate it is what it was, or what it was and an adapter that does nothing yet
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(taught(ids).logits, start.eval()(ids).logits, atol=1e-5, rtol=0)
    assert any(not torch.equal(a, b) for a, b in zip(taught.parameters(), start.parameters(), strict=False))


def test_more_problems_than_there_are_cannot_be_had(monkeypatch):
    few = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # 200 in all, a twentieth of which is for validation
    monkeypatch.setitem(FAMILIES, "chain_sum", replace(FAMILIES["chain_sum"], levels=[few] * 3))
    with pytest.raises(ValueError, match="too few `validation` problems of `chain_sum` at difficulty 1 for 720 rows"):
        problems("validation", 720, seed=0)


def test_the_tokenizer_has_digits_of_their_own_and_gives_back_what_it_read(rows, tokenizer):
    assert len(tokenizer) <= 1024
    for example in rows[:200]:
        text = example["completion"][0]["content"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if re.search(r"\d", token)]
        assert all(re.fullmatch(r"\d", token) for token in digits) and len(digits) == len(re.findall(r"\d", text))
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(out["input_ids"], out["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "That.<|im_end|>"


def test_an_interrupted_warm_start_goes_on_to_the_same_weights_and_leaves_what_the_next_stages_take(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sft, "TOKENIZER_ROWS", 100)
    monkeypatch.setattr(sft, "MAX_NEW_TOKENS", 1)
    options = {**SMALL, "max_steps": 4, "save_steps": 2, "accuracy_steps": 2, "per_device_train_batch_size": 2}
    options |= {"warmup_steps": 1, "lr_scheduler_kwargs": '{"num_decay_steps": 1}', "disable_tqdm": "true"}
    options |= {"logging_steps": 1}
    drawn_from, answer = [], sft.answer

    def watched(model, tokenizer, tasks, mode, max_new_tokens, sample=False):
        if sample:
            drawn_from.append(torch.get_rng_state().numpy().tobytes())
        return answer(model, tokenizer, tasks, mode, max_new_tokens, sample)

    monkeypatch.setattr(sft, "answer", watched)

    def run(name, **changes):
        given = {**options, "output_dir": tmp_path / name, **changes}
        main(["--config", str(ROOT / "recipes/small/sft.yaml"), *(f"--{key}={value}" for key, value in given.items())])
        results = json.loads((tmp_path / name / "sft.json").read_text())["rows"]
        # 7 families, plain and concise, at two steps; and 4 ways, greedy and sampled
        assert Counter(result["phase"] for result in results) == {"training": 28, "final": 56}
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    whole = run("whole")
    assert "step 2: " in capsys.readouterr().out
    halfway = tmp_path / "whole" / "checkpoint-2"
    again = run("again", resume_from_checkpoint=halfway)
    out = capsys.readouterr().out
    assert "step 2: " not in out and "step 4: " in out and "leg_counting" in out  # it has not begun anew
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    logs = [
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        for name in ("whole", "again")
    ]
    tokens = [[entry["num_tokens"] for entry in log if "num_tokens" in entry] for log in logs]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 4 and tokens[0][0] < tokens[0][3]
    # After the last step there is nothing to go through on the way, and what is sampled is the same
    run("last", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4")
    assert len(drawn_from) == 3 * len(TEMPLATES) and len(set(drawn_from)) == len(TEMPLATES)
    # With the problems of another seed nothing is gone on with, or begun beside its checkpoints, and those that are there stay
    data = tmp_path / "whole" / "data"
    before = (data / "train.jsonl").read_text()
    for changes in (
        {"resume_from_checkpoint": halfway},
        {},
        {"resume_from_checkpoint": halfway, "output_dir": tmp_path / "new"},
    ):
        with pytest.raises(SystemExit):
            run("whole", seed=7, **changes)
        assert "train.jsonl` is not there, or has other problems than this run poses" in capsys.readouterr().err
    assert (data / "train.jsonl").read_text() == before and not (tmp_path / "new").exists()
    part = next((data / "by_task").iterdir())
    kept = part.read_text()
    part.unlink()
    with pytest.raises(SystemExit):
        run("whole", resume_from_checkpoint=halfway)
    assert f"{part.name}` is not there" in capsys.readouterr().err
    part.write_text(kept)
    first = AutoModelForCausalLM.from_pretrained(halfway).state_dict()
    assert any(not torch.equal(value, first[name]) for name, value in whole.items())

    folder = tmp_path / "whole"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    test, train = (read(folder / "data" / f"{split}.jsonl") for split in ("test", "train"))
    parts = {path.stem: read(path) for path in (folder / "data" / "by_task").iterdir()}
    assert len(train) == len(test) == 20 and set(parts) == set(CONFIG.posed) < set(FAMILIES)
    posed = Counter((row["task"], row["difficulty"]) for row in test)
    assert posed == {(task, level): 2 for task in CONFIG.posed for level in (1, 2)}
    assert all(part == [row for row in test if row["task"] == task] for task, part in parts.items())


def test_mistakes_end_before_training(tmp_path):
    with pytest.raises(ValueError, match="`taught` has `sums`, and the families are chain_sum"):
        SmallConfig(taught=["sums"])
    with pytest.raises(ValueError, match="`families` has `sums`, and the families are chain_sum"):
        SmallConfig(families=["chain_sum", "sums"])
    with pytest.raises(ValueError, match="`families` is empty"):
        SmallConfig(families=[])
    for name in ("taught", "posed"):
        given = {"families": ["gcd", "chain_sum"], "taught": ["gcd"], "posed": ["gcd"], name: ["leg_counting"]}
        with pytest.raises(ValueError, match=f"`{name}` has `leg_counting`, and the families are gcd, chain_sum"):
            SmallConfig(**given)
    with pytest.raises(ValueError, match="`difficulty` is 0"):
        SmallConfig(difficulty=0)
    with pytest.raises(ValueError, match="`posed_difficulty` is 3 and `difficulty` 2"):
        SmallConfig(posed_difficulty=3, difficulty=2)
    with pytest.raises(ValueError, match="`taught_difficulty` is 4"):
        SmallConfig(taught_difficulty=4)
    with pytest.raises(ValueError, match="`slip_probability` is 2"):
        SmallConfig(slip_probability=2)
    with pytest.raises(ValueError, match="`posed` has `sums`, and the families are chain_sum"):
        SmallConfig(posed=["sums"])
    with pytest.raises(ValueError, match="`posed` is empty"):
        SmallConfig(posed=[])
    with pytest.raises(ValueError, match="`posed_difficulty` is 0"):
        SmallConfig(posed_difficulty=0)
    for name, fewest in (("train_size", 10), ("test_size", 10), ("accuracy_problems", 21)):
        with pytest.raises(ValueError, match=f"`{name}` is {fewest - 1} and must be at least {fewest}"):
            SmallConfig(**{name: fewest - 1})
    few = SmallConfig(families=["chain_sum", "gcd"], difficulty=2, taught=["gcd"], posed=["gcd"], accuracy_problems=4)
    for name, fewest in (("train_size", 2), ("test_size", 2), ("accuracy_problems", 4)):
        with pytest.raises(ValueError, match=f"`{name}` is {fewest - 1} and must be at least {fewest}"):
            replace(few, **{name: fewest - 1})
    for task in ("families", "taught", "posed"):
        with pytest.raises(ValueError, match=f"`{task}` has `gcd` more than once"):
            replace(few, **{task: ["chain_sum", "gcd", "gcd"]})
    args = SFTConfig(str(tmp_path / "few"), use_cpu=True, bf16=False, max_steps=1)
    sizes = {"train_size": 20, "test_size": 20, "accuracy_problems": 20}
    for name in sizes:
        with pytest.raises(ValueError, match=f"`{name}` is 5000. There are too few `.*` problems of `"):
            sft.check(replace(few, **sizes | {name: 5000}), args, ModelConfig())
    assert not (tmp_path / "few").exists()
    drawn = sft.draw(replace(few, **sizes), 0)
    asked = {split: {(p.task, p.difficulty) for p in found} for split, found in drawn.items()}
    both = {("gcd", 1), ("gcd", 2)}
    assert asked == {"train": both, "test": both, "validation": both | {("chain_sum", 1), ("chain_sum", 2)}}
    with pytest.raises(ValueError, match="`max_steps` is missing"):
        sft.check(CONFIG, SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), ModelConfig())
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1)
    for options, sentence in (
        ({"use_peft": True}, "`use_peft` is about a checkpoint that is taught"),
        ({"dtype": "bfloat16"}, "`dtype` is about a checkpoint that is taught"),
        ({"model_name_or_path": "./nowhere"}, "there is no folder `./nowhere`"),
        ({"model_name_or_path": "x", "load_in_4bit": True}, "A quantised model is not taught here"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sft.check(CONFIG, args, ModelConfig(**options))
    (tmp_path / "config.json").touch()  # of another model, whose data would be gone at once
    with pytest.raises(ValueError, match="`output_dir`: .* has a model already"):
        sft.check(CONFIG, SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1), ModelConfig())


def test_the_recipes_ask_in_the_words_that_were_taught():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes/small").glob("*.yaml")}
    for mode in ("concise", "solution", "sibling"):
        assert recipes[f"opsd_{mode}"]["teacher_prompt_template"] == TEMPLATES[mode]
    for name in ("opsd_competent", "smollm2_opsd", "smollm2_cpu_opsd"):
        assert recipes[name]["teacher_prompt_template"] == TEMPLATES["concise"]
    assert recipes["compress"]["prompt_only_template"] == TEMPLATES["concise"]
    names = [Path(path).stem for path in recipes["evaluate_by_task"]["tasks"]]
    assert names == list(CONFIG.posed)
    config, _ = parse(("trl_opsd.small.task.SmallConfig", "trl.SFTConfig"), ["--config", "recipes/small/sft.yaml"])
    assert config == SmallConfig(accuracy_steps=config.accuracy_steps)
    assert config.families == list(FAMILIES)
