"""The rollout bank: what is on disk after whatever happened, who can read it, and what OPSD takes from it."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer

from trl_opsd.cli import parse
from trl_opsd.data import load_prompts
from trl_opsd.opsd import OPSDConfig
from trl_opsd.opsd.__main__ import main as opsd
from trl_opsd.opsd.run import OPSDScriptArguments, check_bank
from trl_opsd.prune.__main__ import main as prune
from trl_opsd.rlvr.bank import RolloutBank, prompt_id, read_attempts, read_rollouts
from trl_opsd.rlvr.identity import Writer, hash_vocabulary, hash_weights, read_writer
from trl_opsd.tiny.task import CONCISE_TEMPLATE, SOLUTION_TEMPLATE


ROOT = Path(__file__).parents[1]
ME = Writer("me", "1" * 64, "2" * 64)


def rollout(prompt, text, ids=None, chat=True):
    message = [{"role": "user", "content": prompt}]
    return {
        "prompt_id": prompt_id(message if chat else prompt),
        "prompt": message if chat else prompt,
        "completion": [{"role": "assistant", "content": text}] if chat else text,
        "completion_ids": list(range(len(text))) if ids is None else ids,
        "reward": 1.0,
    }


def on_disk(folder) -> dict[str, list[str]]:
    """The completions of each prompt, in the order of the files."""
    found = {}
    for path in sorted(Path(folder, "rollouts").glob("[!.]*")):
        for row in pq.read_table(path).to_pylist():
            found.setdefault(row["prompt"][0]["content"], []).append(row["completion"][0]["content"])
    return found


def expected(adds, limit) -> dict[str, list[str]]:
    """By definition: of the different completions of a prompt the shortest, of two as long the one that came first."""
    seen = {}
    for _, texts in adds:
        for prompt, text in texts:
            seen.setdefault(prompt, {}).setdefault(text, len(seen[prompt]))
    return {
        prompt: sorted(sorted(texts, key=lambda text: (len(text), texts[text]))[:limit])
        for prompt, texts in seen.items()
    }


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    adds=st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.tuples(st.sampled_from("pq"), st.text("ab", min_size=1, max_size=4)), max_size=5),
        ),
        min_size=1,
        max_size=6,
    ),
    limit=st.integers(1, 3),
)
def test_the_disk_holds_the_shortest_of_what_came_in(tmp_path_factory, adds, limit):
    folder = tmp_path_factory.mktemp("bank")
    bank = RolloutBank(folder, limit, ME)
    for step, (reopen, texts) in enumerate(adds):
        bank = RolloutBank(folder, limit, ME) if reopen else bank
        bank.add(step, [rollout(*text) for text in texts], {})
        now = {prompt: sorted(found) for prompt, found in on_disk(folder).items()}
        assert now == expected(adds[: step + 1], limit)


def test_a_crash_anywhere_leaves_a_bank_to_go_on_with(tmp_path, monkeypatch):
    adds = [
        [rollout("p", "aaaa"), rollout("q", "bbb")],
        [rollout("p", "aa"), rollout("p", "aaa"), rollout("q", "c")],
        [rollout("p", "a"), rollout("q", "b")],
    ]
    counts = {prompt_id([{"role": "user", "content": "p"}]): (4, 1)}
    replace, unlink = os.replace, Path.unlink
    crashes = 0
    for moment in range(100):
        folder = tmp_path / str(moment)
        left = moment

        def fail():
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt

        bank, step = RolloutBank(folder, 1, ME), 0
        monkeypatch.setattr(os, "replace", lambda *args: (fail(), replace(*args)))
        monkeypatch.setattr(Path, "unlink", lambda *args: (fail(), unlink(*args)))
        while step < len(adds):
            try:
                bank.add(step, adds[step], counts)
                step += 1
            except KeyboardInterrupt:
                crashes += 1
                # Every file with a final name is whole, and nothing else is seen by a reader of the folder
                on_disk(folder)
                assert {path.suffix for path in (folder / "rollouts").glob("[!.]*")} <= {".parquet"}
                # As a resumed run: from one step before, if there is one
                bank, step = RolloutBank(folder, 1, ME), max(step - 1, 0)
        assert on_disk(folder) == {"p": ["a"], "q": ["c"]}
        assert read_attempts(folder) == dict.fromkeys(counts, (12, 3))
        monkeypatch.undo()
        if left >= 0:
            break
    assert crashes == 8  # two of the first step, three of the others


def test_a_lower_limit_takes_effect_with_the_next_add(tmp_path):
    RolloutBank(tmp_path, 4, ME).add(0, [rollout("p", "a" * size) for size in (3, 1, 2)], {})
    RolloutBank(tmp_path, 1, ME).add(1, [], {})
    assert on_disk(tmp_path) == {"p": ["a"]}


def test_a_run_that_begins_anew_counts_anew_and_keeps_what_was_paid_for(tmp_path):
    first = RolloutBank(tmp_path, 4, ME)
    for step in range(3):
        first.add(step, [rollout("p", "a" * (step + 1))], {"p": (8, 1)})
    second = RolloutBank(tmp_path, 4, ME)
    second.add(0, [rollout("p", "b")], {"p": (8, 5)})
    assert read_attempts(tmp_path) == {"p": (8, 5)}
    assert sorted(on_disk(tmp_path)["p"]) == ["a", "aa", "aaa", "b"]
    second.add(0, [], {"p": (8, 5)})  # a second generation of the same step is not the same one again
    assert read_attempts(tmp_path) == {"p": (16, 10)}


def test_prompt_ids_are_stable_and_see_what_matters():
    messages = [{"role": "user", "content": "1 + 1 = é"}]
    # Written down, because banks outlive versions
    assert prompt_id(messages) == "e9f1d0a1c59453aa8d7d85e4b8f836c676677a7f592110390852efafb7bdb211"
    assert prompt_id([{"content": "1 + 1 = é", "name": None, "role": "user"}]) == prompt_id(messages)
    others = [
        [{"role": "user", "content": "1 + 1 = e"}],
        [{"role": "system", "content": "1 + 1 = é"}],
        "1 + 1 = é",
        [],
    ]
    assert len({prompt_id(other) for other in [messages, *others]}) == 5


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="There is no rollout bank at"):
        read_rollouts(tmp_path)
    with pytest.raises(ValueError, match="There is no rollout bank at"):
        read_attempts(tmp_path)
    RolloutBank(tmp_path, 4, ME).add(0, [], {"p": (8, 0)})
    with pytest.raises(ValueError, match="is empty: no rollout of its run was correct"):
        read_rollouts(tmp_path)


def test_of_each_prompt_the_shortest_is_read_first(tmp_path):
    bank = RolloutBank(tmp_path, 3, ME)
    bank.add(0, [rollout("p", "aaa"), rollout("q", "b"), rollout("p", "a")], {})
    bank.add(1, [rollout("p", "aa"), rollout("q", "bb")], {})
    rows = read_rollouts(tmp_path)
    lengths = {}
    for row in rows:
        lengths.setdefault(row["prompt"][0]["content"], []).append(row["num_tokens"])
    assert lengths == {"p": [1, 2, 3], "q": [1, 2]}
    assert set(rows.column_names) == {
        "prompt_id",
        "prompt",
        "completion",
        "completion_ids",
        "num_tokens",
        "reward",
        "step",
    }


@pytest.mark.parametrize("chat", [True, False])
def test_supervised_fine_tuning_takes_it_as_it_is(tmp_path, small_model, tokenizer, rows, chat):
    bank = RolloutBank(tmp_path / "bank", 4, ME)
    ids = {}
    for step, row in enumerate(rows.select(range(4))):
        prompt, text = row["prompt"][0]["content"], row["solution"]
        ids[prompt] = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        bank.add(step, [rollout(prompt, text, ids[prompt], chat)], {"p": (1, 1)})
    dataset = load_dataset("parquet", data_dir=str(tmp_path / "bank" / "rollouts"), cache_dir=str(tmp_path / "cache"))
    trainer = SFTTrainer(
        model=small_model(),
        args=SFTConfig(
            str(tmp_path / "sft"),
            per_device_train_batch_size=4,
            max_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
    )
    # What is learned is what was sampled, token by token
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    learned = [row[row != -100].tolist() for row in batch["labels"]]
    if chat:  # the template ends a turn with a line break, which nobody samples
        learned = [row[:-1] if row[-1] != tokenizer.eos_token_id else row for row in learned]
    assert sorted(learned) == sorted(ids.values())
    trainer.train()
    assert trainer.state.global_step == 1


# What OPSD takes from it


@pytest.fixture
def recipe(tmp_path, checkpoint, rows):
    """Writes a recipe whose teacher sees a solution, and a bank for all prompts but the first one."""

    def write(**changes) -> list[str]:
        data = tmp_path / "train.jsonl"
        if not data.exists():
            rows.select(range(8)).remove_columns("solution").to_json(data)
        config = {
            "model_name_or_path": checkpoint(),
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "out"),
            "teacher_prompt_template": SOLUTION_TEMPLATE,
            "solution": "bank",
            "rollout_bank": str(tmp_path / "bank"),
            "reward_funcs": ["math_reward"],
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "max_steps": 1,
            "probe_prompts": 0,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "gate": "all",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return ["--config", str(path)]

    vocabulary = hash_vocabulary(AutoTokenizer.from_pretrained(checkpoint()))
    bank = RolloutBank(tmp_path / "bank", 2, Writer(ME.model, ME.weights, vocabulary))
    rollouts, attempts = [], {}
    for row in rows.select(range(1, 8)):
        prompt = row["prompt"][0]["content"]
        short, long = f"<think>no</think>\n\n{row['solution']} ", f"<think>no, or so</think> So, {row['solution']}"
        rollouts += [rollout(prompt, long), rollout(prompt, short)]
    for index, row in enumerate(rows.select(range(8))):
        attempts[prompt_id(row["prompt"])] = (8, index)
    attempts[prompt_id(rows[7]["prompt"])] = (7, 7)
    bank.add(0, rollouts, attempts)
    return write


@pytest.fixture
def trained_on(monkeypatch):
    """What the command line hands to the trainer."""
    seen = []

    class Stop(Exception):
        pass

    def trainer(**kwargs):
        seen.append(kwargs["train_dataset"])
        raise Stop

    monkeypatch.setattr("trl_opsd.opsd.run.OPSDTrainer", trainer)

    def run(arguments):
        with pytest.raises(Stop):
            opsd(arguments)
        return seen[-1]

    return run


def test_solutions_come_from_the_shortest_rollout(tmp_path, recipe, rows, trained_on, capsys):
    dataset = trained_on(recipe())
    assert dataset["prompt"] == rows["prompt"][1:8]  # the first one has no correct rollout
    assert dataset["solution"] == rows["solution"][1:8]  # the shorter one, without its trace, with its answer
    assert "7 of 8 prompts are left; 1 have no correct rollout, 0 are outside" in capsys.readouterr().out
    # A column that is there gives way
    rows.select(range(8)).map(lambda row: {"solution": "?"}).to_json(tmp_path / "train.jsonl")
    assert trained_on(recipe())["solution"] == rows["solution"][1:8]


def test_the_first_updates_take_the_shortest_rollout(recipe, rows, trained_on, capsys, tokenizer):
    changes = {"solution": None, "teacher_prompt_template": CONCISE_TEMPLATE, "off_policy_steps": 2}
    changes["max_completion_length"] = 400
    dataset = trained_on(recipe(**changes))
    bank = read_rollouts(parsed(recipe(**changes)).rollout_bank)
    lengths = {}
    for row in bank:
        lengths.setdefault(row["prompt_id"], []).append(row["num_tokens"])
    assert any(len(values) > 1 for values in lengths.values())
    assert dataset["prompt"] == rows["prompt"][:8]
    assert dataset["answer"] == rows["answer"][:8]  # for the verifier, of what the student writes after them
    none, *others = dataset["completion_ids"]
    assert none is None  # the first one has no correct rollout
    assert [len(ids) for ids in others] == [min(lengths[prompt_id(prompt)]) for prompt in dataset["prompt"][1:]]
    said = "8 of 8 prompts are left; 0 have no correct rollout, 0 are outside"
    output = capsys.readouterr().out
    assert said in output and "of 7 it gives the completion" in output


def parsed(arguments):
    return parse((OPSDScriptArguments, OPSDConfig, ModelConfig), arguments)[0]


def test_the_rollouts_of_a_bank_are_a_data_set_of_every_command(recipe, rows, trained_on):
    bank = Path(parsed(recipe()).rollout_bank)
    assert load_prompts(str(bank / "rollouts")).to_list() == load_prompts(str(bank / "rollouts"), "test").to_list()
    assert sorted(load_prompts(str(bank / "rollouts"))["completion_ids"]) == sorted(
        read_rollouts(bank)["completion_ids"]
    )
    off_policy = {"solution": None, "rollout_bank": None, "teacher_prompt_template": CONCISE_TEMPLATE, "lmbda": 0.0}
    off_policy["max_completion_length"] = 400
    for name in (bank, bank / "rollouts"):
        dataset = trained_on(recipe(dataset_name=str(name), gate="all", **off_policy))
        assert sorted(dataset["completion_ids"]) == sorted(read_rollouts(bank)["completion_ids"])


def test_prompts_are_left_out_by_their_pass_rate(recipe, rows, trained_on, capsys):
    changes = {"solution": None, "teacher_prompt_template": CONCISE_TEMPLATE}
    # Rates 0/8 to 6/8, and one that too few rollouts have measured
    dataset = trained_on(recipe(min_pass_rate=0.25, max_pass_rate=0.5, **changes))
    assert dataset["prompt"] == [rows["prompt"][index] for index in (2, 3, 4, 7)]
    assert "4 of 8 prompts are left; 0 have no correct rollout, 4 are outside" in capsys.readouterr().out
    assert len(trained_on(recipe(max_pass_rate=0.7, pass_rate_rollouts=7, **changes))) == 6
    assert len(trained_on(recipe(min_pass_rate=0.25))) == 6


def test_a_run_with_solutions_of_the_bank_trains(tmp_path, recipe):
    opsd(recipe())
    logs = json.loads((tmp_path / "out" / "opsd.json").read_text())["rows"]
    assert any(row.get("opsd/kl", 0) > 0 for row in logs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout_bank": None}, "`solution: bank` needs a bank"),
        ({"rollout_bank": "{tmp}/gone"}, "There is no rollout bank at `{tmp}/gone`"),
        ({"rollout_bank": "{tmp}/empty"}, "The rollout bank at `{tmp}/empty` is empty"),
        ({"rollout_bank": "{tmp}/other"}, "has none of the prompts of `{tmp}/train.jsonl`"),
        ({"teacher_prompt_template": CONCISE_TEMPLATE.replace("{", "{{").replace("}", "}}")}, "that sees a solution"),
        ({"solution": None, "teacher_prompt_template": "{{prompt}}?"}, "`rollout_bank` is used for nothing"),
        ({"min_pass_rate": 0.99, "pass_rate_rollouts": 7, "max_pass_rate": 0.995}, "0 of 8 prompts are left"),
        ({"dataset_name": "{tmp}/overridden.jsonl"}, "column `privileged_context` stands in for every solution"),
        ({"solution": "bnak"}, "is 'bnak', which is none of its values: did you mean `bank`?"),
    ],
)
def test_a_mistake_is_found_before_a_model_is_loaded(tmp_path, recipe, rows, monkeypatch, capsys, changes, message):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    RolloutBank(tmp_path / "empty", 4, ME).add(0, [], {prompt_id(rows[0]["prompt"]): (8, 0)})
    RolloutBank(tmp_path / "other", 4, ME).add(0, [rollout("p", "a")], {prompt_id("p"): (8, 1)})
    rows.map(lambda row: {"privileged_context": "?"}).to_json(tmp_path / "overridden.jsonl")
    fill = lambda value: value.format(tmp=tmp_path) if isinstance(value, str) else value  # noqa: E731
    arguments = recipe(**{key: fill(value) for key, value in changes.items()})
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    with pytest.raises(SystemExit) as end:
        opsd(arguments)
    assert end.value.code == 2
    assert fill(message) in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_recipe_takes_what_the_other_one_leaves():
    rlvr = yaml.safe_load((ROOT / "recipes/rlvr.yaml").read_text())
    overrides = ["--bf16", "false", "--use_cpu", "true"]
    path = "recipes/opsd_bank.yaml"
    script_args, config, model_args = parse(
        (OPSDScriptArguments, OPSDConfig, ModelConfig), ["--config", str(ROOT / path), *overrides]
    )
    check_bank(script_args, config)
    assert script_args.rollout_bank == f"{rlvr['output_dir']}/bank" and script_args.solution == "bank"
    assert (model_args.model_name_or_path, script_args.dataset_name) == (rlvr["output_dir"], rlvr["dataset_name"])
    assert f"-m trl_opsd.opsd --config {path}" in (ROOT / path).read_text()


# Whose rollouts they are


def swap_digits(folder: str | Path) -> None:
    """Gives a checkpoint a vocabulary of the same tokens in which two have changed places."""
    path = Path(folder) / "tokenizer.json"
    saved = json.loads(path.read_text())
    vocab = saved["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    path.write_text(json.dumps(saved))


def test_weights_are_the_same_wherever_they_lie_and_in_whichever_files(tmp_path, small_model):
    model = small_model()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    hashes = [hash_weights(str(tmp_path / name)) for name in ("whole", "shards")] + [hash_weights(model)]
    assert len(set(hashes)) == 1 and len(hashes[0]) == 64
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6  # one number of one weight
    model.save_pretrained(tmp_path / "changed")
    assert hash_weights(str(tmp_path / "changed")) == hash_weights(model) != hashes[0]


def test_a_model_on_the_hub_is_its_id_and_commit(tmp_path, checkpoint, monkeypatch):
    """Offline, from the cache, and without running code that comes with the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--me--tiny"
    for branch, commit in (("main", "a" * 40), ("other", "b" * 40)):
        shutil.copytree(checkpoint(), folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
        path = folder / "snapshots" / commit / "config.json"
        config = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
        path.write_text(json.dumps(config))
    main, other = hash_weights("me/tiny"), hash_weights("me/tiny", "other")
    assert main == hash_weights("me/tiny", "main") == hash_weights("me/tiny", "a" * 40) != other
    assert other == hash_weights("me/tiny", "b" * 40)


def test_an_adapter_counts_with_its_base(tmp_path, checkpoint):
    hashes = []
    for seed in (0, 1):
        base = AutoModelForCausalLM.from_pretrained(checkpoint(seed))
        torch.manual_seed(0)
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
            tmp_path / f"adapter-{seed}"
        )
        hashes.append(hash_weights(str(tmp_path / f"adapter-{seed}")))
    files = [tmp_path / f"adapter-{seed}" / "adapter_model.safetensors" for seed in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len({*hashes, hash_weights(checkpoint(0))}) == 3


def test_a_vocabulary_is_what_ids_mean(checkpoint):
    folder = checkpoint()
    before = hash_vocabulary(AutoTokenizer.from_pretrained(folder))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert hash_vocabulary(AutoTokenizer.from_pretrained(folder)) == before
    swap_digits(folder)
    assert hash_vocabulary(AutoTokenizer.from_pretrained(folder)) != before


@pytest.mark.parametrize("other", [Writer("you", "3" * 64, "2" * 64), Writer("you", "1" * 64, "3" * 64)])
def test_nobody_else_goes_on_with_a_bank(tmp_path, other):
    RolloutBank(tmp_path, 4, ME).add(0, [rollout("p", "a")], {"p": (8, 1)})
    RolloutBank(tmp_path, 4, Writer("me, elsewhere", ME.weights, ME.vocabulary))
    message = re.escape(f"is of {ME}, and this run is of {other}")
    with pytest.raises(ValueError, match=message):
        RolloutBank(tmp_path, 4, other)
    assert read_writer(tmp_path) == ME and on_disk(tmp_path) == {"p": ["a"]}
    for text in ("{", "[]", '{"model": "me"}'):
        (tmp_path / "bank.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged, so nothing says who wrote"):
            RolloutBank(tmp_path, 4, ME)
    (tmp_path / "bank.json").unlink()
    with pytest.raises(ValueError, match="does not say who wrote it, because `bank.json` is missing"):
        RolloutBank(tmp_path, 4, ME)


def test_ids_of_another_tokenizer_are_refused_before_a_model_is_loaded(tmp_path, recipe, monkeypatch, capsys):
    """The bank, and what was copied out of it, by OPSD and by pruning."""
    folder = tmp_path / "model-0-0"
    arguments = recipe(
        dataset_name=f"{tmp_path}/ids", lmbda=0.0, solution=None, rollout_bank=None,
        teacher_prompt_template=CONCISE_TEMPLATE, max_completion_length=64,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bank = RolloutBank(tmp_path / "ids", 1, Writer("runs/teacher", "1" * 64, hash_vocabulary(tokenizer)))
    texts = ["12", "21", "11", "22"]
    bank.add(
        0, [rollout(f"{text}=", text, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts], {}
    )
    read_rollouts(tmp_path / "ids").to_json(tmp_path / "ids.jsonl")
    sizes = ["--num_layers", "1", "--output_dir", str(tmp_path / "pruned"), "--model_name_or_path", str(folder)]
    commands = {
        "opsd": lambda name: opsd([*arguments, "--dataset_name", str(name)]),
        "prune": lambda name: prune([*sizes, "--calibration_dataset", str(name)]),
    }
    for name in ("ids", "ids.jsonl"):
        for command in commands.values():
            command(tmp_path / name)
    swap_digits(folder)
    commands["prune"](tmp_path / "ids.jsonl")  # which takes the text
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    capsys.readouterr()
    for command, name in (("opsd", "ids"), ("opsd", "ids.jsonl"), ("prune", "ids")):
        with pytest.raises(SystemExit) as end:
            commands[command](tmp_path / name)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 2 and str(folder) in error and "another tokenizer" in error
        assert "runs/teacher" in error if name == "ids" else "mean '21'" in error and "is '12'" in error


@pytest.mark.parametrize(
    "changes",
    [{"off_policy_steps": 2}, {"lmbda": 0.5}, {"lmbda": 0.0, "rollout_bank": None, "dataset_name": "bank/rollouts"}],
)
def test_completions_in_ids_of_another_tokenizer_are_refused(
    tmp_path, recipe, trained_on, capsys, monkeypatch, changes
):
    """Whatever asks for them, and wherever in the bank they are taken from."""
    monkeypatch.chdir(tmp_path)
    changes = {"solution": None, "teacher_prompt_template": CONCISE_TEMPLATE, "max_completion_length": 400, **changes}
    arguments = recipe(**changes)
    trained_on(arguments)
    swap_digits(tmp_path / "model-0-0")
    with pytest.raises(SystemExit):
        opsd(arguments)
    assert "has another tokenizer" in capsys.readouterr().err
