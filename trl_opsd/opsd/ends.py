"""Whether a rollout can end: the tokens that end it, and the positions that there are for it."""

from accelerate.logging import get_logger
from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..positions import positions_of
from .config import OPSDConfig


logger = get_logger(__name__)


def check_ends(eos_token_ids: list[int], teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that what ends a turn elsewhere ends a rollout of the student: where a teacher ends in a token that the student
    goes on after, distillation teaches the student to write it and to go on, and lengths explode.

    Args:
        eos_token_ids (`list[int]`):
            Tokens that end a rollout of the student.
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            Model of the teacher, if it has one of its own.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both.

    Raises:
        ValueError: If the teacher ends in a token that the student does not.
    """
    if teacher is not None:
        declared = (teacher.generation_config, teacher.config.get_text_config())
        ends = next((config.eos_token_id for config in declared if config.eos_token_id is not None), [])
        missing = sorted(set([ends] if isinstance(ends, int) else ends) - set(eos_token_ids))
        if missing:
            raise ValueError(
                f"The teacher ends in the token {missing[0]} ({tokenizer.convert_ids_to_tokens(missing[0])!r}), and the "
                f"student does not (its own are {sorted(eos_token_ids)}): it would learn to write it and to go on. Add it "
                "to `eos_token_id` in the student's generation_config.json."
            )
    reason = turn_without_end(eos_token_ids, tokenizer)
    if reason is not None:
        logger.warning(
            f"{reason[0].upper()}{reason[1:]}: rollouts may never end. Add the token of the template to `eos_token_id` in "
            "generation_config.json."
        )


def turn_without_end(eos_token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """
    Says why the turns of a chat template are not those that the end tokens end.

    Args:
        eos_token_ids (`list[int]`):
            Tokens that end a completion.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `str` or `None`: A sentence without its end, if the template ends an answer in none of them, or begins one with one
        of them; `None` if all is well, or there is no template that a conversation of two turns can be written in.
    """
    if tokenizer.chat_template is None:
        return None
    turn = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "The answer: 2"}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
        asked, begun = (
            tokenizer.apply_chat_template(turn[:1], tokenize=False, add_generation_prompt=begins)
            for begins in (False, True)
        )
    except (TemplateError, ValueError, TypeError):
        return None  # a template that takes other messages than these says nothing here
    prompt = begun.removeprefix(asked) if begun.startswith(asked) else ""
    ending, beginning = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (text.rpartition("The answer: 2")[2], prompt)
    )
    names = tokenizer.convert_ids_to_tokens(sorted(eos_token_ids))
    if ending and not set(ending) & set(eos_token_ids):
        return (
            f"the chat template ends an answer in {tokenizer.decode(ending)!r}, in which none of the tokens that end a "
            f"completion occurs ({names})"
        )
    if wrong := set(beginning) & set(eos_token_ids):
        return (
            f"the chat template begins an answer with {tokenizer.convert_ids_to_tokens(min(wrong))!r}, which is one of the "
            f"tokens that end a completion ({names})"
        )
    return None


def check_lengths(args: OPSDConfig, config: PretrainedConfig) -> None:
    """
    Checks that a model has the positions that a completion may take.

    Args:
        args ([`OPSDConfig`]):
            Configuration.
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the student.

    Raises:
        ValueError: If it has not.
    """
    positions = positions_of(config)
    if positions is not None and args.max_completion_length >= positions:
        raise ValueError(
            f"`max_completion_length={args.max_completion_length}` leaves no room for a prompt in the {positions} positions "
            "of the model: lower it."
        )
    budget = args.max_tokens_per_microbatch
    if budget is not None and budget < args.max_completion_length:
        logger.warning(
            f"`max_tokens_per_microbatch={budget}` is below `max_completion_length={args.max_completion_length}`: a rollout "
            "that is longer than the budget is a micro-batch of its own all the same, and takes the memory that it takes."
        )
