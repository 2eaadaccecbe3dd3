"""
The distillation objective: per-token divergence between the teacher's and the student's next-token distributions.

With student `q`, teacher `p` and mixture `m = (1 - beta) q + beta p`, each vocabulary entry contributes

- `beta = 0`, forward KL(p || q): `d = p log(p / q) - p + q`
- `beta = 1`, reverse KL(q || p): `d = q log(q / p) - q + p`
- between, `beta` KL(p || m) + (1 - `beta`) KL(q || m): `d = beta p log(p / m) + (1 - beta) q log(q / m)`, in which the
  linear parts of the two terms have cancelled

and the divergence of the token is `sum_v min(d_v, kl_clip)`. Every `d_v` is at least zero, so no clip can turn the loss
negative, and without a clip the sum is the plain KL, because the linear parts sum to zero.

The gradient with respect to the student's logits is `u_j g_j - q_j A`, where `u_j` says that entry `j` is not clipped,
`g_j = q_j dd_j/dq_j` and `A = sum_v u_v g_v` comes from the softmax. `g` is `q - p` for `beta = 0`, and
`w q log(q / r)` otherwise, with `w = 1, r = p` for `beta = 1` and `w = 1 - beta, r = m` between.
"""

from typing import NamedTuple

import torch
from packaging.version import Version
from torch.autograd.function import once_differentiable
from transformers.utils import is_triton_available
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction


# What one call may hold beside its inputs and outputs, at the least; on an accelerator also a share of what is free
_MEMORY_BYTES, _MEMORY_SHARE = 2 << 30, 0.25
# Both models' logits of one chunk of tokens. An accelerator needs more rows for a full-speed matrix product than a CPU
_CPU_LOGITS_BYTES, _LOGITS_BYTES = 96 << 20, 640 << 20
# Most panels by which a gradient of the head is summed in bfloat16: rounded in each, the error grows with their root
_ROUNDED_PANELS = 8
# Vocabulary columns to cast at a time where the head is not already in the dtype of the product
_CAST_COLUMNS = 8192
# Entries per elementwise block and thread: a CPU is done with them before they leave its cache
_BLOCK_ENTRIES = 1 << 17
# Where the elementwise part runs in the kernels of `divergence_triton.py`
_TRITON_DEVICES = ("cuda",)
# `torch.mm(..., out_dtype=torch.float32)` of bfloat16 inputs, on CUDA
_MM_OUT_DTYPE = Version(torch.__version__) >= Version("2.8.0")


class DivergenceOutput(NamedTuple):
    """
    What [`linear_divergence_with_metrics`] returns: one value per token, of shape `(N,)`. Only `divergence` is
    differentiable. A field is `None` where the backend cannot give it: `"chunked"` gives the first two, `"liger"` the
    first.

    Args:
        divergence (`torch.Tensor`):
            Divergence after the clip, in nats.
        student_entropy (`torch.Tensor`, *optional*):
            Entropy of the student's distribution, in nats.
        teacher_entropy (`torch.Tensor`, *optional*):
            Entropy of the teacher's distribution, in nats.
        top1_agreement (`torch.Tensor`, *optional*):
            1 where the student and the teacher have the same most likely token, else 0.
        unclipped (`torch.Tensor`, *optional*):
            Divergence before the clip, in nats.
        clip_fraction (`torch.Tensor`, *optional*):
            Share of the divergence that the clip removed, `1 - divergence / unclipped`; 0 where `unclipped` is 0.
    """

    divergence: torch.Tensor
    student_entropy: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    top1_agreement: torch.Tensor | None = None
    unclipped: torch.Tensor | None = None
    clip_fraction: torch.Tensor | None = None


class _Statistics(NamedTuple):
    # Per token. A row's log-probabilities are `z - top - log_sum`: two numbers, because at logits of 1e4 their sum would
    # round away the digits that matter
    divergence: torch.Tensor
    unclipped: torch.Tensor
    pull: torch.Tensor  # `A` of the module's docstring
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor
    student_top: torch.Tensor
    student_log_sum: torch.Tensor
    teacher_top: torch.Tensor
    teacher_log_sum: torch.Tensor


_ALL = slice(None)


class _Model(NamedTuple):
    # One side of the comparison, and how its logits come about
    hidden: torch.Tensor  # (N, H)
    head: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype  # of the matrix products; they accumulate in float32

    def part(self, rows=_ALL, columns=_ALL):
        bias = None if self.bias is None else self.bias[columns]
        return self._replace(hidden=self.hidden[rows], head=self.head[columns], bias=bias)


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise part, in place on blocks of logits: `z` holds logits first, then log-probabilities, then the gradient
# ---------------------------------------------------------------------------------------------------------------------


def _tile_length(other: int, dtype: torch.dtype, device: torch.device) -> int:
    # Rows of a tile of `other` columns, or columns of a tile of `other` rows
    budget = _CPU_LOGITS_BYTES if device.type == "cpu" else _LOGITS_BYTES
    length = max(1, budget // (2 * max(other, 1) * dtype.itemsize))
    return length if length < 128 else length // 128 * 128  # matrix products are made of tiles of that size


def _memory_bytes(device: torch.device) -> int:
    """Bytes that one call may hold. With fewer than it wants, both heads are projected a second time in the backward."""
    if device.type != "cuda":
        return _MEMORY_BYTES
    # What the allocator holds and does not use is free too
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(_MEMORY_BYTES, int(_MEMORY_SHARE * (torch.cuda.mem_get_info(device)[0] + cached)))


def _blocks(rows: int, columns: int, device: torch.device):
    step = max(1, _BLOCK_ENTRIES * torch.get_num_threads() // max(columns, 1)) if device.type == "cpu" else rows
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _transform_(z, logit_scale, softcap, temperature):
    # Scale, soft-cap and temperature; returns the derivative of the result with respect to the projection
    if softcap is None:
        z.mul_(logit_scale / temperature)
        return logit_scale / temperature
    z.mul_(logit_scale / softcap).tanh_()
    slope = (1 - z * z).mul_(logit_scale / temperature)
    z.mul_(softcap / temperature)
    return slope


def _log_prob_(z, top, log_sum):
    # The floor takes the place of -inf, so that 0 log 0 is 0. Where only the other side gives the entry any probability,
    # the divergence that mathematics calls infinite comes out larger than anything a check could miss
    return z.sub_(top).sub_(log_sum).clamp_(min=torch.finfo(z.dtype).min / 4)


def _entries_(log_q, log_p, q, p, beta):
    # Overwrites all four; returns `g` (in `log_q`) and `d`
    gap = torch.sub(log_p, log_q, out=log_p)
    if beta == 0.0:
        g = torch.sub(q, p, out=log_q)
        d = gap.mul_(p).add_(g)
    elif beta == 1.0:
        g = torch.mul(q, gap, out=log_q).neg_()
        d = p.sub_(q).add_(g)
    else:
        # log(q/m) = -log(1 - beta + beta p/q), and log(p/m) = log(q/m) + gap; both are exactly 0 where the gap is. Past
        # a gap of 80 the smaller probability is below 1e-34, and the larger one's logarithm no longer depends on it.
        # The second clamp is for a beta that rounds to 1: it keeps 1 - beta from becoming 0
        gap.clamp_(-80.0, 80.0)
        ratio = torch.expm1(gap, out=log_q).mul_(beta).clamp_(min=torch.finfo(q.dtype).eps - 1)
        log_q_m = ratio.log1p_().neg_()
        d = gap.add_(log_q_m).mul_(p).mul_(beta)
        g = log_q_m.mul_(q).mul_(1 - beta)
        d.add_(g)
    return g, d.clamp_(min=0.0)


def _drop_clipped_(g, d, kl_clip):
    # An entry at its clip contributes a constant. (A float mask: several times faster than `masked_fill` on CPU)
    if kl_clip is not None:
        g.mul_(torch.lt(d, kl_clip, out=torch.empty_like(d)))


def _block_statistics_(student_z, teacher_z, slope, beta, kl_clip, needs_grad) -> _Statistics:
    probs, entropies, best, normalizers = [], [], [], []
    for z in (student_z, teacher_z):
        top, index = z.max(-1, keepdim=True)
        prob = torch.sub(z, top).exp_()
        total = prob.sum(-1, keepdim=True)
        log_sum = total.log()
        log_prob = _log_prob_(z, top, log_sum)
        probs.append(prob.div_(total))
        entropies.append(-torch.linalg.vecdot(prob, log_prob))
        best.append(index)
        normalizers += [top.squeeze(-1), log_sum.squeeze(-1)]
    g, d = _entries_(student_z, teacher_z, *probs, beta)
    unclipped = d.sum(-1)
    _drop_clipped_(g, d, kl_clip)
    pull = g.sum(-1)
    if needs_grad:
        g.addcmul_(probs[0], pull.unsqueeze(-1), value=-1).mul_(slope)
    divergence = unclipped if kl_clip is None else d.clamp_(max=kl_clip).sum(-1)
    agreement = (best[0] == best[1]).squeeze(-1).to(d.dtype)
    return _Statistics(divergence, unclipped, pull, *entropies, agreement, *normalizers)


def _block_gradient_(student_z, teacher_z, slope, beta, kl_clip, statistics: _Statistics):
    s = _Statistics(*(x.unsqueeze(-1) for x in statistics))
    log_q = _log_prob_(student_z, s.student_top, s.student_log_sum)
    log_p = _log_prob_(teacher_z, s.teacher_top, s.teacher_log_sum)
    q = log_q.exp()
    g, d = _entries_(log_q, log_p, q, log_p.exp(), beta)
    _drop_clipped_(g, d, kl_clip)
    g.addcmul_(q, s.pull, value=-1).mul_(slope)


def _use_triton(z: torch.Tensor) -> bool:
    return z.device.type in _TRITON_DEVICES and z.dtype == torch.float32 and is_triton_available()


def _sweep_(student_z, teacher_z, statistics, gradient, student, teacher, beta, temperature, kl_clip, needs_grad):
    """
    Writes the `statistics` of some rows from their projections onto the whole vocabulary, and with `needs_grad` to
    `gradient`, which may be `student_z`, that of the divergence with respect to the student's projection.
    """
    if _use_triton(student_z):
        from .divergence_triton import sweep

        sweep(student_z, teacher_z, statistics, gradient, student, teacher, beta, temperature, kl_clip, needs_grad)
        return
    for block in _blocks(*student_z.shape, student_z.device):
        s_z, t_z = student_z[block], teacher_z[block]
        slope = _transform_(s_z, student.logit_scale, student.softcap, temperature)
        _transform_(t_z, teacher.logit_scale, teacher.softcap, temperature)
        statistics[:, block] = torch.stack(_block_statistics_(s_z, t_z, slope, beta, kl_clip, needs_grad))
        if needs_grad and gradient.data_ptr() != student_z.data_ptr():
            gradient[block] = s_z


def _tile_gradient_(student_z, teacher_z, statistics, weight, student, teacher, beta, temperature, kl_clip):
    """
    Turns `student_z`, all rows of some columns, into the gradient that `_sweep_` leaves, times the rows' `weight`. The
    sums over the vocabulary come from `statistics`.
    """
    if _use_triton(student_z):
        from .divergence_triton import tile_gradient

        tile_gradient(student_z, teacher_z, statistics, weight, student, teacher, beta, temperature, kl_clip)
        return
    for block in _blocks(*student_z.shape, student_z.device):
        s_z, t_z = student_z[block], teacher_z[block]
        slope = _transform_(s_z, student.logit_scale, student.softcap, temperature) * weight[block].unsqueeze(-1)
        _transform_(t_z, teacher.logit_scale, teacher.softcap, temperature)
        _block_gradient_(s_z, t_z, slope, beta, kl_clip, _Statistics(*statistics[:, block]))


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------------------------------------


def _operand_dtype(tensor, exact, dtype):
    # Low precision only where the product can leave it unrounded
    native = _MM_OUT_DTYPE and tensor.is_cuda and dtype in (torch.float16, torch.bfloat16)
    return dtype if native else exact


def _mm(out, a, b, dtype, accumulate=False):
    # `out (+)= a @ b`, accumulated in float32 or better, which `out` is too unless it has the dtype of the product
    dtype = _operand_dtype(out, out.dtype, dtype)
    a, b = a.to(dtype), b.to(dtype)
    options = {} if dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def _column_slabs(out, model: _Model):
    # The whole vocabulary at once, unless the head has to be cast on the way: then never the whole head
    columns = model.head.shape[0]
    step = columns if model.head.dtype == _operand_dtype(out, out.dtype, model.dtype) else _CAST_COLUMNS
    return (slice(start, min(start + step, columns)) for start in range(0, columns, step))


def _project(out, model: _Model):
    for slab in _column_slabs(out, model):
        _mm(out[:, slab], model.hidden, model.head[slab].t(), model.dtype)
    if model.bias is not None:
        out.add_(model.bias)


class _LinearDivergence(torch.autograd.Function):
    """
    One pass over chunks of tokens, with both models' logits of a chunk over the whole vocabulary: statistics, then the
    gradient, then its two products, so that every projection is computed once. The gradient of a token's hidden state
    scales with whatever gradient reaches that token. The head's is a sum over tokens, right only if all of them are
    weighted alike, as the usual mean does; otherwise, or where it would not fit in memory, backward projects again, all
    tokens by some columns at a time.
    """

    @staticmethod
    def forward(ctx, hidden, head, bias, student, teacher, beta, temperature, kl_clip, grad_enabled):
        ctx.set_materialize_grads(False)
        device, (N, V) = hidden.device, (hidden.shape[0], teacher.head.shape[0])
        dtype = torch.promote_types(torch.float32, torch.promote_types(hidden.dtype, teacher.hidden.dtype))
        needs_hidden, needs_head, needs_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        step = min(N, _tile_length(V, dtype, device))
        # Products in low precision take the gradients of a panel of several chunks at once, in their dtype: each product
        # reads and writes the head's whole gradient
        low = _operand_dtype(hidden, dtype, student.dtype)
        panel = step if low == dtype else min(N, step * max(1, _LOGITS_BYTES // max(1, step * V * low.itemsize)))
        # Returned in bfloat16 it is summed in it, and rounded once a panel, of which there must not be many. (A sum in
        # float16 might be past its range)
        is_rounded = head.dtype == low == torch.bfloat16 and N <= _ROUNDED_PANELS * panel
        head_dtype = low if is_rounded else dtype
        room = _memory_bytes(device) - 2 * step * V * dtype.itemsize - panel * V * low.itemsize
        fits = head.numel() * head_dtype.itemsize <= room

        def zeros(tensor, needed, dtype=dtype):
            return torch.zeros(tensor.shape, dtype=dtype, device=device) if needed else None

        grad_hidden = zeros(hidden, needs_hidden)
        grad_head, grad_bias = zeros(head, needs_head and fits, head_dtype), zeros(bias, needs_bias and fits)
        needs_grad = grad_hidden is not None or grad_head is not None or grad_bias is not None
        options = beta, temperature, kl_clip
        models = student, teacher
        room -= head.numel() * head_dtype.itemsize
        # A head in another dtype than its products is cast once if there is room, and else by slabs for each chunk
        casts = {m.head.data_ptr(): m.head for m in models if low != dtype and m.dtype == low != m.head.dtype}
        if sum(uncast.numel() * low.itemsize for uncast in casts.values()) <= room:
            casts = {pointer: uncast.to(low) for pointer, uncast in casts.items()}
            models = [m._replace(head=casts.get(m.head.data_ptr(), m.head)) for m in models]
        statistics = torch.empty((len(_Statistics._fields), N), dtype=dtype, device=device)
        buffers = [torch.empty((step, V), dtype=dtype, device=device) for _ in range(2)]
        gradients = torch.empty((panel, V), dtype=low, device=device) if low != dtype and needs_grad else buffers[0]
        for first in range(0, N, max(panel, 1)):
            last = min(first + panel, N)
            for start in range(first, last, step):
                rows = slice(start, min(start + step, last))
                s_z, t_z = (buffer[: rows.stop - start] for buffer in buffers)
                for z, model in zip((s_z, t_z), models, strict=True):
                    _project(z, model.part(rows))
                gradient = gradients[start - first : rows.stop - first]
                _sweep_(s_z, t_z, statistics[:, rows], gradient, student, teacher, *options, needs_grad)
            model, gradient = models[0].part(slice(first, last)), gradients[: last - first]
            if grad_hidden is not None:
                for slab in _column_slabs(grad_hidden, model):
                    _mm(grad_hidden[first:last], gradient[:, slab], model.head[slab], student.dtype, accumulate=True)
            if grad_head is not None:
                _mm(grad_head[:V], gradient.t(), model.hidden, student.dtype, accumulate=True)
            if grad_bias is not None:
                grad_bias[:V] += gradient.sum(0, dtype=dtype)

        ctx.grads = grad_hidden, grad_head, grad_bias
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, head, bias)]
        ctx.head_shape, ctx.options = head.shape, options
        # For a second look at the head. The models' tensors are aliases, because ZeRO-3 takes the data of a parameter
        # away from it before backward
        ctx.student, ctx.teacher = (student, teacher) if needs_head or needs_bias else (None, None)
        ctx.save_for_backward(statistics)
        named = _Statistics(*statistics)
        outputs = named.student_entropy, named.teacher_entropy, named.top1_agreement, named.unclipped
        outputs = tuple(x.clone() for x in (named.divergence, *outputs))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_divergence, *_):
        if grad_divergence is None:
            return (None,) * 9
        (statistics,) = ctx.saved_tensors
        weight = grad_divergence.to(statistics.dtype)
        grad_hidden, grad_head, grad_bias = ctx.grads
        # The head's gradient is scaled in place, so a second backward through the same graph has to compute it anew
        ctx.grads = grad_hidden, None, None
        if (grad_head is not None or grad_bias is not None) and bool((weight == weight[:1]).all()):
            for grad in (grad_head, grad_bias):
                if grad is not None:
                    grad.mul_(weight[:1].sum())
        elif ctx.student is not None:
            grad_head, grad_bias = (
                weight.new_zeros(shape, dtype=dtype) if needed else None
                for shape, dtype, needed in zip(
                    (ctx.head_shape, ctx.head_shape[:1]), ctx.dtypes[1:], ctx.needs_input_grad[1:3], strict=True
                )
            )
            _head_gradient(ctx.student, ctx.teacher, statistics, weight, ctx.options, grad_head, grad_bias)
        if grad_hidden is not None:
            grad_hidden = grad_hidden * weight.unsqueeze(-1)
        grads = (grad_hidden, grad_head, grad_bias)
        return *(None if x is None else x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)), *(None,) * 6


def _head_gradient(student, teacher, statistics, weight, options, grad_head, grad_bias):
    # Writes the gradient of `(weight * divergence).sum()`. With all tokens at hand, each column's sum is complete when
    # it is written, so no float32 copy of the head is needed to accumulate in. Half the usual tiles, beside the gradient
    (N, V), dtype, device = (statistics.shape[1], teacher.head.shape[0]), statistics.dtype, statistics.device
    step = min(V, _tile_length(2 * N, dtype, device))
    buffers = [torch.empty((N * step,), dtype=dtype, device=device) for _ in range(2)]
    for start in range(0, V, step):
        columns = slice(start, min(start + step, V))
        width = columns.stop - start
        s_z, t_z = (buffer[: N * width].view(N, width) for buffer in buffers)
        _project(s_z, student.part(columns=columns))
        _project(t_z, teacher.part(columns=columns))
        _tile_gradient_(s_z, t_z, statistics, weight, student, teacher, *options)
        if grad_head is not None:
            product = torch.empty((s_z.shape[1], student.hidden.shape[1]), dtype=dtype, device=device)
            _mm(product, s_z.t(), student.hidden, student.dtype)
            grad_head[columns] = product
        if grad_bias is not None:
            grad_bias[columns] = s_z.sum(0)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, beta, temperature, kl_clip, needs_grad):
        dtype = torch.promote_types(torch.float32, torch.promote_types(student_logits.dtype, teacher_logits.dtype))
        shape, V = student_logits.shape, student_logits.shape[-1]
        student_z, teacher_logits = student_logits.reshape(-1, V).to(dtype, copy=True), teacher_logits.reshape(-1, V)
        N = student_z.shape[0]
        statistics = student_z.new_empty((len(_Statistics._fields), N))
        plain = _Model(None, None, None, 1.0, None, dtype)
        step = _tile_length(V, dtype, student_z.device)
        for start in range(0, N, step):
            rows = slice(start, min(start + step, N))
            teacher_z = teacher_logits[rows].to(dtype, copy=True)
            z = student_z[rows]
            _sweep_(z, teacher_z, statistics[:, rows], z, plain, plain, beta, temperature, kl_clip, needs_grad)
        result = _Statistics(*statistics).divergence.clone()
        ctx.dtype = student_logits.dtype
        ctx.save_for_backward(student_z.view(shape) if needs_grad else None)
        return result.view(shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_divergence):
        (grad,) = ctx.saved_tensors
        return (grad * grad_divergence.unsqueeze(-1)).to(ctx.dtype), None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------------


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def _liger_mean(
    student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias, beta, temperature
):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Compiling needs a compiler on the machine, which only a GPU's Triton may take for granted
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=temperature,
        compiled=student_hidden.is_cuda,
    )
    # The labels serve the hard loss and the mask; here both are without effect
    labels = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
    return loss(student_hidden, student_head, teacher_hidden, teacher_head, labels, student_bias, teacher_bias)


def _check_options(beta, temperature, kl_clip):
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` must be between 0 (forward KL) and 1 (reverse KL), got {beta}.")
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be greater than 0, got {temperature}.")
    if kl_clip is not None and not kl_clip > 0.0:
        raise ValueError(f"`kl_clip` must be greater than 0, or `None` for no clip, got {kl_clip}.")


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    kl_clip: float | None = None,
) -> torch.Tensor:
    """
    Per-token divergence between two sets of logits, as the module's docstring defines it. Differentiable in the student
    only. For logits that do not exist yet, [`linear_divergence`] saves most of the memory.

    Args:
        student_logits (`torch.Tensor`):
            Logits of the student, of shape `(..., V)`.
        teacher_logits (`torch.Tensor`):
            Logits of the teacher, of the same shape.
        beta (`float`):
            `0.0` is the forward KL(teacher || student), `1.0` the reverse KL(student || teacher), anything between them
            the generalized Jensen-Shannon divergence.
        temperature (`float`, *optional*, defaults to `1.0`):
            Both models' logits are divided by it. The divergence is not multiplied by its square.
        kl_clip (`float`, *optional*):
            Most that one vocabulary entry may contribute, in nats. The gradient through a clipped entry is zero.

    Returns:
        `torch.Tensor`:
            Divergence in nats per token, of shape `(...,)`, in float32 (float64 for float64 logits).

    Raises:
        ValueError: If the shapes differ, or a number is outside its range.
    """
    _check_options(beta, temperature, kl_clip)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`student_logits` {tuple(student_logits.shape)} and `teacher_logits` {tuple(teacher_logits.shape)} must "
            "have the same shape; cut both to the columns they share."
        )
    needs_grad = torch.is_grad_enabled() and student_logits.requires_grad
    return _Divergence.apply(student_logits, teacher_logits.detach(), beta, temperature, kl_clip, needs_grad)


def linear_divergence_with_metrics(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    kl_clip: float | None = None,
    valid_vocab: int | None = None,
    backend: str = "auto",
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> DivergenceOutput:
    """
    [`divergence`] from both models' hidden states and heads, without ever holding `(N, V)` logits of either, together
    with what a training log wants to know of the same pass. Gradients reach `student_hidden`, `student_head` and
    `student_bias`.

    Args:
        student_hidden (`torch.Tensor`):
            Last hidden states of the student, of shape `(N, H_student)`.
        student_head (`torch.Tensor`):
            Weight of the student's language-model head, of shape `(V, H_student)`.
        teacher_hidden (`torch.Tensor`):
            Last hidden states of the teacher, of shape `(N, H_teacher)`.
        teacher_head (`torch.Tensor`):
            Weight of the teacher's language-model head, of shape `(V, H_teacher)`.
        beta (`float`):
            `0.0` is the forward KL(teacher || student), `1.0` the reverse KL(student || teacher), anything between them
            the generalized Jensen-Shannon divergence.
        temperature (`float`, *optional*, defaults to `1.0`):
            Both models' logits are divided by it. The divergence is not multiplied by its square.
        kl_clip (`float`, *optional*):
            Most that one vocabulary entry may contribute, in nats. The gradient through a clipped entry is zero.
        valid_vocab (`int`, *optional*):
            Number of vocabulary columns that count. Columns at or past it are masked out of both softmaxes and get a
            zero gradient. Required if the heads differ in their number of rows.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"fused"` does everything described here. `"chunked"` is TRL's kernel: no clip. `"liger"` is Liger's fused
            linear JSD: no clip, logit scale or soft-cap, and it knows only the mean over all `N` tokens, which it
            reports for every token, so that it is right only under a uniform reduction. `"auto"` is `"fused"`.
        student_bias (`torch.Tensor`, *optional*):
            Bias of the student's head, of shape `(V,)`.
        teacher_bias (`torch.Tensor`, *optional*):
            Bias of the teacher's head, of shape `(V,)`.
        student_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the student's logits.
        teacher_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the teacher's logits.
        student_softcap (`float`, *optional*):
            Bound of the student's logits after scaling, `softcap * tanh(logits / softcap)`.
        teacher_softcap (`float`, *optional*):
            Bound of the teacher's logits after scaling.

    Returns:
        [`DivergenceOutput`]:
            Values per token, of shape `(N,)`, in nats, in float32 (float64 for float64 hidden states).

    Raises:
        ValueError: If shapes do not fit together, a number is outside its range, or the backend cannot do what is asked.
    """
    _check_options(beta, temperature, kl_clip)
    for name, hidden, head in (
        ("student", student_hidden, student_head),
        ("teacher", teacher_hidden, teacher_head),
    ):
        if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"`{name}_hidden` {tuple(hidden.shape)} and `{name}_head` {tuple(head.shape)} must have the shapes "
                "(N, H) and (V, H); flatten the leading dimensions of the hidden states first."
            )
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"`student_hidden` has {student_hidden.shape[0]} tokens and `teacher_hidden` {teacher_hidden.shape[0]}; "
            "select the same completion tokens of both."
        )
    smaller = min(student_head.shape[0], teacher_head.shape[0])
    if valid_vocab is None and student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"`student_head` has {student_head.shape[0]} rows and `teacher_head` {teacher_head.shape[0]}; pass "
            "`valid_vocab`, the number of columns that the tokenizer of both reaches."
        )
    if valid_vocab is not None and not 0 < valid_vocab <= smaller:
        raise ValueError(
            f"`valid_vocab` is {valid_vocab}, but must be between 1 and {smaller}, the rows of the smaller of "
            "`student_head` and `teacher_head`."
        )
    V = smaller if valid_vocab is None else valid_vocab
    if backend not in ("auto", "fused", "chunked", "liger"):
        raise ValueError(f"`backend` must be 'auto', 'fused', 'chunked' or 'liger', got {backend!r}.")
    if backend in ("chunked", "liger") and kl_clip is not None:
        raise ValueError(
            f"`backend={backend!r}` cannot clip (`kl_clip={kl_clip}`); set `kl_clip=None` or use `backend='fused'`."
        )
    if backend == "liger":
        for name, value, neutral in (
            ("student_logit_scale", student_logit_scale, 1.0),
            ("teacher_logit_scale", teacher_logit_scale, 1.0),
            ("student_softcap", student_softcap, None),
            ("teacher_softcap", teacher_softcap, None),
        ):
            if value != neutral:
                raise ValueError(
                    f"`backend='liger'` cannot apply `{name}={value}`; use `backend='fused'` or `backend='chunked'`."
                )

    teacher_hidden, teacher_head = teacher_hidden.detach(), teacher_head.detach()[:V]
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()[:V]
    # recipes/results/divergence/cpu.json, and gpu for an H100: `fused`, clip and all, is faster than the others without
    # it and needs the least memory
    if backend in ("auto", "fused"):
        student = _Model(
            student_hidden.detach(),
            student_head.detach()[:V],
            None if student_bias is None else student_bias.detach()[:V],
            student_logit_scale,
            student_softcap,
            _product_dtype(student_hidden),
        )
        teacher = _Model(
            teacher_hidden,
            teacher_head,
            teacher_bias,
            teacher_logit_scale,
            teacher_softcap,
            _product_dtype(teacher_hidden),
        )
        value, student_entropy, teacher_entropy, agreement, unclipped = _LinearDivergence.apply(
            student_hidden,
            student_head,
            student_bias,
            student,
            teacher,
            beta,
            temperature,
            kl_clip,
            torch.is_grad_enabled(),
        )
        removed = torch.where(unclipped > 0, 1 - value.detach() / unclipped, 0.0)
        return DivergenceOutput(value, student_entropy, teacher_entropy, agreement, unclipped, removed)

    student_head = student_head[:V]
    student_bias = None if student_bias is None else student_bias[:V]
    if backend == "chunked":
        return DivergenceOutput(
            *ChunkedDivergenceFunction.apply(
                student_hidden,
                student_head,
                student_bias,
                teacher_hidden,
                teacher_head,
                teacher_bias,
                beta,
                temperature,
                student_logit_scale,
                student_softcap,
                teacher_logit_scale,
                teacher_softcap,
            )
        )
    return DivergenceOutput(
        _liger_mean(
            student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias, beta, temperature
        ).expand(student_hidden.shape[0])
    )


def linear_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    beta: float,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The first two values of [`linear_divergence_with_metrics`], which describes the arguments.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            Divergence (differentiable) and student entropy (not), in nats per token, each of shape `(N,)`. The entropy
            is `None` with `backend="liger"`.
    """
    output = linear_divergence_with_metrics(
        student_hidden, student_head, teacher_hidden, teacher_head, beta=beta, **options
    )
    return output.divergence, output.student_entropy
