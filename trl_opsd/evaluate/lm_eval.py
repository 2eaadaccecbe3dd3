"""
Tasks of lm-evaluation-harness by name: `lm_eval:gpqa_diamond_cot_zeroshot`, or `lm_eval:FILE.yaml`. Problems, prompts,
filters and scoring are theirs; what generates, the cache, the intervals and the report are ours.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..cli import UserError
from ..rewards.math import text_of


#: What stands before the name of a task
LM_EVAL = "lm_eval"


@functools.cache
def _load(name: str) -> dict[str, Any]:
    """The tasks behind a name, one or those of a group, loaded once."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"`{LM_EVAL}:{name}` needs lm-evaluation-harness: run `pip install lm_eval`.") from None
    is_file = name.endswith((".yaml", ".yml"))
    try:
        tasks = TaskManager(include_defaults=not is_file).load([name])["tasks"]
    except Exception as error:  # it reads YAML, runs code of the task and fetches data, and says so in any way
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"lm-evaluation-harness cannot load the task `{name}` ({reason:.300}).") from None
    for task_name, task in tasks.items():
        _check(task_name, task)
    return tasks


def _check(name: str, task: Any) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        raise UserError(
            f"lm-evaluation-harness's task `{name}` compares likelihoods (`{task.OUTPUT_TYPE}`), and here answers are "
            "generated: choose a variant that generates (`generate_until`)."
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"lm-evaluation-harness's task `{name}` runs what a model writes in this process: use `humaneval` or `mbpp`, "
            "whose verifier has a sandbox."
        )
    metric = _metric(task)
    aggregation, higher = task.aggregation()[metric], task.higher_is_better()[metric]
    if getattr(aggregation, "__name__", "") != "mean" or not higher:
        raise UserError(
            f"`{metric}` of lm-evaluation-harness's task `{name}` is no share of problems: it has no accuracy."
        )


def _metric(task: Any) -> str:
    """The first one that the task declares decides."""
    return next(iter(task.aggregation()))


def find_lm_eval(name: str) -> dict[str, Any]:
    """
    Says how a task of lm-evaluation-harness is measured.

    Args:
        name (`str`):
            Name of a task or a group there, or a YAML file.

    Returns:
        `dict[str, Any]`: Fields of a [`~trl_opsd.evaluate.tasks.Task`], with the limits and the stop texts of its
        `generation_kwargs`.

    Raises:
        UserError: If there is none, or it is not about generated answers.
    """
    tasks = _load(name)
    settings = {json.dumps(task.config.generation_kwargs, sort_keys=True, default=str) for task in tasks.values()}
    repeats = {task.config.repeats for task in tasks.values()}
    if len(settings) > 1 or len(repeats) > 1:
        raise UserError(f"The tasks of the group `{name}` are decoded in different ways: name them one by one.")
    first = next(iter(tasks.values()))
    told = first.config.generation_kwargs
    until = told.get("until") or ()
    is_sampled = bool(told.get("do_sample")) and told.get("temperature", 1.0) > 0
    return {
        "dataset_split": "test",  # theirs is used
        "reward_funcs": (LM_EVAL,),
        # as lm-evaluation-harness has it where a task does not say
        "max_completion_length": int(told.get("max_gen_toks", 256)),
        "decoding": ("sampled" if is_sampled else "greedy",),
        "num_samples": repeats.pop(),
        "temperature": float(told.get("temperature", 1.0)) if is_sampled else 1.0,
        "top_p": float(told.get("top_p", 1.0)),
        "top_k": int(told.get("top_k", 0)),
        "stop": (until,) if isinstance(until, str) else tuple(until) or None,
        "version": str(first.VERSION),
    }


def load_lm_eval(name: str) -> tuple[Dataset, list[Callable]]:
    """
    Loads the problems of a task of lm-evaluation-harness, and its scoring as a reward function.

    Args:
        name (`str`):
            Name of a task or a group there, or a YAML file.

    Returns:
        `tuple[Dataset, list[Callable]]`: Rows with `prompt` (the conversation that lm-evaluation-harness makes, with its
        description and examples) and `lm_eval_doc`, in a group `task` too; and one reward function.

    Raises:
        UserError: If the task cannot be loaded, or begins the answer of the model.
    """
    tasks = _load(name)
    rows, instances = [], {}
    for task_name, task in tasks.items():
        task.build_all_requests(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=_render)
        for instance in task.instances:
            messages = json.loads(instance.args[0])
            if messages[-1]["role"] != "user":
                raise UserError(
                    f"lm-evaluation-harness's task `{task_name}` begins the answer itself (`gen_prefix`), which is not "
                    "supported: choose a variant without."
                )
            key = f"{task_name} {instance.doc_id}"
            instances[key] = task, instance
            row = {"prompt": messages, "lm_eval_doc": key}
            rows.append(row | ({"task": task_name} if len(tasks) > 1 else {}))
    filters = [part.name for part in next(iter(tasks.values()))._filters]

    def score(completions: list, lm_eval_doc: list[str], part: int) -> list[float]:
        return [
            _score(*instances[key], text_of(completion), part)
            for completion, key in zip(completions, lm_eval_doc, strict=True)
        ]

    def strict(completions: list, lm_eval_doc: list[str], **kwargs) -> list[float]:
        return score(completions, lm_eval_doc, 0)

    def either(completions: list, lm_eval_doc: list[str], flexible: bool = False, **kwargs) -> list[float]:
        return score(completions, lm_eval_doc, -1 if flexible else 0)

    # Of several filters the first is the strict one and the last the flexible one, as `strict-match` and
    # `flexible-extract` are
    return Dataset.from_list(rows), [either if len(filters) > 1 else strict]


def _render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Stands in for a chat template: what was asked comes back as it was, and the model's own template is applied later."""
    return json.dumps(messages)


def _score(task: Any, instance: Any, text: str, part: int) -> float:
    instance.resps, instance.filtered_resps = [text.rpartition("</think>")[2]], {}
    chosen = task._filters[part]
    chosen.apply([instance])
    value = float(task.process_results(instance.doc, [instance.filtered_resps[chosen.name]])[_metric(task)])
    if value not in (0.0, 1.0):
        raise UserError(
            f"`{_metric(task)}` of lm-evaluation-harness's task `{task.config.task}` gives parts of a point ({value:g}): it "
            "has no accuracy."
        )
    return value
