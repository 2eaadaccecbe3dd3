"""What real hardware, adapters and engines do to the weights of a student and of its teacher."""

import copy
from unittest import mock

import peft
import pytest
import torch
from peft import LoraConfig
from test_opsd_trainer import reference_loss, same_rollouts, settings, train
from torch import nn
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.adapters import FrozenBase
from trl_opsd.opsd import AlarmCallback
from trl_opsd.opsd.teacher import ADAPTER
from trl_opsd.tiny.task import CONCISE_TEMPLATE


LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def build(tmp_path, model, tokenizer, rows, **changes):
    own = {name: changes.pop(name) for name in ("reward_funcs", "peft_config", "teacher_model") if name in changes}
    template = None if "teacher_model" in own else CONCISE_TEMPLATE
    config = OPSDConfig(**settings(tmp_path, **changes), teacher_prompt_template=template)
    return OPSDTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer, **own)


# -- saving


def test_a_teacher_in_the_output_folder_is_left_alone(tmp_path, small_model, tokenizer, rows):
    teacher = tmp_path / "out" / "teacher"
    small_model(1).save_pretrained(teacher)
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    trainer = build(tmp_path, small_model(0), tokenizer, rows)
    trainer.save_model()
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    trainer = build(
        tmp_path, small_model(0), tokenizer, rows, peft_config=LoraConfig(**LORA), teacher_weights="snapshot"
    )
    trainer.save_model()
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    assert not (tmp_path / "out" / ADAPTER).exists()  # but what PEFT makes of ours goes


# -- mixed precision


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_under_bf16_both_models_compute_in_it(tmp_path, small_model, tokenizer, rows, completions, peft_config):
    """In float32 weights: what a layer of the student and of the teacher gives, and what the loss projects."""
    dtypes = {"student": set(), "teacher": set(), "loss": set()}
    with same_rollouts(completions):
        trainer = build(
            tmp_path, small_model(0), tokenizer, rows, bf16=True, max_steps=1, peft_config=peft_config, optim="sgd"
        )

    def note(module, inputs, output):
        # The teacher of an adapter is the student's own module
        dtypes["student" if torch.is_grad_enabled() else "teacher"].add(output.dtype)

    hooked = [trainer.model] if trainer.teacher_model is None else [trainer.model, trainer.teacher_model]
    for model in hooked:
        layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith("k_proj")]
        layers[0].register_forward_hook(note)
    import trl_opsd.opsd.trainer as module

    original = module.linear_divergence_with_metrics

    def projected(student_hidden, student_head, teacher_hidden, *args, **kwargs):
        dtypes["loss"] |= {student_hidden.dtype, teacher_hidden.dtype}
        assert not torch.is_autocast_enabled("cpu")
        return original(student_hidden, student_head, teacher_hidden, *args, **kwargs)

    with same_rollouts(completions), mock.patch.object(module, "linear_divergence_with_metrics", projected):
        trainer.train()
    assert dtypes == {name: {torch.bfloat16} for name in dtypes}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_the_loss_under_bf16_is_the_formula_to_its_precision(tmp_path, small_model, tokenizer, rows, completions):
    model = small_model(0)
    expected = reference_loss(
        model, model, tokenizer, list(rows)[:8], [completions[i % 4] for i in range(8)], [True] * 8, CONCISE_TEMPLATE
    )
    config = OPSDConfig(
        **settings(tmp_path, bf16=True, max_steps=1), teacher_prompt_template=CONCISE_TEMPLATE, shuffle_dataset=False
    )
    with same_rollouts(completions):
        _, recorder = train(OPSDTrainer, config, model=model, train_dataset=rows, processing_class=tokenizer)
    assert recorder.logs[0]["loss"] == pytest.approx(expected, rel=0.05)


def test_nothing_kept_is_no_step_of_the_optimizer_nor_of_the_scaler(
    tmp_path, small_model, tokenizer, rows, completions
):
    """Under fp16 a scaler that has seen no gradient asserts when it is asked to step."""
    steps = []

    def verifier(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step != 1)] * len(completions)

    with same_rollouts(completions):
        trainer = build(tmp_path, small_model(0), tokenizer, rows, reward_funcs=verifier, max_steps=3)
        trainer.create_optimizer()
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda *args, **kwargs: (steps.append(trainer.state.global_step), step(*args))[1]
        trainer.train()
    assert steps == [0, 2]


def test_an_fp16_run_survives_a_batch_of_nothing(tmp_path, small_model, tokenizer, rows, completions):
    """With the scaler that accelerate makes on a GPU, which runs on a CPU too."""

    def verifier(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step != 1)] * len(completions)

    with same_rollouts(completions):
        trainer = build(tmp_path, small_model(0), tokenizer, rows, reward_funcs=verifier, max_steps=3)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        try:
            trainer.train()
        finally:
            trainer.accelerator.state._mixed_precision = "no"
    assert trainer.state.global_step == 3


# -- a teacher that follows the student


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_an_average_in_bf16_moves_as_one_in_float32_does(tmp_path, small_model, tokenizer, rows, peft_config):
    """A step of a hundredth of a small difference is less than half of the spacing of bfloat16."""
    trainer = build(
        tmp_path,
        small_model(0).bfloat16(),
        tokenizer,
        rows,
        teacher_weights="ema",
        teacher_update_rate=0.01,
        peft_config=peft_config,
    )
    if peft_config is not None:
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.bfloat16()
    pairs = trainer.teacher.pairs()
    start = {name: teacher.detach().float().clone() for name, (teacher, _) in pairs.items()}
    drift = {}
    for name, (_, student) in pairs.items():
        with torch.no_grad():
            student.add_(0.01 * start[name].abs().mean() + 0.01 * start[name])
        drift[name] = student.detach().float() - start[name]
    for _ in range(100):
        trainer.teacher.move(0.01)
    moved = total = 0.0
    for name, (teacher, _) in trainer.teacher.pairs().items():
        # Along the way that the student went: what is rounded beside it does not count
        moved += ((teacher.detach().float() - start[name]) * drift[name]).sum()
        total += drift[name].norm() ** 2
    assert (moved / total).item() == pytest.approx(1 - 0.99**100, rel=0.05)


@pytest.mark.parametrize("weights, moves", [("ema", {1, 3, 5}), ("snapshot", {2, 4})])
def test_a_teacher_moves_only_where_the_student_has(
    tmp_path, small_model, tokenizer, rows, completions, weights, moves
):
    """Nothing is kept in the second step and the fourth. A snapshot of every two steps still gets what the first one did."""
    steps = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append([copy.deepcopy(teacher.detach()) for teacher, _ in trainer.teacher.pairs().values()])

    def verifier(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step % 2 == 0)] * len(completions)

    options = {"ema": {"teacher_update_rate": 0.3}, "snapshot": {"teacher_sync_steps": 2}}[weights]
    with same_rollouts(completions):
        trainer = build(
            tmp_path,
            small_model(0),
            tokenizer,
            rows,
            reward_funcs=verifier,
            max_steps=5,
            teacher_weights=weights,
            **options,
        )
        trainer.add_callback(Look())
        before = [teacher.detach().clone() for teacher, _ in trainer.teacher.pairs().values()]
        trainer.train()
    found = {
        number
        for number, (old, new) in enumerate(zip([before, *steps], steps, strict=False), start=1)
        if any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
    }
    assert found == moves


def test_a_resumed_average_in_bf16_goes_on_exactly(tmp_path, small_model, tokenizer, rows):
    changes = {"teacher_weights": "ema", "teacher_update_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    changes |= {"max_steps": 4, "lr_scheduler_type": "constant", "learning_rate": 1e-3}

    def run(folder, resume=None):
        trainer = build(folder, small_model(0).bfloat16(), tokenizer, rows, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "out" / "checkpoint-2"))
    for name, (teacher, _) in whole.teacher.pairs().items():
        assert torch.equal(resumed.teacher.pairs()[name][0], teacher)
        assert torch.equal(resumed.teacher._sums[name], whole.teacher._sums[name])
        assert whole.teacher._sums[name].dtype == torch.float32


# -- adapters


@pytest.mark.parametrize("weights", ["initial", "snapshot"])
def test_the_teacher_scores_with_its_own_head(tmp_path, small_model, tokenizer, rows, completions, weights):
    """The head is trained as a whole (`modules_to_save`): the teacher's must stay where it was."""
    config = LoraConfig(**LORA, modules_to_save=["lm_head"])
    original = small_model(0).lm_head.weight.detach().clone()
    with same_rollouts(completions):
        trainer = build(
            tmp_path, small_model(0), tokenizer, rows, peft_config=config, teacher_weights=weights, max_steps=2
        )
        trainer.train()
    inputs = (torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long), 2)
    _, head = trainer.teacher.forward(trainer.model, trainer._get_last_hidden_state, *inputs)
    assert torch.equal(head.weight, original)
    trained = trainer.model.get_output_embeddings().weight
    assert trained.requires_grad and not torch.allclose(trained, original)


@pytest.mark.parametrize("weights", ["ema", "snapshot"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_second_adapter_leaves_the_student_as_it_is(tmp_path, small_model, tokenizer, rows, start, weights):
    model = peft.get_peft_model(small_model(0), LoraConfig(**LORA, init_lora_weights=start))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model.eval()(ids).logits
        trainer = build(tmp_path, model, tokenizer, rows, teacher_weights=weights)
        after = trainer.model.eval()(ids).logits
        assert torch.equal(before, after)
        # And the teacher starts as the student does
        trainer.model.set_adapter(ADAPTER)
        assert torch.equal(before, trainer.model.eval()(ids).logits)


def test_an_engine_gets_the_students_weights_only(tmp_path, small_model, tokenizer, rows):
    """TRL drops the layers of adapters by their prefix, and renames `modules_to_save.default.` only."""
    config = LoraConfig(**LORA, modules_to_save=["lm_head"])
    trainer = build(tmp_path, small_model(0), tokenizer, rows, peft_config=config, teacher_weights="ema")
    everything = {name for name, _ in trainer.model.named_parameters()}
    assert [name for name in everything if f"modules_to_save.{ADAPTER}" in name]
    with trainer.teacher.hidden():
        sent = {name for name, _ in trainer.model.named_parameters() if "lora_" not in name}
        assert not [name for name in sent if ADAPTER in name]
        assert [name for name in sent if "lm_head.modules_to_save.default.weight" in name]
    assert {name for name, _ in trainer.model.named_parameters()} == everything


def merged_and_taken_out(model, times):
    for _ in range(times):
        model.merge_adapter()
        model.unmerge_adapter()


def changed_share(model, original):
    values = [(p, original[name]) for name, p in model.named_parameters() if name in original]
    return sum((p != o).sum().item() for p, o in values) / sum(o.numel() for _, o in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging_for_an_engine_leaves_the_base_bit_for_bit(small_model, dtype):
    model = peft.get_peft_model(small_model(0).to(dtype), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    original = {name: p.detach().clone() for name, p in model.named_parameters() if ".base_layer." in name}
    frozen = FrozenBase(model)
    for _ in range(20):
        with frozen.restored():
            merged_and_taken_out(model, 1)
    if dtype == torch.bfloat16:
        assert changed_share(model, original) == 0
        merged_and_taken_out(model, 20)  # what there is without it
        assert changed_share(model, original) > 0.05


def test_with_an_engine_the_base_is_restored_after_every_sync(tmp_path, small_model, tokenizer, rows, completions):
    """An engine that merges and takes out as TRL's does, and writes given completions."""

    syncs = 0

    def init(self, model, generation_kwargs=None, **kwargs):
        self.model, self.generation_kwargs, self.mode = model, generation_kwargs or {}, "server"

    def sync_weights(self):
        nonlocal syncs
        syncs += 1
        merged_and_taken_out(self.model, 1)

    def generate(self, prompts, **kwargs):
        return prompts, [list(completions[i % 4]) for i in range(len(prompts))], None, None

    module = "trl.trainer.distillation_trainer"
    trl_engine = {"__init__": init, "sync_weights": sync_weights, "generate": generate}
    with mock.patch.multiple(VLLMGeneration, **trl_engine), mock.patch(f"{module}.is_vllm_available", lambda: True):
        trainer = build(
            tmp_path,
            small_model(0).bfloat16(),
            tokenizer,
            rows,
            use_vllm=True,
            peft_config=LoraConfig(**LORA),
            max_steps=6,
            learning_rate=0.05,
        )
        original = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".base_layer." in n}
        trainer.train()
    assert syncs == 6 and changed_share(trainer.model, original) == 0


def test_an_adapter_that_has_been_trained_is_no_initial_teacher(tmp_path, small_model, tokenizer, rows):
    model = peft.get_peft_model(small_model(0), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    build(tmp_path, copy.deepcopy(model), tokenizer, rows)  # a new one is
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.1)
    with pytest.raises(ValueError, match="lm_head.weight.*merge the adapter first"):
        build(tmp_path, model, tokenizer, rows)


# -- teachers from elsewhere


@pytest.mark.parametrize("padding", [0, 7])
def test_a_teacher_is_frozen_and_in_the_precision_of_its_checkpoint(tmp_path, small_model, tokenizer, rows, padding):
    """Whether or not its vocabulary is padded."""
    teacher = small_model(1).bfloat16()
    teacher.resize_token_embeddings(len(tokenizer) + padding, mean_resizing=False)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    student = small_model(0)
    student.config._name_or_path = str(tmp_path / "teacher")
    trainer = build(tmp_path, student, tokenizer, rows, teacher_model=str(tmp_path / "teacher"))
    parameters = list(trainer.teacher_model.parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16} and not any(p.requires_grad for p in parameters)
    assert trainer.teacher.valid_vocab == (len(tokenizer) if padding else None)


@pytest.mark.parametrize("padding", [0, 7])
def test_the_revision_of_a_teacher_is_asked_for(tmp_path, small_model, tokenizer, rows, checkpoint, padding):
    path = checkpoint(1)
    asked = []

    def load(model, **kwargs):
        asked.append(kwargs["revision"])
        teacher = small_model(1)
        teacher.resize_token_embeddings(len(tokenizer) + padding, mean_resizing=False)
        return teacher

    with mock.patch("trl_opsd.opsd.teacher.create_model_from_path", load):
        build(tmp_path, small_model(0), tokenizer, rows, teacher_model=path, teacher_model_revision="v2")
    assert asked == ["v2"]


# -- the best checkpoint, and evaluation


def test_the_alarms_leave_the_best_checkpoint_to_who_asked_for_another_metric(
    tmp_path, small_model, tokenizer, rows, completions
):
    asked = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    asked |= {"metric_for_best_model": "eval_opsd/kl", "greater_is_better": True}
    best = {}
    for name, own in {"asked": asked, "not": {}}.items():
        config = OPSDConfig(
            **settings(tmp_path / name, max_steps=6, save_strategy="steps", save_steps=2, learning_rate=0.05, **own),
            teacher_prompt_template=CONCISE_TEMPLATE,
        )
        with same_rollouts(completions):
            trainer = OPSDTrainer(
                model=small_model(0),
                args=config,
                train_dataset=rows,
                eval_dataset=rows.select(range(4)),
                processing_class=tokenizer,
                reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
            )
            trainer.add_callback(AlarmCallback(trainer))
            trainer.train()
        best[name] = trainer.state
    logged = {log["step"]: log["eval_opsd/kl"] for log in best["asked"].log_history if "eval_opsd/kl" in log}
    step = max(logged, key=logged.get)
    assert best["asked"].best_model_checkpoint.endswith(f"checkpoint-{step}")
    assert best["not"].best_model_checkpoint is not None


def test_an_evaluation_of_which_nothing_passes_has_no_loss(tmp_path, small_model, tokenizer, rows, completions):
    """A zero would be the best of all."""
    passing = []

    def evaluate(folder):
        config = OPSDConfig(**settings(folder), teacher_prompt_template=CONCISE_TEMPLATE, per_device_eval_batch_size=2)
        with same_rollouts(completions):
            trainer = OPSDTrainer(
                model=small_model(0),
                args=config,
                train_dataset=rows,
                eval_dataset=rows.select(range(6)),
                processing_class=tokenizer,
                reward_funcs=lambda prompts, **kwargs: [float(p[0]["content"] in passing) for p in prompts],
            )
            return trainer.evaluate()

    assert evaluate(tmp_path)["eval_loss"] is None
    texts = [row["prompt"][0]["content"] for row in rows.select(range(6))]
    passing += texts
    every = evaluate(tmp_path)["eval_loss"]
    assert every > 0
    del passing[2:]
    some = evaluate(tmp_path)
    # One batch of two, or two with one each: their mean, and no zeros of the others
    assert 0.3 * every < some["eval_loss"] < 3 * every and some["eval_opsd/kept"] == pytest.approx(1 / 3)
    assert some["eval_loss"] == pytest.approx(some["eval_opsd/kl"], rel=0.3)
