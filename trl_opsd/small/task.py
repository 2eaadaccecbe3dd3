r"""
The world of the small reasoner: problems of several families in English, and replies in two ways.

A plain reply restates the problem, checks its steps and goes over them once more. A step slips now and then, and a check
notices most of that, so that some second thoughts are needed, as those of real models are. A concise reply is the steps
and the boxed answer; it slips as often and notices less.

| mode | prompt | reply |
|---|---|---|
| plain | the question | `I need the value of 25 - 84 + 65. First, 25-84=-59. Let me check: 25-84=-59. Yes. …` |
| concise | with [`CONCISE_TEMPLATE`] | `25-84=-59. -59+65=6. \boxed{6}` |
| solution | with a reference solution | that solution |
| sibling | with a short reply | that reply |

Beside these, the warm start drills single steps, which most of what is written in plain replies only repeats.

All but the plain way are taught for the families of `SmallConfig.taught` alone, and up to `taught_difficulty`. Elsewhere
they have to carry over: in two of the other families to the same words around the steps, in two to other words.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..tiny.task import split_of
from .families import FAMILIES


# Short forms of the contexts of `opsd/context.py`
CONCISE_TEMPLATE = "{prompt}\n\nReason as concisely as you can, without restatements or repeated checks."
SOLUTION_TEMPLATE = "{prompt}\n\nA reference solution: {solution}\n\nDerive the answer again, step by step."
SIBLING_TEMPLATE = "{prompt}\n\nA short and correct way to solve it: {sibling}\n\nSolve it as briefly."

# No way of answering: single steps, so that the larger part of the warm start's tokens is not repetition
DRILL_TEMPLATE = "Work out each of these: {steps}"
DRILL_STEPS = 6

#: Prompt template of each mode, as OPSD's `teacher_prompt_template` takes it.
TEMPLATES = {
    "plain": "{prompt}",
    "concise": CONCISE_TEMPLATE,
    "solution": SOLUTION_TEMPLATE,
    "sibling": SIBLING_TEMPLATE,
}

#: Share of each mode in the rows of a problem whose other ways of answering are taught.
SHARES = {"plain": 0.4, "concise": 0.35, "solution": 0.1, "sibling": 0.15}


@dataclass(frozen=True)
class Style:
    """
    The words around the steps of a reply, none of which a result depends on, but for the corrections.

    Each is a list to choose from. `{about}` is what is asked, and `{right}` the right result.
    """

    openings: list[str]
    plans: list[str]
    first: list[str]
    leads: list[str]
    checks: list[str]
    verdicts: list[str]
    corrections: list[str]
    reviews: list[str]
    closings: list[str]
    answers: list[str]


STYLES = {
    "common": Style(
        openings=[
            "I need {about}. ",
            "Okay, the question asks for {about}. ",
            "Let me see. I have to find {about}. ",
        ],
        plans=["I take it step by step, so that I make no mistake. ", "Let me work through this slowly. "],
        first=["First, "],
        leads=["Next, ", "Then, ", "Now, "],
        checks=["Let me check: ", "Wait, is that right? ", "To be sure, once more: "],
        verdicts=["Yes. ", "Good, that holds. ", "That is the same. "],
        corrections=["No, it is {right}. ", "That was wrong, it is {right}. "],
        reviews=["So let me go over it again. ", "Before I answer, let me look at all of it. "],
        closings=["It all fits. ", "Everything is consistent. "],
        answers=["The answer is ", "So the final answer is "],
    ),
    # Families that are always written about in other words: there it takes more for a way of answering to carry over
    "other": Style(
        openings=["What is wanted is {about}. ", "Right, {about}, then. ", "My task here: {about}. "],
        plans=["One thing after the other. ", "Careful with this one. "],
        first=["To begin with, "],
        leads=["After that, ", "Going on, ", "From there, "],
        checks=["Hmm, hold on: ", "Does this look fine? ", "Doing that a second time: "],
        verdicts=["Fine. ", "Same as before. ", "No mistake there. "],
        corrections=["Not so: {right}. ", "My mistake, {right} instead. "],
        reviews=["Looking back over everything: ", "One last look: "],
        closings=["Nothing is amiss. ", "All in order. "],
        answers=["Hence the result: ", "This leaves "],
    ),
}


@dataclass
class SmallConfig:
    """
    Configuration of the small reasoner: its tasks, its architecture and its warm start.

    Args:
        > Parameters that control the tasks

        families (`list[str]`, *optional*, defaults to all seven):
            Families that the warm start learns.
        difficulty (`int`, *optional*, defaults to `3`):
            Highest difficulty, of three, that it learns.
        taught (`list[str]`, *optional*, defaults to three of the seven):
            Families in which it is taught to answer in other ways than the plain one.
        taught_difficulty (`int`, *optional*, defaults to `2`):
            Highest difficulty, of three, at which it is.
        slip_probability (`float`, *optional*, defaults to `0.05`):
            How often the first attempt at a step is wrong, in plain and concise replies.
        notice_probability (`float`, *optional*, defaults to `0.7`):
            How often a check then notices, and corrects it; one that does not repeats the mistake. Where there is no
            check it is a third of that.
        drill_share (`float`, *optional*, defaults to `0.4`):
            Share of the rows that drill single steps, of the problems before them.
        terseness (`float`, *optional*, defaults to `0.6`):
            Share of the redundancy that is missing in the tersest plain replies. It differs from reply to reply.
        posed (`list[str]`, *optional*, defaults to five of the seven):
            Families of the later stages' problems. The warm start does not learn the other two in its time.
        posed_difficulty (`int`, *optional*, defaults to `2`):
            Highest difficulty of those problems, of three, as far as the warm start comes.
        train_size (`int`, *optional*, defaults to `1260`):
            Number of rows written for the stages after the warm start.
        test_size (`int`, *optional*, defaults to `1050`):
            Number of held-out rows.

        > Parameters that control the model

        vocab_size (`int`, *optional*, defaults to `1024`):
            Tokens that the tokenizer may have.
        hidden_size (`int`, *optional*, defaults to `256`):
            Width of the residual stream.
        num_layers (`int`, *optional*, defaults to `6`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to `2`):
            Number of key and value heads.
        head_dim (`int`, *optional*, defaults to `64`):
            Width of a head.
        intermediate_size (`int`, *optional*, defaults to `768`):
            Width of the feed-forward layers.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether input and output embeddings are one matrix.

        > Parameters that control the warm start

        accuracy_steps (`int`, *optional*, defaults to `500`):
            Optimizer steps between two measurements of greedy accuracy.
        accuracy_problems (`int`, *optional*, defaults to `168`):
            Number of validation problems of one measurement.

    Raises:
        ValueError: If a value is out of its range. The least of all numbers of problems is one for each difficulty of each
            family.
    """

    families: list[str] = field(
        default_factory=lambda: [
            "chain_sum",
            "leg_counting",
            "gcd",
            "number_filtering",
            "basic_arithmetic",
            "simple_equations",
            "base_conversion",
        ],
        metadata={"help": "Families that the warm start learns."},
    )
    difficulty: int = field(default=3, metadata={"help": "Highest difficulty, of three, that it learns."})
    taught: list[str] = field(
        default_factory=lambda: ["chain_sum", "leg_counting", "number_filtering"],
        metadata={"help": "Families in which it is taught to answer in other ways than the plain one."},
    )
    taught_difficulty: int = field(default=2, metadata={"help": "Highest difficulty, of three, at which it is."})
    slip_probability: float = field(
        default=0.05,
        metadata={"help": "How often the first attempt at a step is wrong, in plain and concise replies."},
    )
    notice_probability: float = field(
        default=0.7,
        metadata={
            "help": "How often a check then notices, and corrects it; one that does not repeats the mistake. Where there "
            "is no check it is a third of that."
        },
    )
    drill_share: float = field(
        default=0.4, metadata={"help": "Share of the rows that drill single steps, of the problems before them."}
    )
    terseness: float = field(
        default=0.6,
        metadata={
            "help": "Share of the redundancy that is missing in the tersest plain replies. It differs from reply to "
            "reply."
        },
    )
    posed: list[str] = field(
        default_factory=lambda: ["chain_sum", "leg_counting", "gcd", "basic_arithmetic", "simple_equations"],
        metadata={
            "help": "Families of the later stages' problems. The warm start does not learn the other two in its time."
        },
    )
    posed_difficulty: int = field(
        default=2,
        metadata={"help": "Highest difficulty of those problems, of three, as far as the warm start comes."},
    )
    train_size: int = field(
        default=1260, metadata={"help": "Number of rows written for the stages after the warm start."}
    )
    test_size: int = field(default=1050, metadata={"help": "Number of held-out rows."})
    vocab_size: int = field(default=1024, metadata={"help": "Tokens that the tokenizer may have."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the residual stream."})
    num_layers: int = field(default=6, metadata={"help": "Number of layers."})
    num_heads: int = field(default=4, metadata={"help": "Number of query heads."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Number of key and value heads."})
    head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    intermediate_size: int = field(default=768, metadata={"help": "Width of the feed-forward layers."})
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "Whether input and output embeddings are one matrix."}
    )
    accuracy_steps: int = field(
        default=500, metadata={"help": "Optimizer steps between two measurements of greedy accuracy."}
    )
    accuracy_problems: int = field(default=168, metadata={"help": "Number of validation problems of one measurement."})

    def __post_init__(self):
        if not self.families:
            raise ValueError("`families` is empty: name the families that the warm start learns.")
        if not self.posed:
            raise ValueError("`posed` is empty: name the families of the later stages' problems.")
        for name, known in (("families", FAMILIES), ("taught", self.families), ("posed", self.families)):
            for task in (given := getattr(self, name)):
                if task not in known:
                    raise ValueError(f"`{name}` has `{task}`, and the families are {', '.join(known)}.")
                if given.count(task) > 1:
                    raise ValueError(f"`{name}` has `{task}` more than once.")
        for name, least in (("difficulty", 1), ("taught_difficulty", 0), ("posed_difficulty", 1)):
            if not least <= (value := getattr(self, name)) <= 3:
                raise ValueError(f"`{name}` is {value} and must be from {least} to 3.")
        if self.posed_difficulty > self.difficulty:
            raise ValueError(
                f"`posed_difficulty` is {self.posed_difficulty} and `difficulty` {self.difficulty}: the later stages are "
                "posed what the warm start learns."
            )
        for name in ("slip_probability", "notice_probability", "drill_share", "terseness"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"`{name}` is {value} and must be from 0 to 1.")
        for name in ("train_size", "test_size", "accuracy_problems"):
            fewest = self.difficulty * len(self.families)
            if name != "accuracy_problems":
                fewest = self.posed_difficulty * len(self.posed)
            if (value := getattr(self, name)) < fewest:
                raise ValueError(
                    f"`{name}` is {value} and must be at least {fewest}, one problem for each difficulty of each family."
                )


def _near(right: int, rng: random.Random) -> int:
    """A number that one gets for `right` by a slip. It has the same sign, so that what follows stays possible."""
    distances = [d for d in (-10, -2, -1, 1, 2, 10) if abs(d) < 10 or abs(right) >= 10]
    return rng.choice([right + d for d in distances if (right + d < 0) == (right < 0)])


class Writer:
    """
    Writes a reply while its problem is worked out.

    Args:
        redundancy (`float`):
            How likely each piece that is not needed is written.
        rng (`random.Random`):
            Where chance comes from.
        slip_probability (`float`, *optional*, defaults to `0.0`):
            How often a step slips.
        notice_probability (`float`, *optional*, defaults to `0.0`):
            How often a check notices.
    """

    def __init__(
        self, redundancy: float, rng: random.Random, slip_probability: float = 0.0, notice_probability: float = 0.0
    ):
        self.redundancy, self.rng = redundancy, rng
        self.slip_probability, self.notice_probability = slip_probability, notice_probability
        self.style = STYLES["common"]
        self.text = ""
        self.steps: list[str] = []

    def maybe(self, phrases: list[str], **values) -> bool:
        """Writes one of `phrases`, or none of them."""
        written = self.rng.random() < self.redundancy
        if written:
            self.text += self.rng.choice(phrases).format(**values)
        return written

    def step(self, text: str, right, wrong: list | None = None):
        """A [`Step`]."""
        first = right
        if self.rng.random() < self.slip_probability:
            first = self.rng.choice(wrong) if wrong else _near(right, self.rng)
        self.maybe(self.style.leads if self.steps else self.style.first)
        self.text += f"{text}{first}. "
        checked = self.maybe(self.style.checks)
        noticed = first != right and self.rng.random() < self.notice_probability / (1 if checked else 3)
        result = right if noticed else first
        if checked:
            self.text += f"{text}{result}. "
        if noticed:
            self.text += self.rng.choice(self.style.corrections).format(right=right)
        elif checked:
            self.text += self.rng.choice(self.style.verdicts)
        self.steps.append(f"{text}{result}")
        return result


@dataclass(frozen=True)
class Problem:
    """
    A problem that reasoning-gym has generated.

    Args:
        task (`str`):
            Its family.
        difficulty (`int`):
            1 to 3.
        question (`str`):
            What is asked.
        answer (`str`):
            What reasoning-gym takes for right.
        metadata (`dict`):
            What the family's solver needs to know.
    """

    task: str
    difficulty: int
    question: str
    answer: str
    metadata: dict

    def reply(self, writer: Writer) -> str:
        """What `writer` writes when it answers."""
        family = FAMILIES[self.task]
        writer.style = STYLES[family.style]
        writer.maybe(writer.style.openings, about=family.about(self.metadata))
        writer.maybe(writer.style.plans)
        answer = family.solve(self.metadata, writer.step)
        if len(writer.steps) > 1 and writer.maybe(writer.style.reviews):
            writer.text += "; ".join(writer.steps) + ". " + writer.rng.choice(writer.style.closings)
        writer.maybe(writer.style.answers)
        return f"{writer.text}\\boxed{{{answer}}}"

    @property
    def solution(self) -> str:
        return self.reply(Writer(0.0, random.Random(0)))

    def ask(self, mode: str, sibling: str | None = None) -> str:
        """The text of the user's message that asks for a reply in `mode`. A sibling is the solution if not given."""
        return TEMPLATES[mode].format(
            prompt=self.question, solution=self.solution, sibling=self.solution if sibling is None else sibling
        )


class _Source:
    """Endless problems of one family and difficulty and one split."""

    def __init__(self, task: str, difficulty: int, split: str, seed: int):
        self.task, self.difficulty, self.split = task, difficulty, split
        from reasoning_gym.factory import create_dataset  # an optional package

        # Problem i is made from the seed plus i, so seeds must lie far apart
        start = random.Random(f"{task} {difficulty} {split} {seed}").randrange(2**40)
        self.entries = create_dataset(task, seed=start, size=2**30, **FAMILIES[task].levels[difficulty - 1])
        self.index = 0

    def __next__(self) -> Problem:
        while True:
            entry = self.entries[self.index]
            self.index += 1
            question = entry["question"].strip()
            if split_of(question) == self.split and FAMILIES[self.task].keep(entry):
                return Problem(self.task, self.difficulty, question, entry["answer"], entry["metadata"])


def problems(
    split: str, size: int, seed: int, families: Sequence[str] = tuple(FAMILIES), difficulties: int = 3
) -> list[Problem]:
    """
    Draws different problems of one split, equally many of each family and difficulty.

    Args:
        split (`str`):
            `"test"`, `"validation"`, `"train"` or `"sft"`.
        size (`int`):
            How many. What does not go up in families and difficulties is left out.
        seed (`int`):
            Seed of the draw.
        families (`Sequence[str]`, *optional*, defaults to all):
            Which families.
        difficulties (`int`, *optional*, defaults to `3`):
            Highest difficulty.

    Returns:
        `list[Problem]`: In random order.

    Raises:
        ValueError: If there are not that many.
    """
    drawn = []
    quota = size // (difficulties * len(families))
    for task in families:
        found, repeats = {}, 0  # by the question: one difficulty has some of another's
        for difficulty in range(1, difficulties + 1):
            source = _Source(task, difficulty, split, seed)
            while len(found) < quota * difficulty:
                problem = next(source)
                repeats = repeats + 1 if problem.question in found else 0
                if repeats == 200:
                    raise ValueError(
                        f"There are too few `{split}` problems of `{task}` at difficulty {difficulty} for {size} rows: "
                        "ask for fewer."
                    )
                found.setdefault(problem.question, problem)
        drawn += found.values()
    random.Random(f"order {split} {seed}").shuffle(drawn)
    return drawn


def sft_rows(config: SmallConfig, seed: int) -> Iterator[dict]:
    """
    Endless rows for the warm start, of the `sft` split.

    Args:
        config ([`SmallConfig`]):
            The tasks.
        seed (`int`):
            Seed of the draw.

    Yields:
        `dict`: `prompt` and `completion`, each a list of one message, and `mode`, `task` and `difficulty`; those of
        drills are `"drill"` and 0.
    """
    rng = random.Random(f"rows {seed}")
    levels = range(1, config.difficulty + 1)
    sources = [_Source(task, difficulty, "sft", seed) for task in config.families for difficulty in levels]
    steps = deque(maxlen=1000)  # of the last problems, to be drilled
    while True:
        if len(steps) >= 100 and config.drill_share and rng.random() < config.drill_share:
            yield _drill(rng.sample(steps, DRILL_STEPS))
            continue
        problem = next(rng.choice(sources))
        writer = Writer(0.0, rng)
        problem.reply(writer)
        # Whether a number is kept depends on the question
        steps.extend(step for step in writer.steps if "=" in step)
        mode, sibling = "plain", None
        if problem.task in config.taught and problem.difficulty <= config.taught_difficulty:
            mode = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if mode == "plain":
            redundancy = 1 - config.terseness * rng.random() ** 2
            reply = problem.reply(Writer(redundancy, rng, config.slip_probability, config.notice_probability))
        elif mode == "concise":
            reply = problem.reply(Writer(0.02, rng, config.slip_probability, config.notice_probability))
        elif mode == "solution":
            reply = problem.solution
        else:
            redundancy = rng.choice([0.0, 0.7 * rng.random()])
            reply = sibling = problem.reply(Writer(redundancy, rng))
        yield {
            "prompt": [{"role": "user", "content": problem.ask(mode, sibling)}],
            "completion": [{"role": "assistant", "content": reply}],
            "mode": mode,
            "task": problem.task,
            "difficulty": problem.difficulty,
        }


def _drill(steps: list[str]) -> dict:
    """A row of the warm start with single steps."""
    asked = DRILL_TEMPLATE.format(steps=", ".join(step.partition("=")[0] for step in steps))
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": ". ".join(steps) + "."}],
        "mode": "drill",
        "task": "drill",
        "difficulty": 0,
    }


def row(problem: Problem) -> dict:
    """A row of the data contract: `prompt`, `answer`, `solution`, and `task` and `difficulty`."""
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "answer": problem.answer,
        "solution": problem.solution,
        "task": problem.task,
        "difficulty": problem.difficulty,
    }
