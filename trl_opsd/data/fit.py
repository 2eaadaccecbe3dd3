"""Whether a model can be asked the prompts: what its tokenizer and its configuration say of them, before it is loaded."""

import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from trl import DistillationConfig, GRPOConfig

from ..cli import UserError


# Prompts that are written at once
_AT_ONCE = 1000


def load_tokenizer(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    Loads the tokenizer of a checkpoint, or of an adapter, which need not have one of its own.

    Args:
        name_or_path (`str`):
            Folder of either, or a model id on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer may bring code of its own.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: Tokenizer.

    Raises:
        UserError: If there is none that can be loaded.
    """
    folder = Path(name_or_path)
    if (folder / "adapter_config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        name_or_path = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"`{name_or_path}` has no tokenizer that can be loaded ({reason}).") from None


def positions_of(config: PreTrainedConfig) -> int | None:
    """Returns how many positions a model has, or `None` where nothing limits them, as of state space models and ALiBi."""
    config = config.get_text_config()
    # An attribute and not a key, because configurations have it under other names too (`n_positions`)
    positions, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if positions is None or "factor" not in rope:
        return positions
    # What is scaled is as long as it says: some configurations keep the number that there were before, and others the product
    return max(positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions)))


def positions_in_training(config: PreTrainedConfig, args: GRPOConfig | DistillationConfig) -> int | None:
    """Returns how many positions there are where rollouts are written: vLLM may be given fewer than the model has."""
    limits = [positions_of(config), args.vllm_max_model_length if args.use_vllm else None]
    return min((limit for limit in limits if limit is not None), default=None)


def check_fit(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    max_completion_length: int,
    chat_template_kwargs: dict | None = None,
) -> None:
    """
    Checks that a tokenizer can write the prompts, and that they leave room for a completion.

    The chat template is asked once for each order of roles that there is, and only what may be too long is tokenised, or
    all where a tokenizer has no token for what it does not know.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`.
        name (`str`):
            Name of the data set, for the message.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        positions (`int`, *optional*):
            Most tokens of prompt and completion. `None` for no limit.
        max_completion_length (`int`):
            Most tokens of a completion.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments for the chat template.

    Raises:
        UserError: If the prompts are conversations and there is no chat template, if a prompt cannot be written, or if one
            does not fit.
    """
    model = tokenizer.name_or_path
    room = None if positions is None else positions - max_completion_length
    if room is not None and room < 1:
        raise UserError(
            f"`max_completion_length={max_completion_length}` leaves no room for a prompt in the {positions} positions of "
            "the model: lower it."
        )
    if not isinstance(dataset[0]["prompt"], str) and tokenizer.chat_template is None:
        raise UserError(
            f"The prompts of `{name}` are conversations, and the tokenizer of `{model}` has no chat template: add one to the "
            "checkpoint, or use prompts that are plain strings."
        )
    writes_all = _can_write(tokenizer, "\N{SNOWMAN}")
    orders, suspects, too_long = set(), [], {}

    def refuse(number: int, error: Exception) -> None:
        raise UserError(
            f"`{name}`, row {number}: the tokenizer of `{model}` cannot write this `prompt` "
            f"({' '.join(str(error).split()):.200}): correct the row, or take another model."
        ) from None

    def look() -> None:
        numbers, prompts = zip(*suspects, strict=True)
        try:
            lengths = list(map(len, write_all(tokenizer, prompts, chat_template_kwargs)))
        except Exception:  # of one of them: a template raises what it likes, and tokenizers an Exception and no more
            lengths = []
            for number, prompt in suspects:
                try:
                    lengths.append(len(write(tokenizer, prompt, chat_template_kwargs)))
                except Exception as error:
                    refuse(number, error)
        too_long.update(
            (number, length) for number, length in zip(numbers, lengths, strict=True) if room and length > room
        )
        suspects.clear()

    for number, prompt in enumerate(dataset["prompt"], start=1):
        is_text = isinstance(prompt, str)
        order = "text" if is_text else tuple(message["role"] for message in prompt)
        text = prompt if is_text else "".join(message["content"] for message in prompt)
        # No more tokens than bytes, and what a template adds is small beside them
        may_be_too_long = room is not None and 2 * len(text.encode("utf-8", "replace")) > room
        if order in orders and writes_all and not may_be_too_long:
            continue
        orders.add(order)
        if room is not None and len(text) > 64 * room:  # of megabytes the beginning says enough
            try:
                length = len(tokenizer(text=text[: 64 * room])["input_ids"])
            except Exception as error:
                refuse(number, error)
            if length > room:
                too_long[number] = length
                continue
        suspects.append((number, prompt))
        if len(suspects) == _AT_ONCE:
            look()
    if suspects:
        look()
    if too_long:
        number, length = min(too_long.items())
        raise UserError(
            f"`{name}`: in {len(too_long)} of {len(dataset)} rows `prompt` is longer than the {room} tokens that "
            f"`max_completion_length={max_completion_length}` leaves of {positions} (row {number} has {length} or more): filter such "
            "rows out, or lower it."
        )


def _can_write(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    try:
        tokenizer(text=text)
    except Exception:  # tokenizers raise an Exception and no more
        return False
    return True


def write(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict] | str, chat_template_kwargs: dict | None = None
) -> list[int]:
    """Token ids of a prompt, up to where its completion begins."""
    return write_all(tokenizer, [prompt], chat_template_kwargs)[0]


def write_all(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict] | str], chat_template_kwargs: dict | None = None
) -> list[list[int]]:
    """Token ids of several prompts, which a fast tokenizer divides among the cores."""
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]
