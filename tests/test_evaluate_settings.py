"""How completions are asked for and read: thinking, room, sampling, stop texts, budgets, options of single tasks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_world import TEMPLATE, Adder, make_model, make_tokenizer, save_checkpoint, sum_rows, write_rows
from transformers import BloomConfig, BloomForCausalLM, LogitsProcessorList

from trl_opsd.evaluate import EvaluateConfig, evaluate
from trl_opsd.evaluate.backends import Request, Sampling, TransformersEngine
from trl_opsd.evaluate.backends.transformers import _Draw
from trl_opsd.evaluate.estimate import Samples, summarize
from trl_opsd.evaluate.plan import expand, plan
from trl_opsd.evaluate.schema import CompletionRecord
from trl_opsd.evaluate.score import verify
from trl_opsd.evaluate.thinking import ThinkingTags, find_tags, read_thinking


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def problems(tmp_path):
    return write_rows(tmp_path / "test.jsonl", sum_rows())


def says_seven(completions, **kwargs):
    """A verifier of a user's, who has not thought of thinking."""
    return [float("7" in completion[-1]["content"]) for completion in completions]


class Says(Adder):
    """An engine that says what it is told for each prompt, up to the limit, and what was asked of it."""

    def __init__(self, script):
        super().__init__()
        self.script, self.asked = script, []

    def generate(self, requests, sampling, done=()):
        for index, request in enumerate(requests):
            if index not in done:
                prompt = self.tokenizer.decode(request.prompt_ids)
                self.asked.append((prompt, request, sampling))
                ids = self.tokenizer(self.script[prompt])["input_ids"]
                yield index, ids[: sampling.limit(request)]


@pytest.fixture
def told(checkpoint, problems, monkeypatch):
    """Evaluates an engine that says what it is told."""

    def run(script, template=None, **kwargs):
        if template is not None:
            tokenizer = make_tokenizer()
            tokenizer.chat_template = template
            tokenizer.save_pretrained(checkpoint)
        engine = Says(script)
        monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: engine)
        config = EvaluateConfig(**{"model_name_or_path": checkpoint, "dataset_name": problems} | kwargs)
        return evaluate(config, progress=lambda done, total: None), engine

    return run


class TestThinking:
    @pytest.mark.parametrize("verifier", ["math_reward", "test_evaluate_settings.says_seven"])
    def test_what_is_still_being_thought_is_no_answer(self, told, verifier):
        script = {
            "3+4=<think>": r"\boxed{7}<eos>",  # opened by the prompt, and never closed
            "3+5=<think>": r"x</think>\boxed{7}<eos>",
            "12+4=<think>": r"x</think>7<think>7<eos>",  # opened again
            "12+5=<think>": r"1</think>\boxed{17}<eos>",
        }
        (row,), _ = told(script, TEMPLATE + "<think>", reward_funcs=[verifier])
        assert row["accuracy"] == {"math_reward": 1 / 4, "test_evaluate_settings.says_seven": 2 / 4}[verifier]
        assert row["truncated"] == 0 and row["mean_thinking_tokens"] == (4 + 2 + 6 + 2) / 4

    @pytest.mark.parametrize(
        ("template", "tags"),
        [
            ("{{ '<think>' }} ... </think>", ("<think>", "</think>")),
            ("[THINK]x[/THINK]", ("[THINK]", "[/THINK]")),
            ("<seed:think>x</seed:think>", ("<seed:think>", "</seed:think>")),
            ("{%- if x %}<thought>{% endif %}</thought>", ("<thought>", "</thought>")),
            ("◁think▷◁/think▷", ("◁think▷", "◁/think▷")),
            ("<think> is never closed, <reasoning>this</reasoning> is", ("<reasoning>", "</reasoning>")),
            ("enable_thinking and reasoning_content", ("<think>", "</think>")),
        ],
    )
    def test_tags_are_found_in_the_template(self, tokenizer, template, tags):
        tokenizer.chat_template = template
        assert find_tags(tokenizer) == ThinkingTags(*tags)
        assert find_tags(tokenizer, ["<a>", "<b>"]) == ThinkingTags("<a>", "<b>")

    def test_none(self, tokenizer):
        tokenizer.chat_template = None
        assert find_tags(tokenizer) == ThinkingTags()

    @pytest.mark.parametrize("special", [True, False])
    @pytest.mark.parametrize(
        ("text", "opened", "judged", "tokens", "is_open"),
        [
            ("[THINK]1 2[/THINK]3<eos>", False, "<think>1 2</think>3", 5, False),
            ("1 2[/THINK]3<eos>", True, "<think>1 2</think>3", 4, False),
            ("1 2 3<eos>", True, "<think>1 2 3", 6, True),
            ("[THINK]1 2<eos>", False, "<think>1 2", 5, True),
            ("1 2<eos>", False, "1 2", 0, False),
            ("1</think>2<eos>", True, "<think>1</think>2", 4, True),  # not the tag of this model
        ],
    )
    def test_verifiers_read_the_usual_tags(self, tokenizer, special, text, opened, judged, tokens, is_open):
        tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=special)
        found = read_thinking(
            tokenizer(text)["input_ids"], tokenizer, ThinkingTags("[THINK]", "[/THINK]"), opened=opened
        )
        assert (found.judged, found.tokens, found.is_open) == (judged, tokens, is_open)
        assert ("[THINK]" in found.text) == (not special and "[THINK]" in text)  # as the model wrote it

    def test_the_answer_behind_other_tags(self, told):
        script = {"3+4=": r"<1>\boxed{8}<0>\boxed{7}<eos>"}
        tags = {"thinking_tags": ["?1?", "?0?"]}  # as the tokenizer writes what it does not know
        (row,), _ = told(script, max_samples=1, **tags)
        assert (row["accuracy"], row["mean_thinking_tokens"]) == (1.0, 9)

    def test_a_budget_closes_the_block(self, told):
        script = {
            "3+4=<think>": "x" * 20,
            "3+4=<think>xxxxxx?</think>?": r"\boxed{7}<eos>",  # line ends are unknown to the tokenizer
            "3+5=<think>": r"x</think>\boxed{8}<eos>",  # done in time
            "12+4=<think>": "x</think>" + "x" * 20,  # answers when the budget ends
            "12+4=<think>x</think>xxxx": r"\boxed{16}<eos>",
            "12+5=<think>": "x" * 20,
            "12+5=<think>xxxxxx?</think>?": "x" * 20,
        }
        (row,), engine = told(script, TEMPLATE + "<think>", thinking_budget=6, max_completion_length=14)
        assert (row["accuracy"], row["truncated"], row["thinking_budget"]) == (0.75, 0.25, 6)
        assert row["mean_tokens"] == (6 + 3 + 4 + 6 + 6 + 5 + 14) / 4
        assert row["mean_thinking_tokens"] == (8 + 2 + 2 + 8) / 4
        seeds = {}
        for prompt, request, _ in engine.asked:
            seeds.setdefault(prompt[:4], set()).add(request.seed)
        assert [len(found) for found in seeds.values()] == [2, 1, 2, 2]  # new random numbers behind the budget


class TestMajority:
    def test_there_is_none_where_no_answer_is_compared(self, tokenizer):
        from datasets import Dataset

        ids = [tokenizer(r"\boxed{7}<eos>")["input_ids"]]
        dataset = Dataset.from_list([{"prompt": "3+4=", "answer": "7", "tests": "assert True"}])
        (by_answer,) = verify(dataset, [lambda completions, answer, **kwargs: [1.0]], ids, tokenizer, [1])
        (by_tests,) = verify(dataset, [lambda completions, tests, **kwargs: [1.0]], ids, tokenizer, [1])
        assert (by_answer.answer, by_tests.answer) == ("7", None)

    @pytest.mark.parametrize(("answers", "present"), [((None, None), False), ((None, "1"), True)])
    def test_absent_and_not_zero(self, answers, present):
        records = [record(0, sample, correct=True, answer=answer) for sample, answer in enumerate(answers)]
        assert ("maj@2" in summarize(Samples.from_records(records)).at_k) == present


def record(problem, sample, **values):
    base = {"stage": None, "checkpoint": None, "task": "t", "decoding": "sampled", "prompt": "plain", "question": "q"}
    base |= {"completion": "x", "tokens": 1, "thinking_tokens": 0, "truncated": False, "correct_flexible": None}
    return CompletionRecord(**{**base, "id": problem, "sample": sample, "answer": None, **values})


class TestPassAtK:
    def test_any_k_with_an_interval(self, checkpoint, problems, monkeypatch, tmp_path):
        class Sometimes(Adder):
            def completion(self, prompt_ids):
                return super().completion(prompt_ids) if self.answered % 3 else self.tokenizer("x<eos>")["input_ids"]

        monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: Sometimes())
        config = EvaluateConfig(
            model_name_or_path=checkpoint, dataset_name=problems, decoding=["sampled"], num_samples=6, pass_at_k=[3, 5]
        )
        (row,) = evaluate(config, progress=lambda done, total: None)
        assert {name for name in row if name.startswith("pass@")} == {"pass@3", "pass@5"}
        assert row["pass@3"] == row["pass@5"] == 1.0  # two of six are wrong
        low, high = row["at_k_bounds"]["pass@3"]
        assert low < 1.0 == high

    def test_the_interval_covers(self):
        rng = np.random.default_rng(0)
        n, width, k, inside, trials = 60, 8, 3, 0, 300
        chances = rng.beta(0.7, 0.9, 200_000)
        truth = (1 - (1 - chances) ** k).mean()
        for _ in range(trials):
            correct = rng.random((n, width)) < rng.choice(chances, n)[:, None]
            records = [record(p, s, correct=bool(correct[p, s])) for p in range(n) for s in range(width)]
            low, high = summarize(Samples.from_records(records), pass_at_k_of=[k]).at_k_bounds[f"pass@{k}"]
            inside += low <= truth <= high
        assert 0.92 <= inside / trials <= 0.99


class TestRoom:
    def rows(self):
        long = {"prompt": [{"role": "user", "content": "3+4" + " " * 60}], "answer": "7"}
        near = {"prompt": [{"role": "user", "content": "3+4" + " " * 40}], "answer": "7"}
        return [*sum_rows(), long, near]

    def shrink(self, checkpoint, positions):
        file = Path(checkpoint, "config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": positions}))

    def test_one_prompt_that_is_too_long_stops_nothing_else(self, checkpoint, problems, tmp_path, told):
        self.shrink(checkpoint, 48)
        long = write_rows(tmp_path / "long.jsonl", self.rows())
        script = {row["prompt"][0]["content"] + "=": rf"x\boxed{{{row['answer']}}}<eos>" for row in self.rows()}
        rows, engine = told(script, dataset_name=None, tasks=[problems, long], max_completion_length=16)
        assert [(row["n"], row["too_long"], row["accuracy"]) for row in rows] == [(4, 0, 1.0), (5, 1, 0.8)]
        # 44 of 48 positions are taken, and the answer takes five
        assert [request.max_tokens for _, request, _ in engine.asked] == [16] * 8 + [4]
        assert rows[1]["truncated"] == 0.2

    def test_a_limit_that_fits_no_prompt_is_a_mistake(self, checkpoint, problems):
        self.shrink(checkpoint, 16)
        with pytest.raises(ValueError, match="shortest prompt .* has 4 tokens, .* more than the 16 positions"):
            plan(EvaluateConfig(model_name_or_path=checkpoint, dataset_name=problems, max_completion_length=13))
        plan(EvaluateConfig(model_name_or_path=checkpoint, dataset_name=problems, max_completion_length=12))

    def test_what_vllm_and_a_server_have_less(self, checkpoint, problems):
        asked = {"model_name_or_path": checkpoint, "dataset_name": problems, "max_completion_length": 13}
        with pytest.raises(ValueError, match="more than the 16 positions"):
            plan(EvaluateConfig(**asked, backend="vllm", vllm_kwargs={"max_model_len": 16}))

    def test_each_batch_has_one_limit(self, tokenizer):
        engine = TransformersEngine(make_model(tokenizer), tokenizer.pad_token_id, 8)
        requests = [Request([5, 6, 7], 0), Request([5, 6, 7], 0, 3), Request([5], 0, 3), Request([5], 0, 1)]
        found = dict(engine.generate(requests, Sampling(0.0, 1.0, 0, 6, (999,))))
        assert [len(found[index]) for index in range(4)] == [6, 3, 3, 1]
        assert found[1] == found[0][:3]

    def test_models_without_a_limit(self, tmp_path, problems):
        config = BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
        folder = tmp_path / "bloom"
        BloomForCausalLM(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        config = EvaluateConfig(model_name_or_path=str(folder), dataset_name=problems, max_completion_length=3)
        (row,) = evaluate(config, progress=lambda done, total: None)
        assert row["n"] == 4
        (row,) = evaluate(config, BloomForCausalLM.from_pretrained(folder), make_tokenizer(), lambda done, total: None)
        assert row["n"] == 4


class TestSampling:
    def test_tokens_are_drawn_by_their_probability(self):
        scores = torch.tensor([[2.0, 1.0, 0.0, -torch.inf, 0.5]])
        number = 20_000
        drawn = _Draw(list(range(number)), torch.device("cpu"))(None, scores.expand(number, -1))
        assert (drawn == 0).sum(dim=1).tolist() == [1] * number  # nothing else is left
        shares = torch.bincount(drawn.argmax(dim=1), minlength=5) / number
        expected = scores[0].softmax(dim=-1)
        sigma = (expected * (1 - expected) / number).sqrt()
        assert shares[3] == 0 and ((shares - expected).abs() <= 4 * sigma).all()

    @pytest.mark.parametrize(
        ("settings", "kept"),
        [({"min_p": 0.35}, 2), ({"min_p": 0.05}, 4), ({"top_k": 3}, 3), ({"top_p": 0.7}, 2), ({}, 5)],
    )
    def test_what_may_be_drawn(self, tokenizer, settings, kept, monkeypatch):
        """Probabilities 0.5, 0.2, 0.15, 0.14, 0.01."""
        seen = []
        model = make_model(tokenizer)

        def generate(input_ids, logits_processor, **kwargs):
            scores = torch.tensor([[0.5, 0.2, 0.15, 0.14, 0.01]]).log()
            warpers = LogitsProcessorList(logits_processor[:-1])
            seen.append(int((warpers(input_ids, scores) > -torch.inf).sum()))
            return torch.cat([input_ids, torch.ones(1, 1, dtype=torch.long)], dim=1)

        monkeypatch.setattr(model, "generate", generate)
        values = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} | settings
        sampling = Sampling(1.0, max_tokens=4, eos_ids=(1,), **values)
        list(TransformersEngine(model, 0, 1).generate([Request([5], 0)], sampling))
        assert seen == [kept]

    def test_min_p_is_told(self, told):
        script = {row["prompt"][0]["content"] + "=": "7<eos>" for row in sum_rows()}
        rows, engine = told(script, decoding=["greedy", "sampled"], min_p=0.1)
        assert [row["min_p"] for row in rows] == [None, 0.1]
        assert [sampling.min_p for *_, sampling in engine.asked] == [0.0] * 4 + [0.1] * 4


class TestStop:
    def test_the_end_that_a_text_makes(self, told):
        script = {
            "3+4=": r"\boxed{7}xx",  # ended by the text
            "3+5=": r"\boxed{8}x",  # half of it: cut by the limit
            "12+4=": r"xx\boxed{16}<eos>",  # nothing before it
            "12+5=": r"\boxed{17}<eos>",
        }
        (row,), engine = told(script, stop=["xx"], max_completion_length=5)
        assert (row["accuracy"], row["truncated"], row["stop"]) == (0.5, 0.25, ["xx"])
        assert engine.asked[0][2].stop == ("xx",)

    def test_transformers_stops_there(self, tokenizer):
        model = make_model(tokenizer)
        requests = [Request(tokenizer(text)["input_ids"], 0) for text in ("1+2=", "7-", "3+3+3=")]
        free = dict(TransformersEngine(model, 0, 8).generate(requests, Sampling(0.0, 1.0, 0, 12, (1,))))
        mark = tokenizer.decode(free[0][3:5], skip_special_tokens=True)
        sampling = Sampling(0.0, 1.0, 0, 12, (1,), stop=(mark,))
        found = dict(TransformersEngine(model, 0, 8, tokenizer).generate(requests, sampling))
        assert len(mark) >= 2 and len(found[0]) < len(free[0])
        for index, ids in found.items():
            text = tokenizer.decode(free[index], skip_special_tokens=True)
            wanted = text[: text.find(mark) + len(mark)] if mark in text else text
            assert tokenizer.decode(ids, skip_special_tokens=True) == wanted and ids == free[index][: len(ids)]


class TestOptions:
    def test_a_system_prompt_begins_every_conversation(self, told):
        script = {f"x!{row['prompt'][0]['content']}=": rf"\boxed{{{row['answer']}}}<eos>" for row in sum_rows()}
        (row,), _ = told(script, system_prompt="x!")
        assert row["accuracy"] == 1.0

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("3+4=", "`system_prompt` is for conversations"),
            ([{"role": "system", "content": "x"}, {"role": "user", "content": "3+4"}], "have a system message"),
        ],
    )
    def test_where_a_system_prompt_has_no_place(self, checkpoint, tmp_path, prompt, message):
        path = write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "answer": "7"}])
        with pytest.raises(ValueError, match=message):
            plan(EvaluateConfig(model_name_or_path=checkpoint, dataset_name=path, system_prompt="x"))

    def test_options_of_single_tasks_come_first(self):
        config = EvaluateConfig(
            model_name_or_path="c",
            tasks=["gsm8k[:5]", "math-500", "aime24"],
            num_samples=2,
            max_completion_length=100,
            task_options='{"gsm8k": {"max_completion_length": 50, "stop": ["x"]}, "aime24": {"num_samples": 9}}',
        )
        gsm8k, math, aime = expand(config)
        assert (gsm8k.max_completion_length, gsm8k.stop, gsm8k.num_samples, gsm8k.max_samples) == (50, ["x"], 2, 5)
        assert (math.max_completion_length, math.stop, math.num_samples) == (100, None, 2)
        assert (aime.max_completion_length, aime.num_samples) == (100, 9)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gsm": {}}, "`task_options` has `gsm`, and `tasks` are gsm8k"),
            ({"gsm8k": {"seed": 1}}, "`task_options` of `gsm8k` has `seed`, and can have"),
            ({"gsm8k": 7}, "must be a mapping"),
            ({"gsm8k": {"num_samples": 0}}, "`num_samples` must be at least 1"),
            ({"gsm8k": {"pass_at_k": [4]}}, "`pass_at_k` 4 needs as many samples"),
        ],
    )
    def test_mistakes_in_them(self, options, message):
        with pytest.raises(ValueError, match=message):
            expand(EvaluateConfig(model_name_or_path="c", tasks=["gsm8k"], task_options=options))
