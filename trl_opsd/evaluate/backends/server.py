"""A running vLLM server."""

import json
import threading
import uuid
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import requests

from ...cli import UserError
from .engine import Request, Sampling


_TIMEOUT = (10, 600)  # seconds to connect, and between two pieces of an answer


def served_model(url: str, model: str | None = None) -> dict[str, Any]:
    """
    Asks a server what it has.

    Args:
        url (`str`):
            Address, for instance `http://localhost:8000`.
        model (`str`, *optional*):
            Name of the model, or of the adapter, there. Defaults to the only one that the server lists.

    Returns:
        `dict[str, Any]`: `url` and `id`, and where the server tells them `root` and `parent` (the weights behind the
        name) and `max_model_len`.

    Raises:
        UserError: If there is no server, or it lists several models and none is named.
    """
    url = url.rstrip("/").removesuffix("/v1")
    listed = {entry["id"]: entry for entry in _ask(url, "GET", "/v1/models").json()["data"]}
    if model is None and len(listed) != 1:
        raise UserError(f"The server at {url} lists {', '.join(listed)}: name one with `server_model`.")
    model = model or next(iter(listed))
    if model not in listed:
        raise UserError(f"The server at {url} has no model `{model}`: it lists {', '.join(listed)}.")
    told = listed[model]
    return {"url": url, "id": model} | {
        name: told[name] for name in ("root", "parent", "max_model_len") if name in told
    }


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

    def __init__(self, url: str, model: str | None, concurrency: int):
        served = served_model(url, model)
        self.url, self.model, self.concurrency = served["url"], served["id"], concurrency

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
        salt = uuid.uuid4().hex  # what was cached without it is not found

        def answer(index: int) -> None:
            with lock:
                on_start(index)
            for _ in self._stream(requests[index], sampling, cache_salt=salt):
                with lock:
                    on_token(index)

        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(answer, range(len(requests))))

    def reset_peak_memory(self) -> None:
        pass

    def peak_memory(self) -> None:
        return None  # it is not on this machine, for all that is known

    def close(self) -> None:
        pass

    def _stream(self, request: Request, sampling: Sampling, **extra: Any) -> Iterator[int]:
        # All that decides the tokens: what is left out, the server may take from the checkpoint's generation config
        body = {
            "model": self.model,
            "prompt": request.prompt_ids,
            "max_tokens": sampling.limit(request),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "seed": request.seed,
            "stop_token_ids": list(sampling.eos_ids),
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "stream": True,
            "return_token_ids": True,
            **extra,
        }
        reason = None
        with _ask(self.url, "POST", "/v1/completions", json=body, stream=True) as response:
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


def _ask(url: str, method: str, path: str, **kwargs) -> requests.Response:
    try:
        response = requests.request(method, url + path, timeout=_TIMEOUT, **kwargs)
    except requests.RequestException as error:
        raise UserError(
            f"There is no server at {url} ({type(error).__name__}): start it, or correct `server_url`."
        ) from None
    if not response.ok:
        raise UserError(f"The server at {url} refuses a request ({response.status_code}): {response.text:.300}")
    return response
