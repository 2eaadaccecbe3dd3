"""From the names that a recipe gives to reward functions, and what a function needs before it can run."""

import importlib
import inspect
import logging
from collections.abc import Callable

import trl.rewards
from datasets import Dataset

from ..cli import UserError
from .code import check_tests, code_reward
from .format import format_reward, length_reward
from .logic import logic_reward
from .math import is_readable, math_reward, reference
from .reasoning_gym import reasoning_gym_reward
from .sandbox import require_isolation


logger = logging.getLogger(__name__)

_SHOWN = 5
_OWN = {
    "math_reward": math_reward,
    "format_reward": format_reward,
    "length_reward": length_reward,
    "reasoning_gym_reward": reasoning_gym_reward,
    "code_reward": code_reward,
    "logic_reward": logic_reward,
}
_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
# What TRL's trainers hand to every reward function themselves, so that no column has to.
_GIVEN = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
}


def load_reward_funcs(names: list[str]) -> list[Callable]:
    """
    Finds reward functions by name.

    Args:
        names (`list[str]`):
            Names of this package's functions (such as `math_reward`), of TRL's (`accuracy_reward`,
            `reasoning_accuracy_reward`, `think_format_reward`), or dotted paths (`my_module.my_reward`).

    Returns:
        `list[Callable]`: The functions, in the order of their names.

    Raises:
        UserError: If a name is unknown, naming it and the known ones, or if this machine cannot isolate the programs
            that `code_reward` runs.
    """
    return [_load(name) for name in names]


def _load(name: str) -> Callable:
    if name == "code_reward":
        require_isolation()  # now, and not at the first rollout
    if name in _OWN:
        return _OWN[name]
    if name in _TRL:
        return getattr(trl.rewards, name)
    module, _, attribute = name.rpartition(".")
    if not module:
        known = ", ".join((*_OWN, *_TRL))
        raise UserError(f"Unknown reward function `{name}`: choose from {known}, or give a dotted path.")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"The reward function `{name}` cannot be imported ({error}): check the dotted path.") from None
    if not callable(function):
        raise UserError(f"The reward function `{name}` is a {type(function).__name__}, not a function.")
    return function


def required_columns(func: Callable) -> set[str]:
    """
    Returns the data set columns without which a reward function cannot be called: its parameters that have no default
    and are not given by the trainer.

    Args:
        func (`Callable`):
            Reward function in TRL's form.

    Returns:
        `set[str]`: Names of the columns.
    """
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name
        for name, parameter in inspect.signature(func).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in variable and name not in _GIVEN
    }


def check_rows(dataset: Dataset, reward_funcs: list[Callable], name: str) -> None:
    """
    Checks the rows that reward functions are to judge, beyond that their columns are there: tests that any program passes
    are refused, and references that no answer can be compared with are reported, because nothing is scored there.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        reward_funcs (`list[Callable]`):
            Reward functions. [`code_reward`] reads the tests, [`math_reward`] and those that are made of it the answers.
        name (`str`):
            Name of the data set, for the message.

    Raises:
        UserError: If the tests of a row would be passed by any program, naming the row, or if not one answer can be read.
    """
    if code_reward in reward_funcs:
        columns = (dataset[column] if column in dataset.column_names else None for column in ("entry_point", "setup"))
        check_tests(dataset["tests"], *columns, name)
    if {math_reward, logic_reward, length_reward}.intersection(reward_funcs):
        _check_answers(dataset["answer"], name)


def _check_answers(answers: list[str | None], name: str) -> None:
    # A row without an answer is somebody else's, such as one with tests
    answers = [(number, answer) for number, answer in enumerate(answers, start=1) if answer is not None]
    unread = [(number, answer) for number, answer in answers if not is_readable(reference(answer))]
    if len(unread) == len(answers):
        first = f" (row {unread[0][0]} has {unread[0][1]!r:.80})" if unread else ""
        raise UserError(f"`{name}`: no `answer` can be read as mathematics or words{first}: check that column.")
    for number, answer in unread[:_SHOWN]:
        logger.warning(
            "`%s`, row %d: the answer %.80r cannot be read, so its row is not scored.", name, number, answer
        )
    if len(unread) > _SHOWN:
        logger.warning("`%s`: %d more answers cannot be read.", name, len(unread) - _SHOWN)
