"""Which units of a model matter, measured on rollouts."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .shapes import AXES, ModelShape, Sizes
from .slicing import Units


_READERS = [name for name, axes in AXES.items() if axes[1:] == ("hidden",) and name != "embed_tokens"]


@dataclass
class Rollout:
    """
    A prompt and what a model made of it.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        completion_ids (`list[int]`):
            Token ids of the completion.
    """

    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass
class Statistics:
    """
    What rollouts say of the units of a model. A unit's importance is the mean square of what it adds to the output of
    the weight that reads it, so that one without any can go unnoticed.

    Args:
        nll (`float`):
            Mean negative log-likelihood of a completion token, in nats.
        block_influence (`dict[int, float]`):
            For each layer 1 - cos of its input and output, between 0 and 2
            (https://huggingface.co/papers/2403.03853).
        neurons (`dict[int, torch.Tensor]`):
            For each layer the importance of its MLP neurons.
        groups (`dict[int, torch.Tensor]`):
            For each layer the importance of its attention groups.
        experts (`dict[int, torch.Tensor]`):
            For each layer the importance of its experts, where it has some; `neurons` are then of shape
            `(num_experts, intermediate_size)`. What an expert adds counts with the router's weight, and as nothing for the
            tokens that are not sent to it.
        hidden (`torch.Tensor`):
            Importance of the channels of the residual stream: the share that each has of what a weight reads, summed
            over the weights that read them.
        energy (`dict[str, torch.Tensor]`):
            For each norm of the residual width the mean square of its input's channels.
    """

    nll: float = 0.0
    block_influence: dict[int, float] = field(default_factory=dict)
    neurons: dict[int, torch.Tensor] = field(default_factory=dict)
    groups: dict[int, torch.Tensor] = field(default_factory=dict)
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
    energy: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def collect(model: PreTrainedModel, shape: ModelShape, rollouts: list[Rollout], batch_size: int) -> Statistics:
    """
    Runs a model over rollouts and gathers what they say of its units.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        shape ([`ModelShape`]):
            Its shape.
        rollouts (`list[Rollout]`):
            Rollouts of it.
        batch_size (`int`):
            Number of rollouts in a forward pass.

    Returns:
        [`Statistics`]: Over all tokens, except for `nll`, which is over those of the completions.
    """
    squares: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    influence: dict[int, float] = defaultdict(float)
    real: torch.Tensor  # of the batch that is running: which positions are not padding

    def add(name: str, value: torch.Tensor) -> None:
        squares[name] = squares[name] + value.double().cpu()

    def states(args):
        # a router and experts see the positions of a batch in one row
        return args[0].flatten(0, -2)[real.flatten()].float()

    def square_input(name):
        return lambda module, args: add(name, states(args).square().sum(dim=0))

    def through_experts(name):
        def hook(module, args):
            positions = real.flatten()
            inputs, chosen, scales = (value[positions] for value in args)
            for number in range(module.num_experts):
                rows, place = (chosen == number).nonzero(as_tuple=True)
                gate, up = linear(inputs[rows], module.gate_up_proj[number]).chunk(2, dim=-1)
                neurons = module.act_fn(gate) * up * scales[rows, place, None]
                outputs = linear(neurons, module.down_proj[number])
                add(f"{name}.{number}.input", inputs[rows].float().square().sum(dim=0))
                add(f"{name}.{number}.neurons", neurons.float().square().sum(dim=0))
                add(f"{name}.{number}.output", outputs.float().square().sum())

        return hook

    def gram_input(name):
        # of the heads of a group with each other: their outputs may cancel, which single channels would not tell
        def hook(module, args):
            heads = args[0][real].float().unflatten(-1, (-1, shape.group * shape.head_dim))
            add(name, torch.einsum("ngi,ngj->gij", heads, heads))

        return hook

    def turn(layer):
        def hook(module, args, output):
            influence[layer] += (
                (1 - cosine_similarity(args[0][real].float(), output[real].float(), dim=-1)).sum().item()
            )

        return hook

    norms, readers, handles = [], [], []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[-1]
        if leaf == "o_proj":
            handles.append(module.register_forward_pre_hook(gram_input(name)))
        elif leaf == "experts":
            handles.append(module.register_forward_pre_hook(through_experts(name)))
        elif leaf == "down_proj":
            handles.append(module.register_forward_pre_hook(square_input(name)))
        elif leaf in _READERS:
            readers.append((name, module))
            handles.append(module.register_forward_pre_hook(square_input(name)))
        elif AXES.get(leaf) == ("hidden",):
            norms.append(name)
            handles.append(module.register_forward_pre_hook(square_input(name)))
    for layer, module in enumerate(model.model.layers):
        handles.append(module.register_forward_hook(turn(layer)))

    loss, tokens, completion_tokens = 0.0, 0, 0
    for input_ids, attention_mask, completion in _batches(model, rollouts, batch_size):
        real = attention_mask.bool()
        loss += _loss(model, input_ids, attention_mask, completion)
        tokens += int(real.sum())
        completion_tokens += int(completion.sum())
    for handle in handles:
        handle.remove()

    statistics, read_by_experts = Statistics(nll=loss / completion_tokens), []
    for layer, module in enumerate(model.model.layers):
        if f"model.layers.{layer}.self_attn.o_proj" not in squares:  # the layer is removed
            continue
        statistics.block_influence[layer] = influence[layer] / tokens
        mlp = f"model.layers.{layer}.mlp"
        if shape.sizes.num_experts is None:
            down = module.mlp.down_proj.weight.double().cpu()
            statistics.neurons[layer] = squares[f"{mlp}.down_proj"] * down.square().sum(dim=0) / tokens
        else:
            found = [
                [squares[f"{mlp}.experts.{number}.{what}"] for what in ("input", "neurons", "output")]
                for number in range(shape.sizes.num_experts)
            ]
            inputs, neurons, outputs = (torch.stack(part) for part in zip(*found, strict=True))
            down = module.mlp.experts.down_proj.double().cpu()
            statistics.neurons[layer] = neurons * down.square().sum(dim=1) / tokens
            statistics.experts[layer] = outputs / tokens
            into = module.mlp.experts.gate_up_proj.double().cpu()
            read_by_experts.append((inputs * into.square().sum(dim=1)).sum(dim=0))
        out = module.self_attn.o_proj.weight.double().cpu().unflatten(-1, (-1, shape.group * shape.head_dim))
        gram = squares[f"model.layers.{layer}.self_attn.o_proj"]
        statistics.groups[layer] = torch.einsum("hgi,gij,hgj->g", out, gram, out) / tokens
    statistics.hidden = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for name, module in readers:
        if name in squares:
            read = squares[name] * module.weight.double().cpu().square().sum(dim=0)
            statistics.hidden += read / read.sum()
    for read in read_by_experts:  # those of a layer are one reader
        statistics.hidden += read / read.sum()
    statistics.energy = {name: squares[name] / tokens for name in norms if name in squares}
    return statistics


@torch.no_grad()
def measure_nll(model: PreTrainedModel, rollouts: list[Rollout], batch_size: int) -> float:
    """
    Measures how unlikely a model finds completions.

    Of rollouts that the teacher sampled at temperature 1, a student's value minus the teacher's is an unbiased estimate
    of the forward KL divergence between the two.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        rollouts (`list[Rollout]`):
            Rollouts.
        batch_size (`int`):
            Number of rollouts in a forward pass.

    Returns:
        `float`: Mean negative log-likelihood of a completion token, in nats.
    """
    loss = sum(_loss(model, *batch) for batch in _batches(model, rollouts, batch_size))
    return loss / sum(len(rollout.completion_ids) for rollout in rollouts)


def choose_layers(
    model: PreTrainedModel,
    statistics: Statistics,
    num_layers: int,
    importance: str,
    rollouts: list[Rollout],
    batch_size: int,
) -> list[int]:
    """
    Chooses the layers to keep. They need not lie beside each other.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        statistics ([`Statistics`]):
            What [`collect`] found.
        num_layers (`int`):
            Number of layers to keep.
        importance (`str`):
            `"block_influence"` or `"loss"`, see [`PruneConfig`].
        rollouts (`list[Rollout]`):
            Rollouts, for `"loss"`.
        batch_size (`int`):
            Number of rollouts in a forward pass.

    Returns:
        `list[int]`: Layers, in order.
    """
    kept = list(range(len(model.model.layers)))
    if importance == "block_influence":
        return sorted(sorted(kept, key=statistics.block_influence.__getitem__, reverse=True)[:num_layers])
    while len(kept) > num_layers:
        losses = {}
        for layer in kept:
            with only_layers(model, [other for other in kept if other != layer]):
                losses[layer] = measure_nll(model, rollouts, batch_size)
        kept.remove(min(losses, key=losses.__getitem__))
    return kept


def choose_units(statistics: Statistics, sizes: Sizes, shape: ModelShape, layers: list[int]) -> Units:
    """
    Chooses the units to keep: the most important ones of each layer, and channels once for all layers.

    Args:
        statistics ([`Statistics`]):
            What [`collect`] found of the layers that are kept.
        sizes ([`Sizes`]):
            How many to keep.
        shape ([`ModelShape`]):
            Shape of the model.
        layers (`list[int]`):
            Layers that are kept.

    Returns:
        [`Units`]: Units to keep.
    """
    hidden = _largest(statistics.hidden, sizes.hidden_size)
    groups = sizes.num_attention_heads // shape.group
    neurons = statistics.neurons
    experts = None
    if sizes.num_experts is not None:
        experts = {layer: _largest(statistics.experts[layer], sizes.num_experts) for layer in layers}
        neurons = {layer: neurons[layer][experts[layer]] for layer in layers}
    return Units(
        layers=layers,
        hidden=hidden,
        groups={layer: _largest(statistics.groups[layer], groups) for layer in layers},
        neurons={layer: _largest(neurons[layer], sizes.intermediate_size) for layer in layers},
        experts=experts,
        energy={name: (values[hidden].sum() / values.sum()).item() for name, values in statistics.energy.items()},
    )


@contextmanager
def only_layers(model: PreTrainedModel, layers: list[int]) -> Iterator[None]:
    """
    Makes the other layers of a model return what they are given, inside the block.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        layers (`list[int]`):
            Layers that stay what they are.
    """
    removed = [module for layer, module in enumerate(model.model.layers) if layer not in layers]
    for module in removed:
        module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for module in removed:
            del module.forward  # what is left is the method of the class


def _largest(importance: torch.Tensor, number: int) -> torch.Tensor:
    return importance.topk(number).indices.sort().values


def _batches(
    model: PreTrainedModel, rollouts: list[Rollout], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields token ids, attention mask and which positions are those of a completion, shortest rollouts first."""
    order = sorted(rollouts, key=lambda rollout: len(rollout.prompt_ids) + len(rollout.completion_ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = [torch.tensor(row.prompt_ids + row.completion_ids) for row in rows]
        completion = [
            torch.arange(len(row)) >= len(rollout.prompt_ids) for row, rollout in zip(ids, rows, strict=True)
        ]
        columns = (ids, [torch.ones_like(row) for row in ids], completion)
        yield tuple(pad_sequence(column, batch_first=True).to(model.device) for column in columns)


def _loss(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion: torch.Tensor
) -> float:
    """Returns the negative log-likelihood of the completion tokens of a batch, in nats, summed."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    completion = completion[:, 1:]
    return cross_entropy(logits[completion].float(), input_ids[:, 1:][completion], reduction="sum").item()
