"""What sizes a pruned model may have, how many parameters that makes, and which sizes make a given number of them."""

import math
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..cli import UserError


#: Axes of every weight of the supported families, by the module it belongs to. A bias has the first of them. What is
#: fused lies in one weight, one after the other: queries, keys and values, or the two projections into the MLP.
AXES = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("kv", "hidden"),
    "v_proj": ("kv", "hidden"),
    "qkv_proj": ("qkv", "hidden"),
    "o_proj": ("hidden", "query"),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "gate_proj": ("mlp", "hidden"),
    "up_proj": ("mlp", "hidden"),
    "gate_up_proj": ("gate_up", "hidden"),
    "down_proj": ("hidden", "mlp"),
    "gate": ("expert", "hidden"),  # the router
    "norm": ("hidden",),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "pre_feedforward_layernorm": ("hidden",),
    "post_feedforward_layernorm": ("hidden",),
}

#: Axes of the weights that hold all experts of a layer, which are parameters without a module of their own.
EXPERT_AXES = {"gate_up_proj": ("expert", "gate_up", "hidden"), "down_proj": ("expert", "hidden", "mlp")}

#: What a family asks of hidden size and heads: `"free"`; `"divides"`, transformers wants the number of heads to divide
#: the hidden size; or `"equal"`, vLLM, or the check of longrope, takes hidden size / heads for the width of a head.
FAMILIES = {
    "llama": "divides",
    "qwen2": "equal",
    "qwen3": "free",
    "mistral": "free",
    "gemma": "free",
    "gemma2": "divides",
    "gemma3_text": "divides",
    "smollm3": "free",
    "phi3": "equal",
    "qwen3_moe": "free",
}
#: As people know them.
_NAMES = (
    "Llama 2 and 3, SmolLM2 and 3, Qwen2, Qwen2.5 and 3, Qwen3-MoE, Mistral, Phi-3 and Phi-4-mini, Gemma 1 to 3 (text)"
)

#: Rows of so many weights are what most quantisers and kernels take, and converters leave others as they are.
BLOCK = 32
_TOLERANCE = 0.01
_WEIGHT = {"num_layers": 1, "hidden_size": 2, "num_attention_heads": 2, "intermediate_size": 1}


def axes(name: str) -> tuple[str, ...]:
    """Returns the axes of a parameter, by its name in the model."""
    module, kind = name.split(".")[-2:]
    if module == "experts":
        return EXPERT_AXES[kind]
    return AXES[module][:1] if kind == "bias" else AXES[module]


@dataclass(frozen=True)
class Sizes:
    """
    Sizes of a model.

    Args:
        num_layers (`int`):
            Number of layers.
        hidden_size (`int`):
            Width of the residual stream.
        num_attention_heads (`int`):
            Number of query heads.
        intermediate_size (`int`):
            Width of the MLP, of an expert where there are experts.
        num_experts (`int` or `None`):
            Number of experts of a layer. `None` where there are none.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    num_experts: int | None = None


class ModelShape:
    """
    Shape of a model that is to be pruned, from its configuration alone.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.

    Raises:
        UserError: If its family is not one of [`FAMILIES`], its weights are quantised, or only some layers have experts.
    """

    def __init__(self, config: PreTrainedConfig):
        if config.model_type not in FAMILIES:
            raise UserError(
                f"Models of type `{config.model_type}` cannot be pruned: the types that can are {', '.join(FAMILIES)} "
                f"({_NAMES})."
            )
        has_experts = config.model_type == "qwen3_moe"
        if has_experts and (config.mlp_only_layers or config.decoder_sparse_step != 1):
            raise UserError(
                "A model in which only some layers have experts cannot be pruned: take one where all have."
            )
        if "quantization_config" in config.to_dict():
            raise UserError("A quantised model cannot be pruned: take the checkpoint that it was made from.")
        self.config = config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.head_dim = model.model.layers[0].self_attn.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads  # query heads of a key-value head
        self.sizes = Sizes(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.moe_intermediate_size if has_experts else config.intermediate_size,
            config.num_experts if has_experts else None,
        )
        names = [name for name, _ in model.named_parameters()]  # which counts tied weights once
        self._layer = [axes(name) for name in names if ".layers.0." in name]
        self._rest = [axes(name) for name in names if ".layers." not in name]
        self.parameters = self.count(self.sizes)

    def count(self, sizes: Sizes) -> int:
        """
        Counts the parameters of a model of the same family.

        Args:
            sizes ([`Sizes`]):
                Its sizes. They may be arrays that broadcast, and so is then what is returned.

        Returns:
            `int`: Number of parameters, with embeddings, and tied ones once.
        """
        query, kv = (
            heads * self.head_dim for heads in (sizes.num_attention_heads, sizes.num_attention_heads // self.group)
        )
        length = {
            "vocab": self.config.vocab_size,
            "hidden": sizes.hidden_size,
            "query": query,
            "kv": kv,
            "qkv": query + 2 * kv,
            "head": self.head_dim,
            "mlp": sizes.intermediate_size,
            "gate_up": 2 * sizes.intermediate_size,
            "expert": sizes.num_experts,
        }
        layer, rest = (
            sum(math.prod(length[axis] for axis in weight) for weight in weights)
            for weights in (self._layer, self._rest)
        )
        return sizes.num_layers * layer + rest

    def check(self, sizes: Sizes) -> None:
        """
        Checks that a model can be cut to some sizes.

        Args:
            sizes ([`Sizes`]):
                Sizes to keep.

        Raises:
            UserError: If one is larger than the model's, or they do not fit each other.
        """
        for name, size in asdict(sizes).items():
            own = asdict(self.sizes)[name]
            if own is None and size is not None:
                raise UserError(
                    f"`{name}` is {size}, and a model of type `{self.config.model_type}` has none: drop it."
                )
            if size is not None and size > own:
                raise UserError(f"`{name}` is {size}, and the model has only {own}: lower it.")
        if sizes.num_experts is not None and sizes.num_experts < self.config.num_experts_per_tok:
            raise UserError(
                f"`num_experts` is {sizes.num_experts}, and a token takes {self.config.num_experts_per_tok}: raise it."
            )
        heads = sizes.num_attention_heads
        if heads % self.group:
            raise UserError(
                f"`num_attention_heads` is {heads}, and query heads go in groups of {self.group} that share a "
                f"key-value head: make it a multiple of {self.group}."
            )
        if not self._fits(sizes.hidden_size, heads):
            wanted = (
                f"be `num_attention_heads` × {self.head_dim} = {heads * self.head_dim}"
                if FAMILIES[self.config.model_type] == "equal"
                else f"be a multiple of `num_attention_heads`, {heads}"
            )
            raise UserError(
                f"`hidden_size` is {sizes.hidden_size}, and in a model of type `{self.config.model_type}` it must "
                f"{wanted}: change one of the two."
            )

    def explicit(self, **sizes: int) -> Sizes:
        """
        Returns the model's sizes with some of them replaced, after [`check`].

        Args:
            sizes (`int`):
                Sizes to keep, by the names of [`Sizes`].
        """
        changed = replace(self.sizes, **sizes)
        self.check(changed)
        return changed

    def search(self, ratio: float, multiple: int = BLOCK) -> Sizes:
        """
        Finds the sizes that remove a share of the parameters.

        Where there are experts, experts alone go. Of all other sizes that come within 0.01 of it, those are taken that shrink every size as little as possible: least sum of
        squares of log(size before / size after), where hidden size and heads count double. Without training, a model
        bears fewer layers and neurons much better than fewer channels and heads, and cutting several sizes a little
        much better than one a lot. The number of key-value heads stays a divisor of the model's, so that tensor
        parallelism can go on splitting them. Channels and neurons stay a multiple of a block, as quantisers and kernels
        want it, where the model's own number is one.

        Args:
            ratio (`float`):
                Share of the parameters to remove.
            multiple (`int`, *optional*, defaults to `32`):
                Size of a block, a power of two. A number that is no multiple of it stays one of 32, if it is that.

        Returns:
            [`Sizes`]: Sizes to keep.

        Raises:
            UserError: If no sizes come within 0.01, naming the nearest share that is reachable.
        """
        if self.sizes.num_experts is not None:
            return self._search_experts(ratio)
        full = self.sizes
        groups = full.num_attention_heads // self.group
        heads = [number * self.group for number in range(1, groups + 1) if groups % number == 0]
        pairs = [pair for pair in product(_grid(full.hidden_size, 32, multiple), heads) if self._fits(*pair)]
        grid = np.array([(layers + 1, *pair) for layers in range(full.num_layers) for pair in pairs], dtype=np.int64)
        # The count is linear in the width of the MLP, so that one is solved for
        empty = self.count(Sizes(*grid.T, 0))
        slope = self.count(Sizes(*grid.T, 1)) - empty
        wanted = ((1 - ratio) * self.parameters - empty) / slope
        widths = np.array(_grid(full.intermediate_size, 64, multiple))
        sizes = Sizes(*grid.T, widths[np.abs(widths - wanted[:, None]).argmin(axis=1)])
        removed = 1 - self.count(sizes) / self.parameters
        error = np.abs(removed - ratio)
        cost = sum((weight * np.log(vars(full)[name] / vars(sizes)[name])) ** 2 for name, weight in _WEIGHT.items())
        best = np.where(error <= _TOLERANCE, cost, np.inf).argmin()
        if error[best] > _TOLERANCE:
            raise UserError(_unreachable(ratio, "", removed[error.argmin()]))
        return Sizes(*(int(vars(sizes)[name][best]) for name in _WEIGHT))

    def _search_experts(self, ratio: float) -> Sizes:
        """The number of experts that removes a share of the parameters, the rest as it is."""
        numbers = np.arange(self.config.num_experts_per_tok, self.sizes.num_experts + 1)
        removed = 1 - self.count(replace(self.sizes, num_experts=numbers)) / self.parameters
        best = np.abs(removed - ratio).argmin()
        if abs(removed[best] - ratio) > _TOLERANCE:
            raise UserError(_unreachable(ratio, " by removing experts alone", removed[best]))
        return replace(self.sizes, num_experts=int(numbers[best]))

    def prune_config(self, sizes: Sizes, layers: list[int]) -> PreTrainedConfig:
        """
        Makes the configuration of the pruned model.

        Args:
            sizes ([`Sizes`]):
                Sizes that are kept.
            layers (`list[int]`):
                Layers that are kept, in order.

        Returns:
            [`~transformers.PreTrainedConfig`]: Of the same class. What is listed by layer is cut in step.
        """
        values = self.config.to_dict()
        values |= {
            "num_hidden_layers": sizes.num_layers,
            "hidden_size": sizes.hidden_size,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_attention_heads // self.group,
        }
        if FAMILIES[self.config.model_type] != "equal":
            values["head_dim"] = self.head_dim  # not every configuration says it, and it is not what is left / heads
        if sizes.num_experts is None:
            values["intermediate_size"] = sizes.intermediate_size
        else:
            values.pop("num_local_experts", None)  # its other name
            values |= {"moe_intermediate_size": sizes.intermediate_size, "num_experts": sizes.num_experts}
        if values.get("no_rope_layers") is not None:
            values["no_rope_layers"] = [values["no_rope_layers"][layer] for layer in layers]
        if values.get("layer_types") is not None:
            values["layer_types"] = [values["layer_types"][layer] for layer in layers]
        if values.get("max_window_layers") is not None:
            values["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in layers)
        return type(self.config).from_dict(values)

    def _fits(self, hidden_size: int, heads: int) -> bool:
        rule = FAMILIES[self.config.model_type]
        if rule == "equal":
            return hidden_size == heads * self.head_dim
        return rule == "free" or hidden_size % heads == 0


def _unreachable(ratio: float, how: str, nearest: float) -> str:
    return (
        f"`target_ratio` {ratio:g} is not reachable to within {_TOLERANCE}{how}: the nearest share of the parameters that "
        f"can be removed is {nearest:.3f}."
    )


def _grid(size: int, parts: int, multiple: int) -> list[int]:
    """Returns the multiples of a power of two up to a size, about `parts` or more of them, and the size itself."""
    step = 2 ** max(0, int(math.log2(size / parts)) if size >= parts else 0)
    block = next((block for block in (multiple, BLOCK) if size % block == 0), 1)
    step = max(step, block)
    return sorted({*range(step, size + 1, step), size})
