"""Distances between student and teacher: against slow loops, against each other, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmlite.distillation import losses
from llmlite.distillation.objective import DIVERGENCES, Distillation, LogitsTeacher, TopKTeacher
from llmlite.errors import ConfigError

N, V, K = 29, 41, 5


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


OPTIONS = {"generalised_jsd": {"beta": 0.3}, "skewed_forward_kl": {"alpha": 0.2}, "skewed_reverse_kl": {"alpha": 0.2}, "logit_mse": {"centred": True}}
PROBABILISTIC = [name for name in DIVERGENCES if name != "logit_mse"]


def pair(dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(N, V, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student_NV.to(dtype).requires_grad_(), teacher_NV.to(dtype)


def slow(name: str, student: list[float], teacher: list[float], temperature: float) -> float:
    """One token, one term at a time, straight from the papers."""

    def softmax(logits: list[float]) -> list[float]:
        weights = [math.exp(logit / temperature) for logit in logits]
        return [weight / sum(weights) for weight in weights]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    def mix(share: float, a: list[float], b: list[float]) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]

    p, q = softmax(student), softmax(teacher)
    if name == "forward_kl":
        return temperature**2 * kl(q, p)
    if name == "reverse_kl":
        return temperature**2 * kl(p, q)
    if name == "generalised_jsd":
        return temperature**2 * (0.3 * kl(q, mix(0.3, q, p)) + 0.7 * kl(p, mix(0.3, q, p)))
    if name == "skewed_forward_kl":
        return temperature**2 * kl(q, mix(0.2, q, p))
    if name == "skewed_reverse_kl":
        return temperature**2 * kl(p, mix(0.2, p, q))
    if name == "uld":
        return temperature**2 * sum(abs(x - y) for x, y in zip(sorted(p), sorted(q), strict=True))
    if name == "total_variation":
        return temperature**2 * sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    shift = sum(s - t for s, t in zip(student, teacher, strict=True)) / len(student)
    return sum((s - t - shift) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_losses_equal_a_slow_loop(name, temperature):
    student_NV, teacher_NV = pair(torch.float64)
    expected = [slow(name, s, t, temperature) for s, t in zip(student_NV.tolist(), teacher_NV.tolist(), strict=True)]
    ours_N = DIVERGENCES[name](student_NV, teacher_NV, temperature, **OPTIONS.get(name, {}))
    torch.testing.assert_close(ours_N.detach(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_pass_gradcheck(name):
    student_NV, teacher_NV = pair(torch.float64)
    few = student_NV[:3, :7].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: DIVERGENCES[name](logits, teacher_NV[:3, :7], 1.5, **OPTIONS.get(name, {})), few)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    _, teacher_NV = pair()
    student_NV = teacher_NV.clone().requires_grad_()
    loss_N = DIVERGENCES[name](student_NV, teacher_NV, 2.0)
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    assert loss_N.abs().max() < 1e-5
    assert grad_NV.abs().max() < 1e-5


@pytest.mark.parametrize("name", PROBABILISTIC)
def test_logprobs_and_shifted_logits_are_the_same_teacher(name):
    student_NV, teacher_NV = pair()
    loss_N = DIVERGENCES[name](student_NV, teacher_NV, 2.0)
    torch.testing.assert_close(DIVERGENCES[name](student_NV, teacher_NV.log_softmax(-1), 2.0), loss_N)
    torch.testing.assert_close(DIVERGENCES[name](student_NV + 3, teacher_NV - 5, 2.0), loss_N)


def test_limits_connect_the_divergences():
    student_NV, teacher_NV = pair(torch.float64)
    forward_N, reverse_N = losses.forward_kl(student_NV, teacher_NV), losses.reverse_kl(student_NV, teacher_NV)
    small = 1e-6
    torch.testing.assert_close(losses.generalised_jsd(student_NV, teacher_NV, beta=small) / small, forward_N, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses.generalised_jsd(student_NV, teacher_NV, beta=1 - small) / small, reverse_N, rtol=1e-3, atol=1e-4)
    assert torch.equal(losses.generalised_jsd(student_NV, teacher_NV, beta=0.0), forward_N)
    assert torch.equal(losses.generalised_jsd(student_NV, teacher_NV, beta=1.0), reverse_N)
    assert torch.equal(losses.skewed_forward_kl(student_NV, teacher_NV, alpha=0.0), forward_N)
    assert torch.equal(losses.skewed_reverse_kl(student_NV, teacher_NV, alpha=0.0), reverse_N)
    torch.testing.assert_close(losses.reverse_kl(student_NV, teacher_NV), losses.forward_kl(teacher_NV, student_NV))
    torch.testing.assert_close(losses.generalised_jsd(student_NV, teacher_NV), losses.generalised_jsd(teacher_NV, student_NV))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_gradient_keeps_its_size_as_temperature_grows(name):
    student_NV, teacher_NV = pair(torch.float64, scale=1e-2)  # in the linear regime exactly so
    norms = [torch.autograd.grad(DIVERGENCES[name](student_NV, teacher_NV, t).sum(), student_NV)[0].norm() for t in (1.0, 4.0)]
    torch.testing.assert_close(norms[0], norms[1], rtol=2e-2, atol=0)


def test_kl_at_high_temperature_becomes_half_the_centred_logit_mse():
    student_NV, teacher_NV = pair(torch.float64)
    torch.testing.assert_close(
        losses.forward_kl(student_NV, teacher_NV, temperature=1e4), losses.logit_mse(student_NV, teacher_NV, centred=True) / 2, rtol=1e-3, atol=0
    )


def everything_at_1e4(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(student_NV > 0, 1e4, -1e4), torch.where(teacher_NV > 0, 1e4, -1e4)


def masked_in(which: str, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    student_NV, teacher_NV = student_NV.clone(), teacher_NV.clone()
    if "student" in which:
        student_NV[:, 3:6] = -math.inf
    if "teacher" in which:
        teacher_NV[:, 5:9] = -math.inf
    return student_NV, teacher_NV


EDGES = {
    "extreme": everything_at_1e4,
    "student masked": lambda s, t: masked_in("student", s, t),
    "teacher masked": lambda s, t: masked_in("teacher", s, t),
    "both masked": lambda s, t: masked_in("student teacher", s, t),
    "one-hot teacher": lambda s, t: (s, torch.full_like(t, -math.inf).index_fill(1, torch.tensor([7]), 0.0)),
}


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_probabilities_and_extreme_logits_stay_finite_on_both_paths(name, edge, temperature):
    student_NV, teacher_NV = EDGES[edge](pair()[0].detach(), pair()[1])
    student_NV.requires_grad_()
    loss_N = DIVERGENCES[name](student_NV, teacher_NV, temperature)
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    assert loss_N.isfinite().all()
    assert grad_NV.isfinite().all()
    loss = Distillation(LogitsTeacher(teacher_NV), divergence=name, temperature=temperature, kd_weight=1.0)
    (values_N,), analytic_NV = loss.values_and_grad_(student_NV.detach().clone(), teacher_NV)
    size = max(1.0, float(loss_N.max().detach()) / temperature**2)  # what cancels is as large as log 0 or the logits
    torch.testing.assert_close(values_N, loss_N.detach(), rtol=1e-5, atol=1e-6 * size * temperature**2)
    torch.testing.assert_close(analytic_NV, grad_NV, rtol=1e-4, atol=1e-6 * size * temperature)


def test_a_masked_token_equals_a_vocabulary_without_it():
    student_NV, teacher_NV = pair()
    masked = [logits.detach().index_fill(1, torch.tensor([4, 9]), -math.inf) for logits in (student_NV, teacher_NV)]
    rest = [token for token in range(V) if token not in (4, 9)]
    for name, divergence in DIVERGENCES.items():
        torch.testing.assert_close(divergence(*masked, 1.5), divergence(student_NV[:, rest], teacher_NV[:, rest], 1.5).detach(), msg=name)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "uld"])  # which pads instead
@pytest.mark.parametrize(("student_size", "teacher_size"), [(V, V - 6), (V - 6, V)])
def test_differently_padded_vocabularies_are_compared_on_the_shared_prefix(name, student_size, teacher_size):
    student_NV, teacher_NV = pair()
    logits_NV = student_NV[:, :student_size].detach().requires_grad_()
    loss_N = DIVERGENCES[name](logits_NV, teacher_NV[:, :teacher_size])
    shared = min(student_size, teacher_size)
    torch.testing.assert_close(loss_N, DIVERGENCES[name](student_NV[:, :shared], teacher_NV[:, :shared]))
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    assert not grad_NV[:, shared:].any()


# top-k


def slow_top_k(student: list[float], ids: list[int], logprobs: list[float], temperature: float, tail: str) -> float:
    weights = [math.exp(logit / temperature) for logit in student]
    p = [weight / sum(weights) for weight in weights]
    q = [math.exp(logprob) for logprob in logprobs]
    if tail == "renormalise":
        q = [share / sum(q) for share in q]
        return temperature**2 * sum(share * math.log(share / p[token]) for token, share in zip(ids, q, strict=True))
    rest_q, rest_p = 1 - sum(q), 1 - sum(p[token] for token in ids)
    return temperature**2 * (sum(share * math.log(share / p[token]) for token, share in zip(ids, q, strict=True)) + rest_q * math.log(rest_q / rest_p))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_equals_a_slow_loop_and_passes_gradcheck(tail, temperature):
    student_NV, teacher_NV = pair(torch.float64)
    ids_NK, logprobs_NK = losses.top_k_teacher(teacher_NV, K, temperature)
    rows = zip(student_NV.tolist(), ids_NK.tolist(), logprobs_NK.tolist(), strict=True)
    expected = [slow_top_k(student, ids, logprobs, temperature, tail) for student, ids, logprobs in rows]
    torch.testing.assert_close(
        losses.top_k_forward_kl(student_NV, ids_NK, logprobs_NK, temperature, tail).detach(), torch.tensor(expected, dtype=torch.float64)
    )
    few = student_NV[:3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: losses.top_k_forward_kl(logits, ids_NK[:3], logprobs_NK[:3], temperature, tail), few)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_k_with_every_token_is_forward_kl(tail):
    student_NV, teacher_NV = pair()
    ids_NK, logprobs_NK = losses.top_k_teacher(teacher_NV, V, 2.0)
    loss_N = losses.top_k_forward_kl(student_NV, ids_NK, logprobs_NK, 2.0, tail)
    torch.testing.assert_close(loss_N, losses.forward_kl(student_NV, teacher_NV, 2.0), rtol=1e-4, atol=1e-2 if tail == "bucket" else 1e-5)


def test_top_k_with_a_bucket_is_a_lower_bound_that_rises_with_k():
    student_NV, teacher_NV = pair(torch.float64)
    full_N = losses.forward_kl(student_NV, teacher_NV)
    previous_N = torch.zeros_like(full_N)
    for k in (1, 3, 10, 30):
        loss_N = losses.top_k_forward_kl(student_NV, *losses.top_k_teacher(teacher_NV, k))
        assert (loss_N >= previous_N - 1e-12).all()
        assert (loss_N <= full_N + 1e-12).all()
        previous_N = loss_N


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_unused_places_and_foreign_ids_are_as_if_they_were_not_there(tail):
    student_NV, teacher_NV = pair()
    ids_NK, logprobs_NK = losses.top_k_teacher(teacher_NV, K)
    padded_ids_NK, padded_NK = F.pad(ids_NK, (0, 2)), F.pad(logprobs_NK, (0, 1), value=-math.inf)
    padded_ids_NK[:, -1] = V + 100  # beyond the student's vocabulary: its mass joins the tail
    padded_NK = F.pad(padded_NK, (0, 1), value=-9.0)
    ours_N = losses.top_k_forward_kl(student_NV, padded_ids_NK, padded_NK, 1.0, tail)
    torch.testing.assert_close(ours_N, losses.top_k_forward_kl(student_NV, ids_NK, logprobs_NK, 1.0, tail))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("case", ["extreme", "tail impossible for the student", "certain teacher", "silent teacher", "mass above one"])
def test_top_k_edges_stay_finite_on_both_paths(case, tail):
    student_NV, teacher_NV = pair()
    student_NV = student_NV.detach()
    ids_NK, logprobs_NK = losses.top_k_teacher(teacher_NV, K)
    if case == "extreme":
        student_NV = student_NV.sign() * 1e4
    elif case == "tail impossible for the student":
        student_NV = torch.full_like(student_NV, -math.inf).scatter(1, ids_NK, 1.0)
    elif case == "certain teacher":
        logprobs_NK = torch.full_like(logprobs_NK, -math.inf).index_fill(1, torch.tensor([0]), 0.0)
    elif case == "silent teacher":
        logprobs_NK = torch.full_like(logprobs_NK, -math.inf)
    else:
        logprobs_NK = logprobs_NK + 0.5  # rounding of a cache, exaggerated
    student_NV.requires_grad_()
    loss_N = losses.top_k_forward_kl(student_NV, ids_NK, logprobs_NK, 1.0, tail)
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    loss = Distillation(TopKTeacher(ids_NK, logprobs_NK, tail), kd_weight=1.0)
    (values_N,), analytic_NV = loss.values_and_grad_(student_NV.detach().clone(), ids_NK, logprobs_NK)
    assert loss_N.isfinite().all()
    assert grad_NV.isfinite().all()
    torch.testing.assert_close(values_N, loss_N.detach())
    torch.testing.assert_close(analytic_NV, grad_NV, rtol=1e-5, atol=1e-6)


# what cannot work


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures_are_refused(temperature):
    student_NV, teacher_NV = pair()
    for divergence in DIVERGENCES.values():
        with pytest.raises(ConfigError, match="temperature="):
            divergence(student_NV, teacher_NV, temperature)
    with pytest.raises(ConfigError, match="temperature="):
        Distillation(LogitsTeacher(teacher_NV), temperature=temperature)


def test_impossible_options_are_refused_when_the_objective_is_made():
    student_NV, teacher_NV = pair()
    with pytest.raises(ConfigError, match=r"beta=1\.5"):
        Distillation(LogitsTeacher(teacher_NV), divergence="generalised_jsd", beta=1.5)
    with pytest.raises(ConfigError, match=r"alpha=1\.0"):
        losses.skewed_reverse_kl(student_NV, teacher_NV, alpha=1.0)
    with pytest.raises(ConfigError, match="gamma"):
        Distillation(LogitsTeacher(teacher_NV), divergence="forward_kl", gamma=1)
    with pytest.raises(ConfigError, match="2 problems"):
        Distillation(TopKTeacher(*losses.top_k_teacher(teacher_NV, 2)), divergence="reverse_kl", kd_weight=-1.0)
    with pytest.raises(ConfigError, match="'bucket' or 'renormalise'"):
        Distillation(TopKTeacher(*losses.top_k_teacher(teacher_NV, 2), tail="none"))
