"""How long a text a model can read."""

from transformers import PreTrainedConfig


def positions_of(config: PreTrainedConfig) -> int | None:
    """
    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a model.

    Returns:
        `int` or `None`: How many positions it has, or `None` where nothing limits them, as of state space models and ALiBi.
    """
    config = config.get_text_config()
    # An attribute and not a key, because configurations have it under other names too (`n_positions`)
    positions, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    # Llama 3 scales frequencies, and its length is the one that it declares: the product is twice that of Llama 3.2
    if positions is None or "factor" not in rope or rope.get("rope_type") == "llama3":
        return positions
    # What is scaled is as long as it says: some configurations keep the number that there were before, and others the product
    return max(positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions)))
