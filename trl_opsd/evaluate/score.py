"""From completions to verdicts: does each say what its verifiers want to hear, and in how many tokens?"""

import inspect
from collections.abc import Callable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.contamination import problem_text
from ..rewards import code_reward, extract_answer, logic_reward, math_reward
from .backends import Request
from .plan import Job
from .schema import CompletionRecord, Verdict


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
    opened = [job.tokenizer.decode(ids[-8:]).rstrip().endswith("<think>") for ids in job.prompt_ids]
    questions = [problem_text(prompt) for prompt in job.dataset["prompt"]]
    places = [place for place in range(len(job.names)) for _ in range(width)]
    verdicts = verify(
        job.dataset.select(places),
        job.reward_funcs,
        completion_ids,
        job.tokenizer,
        job.eos_ids,
        [opened[place] for place in places],
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
) -> list[Verdict]:
    """
    Decides for each completion whether it is correct.

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

    Returns:
        `list[Verdict]`: One for each completion.
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
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

    def judge(values: tuple, truncated: bool) -> bool | None:
        return None if None in values else not truncated and all(value >= 1 for value in values)

    verdicts = []
    for index, (text, ids) in enumerate(zip(texts, completion_ids, strict=True)):
        truncated = ids[-1] not in eos_ids
        verdicts.append(
            Verdict(
                completion=text,
                tokens=len(ids),
                thinking_tokens=_thinking_tokens(text, ids, tokenizer, opened is not None and opened[index]),
                truncated=truncated,
                correct=judge(strict[index], truncated),
                correct_flexible=judge(flexible[index], truncated),
                answer=None if code_reward in reward_funcs else extract_answer(text),
            )
        )
    return verdicts


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


def _thinking_tokens(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, opened: bool) -> int:
    before, closed, _ = text.rpartition("</think>")
    if not closed:
        return len(ids) if opened or "<think>" in text else 0
    # the fewest tokens whose text has the closing tag, by halving: more tokens never have less text
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(ids[:middle], skip_special_tokens=True)) >= len(before + closed):
            high = middle
        else:
            low = middle + 1
    return low
