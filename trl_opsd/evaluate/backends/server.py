"""A running server with OpenAI's API: vLLM's, by token ids, or any other, by messages."""

import os
import threading
import uuid
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ...cli import UserError
from ..thinking import ThinkingTags, is_opened
from .engine import Request, Sampling


if TYPE_CHECKING:
    import openai

_RETRIES = 5  # of a request that is refused for now, or cannot be sent; the waits double
_AGAIN = 3  # times that an answer is asked for which breaks off


class _BrokenOff(Exception):
    """An answer that ended before its end."""


def connect(url: str) -> "openai.OpenAI":
    """
    Returns a client of a server. Its key is what the environment variable `OPENAI_API_KEY` says: a key in a
    configuration would be written into every results file.

    Args:
        url (`str`):
            Address; without a path, such as `http://localhost:8000`, that is `/v1`.

    Raises:
        UserError: If the client is not installed.
    """
    try:
        import openai
    except ImportError:
        raise UserError("`backend: server` needs OpenAI's client: run `pip install openai`.") from None
    return openai.OpenAI(
        base_url=base_url(url),
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
        max_retries=_RETRIES,
        timeout=openai.Timeout(600, connect=10),  # seconds between two pieces of an answer, and to connect
    )


def base_url(url: str) -> str:
    url = url.rstrip("/")
    return url if "/" in url.partition("://")[2] else f"{url}/v1"


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
    url = base_url(url)
    listed = _ask(url, lambda: {entry.id: entry for entry in connect(url).models.list()})
    if model is None and len(listed) != 1:
        raise UserError(f"The server at {url} lists {', '.join(listed)}: name one with `server_model`.")
    model = model or next(iter(listed))
    if model not in listed:
        raise UserError(f"The server at {url} has no model `{model}`: it lists {', '.join(listed)}.")
    told = listed[model].to_dict()
    return {"url": url, "id": model} | {
        name: told[name] for name in ("root", "parent", "max_model_len") if name in told
    }


@dataclass
class ChatFormat:
    """
    What it takes to ask by messages and to count the tokens of a text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the checkpoint.
        tags ([`~trl_opsd.evaluate.thinking.ThinkingTags`]):
            Tags to put around thinking that the server sends apart from the answer.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the server's chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    tags: ThinkingTags
    chat_template_kwargs: dict[str, Any] | None = None


class ServerEngine:
    """
    A running server: vLLM's `/v1/completions`, asked by token ids for token ids (`return_token_ids`), or with `chat` any
    `/v1/chat/completions`, whose texts are tokenised here. Requests that fail for now are sent again.

    Args:
        url (`str`):
            Address, for instance `http://localhost:8000`.
        model (`str`, *optional*):
            Name of the model, or of the adapter, there. Defaults to the only one that the server lists.
        concurrency (`int`):
            Number of requests under way at a time.
        chat ([`ChatFormat`], *optional*):
            How to ask by messages. If not set, token ids are.

    Raises:
        UserError: If there is no server, or it lists several models and none is named.
    """

    def __init__(self, url: str, model: str | None, concurrency: int, chat: ChatFormat | None = None):
        served = served_model(url, model)
        self.url, self.model, self.concurrency, self.chat = served["url"], served["id"], concurrency, chat
        self.client = connect(url)

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = {
                pool.submit(self._answer, request, sampling): index
                for index, request in enumerate(requests)
                if index not in done
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def serve(self, requests, sampling, concurrency, on_start, on_token) -> None:
        lock = threading.Lock()
        # What was cached without it is not found. Other servers than vLLM's have no such switch.
        salt = {} if self.chat else {"cache_salt": uuid.uuid4().hex}

        def answer(index: int) -> None:
            def tell() -> None:
                with lock:
                    on_token(index)

            with lock:
                on_start(index)
            try:
                self._once(requests[index], sampling, tell, **salt)
            except _BrokenOff as error:  # asked again it would be slower than it is
                raise UserError(f"The server at {self.url} broke off an answer ({error}).") from None

        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(answer, range(len(requests))))

    def reset_peak_memory(self) -> None:
        pass

    def peak_memory(self) -> None:
        return None  # it is not on this machine, for all that is known

    def close(self) -> None:
        self.client.close()

    def _answer(self, request: Request, sampling: Sampling) -> list[int]:
        for _ in range(_AGAIN):
            try:
                return self._once(request, sampling, lambda: None)
            except _BrokenOff as error:
                reason = error
        raise UserError(f"The server at {self.url} broke off an answer {_AGAIN} times ({reason}): run the same again.")

    def _once(self, request: Request, sampling: Sampling, on_token: Callable[[], None], **extra: Any) -> list[int]:
        ask = self._by_messages if self.chat else self._by_tokens
        return _ask(self.url, lambda: ask(request, sampling, on_token, **extra))

    def _by_tokens(self, request: Request, sampling: Sampling, on_token: Callable[[], None], **extra) -> list[int]:
        # All that decides the tokens: what is left out, the server may take from the checkpoint's generation config
        stream = self.client.completions.create(
            model=self.model,
            prompt=request.prompt_ids,
            max_tokens=sampling.limit(request),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            stop=list(sampling.stop) or None,
            stream=True,
            extra_body={
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "repetition_penalty": 1.0,
                "stop_token_ids": list(sampling.eos_ids),
                "include_stop_str_in_output": True,
                "return_token_ids": True,
                **extra,
            },
        )
        ids, reason = [], None
        for event in _events(stream):
            for choice in event.choices:
                told = choice.to_dict()
                if told.get("token_ids") is None:
                    raise UserError(
                        f"The server at {self.url} gives text and no token ids: ask it by `server_api: chat`, or use "
                        "vLLM's (0.11 or newer)."
                    )
                for _ in told["token_ids"]:
                    on_token()
                ids += told["token_ids"]
                reason = told.get("finish_reason") or reason
        self._check_reason(reason)
        return ids

    def _by_messages(self, request: Request, sampling: Sampling, on_token: Callable[[], None]) -> list[int]:
        # What not every server knows is named only where it is asked for
        extra = {name: value for name in ("top_k", "min_p") if (value := getattr(sampling, name)) > 0}
        if self.chat.chat_template_kwargs:
            extra["chat_template_kwargs"] = self.chat.chat_template_kwargs
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=request.messages,
            max_tokens=sampling.limit(request),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            stop=list(sampling.stop) or None,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra or None,
        )
        parts, answer, reason, counted, pieces = [], [], None, None, 0
        for event in _events(stream):
            if event.usage is not None:
                counted = event.usage.completion_tokens
            for choice in event.choices:
                delta = choice.delta.to_dict()
                # servers differ in what they call thinking that they send apart
                parts.append(delta.get("reasoning_content") or delta.get("reasoning") or "")
                answer.append(delta.get("content") or "")
                if parts[-1] or answer[-1]:
                    pieces += 1
                    on_token()
                reason = choice.finish_reason or reason
        self._check_reason(reason)
        ids = self._ids("".join(parts), "".join(answer), request, sampling, reason)
        if not ids or (counted is not None and counted > 1.2 * len(ids) + 32):
            raise UserError(
                f"The server at {self.url} says that an answer has {counted} tokens, and its text has {len(ids)}: it keeps "
                "a part to itself, such as the thinking, so tokens cannot be counted."
            )
        for _ in range((counted or len(ids)) - pieces):  # a piece may have several
            on_token()
        return ids

    def _ids(self, thinking: str, answer: str, request: Request, sampling: Sampling, reason: str) -> list[int]:
        tokenizer, tags = self.chat.tokenizer, self.chat.tags
        text = answer
        if thinking:
            start = "" if is_opened(request.prompt_ids, tokenizer, tags) else tags.start
            text = f"{start}{thinking}" + (f"{tags.end}{answer}" if answer else "")
        return tokenizer(text, add_special_tokens=False)["input_ids"] + list(sampling.eos_ids[: reason == "stop"])

    def _check_reason(self, reason: str | None) -> None:
        if reason not in ("stop", "length"):
            raise _BrokenOff(f"finish_reason {reason}")


def _events(stream: "openai.Stream") -> Iterator[Any]:
    """The pieces of an answer that has begun."""
    try:
        yield from stream
    except Exception as error:  # versions of the client differ in which ones of its transport they let through
        raise _BrokenOff(f"{type(error).__name__}: {error}") from None


def _ask(url: str, ask: Callable[[], Any]) -> Any:
    """Asks, and says in a sentence what went wrong."""
    from openai import APIConnectionError, APIStatusError

    try:
        return ask()
    except APIStatusError as error:
        text = " ".join(error.response.text.split())
        raise UserError(f"The server at {url} refuses a request ({error.status_code}): {text:.300}") from None
    except APIConnectionError as error:
        raise UserError(
            f"There is no server at {url} ({type(error).__name__}): start it, or correct `server_url`."
        ) from None
