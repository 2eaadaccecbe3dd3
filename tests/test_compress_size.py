"""The size sweep: what runs, from what, on how much, and what its rows say; and its off-policy control."""

import json
import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from datasets import load_dataset
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl import DistillationTrainer, SFTConfig, SFTTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.compress import CompressConfig, Stage, plan_stages, run_chain
from trl_opsd.compress import bank as bank_stage
from trl_opsd.compress.config import METHODS
from trl_opsd.compress.run import conclude
from trl_opsd.compress.sweep import sweep_measurements
from trl_opsd.evaluate.schema import to_json
from trl_opsd.opsd import AlarmCallback
from trl_opsd.opsd.__main__ import main as opsd_main
from trl_opsd.results import write_results
from trl_opsd.rlvr.bank import RolloutBank, prompt_id, read_rollouts
from trl_opsd.rlvr.identity import Writer, hash_vocabulary, read_writer


ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(monkeypatch):
    """The recipe of the sweep, with changes."""
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load((ROOT / "recipes/tiny/size.yaml").read_text())
    return lambda **changes: CompressConfig(**{**recipe, **changes})


@pytest.fixture
def bank(tmp_path, rows, tokenizer):
    """A bank with two rollouts of each of eight prompts, none of which a model would write."""
    folder = tmp_path / "bank"
    bank = RolloutBank(folder, 2, Writer("teacher", "1" * 64, hash_vocabulary(tokenizer)))
    for step in range(2):
        rollouts = []
        for number, row in enumerate(rows.select(range(8))):
            text = f"{number} a:-{step}=5 \\boxed{{{row['answer']}}}"
            rollouts.append(
                {
                    "prompt_id": prompt_id(row["prompt"]),
                    "prompt": row["prompt"],
                    "completion": [{"role": "assistant", "content": text}],
                    "completion_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id],
                    "reward": 1.0,
                }
            )
        bank.add(step, rollouts, {})
    return folder


def settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def test_a_ratio_has_learning_rates_of_its_own(config):
    stages = {stage.name: stage for stage in plan_stages(config(learning_rates={0.75: {"opsd": 2e-3}}))}
    rates = {
        name: stage.arguments["learning_rate"] for name, stage in stages.items() if "learning_rate" in stage.arguments
    }
    # Of all methods that the recipe is for, so that what differs between them is not the schedule
    assert rates == {"offline-75": 2e-3, "opsd-75": 2e-3, "opsd-concise-75": 2e-3}


def test_the_recipe_makes_every_method_start_from_the_same_cold_start(config):
    stages = plan_stages(config(sizes={0.9: {"num_layers": 2}}))
    names = [stage.name for stage in stages if stage.is_training]
    of_ratio = [f"{method}-{{}}" for method in ("pruned", "cold", *METHODS)]
    assert names == ["sft", "rlvr", *(name.format(ratio) for ratio in (50, 75, 90) for name in of_ratio)]
    by_name = {stage.name: stage for stage in stages if stage.is_training}
    for ratio in (50, 75, 90):
        cold = by_name[f"cold-{ratio}"]
        pruned = by_name[f"pruned-{ratio}"]
        assert pruned.arguments.get("target_ratio") == (None if ratio == 90 else ratio / 100)
        assert pruned.arguments.get("num_layers") == (2 if ratio == 90 else None)
        assert pruned.arguments["model_name_or_path"] == "runs/tiny-size/rlvr"
        assert [stage.name for stage in pruned.after] == ["bank"] and cold.after == [pruned]
        assert cold.arguments["model_name_or_path"] == str(pruned.output)
        for method in METHODS:
            stage = by_name[f"{method}-{ratio}"]
            assert stage.after == [cold]
            assert stage.arguments["model_name_or_path"] == str(cold.output)
    # Every model of a ratio is measured, on the problems that the teacher is measured on
    for ratio, stage in zip(
        (50, 75, 90), [stage for stage in stages if stage.name.startswith("evaluate")], strict=True
    ):
        made = [by_name[name.format(ratio)] for name in of_ratio]
        assert stage.after == made
        assert stage.arguments["checkpoints"] == [f"{other.name}={other.output}" for other in made]
        assert stage.arguments["dataset_name"] == "runs/tiny-size/sft/data"
        assert stage.arguments["prompt_only"] is False and stage.module == "trl_opsd.evaluate"


def test_methods_differ_in_whose_rollouts_and_in_the_teacher_alone(config):
    by_name = {
        stage.name: stage for stage in plan_stages(config(updates=77, cold_start_steps=33)) if stage.is_training
    }
    bank, data, teacher = "runs/tiny-size/bank", "runs/tiny-size/sft/data", "runs/tiny-size/rlvr"
    assert by_name["cold-90"].arguments["max_steps"] == 33
    expected = {
        "sft": ("trl.scripts.sft", {"dataset_name": f"{bank}/rollouts"}),
        "offline": ("trl_opsd.opsd", {"dataset_name": bank, "lmbda": 0.0, "gate": "all"}),
        "rlvr": ("trl_opsd.rlvr", {"dataset_name": data}),
        "opsd": ("trl_opsd.opsd", {"dataset_name": data}),
        "opsd-concise": ("trl_opsd.opsd", {"dataset_name": data, "teacher_prompt_template": "{prompt} concise"}),
    }
    for method, (module, options) in expected.items():
        stage = by_name[f"{method}-90"]
        common = {"output_dir": f"runs/tiny-size/{method}-90", "seed": 0, "max_steps": 77}
        common |= {"model_name_or_path": "runs/tiny-size/cold-90"}
        if module == "trl_opsd.opsd":
            common |= {"teacher_model_name_or_path": teacher, "learning_rate": 2e-3}
        assert (stage.module, stage.arguments) == (module, {**common, **options})
    assert by_name["offline-90"].recipe == by_name["opsd-90"].recipe  # the same divergence and schedule


def test_a_bank_that_is_given_is_not_filled_again(config, bank):
    stages = plan_stages(config(bank=str(bank)))
    assert not any(stage.module == "trl_opsd.compress.bank" for stage in stages)
    by_name = {stage.name: stage for stage in stages if stage.is_training}
    assert by_name["pruned-50"].after == [by_name["sft"], by_name["rlvr"]]
    assert by_name["pruned-50"].arguments["calibration_dataset"] == str(bank)
    assert by_name["sft-50"].arguments["dataset_name"] == f"{bank}/rollouts"


def test_smoke_shortens_every_training_stage(config):
    stages = plan_stages(config(smoke=True))
    steps = {stage.name: stage.arguments.get("max_steps") for stage in stages if stage.is_training}
    assert {name for name, count in steps.items() if count is None} == {"pruned-50", "pruned-75", "pruned-90"}
    assert [stage.arguments.get("max_samples") for stage in stages if stage.name.startswith("evaluate")] == [32] * 3
    assert all(count is None or count <= 40 for count in steps.values())
    assert all(str(stage.output).startswith("runs/tiny-size-smoke/") for stage in stages)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ratios": [0.5, 1.0]}, "above 0 and below 1, and one is 1.0"),
        ({"ratios": [0.5, 50]}, "above 0 and below 1, and one is 50"),
        ({"ratios": [0.5, 0.5]}, "`ratios` holds something twice"),
        (
            {"methods": ["opsd", "gkd"]},
            "`methods` holds `gkd`, and the methods are sft, offline, rlvr, opsd, opsd-con",
        ),
        ({"methods": ["opsd", "opsd"]}, "`methods` holds something twice"),
        ({"sizes": {0.6: {"num_layers": 2}}}, r"`sizes` has the ratio 0.6, and `ratios` are \[0.5, 0.75, 0.9\]"),
        ({"learning_rates": {0.6: {"opsd": 1e-3}}}, r"`learning_rates` has the ratio 0.6"),
        ({"learning_rates": {0.9: {"offline": 1e-3}}}, "has `offline` at 0.9, and the recipes are student_sft, opsd"),
        ({"learning_rates": {0.9: {"opsd": "2e-3"}}}, "must be numbers above 0, such as 2.0e-3, and one is '2e-3'"),
        ({"methods": []}, "`methods` is empty"),
        ({"prune": None}, "`prune` is missing"),
        ({"student_sft": None, "methods": ["opsd"]}, "`student_sft` is missing"),
        ({"student_rlvr": None}, "`student_rlvr` is missing"),
        ({"student_rlvr": "recipes/gone.yaml"}, "no recipe at `recipes/gone.yaml` for `student_rlvr`"),
        ({"student_rlvr": "recipes/tiny/rlvr.yaml"}, "rlvr 192.*change `per_device_train_batch_size`"),
        ({"updates": 0}, "`updates` must be at least 1, and is 0"),
        ({"cold_start_steps": 0}, "`cold_start_steps` must be at least 1"),
        ({"prompt_only_template": None}, "`opsd-concise` needs `prompt_only_template`"),
        ({"bank": "runs/gone"}, "no rollout bank at `runs/gone`"),
    ],
)
def test_mistakes_end_before_anything_runs(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_method_that_is_not_asked_for_needs_no_recipe(config):
    changes = {"methods": ["opsd"], "student_rlvr": None, "ratios": [0.9], "sizes": None, "learning_rates": None}
    names = [stage.name for stage in plan_stages(config(**changes))]
    assert "opsd-90" in names and "rlvr-90" not in names


def test_a_changed_recipe_redoes_its_method_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")
    counter = tmp_path / "runs.txt"
    recipes = {name: tmp_path / f"{name}.yaml" for name in ("cold", "sft", "opsd", "all")}

    def run() -> list[str]:
        def stage(name, after=None):
            output = tmp_path / name
            arguments = {"counter": str(counter), "output" if output.suffix else "output_dir": str(output)}
            return Stage(
                name, name, "fake_stage", str(recipes[name.partition(".")[0]]), arguments, output, after=after
            )

        cold = stage("cold")
        sft, opsd = stage("sft", [cold]), stage("opsd", [cold])
        counter.write_text("")
        stages = [cold, sft, opsd, stage("all.json", [sft, opsd])]
        run_chain(stages, tmp_path / "logs", [sys.executable], mock.Mock())
        return counter.read_text().split()

    for path in recipes.values():
        path.write_text("a: 1")
    assert run() == ["cold", "sft", "opsd", "all.json"]
    assert run() == []
    recipes["sft"].write_text("a: 2")
    assert run() == ["sft", "all.json"]
    recipes["cold"].write_text("a: 2")
    assert run() == ["cold", "sft", "opsd", "all.json"]


def test_the_launcher_starts_what_is_trained_and_nothing_else(config):
    launched = {stage.name for stage in plan_stages(config()) if stage.command(["launch"])[0] == "launch"}
    methods = {f"{method}-{ratio}" for method in ("cold", *METHODS) for ratio in (50, 75, 90)}
    assert launched == {"rlvr", *methods}  # pruning and the tiny warm start run in one process


def test_off_policy_trains_on_the_tokens_of_the_bank_and_generates_nothing(tmp_path, small_model, tokenizer, bank):
    data = read_rollouts(bank)
    known = {(row["prompt"][0]["content"], tuple(row["completion_ids"])) for row in data}
    seen = []

    class Recorder(OPSDTrainer):
        def _compute_divergence(self, student, inputs):
            for row in range(len(inputs["prompt_ids"])):
                prompt, completion = (
                    inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()].tolist()
                    for part in ("prompt", "completion")
                )
                text = tokenizer.decode(prompt)
                seen.extend(key for key in known if key[0] in text and list(key[1]) == completion)
            return super()._compute_divergence(student, inputs)

    trainer = Recorder(
        model=small_model(0),
        teacher_model=small_model(1),
        args=OPSDConfig(**settings(tmp_path, lmbda=0.0, gradient_accumulation_steps=2)),
        train_dataset=data,
        processing_class=tokenizer,
    )
    with mock.patch.object(DistillationTrainer, "_generate_single_turn", side_effect=AssertionError("generates")):
        trainer.train()
    assert len(seen) == 3 * 2 * 4 and len(set(seen)) == 16  # every row is one of the bank's, and all come up


def test_off_policy_is_the_same_step_on_other_tokens(tmp_path, small_model, tokenizer, bank):
    """Where the student would write just what the bank holds, nothing changes."""
    data = read_rollouts(bank)
    data = data.select([list(data["prompt_id"]).index(prompt) for prompt in sorted(set(data["prompt_id"]))])
    completions = dict(zip((prompt[0]["content"] for prompt in data["prompt"]), data["completion_ids"], strict=True))

    def generate(self, prompt_ids, *args, **kwargs):
        texts = [tokenizer.decode(ids) for ids in prompt_ids]
        return [completions[max((key for key in completions if key in text), key=len)] for text in texts]

    weights = []
    for lmbda in (0.0, 1.0):
        trainer = OPSDTrainer(
            model=small_model(0),
            teacher_model=small_model(1),
            args=OPSDConfig(**settings(tmp_path, lmbda=lmbda)),
            train_dataset=data,
            processing_class=tokenizer,
        )
        with mock.patch.object(DistillationTrainer, "_generate_single_turn", generate):
            trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0)
    assert not torch.equal(weights[0]["lm_head.weight"], small_model(0).lm_head.weight)


def test_lmbda_is_the_share_of_batches_that_the_student_writes(tmp_path, small_model, tokenizer, bank):
    trainer = OPSDTrainer(
        model=small_model(0),
        teacher_model=small_model(1),
        args=OPSDConfig(**settings(tmp_path, lmbda=0.5, per_device_train_batch_size=1, max_steps=40)),
        train_dataset=read_rollouts(bank),
        processing_class=tokenizer,
    )
    with mock.patch.object(DistillationTrainer, "_generate_single_turn", return_value=[[5, 6]]) as generate:
        trainer.train()
    assert 12 <= generate.call_count <= 28
    with mock.patch.object(DistillationTrainer, "_generate_single_turn", return_value=[[5, 6]]) as generate:
        trainer.model.eval()  # what is measured is the student's own, whatever it is trained on
        trainer.args.lmbda = 0.0
        trainer._generate_and_score_completions([trainer.train_dataset[0]])
    assert generate.call_count == 1


def test_the_first_updates_take_what_the_data_set_holds(tmp_path, small_model, tokenizer, bank):
    trainer = OPSDTrainer(
        model=small_model(0),
        teacher_model=small_model(1),
        args=OPSDConfig(**settings(tmp_path, off_policy_steps=2, gradient_accumulation_steps=1, max_steps=5)),
        train_dataset=read_rollouts(bank),
        processing_class=tokenizer,
    )
    data = trainer.train_dataset
    steps = []

    def generate(self, prompt_ids, *args, **kwargs):
        steps.append(self.state.global_step)
        return [[5, 6]] * len(prompt_ids)

    with mock.patch.object(DistillationTrainer, "_generate_single_turn", generate):
        trainer.train()
    assert steps == [2, 3, 4]

    # Where a row holds none, another one is trained on
    held = [ids if row % 4 == 0 else None for row, ids in enumerate(data["completion_ids"])]
    data = data.remove_columns("completion_ids").add_column("completion_ids", held)
    trainer = OPSDTrainer(
        model=small_model(0),
        teacher_model=small_model(1),
        args=OPSDConfig(**settings(tmp_path, off_policy_steps=3, gradient_accumulation_steps=1, max_steps=3)),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.model.train()
    with mock.patch.object(DistillationTrainer, "_generate_single_turn", side_effect=AssertionError("generates")):
        batches = [trainer._generate_and_score_completions([data[row] for row in range(4)]) for _ in range(2)]
        trainer.state.global_step = 2
        batches.append(trainer._generate_and_score_completions([data[row] for row in range(4)]))
    found = [
        [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(b["completion_ids"], b["completion_mask"], strict=True)]
        for b in batches
    ]
    assert {ids for batch in found for ids in batch} <= {tuple(ids) for ids in held if ids is not None}
    assert all(batch[0] == tuple(held[0]) for batch in found)  # whoever has one keeps it
    assert found[0] == found[1] != found[2]  # decided by the step
    assert [len(set(batch[1:])) for batch in found] == [3, 3, 3]


def test_what_the_data_set_holds_does_not_count_as_the_students(tmp_path, small_model, tokenizer, bank):
    """The rollouts of the bank are all right and the student's are all wrong: so much is what the alarm may see."""
    data = read_rollouts(bank)
    given = {tuple(ids) for ids in data["completion_ids"]}
    trainer = OPSDTrainer(
        model=small_model(0),
        teacher_model=small_model(1),
        args=OPSDConfig(**settings(tmp_path, lmbda=0.5, gate="all", max_steps=12)),
        train_dataset=data,
        processing_class=tokenizer,
        reward_funcs=lambda completion_ids, **kwargs: [float(tuple(ids) in given) for ids in completion_ids],
    )
    alarms = AlarmCallback(trainer)
    trainer.add_callback(alarms)
    with mock.patch.object(DistillationTrainer, "_generate_single_turn", return_value=[[5, 6]] * 4) as generate:
        trainer.train()
    own = [value for value in alarms.correct if not math.isnan(value)]
    assert len(alarms.correct) == 12 and 0 < len(own) == generate.call_count < 12
    assert own == [0.0] * len(own)
    lengths = [value for value in alarms.lengths if not math.isnan(value)]
    assert lengths == [2.0] * len(own)
    logged = [log["opsd/correct"] for log in trainer.state.log_history if "opsd/correct" in log]
    assert logged == [0.0] * len(own)
    assert alarms.best_checkpoint(None) is None  # none was written


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lmbda": 1.5}, "`lmbda` must be from 0 to 1, and is 1.5"),
        ({"lmbda": 0.5, "num_generations": 2}, "`lmbda=0.5` takes the one completion of a row"),
    ],
)
def test_mistakes_in_lmbda(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        OPSDConfig(**settings(tmp_path, **changes))


def test_off_policy_needs_completions_before_any_model_is_loaded(tmp_path, rows):
    with pytest.raises(ValueError, match="column `completion_ids`, and the columns found are `prompt`, `answer`"):
        OPSDTrainer(
            model="not/there",
            teacher_model="nor/this",
            args=OPSDConfig(**settings(tmp_path, lmbda=0.0)),
            train_dataset=rows,
        )


def test_the_command_line_takes_a_bank_and_no_verifier(tmp_path, checkpoint, bank, capsys):
    recipe = yaml.safe_load((ROOT / "recipes/tiny/size_opsd.yaml").read_text())
    recipe |= settings(tmp_path, max_steps=2, disable_tqdm=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    models = ["--model_name_or_path", checkpoint(0), "--teacher_model_name_or_path", checkpoint(1)]
    args = ["--config", str(path), *models, "--dataset_name", str(bank), "--lmbda", "0.0"]
    opsd_main([*args, "--gate", "all"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # A gate has to judge, and a bank does not say what its verifier was
    with pytest.raises(SystemExit):
        opsd_main(args)
    assert "needs the column `answer`" in capsys.readouterr().err


def test_sft_by_trl_reads_the_tokens_of_the_bank(tmp_path, small_model, tokenizer, bank):
    """The baseline trains on the very tokens that the others do, and on what the template writes after the end."""
    recipe = yaml.safe_load((ROOT / "recipes/tiny/size_sft.yaml").read_text())
    dataset = load_dataset(str(bank / "rollouts"), cache_dir=str(tmp_path / "cache"))["train"]
    trainer = SFTTrainer(
        small_model(0),
        args=SFTConfig(**{**recipe, "output_dir": str(tmp_path / "out")}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    prompts = tokenizer.apply_chat_template(list(dataset["prompt"]), add_generation_prompt=True)["input_ids"]
    assert len(trainer.train_dataset) == 16
    rows = zip(trainer.train_dataset, prompts, dataset["completion_ids"], strict=True)
    for row, prompt, completion in rows:
        tail = tokenizer("\n")["input_ids"]
        assert row["input_ids"] == prompt + completion + tail
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["labels"][0].tolist() == [-100] * len(prompts[0]) + dataset["completion_ids"][0] + tail


def test_the_teacher_fills_a_bank_with_what_is_correct(tmp_path, checkpoint, rows, tokenizer):
    data = tmp_path / "train.jsonl"
    rows.select(range(6)).to_json(data)
    answers = [row["answer"] for row in rows.select(range(6))]

    class Engine:
        def generate(self, requests, sampling):
            right = [f"\\boxed{{{answer}}}" for answer in answers]
            first = requests[0].seed == 42
            texts = [*right[:4], "\\boxed{9}", right[5]] if first else [f"1 {text}" for text in right]
            ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
            ids[0] = ids[0][:-1]  # has not ended
            assert sampling.temperature == 1 and len({request.seed for request in requests}) == 6
            yield from reversed(list(enumerate(ids)))

        def close(self):
            pass

    output = tmp_path / "bank.json"
    with mock.patch.object(bank_stage, "load_engine", lambda *args: Engine()):
        bank_stage.main(
            ["--model_name_or_path", checkpoint(), "--dataset_name", str(data), "--bank", str(tmp_path / "bank")]
            + ["--rollouts_per_prompt", "2", "--max_completion_length", "96", "--output", str(output)]
        )
    kept = read_rollouts(tmp_path / "bank")
    texts = sorted(row["completion"][0]["content"] for row in kept)
    assert texts == sorted(
        [f"\\boxed{{{answer}}}" for index, answer in enumerate(answers) if index not in (0, 4)]
        + [f"1 \\boxed{{{answer}}}" for answer in answers[1:]]
    )
    assert [row["accuracy"] for row in json.loads(output.read_text())["rows"]] == pytest.approx([4 / 6, 5 / 6])
    for row in kept:
        assert tokenizer.decode(row["completion_ids"]) == row["completion"][0]["content"] + tokenizer.eos_token


@pytest.fixture
def swept(config, tmp_path):
    """A sweep of one ratio that has run: the configuration and its chain."""
    changes = {
        "ratios": [0.9],
        "sizes": None,
        "learning_rates": None,
        "methods": ["sft", "opsd"],
        "updates": 20,
        "cold_start_steps": 10,
    }
    sweep = config(output_dir=str(tmp_path), **changes)
    stages = plan_stages(sweep)
    rows = []
    for name, accuracy in {"rlvr": 0.8, "pruned-90": 0.1, "cold-90": 0.4, "sft-90": 0.6, "opsd-90": 0.72}.items():
        row = {
            "stage": name,
            "checkpoint": f"runs/{name}",
            "task": "sums",
            "decoding": "greedy",
            "prompt": "plain",
            "n": 100,
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.05,
            "accuracy_high": accuracy + 0.05,
            "mean_tokens": 10.0,
            "p90_tokens": 10.0,
            "truncated": 0.0,
            "wall_s": 1.0,
            "parameters": 9000 if name == "rlvr" else 900,
            "non_embedding_parameters": 800,
            "weights_bytes": 3_600_000,
            "serving": [
                {"concurrency": 1, "total_p50_s": 0.25, "tokens_per_s": 40.0},
                {"concurrency": 8, "total_p50_s": 0.5, "tokens_per_s": 1234.5},
            ],
        }
        rows += [row, {**row, "decoding": "sampled", "accuracy": accuracy / 2, "serving": []}]
    measured = {stage.name: stage.output for stage in stages if stage.module == "trl_opsd.evaluate"}
    assert list(measured) == ["sft", "rlvr", "prompt-only", "evaluate-90"]
    for name, output in measured.items():
        known = {"rlvr": rows[:2], "evaluate-90": rows[2:]}
        write_results(output, known.get(name, [{**rows[0], "stage": name}]), {})
    log = [
        {"step": 5, "completions/mean_length": 40.0},
        {"step": 15, "completions/mean_length": 20.0},
        {"step": 20, "completions/mean_length": 10.0},
        {"step": 20, "train_runtime": 1.0},
    ]
    write_results(tmp_path / "opsd-90" / "opsd.json", log, {})
    return sweep, stages


def test_the_rows_of_a_sweep(swept):
    rows = [to_json(item.row) for item in sweep_measurements(*swept)]
    rows = {row["method"]: row for row in rows if row["decoding"] == "sampled"}
    assert list(rows) == ["teacher", "pruned", "cold", "sft", "opsd"]
    assert [row["stage"] for row in rows.values()] == ["rlvr", "pruned-90", "cold-90", "sft-90", "opsd-90"]
    assert [row["ratio"] for row in rows.values()] == [0.0, 0.9, 0.9, 0.9, 0.9]
    assert [row["kept"] for row in rows.values()] == pytest.approx([1, 0.125, 0.5, 0.75, 0.9])
    # The updates and the rollouts of every method are the same
    assert [row["updates"] for row in rows.values()] == [0, 0, 10, 30, 30]
    assert [row["rollouts"] for row in rows.values()] == [0, 0, 0, 20 * 64, 20 * 64]
    # 64 rollouts an update: 5 of 40 tokens, 10 of 20 and 5 of 10
    assert rows["opsd"]["generated_tokens"] == 64 * (5 * 40 + 10 * 20 + 5 * 10)
    assert rows["sft"]["generated_tokens"] == 0
    assert rows["opsd"]["answer_flops"] == 2 * 900 * 10


def test_the_report_of_a_sweep(swept, tmp_path, capsys):
    conclude(*swept, Console())
    text = (tmp_path / "report.md").read_text()
    assert "after 10 updates" in text and "makes 20 more, of 64 rollouts each: 1,280 rollouts" in text
    lines = [line for line in text.splitlines() if line.startswith("| opsd-90 | sums | greedy |")]
    first, whole = lines[:2]  # what follows is under load
    assert (
        first == "| opsd-90 | sums | greedy | 72.0% (67.0% to 77.0%) | 10.0 | 0.0% | 900 | 800 | 90% | opsd | 90.0% |"
    )
    assert whole == f"{first} 100 | 10 | 0.0 | 30 | 29 | 2.22e+07 | 3.4 | 1 | 250 | 1,234 |"  # all columns
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == ["accuracy_flops.svg", "accuracy_parameters.svg", "report.html", "report.md", "results.json"]


def test_the_bank_of_another_teacher_is_moved_aside(tmp_path, checkpoint, rows, tokenizer, caplog):
    """A chain whose teacher has changed fills its bank again, and the new one holds nothing of the old one."""
    data, bank = tmp_path / "train.jsonl", tmp_path / "bank"
    rows.select(range(4)).to_json(data)

    class Engine:
        def __init__(self, config, checkpoint, tokenizer):
            self.says = checkpoint.path[-3]  # the seed

        def generate(self, requests, sampling):
            texts = [f"{self.says} \\boxed{{{row['answer']}}}" for row in rows.select(range(4))]
            yield from enumerate(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts)

        def close(self):
            pass

    def fill(seed):
        with mock.patch.object(bank_stage, "load_engine", Engine):
            bank_stage.main(
                ["--model_name_or_path", checkpoint(seed), "--dataset_name", str(data), "--bank", str(bank)]
                + ["--max_completion_length", "96", "--output", str(tmp_path / "bank.json")]
            )
        return {row["completion"][0]["content"][0] for row in read_rollouts(bank)}, caplog.text

    assert fill(0)[0] == {"0"}
    assert fill(0) == ({"0"}, "")
    said, printed = fill(1)
    assert said == {"1"} and read_writer(bank).model == checkpoint(1)
    (aside,) = tmp_path.glob("bank.????????")
    assert str(aside) in printed and read_writer(aside).model == checkpoint(0) and len(read_rollouts(aside)) == 4
    assert fill(0)[0] == {"0"} and len(list(tmp_path.glob("bank.????????"))) == 2
