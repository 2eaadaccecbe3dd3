"""Takes a smaller model out of a larger one: the same class, with fewer of each unit."""

import math
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .shapes import ModelShape, Sizes, axes


@dataclass
class Units:
    """
    Units of a model that are kept.

    Args:
        layers (`list[int]`):
            Layers, in order.
        hidden (`torch.Tensor`):
            Channels of the residual stream, in order.
        groups (`dict[int, torch.Tensor]`):
            For each kept layer the attention groups (key-value heads with their query heads), in order.
        neurons (`dict[int, torch.Tensor]`):
            For each kept layer the MLP neurons, in order.
        energy (`dict[str, float]`):
            For each norm of the residual width the share of its input's energy that lies in the kept channels.
    """

    layers: list[int]
    hidden: torch.Tensor
    groups: dict[int, torch.Tensor]
    neurons: dict[int, torch.Tensor]
    energy: dict[str, float]


@torch.no_grad()
def slice_model(model: PreTrainedModel, shape: ModelShape, units: Units) -> PreTrainedModel:
    """
    Makes the model that has only some units of another one.

    RMSNorm divides by a mean over channels, which is another one when there are fewer of them. So the weights of the
    norms are scaled by sqrt(energy kept × channels before / channels after), after which a kept channel comes out as
    large as before. Gemma multiplies its embeddings by sqrt(hidden size); that is undone in the same way.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to take from. It is left as it is.
        shape ([`ModelShape`]):
            Its shape.
        units ([`Units`]):
            Units to keep.

    Returns:
        [`~transformers.PreTrainedModel`]: Smaller model with weights of its own.
    """
    config, first = model.config, units.layers[0]
    sizes = Sizes(
        len(units.layers), len(units.hidden), len(units.groups[first]) * shape.group, len(units.neurons[first])
    )
    gemma = config.model_type.startswith("gemma")
    widening = math.sqrt(config.hidden_size / sizes.hidden_size)
    state = {}
    for name, weight in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        layer = int(layer[1]) if layer else None
        if layer is not None and layer not in units.layers:
            continue
        for axis, kind in enumerate(axes(name)):
            if kind == "hidden":
                kept = units.hidden
            elif kind == "mlp":
                kept = units.neurons[layer]
            elif kind in ("query", "kv"):
                heads = shape.group if kind == "query" else 1  # of a group, which lie beside each other
                width = heads * shape.head_dim
                kept = (units.groups[layer][:, None] * width + torch.arange(width)).flatten()
            else:
                continue
            weight = weight.index_select(axis, kept.to(weight.device))
        module = name.removesuffix(".weight")
        if module in units.energy and sizes.hidden_size < config.hidden_size:
            scale = math.sqrt(units.energy[module]) * widening
            if gemma and module == "model.norm" and config.tie_word_embeddings:
                scale /= widening  # the head is the embedding, which is scaled below
            weight = (1 + weight.float()) * scale - 1 if gemma else weight.float() * scale
        if gemma and name == "model.embed_tokens.weight":
            weight = weight.float() * widening
        if layer is not None:
            name = name.replace(f".layers.{layer}.", f".layers.{units.layers.index(layer)}.")
        state[name] = weight.to(model.dtype, copy=True)
    pruned = type(model).from_pretrained(
        None, config=shape.prune_config(sizes, units.layers), state_dict=state, dtype=model.dtype
    )
    pruned.generation_config = model.generation_config
    return pruned.to(model.device)
