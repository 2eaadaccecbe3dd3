"""A tokenizer of some forty tokens: one per digit, sign, label and word of the task, and a ChatML template."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .task import LABELS


PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
WORDS = ["system", "user", "assistant", "concise", "brief", "answer", "solution"]
DIGITS = "0123456789"
MARKS = [". ", "? ", "\\boxed{", "}", "=", " ", "\n"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def make_tokenizer(num_labels: int = 8) -> PreTrainedTokenizerFast:
    """
    Builds the tokenizer. A label carries the space before it and the colon after it, so a step is five tokens.

    Text that is not of the task has no tokens and is an error.

    Args:
        num_labels (`int`, *optional*, defaults to `8`):
            Labels that it knows, which bounds the operations of a problem.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: With the special tokens and the chat template of [`with_chat_template`].
    """
    letters = LABELS[:num_labels]
    labels = [f" {label}:" for label in letters]
    operations = [op + digit for op in "+-*" for digit in DIGITS]
    tokens = [PAD, START, END, *WORDS, *MARKS, *labels, *DIGITS, *operations]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    pattern = "|".join([*WORDS, f" [{letters}]:", r"\. ", r"\? ", r"\\boxed\{", r"[+*-]\d", r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return with_chat_template(tokenizer)


def with_chat_template(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """
    A tokenizer as trainers take it.

    Args:
        tokenizer ([`~tokenizers.Tokenizer`]):
            Tokenizer that knows `PAD`, `START` and `END`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: With distinct padding and end tokens, and a chat template whose
        assistant turns are marked for `assistant_only_loss`.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
