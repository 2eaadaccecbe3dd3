"""A running vLLM server."""

import json
import threading
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import requests

from ...cli import UserError
from .engine import Request, Sampling


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

    Attributes:
        served (`dict[str, Any]`):
            What the server says of the model, as far as it decides what is generated: `url`, `id`, and `root` and
            `parent` (the weights behind the name) where the server tells them.

    Raises:
        UserError: If there is no server, or it lists several models and none is named.
    """

    _TIMEOUT = (10, 600)  # seconds to connect, and between two pieces of an answer

    def __init__(self, url: str, model: str | None, concurrency: int):
        self.url, self.concurrency = url.rstrip("/").removesuffix("/v1"), concurrency
        listed = {entry["id"]: entry for entry in self._ask("GET", "/v1/models").json()["data"]}
        if model is None and len(listed) != 1:
            raise UserError(f"The server at {self.url} lists {', '.join(listed)}: name one with `server_model`.")
        self.model = model or next(iter(listed))
        if self.model not in listed:
            raise UserError(f"The server at {self.url} has no model `{model}`: it lists {', '.join(listed)}.")
        told = {name: listed[self.model][name] for name in ("root", "parent") if name in listed[self.model]}
        self.served = {"url": self.url, "id": self.model, **told}

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
