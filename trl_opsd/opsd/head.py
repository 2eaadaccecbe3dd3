"""How a model gets from its hidden states to its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx, selective_log_softmax


@dataclass
class Head:
    """
    What a model does to its last hidden states.

    Args:
        weight (`torch.Tensor`):
            Weight of the `lm_head`, of shape `(V, H)`.
        bias (`torch.Tensor`, *optional*):
            Its bias, of shape `(V,)`.
        logit_scale (`float`):
            Multiplier of the logits.
        softcap (`float`, *optional*):
            Soft-cap of the logits, applied after it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of a model as it is now: with an adapter, that of the active one."""
        embeddings = model.get_output_embeddings()
        return cls(embeddings.weight, embeddings.bias, *logit_transform(model.config))

    @contextmanager
    def gathered(self, dtype: torch.dtype) -> Iterator["Head"]:
        """
        The head with whole parameters, where FSDP2 or ZeRO-3 shard them.

        Args:
            dtype (`torch.dtype`):
                Type of the hidden states, in which a parameter that FSDP2 shards is kept.
        """
        # ZeRO-3 gathers a parameter in the forward of its own module, which the loss does not go through
        with maybe_gather_lm_head_ctx(self.weight, self.bias):
            yield replace(self, weight=gather_head(self.weight, dtype), bias=gather_head(self.bias, dtype))

    @torch.no_grad()
    def log_probs(self, hidden: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        """
        Log-probabilities of given tokens, over the whole vocabulary, as the model's own forward would give them.

        Args:
            hidden (`torch.Tensor`):
                Last hidden states, of shape `(N, H)`.
            ids (`torch.Tensor`):
                A token for each, of shape `(N,)`.
            temperature (`float`):
                What the logits are divided by.

        Returns:
            `torch.Tensor`: In nats, of shape `(N,)`, float32.
        """
        weight = self.weight.to(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        found = []
        for states, tokens in zip(hidden.split(256), ids.split(256), strict=True):  # not the logits of all at once
            logits = functional.linear(states, weight, bias).float() * self.logit_scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            found.append(selective_log_softmax(logits / temperature, tokens))
        return torch.cat(found)


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
