"""The verifiers, called as [`~trl.GRPOTrainer`] calls its reward functions."""

import asyncio
import atexit
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerState
from trl.trainer.utils import (
    get_callable_name,
    is_async_callable,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)


logger = get_logger(__name__)

# A reward function as GRPO takes it, without the reward models
RewardFunc = Callable[..., list[float | None]]


class Verifiers:
    """
    Reward functions that judge rollouts.

    Args:
        functions (`list[Callable]`):
            Reward functions, synchronous or not. The asynchronous ones run side by side.
        profile (`Callable`):
            Context manager that times what happens under a name.
        timeout (`float`, *optional*):
            Seconds that a function may take for a batch.

    Attributes:
        names (`list[str]`):
            Name of each function.
        metrics (`dict[str, list[float]]`):
            What the functions have logged with `log_metric`, until somebody takes it.
        columns (`dict[str, list]`):
            What they have logged of the rollouts with `log_extra`, by column, until somebody takes it.
    """

    def __init__(
        self,
        functions: list[RewardFunc],
        profile: Callable[[str], AbstractContextManager],
        timeout: float | None = None,
    ):
        self.names = [get_callable_name(function) for function in functions]
        self.functions = [name_errors(function) for function in functions]
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.columns: dict[str, list] = defaultdict(list)
        self._profile = profile
        self._timeout = timeout
        self._loop = None
        if any(map(is_async_callable, functions)):
            thread, self._loop, ready = start_event_loop_in_daemon(name="OPSDTrainer-AsyncLoop")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, thread, self._loop)

    def score(
        self,
        rows: list[dict[str, Any]],
        completions: list[str] | list[list[dict[str, Any]]],
        completion_ids: list[list[int]],
        state: TrainerState,
    ) -> torch.Tensor:
        """
        Rewards of some rollouts.

        Args:
            rows (`list[dict[str, Any]]`):
                Row of the dataset of each.
            completions (`list`):
                Text, or messages, of each.
            completion_ids (`list[list[int]]`):
                Token ids of each.
            state ([`~transformers.TrainerState`]):
                State of the training, which functions may read.

        Returns:
            `torch.Tensor`: Reward by each function, of shape `(B, functions)`, NaN where one has returned `None`.

        Raises:
            RuntimeError: If a function raises, or takes too long. The message names it and the sample.
            ValueError: If a function gives another number of rewards than there are rollouts.
        """
        arguments = {
            "prompts": [row["prompt"] for row in rows],
            "completions": completions,
            "completion_ids": completion_ids,
            # Every other column of the dataset
            **{
                name: [row[name] for row in rows]
                for name in rows[0]
                if name not in ("prompt", "completion", "completion_ids")
            },
            "trainer_state": state,
            "log_extra": lambda column, values: self.columns[column].extend(values),
            "log_metric": lambda name, value: self.metrics[name].append(value),
        }
        rewards = torch.full((len(rows), len(self.functions)), torch.nan)
        waiting = {}
        for index, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            if is_async_callable(function):
                waiting[index] = function(**arguments)
            else:
                with self._profile(name):
                    with time_limit(name, self._timeout):
                        rewards[:, index] = self._column(name, function(**arguments), len(rows))
        if waiting:

            async def together():
                return await asyncio.gather(*waiting.values())

            names = ", ".join(self.names[index] for index in waiting)
            future = asyncio.run_coroutine_threadsafe(together(), self._loop)
            try:
                with self._profile(names):
                    with time_limit(names, self._timeout):
                        answers = future.result()
            finally:
                future.cancel()
            for index, answer in zip(waiting, answers, strict=True):
                rewards[:, index] = self._column(self.names[index], answer, len(rows))
        unjudged = rewards.isnan().all(dim=1).nonzero().flatten().tolist()
        if unjudged:
            logger.warning(
                f"No verifier has judged {len(unjudged)} of {len(rows)} rollouts, the first of them on the prompt "
                f"{str(rows[unjudged[0]]['prompt'])[:200]!r}: they are neither correct nor incorrect."
            )
        return rewards

    @staticmethod
    def _column(name: str, rewards: list[float | None], number: int) -> torch.Tensor:
        if len(rewards) != number:
            raise ValueError(
                f"The reward function `{name}` returned {len(rewards)} rewards for {number} rollouts: it must return one "
                "for each, and `None` where it cannot judge."
            )
        return torch.tensor([torch.nan if reward is None else reward for reward in rewards], dtype=torch.float32)


@contextmanager
def time_limit(name: str, seconds: float | None) -> Iterator[None]:
    """
    Ends what takes too long, where a user would end it with the keyboard: in the main thread, unless it is in foreign code
    that does not listen. An alarm clock of the process would be that of math-verify, which sets it for each answer.

    Args:
        name (`str`):
            Name of the function, for the message.
        seconds (`float`, *optional*):
            How long it may take. Without it, for ever.

    Raises:
        RuntimeError: If it takes longer.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    is_over = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        is_over.set()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def receive(signum, frame) -> None:
        if is_over.is_set():
            raise _TimeIsUp
        if callable(before):  # the user's own interruption, which a process in the background ignores
            before(signum, frame)

    clock = threading.Timer(seconds, interrupt)
    clock.daemon = True
    signal.signal(signal.SIGINT, receive)
    clock.start()
    try:
        yield
    except _TimeIsUp:
        raise RuntimeError(
            f"The reward function `{name}` took more than {seconds} seconds for a batch, which is as long as other "
            "processes would wait (`ddp_timeout`): give it a time limit of its own, or raise that. The last checkpoint is as "
            "it was."
        ) from None
    finally:
        clock.cancel()
        signal.signal(signal.SIGINT, before)


class _TimeIsUp(BaseException):
    """Not an `Exception`, which a reward function may take for its own."""


def name_errors(func: RewardFunc) -> RewardFunc:
    """
    Makes the error of a reward function say which function and which sample it was.

    Args:
        func (`Callable`):
            Reward function, synchronous or not.

    Returns:
        `Callable`: The same function, whose errors are a `RuntimeError` with the original one as its cause.
    """

    def explain(error: Exception, kwargs: dict[str, Any]) -> RuntimeError:
        def raises(index: int) -> bool:
            # Of what comes as one list per batch, the entry of this sample
            size = len(kwargs["completions"])
            one = {
                name: [value[index]] if isinstance(value, list) and len(value) == size else value
                for name, value in kwargs.items()
            }
            try:
                asyncio.run(func(**one)) if is_async_callable(func) else func(**one)
            except type(error):
                return True
            return False

        index = next((index for index in range(len(kwargs["completions"])) if raises(index)), None)
        where = "for the batch as a whole"
        if index is not None:
            prompt, completion = (str(kwargs[name][index])[:200] for name in ("prompts", "completions"))
            where = f"on the sample with the prompt {prompt!r} and the completion {completion!r}"
        step = kwargs["trainer_state"].global_step + 1
        return RuntimeError(
            f"The reward function `{get_callable_name(func)}` raised {type(error).__name__} ({error}) in step {step}, "
            f"{where}. The last checkpoint is as it was."
        )

    if is_async_callable(func):

        async def named(**kwargs):
            try:
                return await func(**kwargs)
            except Exception as error:
                raise await asyncio.to_thread(explain, error, kwargs) from error

    else:

        def named(**kwargs):
            try:
                return func(**kwargs)
            except Exception as error:
                raise explain(error, kwargs) from error

    return named
