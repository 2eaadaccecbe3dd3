"""
Chains of modular arithmetic, with answers in several lengths: the world of the embedded default.

A problem is a start value and labelled operations, worked from left to right modulo `TinyConfig.modulus`. Every reply
ends in the boxed result. How it gets there depends on the instruction that follows the problem:

| mode | prompt | reply |
|---|---|---|
| plain | `6 a:-3 b:*4` | `6 a:-3 b:*4. 6 a:-3=3? 6 a:-3=3 b:*4=5? 3 b:*4=5 \\boxed{5}` |
| concise | `6 a:-3 b:*4 concise` | `6 a:-3=3 b:*4=5 \\boxed{5}` |
| brief | `6 a:-3 b:*4 brief` | `\\boxed{5}` |
| answer | `6 a:-3 b:*4 answer 5` | `\\boxed{5}` |
| solution | `6 a:-3 b:*4 solution 6 a:-3=3 b:*4=5 \\boxed{5}` | `6 a:-3=3 b:*4=5 \\boxed{5}` |

So the plain reply holds redundancy that can go (the restated problem, the second writing of each step) and depth that
cannot: a small model is right with the chain and at chance without it. The label makes fetching an operand a lookup,
and a step is written the same way in every reply, so what is learned about it in one holds in the others.
"""

import hashlib
import math
import random
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field


CONCISE_TEMPLATE = "{prompt} concise"
BRIEF_TEMPLATE = "{prompt} brief"
ANSWER_TEMPLATE = "{prompt} answer {answer}"
SOLUTION_TEMPLATE = "{prompt} solution {solution}"

#: Prompt template of each mode, as OPSD's `teacher_prompt_template` takes it.
TEMPLATES = {
    "plain": "{prompt}",
    "concise": CONCISE_TEMPLATE,
    "brief": BRIEF_TEMPLATE,
    "answer": ANSWER_TEMPLATE,
    "solution": SOLUTION_TEMPLATE,
}

#: Share of each mode in the rows of the warm start.
SHARES = {"plain": 0.25, "concise": 0.45, "brief": 0.1, "answer": 0.05, "solution": 0.15}

#: Twentieths of all problems that belong to each split. The text of a problem decides, so no problem is in two.
SPLITS = {"test": 4, "validation": 1, "train": 5, "sft": 10}


@dataclass
class TinyConfig:
    r"""
    Configuration of the tiny reasoner: its task, its architecture and its warm start.

    Args:
        > Parameters that control the task

        modulus (`int`, *optional*, defaults to `7`):
            Values are `0` to `modulus - 1`, each one digit, so at most `10`.
        min_ops (`int`, *optional*, defaults to `1`):
            Fewest operations of a problem.
        max_ops (`int`, *optional*, defaults to `6`):
            Most operations of a problem.
        median_ops (`float`, *optional*):
            If given, the numbers of operations are spread log-normally around this one, so that a few problems are
            many times as long as most, as with real ones. By default each number is as frequent as the others.
        verbosity (`int`, *optional*, defaults to `1`):
            How many times a plain reply writes each step again.
        short_ways_max_ops (`int`, *optional*):
            Most operations of a problem that the warm start answers in another way than the plain one. On longer ones the
            model is then asked for a way that it was not taught there: what it is asked, it is not competent in. By default
            every way is taught on all problems.
        style_blur (`float`, *optional*, defaults to `0.07`):
            How often, in the warm start, a piece of redundancy is left out of a plain reply, or put into a concise one.
            It makes every prefix one that each mode knows how to go on from, as for a language model it is.
        train_size (`int`, *optional*, defaults to `4096`):
            Number of rows written for the stages after the warm start.
        test_size (`int`, *optional*, defaults to `2048`):
            Number of held-out rows.

        > Parameters that control the model

        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the residual stream.
        num_layers (`int`, *optional*, defaults to `3`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to `2`):
            Number of key and value heads.
        head_dim (`int`, *optional*, defaults to `32`):
            Width of a head. Below 32 the attention kernels of serving engines don't take it.
        intermediate_size (`int`, *optional*, defaults to `144`):
            Width of the feed-forward layers.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether input and output embeddings are one matrix.

        > Parameters that control the warm start

        target_accuracy (`float`, *optional*, defaults to `0.97`):
            Greedy accuracy, the lower one of plain and concise replies, at which the chain counts as learned. A lower
            target leaves a weak teacher.
        accuracy_steps (`int`, *optional*, defaults to `100`):
            Optimizer steps between two measurements of that accuracy.
        accuracy_problems (`int`, *optional*, defaults to `240`):
            Number of validation problems of one measurement.
        slip_probability (`float`, *optional*, defaults to `0.12`):
            How often a step's result is wrong, and carried on, in the rows of the last phase.
        slip_steps (`int`, *optional*, defaults to `100`):
            Optimizer steps of the last phase, which teaches those slips so that reinforcement learning has something
            to do. `0` leaves it out.
    """

    modulus: int = field(default=7, metadata={"help": "Values are 0 to modulus - 1, each one digit, so at most 10."})
    min_ops: int = field(default=1, metadata={"help": "Fewest operations of a problem."})
    max_ops: int = field(default=6, metadata={"help": "Most operations of a problem."})
    median_ops: float | None = field(
        default=None,
        metadata={
            "help": "If given, the numbers of operations are spread log-normally around this one. By default each number "
            "is as frequent as the others."
        },
    )
    verbosity: int = field(default=1, metadata={"help": "How many times a plain reply writes each step again."})
    short_ways_max_ops: int | None = field(
        default=None,
        metadata={
            "help": "Most operations of a problem that the warm start answers in another way than the plain one. By "
            "default every way is taught on all problems."
        },
    )
    style_blur: float = field(
        default=0.07,
        metadata={
            "help": "How often, in the warm start, a piece of redundancy is left out of a plain reply, or put into a "
            "concise one."
        },
    )
    train_size: int = field(
        default=4096, metadata={"help": "Number of rows written for the stages after the warm start."}
    )
    test_size: int = field(default=2048, metadata={"help": "Number of held-out rows."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the residual stream."})
    num_layers: int = field(default=3, metadata={"help": "Number of layers."})
    num_heads: int = field(default=4, metadata={"help": "Number of query heads."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Number of key and value heads."})
    head_dim: int = field(
        default=32,
        metadata={"help": "Width of a head. Below 32 the attention kernels of serving engines don't take it."},
    )
    intermediate_size: int = field(default=144, metadata={"help": "Width of the feed-forward layers."})
    tie_word_embeddings: bool = field(
        default=False, metadata={"help": "Whether input and output embeddings are one matrix."}
    )
    target_accuracy: float = field(
        default=0.97,
        metadata={
            "help": "Greedy accuracy, the lower one of plain and concise replies, at which the chain counts as "
            "learned. A lower target leaves a weak teacher."
        },
    )
    accuracy_steps: int = field(
        default=100, metadata={"help": "Optimizer steps between two measurements of that accuracy."}
    )
    accuracy_problems: int = field(default=240, metadata={"help": "Number of validation problems of one measurement."})
    slip_probability: float = field(
        default=0.12,
        metadata={"help": "How often a step's result is wrong, and carried on, in the rows of the last phase."},
    )
    slip_steps: int = field(
        default=100,
        metadata={
            "help": "Optimizer steps of the last phase, which teaches those slips so that reinforcement learning has "
            "something to do. 0 leaves it out."
        },
    )

    def __post_init__(self):
        if not 2 <= self.modulus <= 10:
            raise ValueError(f"`modulus` is {self.modulus} and must be from 2 to 10: a value is one digit.")
        if not 1 <= self.min_ops <= self.max_ops <= len(LABELS):
            raise ValueError(
                f"`min_ops` is {self.min_ops} and `max_ops` is {self.max_ops}: they must be from 1 to {len(LABELS)}, "
                "the smaller one first."
            )
        if self.median_ops is not None and not self.min_ops <= self.median_ops <= self.max_ops:
            raise ValueError(
                f"`median_ops` is {self.median_ops} and must lie between `min_ops` {self.min_ops} and `max_ops` "
                f"{self.max_ops}."
            )
        if self.short_ways_max_ops is not None and not self.min_ops <= self.short_ways_max_ops <= self.max_ops:
            raise ValueError(
                f"`short_ways_max_ops` is {self.short_ways_max_ops} and must lie between `min_ops` {self.min_ops} and "
                f"`max_ops` {self.max_ops}: leave it out to teach every way on all problems."
            )
        if self.verbosity < 1:
            raise ValueError(
                f"`verbosity` is {self.verbosity} and must be at least 1: a plain reply checks its steps."
            )
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_heads` is {self.num_heads} and `num_key_value_heads` is {self.num_key_value_heads}: the latter must "
                "divide the former."
            )
        for name in ("target_accuracy", "slip_probability", "style_blur"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"`{name}` is {value} and must be from 0 to 1.")

    @property
    def max_reply_length(self) -> int:
        """Tokens of the longest right reply, with the end token."""
        return 8 + self.max_ops * (6 + 6 * self.verbosity)

    def teaches(self, mode: str, num_ops: int) -> bool:
        """Whether the warm start has replies in `mode` to problems of this many operations."""
        return mode == "plain" or self.short_ways_max_ops is None or num_ops <= self.short_ways_max_ops

    @property
    def shares_of_ops(self) -> list[float]:
        """The share of each number of operations, from `min_ops` to `max_ops`, not normalised."""
        numbers = range(self.min_ops, self.max_ops + 1)
        if self.median_ops is None:
            return [1.0 for _ in numbers]
        return [math.exp(-0.5 * (math.log(n / self.median_ops) / SPREAD_OF_OPS) ** 2) / n for n in numbers]


LABELS = string.ascii_lowercase[:24]

#: Standard deviation of the logarithm of the number of operations, with `median_ops`.
SPREAD_OF_OPS = 0.7


@dataclass(frozen=True)
class Problem:
    """
    A start value and the operations on it.

    Args:
        start (`int`):
            Value before the first operation.
        ops (`tuple[tuple[str, int], ...]`):
            Operator and operand of each step.
        modulus (`int`):
            What every result is taken modulo of.
    """

    start: int
    ops: tuple[tuple[str, int], ...]
    modulus: int

    @property
    def text(self) -> str:
        return f"{self.start}" + "".join(f" {label}:{op}{x}" for label, (op, x) in zip(LABELS, self.ops, strict=False))

    def results(self, slip_probability: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """The value after each step. A slip replaces it by a wrong one, from which the next step goes on."""
        value, results = self.start, []
        for op, x in self.ops:
            value = {"+": value + x, "-": value - x, "*": value * x}[op] % self.modulus
            if slip_probability and rng.random() < slip_probability:
                value = (value + rng.randrange(1, self.modulus)) % self.modulus
            results.append(value)
        return results

    @property
    def answer(self) -> str:
        return str(self.results()[-1])

    @property
    def solution(self) -> str:
        return self.reply("concise")

    def ask(self, mode: str) -> str:
        """The text of the user's message that asks for a reply in `mode`."""
        return TEMPLATES[mode].format(prompt=self.text, answer=self.answer, solution=self.solution)

    def reply(
        self,
        mode: str,
        results: list[int] | None = None,
        verbosity: int = 1,
        blur: float = 0.0,
        rng: random.Random | None = None,
    ) -> str:
        """
        The text of the assistant's message in `mode`. `results` may hold slips, and with probability `blur` a piece of
        redundancy is left out of a plain reply, or slips into a chain of another mode.
        """

        def redundant() -> bool:
            return (mode == "plain") != (blur > 0 and rng.random() < blur)

        results = results or self.results()
        box = f"\\boxed{{{results[-1]}}}"
        if mode in ("brief", "answer"):
            return box
        steps = [f" {label}:{op}{x}={r}" for label, (op, x), r in zip(LABELS, self.ops, results, strict=False)]
        before = [self.start, *results]
        steps = [
            step + (verbosity * f"? {v}{step}" if redundant() else "") for v, step in zip(before, steps, strict=False)
        ]
        restated = f"{self.text}. " if redundant() else ""
        return f"{restated}{self.start}{''.join(steps)} {box}"


def split_of(text: str) -> str:
    """The split that a problem's text belongs to, whatever the seed."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % sum(SPLITS.values())
    for split, width in SPLITS.items():
        bucket -= width
        if bucket < 0:
            return split


def _numbered(config: TinyConfig, num_ops: int, number: int) -> Problem:
    # Multiplying by 0 would make everything before it superfluous.
    kinds = [(op, x) for op in "+-*" for x in range(config.modulus) if (op, x) != ("*", 0)]
    number, start = divmod(number, config.modulus)
    ops = []
    for _ in range(num_ops):
        number, kind = divmod(number, len(kinds))
        ops.append(kinds[kind])
    return Problem(start, tuple(ops), config.modulus)


def _count(config: TinyConfig, num_ops: int) -> int:
    return config.modulus * (3 * config.modulus - 1) ** num_ops


def _numbers(rng: random.Random, total: int, size: int) -> list[int]:
    """Different numbers below `total`."""
    if total <= sys.maxsize:
        return rng.sample(range(total), min(total, size))
    # More than `sample` can count, and so many that none is drawn twice
    return [rng.randrange(total) for _ in range(size)]


def problems(config: TinyConfig, split: str, size: int, seed: int) -> list[Problem]:
    """
    Draws different problems of one split, spread over the numbers of operations as evenly as there are problems, or as
    `median_ops` says.

    Args:
        config ([`TinyConfig`]):
            The task.
        split (`str`):
            `"test"`, `"validation"`, `"train"` or `"sft"`.
        size (`int`):
            How many.
        seed (`int`):
            Seed of the draw.

    Returns:
        `list[Problem]`: In random order.

    Raises:
        ValueError: If there are not that many.
    """
    rng = random.Random(f"{split} {seed}")
    drawn = []
    shares = config.shares_of_ops
    for index, num_ops in enumerate(range(config.min_ops, config.max_ops + 1)):
        # What one number has too few problems for goes to those after it
        quota = int((size - len(drawn)) * shares[index] / sum(shares[index:]))
        # A split holds at least a twentieth, so 40 times the quota is enough to look at.
        candidates = (_numbered(config, num_ops, n) for n in _numbers(rng, _count(config, num_ops), 40 * quota))
        drawn += [problem for problem in candidates if split_of(problem.text) == split][:quota]
    if len(drawn) < size:
        raise ValueError(
            f"There are only {len(drawn)} `{split}` problems of {config.min_ops} to {config.max_ops} operations modulo "
            f"{config.modulus}, and {size} were asked for: ask for fewer, or raise `max_ops`."
        )
    rng.shuffle(drawn)
    return drawn


def sft_rows(config: TinyConfig, seed: int, slip_probability: float = 0.0) -> Iterator[dict]:
    """
    Endless rows for the warm start: problems of the `sft` split with repetition, the numbers of operations spread as the
    configuration says.

    Args:
        config ([`TinyConfig`]):
            The task.
        seed (`int`):
            Seed of the draw.
        slip_probability (`float`, *optional*, defaults to `0.0`):
            How often a step of a plain or concise reply is wrong and carried on.

    Yields:
        `dict`: `prompt` and `completion`, each a list of one message, and `mode`.
    """
    rng = random.Random(f"rows {seed}")
    while True:
        if config.median_ops is None:
            num_ops = rng.randint(config.min_ops, config.max_ops)
        else:
            num_ops = rng.choices(range(config.min_ops, config.max_ops + 1), config.shares_of_ops)[0]
        problem = _numbered(config, num_ops, rng.randrange(_count(config, num_ops)))
        if split_of(problem.text) != "sft":
            continue
        mode = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if not config.teaches(mode, num_ops):
            mode = "plain"
        results = problem.results(slip_probability if mode in ("plain", "concise") else 0.0, rng)
        yield {
            "prompt": [{"role": "user", "content": problem.ask(mode)}],
            "completion": [
                {
                    "role": "assistant",
                    "content": problem.reply(mode, results, config.verbosity, config.style_blur, rng),
                }
            ],
            "mode": mode,
        }


def row(problem: Problem) -> dict:
    """A row of the data contract: `prompt`, `answer`, `solution`, and `num_ops`."""
    return {
        "prompt": [{"role": "user", "content": problem.text}],
        "answer": problem.answer,
        "solution": problem.solution,
        "num_ops": len(problem.ops),
    }
