"""What the divergence is, written for reading: the definition every path is held to, and the dense baseline."""

import math

import torch
from torch.nn import functional as F


def entry_divergence(q, log_q, p, log_p, beta):
    """`d_v >= 0` of each vocabulary entry, from the formula; the sum over entries is the divergence."""

    def kl(a, log_a, b, log_b):
        # a log(a / b) - a + b, where 0 log 0 is 0
        return a * torch.where(a > 0, log_a - log_b, 0.0) - a + b

    if beta == 0.0:
        return kl(p, log_p, q, log_q)
    if beta == 1.0:
        return kl(q, log_q, p, log_p)
    m = (1 - beta) * q + beta * p
    log_m = torch.where(m > 0, m, 1.0).log()
    return beta * kl(p, log_p, m, log_m) + (1 - beta) * kl(q, log_q, m, log_m)


def reference_metrics(student_logits, teacher_logits, *, beta, temperature=1.0, kl_clip=None):
    """
    The definition, in float64. The logarithms are those of the normalized logits, so that a probability too small for
    float64 still has one.
    """
    log_q, log_p = (F.log_softmax(z.double() / temperature, dim=-1) for z in (student_logits, teacher_logits.detach()))
    q, p = log_q.exp(), log_p.exp()
    d = entry_divergence(q, log_q, p, log_p, beta)
    unclipped = d.sum(-1)
    divergence = unclipped if kl_clip is None else d.clamp(max=kl_clip).sum(-1)
    return {
        "divergence": divergence,
        "student_entropy": -(q * torch.where(q > 0, log_q, 0.0)).sum(-1),
        "teacher_entropy": -(p * torch.where(p > 0, log_p, 0.0)).sum(-1),
        "top1_agreement": (student_logits.argmax(-1) == teacher_logits.argmax(-1)).double(),
        "unclipped": unclipped,
        "clip_fraction": torch.where(unclipped > 0, 1 - divergence / unclipped, 0.0),
    }


def reference_divergence(student_logits, teacher_logits, **options):
    return reference_metrics(student_logits, teacher_logits, **options)["divergence"]


def reference_logits(hidden, head, bias=None, logit_scale=1.0, softcap=None, valid_vocab=None):
    """Logits in float64, with everything that may happen to them between the head and the softmax."""
    logits = F.linear(hidden.double(), head.double(), None if bias is None else bias.double()) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if valid_vocab is not None:
        logits = logits[:, :valid_vocab]
    return logits


def naive_clipped_divergence(student_logits, teacher_logits, *, kl_clip):
    """Forward KL as others clip it: each p log(p / q) from above. Its negative terms keep their full size."""
    log_q, log_p = F.log_softmax(student_logits.double(), -1), F.log_softmax(teacher_logits.double(), -1)
    return (log_p.exp() * (log_p - log_q)).clamp(max=kl_clip).sum(-1)


def dense_linear_divergence(
    student_hidden, student_head, teacher_hidden, teacher_head, *, beta, temperature=1.0, kl_clip=None
):
    """
    The benchmark's baseline: full logits of both models in the dtype of the inputs, log-softmax, ordinary autograd. As
    lean as that allows: without a clip, the terms that sum to zero are left out.
    """
    log_q = F.log_softmax((student_hidden @ student_head.t()).float() / temperature, dim=-1)
    with torch.no_grad():
        log_p = F.log_softmax((teacher_hidden @ teacher_head.t()).float() / temperature, dim=-1)
    if beta == 0.0:
        p = log_p.exp()
        d = p * (log_p - log_q) if kl_clip is None else p * (log_p - log_q) - p + log_q.exp()
    elif beta == 1.0:
        q = log_q.exp()
        d = q * (log_q - log_p) if kl_clip is None else q * (log_q - log_p) - q + log_p.exp()
    else:
        log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
        d = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return (d if kl_clip is None else d.clamp(max=kl_clip)).sum(-1)
