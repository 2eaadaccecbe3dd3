"""Generates, verifies and counts: one row of results per way of decoding."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..cli import UserError
from ..data import check_columns, load_prompts
from ..results import write_text
from ..rewards import load_reward_funcs, math_reward, required_columns
from .config import EvaluateConfig


def evaluate(
    config: EvaluateConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Measures the accuracy and the tokens of a checkpoint.

    Args:
        config ([`EvaluateConfig`]):
            What to measure and how.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model to measure as it is, on its own device. Defaults to the checkpoint at `config.model_name_or_path`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. Defaults to the checkpoint's.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total. Defaults to a progress bar.

    Returns:
        `list[dict]`: One row per entry of `config.decoding`: labels (`stage`, `checkpoint`, `task`, `decoding`,
        `prompt`, `seed`, `temperature`), `n` (problems counted) and `unverified` (problems that a verifier could not
        judge, which nothing else counts), `accuracy` with its 95% interval `accuracy_low` to `accuracy_high`,
        `accuracy_flexible` (the answer accepted elsewhere than where the prompt asked for it; `None` for other than
        math tasks), `mean_tokens`, `median_tokens`, `p90_tokens` and `p99_tokens` (completion tokens with the one
        that ends it), `truncated` (share of completions that did not end), `parameters`, and `wall_s` (seconds of
        generating and verifying).

    Raises:
        ValueError: If the data, the verifiers or the tokenizer do not fit, before a model is loaded.
    """
    dataset, reward_funcs = load_task(config)
    tokenizer = load_tokenizer(config, dataset) if tokenizer is None else tokenizer
    model = load_model(config) if model is None else model
    return measure(config, dataset, reward_funcs, model, tokenizer, progress)


def load_task(config: EvaluateConfig) -> tuple[Dataset, list[Callable]]:
    """
    Loads the problems and their verifiers, and checks that they fit each other.

    Args:
        config ([`EvaluateConfig`]):
            What to measure.

    Returns:
        `tuple`: Problems, with each prompt in the context of `config.prompt_template`, and reward functions.

    Raises:
        ValueError: If a file, a column or a reward function is missing.
    """
    reward_funcs = load_reward_funcs(config.reward_funcs)
    dataset = load_prompts(config.dataset_name, config.dataset_split)
    for name, func in zip(config.reward_funcs, reward_funcs, strict=True):
        check_columns(dataset, required_columns(func), f"The verifier `{name}`")
    if config.max_samples is not None:
        dataset = dataset.select(range(min(config.max_samples, len(dataset))))
    context = config.context()
    if context is not None:
        context.check_columns(dataset.column_names)
        dataset = Dataset.from_list([{**row, "prompt": context.prompt(row)} for row in dataset])
    return dataset, reward_funcs


def load_tokenizer(config: EvaluateConfig, dataset: Dataset) -> PreTrainedTokenizerBase:
    """
    Loads the tokenizer of the checkpoint and checks that it can write the prompts.

    Args:
        config ([`EvaluateConfig`]):
            Where the checkpoint is.
        dataset ([`~datasets.Dataset`]):
            Problems.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: Tokenizer.

    Raises:
        UserError: If there is none, or it has no chat template and the prompts need one.
    """
    path = config.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` has no tokenizer that can be loaded ({str(error).splitlines()[0]}).") from None
    if not isinstance(dataset[0]["prompt"], str) and tokenizer.chat_template is None:
        raise UserError(
            f"The prompts are conversations, and the tokenizer of `{path}` has no chat template: add one to the "
            "checkpoint, or use prompts that are plain strings."
        )
    return tokenizer


def load_model(config: EvaluateConfig) -> PreTrainedModel:
    """
    Loads the checkpoint.

    Args:
        config ([`EvaluateConfig`]):
            Where it is, its precision and its device.

    Returns:
        [`~transformers.PreTrainedModel`]: Model on its device.
    """
    model = AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(config.device or accelerator)


def measure(
    config: EvaluateConfig,
    dataset: Dataset,
    reward_funcs: list[Callable],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Measures a loaded model on loaded problems; see [`evaluate`] for what comes out.

    Args:
        config ([`EvaluateConfig`]):
            How to decode, and the labels.
        dataset ([`~datasets.Dataset`]):
            Problems, from [`load_task`].
        reward_funcs (`list[Callable]`):
            Verifiers, from [`load_task`].
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of completions done and their total.

    Returns:
        `list[dict]`: One row per way of decoding.
    """
    prompt_ids = tokenize(dataset["prompt"], tokenizer, config.chat_template_kwargs)
    eos_ids = eos_token_ids(model, tokenizer)
    rows, records = [], []
    done, total = 0, len(config.decoding) * len(dataset)
    training = model.training
    model.eval()
    cuda = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=total, unit="completion", desc="evaluate", disable=progress is not None)
    with bar, torch.random.fork_rng(cuda):  # the caller's random numbers go on as if nothing had been drawn
        for decoding in config.decoding:
            start = time.perf_counter()
            completions: list[list[int]] = [[]] * len(dataset)
            for indices, batch in generate(config, decoding, model, tokenizer, prompt_ids, eos_ids):
                for index, ids in zip(indices, batch, strict=True):
                    completions[index] = ids
                done += len(batch)
                bar.update(len(batch))
                if progress is not None:
                    progress(done, total)
            samples = verify(dataset, reward_funcs, completions, tokenizer, eos_ids)
            labels = {
                "stage": config.stage,
                "checkpoint": config.model_name_or_path,
                "task": config.task or config.dataset_name,
                "decoding": decoding,
                "prompt": config.prompt_template or "plain",
            }
            rows.append(
                {
                    **labels,
                    **summarize(samples),
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "wall_s": round(time.perf_counter() - start, 3),
                    "seed": config.seed,
                    "temperature": config.temperature if decoding == "sampled" else 0.0,
                }
            )
            records += [{**labels, **sample} for sample in samples]
    model.train(training)
    if config.save_completions:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(Path(config.output).with_suffix(".completions.jsonl"), lines)
    return rows


def tokenize(
    prompts: list, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Returns the token ids of prompts, up to where the completion starts: the same ids that TRL's trainers roll out from.

    Args:
        prompts (`list[list[dict]]` or `list[str]`):
            Prompts, conversational or plain.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the chat template.

    Returns:
        `list[list[int]]`: Token ids, not padded.
    """
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Returns every token that ends a completion, for the model (generation config) or for the tokenizer: where chat and
    base model disagree and only one is listened to, completions run on to the limit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        `list[int]`: Token ids.

    Raises:
        ValueError: If neither declares one.
    """
    declared = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    if not ids:
        raise ValueError("Neither the generation config nor the tokenizer has an `eos_token_id`: set one of them.")
    return sorted(ids)


def generate(
    config: EvaluateConfig,
    decoding: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    eos_ids: list[int],
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """
    Generates one completion per prompt, in batches of prompts of similar length, the longest first.

    Args:
        config ([`EvaluateConfig`]):
            Sampling parameters, batch size and seed.
        decoding (`str`):
            `"greedy"` or `"sampled"`.
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompt_ids (`list[list[int]]`):
            Token ids of the prompts.
        eos_ids (`list[int]`):
            Tokens that end a completion.

    Yields:
        `tuple`: Positions of a batch in `prompt_ids`, and the token ids of their completions, each up to and including
        the token that ends it.
    """
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampled = decoding == "sampled"
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k} if sampled else {}
    # What is left out here is taken from the checkpoint's generation config, so what decides the tokens is not.
    generation_config = GenerationConfig(
        max_new_tokens=config.max_completion_length,
        do_sample=sampled,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        **sampling,
    )
    ends = torch.tensor(eos_ids, device=model.device)
    order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]), reverse=True)
    torch.manual_seed(config.seed)
    for start in range(0, len(order), config.batch_size):
        indices = order[start : start + config.batch_size]
        width = len(prompt_ids[indices[0]])
        input_ids = torch.full((len(indices), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            length = len(prompt_ids[index])
            input_ids[row, width - length :] = torch.tensor(prompt_ids[index])
            attention_mask[row, width - length :] = 1
        completion = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=generation_config,
        )[:, width:]
        ended = torch.isin(completion, ends)
        lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, completion.size(1)).tolist()
        yield indices, [ids[:length] for ids, length in zip(completion.tolist(), lengths, strict=True)]


def verify(
    dataset: Dataset,
    reward_funcs: list[Callable],
    completion_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: list[int],
) -> list[dict[str, Any]]:
    """
    Decides for each completion whether it is correct.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems.
        reward_funcs (`list[Callable]`):
            Verifiers; each must score a completion at least 1.0.
        completion_ids (`list[list[int]]`):
            Token ids of the completions, in the order of the problems.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        eos_ids (`list[int]`):
            Tokens that end a completion.

    Returns:
        `list[dict]`: Per problem its `id` (position in the data set), `completion`, `tokens`, `truncated`, `correct`
        and `correct_flexible`, the last two `None` where no verdict is possible.
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    columns = {
        name: list(dataset[name]) for name in dataset.column_names if name not in ("completion", "completion_ids")
    }
    prompts = columns.pop("prompt")
    completions = texts
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    scores = [
        func(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        for func in reward_funcs
    ]
    flexible = [None] * len(texts)
    if math_reward in reward_funcs:
        flexible = math_reward(texts, answer=columns["answer"], flexible=True)
    samples = []
    for index, (text, ids, verdicts) in enumerate(zip(texts, completion_ids, zip(*scores, strict=True), strict=True)):
        truncated = ids[-1] not in eos_ids
        unknown = any(verdict is None for verdict in verdicts)
        samples.append(
            {
                "id": index,
                "completion": text,
                "tokens": len(ids),
                "truncated": truncated,
                "correct": None if unknown else not truncated and all(verdict >= 1 for verdict in verdicts),
                "correct_flexible": None if flexible[index] is None else not truncated and flexible[index] >= 1,
            }
        )
    return samples


def summarize(samples: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """
    Turns verdicts into numbers. Problems without a verdict are counted in `unverified` and in nothing else.

    Args:
        samples (`list[dict]`):
            What [`verify`] returns.

    Returns:
        `dict`: The counts, shares and token statistics of a row of results.

    Raises:
        ValueError: If there is no verdict at all.
    """
    judged = [sample for sample in samples if sample["correct"] is not None]
    if not judged:
        raise ValueError(f"None of the {len(samples)} problems can be verified: check the `answer` column.")
    n = len(judged)
    correct = sum(sample["correct"] for sample in judged)
    low, high = wilson_interval(correct, n)
    flexible = [sample["correct_flexible"] for sample in judged if sample["correct_flexible"] is not None]
    tokens = np.array([sample["tokens"] for sample in judged])
    median, p90, p99 = np.percentile(tokens, [50, 90, 99]).tolist()
    return {
        "n": n,
        "unverified": len(samples) - n,
        "accuracy": correct / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_flexible": sum(flexible) / len(flexible) if flexible else None,
        "mean_tokens": tokens.mean().item(),
        "median_tokens": median,
        "p90_tokens": p90,
        "p99_tokens": p99,
        "truncated": sum(sample["truncated"] for sample in judged) / n,
    }


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """
    Returns the 95% Wilson score interval of a share, which unlike the normal approximation stays inside 0 to 1 and
    keeps a width when all or none are correct.

    Args:
        correct (`int`):
            Number of successes.
        n (`int`):
            Number of trials, at least 1.

    Returns:
        `tuple[float, float]`: Lower and upper bound.
    """
    z = 1.959963984540054  # 97.5% quantile of the standard normal distribution
    share = correct / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, center - margin), min(1.0, center + margin)
