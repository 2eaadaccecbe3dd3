"""A byte-level BPE tokenizer that is trained on the small reasoner's own texts, with a token for each digit."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..tiny.tokenizer import END, PAD, START, with_chat_template


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains the tokenizer.

    Args:
        texts (`Iterable[str]`):
            What it learns from.
        vocab_size (`int`):
            Most tokens that it has.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: With the special tokens and the chat template of the tiny reasoner's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_chat_template(tokenizer)
