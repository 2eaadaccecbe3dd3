"""A model in this process, through transformers."""

import gc
import itertools
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from ...decoding import RowProcessor, generate
from ..checkpoint import load_weights
from ..config import EvaluateConfig
from ..memory import peak_memory, reset_peak_memory
from ..thinking import fewest
from .engine import Request, Sampling


def load_model(config: EvaluateConfig) -> PreTrainedModel:
    """
    Loads the checkpoint, with its adapter where it is one.

    Args:
        config ([`EvaluateConfig`]):
            Where it is, its precision and its device.

    Returns:
        [`~transformers.PreTrainedModel`]: Model on its device.

    Raises:
        UserError: If the weights cannot be read, or are not those of the model.
    """
    device = config.device or "cpu"
    if config.device is None and torch.accelerator.is_available():
        # of several processes each has its own
        device = f"{torch.accelerator.current_accelerator()}:{torch.accelerator.current_device_index()}"
    return load_weights(
        config.model_name_or_path,
        dtype=config.dtype,
        device_map={"": device},
        trust_remote_code=config.trust_remote_code,
    )


class _Steps(BaseStreamer):
    """Tells of every row of a batch when a token of it is there, until the one that ends it."""

    def __init__(self, indices: list[int], eos_ids: Sequence[int], on_token: Callable[[int], None]):
        self.open, self.eos_ids, self.on_token = dict(enumerate(indices)), eos_ids, on_token
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:  # generate() hands over the prompt first
            self.prompt = False
            return
        tokens = value.tolist()
        for row, index in list(self.open.items()):
            self.on_token(index)
            if tokens[row] in self.eos_ids:
                del self.open[row]

    def end(self) -> None:
        pass


class _Draw(RowProcessor):
    """
    Draws the next token of every row by random numbers of that row alone, and leaves nothing else to choose from, so that
    a completion does not depend on those beside it. (`do_sample` draws all rows from one stream.)
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.cat([torch.rand(1, generator=stream) for stream in self.streams]).to(self.device)
        # below the sum of all by more than rounding, so that no token of no probability comes last
        target = drawn.unsqueeze(1) * cumulative[:, -1:] * (1 - 1e-6)
        token = torch.searchsorted(cumulative, target, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    def keep(self, rows: torch.LongTensor) -> None:
        self.streams = [self.streams[row] for row in rows.tolist()]


class _StopTexts(StoppingCriteria):
    """
    Ends the rows whose completion has one of the texts. (`stop_strings` takes the vocabulary apart, which fails for some
    tokenizers.)
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, width: int):
        self.stop, self.tokenizer, self.width = stop, tokenizer, width
        self.tail = 16 + max(len(mark.encode()) for mark in stop)  # a token has at least a byte

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        ends = input_ids[:, max(self.width, input_ids.size(1) - self.tail) :].tolist()
        texts = self.tokenizer.batch_decode(ends, skip_special_tokens=True)
        has_stopped = [any(mark in text for mark in self.stop) for text in texts]
        return torch.tensor(has_stopped, device=input_ids.device)


class TransformersEngine:
    """
    A model in this process, in batches of prompts of similar length, the longest first. A batch lasts as long as its
    longest completion, with fewer and fewer rows; concurrency is the size of the batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, on its device.
        pad_token_id (`int`):
            Token to pad with.
        batch_size (`int`):
            Number of completions generated at a time.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer, which only `stop` needs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pad_token_id: int | None,
        batch_size: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model, self.pad_token_id, self.batch_size = model, pad_token_id, batch_size
        self.tokenizer = tokenizer

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        missing = [index for index in range(len(requests)) if index not in done]

        def room(index: int) -> int:
            return sampling.limit(requests[index])

        missing.sort(key=lambda index: (room(index), -len(requests[index].prompt_ids)))
        for _, alike in itertools.groupby(missing, key=room):  # a batch has one limit
            alike = list(alike)
            for start in range(0, len(alike), self.batch_size):
                indices = alike[start : start + self.batch_size]
                batch = self._batch([requests[index] for index in indices], sampling)
                yield from zip(indices, batch, strict=True)

    def serve(self, requests, sampling, concurrency, on_start, on_token) -> None:
        for start in range(0, len(requests), concurrency):
            indices = list(range(start, min(start + concurrency, len(requests))))
            for index in indices:
                on_start(index)
            streamer = _Steps(indices, sampling.eos_ids, on_token)
            self._batch([requests[index] for index in indices], sampling, streamer=streamer)

    def reset_peak_memory(self) -> None:
        reset_peak_memory()

    def peak_memory(self) -> int:
        return peak_memory()

    def close(self) -> None:
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batch(self, batch: list[Request], sampling: Sampling, **kwargs) -> list[list[int]]:
        pad_id = sampling.eos_ids[0] if self.pad_token_id is None else self.pad_token_id
        # What is left out here is taken from the checkpoint's generation config, so what decides the tokens is not.
        generation_config = GenerationConfig(
            max_new_tokens=min(map(sampling.limit, batch)),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(sampling.eos_ids),
            pad_token_id=pad_id,
        )
        device = self.model.device
        width = max(len(request.prompt_ids) for request in batch)
        input_ids = torch.full((len(batch), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention_mask[row, width - len(request.prompt_ids) :] = 1
        if sampling.stop:
            kwargs["stopping_criteria"] = StoppingCriteriaList([_StopTexts(sampling.stop, self.tokenizer, width)])
        if sampling.temperature > 0:
            chosen = [TemperatureLogitsWarper(sampling.temperature)]
            chosen += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p > 0 else []
            chosen += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
            chosen += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
            kwargs["logits_processor"] = LogitsProcessorList(
                [*chosen, _Draw([request.seed for request in batch], device)]
            )
        training = self.model.training
        self.model.eval()
        completion = generate(
            self.model,
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=generation_config,
            **kwargs,
        )[:, width:]
        self.model.train(training)
        ended = torch.isin(completion, torch.tensor(sampling.eos_ids, device=device))
        lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, completion.size(1)).tolist()
        found = [ids[:length] for ids, length in zip(completion.tolist(), lengths, strict=True)]
        return [self._until_stop(ids, sampling.stop) for ids in found] if sampling.stop else found

    def _until_stop(self, ids: list[int], stop: Sequence[str]) -> list[int]:
        """Takes away the padding behind a text that ends a completion, which is no end token."""

        def has_stopped(part: Sequence[int]) -> bool:
            text = self.tokenizer.decode(part, skip_special_tokens=True)
            return any(mark in text for mark in stop)

        return ids[: fewest(ids, has_stopped)] if has_stopped(ids) else ids
