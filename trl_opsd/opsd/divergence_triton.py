"""
The elementwise part of `divergence.py` as Triton kernels: one read of both models' logits where torch makes thirty
passes, so that the clip and the metrics cost no memory traffic. Same arguments and results as the torch functions.
"""

import triton
import triton.language as tl


_BLOCK = 2048
_WARPS = 8


@triton.jit
def _logits(ptr, offsets, mask, scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    z = tl.load(ptr + offsets, mask=mask, other=0.0) * scale
    if HAS_SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z * inv_temperature


@triton.jit
def _slope(z, scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    slope = scale * inv_temperature
    if HAS_SOFTCAP:
        tanh = z / (softcap * inv_temperature)
        slope = slope * (1 - tanh * tanh)
    return slope


@triton.jit
def _log_prob(z, top, log_sum):
    # Comparisons in place of `maximum` here and below let a NaN through
    log_prob = z - top - log_sum
    return tl.where(log_prob < -8.5e37, -8.5e37, log_prob)


@triton.jit
def _entries(log_q, log_p, q, p, beta, MODE: tl.constexpr):
    gap = log_p - log_q
    if MODE == 0:
        g = q - p
        d = p * gap + g
    elif MODE == 1:
        g = -q * gap
        d = g - q + p
    else:
        gap = tl.where(gap > 80.0, 80.0, tl.where(gap < -80.0, -80.0, gap))
        # log(q/m) = -log(1 + beta (e^gap - 1)), from series where the plain form would lose digits
        e = gap * (1 + gap / 2 * (1 + gap / 3 * (1 + gap / 4 * (1 + gap / 5 * (1 + gap / 6)))))
        w = beta * e / (2 + beta * e)
        near = 2 * w * (1 + w * w * (1 / 3 + w * w * (1 / 5 + w * w / 7)))
        ratio = 1 - beta + beta * tl.exp(gap)
        far = tl.log(tl.where(ratio < 1.2e-7, 1.2e-7, ratio))
        log_q_m = -tl.where(tl.abs(gap) < 0.1, near, far)
        g = (1 - beta) * q * log_q_m
        d = beta * p * (gap + log_q_m) + g
    return g, tl.where(d < 0, 0.0, d)


@triton.jit
def _fold(z, start, top, best, total):
    # One more block of a row's logits into its maximum, where that was, and the sum of exponentials
    block_top, index = tl.max(z, axis=0, return_indices=True)
    best = tl.where(block_top > top, start + index, best)
    new_top = tl.maximum(top, block_top)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, best, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), axis=0)


@triton.jit
def _sweep_kernel(
    s_ptr,
    s_stride,
    t_ptr,
    t_stride,
    g_ptr,
    g_stride,
    out_ptr,
    out_stride,
    n_cols,
    beta,
    kl_clip,
    s_scale,
    s_softcap,
    t_scale,
    t_softcap,
    inv_temperature,
    MODE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    S_HAS_SOFTCAP: tl.constexpr,
    T_HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per token, three passes over its logits: normalizers, sums, gradient
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row, g_row, out = s_ptr + row * s_stride, t_ptr + row * t_stride, g_ptr + row * g_stride, out_ptr + row
    s_top, t_top = -float("inf"), -float("inf")
    s_best, t_best = 0, 0
    s_sum, t_sum = 0.0, 0.0
    for start in range(0, n_cols, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n_cols
        s_z = _logits(s_row, offsets, mask, s_scale, s_softcap, inv_temperature, S_HAS_SOFTCAP)
        t_z = _logits(t_row, offsets, mask, t_scale, t_softcap, inv_temperature, T_HAS_SOFTCAP)
        s_top, s_best, s_sum = _fold(tl.where(mask, s_z, -float("inf")), start, s_top, s_best, s_sum)
        t_top, t_best, t_sum = _fold(tl.where(mask, t_z, -float("inf")), start, t_top, t_best, t_sum)
    s_log_sum, t_log_sum = tl.log(s_sum), tl.log(t_sum)

    divergence, unclipped, pull, s_entropy, t_entropy = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, n_cols, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n_cols
        s_z = _logits(s_row, offsets, mask, s_scale, s_softcap, inv_temperature, S_HAS_SOFTCAP)
        t_z = _logits(t_row, offsets, mask, t_scale, t_softcap, inv_temperature, T_HAS_SOFTCAP)
        log_q, log_p = _log_prob(s_z, s_top, s_log_sum), _log_prob(t_z, t_top, t_log_sum)
        q, p = tl.where(mask, tl.exp(log_q), 0.0), tl.where(mask, tl.exp(log_p), 0.0)
        g, d = _entries(log_q, log_p, q, p, beta, MODE)
        s_entropy -= tl.sum(q * log_q, axis=0)
        t_entropy -= tl.sum(p * log_p, axis=0)
        unclipped += tl.sum(d, axis=0)
        if HAS_CLIP:
            g = tl.where(d < kl_clip, g, 0.0)
            d = tl.where(d >= kl_clip, kl_clip, d)
        divergence += tl.sum(d, axis=0)
        pull += tl.sum(g, axis=0)

    if NEEDS_GRAD:
        for start in range(0, n_cols, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < n_cols
            s_z = _logits(s_row, offsets, mask, s_scale, s_softcap, inv_temperature, S_HAS_SOFTCAP)
            t_z = _logits(t_row, offsets, mask, t_scale, t_softcap, inv_temperature, T_HAS_SOFTCAP)
            log_q, log_p = _log_prob(s_z, s_top, s_log_sum), _log_prob(t_z, t_top, t_log_sum)
            q = tl.exp(log_q)
            g, d = _entries(log_q, log_p, q, tl.exp(log_p), beta, MODE)
            if HAS_CLIP:
                g = tl.where(d < kl_clip, g, 0.0)
            g = (g - q * pull) * _slope(s_z, s_scale, s_softcap, inv_temperature, S_HAS_SOFTCAP)
            tl.store(g_row + offsets, g, mask=mask)

    # In the order of `_Statistics`
    tl.store(out, divergence)
    tl.store(out + out_stride, unclipped)
    tl.store(out + 2 * out_stride, pull)
    tl.store(out + 3 * out_stride, s_entropy)
    tl.store(out + 4 * out_stride, t_entropy)
    tl.store(out + 5 * out_stride, (s_best == t_best).to(tl.float32))
    tl.store(out + 6 * out_stride, s_top)
    tl.store(out + 7 * out_stride, s_log_sum)
    tl.store(out + 8 * out_stride, t_top)
    tl.store(out + 9 * out_stride, t_log_sum)


@triton.jit
def _tile_gradient_kernel(
    s_ptr,
    s_stride,
    t_ptr,
    t_stride,
    statistics_ptr,
    statistics_stride,
    weight_ptr,
    n_cols,
    beta,
    kl_clip,
    s_scale,
    s_softcap,
    t_scale,
    t_softcap,
    inv_temperature,
    MODE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    S_HAS_SOFTCAP: tl.constexpr,
    T_HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_cols
    s_row, statistics = s_ptr + row * s_stride, statistics_ptr + row
    s_z = _logits(s_row, offsets, mask, s_scale, s_softcap, inv_temperature, S_HAS_SOFTCAP)
    t_z = _logits(t_ptr + row * t_stride, offsets, mask, t_scale, t_softcap, inv_temperature, T_HAS_SOFTCAP)
    pull = tl.load(statistics + 2 * statistics_stride)
    s_top, s_log_sum = tl.load(statistics + 6 * statistics_stride), tl.load(statistics + 7 * statistics_stride)
    t_top, t_log_sum = tl.load(statistics + 8 * statistics_stride), tl.load(statistics + 9 * statistics_stride)
    log_q, log_p = _log_prob(s_z, s_top, s_log_sum), _log_prob(t_z, t_top, t_log_sum)
    q = tl.exp(log_q)
    g, d = _entries(log_q, log_p, q, tl.exp(log_p), beta, MODE)
    if HAS_CLIP:
        g = tl.where(d < kl_clip, g, 0.0)
    slope = _slope(s_z, s_scale, s_softcap, inv_temperature, S_HAS_SOFTCAP) * tl.load(weight_ptr + row)
    tl.store(s_row + offsets, (g - q * pull) * slope, mask=mask)


def _options(student, teacher, beta, temperature, kl_clip):
    return {
        "beta": beta,
        "kl_clip": 0.0 if kl_clip is None else kl_clip,
        "s_scale": student.logit_scale,
        "s_softcap": 1.0 if student.softcap is None else student.softcap,
        "t_scale": teacher.logit_scale,
        "t_softcap": 1.0 if teacher.softcap is None else teacher.softcap,
        "inv_temperature": 1 / temperature,
        "MODE": 0 if beta == 0.0 else 1 if beta == 1.0 else 2,
        "HAS_CLIP": kl_clip is not None,
        "S_HAS_SOFTCAP": student.softcap is not None,
        "T_HAS_SOFTCAP": teacher.softcap is not None,
        "BLOCK": _BLOCK,
        "num_warps": _WARPS,
    }


def sweep(student_z, teacher_z, statistics, gradient, student, teacher, beta, temperature, kl_clip, needs_grad):
    options = _options(student, teacher, beta, temperature, kl_clip)
    rows, columns = student_z.shape
    _sweep_kernel[(rows,)](
        student_z,
        student_z.stride(0),
        teacher_z,
        teacher_z.stride(0),
        gradient,
        gradient.stride(0),
        statistics,
        statistics.stride(0),
        columns,
        NEEDS_GRAD=needs_grad,
        **options,
    )


def tile_gradient(student_z, teacher_z, statistics, weight, student, teacher, beta, temperature, kl_clip):
    options = _options(student, teacher, beta, temperature, kl_clip)
    rows, columns = student_z.shape
    if rows:
        _tile_gradient_kernel[(rows, triton.cdiv(columns, _BLOCK))](
            student_z,
            student_z.stride(0),
            teacher_z,
            teacher_z.stride(0),
            statistics,
            statistics.stride(0),
            weight.contiguous(),
            columns,
            **options,
        )
