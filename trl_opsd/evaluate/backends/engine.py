"""
What evaluation asks of a backend.

All take the same prompt token ids and end at the same tokens, and each gives back token ids, so that what is counted is
what was generated and no text is tokenised twice.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Protocol


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
        min_p (`float`, *optional*, defaults to `0.0`):
            Least probability to draw, as a share of the most probable token's.
        stop (`tuple[str, ...]`, *optional*, defaults to `()`):
            Texts that end a completion, which keeps the tokens that made one of them whole.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    eos_ids: tuple[int, ...]
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def limit(self, request: "Request") -> int:
        """Maximum number of tokens of one completion."""
        return self.max_tokens if request.max_tokens is None else min(self.max_tokens, request.max_tokens)


@dataclass(frozen=True)
class Request:
    """
    One completion to generate.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        seed (`int`):
            Seed of its random numbers, which it shares with no other completion.
        max_tokens (`int`, *optional*):
            Maximum number of its tokens, where the model has room for fewer than others may have.
        messages (`list[dict[str, str]]`, *optional*):
            The conversation that `prompt_ids` are made of, for a server that is asked by messages.
    """

    prompt_ids: list[int]
    seed: int
    max_tokens: int | None = None
    messages: list[dict[str, str]] | None = None


class Engine(Protocol):
    """What a backend offers: completions, and completions with the moment of each token."""

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
                Positions in `requests` that are not needed. What the others come out as does not depend on it, nor on
                what else is generated, but for rounding.

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
        tokens is there. Nothing that was computed for an earlier call is made use of, such as a cached prefix.

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

    def reset_peak_memory(self) -> None:
        """Starts a new measurement of [`peak_memory`]."""

    def peak_memory(self) -> int | None:
        """
        Returns the most memory held since [`reset_peak_memory`] by the processes that hold the model, together, in bytes;
        `None` where that cannot be known.
        """

    def close(self) -> None:
        """Frees what the engine holds."""
