import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from evaluation_world import make_model, make_tokenizer, save_checkpoint, sum_rows, write_rows
from transformers import Qwen3ForCausalLM

from trl_opsd.cli import parse
from trl_opsd.data.fit import write_all
from trl_opsd.evaluate import EvaluateConfig, evaluate
from trl_opsd.evaluate.__main__ import main
from trl_opsd.evaluate.backends import Request, Sampling, TransformersEngine
from trl_opsd.evaluate.estimate import wilson_interval
from trl_opsd.evaluate.plan import eos_token_ids, expand
from trl_opsd.evaluate.tasks import TASKS
from trl_opsd.results import write_results
from trl_opsd.tiny import make_tokenizer as tiny_tokenizer


class Scripted(Qwen3ForCausalLM):
    """Completes a prompt with what `script` says, as `generate` would: padded on the right after its end."""

    script: dict[str, str] = {}

    def generate(self, input_ids, attention_mask, generation_config, **kwargs):
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
    return write_rows(tmp_path / "test.jsonl", sum_rows())


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "checkpoint")


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
        assert row.pop("wall_s") >= row.pop("generation_s") >= 0
        assert row.pop("peak_memory_bytes") > 100e6  # torch alone is larger
        total = sum(parameter.numel() for parameter in make_model(tokenizer).parameters())
        numbers = {
            name: row.pop(name) for name in list(row) if name.startswith(("mean_tokens_", "strict", "flexible"))
        }
        assert numbers["mean_tokens_low"] < 5.75 < numbers["mean_tokens_high"]
        assert (numbers["strict_only"], numbers["flexible_only"]) == (0, 1)
        # Weights of four bytes, at each of 23 tokens; two answers are correct
        assert row.pop("bytes_per_correct") == 4 * total * 23 / 2
        assert row.pop("bytes_per_correct_low") < 4 * total * 23 / 2 < row.pop("bytes_per_correct_high")
        assert row == {
            "stage": "rlvr",
            "checkpoint": "scripted",
            "task": "sums",
            "decoding": "greedy",
            "prompt": "plain",
            "backend": "transformers",
            "n": 4,
            "samples": 1,
            "unverified": 0,
            "estimator": "mean@1",
            "accuracy": 0.5,
            "accuracy_low": wilson_interval(2, 4)[0],
            "accuracy_high": wilson_interval(2, 4)[1],
            "accuracy_flexible": 0.75,
            "mean_tokens": 5.75,
            "median_tokens": 4.5,
            "p90_tokens": pytest.approx(8.5),
            "p99_tokens": pytest.approx(9.85),
            "mean_thinking_tokens": pytest.approx((0 + 0 + 0 + 5) / 4),  # <think>, the box of three, </think>
            "mean_answer_tokens": pytest.approx(5.75 - 5 / 4),
            "truncated": 0.0,
            "markers_per_1000_tokens": 0.0,
            "weights_bytes": None,
            "weight_bits": 32.0,
            "parameters": total,
            "non_embedding_parameters": total - 2 * len(tokenizer) * 16,
            "active_parameters": total - 2 * len(tokenizer) * 16,
            "serving": [],
            "cached": 0,
            "cache_lines_skipped": 0,
            "too_long": 0,
            "at_k_bounds": {},
            "checkpoint_hash": None,
            "task_version": "1",
            "seed": 42,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": None,
            "stop": None,
            "max_completion_length": 1024,
            "thinking_budget": None,
            "reward_funcs": ["math_reward"],
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
        assert [record["question"] for record in records] == ["3+4", "3+5", "12+4", "12+5"]
        assert len({record["id"] for record in records}) == 4
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
        assert seen == [(done, 8) for done in range(1, 9)]


class TestGeneration:
    def completions(self, model, tokenizer, texts, greedy=True, batch_size=64, seed=42, top_k=0, done=()):
        ends = eos_token_ids(model.generation_config, tokenizer)
        sampling = Sampling(0.0 if greedy else 1.0, 1.0, top_k, 12, tuple(ends))
        requests = [Request(ids, seed + index) for index, ids in enumerate(write_all(tokenizer, texts))]
        engine = TransformersEngine(model, tokenizer.pad_token_id, batch_size)
        found = dict(engine.generate(requests, sampling, done))
        return [found.get(index) for index in range(len(texts))]

    texts = ["1+2=", "1", "12345678+9=", "7-", "3+3+3="]

    def test_padding_changes_nothing(self, tokenizer):
        model = make_model(tokenizer)
        together = self.completions(model, tokenizer, self.texts)
        alone = [self.completions(model, tokenizer, [text])[0] for text in self.texts]
        direct = [
            model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
            for ids in write_all(tokenizer, self.texts)
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
            eos_token_ids(model.generation_config, tokenizer)

    def test_seed(self, tokenizer):
        model = make_model(tokenizer)
        first, again, other = (
            self.completions(model, tokenizer, self.texts, greedy=False, seed=seed, batch_size=2) for seed in (1, 1, 2)
        )
        assert first == again != other
        # of each completion by itself
        assert first == self.completions(model, tokenizer, self.texts, greedy=False, seed=1, batch_size=5)
        assert first[2:] == self.completions(model, tokenizer, self.texts[2:], greedy=False, seed=3)

    def test_what_is_done_changes_nothing_about_the_rest(self, tokenizer):
        model = make_model(tokenizer)
        whole = self.completions(model, tokenizer, self.texts, greedy=False, batch_size=2)
        rest = self.completions(
            model, tokenizer, self.texts, greedy=False, batch_size=2, done={0, 2}
        )  # of two batches
        assert rest == [None if index in (0, 2) else ids for index, ids in enumerate(whole)]

    def test_sampling_parameters_of_the_checkpoint_are_not_used(self, tokenizer):
        model = make_model(tokenizer)
        expected = self.completions(model, tokenizer, self.texts, greedy=False)
        model.generation_config.update(temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0, do_sample=False)
        assert self.completions(model, tokenizer, self.texts, greedy=False) == expected
        assert self.completions(model, tokenizer, self.texts, greedy=False, top_k=1) != expected

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
        assert capsys.readouterr().out.count("mean@1") == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model_name_or_path", "no/such/checkpoint"], "there is no folder `no/such/checkpoint`"),
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
            (["--min_p", "1"], "`min_p` must be at least 0, which is no limit, and below 1"),
            (["--stop", ""], "`stop` has an empty text"),
            (["--thinking_tags", "<think>"], "`thinking_tags` are what opens and what closes thinking"),
            (["--thinking_budget", "1024"], "leaves nothing of `max_completion_length` 1024"),
            (
                ["--thinking_budget", "9", "--concurrency", "1"],
                "`thinking_budget` and `concurrency` exclude each other",
            ),
            (["--decoding", "sampled", "--pass_at_k", "3"], "`pass_at_k` 3 needs as many samples of a problem"),
            (["--task_options", '{"gsm8k": {}}'], "`task_options` are for single ones of `tasks`"),
            (["--concurrency", "64"], "`concurrency` 64 needs at least as many requests"),
            (["--chat_template_kwargs", "{a"], "`chat_template_kwargs` must be a mapping, as JSON"),
            (["--chat_template_kwargs", "[1]"], "`chat_template_kwargs` must be a mapping"),
            (["--rescore", "true"], "`rescore` needs the generations of an earlier run"),
            (["--num_samples", "0"], "`num_samples` must be at least 1"),
            (["--concurrency", "0"], "`concurrency` must list numbers of at least 1"),
            (
                ["--backend", "server"],
                "`backend: server` without `server_url` starts a server of vLLM: run `pip install vllm`",
            ),
            (["--backend", "server", "--server_api", "chat"], "`server_api: chat` is for a server that runs"),
            (["--backend", "server", "--server_model", "x"], "`server_model` is for a server that runs"),
            (["--server_url", "http://localhost:1"], "`server_url` is for `backend: server`"),
            (["--vllm_kwargs", "{a"], "`vllm_kwargs` must be a mapping, as JSON"),
            (["--tasks", "gsm8k"], "`dataset_name` and `tasks` exclude each other"),
            (["--checkpoints", "a=b"], "`checkpoints` excludes `model_name_or_path`"),
            (["--max_completion_length", "50000"], "more than the 32768 positions"),
            (["--output", "."], "`output` must be a JSON file"),
            (["--device", "abacus"], "`device`: this machine has no `abacus`"),
        ],
    )
    def test_bad_input_stops_before_a_model_is_loaded(
        self, checkpoint, problems, arguments, message, capsys, monkeypatch
    ):
        class Loaded(Exception):
            pass

        def load_engine(config, checkpoint, tokenizer):
            raise Loaded

        monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", load_engine)
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

    def test_recipes(self):
        recipes = Path(__file__).parents[1] / "recipes"
        (tiny,) = parse(
            (EvaluateConfig,), ["--config", str(recipes / "tiny/evaluate.yaml"), "--dataset_name", "gsm8k"]
        )
        assert tiny.reward_funcs == ["math_reward"] and tiny.decoding == ["greedy", "sampled"]
        arguments = ["--config", str(recipes / "evaluate.yaml"), "--checkpoints", "rlvr=a", "opsd=b"]
        (config,) = parse((EvaluateConfig,), arguments)
        runs = expand(config)
        assert [run.stage for run in runs[::9]] == ["rlvr", "prompt-only", "opsd"] and len(runs) == 27
        assert {run.task for run in runs} | {"reasoning-gym"} == set(TASKS)

    def test_a_prompt_that_the_tokenizer_cannot_write(self, checkpoint, tmp_path, capsys):
        rows = [*sum_rows(), {**sum_rows()[0], "prompt": [{"role": "user", "content": "Janet’s ducks lay 16 eggs."}]}]
        write_rows(tmp_path / "ducks.jsonl", rows)
        tiny_tokenizer(3).save_pretrained(checkpoint)  # which has no token for what it does not know
        with pytest.raises(SystemExit):
            main(["--model_name_or_path", checkpoint, "--dataset_name", str(tmp_path / "ducks.jsonl")])
        error = capsys.readouterr().err
        assert f"row {len(rows)}: the tokenizer of `{checkpoint}` cannot write this `prompt`" in error
        assert error.startswith("error: ") and error.count("\n") == 1
        write_rows(tmp_path / "ducks.jsonl", sum_rows())
        given = ["--model_name_or_path", checkpoint, "--dataset_name", str(tmp_path / "ducks.jsonl")]
        with pytest.raises(SystemExit):
            main([*given, "--prompt_template", "concise"])
        error = capsys.readouterr().err  # the rows are not at fault
        assert "row 1: " in error and "this `prompt` in the context 'concise' (" in error
        assert "take another context or model" in error

    @pytest.mark.parametrize("args", [["--report"], ["--compare", "one"], ["--card", "one", "--no_such"]])
    def test_what_is_wrong_with_the_options_of_a_command_is_one_sentence(self, args, capsys):
        with pytest.raises(SystemExit) as end:
            main(args)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1

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
