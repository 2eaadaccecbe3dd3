"""Stage 1: what `RLVRTrainer` changes, and its command line."""

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rlvr_worker
import torch
import yaml
from datasets import Dataset, IterableDataset
from rlvr_worker import SIZE, by_prompt, examples, generate, is_right, make_trainer, prompt_of, reply
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer, ModelConfig, get_peft_config

from trl_opsd import RLVRConfig, RLVRTrainer
from trl_opsd.cli import parse
from trl_opsd.rewards import math_reward
from trl_opsd.rlvr.__main__ import main
from trl_opsd.rlvr.bank import prompt_id, read_attempts, read_rollouts
from trl_opsd.rlvr.identity import Writer, hash_vocabulary, hash_weights, read_writer
from trl_opsd.rlvr.run import RLVRScriptArguments


ROOT = Path(__file__).parents[1]
OPTIONS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
}


def rewards(trainer_class, model, tokenizer, rows, folder, ids_per_row, functions=math_reward):
    trainer = trainer_class(
        model,
        reward_funcs=functions,
        args=RLVRConfig(str(folder), **OPTIONS),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    inputs = [rows[0]] * len(ids_per_row)
    texts = tokenizer.batch_decode(ids_per_row, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return trainer._calculate_rewards(inputs, [row["prompt"] for row in inputs], completions, ids_per_row)


def test_a_truncated_completion_earns_nothing(small_model, tokenizer, rows, tmp_path):
    right = tokenizer(rows[0]["solution"])["input_ids"]
    wrong = tokenizer(f"\\boxed{{{(int(rows[0]['answer']) + 1) % 7}}}")["input_ids"]
    end = [tokenizer.eos_token_id]
    replies = [right + end, right, wrong + end, wrong]
    arguments = (small_model(), tokenizer, rows, tmp_path, replies)
    assert rewards(GRPOTrainer, *arguments).flatten().tolist() == [1, 1, 0, 0]
    assert rewards(RLVRTrainer, *arguments).flatten().tolist() == [1, 0, 0, 0]


def test_only_positive_rewards_are_taken_away(small_model, tokenizer, rows, tmp_path):
    def punish(completions, **kwargs):
        return [-0.5] * len(completions)

    def abstain(completions, **kwargs):
        return [None] * len(completions)

    right = tokenizer(rows[0]["solution"])["input_ids"]
    arguments = (small_model(), tokenizer, rows, tmp_path, [right], [math_reward, punish, abstain])
    scores = rewards(RLVRTrainer, *arguments)[0]
    assert scores[:2].tolist() == [0, -0.5] and scores[2].isnan()


# Refilling, and the bank, in one process and in two. Of twelve rollouts the second group lies on both of two processes


def run(folder, processes, per_device, rounds):
    folder.mkdir()
    options = ["--output", str(folder), "--per_device", str(per_device), "--rounds", *map(str, rounds)]
    if processes == 1:
        rlvr_worker.main(options)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(ROOT / "tests" / "rlvr_worker.py"), *options]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [torch.load(folder / f"process-{process}.pt", weights_only=False) for process in range(processes)]


ROUNDS = [1, 2, 40]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlvr")
    return folder, run(folder / "one", 1, 12, ROUNDS), run(folder / "two", 2, 6, ROUNDS)


def trained_on(output, tokenizer):
    """What the rows of a batch say: prompt, completion, advantage."""
    # Prompts are padded on the left and completions on the right
    assert (output["prompt_mask"].diff() >= 0).all() and (output["completion_mask"].diff() <= 0).all()
    for part in ("prompt", "completion"):
        assert (output[f"{part}_ids"][output[f"{part}_mask"] == 0] == tokenizer.pad_token_id).all()
    rows = []
    for index, advantage in enumerate(output["advantages"].tolist()):
        prompt = output["prompt_ids"][index][output["prompt_mask"][index].bool()].tolist()
        completion = output["completion_ids"][index][output["completion_mask"][index].bool()].tolist()
        rows.append((prompt_of(prompt), tokenizer.decode(completion, skip_special_tokens=True), round(advantage, 4)))
    return rows


def by_definition(prompt):
    """The advantages of a group."""
    rewards = torch.tensor([float(is_right(prompt, rollout)) for rollout in range(SIZE)])
    return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()


@pytest.mark.parametrize("case", range(len(ROUNDS)), ids=ROUNDS)
def test_groups_without_variance_are_replaced_by_fresh_ones(runs, tokenizer, case):
    _, ((*results,),), _ = runs
    rows = trained_on(results[case]["output"], tokenizer)
    groups = [rows[start : start + SIZE] for start in range(0, len(rows), SIZE)]
    prompts = [group[0][0] for group in groups]
    # The batch asks prompts 0, 1 and 2: always solved, mixed, never solved
    assert prompts[1] == 1
    mixed = [prompt % 5 == 1 for prompt in prompts]
    assert mixed == [True] * 3 if ROUNDS[case] == 40 else mixed[1]
    assert (prompts == [0, 1, 2]) == (ROUNDS[case] == 1)
    for prompt, group in zip(prompts, groups, strict=True):
        assert [text for _, text, _ in group] == [reply(prompt, index) for index in range(SIZE)]
        assert {other for other, _, _ in group} == {prompt}
        advantages = by_definition(prompt)
        assert [advantage for _, _, advantage in group] == pytest.approx(advantages, abs=1e-3)
    output = results[case]["output"]
    assert output["num_items_in_batch"] == output["completion_mask"].sum()
    assert output["completion_mask"].shape == output["completion_ids"].shape


def test_the_metrics_are_those_of_the_first_round(runs):
    _, ((once, twice, often, _),), _ = runs
    own = {"num_tokens", "rlvr/generation_rounds", "rlvr/groups_without_variance"}
    for result in (twice, often):
        assert {k: v for k, v in result["metrics"].items() if k not in own} == {
            k: v for k, v in once["metrics"].items() if k not in own
        }
        assert result["metrics"]["num_tokens"][0] > once["metrics"]["num_tokens"][0]
    assert once["metrics"]["rewards/math_reward/mean"] == [pytest.approx(6 / 12)]
    assert twice["metrics"]["rlvr/generation_rounds"] == [2]
    assert 2 < often["metrics"]["rlvr/generation_rounds"][0] < 40
    assert twice["metrics"]["rlvr/groups_without_variance"][0] > 0
    assert often["metrics"]["rlvr/groups_without_variance"] == [0]
    assert "rlvr/generation_rounds" not in once["metrics"]


@pytest.mark.parametrize("case", range(len(ROUNDS)), ids=ROUNDS)
def test_two_processes_train_on_what_one_does(runs, tokenizer, case):
    _, (one,), two = runs
    # Without this, two processes may silently be one
    assert [result[case]["num_processes"] for result in (one, *two)] == [1, 2, 2]
    together = [row for result in two for row in trained_on(result[case]["output"], tokenizer)]
    assert together == trained_on(one[case]["output"], tokenizer)
    for result in two:
        assert result[case]["output"]["num_items_in_batch"] == one[case]["output"]["num_items_in_batch"]
        assert result[case]["metrics"].keys() == one[case]["metrics"].keys()
        for name, values in one[case]["metrics"].items():
            assert result[case]["metrics"][name] == pytest.approx(values), name


def test_what_is_not_finite_is_left_out_by_two_processes_as_by_one(runs, tokenizer):
    """A rollout of the second process in the first step, and its gradient in the second."""
    folder, (one,), two = runs
    one, two = one[-1], [result[-1] for result in two]
    assert {result["wrapper"] for result in two} == {"DistributedDataParallel"}
    for step, weights in enumerate(one["weights"]):
        for name, value in weights.items():
            assert torch.equal(two[0]["weights"][step][name], two[1]["weights"][step][name]), (step, name)
            torch.testing.assert_close(two[0]["weights"][step][name], value, rtol=1e-4, atol=1e-5)
    for result in (one, *two):
        moved = [
            any(not torch.equal(before[name], after[name]) for name in before)
            for before, after in zip(result["weights"], result["weights"][1:], strict=False)
        ]
        assert moved == [True, False, True] and result["norms"][1] == 0
        # What an abandoned forward pass had measured would not be finite
        assert len(result["entropy"]) == 3 and all(map(math.isfinite, result["entropy"]))
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (folder / name / "faulty" / "left_out.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1] + [2] * 12
        assert tokenizer.decode(lines[0]["completion_ids"], skip_special_tokens=True) == reply(1, 2)
        assert examples[1]["prompt"][0]["content"] in lines[0]["prompt"] and "log-probability" in lines[0]["why"]
        assert "gradient" in lines[1]["why"] and len({line["prompt"] for line in lines[1:]}) == 3


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_bank_holds_what_was_correct_and_counts_all(runs, name):
    folder = runs[0]
    bank = folder / name / "1" / "bank"
    found = {}
    for row in read_rollouts(bank):
        found.setdefault(row["prompt"][0]["content"], []).append(row["completion"][0]["content"])
    texts = [row["prompt"][0]["content"] for row in examples[:3]]
    assert found == {texts[0]: [reply(0, i) for i in range(4)], texts[1]: [reply(1, 0), reply(1, 2)]}
    counts = dict(zip((prompt_id(row["prompt"]) for row in examples[:3]), [(4, 4), (4, 2), (4, 0)], strict=True))
    assert read_attempts(bank) == counts
    # Further rounds are paid for as well
    both = [read_rollouts(folder / run / "40" / "bank").to_list() for run in ("one", "two")]
    assert both[0] == both[1] and len(both[0]) > 6


@pytest.fixture
def fixed_rollouts(monkeypatch):
    asked = []

    def recorded(self, prompt_ids, *args):
        asked.append([prompt_of(ids) for ids in prompt_ids][::SIZE])
        return generate(self, prompt_ids, *args)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", recorded)
    return asked


def test_what_does_not_finish_or_is_only_evaluated_is_not_banked(tmp_path, fixed_rollouts):
    options = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "max_steps": 1}
    trainer = make_trainer(tmp_path, [examples[4], examples[0]], **options, bank_rollouts_per_prompt=3)
    trainer.eval_dataset = Dataset.from_list([examples[9]])
    trainer.evaluate()
    trainer.train()
    found = {}
    for row in read_rollouts(tmp_path / "bank"):
        found.setdefault(by_prompt[row["prompt"][0]["content"]], []).append(row["completion"][0]["content"])
    # The shortest three of four; the last one of prompt 4 is right and does not end
    assert found == {4: [reply(4, i) for i in range(3)], 0: [reply(0, i) for i in range(3)]}
    assert read_attempts(tmp_path / "bank") == {
        prompt_id(examples[4]["prompt"]): (4, 3),
        prompt_id(examples[0]["prompt"]): (4, 4),
    }


def test_no_bank_if_none_is_asked_for(tmp_path, fixed_rollouts):
    trainer = make_trainer(tmp_path, examples, per_device_train_batch_size=8, max_steps=1, bank_rollouts_per_prompt=0)
    trainer.train()
    assert not (tmp_path / "bank").exists()


def test_a_punishment_makes_nothing_wrong(tmp_path, fixed_rollouts):
    # Completions of 6 to 9 tokens, of at most 32, are all punished
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1}
    trainer = make_trainer(tmp_path, examples[:1], soft_punish_cache=31, **options)
    trainer.train()
    log = trainer.state.log_history[0]
    lengths = read_rollouts(tmp_path / "bank")["num_tokens"]
    assert log["rewards/math_reward/mean"] == 1 and len(lengths) == 4
    expected = sum((32 - 31 - length) / 31 for length in lengths) / 4
    assert log["rewards/soft_overlong_punishment_reward/mean"] == pytest.approx(expected)
    assert log["reward"] == pytest.approx(1 + expected) and log["reward"] < 1
    assert read_rollouts(tmp_path / "bank")["reward"] == [1.0] * 4


def test_a_punishment_makes_no_group_teach_anything(tmp_path, fixed_rollouts):
    """Of a group that is all wrong, or all right, the rewards differ by length alone: it is replaced all the same."""
    options = {"per_device_train_batch_size": 12, "max_steps": 1, "logging_steps": 1}
    trainer = make_trainer(tmp_path, examples, soft_punish_cache=31, max_generation_rounds=40, **options)
    trainer.train()
    log = trainer.state.log_history[0]
    # The first round asks prompts 0 (always solved), 1 (mixed) and 2 (never solved), all of them punished
    assert log["rewards/soft_overlong_punishment_reward/std"] > 0 and fixed_rollouts[0] == [0, 1, 2]
    assert len(fixed_rollouts[1]) == 2  # two groups are asked anew
    assert log["rlvr/generation_rounds"] == len(fixed_rollouts) > 1 and log["rlvr/groups_without_variance"] == 0


def test_reward_models_decide_where_there_is_no_verifier(tmp_path, fixed_rollouts):
    trainer = make_trainer(tmp_path, examples, per_device_train_batch_size=12, max_generation_rounds=2, max_steps=1)
    trainer._verifiers = []  # as if `math_reward` were a reward model
    trainer.train()
    assert trainer.state.log_history[0]["rlvr/generation_rounds"] == 2 and len(fixed_rollouts[1]) == 2


def test_a_resumed_run_asks_and_counts_what_an_uninterrupted_one_does(tmp_path, fixed_rollouts):
    options = {"per_device_train_batch_size": 8, "max_steps": 4, "max_generation_rounds": 2, "shuffle_dataset": True}
    options |= {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "whole", examples, **options).train()
    whole = list(fixed_rollouts)
    fixed_rollouts.clear()
    make_trainer(tmp_path / "parts", examples, **options).train()  # as if it were interrupted after its last step
    fixed_rollouts.clear()
    make_trainer(tmp_path / "parts", examples, **options).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")
    )
    assert 2 <= len(fixed_rollouts) < len(whole)
    assert fixed_rollouts == whole[-len(fixed_rollouts) :]
    assert len({tuple(prompts) for prompts in whole}) == len(whole)  # every round asks others
    whole, parts = (tmp_path / name / "bank" for name in ("whole", "parts"))
    assert read_attempts(parts) == read_attempts(whole)
    assert read_rollouts(parts).to_list() == read_rollouts(whole).to_list()


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({"max_generation_rounds": 0}, {}, "`max_generation_rounds` must be at least 1"),
        ({"max_generation_rounds": 2, "scale_rewards": "batch"}, {}, "`scale_rewards='batch'` exclude each other"),
        (
            {"max_generation_rounds": 2, "multi_objective_aggregation": "normalize_then_sum"},
            {},
            "'normalize_then_sum'` exclude each other",
        ),
        ({"soft_punish_cache": 9}, {}, "from 1 to `max_completion_length`, which is 8, and is 9"),
        ({"soft_punish_cache": 0}, {}, "from 1 to `max_completion_length`"),
        ({"bank_rollouts_per_prompt": -1}, {}, "`bank_rollouts_per_prompt` must be at least 0"),
        ({"max_generation_rounds": 2}, {"train_dataset": "stream"}, "is an IterableDataset"),
        ({}, {"tools": [len]}, "rollouts that are text alone, and there is `tools`"),
        (
            {"bank_rollouts_per_prompt": 0, "max_generation_rounds": 2},
            {"rollout_func": len},
            "there is `rollout_func`",
        ),
        ({}, {"train_dataset": "images"}, "there is `images`"),
        ({}, {"train_dataset": "few"}, "has 1 prompts and a batch takes 2"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, rows, options, arguments, message):
    datasets = {
        "stream": IterableDataset.from_generator(lambda: iter(rows)),
        "images": rows.map(lambda row: {"image": "?"}),
        "few": rows.select(range(1)),
        None: rows,
    }
    arguments = {**arguments, "train_dataset": datasets[arguments.get("train_dataset")]}
    with pytest.raises(ValueError, match=re.escape(message)):
        RLVRTrainer("no/model", math_reward, RLVRConfig(str(tmp_path), **{**OPTIONS, **options}), **arguments)


def test_the_private_names_of_grpo_that_we_rely_on():
    source = inspect.getsource(GRPOTrainer)
    for name in ("_metrics", "_tokenizer", "accelerator", "eos_token_ids", "num_generations", "reward_funcs"):
        assert f"self.{name}" in source
    assert "self.reward_weights = " in source and "self.state.num_input_tokens_seen += " in source
    parameters = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    }
    for name, expected in parameters.items():
        assert list(inspect.signature(inspect.unwrap(getattr(GRPOTrainer, name))).parameters) == expected
    ours, theirs = (list(inspect.signature(owner.__init__).parameters) for owner in (RLVRTrainer, GRPOTrainer))
    assert ours == theirs


@pytest.fixture
def recipe(tmp_path, checkpoint, rows):
    """Writes a recipe for two steps on a small model and returns its path, after the given changes."""

    def write(**changes) -> list[str]:
        data = tmp_path / "train.jsonl"
        if not data.exists():
            rows.to_json(data)
        config = {
            "model_name_or_path": checkpoint(),
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "out"),
            "reward_funcs": ["math_reward"],
            **OPTIONS,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return ["--config", str(path)]

    return write


def finishes(completions, **kwargs):
    """A reward that an untrained model gets now and then, so that there is something to learn from."""
    return [len(completion[0]["content"]) % 3 / 2 - 1 for completion in completions]


def test_a_run_leaves_an_ordinary_checkpoint(tmp_path, recipe, checkpoint, capsys):
    main([*recipe(reward_funcs=["math_reward", "test_rlvr.finishes"]), "--max_steps", "3"])
    assert "held out: 0 of " in capsys.readouterr().out
    out = tmp_path / "out"
    trained = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(checkpoint())
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).chat_template
    results = json.loads((out / "rlvr.json").read_text())
    assert results["run"]["config"]["max_steps"] == 3  # the command line overrides the recipe
    # what cards and provenance say of where it comes from
    assert results["run"]["config"]["model_name_or_path"] == checkpoint()
    assert results["run"]["config"]["dataset_name"] == str(tmp_path / "train.jsonl")
    assert any("rewards/math_reward/mean" in row for row in results["rows"])


def test_another_model_does_not_go_on_with_a_bank(tmp_path, recipe, checkpoint, monkeypatch, capsys):
    first, second = checkpoint(0), checkpoint(1)
    arguments = [*recipe(), "--max_steps", "1", "--model_name_or_path"]
    main([*arguments, first])
    bank = tmp_path / "out" / "bank"
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert read_writer(bank) == Writer(first, hash_weights(first), hash_vocabulary(tokenizer))
    before = read_attempts(bank)
    main([*arguments, shutil.copytree(first, str(tmp_path / "copy"))])  # the same one goes on
    assert read_writer(bank).model == first
    with pytest.raises(ValueError, match="is of .* and this run is of"):  # in a script, of a model in memory too
        RLVRTrainer(
            AutoModelForCausalLM.from_pretrained(second),
            math_reward,
            RLVRConfig(str(tmp_path / "out"), **OPTIONS),
            Dataset.from_list(examples),
            processing_class=tokenizer,
        )
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*arguments, second])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith(f"error: The rollout bank at `{bank}` is of `{first}` (weights ")
    assert f"this run is of `{second}` (weights " in error
    assert read_attempts(bank) == before


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_generatoins": 4},
            "Unknown key `num_generatoins` in {tmp}/recipe.yaml: did you mean `num_generations`?",
        ),
        ({"dataset_name": "{tmp}/gone.jsonl"}, "gone.jsonl"),
        ({"dataset_name": None}, "`dataset_name` is missing"),
        ({"model_name_or_path": "{tmp}/nowhere"}, "there is no folder `{tmp}/nowhere`"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"reward_funcs": None}, "`reward_funcs` is missing"),
        ({"reward_funcs": ["mathreward"]}, "Unknown reward function `mathreward`"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 entries and `reward_funcs` 1"),
        (
            {"reward_weights": [1.0], "soft_punish_cache": 4},
            "`reward_weights` has 1 entries and `reward_funcs` 1: give one weight for each function, and a last one for",
        ),
        ({"num_generations": 3}, "must be divisible by num_generations (3)"),
        ({"reward_funcs": ["accuracy_reward"]}, "The verifier `accuracy_reward` needs the column"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, recipe, rows, monkeypatch, capsys, changes, message):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    fill = lambda value: value.format(tmp=tmp_path) if isinstance(value, str) else value  # noqa: E731
    arguments = recipe(**{key: fill(value) for key, value in changes.items()})
    if changes.get("reward_funcs") == ["accuracy_reward"]:
        rows.remove_columns("solution").to_json(tmp_path / "train.jsonl")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and fill(message) in error, error


RECIPES = [
    path.relative_to(ROOT) for path in (*sorted(ROOT.glob("recipes/rlvr*.yaml")), ROOT / "recipes/tiny/rlvr.yaml")
]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_recipes_parse_and_their_numbers_fit(path):
    # No GPU here: everything else is read as on the machine that the recipe is for
    overrides = ["--bf16", "false", "--use_cpu", "true"]
    script_args, config, model_args = parse(
        (RLVRScriptArguments, RLVRConfig, ModelConfig), ["--config", str(ROOT / path), *overrides]
    )
    assert script_args.reward_funcs in (["math_reward"], ["code_reward"])
    assert model_args.model_name_or_path and script_args.dataset_name and config.max_steps > 0
    assert (get_peft_config(model_args) is not None) == ("lora" in path.name)
    text = (ROOT / path).read_text()
    command = re.search(
        r"#   (?:accelerate launch (?:--num_processes (\d+) )?|python )-m trl_opsd\.rlvr --config (\S+)", text
    )
    assert command[2] == str(path)
    processes = int(command[1] or 1)
    if named := re.search(r"(\d)gpu", path.name):
        assert processes == int(named[1]) and config.output_dir == f"runs/{path.stem}"
    update = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    rollouts = config.per_device_train_batch_size * config.steps_per_generation * processes
    problems, updates = rollouts // config.num_generations, rollouts // update
    assert rollouts % config.num_generations == 0 and rollouts % update == 0
    if path.parent.name == "recipes":
        stated = re.search(
            r"# (\d+) rollouts a generation: (\d+) problems, (\d+) rollouts each; (\d+) updates? of (\d+)", text
        )
        assert list(map(int, stated.groups())) == [rollouts, problems, config.num_generations, updates, update]
        # Where a generation is one update nothing can be clipped, so nothing says that it is
        assert ("epsilon" in text) == (updates > 1)
        size = {"dapo-math-17k": 14_116, "mbpp": 374}[script_args.dataset_name]
        asked = config.max_steps // updates * problems
        assert f"max_steps: {config.max_steps}  # {asked:,} problems, {asked / size:.1f} epochs of {size:,}\n" in text
        assert config.max_completion_length < config.vllm_max_model_length


def test_there_is_a_recipe_for_every_size():
    names = {path.name for path in RECIPES}
    assert names >= {"rlvr.yaml", "rlvr_math_1gpu_lora.yaml", "rlvr_math_8gpu.yaml"}
    assert names >= {"rlvr_code_1gpu_lora.yaml", "rlvr_code_4gpu.yaml", "rlvr_code_8gpu.yaml"}
