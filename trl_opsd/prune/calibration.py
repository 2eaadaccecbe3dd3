"""Rollouts of the model that is to be pruned: taken from where they are kept, or generated."""

from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import check_fit, check_texts, load_prompts, write_rows
from ..decoding import generate
from ..rlvr.bank import read_rollouts
from ..rlvr.identity import check_vocabulary
from .config import PruneConfig
from .importance import Rollout


def load_calibration(config: PruneConfig) -> Dataset:
    """
    Loads the rows of which some are calibrated on.

    Args:
        config ([`PruneConfig`]):
            Where they are.

    Returns:
        [`~datasets.Dataset`]: Rows with `prompt`, with `completion` if they are rollouts, and with `completion_ids` if
            they are those of a bank, which says in whose ids.

    Raises:
        ValueError: If there is nothing to read, or the column `prompt` is missing.
    """
    name = config.calibration_dataset
    is_bank = (Path(name) / "rollouts").is_dir()
    dataset = read_rollouts(name) if is_bank else load_prompts(name, "train")
    if not is_bank and "completion_ids" in dataset.column_names:
        dataset = dataset.remove_columns("completion_ids")
    return dataset


def choose_rows(config: PruneConfig, dataset: Dataset) -> Dataset:
    """Takes the `calibration_samples` rows that are calibrated on, by the seed."""
    return dataset.shuffle(seed=config.seed).select(range(min(config.calibration_samples, len(dataset))))


def check_rows(config: PruneConfig, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that a tokenizer can write the prompts, and the completions where they are texts.

    Args:
        config ([`PruneConfig`]):
            Where they are.
        dataset ([`~datasets.Dataset`]):
            Rows from [`load_calibration`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.

    Raises:
        UserError: As of [`~trl_opsd.data.check_fit`].
        ValueError: If the rows have ids of another tokenizer.
    """
    if "completion_ids" in dataset.column_names:
        check_vocabulary(config.calibration_dataset, config.model_name_or_path, tokenizer)
    check_fit(dataset, config.calibration_dataset, tokenizer, None, config.max_completion_length)
    if "completion" in dataset.column_names and "completion_ids" not in dataset.column_names:
        check_texts(_texts(dataset), config.calibration_dataset, "completion", tokenizer)


def make_rollouts(
    config: PruneConfig, dataset: Dataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Rollout]:
    """
    Tokenises rollouts, or samples them from the model at temperature 1 where there are only prompts.

    Args:
        config ([`PruneConfig`]):
            How to generate.
        dataset ([`~datasets.Dataset`]):
            Rows from [`choose_rows`].
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        `list[Rollout]`: Rollouts.
    """
    prompt_ids = write_rows(dataset["prompt"], config.calibration_dataset, tokenizer)
    if "completion_ids" in dataset.column_names:
        completion_ids = list(dataset["completion_ids"])
    elif "completion" in dataset.column_names:
        texts = _texts(dataset)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        completion_ids = [ids + end for ids in tokenizer(text=texts, add_special_tokens=False)["input_ids"]]
    else:
        completion_ids = _generate(config, model, tokenizer, prompt_ids)
    return [Rollout(*ids) for ids in zip(prompt_ids, completion_ids, strict=True)]


def _texts(dataset: Dataset) -> list[str]:
    """The completions."""
    return [text if isinstance(text, str) else text[-1]["content"] for text in dataset["completion"]]


@torch.no_grad()
def _generate(
    config: PruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]]
) -> list[list[int]]:
    """Samples a completion of each prompt."""
    declared = model.generation_config.eos_token_id
    eos_ids = sorted({tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None})
    # What is left out here is taken from the checkpoint's generation config, so what decides the tokens is not.
    generation_config = GenerationConfig(
        max_new_tokens=config.max_completion_length,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        eos_token_id=eos_ids or None,
        pad_token_id=0,  # masked in front, cut off behind
    )
    completions = []
    torch.manual_seed(config.seed)
    for start in range(0, len(prompt_ids), config.batch_size):
        ids = [torch.tensor(row) for row in prompt_ids[start : start + config.batch_size]]
        columns = (ids, [torch.ones_like(row) for row in ids])
        input_ids, attention_mask = (
            pad_sequence(column, batch_first=True, padding_side="left").to(model.device) for column in columns
        )
        batch = generate(
            model, input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config
        )[:, input_ids.size(1) :]
        for row in batch.tolist():
            ends = [position for position, token in enumerate(row) if token in eos_ids]
            completions.append(row[: ends[0] + 1] if ends else row)
    return completions
