import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
from divergence_reference import (
    dense_linear_divergence,
    entry_divergence,
    naive_clipped_divergence,
    reference_divergence,
    reference_logits,
    reference_metrics,
)
from torch.utils._python_dispatch import TorchDispatchMode

from trl_opsd.opsd import divergence as module
from trl_opsd.opsd.divergence import DivergenceOutput, divergence, linear_divergence, linear_divergence_with_metrics


BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
CLIPS = [None, 1.0, 0.05, 1e-3, 1e-6]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# Absolute error of values, and error of gradients relative to their largest entry, by the dtype of the inputs. Those are
# rounded before the definition sees them, so what is left is float32 arithmetic, and the rounding of the gradient to that
# dtype.
TOLERANCES = {F64: (1e-12, 1e-10), F32: (1e-5, 1e-4), BF16: (1e-5, 8e-3)}


def assert_close(actual, expected, tolerance, relative=False):
    scale = max(expected.abs().max().item(), 1e-30) if relative and expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


@dataclass
class Problem:
    """Random hidden states and heads, and what the definition says of them."""

    tokens: int = 7
    student_rows: int = 151
    teacher_rows: int = 151
    student_width: int = 12
    teacher_width: int = 20
    dtype: torch.dtype = F32
    beta: float = 0.5
    temperature: float = 1.0
    kl_clip: float | None = None
    valid_vocab: int | None = None
    bias: bool = False
    scaling: dict = field(default_factory=dict)
    uniform: bool = False
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        self.student_hidden = normal(self.tokens, self.student_width).requires_grad_()
        self.student_head = normal(self.student_rows, self.student_width).requires_grad_()
        self.teacher_hidden = normal(self.tokens, self.teacher_width)
        self.teacher_head = normal(self.teacher_rows, self.teacher_width).mul_(0.7)
        self.student_bias = normal(self.student_rows).requires_grad_() if self.bias else None
        self.teacher_bias = normal(self.teacher_rows) if self.bias else None
        self.weight = torch.rand(self.tokens, generator=generator) + 0.1
        if self.uniform:
            self.weight.fill_(1 / max(self.tokens, 1))
        self.inputs = [self.student_hidden, self.student_head] + ([self.student_bias] if self.bias else [])
        self.objective = {"beta": self.beta, "temperature": self.temperature, "kl_clip": self.kl_clip}

    def gradients(self, per_token, **options):
        return torch.autograd.grad((per_token * self.weight.to(per_token.dtype)).sum(), self.inputs, **options)

    def linear(self, backend="fused") -> DivergenceOutput:
        return linear_divergence_with_metrics(
            self.student_hidden,
            self.student_head,
            self.teacher_hidden,
            self.teacher_head,
            valid_vocab=self.valid_vocab,
            student_bias=self.student_bias,
            teacher_bias=self.teacher_bias,
            backend=backend,
            **self.objective,
            **self.scaling,
        )

    def expected(self):
        logits = [
            reference_logits(
                getattr(self, f"{name}_hidden"),
                getattr(self, f"{name}_head"),
                getattr(self, f"{name}_bias"),
                self.scaling.get(f"{name}_logit_scale", 1.0),
                self.scaling.get(f"{name}_softcap"),
                self.valid_vocab,
            )
            for name in ("student", "teacher")
        ]
        return reference_metrics(*logits, **self.objective)

    def check(self, backend="fused"):
        value_tolerance, gradient_tolerance = TOLERANCES[self.dtype]
        if backend == "liger" and self.dtype == BF16:
            value_tolerance = gradient_tolerance = 2e-1  # its logits are in the dtype of the inputs
        output, expected = self.linear(backend), self.expected()
        if backend == "liger":
            assert self.uniform
            expected_value = expected["divergence"].mean().expand(self.tokens)
        else:
            expected_value = expected["divergence"]
        assert output.divergence.shape == (self.tokens,)
        assert_close(output.divergence, expected_value, value_tolerance)
        for name, value in zip(output._fields[1:], output[1:], strict=True):
            if value is not None:
                assert not value.requires_grad
                assert_close(value, expected[name], value_tolerance * (10 if name == "clip_fraction" else 1))
        for actual, wanted, tensor in zip(
            self.gradients(output.divergence), self.gradients(expected["divergence"]), self.inputs, strict=True
        ):
            assert actual.dtype == tensor.dtype
            assert_close(actual, wanted, gradient_tolerance, relative=True)


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":  # 3 tokens or so at a time, blocks of one token, casts of 64 columns
        monkeypatch.setattr(module, "_CPU_LOGITS_BYTES", 2 * 3 * 151 * 4)
        monkeypatch.setattr(module, "_BLOCK_ENTRIES", 100)
        monkeypatch.setattr(module, "_CAST_COLUMNS", 64)


class TestDefinition:
    @pytest.mark.parametrize("beta", BETAS)
    def test_without_a_clip_it_is_the_textbook_divergence(self, beta):
        student, teacher = torch.randn(5, 17, dtype=F64), torch.randn(5, 17, dtype=F64)
        q, p = student.softmax(-1), teacher.softmax(-1)

        def kl(a, b):
            return (a * (a / b).log()).sum(-1)

        m = (1 - beta) * q + beta * p
        expected = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
        assert_close(reference_divergence(student, teacher, beta=beta), expected, 1e-13)
        entries = entry_divergence(q, q.log(), p, p.log(), beta)
        assert entries.min() >= -1e-16

    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("kl_clip", [None, 0.02])
    def test_gradcheck(self, beta, kl_clip):
        generator = torch.Generator().manual_seed(1)
        student = torch.randn(3, 11, dtype=F64, generator=generator).requires_grad_()
        teacher = torch.randn(3, 11, dtype=F64, generator=generator)
        options = {"beta": beta, "kl_clip": kl_clip, "temperature": 1.3}
        torch.autograd.gradcheck(lambda z: reference_divergence(z, teacher, **options), student)
        torch.autograd.gradcheck(lambda z: divergence(z, teacher, **options), student)

    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("kl_clip", [None, 0.02])
    def test_the_benchmark_baseline_agrees(self, beta, kl_clip):
        problem = Problem(beta=beta, kl_clip=kl_clip, temperature=1.3)
        value = dense_linear_divergence(*_four(problem), **problem.objective)
        expected = problem.expected()["divergence"]
        assert_close(value, expected, 1e-5)
        for actual, wanted in zip(problem.gradients(value), problem.gradients(expected), strict=True):
            assert_close(actual, wanted, 1e-4, relative=True)


def _four(problem):
    return problem.student_hidden, problem.student_head, problem.teacher_hidden, problem.teacher_head


class TestDivergence:
    @pytest.mark.parametrize("dtype", [F64, F32, BF16])
    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("kl_clip", CLIPS)
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_matches_the_definition(self, dtype, beta, kl_clip, temperature, tiles):
        generator = torch.Generator().manual_seed(2)
        student = torch.randn(2, 3, 151, generator=generator).mul_(2).to(dtype).requires_grad_()
        teacher = torch.randn(2, 3, 151, generator=generator).mul_(2).to(dtype).requires_grad_()
        weight = torch.rand(2, 3, generator=generator).double()
        options = {"beta": beta, "kl_clip": kl_clip, "temperature": temperature}
        value, expected = divergence(student, teacher, **options), reference_divergence(student, teacher, **options)
        (value * weight).sum().backward()
        (wanted,) = torch.autograd.grad((expected * weight).sum(), student)
        value_tolerance, gradient_tolerance = TOLERANCES[dtype]
        assert value.dtype == (F64 if dtype == F64 else F32)
        assert_close(value, expected, value_tolerance)
        assert_close(student.grad, wanted, gradient_tolerance, relative=True)
        assert student.grad.dtype == dtype and teacher.grad is None


class TestLinearDivergence:
    @pytest.mark.parametrize("dtype", [F64, F32, BF16])
    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("kl_clip", CLIPS)
    def test_fused_matches_the_definition(self, dtype, beta, kl_clip, tiles):
        Problem(dtype=dtype, beta=beta, kl_clip=kl_clip, temperature=1.3).check()

    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("dtype", [F32, BF16])
    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 0.5},
            {"temperature": 2.0},
            {"tokens": 1},
            {"tokens": 0},
            {"student_rows": 1, "teacher_rows": 1},
            {"bias": True},
            {"scaling": {"student_logit_scale": 0.4, "teacher_logit_scale": 1.7}},
            {"scaling": {"student_softcap": 3.0, "teacher_softcap": 2.0}},
            {"scaling": {"student_softcap": 3.0}},
            {"student_rows": 160, "teacher_rows": 152, "valid_vocab": 151},
            {"valid_vocab": 100},
            {
                "bias": True,
                "student_rows": 160,
                "teacher_rows": 152,
                "valid_vocab": 151,
                "scaling": {"student_softcap": 4.0, "student_logit_scale": 1.5, "teacher_logit_scale": 0.5},
            },
        ],
        ids=str,
    )
    def test_fused_options(self, options, beta, dtype, uniform, tiles):
        for kl_clip in (None, 0.01):
            Problem(**options, dtype=dtype, beta=beta, kl_clip=kl_clip, uniform=uniform).check()

    @pytest.mark.parametrize("dtype", [F32, BF16])
    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 0.5},
            {"bias": True},
            {"student_rows": 160, "teacher_rows": 152, "valid_vocab": 151},
            {"tokens": 1},
            {"tokens": 0},
        ],
        ids=str,
    )
    def test_other_backends(self, options, beta, dtype):
        problem = Problem(**options, dtype=dtype, beta=beta, uniform=True)
        problem.check("liger")
        replace(problem, uniform=False).check("chunked")
        replace(problem, scaling={"student_softcap": 3.0, "teacher_logit_scale": 1.7}).check("chunked")

    def test_auto_and_the_pair(self):
        problem = Problem(kl_clip=0.01, beta=0.1)
        value, entropy = linear_divergence(*_four(problem), **problem.objective)
        output = problem.linear("fused")
        torch.testing.assert_close(value, output.divergence, rtol=0, atol=0)
        torch.testing.assert_close(entropy, output.student_entropy, rtol=0, atol=0)
        torch.testing.assert_close(problem.linear("auto").divergence, value, rtol=0, atol=0)

    def test_fields_that_a_backend_cannot_give(self):
        problem = Problem()
        assert [x is not None for x in problem.linear("chunked")] == [True, True, False, False, False, False]
        assert [x is not None for x in problem.linear("liger")] == [True, False, False, False, False, False]

    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("memory_bytes", [2 << 30, 0])
    @pytest.mark.parametrize("uniform", [True, False])
    def test_gradcheck(self, beta, memory_bytes, uniform, monkeypatch):
        monkeypatch.setattr(module, "_MEMORY_BYTES", memory_bytes)
        problem = Problem(
            tokens=3,
            student_rows=9,
            teacher_rows=9,
            student_width=4,
            teacher_width=3,
            dtype=F64,
            beta=beta,
            bias=True,
            kl_clip=0.05,
            uniform=uniform,
            scaling={"student_softcap": 3.0},
        )

        def loss(hidden, head, bias):
            changed = replace(problem)
            changed.student_hidden, changed.student_head, changed.student_bias = hidden, head, bias
            output = changed.linear()
            assert 0 < output.clip_fraction.max()  # the clip is at work
            return (output.divergence * problem.weight).sum()

        # The first backward scales what forward computed, later ones compute it anew
        torch.autograd.gradcheck(loss, problem.inputs, nondet_tol=1e-12)

    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("memory_bytes", [2 << 30, 0])
    def test_backward_twice(self, uniform, memory_bytes, monkeypatch):
        monkeypatch.setattr(module, "_MEMORY_BYTES", memory_bytes)
        problem = Problem(bias=True, kl_clip=0.01, uniform=uniform)
        value = problem.linear().divergence
        first = problem.gradients(value, retain_graph=True)
        for once, again in zip(first, problem.gradients(value), strict=True):
            assert_close(again, once, 1e-6, relative=True)

    def test_only_what_is_asked_for_gets_a_gradient(self):
        problem = Problem(bias=True, kl_clip=0.01)
        wanted = problem.gradients(problem.expected()["divergence"])
        for i, tensor in enumerate(problem.inputs):
            for other in problem.inputs:
                other.requires_grad_(other is tensor)
            value = problem.linear().divergence
            (actual,) = torch.autograd.grad((value * problem.weight).sum(), tensor)
            assert_close(actual, wanted[i], 1e-4, relative=True)
        with torch.no_grad():
            assert not problem.linear().divergence.requires_grad

    def test_autocast_does_not_round_the_result(self):
        problem = Problem(kl_clip=0.01)
        with torch.autocast("cpu", dtype=BF16):
            value = problem.linear().divergence
        assert value.dtype == F32
        assert_close(value, problem.expected()["divergence"], 0.05)
        for grad in problem.gradients(value):
            assert grad.dtype == F32


class TestEdges:
    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("kl_clip", CLIPS)
    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_equal_models_give_exactly_zero(self, beta, kl_clip, dtype, tiles):
        problem = Problem(beta=beta, kl_clip=kl_clip, dtype=dtype, bias=True, temperature=0.7)
        problem.teacher_hidden, problem.teacher_head = problem.student_hidden.detach(), problem.student_head.detach()
        problem.teacher_bias = problem.student_bias.detach()
        output = problem.linear()
        assert output.divergence.eq(0).all() and output.unclipped.eq(0).all() and output.clip_fraction.eq(0).all()
        assert output.top1_agreement.eq(1).all()
        for grad in problem.gradients(output.divergence):
            assert grad.eq(0).all()
        logits = torch.randn(5, 151, dtype=dtype).mul_(5).requires_grad_()
        value = divergence(logits, logits, beta=beta, kl_clip=kl_clip)
        assert value.eq(0).all()
        assert torch.autograd.grad(value.sum(), logits)[0].eq(0).all()

    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("kl_clip", CLIPS)
    def test_extreme_logits(self, beta, kl_clip):
        generator = torch.Generator().manual_seed(3)
        extremes = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])
        student = extremes[torch.randint(5, (40, 23), generator=generator)].requires_grad_()
        teacher = extremes[torch.randint(5, (40, 23), generator=generator)]
        value = divergence(student, teacher, beta=beta, kl_clip=kl_clip)
        expected = reference_divergence(student, teacher, beta=beta, kl_clip=kl_clip)
        (grad,) = torch.autograd.grad(value.sum(), student)
        (wanted,) = torch.autograd.grad(expected.sum(), student)
        assert value.isfinite().all() and grad.isfinite().all()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
        # The gradient is a difference of terms as large as the largest log ratio, 2e4
        assert_close(grad, wanted, 2e4 * 1e-7)

    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("kl_clip", CLIPS)
    def test_masked_columns(self, beta, kl_clip, tiles):
        masked = torch.arange(151) % 3 == 0
        problem = Problem(beta=beta, kl_clip=kl_clip, bias=True)
        with torch.no_grad():
            problem.student_bias[masked] = -math.inf
            problem.teacher_bias[masked] = -math.inf
        output = problem.linear()
        gradients = problem.gradients(output.divergence)
        kept = Problem(beta=beta, kl_clip=kl_clip, bias=True)
        keep = {name: getattr(kept, name)[~masked] for name in ("teacher_head", "teacher_bias", "student_bias")}
        kept.teacher_head, kept.teacher_bias, student_bias = keep.values()
        student_head, kept.student_bias = kept.student_head, student_bias
        kept.student_head = student_head[~masked]
        expected = kept.expected()
        for name, value in output._asdict().items():
            assert_close(value, expected[name], 1e-4)
        kept.inputs = [kept.student_hidden, student_head]
        for actual, wanted in zip(gradients, kept.gradients(expected["divergence"]), strict=False):
            assert_close(actual, wanted, 1e-4, relative=True)

    @pytest.mark.parametrize("beta", BETAS)
    def test_one_side_gives_no_probability(self, beta):
        student = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, 2.0]]).requires_grad_()
        teacher = torch.tensor([[0.5, 0.0, 2.0], [0.5, 0.0, -math.inf]])
        value = divergence(student, teacher, beta=beta)
        expected = reference_divergence(student, teacher, beta=beta)
        finite = expected.isfinite()
        assert finite.all() == (0 < beta < 1)
        assert_close(value[finite], expected[finite], 1e-5)
        assert (value[~finite] > 1e30).all()
        clipped = divergence(student, teacher, beta=beta, kl_clip=0.1)
        assert_close(clipped, reference_divergence(student, teacher, beta=beta, kl_clip=0.1), 1e-6)
        assert torch.autograd.grad(clipped.sum(), student)[0].isfinite().all()

    @pytest.mark.parametrize("beta", BETAS)
    def test_nearly_equal_models(self, beta):
        generator = torch.Generator().manual_seed(5)
        student = torch.randn(20, 30, generator=generator).requires_grad_()
        teacher = student.detach() + 0.18 * torch.rand(20, 30, generator=generator)
        value, expected = divergence(student, teacher, beta=beta), reference_divergence(student, teacher, beta=beta)
        (grad,) = torch.autograd.grad(value.sum(), student)
        (wanted,) = torch.autograd.grad(expected.sum(), student)
        assert_close(value, expected, 2e-7)
        assert_close(grad, wanted, 1e-5, relative=True)

    def test_top1_agreement(self):
        hidden, column = torch.ones(1, 1), torch.arange(70).unsqueeze(-1)
        student_head, teacher_head = (column == 5).float(), (column == 37).float()
        for head, expected in ((teacher_head, 0), (student_head, 1)):
            output = linear_divergence_with_metrics(hidden, student_head, hidden, head, beta=0.5)
            assert output.top1_agreement.tolist() == [expected]

    @pytest.mark.parametrize("kl_clip", [None, 0.01])
    @pytest.mark.parametrize("beta", BETAS)
    def test_a_nan_is_not_hidden(self, kl_clip, beta):
        problem = Problem(beta=beta, kl_clip=kl_clip)
        with torch.no_grad():
            problem.student_hidden[2, 0] = math.nan
        value = problem.linear().divergence
        assert value.isnan().tolist() == [i == 2 for i in range(7)]

    @pytest.mark.parametrize("beta", [1e-300, 1e-8, 1 - 1e-6, 1 - 1e-16])
    def test_beta_next_to_its_ends(self, beta):
        student, teacher = torch.randn(9, 50) * 20, torch.randn(9, 50) * 20
        assert_close(divergence(student, teacher, beta=beta), reference_divergence(student, teacher, beta=beta), 1e-4)

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"beta": 1.5}, ["`beta`"]),
            ({"temperature": 0.0}, ["`temperature`"]),
            ({"kl_clip": 0.0}, ["`kl_clip`"]),
            ({"kl_clip": -1.0}, ["`kl_clip`"]),
            ({"backend": "tiles"}, ["`backend`", "'fused'"]),
            ({"backend": "liger", "kl_clip": 0.1}, ["backend='liger'", "`kl_clip"]),
            ({"backend": "chunked", "kl_clip": 0.1}, ["backend='chunked'", "`kl_clip"]),
            ({"backend": "liger", "student_logit_scale": 2.0}, ["backend='liger'", "`student_logit_scale"]),
            ({"backend": "liger", "teacher_softcap": 2.0}, ["backend='liger'", "`teacher_softcap"]),
            ({"valid_vocab": 0}, ["`valid_vocab`"]),
            ({"valid_vocab": 12}, ["`valid_vocab`", "`student_head`"]),
            ({"teacher_head": torch.zeros(12, 4)}, ["`student_head`", "`teacher_head`", "`valid_vocab`"]),
            ({"teacher_hidden": torch.zeros(3, 4)}, ["`student_hidden`", "`teacher_hidden`"]),
            ({"student_hidden": torch.zeros(2, 5)}, ["`student_hidden`", "`student_head`"]),
            ({"student_hidden": torch.zeros(1, 2, 4)}, ["`student_hidden`", "`student_head`"]),
        ],
        ids=str,
    )
    def test_errors_name_the_arguments(self, change, names):
        arguments = {
            "student_hidden": torch.zeros(2, 4),
            "student_head": torch.zeros(11, 4),
            "teacher_hidden": torch.zeros(2, 4),
            "teacher_head": torch.zeros(11, 4),
            "beta": 0.5,
        }
        linear_divergence(**arguments)
        with pytest.raises(ValueError) as error:
            linear_divergence(**arguments | change)
        for name in names:
            assert name in str(error.value)

    def test_logits_of_different_shapes(self):
        with pytest.raises(ValueError, match="`student_logits`.*`teacher_logits`"):
            divergence(torch.zeros(2, 3), torch.zeros(2, 4), beta=0.5)


class TestClip:
    # Drawn by the standard library, because TRL's tests have no hypothesis
    @pytest.mark.parametrize("seed", range(150))
    def test_between_zero_and_the_unclipped(self, seed):
        drawn = random.Random(seed)
        vocabulary, spread = drawn.choice([1, 2, drawn.randint(3, 200)]), 10 ** drawn.uniform(-3, 3)
        beta, log_clip = drawn.choice([*BETAS, drawn.random()]), drawn.uniform(-20, 5)
        dtype = drawn.choice([F32, F64])
        generator = torch.Generator().manual_seed(seed)
        student = torch.randn(4, vocabulary, generator=generator, dtype=dtype) * spread
        teacher = torch.randn(4, vocabulary, generator=generator, dtype=dtype) * spread
        plain = divergence(student, teacher, beta=beta)
        clip = math.exp(log_clip)
        clipped = divergence(student, teacher, beta=beta, kl_clip=clip)
        assert plain.isfinite().all()
        assert (clipped >= 0).all() and (clipped <= plain).all()
        assert (clipped <= vocabulary * clip * (1 + 1e-5)).all()
        tighter = divergence(student, teacher, beta=beta, kl_clip=clip / 2)
        assert (tighter <= clipped).all()
        torch.testing.assert_close(divergence(student, teacher, beta=beta, kl_clip=1e30), plain, rtol=0, atol=0)

    @pytest.mark.parametrize("beta", BETAS)
    def test_rounding_does_not_make_it_negative(self, beta):
        student = torch.randn(200, 50, generator=torch.Generator().manual_seed(4))
        nearly = student * (1 + 1e-6)
        for kl_clip in (None, 1e-3):
            assert divergence(student, nearly, beta=beta, kl_clip=kl_clip).min() >= 0

    def test_the_property_fails_for_a_clip_of_the_signed_terms(self):
        student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 0.0]])
        assert naive_clipped_divergence(student, teacher, kl_clip=0.01).item() < 0
        assert divergence(student, teacher, beta=0.0, kl_clip=0.01).item() > 0

    def test_a_clipped_entry_has_no_gradient_of_its_own(self):
        # Everything clipped: a constant loss, hence no gradient at all
        student, teacher = torch.randn(4, 5).requires_grad_(), torch.randn(4, 5)
        for beta in BETAS:
            value = divergence(student, teacher, beta=beta, kl_clip=1e-12)
            assert_close(value, torch.full((4,), 5e-12), 1e-15)
            assert torch.autograd.grad(value.sum(), student)[0].eq(0).all()


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


class TestMemory:
    @pytest.mark.parametrize("uniform", [True, False])
    @pytest.mark.parametrize("beta", BETAS)
    def test_no_tensor_of_all_tokens_by_the_vocabulary(self, beta, uniform, monkeypatch):
        monkeypatch.setattr(module, "_CPU_LOGITS_BYTES", 2 * 16 * 512 * 4)
        problem = Problem(256, 512, 512, 8, 8, beta=beta, kl_clip=0.01, uniform=uniform)
        with LargestTensor() as largest:
            problem.gradients(problem.linear().divergence)
        assert largest.numel == 16 * 512
        with LargestTensor() as largest:
            problem.gradients(dense_linear_divergence(*_four(problem), **problem.objective))
        assert largest.numel == 256 * 512


class TestPanels:
    """Products in low precision, which only a GPU leaves unrounded: here in float32, of what they would be given."""

    # Bytes of both tiles and the panel; of the head's gradient in float32, and in bfloat16; of each head in bfloat16
    TILES, HEAD, CASTS = 2 * 4 * 151 * 4 + 16 * 151 * 2, 151 * 12 * 4, 151 * (12 + 20) * 2

    @pytest.fixture
    def seen(self, monkeypatch):
        """What the products of the backward and the projections have been given, and what may be held."""
        seen = {"products": [], "cast": [], "room": 2 << 30}

        def mm(out, a, b, dtype, accumulate=False):
            if accumulate:
                seen["products"].append((tuple(a.shape), a.dtype, out.dtype))
            elif b.dtype != dtype:
                seen["cast"].append(tuple(b.shape))  # a head that is not in the dtype of the products
            product = a.to(dtype).float() @ b.to(dtype).float()
            out.copy_(out.float() + product if accumulate else product)

        low = (torch.bfloat16, torch.float16)
        monkeypatch.setattr(module, "_operand_dtype", lambda tensor, exact, dtype: dtype if dtype in low else exact)
        monkeypatch.setattr(module, "_mm", mm)
        monkeypatch.setattr(module, "_memory_bytes", lambda device: seen["room"])
        monkeypatch.setattr(module, "_CAST_COLUMNS", 64)
        # Chunks of 4 tokens, and panels of as many chunks as the bytes of 16 in bfloat16: 2 whole ones, and 5 tokens
        monkeypatch.setattr(module, "_CPU_LOGITS_BYTES", 4 * 2 * 151 * 4)
        monkeypatch.setattr(module, "_LOGITS_BYTES", 16 * 151 * 2)
        return seen

    def problem(self, dtype, head_dtype, **changes):
        problem = Problem(tokens=37, dtype=dtype, kl_clip=0.05, uniform=True, bias=True, **changes)
        problem.student_head = problem.student_head.detach().to(head_dtype).requires_grad_()
        problem.teacher_head = problem.teacher_head.to(head_dtype)
        problem.inputs[1] = problem.student_head
        return problem

    @pytest.mark.parametrize("room", [2 << 30, TILES + HEAD + CASTS - 1, TILES + HEAD])
    @pytest.mark.parametrize(
        ("dtype", "head_dtype", "summed"),
        [(BF16, BF16, BF16), (BF16, F32, F32), (torch.float16, torch.float16, F32), (torch.float16, F32, F32)],
    )
    def test_several_chunks_to_a_panel(self, dtype, head_dtype, summed, room, seen):
        seen["room"] = room
        problem = self.problem(dtype, head_dtype)
        output, expected = problem.linear(), problem.expected()
        # A float32 head is rounded by the product, as autocast does
        assert_close(output.divergence, expected["divergence"], 1e-5 if dtype == head_dtype else 3e-3)
        wanted = problem.gradients(expected["divergence"])
        for actual, exact, tensor in zip(problem.gradients(output.divergence), wanted, problem.inputs, strict=True):
            assert actual.dtype == tensor.dtype
            assert_close(actual, exact, 1.5e-2, relative=True)
        heads = [(columns, operand, out) for (rows, columns), operand, out in seen["products"] if rows == 151]
        assert heads == [(16, dtype, summed), (16, dtype, summed), (5, dtype, summed)]
        # Where there is room a head of another dtype is cast once, and else by slabs for each chunk
        assert bool(seen["cast"]) == (head_dtype == F32 and room < 2 << 30)

    def test_of_many_panels_the_sum_is_in_float32(self, seen, monkeypatch):
        monkeypatch.setattr(module, "_ROUNDED_PANELS", 2)
        problem = self.problem(BF16, BF16)
        problem.gradients(problem.linear().divergence)
        assert {out for (rows, _), _, out in seen["products"] if rows == 151} == {F32}

    def test_a_teacher_in_float32_stays_in_it(self, seen):
        problem = self.problem(BF16, BF16)
        problem.teacher_hidden, problem.teacher_head = problem.teacher_hidden.float(), torch.randn(151, 20)
        assert_close(problem.linear().divergence, problem.expected()["divergence"], 1e-5)

    def test_a_head_that_both_have_is_cast_once(self, seen, monkeypatch):
        problem = self.problem(BF16, F32, student_width=20)
        problem.teacher_head = problem.student_head.detach()
        held = []

        def project(out, model, real=module._project):
            held.append(model.head.data_ptr())
            real(out, model)

        monkeypatch.setattr(module, "_project", project)
        problem.linear()
        assert len(set(held)) == 1 and not seen["cast"]


@pytest.mark.parametrize("room", [2 << 30, 0])
def test_nothing_has_a_gradient_of_nothing(room, monkeypatch):
    monkeypatch.setattr(module, "_memory_bytes", lambda device: room)
    problem = Problem(tokens=0, uniform=True)
    assert all(not gradient.any() for gradient in problem.gradients(problem.linear().divergence))


class TestTriton:
    def test_the_kernels_in_the_interpreter(self):
        # The interpreter has to be chosen before Triton is imported
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", "import test_divergence; test_divergence.check_kernels()"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def check_kernels():
    from trl_opsd.opsd import divergence_triton

    calls = set()

    def recorded(name, function):
        def call(*args):
            calls.add(name)
            return function(*args)

        return call

    for name in ("sweep", "tile_gradient"):
        setattr(divergence_triton, name, recorded(name, getattr(divergence_triton, name)))
    module._TRITON_DEVICES = ("cpu",)
    divergence_triton._BLOCK = 32
    size = {"tokens": 3, "student_rows": 80, "teacher_rows": 72, "valid_vocab": 71, "temperature": 1.3}
    for beta in (0.0, 0.1, 1.0):
        Problem(**size, beta=beta, uniform=True).check()
        Problem(**size, beta=beta, kl_clip=0.01, bias=True).check()
        scaling = {"student_softcap": 3.0, "teacher_softcap": 2.0, "student_logit_scale": 0.7}
        Problem(**size, beta=beta, kl_clip=0.01, scaling=scaling).check()
        TestEdges().test_equal_models_give_exactly_zero(beta, 0.01, F32, None)
        TestEdges().test_masked_columns(beta, 0.01, None)
        TestEdges().test_one_side_gives_no_probability(beta)
        TestEdges().test_nearly_equal_models(beta or 0.9)
        problem = Problem(**size, beta=beta, kl_clip=0.01, bias=True)
        problem.student_bias.data[3] = math.nan
        assert problem.linear().divergence.isnan().all()
    TestEdges().test_extreme_logits(0.5, 0.01)
    TestEdges().test_top1_agreement()
    Problem(tokens=0, beta=0.5).check()
    assert calls == {"sweep", "tile_gradient"}
