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
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    eos_ids: tuple[int, ...]


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
