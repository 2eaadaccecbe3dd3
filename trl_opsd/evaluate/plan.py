"""From a configuration to jobs, each one checkpoint on one task: all that can be checked before a model is loaded."""

import copy
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..cli import UserError, check_vllm
from ..data import check_columns, load_prompts, load_tokenizer, write_rows
from ..rewards import check_rows, load_reward_funcs, required_columns
from .backends import Sampling, served_model
from .checkpoint import Checkpoint, open_checkpoint, wrap_model
from .config import EvaluateConfig
from .lm_eval import LM_EVAL, load_lm_eval
from .tasks import find_task, task_name
from .thinking import find_tags


@dataclass
class Job:
    """
    One checkpoint on one task, checked and ready to be run.

    Args:
        config ([`EvaluateConfig`]):
            With all values filled in.
        checkpoint ([`~trl_opsd.evaluate.checkpoint.Checkpoint`]):
            What answers.
        dataset ([`~datasets.Dataset`]):
            Problems.
        reward_funcs (`list[Callable]`):
            Verifiers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the checkpoint.
        served (`dict[str, Any]`, *optional*):
            What a server says of the model that it has; see [`~trl_opsd.evaluate.backends.served_model`].

    Attributes:
        names (`list[str]`):
            Name of each problem; see [`problem_ids`].
        prompt_ids (`list[list[int]]`):
            Token ids of the prompts, in the context of `config.prompt_template`.
        limits (`list[int]`):
            Maximum number of tokens of each problem's completion: what is asked for, or what the model has left.
        too_long (`int`):
            Number of problems left out because the prompt alone fills the model's positions.
        eos_ids (`tuple[int, ...]`):
            Tokens that end a completion.
        tags ([`~trl_opsd.evaluate.thinking.ThinkingTags`]):
            Tags of the thinking block.

    Raises:
        UserError: If no prompt leaves as many positions as a completion may have tokens, or there are fewer problems
            than requests that are to be under way.
        ValueError: If nothing ends a completion.
    """

    config: EvaluateConfig
    checkpoint: Checkpoint
    dataset: Dataset
    reward_funcs: list[Callable]
    tokenizer: PreTrainedTokenizerBase
    served: dict[str, Any] | None = None

    def __post_init__(self):
        config = self.config
        self.names = problem_ids(self.dataset)
        self.eos_ids = tuple(eos_token_ids(self.checkpoint.generation_config, self.tokenizer))
        self.tags = find_tags(self.tokenizer, config.thinking_tags)
        self.prompts = self._prompts()
        self.prompt_ids = write_rows(
            self.prompts, config.dataset_name, self.tokenizer, config.chat_template_kwargs, config.prompt_template
        )
        self._fit()
        requests = min(len(self.names), config.serving_requests)
        if config.concurrency and max(config.concurrency) > requests:
            raise UserError(
                f"`concurrency` {max(config.concurrency)} needs at least as many requests, and `{config.task}` has "
                f"{len(self.names)} problems, with `serving_requests` {config.serving_requests}: lower it, or measure on "
                "a larger task."
            )

    def _prompts(self) -> list:
        config, context = self.config, self.config.context()
        if config.backend == "server" and config.server_api == "chat" and isinstance(self.dataset["prompt"][0], str):
            raise UserError(
                f"`server_api: chat` takes conversations, and the prompts of `{config.task}` are plain text."
            )
        prompts = list(self.dataset["prompt"]) if context is None else [context.prompt(row) for row in self.dataset]
        if config.system_prompt is None:
            return prompts
        if isinstance(prompts[0], str):
            raise UserError(
                f"`system_prompt` is for conversations, and the prompts of `{config.task}` are plain text."
            )
        if any(prompt[0]["role"] == "system" for prompt in prompts):
            raise UserError(f"The prompts of `{config.task}` have a system message: leave `system_prompt` out.")
        return [[{"role": "system", "content": config.system_prompt}, *prompt] for prompt in prompts]

    def _fit(self) -> None:
        """Gives each completion the positions that its prompt leaves, and leaves prompts out that leave none."""
        config = self.config
        told = [self.checkpoint.positions]
        if config.backend == "vllm" or config.starts_server:
            told.append((config.vllm_kwargs or {}).get("max_model_len"))
        elif config.backend == "server":
            told.append((self.served or {}).get("max_model_len"))
        positions = min((limit for limit in told if limit is not None), default=None)
        limit = config.max_completion_length
        left = [limit if positions is None else positions - len(ids) for ids in self.prompt_ids]
        if max(left) < limit:  # the limit is at fault, and not this or that prompt
            shortest = min(map(len, self.prompt_ids))
            raise UserError(
                f"The shortest prompt of `{config.dataset_name}` has {shortest} tokens, and with "
                f"`max_completion_length` {limit} that is more than the {positions} positions of the model: lower it."
            )
        kept = [index for index, room in enumerate(left) if room > 0]
        self.too_long = len(left) - len(kept)
        self.limits = [min(left[index], limit) for index in kept]
        if self.too_long:
            self.dataset = self.dataset.select(kept)
            self.names, self.prompts, self.prompt_ids = (
                [values[index] for index in kept] for values in (self.names, self.prompts, self.prompt_ids)
            )

    def sampling(self, decoding: str) -> Sampling:
        """How completions are drawn for `"greedy"` or `"sampled"`."""
        config = self.config
        common = {
            "max_tokens": config.max_completion_length,
            "eos_ids": self.eos_ids,
            "stop": tuple(config.stop or ()),
        }
        if decoding == "greedy":
            return Sampling(0.0, 1.0, 0, **common)
        return Sampling(config.temperature, config.top_p, config.top_k, min_p=config.min_p or 0.0, **common)

    def samples(self, decoding: str) -> int:
        """Completions per problem."""
        return self.config.num_samples if decoding == "sampled" else 1

    def labels(self, decoding: str) -> dict[str, Any]:
        """The fields of [`~trl_opsd.evaluate.schema.Labels`]."""
        config = self.config
        return {
            "stage": config.stage,
            "checkpoint": config.model_name_or_path,
            "task": config.task,
            "decoding": decoding,
            "prompt": config.prompt_template or "plain",
        }


def plan(
    config: EvaluateConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Job]:
    """
    Says what there is to do, after checking all that can be checked before a model is loaded.

    Args:
        config ([`EvaluateConfig`]):
            What to evaluate.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model to evaluate as it is, on its own device. Defaults to the checkpoints of the configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. Defaults to the checkpoint's.

    Returns:
        `list[Job]`: Those of one checkpoint after each other.

    Raises:
        ValueError: If something is missing or does not fit.
    """
    if model is not None and config.checkpoints:
        raise UserError("`checkpoints` are loaded from where they are: leave the list out where a model is given.")
    loaded = None if model is None else wrap_model(model, config.model_name_or_path)
    jobs, opened = [], {}
    if config.starts_server:
        check_vllm(
            "`backend: server` without `server_url` starts a server of", ", or give the address of one that runs"
        )
        if PartialState().num_processes > 1:
            raise UserError(
                "A server is started by one process: leave `accelerate launch` out, or use `backend: vllm`."
            )
    is_running = config.server_url is not None
    served = served_model(config.server_url, config.server_model) if is_running else None
    for part in expand(config):
        checkpoint = loaded or open_checkpoint(part.model_name_or_path, part.trust_remote_code, opened)
        dataset, reward_funcs = load_task(part)
        own = tokenizer
        if own is None:
            own = load_tokenizer(part.model_name_or_path, trust_remote_code=part.trust_remote_code)
        jobs.append(Job(part, checkpoint, dataset, reward_funcs, own, served))
    return jobs


def expand(config: EvaluateConfig) -> list[EvaluateConfig]:
    """
    Takes a configuration apart into what there is to do.

    Args:
        config ([`EvaluateConfig`]):
            What to evaluate.

    Returns:
        `list[EvaluateConfig]`: One for each checkpoint, context and task, with all values filled in. Those of one
        checkpoint follow each other.

    Raises:
        ValueError: If two checkpoints have the same label, or a task is none.
    """
    pairs = [(config.stage, config.model_name_or_path)]
    if config.checkpoints:
        # a path may have a `=` of its own, after a slash
        parts = [re.fullmatch(r"(?:([^/=]+)=)?(.+)", checkpoint).groups() for checkpoint in config.checkpoints]
        pairs = [(stage or Path(path).name, path) for stage, path in parts]
        if len({stage for stage, _ in pairs}) < len(pairs):
            raise ValueError(f"`checkpoints` has a label twice ({config.checkpoints}): write each as STAGE=PATH.")
    contexts = [(stage, path, config.prompt_template) for stage, path in pairs]
    prompt_only = (
        len(pairs) > 1 and config.prompt_template is None if config.prompt_only is None else config.prompt_only
    )
    if prompt_only:
        contexts.insert(1, ("prompt-only", pairs[0][1], "concise"))
    runs = []
    for stage, path, template in contexts:
        common = {"checkpoints": None, "prompt_only": False, "prompt_template": template}
        common |= {"model_name_or_path": path, "stage": stage, "tasks": None}
        for name in config.tasks or [None]:
            if name is None:
                runs.append(dataclasses.replace(config, **common, task=config.task or config.dataset_name))
                continue
            name, number = task_name(name)
            label, task = find_task(name)
            own = (config.task_options or {}).get(name, {})
            run = copy.copy(config)
            vars(run).update(own)
            run.fill(task)
            # A number in brackets says more than an option; and the baseline keeps its context
            samples = {} if number is None else {"max_samples": number}
            context = {"prompt_template": template or run.prompt_template}
            changes = {**common, **samples, **context, "dataset_name": name, "task": label, "task_options": None}
            runs.append(dataclasses.replace(run, **changes))
    return runs


def load_task(config: EvaluateConfig) -> tuple[Dataset, list[Callable]]:
    """
    Loads the problems and their verifiers, and checks that they fit each other.

    Args:
        config ([`EvaluateConfig`]):
            What to evaluate on, one task.

    Returns:
        `tuple`: Problems and reward functions.

    Raises:
        ValueError: If a file, a column or a reward function is missing.
    """
    head, _, name = config.dataset_name.partition(":")
    if head == LM_EVAL and name:
        if config.reward_funcs != [LM_EVAL]:
            raise UserError(f"`{config.dataset_name}` is scored by lm-evaluation-harness: leave `reward_funcs` out.")
        dataset, reward_funcs = load_lm_eval(name)
    else:
        reward_funcs = load_reward_funcs(config.reward_funcs)
        dataset = load_prompts(config.dataset_name, config.dataset_split)
    for name, func in zip(config.reward_funcs, reward_funcs, strict=True):
        check_columns(dataset, required_columns(func), f"The verifier `{name}`")
    if config.max_samples is not None:
        dataset = dataset.select(_first(dataset, config.max_samples))
    check_rows(dataset, reward_funcs, config.dataset_name)
    context = config.context()
    if context is not None:
        context.check_columns(dataset.column_names)
    return dataset, reward_funcs


def _first(dataset: Dataset, number: int) -> list[int]:
    """The first rows, equally many of each task where the set is made of several (`Source.tasks`)."""
    parts = dataset["task"] if "task" in dataset.column_names else [None] * len(dataset)
    seen, ranks = Counter(), []
    for index, part in enumerate(parts):
        ranks.append((seen[part], index))
        seen[part] += 1
    return sorted(index for _, index in sorted(ranks)[:number])


def problem_ids(dataset: Dataset) -> list[str]:
    """
    Returns a name for each problem that is the same wherever the problem is: a hash of its prompt and reference
    answer. The second of two problems that are the same is told apart by a number, and counts.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems.

    Returns:
        `list[str]`: Names, all different.
    """
    seen, names = Counter(), []
    for row in dataset:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = [_in_one_order(turn) for turn in prompt]
        parts = [prompt, row.get("answer"), row.get("tests"), row.get("instructions"), row.get("metadata")]
        name = hashlib.sha256(json.dumps(parts, ensure_ascii=False, default=str).encode()).hexdigest()[:12]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _in_one_order(turn: dict[str, Any]) -> dict[str, Any]:
    """A message's keys are in the order of the file, or with datasets 4 of the alphabet, and those of other rows are `None`."""
    others = {name: value for name, value in sorted(turn.items()) if value is not None}
    return {"role": turn["role"], "content": turn["content"]} | others


def eos_token_ids(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Returns every token that ends a completion, for the model (generation config) or for the tokenizer: where chat and
    base model disagree and only one is listened to, completions run on to the limit.

    Args:
        generation_config ([`~transformers.GenerationConfig`]):
            Generation config of the checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        `list[int]`: Token ids.

    Raises:
        ValueError: If neither declares one.
    """
    declared = generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    if not ids:
        raise ValueError("Neither the generation config nor the tokenizer has an `eos_token_id`: set one of them.")
    return sorted(ids)
