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
        ValueError: If [`check_groups`] finds a layer.
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import QATConfig

    if precision == "int4":
        check_groups(model, group_size)
        weights = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size))
    else:
        weights = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    names = set(_linears(model))
    quantize_(model, QATConfig(weights, step="prepare"), filter_fn=lambda module, name: name in names)


def check_groups(model: PreTrainedModel, group_size: int) -> None:
    """
    Checks that the weights of a model can be rounded to `"int4"`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Student, which need not have weights yet.
        group_size (`int`):
            Input channels in a group.

    Raises:
        ValueError: If the input channels of a layer do not divide into groups.
    """
    for name, module in sorted(_linears(model).items()):
        if module.in_features % group_size:
            raise ValueError(
                f"`qat: int4` scales groups of {group_size} input channels, and `{name}` has {module.in_features}: train for "
                "int8, or give a `qat_group_size` that divides it."
            )


def _linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The layers that are rounded, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in found.items() if module is not model.get_output_embeddings()}
