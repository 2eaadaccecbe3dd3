"""
Generation that stops paying for finished rows.

`generate` of transformers computes every row of a batch until the longest one ends. Where a few are much longer than the rest,
as rollouts are, most of that is thrown away. The loop here takes finished rows out of the cache, and is handed to `generate` as
its `custom_generate`, so that everything around it stays transformers'.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed
from accelerate.utils import is_peft_model
from transformers import (
    Cache,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module


# Share of the rows computed that must have ended before they are taken out: doing so copies the cache
DROPPED_SHARE = 0.25
# What looks at each row by itself and keeps nothing from one token to the next. Others may count on rows staying in place
BY_ROW = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
ENDS = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)


class RowProcessor(LogitsProcessor):
    """A processor that keeps something for each row, and so is told which rows stay."""

    def keep(self, rows: torch.LongTensor) -> None:
        """
        Forgets the other rows.

        Args:
            rows (`torch.LongTensor`):
                Positions of those that stay, in their order.
        """
        raise NotImplementedError


def generate(model: PreTrainedModel, **kwargs: Any) -> torch.LongTensor:
    """
    `model.generate`, without paying for finished rows where [`can_call`] and [`can_drop`] allow it. The tokens are the same,
    sampled or not, as far as rounding goes: a row draws the random numbers that it would have drawn among all.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
        kwargs:
            As `model.generate` takes them.

    Returns:
        `torch.LongTensor`: What `model.generate` returns.
    """
    with finished_rows_dropped(model):
        return model.generate(**kwargs)


@contextmanager
def finished_rows_dropped(model: PreTrainedModel) -> Iterator[None]:
    """
    Inside, `model.generate` is as [`generate`], for callers that cannot be told otherwise. A model that has a `generate` of its
    own keeps it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model, not wrapped for distributed training.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    if "generate" in vars(base) or type(base).generate is not GenerationMixin.generate or _keeps_step(model):
        yield  # one of its own, as code on the Hub brings, does as it likes, and sharding wraps what it finds
        return
    model.generate = partial(_generate, model, model.generate)
    try:
        yield
    finally:
        del model.generate


def never_empty(completion_ids: list[list[int]], end: int) -> list[list[int]]:
    """
    Completions of an engine that may write nothing at all, which TRL's trainers do not count with.

    Args:
        completion_ids (`list[list[int]]`):
            Token ids of each.
        end (`int`):
            Token that ends a completion.

    Returns:
        `list[list[int]]`: The same, with one that has come to its end in the place of each that is empty.
    """
    return [ids or [end] for ids in completion_ids]


def _generate(model, method, *args, **kwargs):
    if not args and can_call(model, **kwargs):
        kwargs["custom_generate"] = decode
    return method(*args, **kwargs)


def _keeps_step(model: PreTrainedModel) -> bool:
    """Whether other processes have to compute as many tokens, because each holds a part of the weights."""
    is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return is_sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def can_call(model: PreTrainedModel, generation_config: GenerationConfig | None = None, **kwargs: Any) -> bool:
    """
    Whether a call of `generate` is one that [`decode`] understands: a text model, greedy decoding or sampling of token ids
    with nothing else to look at (images, a streamer, an assistant, ...), and no other process that has to keep step, as under
    FSDP and ZeRO-3.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            As `generate` takes it.
        kwargs:
            The other arguments of `generate`.

    Returns:
        `bool`: Whether it is.
    """
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True) is not model.config:
        return False
    if _keeps_step(model):
        return False
    generation_config, others = model._prepare_generation_config(generation_config, **kwargs)
    if not others.keys() <= {"input_ids", "attention_mask", "logits_processor", "stopping_criteria"}:
        return False
    return generation_config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def can_drop(
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> bool:
    """
    Whether rows can leave the batch on the way. All of it holds for an ordinary decoder and what it is sampled with:

    - the cache has full attention in every layer and lies on the model's device: no sliding window, no recurrent state, nothing
      static, quantised or offloaded;
    - what else the model is given is a number, or has a value for each token, as mask and positions have;
    - what changes the logits is one of `BY_ROW`, or a [`RowProcessor`], and what ends a row one of `ENDS`, an end-of-sequence token among them;
    - tokens alone are asked for.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts.
        logits_processor ([`~transformers.LogitsProcessorList`]):
            What changes the logits.
        stopping_criteria ([`~transformers.StoppingCriteriaList`]):
            What ends a row.
        generation_config ([`~transformers.GenerationConfig`]):
            Configuration, prepared.
        model_kwargs (`dict[str, Any]`):
            What the model is given beside the tokens.

    Returns:
        `bool`: Whether they can.
    """
    cache = _cache_of(model_kwargs)
    return (
        type(cache) is DynamicCache
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and not cache.offloading
        and cache.get_seq_length() == 0
        and all(value.shape == input_ids.shape for value in model_kwargs.values() if isinstance(value, torch.Tensor))
        and all(type(item) in BY_ROW or isinstance(item, RowProcessor) for item in logits_processor)
        and all(type(criterion) in ENDS for criterion in stopping_criteria)
        and any(type(criterion) is EosTokenCriteria for criterion in stopping_criteria)
        and not generation_config.return_dict_in_generate
        and not (generation_config.output_attentions or generation_config.output_hidden_states)
    )


def decode(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """
    Decoding loop for `generate(custom_generate=...)`, which takes rows out of the cache when `DROPPED_SHARE` of those that
    are computed have ended. Where [`can_drop`] does not allow it, it is transformers' own loop.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        input_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts, padded on the left.
        logits_processor ([`~transformers.LogitsProcessorList`]):
            What changes the logits.
        stopping_criteria ([`~transformers.StoppingCriteriaList`]):
            What ends a row.
        generation_config ([`~transformers.GenerationConfig`]):
            Configuration, prepared.
        model_kwargs (`dict[str, Any]`):
            What the model is given beside the tokens, the cache among it.

    Returns:
        `torch.LongTensor` of shape `(B, P + C)`: Prompts and completions, padded on the right.
    """
    is_adapted = "prepare_inputs_for_generation" in vars(
        model
    )  # by PEFT, whose learned prompts come into the cache there
    if is_adapted or not can_drop(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
    by_token = [name for name, value in model_kwargs.items() if isinstance(value, torch.Tensor)]
    pad_id = generation_config._pad_token_tensor
    num_rows = len(input_ids)
    rows = torch.arange(num_rows, device=input_ids.device)  # of the batch: those that are still computed
    running = torch.ones_like(rows, dtype=torch.bool)
    ended = []  # rows that were taken out, and their tokens
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    with model._optimize_model_for_decode():
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            # A copy, so that the logits of a whole prompt do not stay
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            del outputs
            scores = logits_processor(input_ids, logits)
            tokens = _sample(scores, rows, num_rows) if generation_config.do_sample else scores.argmax(dim=-1)
            tokens = torch.where(running, tokens, pad_id)
            input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], dim=1)
            running = running & ~stopping_criteria(input_ids, None)
            num_running = int(running.sum())
            if num_running == 0:
                break
            if num_running <= (1 - DROPPED_SHARE) * len(rows):
                ended.append((rows[~running], input_ids[~running]))
                kept = running.nonzero().squeeze(1)
                rows, input_ids, running = rows[kept], input_ids[kept], running[kept]
                _cache_of(model_kwargs).batch_select_indices(kept)
                for processor in logits_processor:
                    if isinstance(processor, RowProcessor):
                        processor.keep(kept)
                for name in by_token:
                    model_kwargs[name] = model_kwargs[name][kept]
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
    sequences = input_ids.new_full((num_rows, input_ids.size(1)), pad_id.item())
    for indices, ids in [*ended, (rows, input_ids)]:
        sequences[indices, : ids.size(1)] = ids
    return sequences


def _cache_of(model_kwargs: dict[str, Any]) -> Cache | None:
    # By what it is: `past_key_values` until transformers 5.23, `cache` from 5.24 on
    return next((value for value in model_kwargs.values() if isinstance(value, Cache)), None)


def _sample(scores: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A token for each of some rows of a batch, `(rows,)`: the one that it would draw if all of them were there."""
    probabilities = scores.softmax(dim=-1)
    if len(rows) == num_rows:
        return torch.multinomial(probabilities, num_samples=1).squeeze(1)
    # What `multinomial` does: the first of V exponential clocks to ring, each as fast as its token is likely
    clocks = probabilities.new_empty(num_rows, probabilities.size(1)).exponential_()
    return (probabilities / clocks[rows]).argmax(dim=-1)
