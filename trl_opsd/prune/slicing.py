"""Takes a smaller model out of a larger one: the same class, with fewer of each unit."""

import math
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .shapes import EXPERT_AXES, ModelShape, Sizes, axes


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
            For each kept layer the MLP neurons, in order; where there are experts those of each expert that is kept, of
            shape `(num_experts, intermediate_size)`.
        energy (`dict[str, float]`):
            For each norm of the residual width the share of its input's energy that lies in the kept channels.
        experts (`dict[int, torch.Tensor]`, *optional*):
            For each kept layer the experts, in order. `None` where there are none.
    """

    layers: list[int]
    hidden: torch.Tensor
    groups: dict[int, torch.Tensor]
    neurons: dict[int, torch.Tensor]
    energy: dict[str, float]
    experts: dict[int, torch.Tensor] | None = None


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
        len(units.layers),
        len(units.hidden),
        len(units.groups[first]) * shape.group,
        units.neurons[first].size(-1),
        None if units.experts is None else len(units.experts[first]),
    )
    gemma = config.model_type.startswith("gemma")
    widening = math.sqrt(config.hidden_size / sizes.hidden_size)
    state = {}
    for name, weight in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        layer = int(layer[1]) if layer else None
        if layer is not None and layer not in units.layers:
            continue
        weight = _cut(weight, name, layer, shape, units)
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


def _cut(weight: torch.Tensor, name: str, layer: int | None, shape: ModelShape, units: Units) -> torch.Tensor:
    """Takes out of a weight what lies between the units that are kept."""
    kinds = axes(name)
    if name.rpartition(".")[-1] in EXPERT_AXES:  # each expert has neurons of its own
        experts = weight[units.experts[layer].to(weight.device)]
        kinds, axis = ("rest", *kinds[1:]), kinds.index("gate_up" if "gate_up" in kinds else "mlp")
        rows = [_kept(kinds[axis], neurons, shape, units, layer) for neurons in units.neurons[layer]]
        parts = zip(experts, rows, strict=True)
        weight = torch.stack([part.index_select(axis - 1, kept.to(part.device)) for part, kept in parts])
        kinds = tuple("rest" if index == axis else kind for index, kind in enumerate(kinds))
    for axis, kind in enumerate(kinds):
        if kind not in ("rest", "vocab", "head"):
            neurons = None if layer is None else units.neurons[layer]
            weight = weight.index_select(axis, _kept(kind, neurons, shape, units, layer).to(weight.device))
    return weight


def _kept(kind: str, neurons: torch.Tensor | None, shape: ModelShape, units: Units, layer: int | None) -> torch.Tensor:
    """The indices along an axis that are kept."""
    if kind == "hidden":
        return units.hidden
    if kind == "expert":
        return units.experts[layer]
    if kind == "mlp":
        return neurons
    if kind == "gate_up":
        return torch.cat([neurons, shape.sizes.intermediate_size + neurons])
    heads = {"query": shape.group, "kv": 1}  # of a group, which lie beside each other
    if kind in heads:
        width = heads[kind] * shape.head_dim
        return (units.groups[layer][:, None] * width + torch.arange(width)).flatten()
    query, kv = (_kept(part, neurons, shape, units, layer) for part in heads)  # fused: queries, keys, values
    num_query = shape.sizes.num_attention_heads * shape.head_dim
    return torch.cat([query, num_query + kv, num_query + num_query // shape.group + kv])
