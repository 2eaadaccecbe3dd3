"""Pruning: what is counted, what is cut, what is kept, and how a mistake ends."""

import copy
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from trl_opsd.cli import UserError, parse
from trl_opsd.prune import ModelShape, PruneConfig, Sizes, Units, choose_layers, collect, slice_model
from trl_opsd.prune.__main__ import main
from trl_opsd.prune.importance import Rollout, choose_units, measure_nll, only_layers


ROOT = Path(__file__).parents[1]
COMMON = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    rms_norm_eps=1e-12,  # which counts for more where channels are fewer
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
WINDOW = dict(sliding_window=3)
# Every family, each with what sets it apart: biases, a head width of its own, layers of several types, its own scalings
FAMILIES = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True, head_dim=16),
    "qwen2": Qwen2Config(**COMMON, use_sliding_window=True, max_window_layers=3, **WINDOW),
    "qwen3": Qwen3Config(**COMMON, head_dim=16, attention_bias=True),
    "qwen3-tied": Qwen3Config(
        **COMMON, head_dim=12, tie_word_embeddings=True, use_sliding_window=True, max_window_layers=2, **WINDOW
    ),
    "mistral": MistralConfig(**COMMON, head_dim=12, **WINDOW),
    "gemma": GemmaConfig(**COMMON, head_dim=16),
    "gemma2": Gemma2Config(**COMMON, head_dim=16, **WINDOW),
    "gemma2-untied": Gemma2Config(**COMMON, head_dim=16, tie_word_embeddings=False, **WINDOW),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=16, sliding_window_pattern=2, **WINDOW),
    "smollm3": SmolLM3Config(**COMMON, no_rope_layers=[1, 1, 0, 1, 0], use_sliding_window=True, **WINDOW),
    "phi3": Phi3Config(**COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "phi4-mini": Phi3Config(
        **COMMON,
        tie_word_embeddings=True,
        original_max_position_embeddings=8,  # so that both of the factors below count
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [1.5, 2.0, 4.0],
        },
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
}
#: Types whose hidden size is bound to the heads.
BOUND = ("qwen2", "phi3")
families = pytest.mark.parametrize("family", FAMILIES)
# Sizes that suit every family: for Qwen2 and Phi-3 hidden size and heads are bound to each other
SMALLER = Sizes(num_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=20)


def sizes_of(family: str, **changes) -> Sizes:
    """`SMALLER`, with as many experts as there are, and some of them replaced."""
    experts = {"num_experts": 6} if family == "qwen3-moe" else {}
    return Sizes(**{**SMALLER.__dict__, **experts, **changes})


def down_proj(layer) -> torch.Tensor:
    """The weight, of shape `(..., hidden, neurons)`, in which the MLP of a layer writes; with experts theirs."""
    return layer.mlp.experts.down_proj if hasattr(layer.mlp, "experts") else layer.mlp.down_proj.weight


def build(family: str, seed: int = 0):
    torch.manual_seed(seed)
    eager = {"experts_implementation": "eager"} if family == "qwen3-moe" else {}  # which computes in float64 as well
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), **eager).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which hide much
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rollouts(number: int = 6, vocab: int = 50) -> list[Rollout]:
    torch.manual_seed(1)
    lengths = [(3 + i % 3, 4 + (5 * i) % 7) for i in range(number)]
    return [Rollout(*(torch.randint(2, vocab, (n,)).tolist() for n in pair)) for pair in lengths]


def tokens(rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def everything(model, **changes) -> Units:
    """Units that keep a model as it is, with some of them replaced."""
    config, sizes = model.config, ModelShape(model.config).sizes
    layers = changes.get("layers", list(range(config.num_hidden_layers)))
    neurons, experts = torch.arange(sizes.intermediate_size), None
    if sizes.num_experts is not None:
        neurons = neurons.expand(sizes.num_experts, -1)
        experts = {layer: torch.arange(sizes.num_experts) for layer in layers}
    whole = dict(
        layers=layers,
        hidden=torch.arange(config.hidden_size),
        groups={layer: torch.arange(config.num_key_value_heads) for layer in layers},
        neurons=dict.fromkeys(layers, neurons),
        energy={},
        experts=experts,
    )
    return Units(**{**whole, **changes})


def prune(model, sizes: Sizes, layers: list[int]):
    shape = ModelShape(model.config)
    with only_layers(model, layers):
        statistics = collect(model, shape, rollouts(100 if sizes.num_experts else 6), 20)  # enough for every expert
    return slice_model(model, shape, choose_units(statistics, sizes, shape, layers))


# What is counted


@families
def test_the_count_is_that_of_the_saved_model(tmp_path, family):
    model = build(family)
    shape = ModelShape(model.config)
    assert shape.parameters == model.num_parameters()
    smaller = sizes_of(family, **({"num_experts": 4} if family == "qwen3-moe" else {}))
    pruned = prune(model, smaller, [0, 2, 3])
    assert shape.count(smaller) == pruned.num_parameters()
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert sum(weight.numel() for weight in loaded.parameters()) == shape.count(smaller)
    torch.testing.assert_close(logits(loaded), logits(pruned), rtol=0, atol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["num_key_value_heads"] == 1


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    layers=st.integers(1, 40),
    group=st.integers(1, 8),
    groups=st.integers(1, 8),
    width=st.sampled_from([8, 16, 64]),
    times=st.integers(1, 5),
    mlp=st.integers(1, 3000),
    vocab=st.sampled_from([32, 1000, 50_000]),
    ratio=st.floats(0.02, 0.98),
)
def test_a_ratio_is_reached_or_the_nearest_one_named(family, layers, group, groups, width, times, mlp, vocab, ratio):
    base = FAMILIES[family]
    changes = dict(
        vocab_size=vocab,
        hidden_size=group * groups * width * (1 if base.model_type in BOUND else times),
        **{"moe_intermediate_size" if family == "qwen3-moe" else "intermediate_size": mlp},
        num_hidden_layers=layers,
        num_attention_heads=group * groups,
        num_key_value_heads=groups,
        **({} if base.model_type in BOUND else {"head_dim": width}),
    )
    values = {**base.to_dict(), **changes}
    for by_layer in ("layer_types", "no_rope_layers"):
        values.pop(by_layer, None)
    if family == "phi4-mini":  # whose factors are as many as the channels of a head
        values["rope_parameters"] = FAMILIES["phi3"].rope_parameters
    shape = ModelShape(type(base).from_dict(values))
    try:
        sizes = shape.search(ratio)
    except UserError as error:
        nearest = float(str(error).rstrip(".").rpartition(" ")[2])
        assert abs(nearest - ratio) > 0.0095, error  # it is rounded to three digits
        return
    shape.check(sizes)
    assert (group * groups) % sizes.num_attention_heads == 0
    config = shape.prune_config(sizes, list(range(sizes.num_layers)))  # which transformers checks as well
    with torch.device("meta"):
        left = AutoModelForCausalLM.from_config(config).num_parameters()
    assert abs(1 - left / shape.parameters - ratio) <= 0.01


def test_the_cut_is_shared():
    shape = ModelShape(
        Qwen3Config(
            vocab_size=1000,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
        )
    )
    for ratio in (0.25, 0.5, 0.75):
        sizes = shape.search(ratio)
        names = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        layers, hidden, heads, mlp = (getattr(sizes, name) / getattr(shape.sizes, name) for name in names)
        assert max(layers, mlp) < 1 and max(layers, mlp) <= min(hidden, heads), sizes


# What is cut


@families
def test_fewer_layers_are_the_kept_layers_run_by_hand(family):
    model, layers = build(family), [0, 2, 4]
    pruned = slice_model(model, ModelShape(model.config), everything(model, layers=layers))
    by_hand = build(family)
    by_hand.model.layers = torch.nn.ModuleList(by_hand.model.layers[layer] for layer in layers)
    # what a layer is, is read from the configuration by position
    values = by_hand.config.to_dict()
    by_hand.config.num_hidden_layers = len(layers)
    if "layer_types" in values:
        types = [values["layer_types"][layer] for layer in layers]
        object.__setattr__(by_hand.config, "layer_types", types)
        assert len(set(types)) == len(set(values["layer_types"])) or family.startswith("gemma")
        assert pruned.config.layer_types == types
        if "max_window_layers" in values:  # from which some engines tell what a layer is
            values = {**pruned.config.to_dict(), "layer_types": None}
            assert type(pruned.config).from_dict(values).layer_types == types
    torch.testing.assert_close(logits(pruned), logits(by_hand), rtol=0, atol=0)
    with only_layers(model, layers):
        torch.testing.assert_close(logits(pruned), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(model), logits(pruned))


@families
@pytest.mark.parametrize("unit", ["neurons", "groups", "hidden", "all"])
def test_units_without_importance_go_unnoticed(family, unit):
    model = build(family)
    shape = ModelShape(model.config)
    generator = torch.Generator().manual_seed(3)
    neurons, groups, hidden = (
        torch.randperm(size, generator=generator)[:dead] for size, dead in ((48, 28), (2, 1), (32, 16))
    )
    sizes = dict(sizes_of(family).__dict__, num_layers=5)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if unit in ("neurons", "all"):
                down_proj(layer)[..., neurons] = 0
            if unit in ("groups", "all"):
                width = shape.group * shape.head_dim
                attention.o_proj.weight.view(32, 2, width)[:, groups] = 0
            if unit in ("hidden", "all"):
                for weight in (attention.o_proj.weight, down_proj(layer)):
                    weight[..., hidden, :] = 0
                for module in layer.modules():
                    if (
                        getattr(module, "bias", None) is not None
                        and len(module.bias) == 32
                        and len(module.weight) == 32
                    ):
                        module.bias[hidden] = 0
        if unit in ("hidden", "all"):
            model.model.embed_tokens.weight[:, hidden] = 0
    if unit == "neurons":
        sizes.update(hidden_size=32, num_attention_heads=4)
    elif unit == "groups":
        sizes.update(hidden_size=32, intermediate_size=48)
    elif unit == "hidden":
        sizes.update(num_attention_heads=4, intermediate_size=48)
    pruned = prune(model, Sizes(**sizes), list(range(5))) if fits(shape, sizes) else None
    if pruned is not None:
        torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-4, atol=1e-4)


def fits(shape: ModelShape, sizes: dict[str, int]) -> bool:
    try:
        shape.check(Sizes(**sizes))
    except UserError:
        assert shape.config.model_type in BOUND  # the only ones that such sizes do not suit
        return False
    return True


def test_a_dead_group_is_found_where_its_heads_cancel():
    """Two heads that write opposite things add nothing, though each of their channels has energy."""
    model = build("qwen3")
    shape = ModelShape(model.config)
    with torch.no_grad():
        for layer in model.model.layers:
            query = layer.self_attn.q_proj
            query.weight[16:32], query.bias[16:32] = query.weight[:16], query.bias[:16]
            layer.self_attn.o_proj.weight[:, 16:32] = -layer.self_attn.o_proj.weight[:, :16]
    statistics = collect(model, shape, rollouts(), 4)
    for importance in statistics.groups.values():
        assert importance[0] < 1e-6 * importance[1]


@families
def test_key_value_heads_stay_with_their_query_heads(family):
    """The groups are put into another order, by hand: the function is the same, and so must be what is cut."""
    model, shape = build(family), ModelShape(FAMILIES[family])
    swapped = build(family)
    width = shape.head_dim
    with torch.no_grad():
        for layer in swapped.model.layers:
            attention = layer.self_attn
            if family.startswith("phi"):
                parts = list(attention.qkv_proj.weight.split([4 * width, 2 * width, 2 * width]))
            else:
                parts = [p for m in (attention.q_proj, attention.k_proj, attention.v_proj) for p in m.parameters()]
            for parameter in parts:
                parameter.copy_(parameter.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
            output = attention.o_proj.weight
            output.copy_(output.unflatten(1, (2, shape.group * width)).flip(1).flatten(1, 2))
    torch.testing.assert_close(logits(swapped), logits(model), rtol=1e-4, atol=1e-4)
    for kept in (0, 1):
        first, second = (
            everything(model, groups={layer: torch.tensor([group]) for layer in range(5)})
            for group in (kept, 1 - kept)
        )
        if shape.config.model_type in BOUND:  # its heads cannot go without channels
            first.hidden = second.hidden = torch.arange(16)
            first.energy = second.energy = {}
        torch.testing.assert_close(
            logits(slice_model(swapped, shape, second)), logits(slice_model(model, shape, first)), rtol=1e-4, atol=1e-4
        )
    # by hand, for one of them: the layer's output is what the first group's heads write
    if shape.config.model_type not in BOUND:
        muted = build(family)
        with torch.no_grad():
            for layer in muted.model.layers:
                layer.self_attn.o_proj.weight.view(32, 2, -1)[:, 1] = 0
        first = everything(model, groups={layer: torch.tensor([0]) for layer in range(5)})
        torch.testing.assert_close(logits(slice_model(model, shape, first)), logits(muted), rtol=1e-4, atol=1e-4)


# Experts


def test_fewer_experts_are_the_router_restricted_to_them():
    """The router's logits of the others are taken away by hand, in each layer others."""
    model = build("qwen3-moe")
    kept = {layer: torch.tensor([layer % 3, 3, 5]) for layer in range(5)}
    neurons = torch.arange(48).expand(3, -1)
    pruned = slice_model(
        model, ModelShape(model.config), everything(model, experts=kept, neurons=dict.fromkeys(range(5), neurons))
    )
    assert pruned.config.num_experts == 3 and pruned.model.layers[0].mlp.gate.weight.shape[0] == 3
    for layer, module in enumerate(model.model.layers):
        gate = module.mlp.gate

        def restricted(states, gate=gate, kept=kept[layer]):
            logits = linear(states, gate.weight)
            others = torch.ones(6, dtype=torch.bool).index_fill(0, kept, False)
            probabilities = logits.masked_fill(others, -torch.inf).softmax(-1)
            values, indices = probabilities.topk(2, dim=-1)
            return logits, values / values.sum(-1, keepdim=True), indices

        gate.forward = restricted
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-5)


def test_experts_and_their_neurons_that_add_nothing_go_unnoticed(tmp_path):
    """Two experts that no token is sent to, and in each expert other neurons that nothing reads."""
    model = build("qwen3-moe")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5.0  # one channel that is as large everywhere, for the router
        for number, layer in enumerate(model.model.layers):
            for weight in (layer.self_attn.o_proj.weight, down_proj(layer)):
                weight[..., 0, :] = 0
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight[:, 0] = 0
            layer.mlp.gate.weight[[number % 6, (number + 2) % 6], 0] = -100.0
            for expert in down_proj(layer):
                expert[:, torch.randperm(48, generator=generator)[:28]] = 0
    pruned = prune(
        model, sizes_of("qwen3-moe", num_layers=5, hidden_size=32, num_attention_heads=4, num_experts=4), [*range(5)]
    )
    assert pruned.num_parameters() < 0.5 * model.num_parameters()
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-4, atol=1e-4)
    pruned.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(pruned), rtol=0, atol=0
    )


@torch.no_grad()
def test_the_importance_of_experts_is_what_the_definition_says():
    """Every expert, and a neuron, is taken out by hand, and what the layer puts out less is squared and averaged."""
    model = build("qwen3-moe").double()
    data = rollouts()
    statistics = collect(model, ModelShape(model.config), data, 4)
    experts = model.model.layers[2].mlp.experts
    calls = []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    for rollout in data:  # one at a time, so nothing is padded
        model(input_ids=torch.tensor([rollout.prompt_ids + rollout.completion_ids]))
    handle.remove()
    states, chosen, scales = (torch.cat(part) for part in zip(*calls, strict=True))

    def less(change):
        down = experts.down_proj.clone()
        before = experts(states, chosen, scales)
        change(experts.down_proj)
        after = experts(states, chosen, scales)
        experts.down_proj.copy_(down)
        return (before - after).square().sum(-1).mean()

    whole = torch.stack([less(lambda down, number=number: down[number].zero_()) for number in range(6)])
    torch.testing.assert_close(statistics.experts[2], whole, rtol=1e-5, atol=1e-12)
    neurons = torch.stack([less(lambda down, number=number: down[4, :, number].zero_()) for number in range(48)])
    torch.testing.assert_close(statistics.neurons[2][4], neurons, rtol=1e-5, atol=1e-12)
    readers = 5 * (3 + 1 + 1) + 1  # q, k, v, router and experts of five layers, and the head
    assert statistics.hidden.sum().item() == pytest.approx(readers)


def test_a_ratio_of_experts_leaves_the_rest():
    shape = ModelShape(Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, head_dim=128))
    sizes = shape.search(0.5)
    assert sizes.num_experts == 61 and replace(sizes, num_experts=128) == shape.sizes
    assert abs(1 - shape.count(sizes) / shape.parameters - 0.5) < 0.01
    # one of the others is yours to set
    assert shape.explicit(intermediate_size=384, num_experts=64).num_layers == 48


# Sizes that serve


@pytest.mark.parametrize("multiple", [32, 256])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.5, 0.6, 0.75])
def test_sizes_stay_multiples_of_a_block(ratio, multiple):
    """Those of Qwen3-1.7B and SmolLM2-135M, whose hidden size of 576 is a multiple of 32, and of 256 nothing."""
    large = Qwen3Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    small = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    for config, blocks in ((large, (multiple, multiple)), (small, (32, multiple))):
        shape = ModelShape(config)
        try:
            sizes = shape.search(ratio, multiple)
        except UserError as error:
            assert multiple == 256 and "is not reachable" in str(error)
            continue
        assert (sizes.hidden_size % blocks[0], sizes.intermediate_size % blocks[1]) == (0, 0)
        assert abs(1 - shape.count(sizes) / shape.parameters - ratio) <= 0.01


def test_the_model_is_left_as_it_was():
    model = build("gemma2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pruned = prune(model, SMALLER, [0, 2, 3])
    with torch.no_grad():
        for weight in pruned.parameters():
            weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


# What is kept


@torch.no_grad()
def test_importance_is_what_the_definition_says():
    """Every unit is taken out by hand, one at a time, and what its reader puts out less is squared and averaged."""
    model = build("llama").double()
    shape, data = ModelShape(model.config), rollouts()
    statistics, nll_of_batches = collect(model, shape, data, 4), measure_nll(model, data, 4)
    seen = {}
    layer = model.model.layers[2]
    for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "input_layernorm"):
        module = layer.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    layer.register_forward_hook(lambda _, args, out: seen.setdefault("layer", []).append((args[0][0], out[0])))
    nll, number = 0.0, 0
    for rollout in data:  # one at a time, so nothing is padded
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(len(rollout.prompt_ids), ids.size(1)):
            nll -= log_probs[position - 1, ids[0, position]].item()
            number += 1
    assert statistics.nll == pytest.approx(nll / number, rel=1e-5)
    assert nll_of_batches == pytest.approx(nll / number, rel=1e-5)
    before, after = (torch.cat(states) for states in zip(*seen.pop("layer"), strict=True))
    inputs = {name: torch.cat(rows) for name, rows in seen.items()}
    neurons = [
        (inputs["mlp.down_proj"][:, [j]] @ layer.mlp.down_proj.weight[:, [j]].T).square().sum(-1).mean()
        for j in range(48)
    ]
    torch.testing.assert_close(statistics.neurons[2], torch.stack(neurons), rtol=1e-5, atol=0)
    out = layer.self_attn.o_proj.weight
    groups = [
        (inputs["self_attn.o_proj"][:, 16 * g : 16 * g + 16] @ out[:, 16 * g : 16 * g + 16].T).square().sum(-1).mean()
        for g in range(2)
    ]
    torch.testing.assert_close(statistics.groups[2], torch.stack(groups), rtol=1e-5, atol=0)
    energy = inputs["input_layernorm"].square().mean(0)
    torch.testing.assert_close(statistics.energy["model.layers.2.input_layernorm"], energy, rtol=1e-5, atol=0)
    turn = 1 - (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
    assert statistics.block_influence[2] == pytest.approx(turn.mean().item(), rel=1e-4)
    readers = 5 * 5 + 1  # q, k, v, gate and up of five layers, and the head: each gives shares that sum to one
    assert statistics.hidden.sum().item() == pytest.approx(readers)


@families
def test_what_matters_by_design_is_kept(family):
    model = build(family)
    shape = ModelShape(model.config)
    with torch.no_grad():
        for layer in model.model.layers:
            down_proj(layer)[..., ::3] *= 1000
            layer.self_attn.o_proj.weight.view(32, 2, -1)[:, 1] *= 30
        model.model.embed_tokens.weight[:, 10:26] *= 30
    with only_layers(model, [0, 2, 4]):
        statistics = collect(model, shape, rollouts(100 if family == "qwen3-moe" else 6), 20)
    units = choose_units(statistics, sizes_of(family, intermediate_size=16), shape, [0, 2, 4])
    for layer in (0, 2, 4):
        neurons = units.neurons[layer]
        if family == "qwen3-moe":
            neurons = neurons[statistics.experts[layer] > 0]  # of an expert without tokens nothing is known
        assert neurons.numel() and (neurons == torch.arange(0, 48, 3)).all()
        assert units.groups[layer].tolist() == [1]
    assert set(units.neurons) == {0, 2, 4}


@pytest.mark.parametrize("importance", ["loss", "block_influence"])
def test_layers_that_do_nothing_are_the_first_to_go(importance):
    model = build("qwen3")
    with torch.no_grad():
        for layer in (1, 3):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(0.001 * layer)
            model.model.layers[layer].mlp.down_proj.weight.mul_(0.001 * layer)
    with torch.no_grad():  # rollouts of its own, which removing a layer makes less likely
        ids = model.generate(input_ids=tokens(16, 4), max_new_tokens=16, do_sample=False, eos_token_id=None)
    data = [Rollout(row[:4], row[4:]) for row in ids.tolist()]
    statistics = collect(model, ModelShape(model.config), data, 8)
    assert choose_layers(model, statistics, 3, importance, data, 8) == [0, 2, 4]
    assert len(choose_layers(model, statistics, 1, importance, data, 8)) == 1


def test_loss_is_greedy():
    model, data = build("llama"), rollouts()
    shape = ModelShape(model.config)
    kept = list(range(5))
    for number in (4, 3, 2):
        kept = min(
            ([other for other in kept if other != layer] for layer in kept),
            key=lambda layers: measure_nll(slice_model(model, shape, everything(model, layers=layers)), data, 8),
        )
        assert choose_layers(model, collect(model, shape, data, 8), number, "loss", data, 8) == kept


# The command line


@pytest.fixture
def recipe(tmp_path, checkpoint, rows):
    """Writes a recipe for a small model and returns its arguments, after the given changes."""

    def write(**changes) -> list[str]:
        data = tmp_path / "train.jsonl"
        if not data.exists():
            rows.to_json(data)
        config = {
            "model_name_or_path": checkpoint(num_layers=4),
            "calibration_dataset": str(data),
            "calibration_samples": 8,
            "max_completion_length": 8,
            "output_dir": str(tmp_path / "out"),
            "target_ratio": 0.5,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return ["--config", str(path)]

    return write


def test_a_run_leaves_an_ordinary_checkpoint(tmp_path, recipe, checkpoint, rows):
    source = Path(checkpoint(num_layers=4))
    main(recipe())
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    (row,) = json.loads((out / "prune.json").read_text())["rows"]
    before = AutoModelForCausalLM.from_pretrained(source).num_parameters()
    assert row["parameters_before"] == before and row["parameters"] == model.num_parameters()
    assert abs(1 - model.num_parameters() / before - 0.5) <= 0.01
    assert row["ratio"] == 1 - model.num_parameters() / before and row["ratio_asked"] == 0.5
    assert len(row["layers"]) == model.config.num_hidden_layers
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert (
        GenerationConfig.from_pretrained(out).do_sample is GenerationConfig.from_pretrained(source).do_sample is True
    )
    assert not list(out.glob(".*"))
    ids = AutoTokenizer.from_pretrained(out).apply_chat_template(rows["prompt"][0], return_tensors="pt")["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=4).shape[1] > ids.shape[1]


def test_explicit_sizes(tmp_path, recipe):
    options = {"num_layers": 2, "intermediate_size": 30, "layer_importance": "block_influence"}
    main(recipe(target_ratio=None, **options))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["hidden_size"]) == (2, 30, 32)


def test_rollouts_are_taken_as_they_are(tmp_path, recipe, rows, tokenizer):
    from trl_opsd.prune.calibration import load_calibration, make_rollouts
    from trl_opsd.rlvr.bank import RolloutBank, prompt_id
    from trl_opsd.rlvr.identity import Writer, hash_vocabulary

    completions = [[{"role": "assistant", "content": f"{i}=1"}] for i in range(4)]
    ids = [[*tokenizer(f"{i}=1")["input_ids"], tokenizer.eos_token_id] for i in range(4)]
    prompts = rows["prompt"][:4]
    bank = RolloutBank(tmp_path / "bank", 1, Writer("me", "1" * 64, hash_vocabulary(tokenizer)))
    rollout = [
        {"prompt": p, "completion": c, "prompt_id": prompt_id(p), "completion_ids": i, "reward": 1.0}
        for p, c, i in zip(prompts, completions, ids, strict=True)
    ]
    bank.add(0, rollout, {})
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n" for row in rollout)
    )
    expected = [
        (tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"], i)
        for p, i in zip(prompts, ids, strict=True)
    ]
    for source in (tmp_path / "bank", text):
        config = PruneConfig(output_dir="out", target_ratio=0.5, calibration_dataset=str(source))
        made = make_rollouts(config, load_calibration(config), None, tokenizer)  # no model is asked
        assert sorted((row.prompt_ids, row.completion_ids) for row in made) == sorted(expected)


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_text_that_the_tokenizer_cannot_write_ends_it_first(
    tmp_path, recipe, rows, checkpoint, monkeypatch, capsys, column
):
    arguments, data = recipe(), tmp_path / "train.jsonl"
    given = [{**row, "completion": "5"} for row in rows]
    bad = {"prompt": [{"role": "user", "content": "Janet’s ducks"}], "completion": "Janet’s ducks"}
    given.append({**given[0], column: bad[column]})
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    monkeypatch.setattr("trl_opsd.prune.run.AutoModelForCausalLM", None)  # no model is loaded
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert f"row 65: the tokenizer of `{checkpoint(num_layers=4)}` cannot write this `{column}`" in error


def test_prompts_are_completed_by_the_model(recipe, rows, tokenizer, small_model):
    from trl_opsd.prune.calibration import make_rollouts

    config = PruneConfig(
        output_dir="out", target_ratio=0.5, calibration_dataset="-", max_completion_length=40, batch_size=5
    )
    model = small_model().eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[[3, 4, tokenizer.eos_token_id]] = 0
    made = make_rollouts(config, rows.select(range(12)), model, tokenizer)
    counts = Counter(token for row in made for token in row.completion_ids)
    assert len(counts) > 20  # a model without a preference: drawn from the whole vocabulary
    for row in made:
        assert tokenizer.eos_token_id not in row.completion_ids[:-1]
        assert row.completion_ids[-1] == tokenizer.eos_token_id or len(row.completion_ids) == 40
    assert any(row.completion_ids[-1] == tokenizer.eos_token_id for row in made)
    again = make_rollouts(config, rows.select(range(12)), model, tokenizer)
    assert [row.completion_ids for row in again] == [row.completion_ids for row in made]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"target_ratio": 0.0},
            "`target_ratio` is the share of the parameters to remove, above 0 and below 1, and is 0",
        ),
        ({"target_ratio": 1.0}, "above 0 and below 1"),
        ({"target_ratio": None}, "Nothing to prune: set `target_ratio`"),
        ({"num_layers": 2}, "`target_ratio` chooses the sizes, so it cannot go with num_layers"),
        (
            {"model_name_or_path": "{tmp}/bound", "target_ratio": 0.98},
            "`target_ratio` 0.98 is not reachable to within 0.01: the nearest share of the parameters that can be "
            "removed is 0.",
        ),
        ({"target_ratio": None, "num_layers": 5}, "`num_layers` is 5, and the model has only 4"),
        ({"target_ratio": None, "hidden_size": 33}, "`hidden_size` is 33, and the model has only 32"),
        ({"target_ratio": None, "intermediate_size": 0}, "recipe.yaml must be at least 1, and is 0"),
        ({"target_ratio": None, "num_attention_heads": 1}, "groups of 2 that share a key-value head"),
        ({"layer_importance": "los"}, "which is none of its values"),
        ({"calibration_dataset": None}, "`calibration_dataset` is missing"),
        ({"calibration_dataset": "{tmp}/gone.jsonl"}, "There is no data at `{tmp}/gone.jsonl`"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"model_name_or_path": "{tmp}/nowhere"}, "there is no folder `{tmp}/nowhere`"),
        (
            {"model_name_or_path": "{tmp}/moe"},
            "Models of type `mixtral` cannot be pruned: the types that can are llama, qwen2, qwen3, mistral, gemma, gemma2, "
            "gemma3_text, smollm3, phi3, qwen3_moe (Llama 2 and 3, ",
        ),
        ({"model_name_or_path": "{tmp}/mixed"}, "in which only some layers have experts cannot be pruned"),
        ({"target_ratio": None, "num_experts": 2}, "`num_experts` is 2, and a model of type `qwen3` has none"),
        (
            {"model_name_or_path": "{tmp}/experts", "target_ratio": None, "num_experts": 1},
            "`num_experts` is 1, and a token takes 2: raise it",
        ),
        (
            {"model_name_or_path": "{tmp}/experts", "target_ratio": 0.9},
            "`target_ratio` 0.9 is not reachable to within 0.01 by removing experts alone: the nearest",
        ),
        ({"size_multiple": 48}, "is 48, which is none of its values: it takes 32, 64, 128, 256."),
        ({"model_name_or_path": "{tmp}/quantised"}, "A quantised model cannot be pruned"),
        ({"output_dir": None}, "`output_dir` is missing"),
        ({"output_dir": "{model}"}, "`output_dir` is the checkpoint that is to be pruned"),
        ({"batch_size": 0}, "recipe.yaml must be at least 1, and is 0"),
        ({"target_ratoi": 0.5}, "did you mean `target_ratio`?"),
        ({"device": "cuda:99"}, "`device`: this machine has no `cuda:99`"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, recipe, checkpoint, monkeypatch, capsys, changes, message):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    for name, config in (
        ("moe", MixtralConfig(num_hidden_layers=1)),
        ("mixed", Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[1])),
        ("experts", FAMILIES["qwen3-moe"]),
        ("bound", FAMILIES["qwen2"]),  # whose hidden size goes with its heads, so with whole groups
        ("quantised", Qwen3Config(num_hidden_layers=1, quantization_config={"quant_method": "fp8"})),
    ):
        config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").touch()
    arguments = {"tmp": str(tmp_path), "model": checkpoint(num_layers=4)}
    fill = lambda value: value.format(**arguments) if isinstance(value, str) else value  # noqa: E731
    args = recipe(**{key: fill(value) for key, value in changes.items()})
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and fill(message) in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_hidden_size_and_heads_that_do_not_suit(family):
    with pytest.raises(UserError, match="`hidden_size` is (18|24), and in a model of type"):
        ModelShape(FAMILIES[family]).explicit(hidden_size=18 if family == "llama" else 24)


@pytest.mark.parametrize("name", ["recipes/prune.yaml", "recipes/tiny/prune.yaml"])
def test_the_recipes_parse(name):
    (config,) = parse((PruneConfig,), ["--config", str(ROOT / name)])
    assert config.target_ratio == 0.5 and config.model_name_or_path


@pytest.mark.slow
def test_a_real_model_is_halved_and_takes_a_step(tmp_path):
    """SmolLM2-135M: made, pruned, and trained for one step by its teacher, in less than 3 GiB each."""
    prompts = [f"What is {a} + {a + 3}?" for a in range(2, 18)]
    rows = [{"prompt": [{"role": "user", "content": prompt}], "answer": "0"} for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(["scripts/smollm2.py", "--output_dir", tmp_path / "smollm2"])
    run(
        ["-m", "trl_opsd.prune", "--model_name_or_path", tmp_path / "smollm2", "--output_dir", tmp_path / "half"]
        + ["--target_ratio", 0.5, "--calibration_dataset", tmp_path / "prompts.jsonl"]
        + ["--max_completion_length", 32, "--batch_size", 16]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert abs(model.num_parameters() / 134_515_008 - 0.5) <= 0.01
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half")
    inputs = tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=8).shape[1] > inputs["input_ids"].shape[1]
    run(
        ["-m", "trl_opsd.opsd", "--model_name_or_path", tmp_path / "half", "--output_dir", tmp_path / "opsd"]
        + ["--teacher_model_name_or_path", tmp_path / "smollm2", "--dataset_name", tmp_path / "prompts.jsonl"]
        + ["--reward_funcs", "math_reward", "--gate", "all", "--per_device_train_batch_size", 4, "--max_steps", 1]
        + ["--max_completion_length", 32, "--learning_rate", 1e-5, "--use_cpu", "true", "--bf16", "false"]
        + ["--gradient_checkpointing", "false", "--report_to", "none", "--save_strategy", "no"]
    )
    (step,) = (row for row in json.loads((tmp_path / "opsd" / "opsd.json").read_text())["rows"] if "opsd/kl" in row)
    assert step["opsd/kept"] == 1 and 0 < step["opsd/kl"] < 20
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "opsd")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * 2**20  # KiB, of the largest


def run(arguments: list) -> None:
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
