"""How a model gets from its hidden states to its logits."""

import torch
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """
    What a model does to the output of its `lm_head`, under the names that the architectures give it.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.

    Returns:
        `tuple[float, float | None]`: Multiplier of the logits, and the soft-cap applied after it.
    """
    values = config.get_text_config().to_dict()
    softcap = values.get("final_logit_softcapping")
    # Cohere, Muse Glimmer and Falcon-H1 multiply
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if values.get(name) is not None:
            return values[name], softcap
    # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by
    if values.get("logits_scaling") is not None:
        scaling = values["logits_scaling"]
        return (scaling if values["model_type"] == "hyperclovax" else 1 / scaling), softcap
    return 1.0, softcap


def gather_head(parameter: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """
    Makes a parameter that FSDP2 shards whole, once, in place of once per tile.

    Args:
        parameter (`torch.Tensor`, *optional*):
            Weight or bias of an `lm_head`.
        dtype (`torch.dtype`):
            Type of the hidden states, in which a gathered parameter is kept.

    Returns:
        `torch.Tensor` or `None`: Plain tensor.
    """
    return parameter.full_tensor().to(dtype) if isinstance(parameter, DTensor) else parameter
