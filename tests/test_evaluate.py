import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_opsd.cli import parse
from trl_opsd.evaluate import EvaluateConfig, evaluate
from trl_opsd.evaluate.__main__ import main
from trl_opsd.evaluate.measure import eos_token_ids, generate, summarize, tokenize, wilson_interval
from trl_opsd.results import write_results


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if terse %}!{% endif %}="


def make_tokenizer():
    tokens = ["<pad>", "<eos>", "<end>", "<think>", "</think>", *"0123456789+-=! x?", r"\boxed{", "}"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    words = Regex(r"\\boxed\{|</?think>|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=["<end>"],
        chat_template=TEMPLATE,
    )


def make_model(tokenizer, cls=Qwen3ForCausalLM):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    return cls(config).eval()


class Scripted(Qwen3ForCausalLM):
    """Completes a prompt with what `script` says, as `generate` would: padded on the right after its end."""

    script: dict[str, str] = {}

    def generate(self, input_ids, attention_mask, generation_config):
        tokenizer = make_tokenizer()
        completions = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist()), "padding must be on the left"
            ids = tokenizer(self.script[tokenizer.decode(row[mask.bool()])])["input_ids"]
            completions.append(ids[: generation_config.max_new_tokens])
        width = max(map(len, completions))
        pad = generation_config.pad_token_id
        return torch.cat([input_ids, torch.tensor([ids + [pad] * (width - len(ids)) for ids in completions])], dim=1)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def problems(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)} for a in (3, 12) for b in (4, 5)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    make_model(tokenizer).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


class TestArithmetic:
    @pytest.mark.parametrize(
        ("correct", "n", "low", "high"),
        # Closed form by hand: all of n correct gives n / (n + z²), none gives its mirror image; the last is Newcombe's
        # worked example (Statistics in Medicine 17, 1998: 81 of 263 is 0.2553 to 0.3662).
        [(10, 10, 10 / 13.841459, 1.0), (0, 10, 0.0, 3.841459 / 13.841459), (81, 263, 0.2553, 0.3662)],
    )
    def test_wilson_interval(self, correct, n, low, high):
        assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)

    def test_wilson_interval_solves_its_quadratic(self):
        for correct, n in ((1, 7), (500, 2000), (1999, 2000)):
            for bound in wilson_interval(correct, n):
                distance = (correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
                assert abs(distance) == pytest.approx(1.959964, abs=1e-5)

    def test_summarize(self):
        samples = [
            {"tokens": tokens, "truncated": tokens == 40, "correct": tokens < 30, "correct_flexible": tokens <= 30}
            for tokens in (10, 20, 30, 40)
        ]
        samples.append({"tokens": 1000, "truncated": True, "correct": None, "correct_flexible": None})
        row = summarize(samples)
        assert (row["n"], row["unverified"]) == (4, 1)
        assert (row["accuracy"], row["accuracy_flexible"], row["truncated"]) == (0.5, 0.75, 0.25)
        assert (row["mean_tokens"], row["median_tokens"]) == (25.0, 25.0)
        # between the order statistics: 0.9 of the way from the first to the last is 0.7 between the 3rd and the 4th
        assert row["p90_tokens"] == pytest.approx(37.0) and row["p99_tokens"] == pytest.approx(39.7)
        assert (row["accuracy_low"], row["accuracy_high"]) == wilson_interval(2, 4)

    def test_no_verdict_at_all(self):
        with pytest.raises(ValueError, match="None of the 1 problems can be verified"):
            summarize([{"tokens": 1, "truncated": False, "correct": None, "correct_flexible": None}])


class TestScripted:
    """Completions that are known, so every number is known."""

    script = {
        "3+4=": r"\boxed{7}<eos>",  # right, 4 tokens
        "3+5=": r"\boxed{7}<end>",  # wrong, 4 tokens
        "12+4=": "x 16<eos>",  # right if flexible, 5 tokens
        "12+5=": r"<think>\boxed{1}</think>\boxed{17}<eos>",  # right, 10 tokens
    }

    def run(self, tokenizer, path, script, batch_size=3, **kwargs):
        model = make_model(tokenizer, Scripted)
        model.script = script
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<end>")
        config = EvaluateConfig(model_name_or_path="scripted", dataset_name=path, batch_size=batch_size, **kwargs)
        return evaluate(config, model, tokenizer)[0]

    def test_row(self, tokenizer, problems):
        row = self.run(tokenizer, problems, self.script, stage="rlvr", task="sums")
        assert row.pop("wall_s") >= 0
        assert row == {
            "stage": "rlvr",
            "checkpoint": "scripted",
            "task": "sums",
            "decoding": "greedy",
            "prompt": "plain",
            "n": 4,
            "unverified": 0,
            "accuracy": 0.5,
            "accuracy_low": wilson_interval(2, 4)[0],
            "accuracy_high": wilson_interval(2, 4)[1],
            "accuracy_flexible": 0.75,
            "mean_tokens": 5.75,
            "median_tokens": 4.5,
            "p90_tokens": pytest.approx(8.5),
            "p99_tokens": pytest.approx(9.85),
            "truncated": 0.0,
            "parameters": sum(parameter.numel() for parameter in make_model(tokenizer).parameters()),
            "seed": 42,
            "temperature": 0.0,
        }

    def test_truncated_is_never_correct(self, tokenizer, problems):
        script = {**self.script, "3+4=": r"\boxed{7}       "}
        row = self.run(tokenizer, problems, script, max_completion_length=10)
        assert (row["accuracy"], row["accuracy_flexible"], row["truncated"]) == (0.25, 0.5, 0.25)
        assert row["mean_tokens"] == (10 + 4 + 5 + 10) / 4

    def test_unverifiable_problems_are_counted_apart(self, tokenizer, tmp_path):
        Dataset.from_dict({"prompt": ["3+4=", "3+5="], "answer": ["7", r"\frac{"]}).to_json(tmp_path / "a.jsonl")
        row = self.run(tokenizer, str(tmp_path / "a.jsonl"), self.script)
        assert (row["n"], row["unverified"], row["accuracy"]) == (1, 1, 1.0)

    def test_every_verifier_must_agree(self, tokenizer, problems):
        row = self.run(tokenizer, problems, self.script, reward_funcs=["math_reward", "think_format_reward"])
        assert row["accuracy"] == 0.25

    def test_other_verifiers_have_no_flexible_score(self, tokenizer, problems):
        row = self.run(tokenizer, problems, self.script, reward_funcs=["think_format_reward"])
        assert (row["accuracy"], row["accuracy_flexible"]) == (0.25, None)

    @pytest.mark.parametrize(("template", "mark"), [("{prompt}-{answer}?", "-7?"), ("{prompt} x", " x")])
    def test_prompt_template(self, tokenizer, problems, template, mark):
        script = {f"3+4{mark}=": r"\boxed{7}<eos>"}
        row = self.run(tokenizer, problems, script, prompt_template=template, max_samples=1)
        assert (row["n"], row["accuracy"], row["prompt"]) == (1, 1.0, template)

    def test_chat_template_kwargs(self, tokenizer, problems):
        script = {"3+4!=": r"\boxed{7}<eos>"}
        row = self.run(tokenizer, problems, script, chat_template_kwargs='{"terse": true}', max_samples=1)
        assert row["accuracy"] == 1.0

    def test_completions_are_saved_in_the_order_of_the_problems(self, tokenizer, problems, tmp_path):
        output = tmp_path / "new" / "result.json"
        self.run(tokenizer, problems, self.script, output=str(output), save_completions=True)
        lines = output.with_name("result.completions.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["id"] for record in records] == [0, 1, 2, 3]
        assert [record["tokens"] for record in records] == [4, 4, 5, 10]
        assert [record["correct"] for record in records] == [True, False, False, True]
        assert records[2]["completion"] == "x 16" and records[2]["correct_flexible"]
        assert [path.name for path in output.parent.iterdir()] == ["result.completions.jsonl"]

    def test_progress(self, tokenizer, problems):
        seen = []
        model = make_model(tokenizer, Scripted)
        model.script = {key: value.replace("<end>", "<eos>") for key, value in self.script.items()}
        config = EvaluateConfig(dataset_name=problems, decoding=["greedy", "sampled"], batch_size=3)
        evaluate(config, model, tokenizer, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(3, 8), (4, 8), (7, 8), (8, 8)]


class TestGeneration:
    def completions(self, model, tokenizer, texts, decoding="greedy", **kwargs):
        config = EvaluateConfig(dataset_name="x", max_completion_length=12, **kwargs)
        ends = eos_token_ids(model, tokenizer)
        prompt_ids = tokenize(texts, tokenizer)
        found = {}
        for indices, batch in generate(config, decoding, model, tokenizer, prompt_ids, ends):
            found.update(zip(indices, batch, strict=True))
        return [found[index] for index in range(len(texts))]

    texts = ["1+2=", "1", "12345678+9=", "7-", "3+3+3="]

    def test_padding_changes_nothing(self, tokenizer):
        model = make_model(tokenizer)
        together = self.completions(model, tokenizer, self.texts)
        alone = [self.completions(model, tokenizer, [text])[0] for text in self.texts]
        direct = [
            model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
            for ids in tokenize(self.texts, tokenizer)
        ]
        assert together == alone == direct == self.completions(model, tokenizer, self.texts, batch_size=2)
        assert len({tuple(ids) for ids in together}) > 1

    def test_every_declared_end_ends(self, tokenizer):
        model = make_model(tokenizer)
        free = self.completions(model, tokenizer, self.texts)
        end = free[0][2]  # a token that the model writes by itself becomes one that ends
        model.generation_config.eos_token_id = [end]
        for before, after in zip(free, self.completions(model, tokenizer, self.texts), strict=True):
            assert after == (before[: before.index(end) + 1] if end in before else before)

    def test_end_declared_nowhere(self, tokenizer):
        model = make_model(tokenizer)
        model.generation_config.eos_token_id = tokenizer.eos_token = None
        with pytest.raises(ValueError, match="has an `eos_token_id`"):
            eos_token_ids(model, tokenizer)

    def test_seed(self, tokenizer):
        model = make_model(tokenizer)
        first, again, other = (
            self.completions(model, tokenizer, self.texts, "sampled", seed=seed, batch_size=2) for seed in (1, 1, 2)
        )
        assert first == again != other

    def test_sampling_parameters_of_the_checkpoint_are_not_used(self, tokenizer):
        model = make_model(tokenizer)
        expected = self.completions(model, tokenizer, self.texts, "sampled")
        model.generation_config.update(temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0, do_sample=False)
        assert self.completions(model, tokenizer, self.texts, "sampled") == expected
        assert self.completions(model, tokenizer, self.texts, "sampled", top_k=1) != expected

    def test_random_numbers_and_mode_of_the_caller_are_kept(self, tokenizer, problems):
        model = make_model(tokenizer).train()
        config = EvaluateConfig(dataset_name=problems, decoding=["sampled"], max_completion_length=3)
        state = torch.get_rng_state()
        evaluate(config, model, tokenizer)
        assert torch.equal(torch.get_rng_state(), state) and model.training


class TestCommandLine:
    def test_end_to_end(self, checkpoint, problems, tmp_path, capsys):
        recipe = tmp_path / "evaluate.yaml"
        recipe.write_text(
            f"model_name_or_path: {checkpoint}\ndataset_name: {problems}\ndecoding: [greedy, sampled]\n"
            "max_completion_length: 9\nbatch_size: 3\nchat_template_kwargs:\n  terse: false\nstage: sft\n"
        )
        output = tmp_path / "out" / "result.json"
        main(["--config", str(recipe), "--output", str(output), "--batch_size", "2", "--save_completions", "true"])
        results = json.loads(output.read_text())
        assert set(results) == {"run", "environment", "rows"}
        assert results["run"]["config"]["batch_size"] == 2 and results["run"]["seed"] == 42
        assert set(results["environment"]) == {"device", "machine", "versions"}
        assert [(row["stage"], row["decoding"], row["n"]) for row in results["rows"]] == [
            ("sft", "greedy", 4),
            ("sft", "sampled", 4),
        ]
        records = [json.loads(line) for line in (tmp_path / "out" / "result.completions.jsonl").open()]
        for decoding, row in zip(("greedy", "sampled"), results["rows"], strict=True):
            tokens = [record["tokens"] for record in records if record["decoding"] == decoding]
            assert row["mean_tokens"] == np.mean(tokens) and max(tokens) <= 9
        assert capsys.readouterr().out.count("accuracy") == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model_name_or_path", "no/such/checkpoint"], "there is no checkpoint at `no/such/checkpoint`"),
            (["--dataset_name", "no/such.jsonl"], "There is no data at `no/such.jsonl`"),
            (["--dataset_name", "math-500", "--dataset_split", "train"], "`math-500` has no split `train`"),
            (["--reward_funcs", "accuracy_reward"], "The verifier `accuracy_reward` needs the column `solution`"),
            (["--reward_funcs", "maths"], "Unknown reward function `maths`"),
            (["--prompt_template", "solution"], "needs the column `solution`"),
            (["--prompt_template", "concise"], None),
            (["--prompt_template", "be brief"], "`prompt_template` has no `{prompt}`"),
            (["--decoding", "beam"], "`decoding` must list 'greedy', 'sampled' or both"),
            (["--batch_size", "0"], "`batch_size` must be at least 1"),
            (["--max_samples", "0"], "`max_samples` must be at least 1"),
            (["--temperature", "0"], "`temperature` must be above 0"),
            (["--top_p", "1.5"], "`top_p` must be above 0 and at most 1"),
            (["--top_k", "-1"], "`top_k` must be at least 0"),
            (["--chat_template_kwargs", "{a"], "`chat_template_kwargs` is not valid JSON"),
            (["--chat_template_kwargs", "[1]"], "`chat_template_kwargs` must be a mapping"),
            (["--save_completions", "true"], "`save_completions` needs `output`"),
            (["--output", "."], "`output` must be a JSON file"),
            (["--device", "abacus"], "`device`: this machine has no `abacus`"),
        ],
    )
    def test_bad_input_stops_before_a_model_is_loaded(
        self, checkpoint, problems, arguments, message, capsys, monkeypatch
    ):
        class Loaded(Exception):
            pass

        def load_model(config):
            raise Loaded

        monkeypatch.setattr("trl_opsd.evaluate.__main__.load_model", load_model)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        arguments = ["--model_name_or_path", checkpoint, "--dataset_name", problems, *arguments]
        if message is None:
            with pytest.raises(Loaded):
                main(arguments)
            return
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and message in error and error.count("\n") == 1

    def test_unknown_key(self, tmp_path, capsys):
        (tmp_path / "a.yaml").write_text("dataset_name: x\nbatchsize: 3\n")
        with pytest.raises(SystemExit) as stop:
            main(["--config", str(tmp_path / "a.yaml")])
        assert stop.value.code == 2 and "`batchsize`" in capsys.readouterr().err

    def test_a_word_where_a_list_belongs(self, tmp_path, capsys):
        (tmp_path / "a.yaml").write_text("dataset_name: x\nreward_funcs: math_reward\n")
        with pytest.raises(SystemExit):
            main(["--config", str(tmp_path / "a.yaml")])
        assert "write `reward_funcs: [math_reward]`" in capsys.readouterr().err

    @pytest.mark.parametrize("recipe", ["evaluate.yaml", "tiny/evaluate.yaml"])
    def test_recipes(self, recipe):
        path = Path(__file__).parents[1] / "recipes" / recipe
        (config,) = parse((EvaluateConfig,), ["--config", str(path), "--dataset_name", "gsm8k"])
        assert config.reward_funcs == ["math_reward"] and config.decoding == ["greedy", "sampled"]

    def test_tokenizer_without_a_chat_template(self, checkpoint, problems, capsys):
        Path(checkpoint, "chat_template.jinja").unlink()
        with pytest.raises(SystemExit):
            main(["--model_name_or_path", checkpoint, "--dataset_name", problems])
        assert "has no chat template" in capsys.readouterr().err


class TestResults:
    def test_nothing_half_written(self, tmp_path):
        path = tmp_path / "result.json"
        write_results(path, [{"accuracy": 0.5}], {"seed": 1})
        before = path.read_text()
        with pytest.raises(ValueError):
            write_results(path, [{"accuracy": float("nan")}], {"seed": 1})
        assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
        assert json.loads(before)["run"]["config"] == {"seed": 1}
