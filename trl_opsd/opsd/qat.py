"""Quantisation-aware training: the student computes with the rounded weights that it will be served with."""

import torch
from transformers import PreTrainedModel


def fake_quantise(model: PreTrainedModel, precision: str, group_size: int = 32) -> None:
    """
    Makes the linear layers of a model compute with rounded weights, in place, by [torchao's
    QAT](https://docs.pytorch.org/ao/stable/api_ref_qat.html).

    The parameters stay in their own precision and so does what is saved: an ordinary checkpoint. Quantised in the same
    way afterwards, it computes just what was trained. The gradient passes the rounding as if it were not there. The
    output embeddings are left as they are, because the loss reads their weights itself.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Student.
        precision (`str`):
            `"int8"`: symmetric, a scale for each row of a weight. `"int4"`: symmetric, one for each group of input
            channels of a row.
        group_size (`int`, *optional*, defaults to `32`):
            Input channels in a group of `"int4"`.

    Raises:
        ValueError: If the input channels of a layer do not divide into groups.
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import QATConfig

    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linears = {name for name in linears if model.get_submodule(name) is not model.get_output_embeddings()}
    if precision == "int4":
        for name in sorted(linears):
            size = model.get_submodule(name).in_features
            if size % group_size:
                raise ValueError(
                    f"`qat: int4` scales groups of {group_size} input channels, and `{name}` has {size}: train for "
                    "int8, or give a `qat_group_size` that divides it."
                )
        weights = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size))
    else:
        weights = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, QATConfig(weights, step="prepare"), filter_fn=lambda module, name: name in linears)
