"""From completions to verdicts: does each say what its verifiers want to hear, and in how many tokens?"""

import inspect
from collections.abc import Callable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.contamination import problem_text
from ..rewards import extract_answer, logic_reward, math_reward, required_columns
from .backends import Request
from .plan import Job
from .schema import CompletionRecord, Verdict
from .thinking import ThinkingTags, is_opened, read_thinking


def score(
    job: Job, decoding: str, requests: Sequence[Request], completion_ids: list[list[int]]
) -> list[CompletionRecord]:
    """
    Decides for each completion of a job whether it is correct.

    Args:
        job ([`~trl_opsd.evaluate.plan.Job`]):
            Problems and verifiers.
        decoding (`str`):
            How the completions were drawn.
        requests (`Sequence[Request]`):
            What was asked: equally often for each problem, problem by problem.
        completion_ids (`list[list[int]]`):
            Token ids of the completions, one list for each request.

    Returns:
        `list[CompletionRecord]`: One for each completion, in the same order.
    """
    labels, width = job.labels(decoding), len(requests) // len(job.names)
    opened = [is_opened(ids, job.tokenizer, job.tags) for ids in job.prompt_ids]
    questions = [problem_text(prompt) for prompt in job.dataset["prompt"]]
    places = [place for place in range(len(job.names)) for _ in range(width)]
    verdicts = verify(
        job.dataset.select(places),
        job.reward_funcs,
        completion_ids,
        job.tokenizer,
        job.eos_ids,
        [opened[place] for place in places],
        job.tags,
        job.config.stop or (),
    )
    return [
        CompletionRecord(
            **labels,
            **vars(verdict),
            id=job.names[place],
            sample=index % width,
            question=questions[place],
            seed=requests[index].seed,
        )
        for index, (place, verdict) in enumerate(zip(places, verdicts, strict=True))
    ]


def verify(
    dataset: Dataset,
    reward_funcs: list[Callable],
    completion_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    opened: list[bool] | None = None,
    tags: ThinkingTags = ThinkingTags(),  # noqa: B008, which is frozen
    stop: Sequence[str] = (),
) -> list[Verdict]:
    """
    Decides for each completion whether it is correct. One that has not ended, or not ended thinking, is not.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems, one for each completion.
        reward_funcs (`list[Callable]`):
            Verifiers; each must score a completion at least 1.0. One with a parameter `flexible` is asked twice.
        completion_ids (`list[list[int]]`):
            Token ids of the completions, in the order of the problems.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        eos_ids (`Sequence[int]`):
            Tokens that end a completion.
        opened (`list[bool]`, *optional*):
            Of each, whether the prompt ends in an open thinking block, which the completion then closes.
        tags ([`~trl_opsd.evaluate.thinking.ThinkingTags`], *optional*):
            Tags of the thinking block. Verifiers read `<think>` and `</think>` in their place.
        stop (`Sequence[str]`, *optional*):
            Texts that end a completion, and are no part of what is judged.

    Returns:
        `list[Verdict]`: One for each completion.
    """
    readings = [
        read_thinking(ids, tokenizer, tags, opened is not None and opened[index])
        for index, ids in enumerate(completion_ids)
    ]
    stopped = [any(text in reading.text for text in stop) for reading in readings]
    texts = [_before(reading.judged, stop) for reading in readings]
    columns = {
        name: list(dataset[name]) for name in dataset.column_names if name not in ("completion", "completion_ids")
    }
    prompts = columns.pop("prompt")
    completions = texts
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]

    def scores(**flexible) -> list[tuple]:
        each = [
            func(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids,
                **columns,
                **(flexible if "flexible" in inspect.signature(func).parameters else {}),
            )
            for func in reward_funcs
        ]
        return list(zip(*each, strict=True))

    strict = scores()
    any_flexible = any("flexible" in inspect.signature(func).parameters for func in reward_funcs)
    flexible = scores(flexible=True) if any_flexible else [(None,)] * len(texts)

    # A majority is of answers, and there are none where no verifier compares them
    compared = any({"answer", "solution"} & required_columns(func) for func in reward_funcs)

    def judge(values: tuple, is_whole: bool) -> bool | None:
        return None if None in values else is_whole and all(value >= 1 for value in values)

    verdicts = []
    for index, (reading, ids) in enumerate(zip(readings, completion_ids, strict=True)):
        truncated = ids[-1] not in eos_ids and not stopped[index]
        is_whole = not truncated and not reading.is_open
        verdicts.append(
            Verdict(
                completion=reading.text,
                tokens=len(ids),
                thinking_tokens=reading.tokens,
                truncated=truncated,
                correct=judge(strict[index], is_whole),
                correct_flexible=judge(flexible[index], is_whole),
                answer=extract_answer(texts[index]) if compared and not reading.is_open else None,
            )
        )
    return verdicts


def _before(text: str, stop: Sequence[str]) -> str:
    return text[: min((place for mark in stop if (place := text.find(mark)) >= 0), default=len(text))]


def same_answer(reward_funcs: list[Callable]) -> Callable[[str, str, str], bool] | None:
    r"""
    Returns what says whether two answers are one: if the verifier of math or logic takes either where the other is the
    reference answer.

    Args:
        reward_funcs (`list[Callable]`):
            Verifiers.

    Returns:
        `Callable[[str, str, str], bool]` or `None`: Function of a question and two answers; `None` where no verifier
        compares answers.
    """
    func = next((func for func in reward_funcs if func in (math_reward, logic_reward)), None)

    def takes(question: str, answer: str, reference: str) -> bool:
        return func(prompts=[question], completions=[f"\\boxed{{{answer}}}"], answer=[reference]) == [1.0]

    def same(question: str, one: str, other: str) -> bool:
        # An answer that the verifier cannot even read costs seconds, and is like no other
        if not takes(question, one, one) or not takes(question, other, other):
            return False
        return takes(question, one, other) or takes(question, other, one)

    return func and same
