"""IFEval (https://huggingface.co/papers/2311.07911): does a completion follow instructions that a program can check?"""

import json

from ..cli import UserError
from ..rewards.math import text_of


try:
    import langdetect
    from lm_eval.tasks.ifeval.utils import process_results
except ImportError:
    raise ImportError('IFEval is judged by lm-evaluation-harness: run `pip install "lm_eval[ifeval]"`') from None


def ifeval_reward(
    completions: list[list[dict[str, str]]] | list[str],
    prompts: list[list[dict[str, str]]] | list[str],
    instructions: list[str],
    flexible: bool = False,
    **kwargs,
) -> list[float]:
    """
    Reward function that is 1.0 where a completion follows all instructions of its prompt, as lm-evaluation-harness
    judges it (`prompt_level_strict_acc`).

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain. A thinking trace is not looked at, and one
            that is not closed is no answer.
        prompts (`list[list[dict[str, str]]]` or `list[str]`):
            Prompts, which some instructions speak of.
        instructions (`list[str]`):
            `instruction_id_list` and `kwargs` of each problem, as JSON.
        flexible (`bool`, *optional*, defaults to `False`):
            Whether to judge as `prompt_level_loose_acc`, which forgives a first or last line and asterisks.
        **kwargs:
            Other columns, none of which is used.

    Returns:
        `list[float]`: One score per completion.

    Raises:
        UserError: If the data with which sentences are told apart is missing.
    """
    langdetect.DetectorFactory.seed = 0  # it draws random numbers
    scores = []
    for completion, prompt, text in zip(completions, prompts, instructions, strict=True):
        answer = text_of(completion).rpartition("</think>")[2].strip()
        doc = {"key": 0, "prompt": text_of(prompt), **json.loads(text)}
        try:
            verdict = process_results(doc, ["" if "<think>" in answer else answer])
        except LookupError:
            raise UserError("IFEval needs data of nltk: run `python -m nltk.downloader punkt_tab`.") from None
        scores.append(float(verdict["prompt_level_loose_acc" if flexible else "prompt_level_strict_acc"]))
    return scores
