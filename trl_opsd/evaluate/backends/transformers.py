"""A model in this process, through transformers."""

import gc
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ...decoding import generate
from ..checkpoint import load_weights
from ..config import EvaluateConfig
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
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return load_weights(
        config.model_name_or_path,
        dtype=config.dtype,
        device_map={"": config.device or str(accelerator)},
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
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int | None, batch_size: int):
        self.model, self.pad_token_id, self.batch_size = model, pad_token_id, batch_size

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids), reverse=True)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            missing = [index for index in indices if index not in done]
            if missing:  # then the whole batch, because its rows share their random numbers
                batch = self._batch([requests[index] for index in indices], sampling)
                yield from ((index, ids) for index, ids in zip(indices, batch, strict=True) if index not in done)

    def serve(self, requests, sampling, concurrency, on_start, on_token) -> None:
        for start in range(0, len(requests), concurrency):
            indices = list(range(start, min(start + concurrency, len(requests))))
            for index in indices:
                on_start(index)
            streamer = _Steps(indices, sampling.eos_ids, on_token)
            self._batch([requests[index] for index in indices], sampling, streamer=streamer)

    def close(self) -> None:
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batch(self, batch: list[Request], sampling: Sampling, **kwargs) -> list[list[int]]:
        pad_id = sampling.eos_ids[0] if self.pad_token_id is None else self.pad_token_id
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        # What is left out here is taken from the checkpoint's generation config, so what decides the tokens is not.
        generation_config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=sampling.temperature > 0,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(sampling.eos_ids),
            pad_token_id=pad_id,
            **(drawn if sampling.temperature > 0 else {}),
        )
        device = self.model.device
        width = max(len(request.prompt_ids) for request in batch)
        input_ids = torch.full((len(batch), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention_mask[row, width - len(request.prompt_ids) :] = 1
        training = self.model.training
        self.model.eval()
        # the caller's random numbers go on as if nothing had been drawn
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch[0].seed)
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
        return [ids[:length] for ids, length in zip(completion.tolist(), lengths, strict=True)]
