"""What must not cost a run: a rollout that is not finite, a micro-batch without memory, a verifier that hangs, nothing written."""

import asyncio
import copy
import json
import math
import signal
import time
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from test_opsd_trainer import Recorder, reward_by_length, same_rollouts, settings

from trl_opsd import OPSDConfig, OPSDTrainer, faults
from trl_opsd.opsd import verify
from trl_opsd.opsd.metrics import OPSDAlarm
from trl_opsd.tiny.task import CONCISE_TEMPLATE


# Kernels of a GPU, where the loss runs anywhere
LIGERS_LAYERS = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def build(tmp_path, small_model, tokenizer, rows, reward_funcs=None, peft_config=None, **changes):
    config = OPSDConfig(**settings(tmp_path, **changes), teacher_prompt_template=CONCISE_TEMPLATE)
    return OPSDTrainer(
        model=small_model(0),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward_funcs,
        peft_config=peft_config,
        callbacks=[Recorder()],
    )


def recorder(trainer):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Recorder))


@pytest.mark.parametrize(
    "budget, poison, how",
    [
        (None, math.nan, None),
        (100_000, math.inf, None),
        (1, math.nan, None),
        (None, math.nan, "bf16"),
        (100_000, math.nan, "lora"),
        (1, math.nan, "liger"),  # whose loss is one number: it speaks for a whole micro-batch
    ],
)
def test_a_rollout_that_is_not_finite_is_left_out(
    tmp_path, small_model, tokenizer, rows, completions, budget, poison, how
):
    """The gradient is the one that the other rollouts give: that of a run whose gate rejects this one, up to the divisor."""
    bad = {"kept": 0}
    hidden, wrong = OPSDTrainer._get_last_hidden_state, completions[0]

    def right(completions, completion_ids, **kwargs):
        return [float(ids != wrong) for ids in completion_ids]

    def spoiled(self, model, input_ids, attention_mask, *args, **kwargs):
        states = hidden(self, model, input_ids, attention_mask, *args, **kwargs)
        if not states.requires_grad or self.state.global_step > 0:
            return states
        ends = (input_ids != self._tokenizer.pad_token_id).sum(dim=1)
        tails = [row[end - len(wrong) : end].tolist() for row, end in zip(input_ids, ends, strict=True)]
        spoilt = torch.tensor([tail == wrong for tail in tails])
        bad["kept"] += int(spoilt.sum())
        states = states.clone()
        states[spoilt] = poison * states[spoilt]
        return states

    runs = []
    for name, reward, hook in (("without", right, hidden), ("spoiled", reward_by_length(0), spoiled)):
        with (
            same_rollouts(completions),
            mock.patch.object(OPSDTrainer, "_get_last_hidden_state", hook),
        ):
            torch.manual_seed(0)
            trainer = build(
                tmp_path / name,
                small_model,
                tokenizer,
                rows,
                reward,
                optim="sgd",
                weight_decay=0.0,
                max_grad_norm=0.0,
                max_steps=1,
                learning_rate=1.0,
                max_tokens_per_microbatch=budget,
                bf16=how == "bf16",
                use_liger_kernel=how == "liger",
                liger_kernel_config=LIGERS_LAYERS,
                peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if how == "lora" else None,
            )
            start = copy.deepcopy(trainer.model.state_dict())
            trainer.train()
        runs.append({name: value - start[name] for name, value in trainer.model.state_dict().items()})
    assert bad["kept"] == 2
    without, left_out = runs
    tokens = [len(ids) for ids in completions]
    share = (sum(tokens) - tokens[0]) / sum(tokens)
    for name, change in without.items():
        close = {"rtol": 0.05, "atol": 3e-3 * max(x.abs().max() for x in without.values())} if how == "bf16" else {}
        torch.testing.assert_close(left_out[name], share * change, **{"rtol": 1e-4, "atol": 1e-6} | close)
    assert any(change.abs().max() > 1e-4 for change in without.values())
    lines = [json.loads(line) for line in (tmp_path / "spoiled" / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [line["completion_ids"] for line in lines] == [wrong] * 2
    assert all(line["step"] == 1 and "a:" in line["prompt"] and "not finite" in line["why"] for line in lines)
    assert not (tmp_path / "without" / "out" / "left_out.jsonl").exists()
    log = recorder(trainer).logs[0]
    measured = ("loss", "opsd/kl", "grad_norm") + (() if how == "liger" else ("entropy",))
    assert all(math.isfinite(log[name]) for name in measured)


def test_a_gradient_that_is_not_finite_is_not_followed(tmp_path, small_model, tokenizer, rows, completions):
    trainer = build(tmp_path, small_model, tokenizer, rows, reward_by_length(0))

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (math.inf if trainer.state.global_step == 1 else 1.0)

    hidden = OPSDTrainer._get_last_hidden_state
    patched = mock.patch.object(
        OPSDTrainer, "_get_last_hidden_state", lambda *args, **kwargs: Spoil.apply(hidden(*args, **kwargs))
    )
    with same_rollouts(completions), patched:
        trainer.train()
    first, second, third = recorder(trainer).weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)
    assert all(value.isfinite().all() for value in third.values())
    assert [log["grad_norm"] > 0 for log in recorder(trainer).logs[:3]] == [True, False, True]
    lines = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["step"] for line in lines} == {2} and "gradient" in lines[0]["why"]


@pytest.mark.parametrize("has_scaler", [False, True])
def test_too_many_in_a_row_end_the_run(tmp_path, small_model, tokenizer, rows, completions, monkeypatch, has_scaler):
    """Also under a scaler, which looks at the gradient itself: what was left out of a step ends with it there too."""
    monkeypatch.setattr(faults, "IN_A_ROW", 3)
    trainer = build(tmp_path, small_model, tokenizer, rows, reward_by_length(0), max_steps=9)
    if has_scaler:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    hidden = OPSDTrainer._get_last_hidden_state

    def spoiled(self, model, input_ids, *args, **kwargs):
        states = hidden(self, model, input_ids, *args, **kwargs)
        if states.requires_grad and self.state.global_step != 2:  # the count begins anew after a good one
            states = torch.cat([math.nan * states[:1], states[1:]])
        return states

    with (
        same_rollouts(completions),
        mock.patch.object(OPSDTrainer, "_get_last_hidden_state", spoiled),
        pytest.raises(OPSDAlarm, match="in each of 3 steps in a row, the last of them step 6: see `.*left_out.jsonl`"),
    ):
        trainer.train()
    assert len(recorder(trainer).weights) == 5


class NoMemory:
    """A device that holds a micro-batch of so many tokens and no more, or fails in the backward pass alone."""

    def __init__(self, trainer, limit, backward=False):
        self.forwards = []
        hidden, accumulate = OPSDTrainer._get_last_hidden_state, trainer.accelerator.backward

        def limited(own, model, input_ids, *args, **kwargs):
            self.forwards.append(tuple(input_ids.shape))
            if not backward and input_ids.numel() > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return hidden(own, model, input_ids, *args, **kwargs)

        def limited_backward(loss, **kwargs):
            accumulate(loss, **kwargs)  # what it has added by then must not be added twice
            if backward and self.forwards[-1][0] * self.forwards[-1][1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        self.patches = [
            mock.patch.object(OPSDTrainer, "_get_last_hidden_state", limited),
            mock.patch.object(trainer.accelerator, "backward", limited_backward),
        ]

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_without_memory_is_made_again_in_halves(
    tmp_path, small_model, tokenizer, rows, completions, backward, caplog
):
    weights, kl = [], []
    attempts, accumulate, under = [], OPSDTrainer._accumulate, OPSDTrainer._accumulate_under

    def counted(self, *args):
        attempts[-1] += 1
        return accumulate(self, *args)

    def attempted(self, *args):
        attempts.append(0)
        return under(self, *args)

    for limit in (10**9, 150):
        trainer = build(
            tmp_path, small_model, tokenizer, rows, reward_by_length(0), max_tokens_per_microbatch=250, max_steps=1
        )
        entropies, log = [], trainer.log
        trainer.log = lambda *args, log=log, trainer=trainer, entropies=entropies: (
            entropies.append(len(trainer._metrics["train"]["entropy"])),
            log(*args),
        )
        with (
            same_rollouts(completions),
            NoMemory(trainer, limit, backward) as device,
            mock.patch.object(OPSDTrainer, "_accumulate", counted),
            mock.patch.object(OPSDTrainer, "_accumulate_under", attempted),
        ):
            trainer.train()
        # Of the attempt that counts, and of nothing before it
        assert entropies[0] == attempts[-1] and len(trainer._metrics["train"]["opsd/kl"]) == 0
        weights.append(trainer.model.state_dict())
        kl.append(recorder(trainer).logs[0]["opsd/kl"])
    assert len(attempts) == 3  # in the backward pass something has been measured when there is no memory
    assert "Out of memory in step 1, in a micro-batch of" in caplog.text and "made again" in caplog.text
    assert max(height * width for height, width in device.forwards) > 150
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    assert kl[1] == pytest.approx(kl[0], rel=1e-5)


def test_what_is_left_out_of_a_step_that_is_made_again_is_written_once(
    tmp_path, small_model, tokenizer, rows, completions
):
    trainer = build(
        tmp_path, small_model, tokenizer, rows, reward_by_length(0), max_tokens_per_microbatch=250, max_steps=1
    )
    attempts = []

    def fails_at_first(self, model, batch, budget):
        attempts.append(budget)
        self._at_work = (2, 200)
        self.faults.add(batch, torch.arange(len(batch["prompt_ids"])) != 3)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(())

    with same_rollouts(completions), mock.patch.object(OPSDTrainer, "_accumulate_under", fails_at_first):
        trainer.train()
    assert attempts == [250, 100]
    lines = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [line["completion_ids"] for line in lines] == [completions[3]]


@pytest.mark.parametrize(
    "budget, message",
    [
        (None, r"in a micro-batch of 4 rollouts and \d+ tokens with padding: lower `per_device_train_batch_size` in"),
        (250, r"in a micro-batch of \d rollouts and \d+ tokens with padding: lower `max_tokens_per_microbatch`\."),
        (1, r"in a micro-batch of 1 rollouts and \d\d tokens with padding: lower `max_completion_length`\."),
    ],
)
def test_what_has_no_memory_in_halves_either_is_named(
    tmp_path, small_model, tokenizer, rows, completions, budget, message
):
    trainer = build(tmp_path, small_model, tokenizer, rows, reward_by_length(0), max_tokens_per_microbatch=budget)
    with (
        same_rollouts(completions),
        NoMemory(trainer, 5),
        pytest.raises(torch.OutOfMemoryError, match=f"^Out of memory in step 1, {message}"),
    ):
        trainer.train()


# Verifiers that hang


def sleeps(completions, **kwargs):
    time.sleep(60)


def spins(completions, **kwargs):
    while True:
        pass


async def waits(completions, **kwargs):
    await asyncio.sleep(60)


@pytest.mark.parametrize("verifier", [sleeps, spins, waits])
def test_a_verifier_that_hangs_ends_the_run_in_time(tmp_path, small_model, tokenizer, rows, completions, verifier):
    trainer = build(tmp_path, small_model, tokenizer, rows, verifier, ddp_timeout=1)
    start = time.monotonic()
    with (
        same_rollouts(completions),
        pytest.raises(RuntimeError, match=f"`{verifier.__name__}` took more than 1 seconds .*`ddp_timeout`"),
    ):
        trainer.train()
    assert time.monotonic() - start < 30


def test_an_interruption_of_the_users_stays_one():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), verify.time_limit("sleeps", 60):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_time_is_up_where_the_users_interruption_is_ignored():
    """As it is in a process that a script has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with verify.time_limit("sleeps", 60):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(RuntimeError, match="took more than 0.1 seconds"), verify.time_limit("sleeps", 0.1):
            time.sleep(60)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# What is written


@pytest.mark.parametrize(
    "case, budget", [("nothing", None), ("some nothing", 100), ("only the end", 100), ("the maximum", None)]
)
def test_whatever_the_student_writes_the_run_goes_on(
    tmp_path, small_model, tokenizer, rows, completions, case, budget
):
    end = tokenizer.eos_token_id
    written = {
        "nothing": [[]],
        "some nothing": [[], completions[0], [], completions[2]],
        "only the end": [[end]],
        "the maximum": [completions[2][:-1][:12]],
    }[case]
    for gate in ("all", "correct"):
        trainer = build(
            tmp_path / gate,
            small_model,
            tokenizer,
            rows,
            reward_by_length(0),
            gate=gate,
            max_tokens_per_microbatch=budget,
            max_steps=2,
        )
        with same_rollouts(written):
            trainer.train()
        assert trainer.state.global_step == 2
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
        kept = 0.0 if case == "the maximum" and gate == "correct" else 1.0
        assert recorder(trainer).logs[0]["opsd/kept"] == kept
