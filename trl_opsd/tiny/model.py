"""A Qwen3 model small enough for one CPU core."""

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from .task import TinyConfig


def make_model(
    config: TinyConfig, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int = 512
) -> Qwen3ForCausalLM:
    """
    Builds an untrained model.

    Args:
        config ([`TinyConfig`]):
            Its sizes; another configuration with the same fields will do.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its vocabulary.
        seed (`int`):
            Seed of the weights.
        max_length (`int`, *optional*, defaults to `512`):
            Positions that it has.

    Returns:
        [`~transformers.Qwen3ForCausalLM`]: In float32.
    """
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=max_length,
        tie_word_embeddings=config.tie_word_embeddings,
        # The 0.02 of large models leaves so narrow a one at a plateau for longer.
        initializer_range=config.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(architecture)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
