"""Whether a model can be asked the prompts: what its tokenizer and its configuration say of them, before it is loaded."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from trl import DistillationConfig, GRPOConfig

from ..cli import UserError
from ..positions import positions_of


logger = logging.getLogger(__name__)

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
    context: str | None = None,
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
        context (`str`, *optional*):
            Name or template of the context that the prompts have been put into, for the message.

    Raises:
        UserError: If the prompts are conversations and there is no chat template, if a prompt cannot be written, if the
            template leaves a role out, or if a prompt does not fit.
    """
    room = None if positions is None else positions - max_completion_length
    if room is not None and room < 1:
        raise UserError(
            f"`max_completion_length={max_completion_length}` leaves no room for a prompt in the {positions} positions of "
            "the model: lower it."
        )
    rows = _Rows(name, tokenizer, room, chat_template_kwargs, context)
    too_long = {
        number: length
        for number, length in rows.lengths_of_suspects(dataset["prompt"])
        if room is not None and length > room
    }
    if too_long:
        number, length = min(too_long.items())
        raise UserError(
            f"`{name}`: in {len(too_long)} of {len(dataset)} rows `prompt` is longer than the {room} tokens that "
            f"`max_completion_length={max_completion_length}` leaves of {positions} (row {number} has {length} or more): filter such "
            "rows out, or lower it."
        )


def write_rows(
    prompts: Sequence[list[dict] | str],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict | None = None,
    context: str | None = None,
) -> list[list[int]]:
    """
    Token ids of prompts, up to where their completions begin: those that TRL's trainers roll out from.

    Args:
        prompts (`Sequence[list[dict]]` or `Sequence[str]`):
            Prompts, conversational or plain.
        name (`str`):
            Name of the data set, for the message.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        chat_template_kwargs (`dict`, *optional*):
            Keyword arguments for the chat template.
        context (`str`, *optional*):
            Name or template of the context that the prompts have been put into, for the message.

    Returns:
        `list[list[int]]`: Not padded.

    Raises:
        UserError: If there is no chat template for conversations, if one cannot be written, or if the template leaves a role
            out.
    """
    warn_of_strings(prompts, tokenizer)
    rows = _Rows(name, tokenizer, None, chat_template_kwargs, context)
    for _ in rows.lengths_of_suspects(prompts):  # which looks at the template and the roles
        pass
    return rows.ids(list(enumerate(prompts, start=1)))


def warn_of_strings(prompts: Sequence[list[dict] | str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Says that the chat template of a tokenizer is not applied, if there is one and the prompts are plain strings."""
    if isinstance(prompts[0], str) and tokenizer.chat_template is not None:
        logger.warning(
            "The prompts are plain strings, so the chat template of the tokenizer is not applied: give lists of messages "
            '(`[{"role": "user", "content": ...}]`) unless the template is in the strings already.'
        )


def check_texts(texts: Iterable[str], name: str, column: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that a tokenizer can write texts, which one without a token for what it does not know may not.

    Args:
        texts (`Iterable[str]`):
            Texts of a column.
        name (`str`):
            Name of the data set, for the message.
        column (`str`):
            Name of the column, for the message.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Raises:
        UserError: If one cannot be written.
    """
    if _can_write(tokenizer, "\N{SNOWMAN}"):
        return
    for number, text in enumerate(texts, start=1):
        try:
            tokenizer(text=text)
        except Exception as error:
            raise UserError(
                f"`{name}`, row {number}: the tokenizer of `{tokenizer.name_or_path}` cannot write this `{column}` "
                f"({' '.join(str(error).split()):.200}): correct the row, or take another model."
            ) from None


class _Rows:
    """The prompts of a data set as a tokenizer writes them, and the sentence on a row that it cannot write."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        room: int | None,
        kwargs: dict | None,
        context: str | None,
    ):
        self._name, self._tokenizer, self._room, self._kwargs, self._context = name, tokenizer, room, kwargs, context

    def lengths_of_suspects(self, prompts: Sequence[list[dict] | str]) -> Iterator[tuple[int, int]]:
        """
        Number, from 1, and tokens of each prompt that has to be written to know that it can be, and is not too long. Of
        what is far too long, the tokens of its beginning.
        """
        if not isinstance(prompts[0], str) and self._tokenizer.chat_template is None:
            raise UserError(
                f"The prompts of `{self._name}` are conversations, and the tokenizer of `{self._tokenizer.name_or_path}` has no "
                "chat template: add one to the checkpoint, or use prompts that are plain strings."
            )
        suspects = []
        for number, prompt, text in self._suspects(prompts):
            if self._room is not None and len(text) > 64 * self._room:  # of megabytes the beginning says enough
                try:
                    length = len(self._tokenizer(text=text[: 64 * self._room])["input_ids"])
                except Exception as error:
                    raise self._refusal(number, error) from None
                if length > self._room:
                    yield number, length
                    continue
            suspects.append((number, prompt))
            if len(suspects) == _AT_ONCE:
                yield from self._written(suspects)
                suspects = []
        yield from self._written(suspects)

    def _suspects(self, prompts: Iterable[list[dict] | str]) -> Iterator[tuple[int, list[dict] | str, str]]:
        """Number, prompt and text of each, the first of each order of roles among them, which is checked for what is left out."""
        orders, writes_all = set(), _can_write(self._tokenizer, "\N{SNOWMAN}")
        for number, prompt in enumerate(prompts, start=1):
            is_text = isinstance(prompt, str)
            order = "text" if is_text else tuple(message["role"] for message in prompt)
            text = prompt if is_text else "".join(message["content"] for message in prompt)
            # No more tokens than bytes, and what a template adds is small beside them
            may_be_too_long = self._room is not None and 2 * len(text.encode("utf-8", "replace")) > self._room
            if order in orders and writes_all and not may_be_too_long:
                continue
            if order not in orders and not is_text:
                self._check_roles(number, prompt)
            orders.add(order)
            yield number, prompt, text

    def _check_roles(self, number: int, prompt: list[dict]) -> None:
        """Some templates know roles that others leave out without a word, and the message with them."""
        for role in dict.fromkeys(message["role"] for message in prompt):
            if role in ("system", "user", "assistant"):
                continue
            ways = [
                [{**message, "content": content} if message["role"] == role else message for message in prompt]
                for content in ("3", "4 4")
            ]
            try:
                written = write_all(self._tokenizer, ways, self._kwargs)
            except Exception:  # with the row itself it says why
                continue
            if written[0] == written[1]:
                raise UserError(
                    f"`{self._name}`, row {number}: the chat template of `{self._tokenizer.name_or_path}` leaves out what the "
                    f"role {role!r} says: give these messages a role that it writes, or take another model."
                )

    def _written(self, suspects: list[tuple[int, list[dict] | str]]) -> Iterator[tuple[int, int]]:
        for (number, _), ids in zip(suspects, self.ids(suspects), strict=True):
            yield number, len(ids)

    def ids(self, numbered: list[tuple[int, list[dict] | str]]) -> list[list[int]]:
        """Token ids of prompts, each with the number of its row."""
        if not numbered:
            return []
        try:
            return write_all(self._tokenizer, [prompt for _, prompt in numbered], self._kwargs)
        except Exception:  # of one of them: a template raises what it likes, and tokenizers an Exception and no more
            return [self._one(number, prompt) for number, prompt in numbered]

    def _one(self, number: int, prompt: list[dict] | str) -> list[int]:
        try:
            return write(self._tokenizer, prompt, self._kwargs)
        except Exception as error:
            raise self._refusal(number, error) from None

    def _refusal(self, number: int, error: Exception) -> UserError:
        inside, another = ("", "") if self._context is None else (f"in the context {self._context!r} ", "context or ")
        return UserError(
            f"`{self._name}`, row {number}: the tokenizer of `{self._tokenizer.name_or_path}` cannot write this `prompt` "
            f"{inside}({' '.join(str(error).split()):.200}): correct the row, or take another {another}model."
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
