"""
The most memory that a GPU holds while OPSD trains, part by part, before anything is loaded.

Weights, gradients and moments are counted on a model without data. Activations are not counted by a formula but recorded:
the architecture's own forward runs on tensors without data, and what autograd would keep of it is added up, for one layer
and for two, and for two numbers of tokens. So any text model of transformers is right, whatever its layers are made of,
with an adapter, in mixed precision or not.
"""

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from peft import PeftConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from ..opsd.divergence import _CPU_LOGITS_BYTES, _LOGITS_BYTES


# Bytes of the moments of a trained parameter, by `optim`; 0 for two of the parameter's own dtype
ADAMW = {"adamw_torch": 0, "adamw_torch_fused": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
BUCKET = 500_000_000  # parameters in DeepSpeed's buffer of gradients


@dataclass
class Training:
    """
    What decides how much memory training takes.

    Args:
        student ([`~transformers.PreTrainedConfig`]):
            Configuration of the student.
        teacher ([`~transformers.PreTrainedConfig`], *optional*):
            Configuration of a teacher with weights of its own. `None` if it scores with the student's.
        dtype (`torch.dtype`):
            What the student's weights are kept in.
        teacher_dtype (`torch.dtype`):
            What the teacher's are.
        autocast (`bool`):
            Whether the forward computes in bfloat16 from weights of another dtype.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter that is trained in the place of the weights.
        gradient_checkpointing (`bool`):
            Whether the layers' activations are computed again in the backward.
        rows (`float`):
            Rollouts of a micro-batch; of several lengths, as many of the longest as hold the same tokens.
        length (`int`):
            Tokens of each, prompt and padding included.
        completion (`int`):
            Tokens of each that count in the loss.
        several (`bool`):
            Whether an optimizer step has more than one micro-batch, whose gradients are added up.
        optim (`str`):
            A key of `ADAMW`.
        sharding (`str`):
            What the processes share: `"ddp"` (nothing), `"zero2"`, `"fsdp2"` or `"zero3"`.
        processes (`int`):
            How many they are.
        device (`str`):
            `"cuda"` or `"cpu"`.
    """

    student: PreTrainedConfig
    teacher: PreTrainedConfig | None
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    autocast: bool
    peft_config: PeftConfig | None
    gradient_checkpointing: bool
    rows: float
    length: int
    completion: int
    several: bool
    optim: str = "adamw_torch_fused"
    sharding: str = "ddp"
    processes: int = 1
    device: str = "cuda"


def attention(module, query, key, value, attention_mask, softcap=None, **kwargs):
    """SDPA, or where scores are capped, which it cannot do, the whole scores."""
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return eager_attention_forward(module, query, key, value, attention_mask, softcap=softcap, **kwargs)


def attention_of_a_gpu(module, query, key, value, attention_mask, softcap=None, **kwargs):
    """
    The same, and where heads share keys and values by the kernel that keeps no scores, as a GPU's does. torch comes to it by
    itself on these tensors, which are a CPU's, but the lowest that is taken (2.8) would keep the scores.
    """
    if softcap is not None or key.shape[1] == query.shape[1] or value.shape[-1] != query.shape[-1]:
        return attention(module, query, key, value, attention_mask, softcap=softcap, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # as autocast would, for which this has no name
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)[0]
    return output.transpose(1, 2).contiguous(), None


# The trainer's forward makes no mask, and transformers would make one here, because these tensors have no data to look at
UNMASKED = {"cpu": "opsd_plan", "cuda": "opsd_plan_of_a_gpu"}
AttentionInterface.register(UNMASKED["cpu"], attention)
AttentionInterface.register(UNMASKED["cuda"], attention_of_a_gpu)
for name in UNMASKED.values():
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, peft_config: PeftConfig | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """A model without data, with its adapter, that attends as one on a CPU or on a GPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=UNMASKED[device])
        return model if peft_config is None else get_peft_model(model, copy.deepcopy(peft_config))


def saved_bytes(training: Training, layers: int, rows: int) -> int:
    """Bytes that autograd keeps of the forward of a student of fewer layers, without its weights and its head."""
    config = copy.deepcopy(training.student)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    # Shards are gathered in bfloat16, so that nothing is cast there
    dtype, autocast = training.dtype, training.autocast
    if training.sharding != "ddp":
        dtype, autocast = torch.bfloat16, False
    model = empty_model(config, dtype, training.peft_config, training.device).train()
    if training.peft_config is not None:
        model = model.get_base_model()
    body = model.get_decoder()
    kept = {}
    with FakeTensorMode():
        # Not by `to`: an adapter's layers refuse it here
        tensors = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in body.named_parameters()
        }
        tensors |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in body.named_buffers()}
        weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # the storage too, so that its address is not given to another one
            return tensor

        ids = torch.zeros((rows, training.length), dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
            # Without data torch's own takes bfloat16 alone. What is kept of the other is the same. No public setting says
            # so: of the other `experts_implementation`s eager asks which experts have tokens, which tensors without data
            # cannot say, and batched_mm keeps a copy of an expert for each token
            patch.object(moe, "_can_use_grouped_mm", lambda *args: False),
        ):
            torch.func.functional_call(body, tensors, (), {"input_ids": ids, "use_cache": False})
    return sum(storage.nbytes() for storage in kept.values())


def activations(training: Training) -> int:
    """Bytes that the student's forward leaves for its backward, and the most that is added when a layer is computed again."""
    one, two, more = (saved_bytes(training, layers, rows) for layers, rows in ((1, 1), (2, 1), (2, 2)))
    more_of_one = saved_bytes(training, 1, 2)
    # Of a layer: what grows with the rows, and copies of weights in bfloat16, which do not
    layer_row = (more - more_of_one) - (two - one)
    layer_fixed = (two - one) - layer_row
    outside_row = (more_of_one - one) - layer_row
    outside_fixed = one - layer_row - layer_fixed - outside_row
    layers, rows = training.student.num_hidden_layers, training.rows
    fixed = outside_fixed + layers * layer_fixed
    if not training.gradient_checkpointing:
        return fixed + rows * (outside_row + layers * layer_row)
    itemsize = training.dtype.itemsize if training.sharding == "ddp" else 2
    residual = training.length * training.student.hidden_size * itemsize
    return fixed + rows * (outside_row + layers * residual + layer_row)


def parts(training: Training) -> dict[str, int]:
    """
    What a GPU holds at the peak of a training step.

    Args:
        training ([`Training`]):
            What is trained, and how.

    Returns:
        `dict[str, int]`: Bytes of `weights`, `teacher`, `moments`, `gradients`, `gathered` (what is made whole of shards, and
        buffers of the exchange), `activations` and `loss`; their sum is the peak.

    Raises:
        ValueError: If transformers has no causal language model of this configuration.
    """
    model = empty_model(training.student, training.dtype, training.peft_config)
    trained = [p for p in model.parameters() if p.requires_grad]
    teacher = (
        [] if training.teacher is None else list(empty_model(training.teacher, training.teacher_dtype).parameters())
    )
    head = model.get_output_embeddings().weight
    weights, teacher_weights, gradients = nbytes(model.parameters()), nbytes(teacher), nbytes(trained)
    itemsizes = ADAMW[training.optim]
    moments = sum(p.numel() for p in trained) * itemsizes if itemsizes else 2 * gradients
    gathered, several = 0, training.several
    if training.sharding == "ddp":
        # A second copy of the gradients, in the buckets that are exchanged
        gathered = gradients if training.processes > 1 else 0
    else:
        share, numbers = training.processes, sum(p.numel() for p in trained)
        frozen = weights - nbytes(trained)
        # float32 masters of what is trained, and what computes is in bfloat16
        weights = frozen + 2 * numbers if training.sharding == "zero2" else (frozen + 4 * numbers) // share
        if training.sharding == "zero3":
            weights += 2 * numbers // share
        masters = 4 * numbers // share if training.sharding == "zero2" else 0
        moments = 8 * numbers // share + masters
        gradients = (4 if training.sharding == "fsdp2" else 2) * numbers // share
        several = True  # each micro-batch adds to the shards
        if training.sharding == "zero2":
            gathered = 2 * 2 * min(numbers, BUCKET)
        else:
            teacher_weights //= share
            # Two layers of each model, the one at hand and the next, with the gradient of one; embedding and head all the time
            outside = 2 * sum(p.numel() for p in {model.get_input_embeddings().weight, head})
            layer = (
                2 * (sum(p.numel() for p in model.parameters()) - outside // 2) // training.student.num_hidden_layers
            )
            gathered = 2 * outside + 3 * layer
    found = {
        "weights": weights,
        "teacher": teacher_weights,
        "moments": moments,
        "gradients": gradients,
        "gathered": gathered,
        "activations": activations(training),
        "loss": loss_bytes(training, head),
    }
    if not several:
        # Gradients come as activations go: only the larger of the two is ever there
        found["gradients"] = max(0, gradients - found["activations"])
    return found


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loss_bytes(training: Training, head: torch.Tensor) -> int:
    """
    Tiles of both models' logits, and the gradients of the head and of the states, in float32. On a GPU, whose products
    are in bfloat16: a panel of the logits' gradients, and heads in float32, in it too; and a head in it has its gradient.
    """
    tokens, (vocab, hidden) = training.rows * training.completion, head.shape
    is_low = training.device != "cpu" and (training.autocast or training.dtype == torch.bfloat16)
    budget = _CPU_LOGITS_BYTES if training.device == "cpu" else _LOGITS_BYTES
    found = min(budget, 2 * 4 * tokens * vocab) + 4 * tokens * hidden
    if head.requires_grad:
        found += (2 if is_low and training.dtype == torch.bfloat16 else 4) * head.numel()
    if is_low:
        found += min(budget, 2 * tokens * vocab)
        found += 2 * head.numel() * (training.dtype == torch.float32)
        if training.teacher is not None and training.teacher_dtype == torch.float32:
            found += 2 * training.teacher.vocab_size * training.teacher.hidden_size
    return found


def cache_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes of keys and values of a token, where every layer keeps all of them."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * itemsize
