"""Distances between student and teacher: against slow loops, against each other, at the edges, and through the chunked engine."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmlite.distillation import gradients, logit_products, losses
from llmlite.distillation.hidden import attention_transfer, hidden_cosine, hidden_mse
from llmlite.distillation.objective import DIVERGENCES, Distillation, HiddenTeacher, LogitsTeacher, TopKTeacher
from llmlite.errors import ConfigError
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import LogitTransform

N, V, D, E, K = 29, 41, 8, 6, 5


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


# in the chunked engine


def mixed(name: str, teacher: object, labels_N: Tensor | None, temperature: float) -> Distillation:
    return Distillation(teacher, labels_N, divergence=name, temperature=temperature, ce_weight=0.3, kd_weight=0.7, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("with_labels", [True, False], ids=["ce", "alone"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher_vocabulary", [V, V - 6, V + 6])
@pytest.mark.parametrize("name", [*DIVERGENCES, "top_k bucket", "top_k renormalise"])
def test_chunked_equals_autograd_on_full_logits(name, teacher_vocabulary, temperature, with_labels):
    generator = torch.Generator().manual_seed(1)
    hidden_ND, weight_VD = torch.randn(N, D, generator=generator).requires_grad_(), torch.randn(V, D, generator=generator).requires_grad_()
    teacher_NE, head_VE = torch.randn(N, E, generator=generator), torch.randn(teacher_vocabulary, E, generator=generator)
    labels_N = torch.randint(0, V, (N,), generator=generator)
    keep_N = torch.rand(N, generator=generator) < 0.7
    student, teacher = LogitTransform(0.8, 6.0), LogitTransform(1.2, 4.0)

    logits_NV, teacher_NV = student(hidden_ND @ weight_VD.T)[keep_N], teacher(teacher_NE @ head_VE.T)
    if name.startswith("top_k"):
        tail = name.split()[1]
        ids_NK, logprobs_NK = losses.top_k_teacher(teacher_NV, K, temperature)
        kd_N = losses.top_k_forward_kl(logits_NV, ids_NK[keep_N], logprobs_NK[keep_N], temperature, tail)
        objective = mixed("forward_kl", TopKTeacher(ids_NK.to(torch.uint16), logprobs_NK, tail), labels_N if with_labels else None, temperature)
    else:
        kd_N = DIVERGENCES[name](logits_NV, teacher_NV[keep_N], temperature, **OPTIONS.get(name, {}))
        objective = mixed(name, HiddenTeacher(teacher_NE, head_VE, transform=teacher), labels_N if with_labels else None, temperature)
    full = 0.7 * kd_N.sum() / 11 + (0.3 * F.cross_entropy(logits_NV, labels_N[keep_N], reduction="sum") / 11 if with_labels else 0)
    expected = torch.autograd.grad(full, [hidden_ND, weight_VD])

    result = chunked_head_loss(hidden_ND, weight_VD, objective, keep_N=keep_N, num_items_in_batch=11, transform=student, chunk_tokens=6)
    assert abs(result.loss - full) < 1e-5 * full
    torch.testing.assert_close(result.parts[objective.names[-1]], kd_N.detach().sum() / 11)
    for ours, theirs in zip(torch.autograd.grad(result.loss, [hidden_ND, weight_VD]), expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    with torch.no_grad():
        again = chunked_head_loss(hidden_ND, weight_VD, objective, keep_N=keep_N, num_items_in_batch=11, transform=student, chunk_tokens=6)
    torch.testing.assert_close(again.loss, full.detach())


@pytest.mark.parametrize("centred", [False, True])
def test_the_written_gradient_of_logit_mse_leaves_out_masked_tokens_as_autograd_does(centred):
    student_NV, teacher_NV = pair()
    student_NV = student_NV.detach().index_fill(1, torch.tensor([3, 7]), -math.inf).requires_grad_()
    teacher_NV[2:9, 7:11] = -math.inf
    expected_N = losses.logit_mse(student_NV, teacher_NV, centred=centred)
    (expected_NV,) = torch.autograd.grad(expected_N.sum(), student_NV)
    logits_NV = student_NV.detach().clone()
    values_N, grad_NV = gradients.logit_mse_gradient(logits_NV, teacher_NV, centred, out_NV=logits_NV)
    assert grad_NV is logits_NV
    torch.testing.assert_close(values_N, expected_N.detach())
    torch.testing.assert_close(grad_NV, expected_NV)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_through_the_engine_pass_gradcheck(name):
    _, teacher_NV = pair(torch.float64)
    weight_VD = torch.randn(V, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden_ND = torch.randn(4, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    objective = mixed(name, LogitsTeacher(teacher_NV[:4]), torch.tensor([1, 2, 3, 4]), 1.5)
    assert torch.autograd.gradcheck(lambda hidden: chunked_head_loss(hidden, weight_VD, objective, chunk_tokens=3).loss, hidden_ND)


def test_every_teacher_that_knows_the_distribution_teaches_the_same():
    hidden_ND, head = torch.randn(N, E), nn.Linear(E, V)
    logits_NV = head(hidden_ND).detach()
    teachers = [
        HiddenTeacher(hidden_ND, head),
        HiddenTeacher(hidden_ND, head.weight, head_bias_V=head.bias),
        HiddenTeacher(hidden_ND, nn.Sequential(head)),
        LogitsTeacher(logits_NV),
        LogitsTeacher(logits_NV.log_softmax(-1)),
        TopKTeacher(*losses.top_k_teacher(logits_NV, V), tail="renormalise"),
    ]
    student_ND, weight_VD = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    grads = [torch.autograd.grad(chunked_head_loss(student_ND, weight_VD, Distillation(t), chunk_tokens=6).loss, student_ND)[0] for t in teachers]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])
    assert head.weight.grad is None


def test_a_bfloat16_teacher_under_autocast_teaches_a_float32_student():
    teacher_NE, head_VE = torch.randn(N, E), torch.randn(V, E)
    hidden_ND, weight_VD = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    exact = chunked_head_loss(hidden_ND, weight_VD, Distillation(HiddenTeacher(teacher_NE, head_VE)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = chunked_head_loss(hidden_ND, weight_VD, Distillation(HiddenTeacher(teacher_NE.bfloat16(), head_VE.bfloat16())), chunk_tokens=6)
    rounded.loss.backward()
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=2e-2, atol=1e-2)
    assert weight_VD.grad is not None
    assert weight_VD.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))])
        return result


@pytest.mark.parametrize("name", [*DIVERGENCES, "top_k"])
def test_neither_student_nor_teacher_ever_has_full_logits(name):
    tokens, vocabulary = 64, 300
    hidden_ND, weight_VD = torch.randn(tokens, D, requires_grad=True), torch.randn(vocabulary, D, requires_grad=True)
    labels_N = torch.randint(0, vocabulary, (tokens,))
    if name == "top_k":
        objective = Distillation(TopKTeacher(*losses.top_k_teacher(torch.randn(tokens, vocabulary), 4)), labels_N)
    else:
        objective = Distillation(HiddenTeacher(torch.randn(tokens, E), torch.randn(vocabulary, E)), labels_N, divergence=name, temperature=2.0)
    with Largest() as largest:
        chunked_head_loss(hidden_ND, weight_VD, objective, chunk_tokens=16).loss.backward()
    assert largest.elements == 16 * vocabulary


@pytest.mark.parametrize("with_labels", [True, False], ids=["ce", "alone"])
@pytest.mark.parametrize("trains", ["everything", "hidden states", "head"])
@pytest.mark.parametrize("teacher_vocabulary", [V, V - 6, V + 6, None], ids=["same size", "smaller", "larger", "same head"])
def test_logit_mse_of_plain_heads_needs_no_logits(teacher_vocabulary, trains, with_labels, monkeypatch):
    monkeypatch.setattr(logit_products, "_ROWS", 7)
    generator = torch.Generator().manual_seed(5)
    hidden_ND, weight_VD = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    teacher_ND = torch.randn(N, D, generator=generator)
    head_VD = weight_VD if teacher_vocabulary is None else torch.randn(teacher_vocabulary, D, generator=generator)
    labels_N, keep_N = torch.randint(0, V, (N,), generator=generator), torch.arange(N) % 4 != 1
    leaves = [tensor.requires_grad_() for tensor, what in ((hidden_ND, "head"), (weight_VD, "hidden states")) if trains != what]

    logits_NV = (hidden_ND @ weight_VD.T)[keep_N]
    kd_N = losses.logit_mse(logits_NV, (teacher_ND @ head_VD.detach().T)[keep_N])
    full = 0.7 * kd_N.sum() / 11 + (0.3 * F.cross_entropy(logits_NV, labels_N[keep_N], reduction="sum") / 11 if with_labels else 0)
    expected = torch.autograd.grad(full, leaves)

    teacher = HiddenTeacher(teacher_ND, head_VD)
    objective = Distillation(teacher, labels_N if with_labels else None, divergence="logit_mse", ce_weight=0.3, kd_weight=0.7)
    monkeypatch.setattr(teacher, "signal", lambda *_: pytest.fail("the teacher's logits were asked for"))
    with Largest() as largest:
        result = chunked_head_loss(hidden_ND, weight_VD, objective, keep_N=keep_N, num_items_in_batch=11, chunk_tokens=6, return_per_token=True)
        gradients_ = torch.autograd.grad(result.loss, leaves)
    assert largest.elements == (V if teacher_vocabulary is None else max(V, teacher_vocabulary)) * D  # a head; a chunk of logits has 6 V
    torch.testing.assert_close(result.loss, full.detach())
    assert result.per_token is not None
    torch.testing.assert_close(result.per_token["logit_mse"][keep_N], kd_N.detach())
    for ours, theirs in zip(gradients_, expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    with torch.no_grad():
        torch.testing.assert_close(chunked_head_loss(hidden_ND, weight_VD, objective, keep_N=keep_N, num_items_in_batch=11).loss, full.detach())


def test_logit_mse_without_logits_is_exact_for_a_student_close_to_its_teacher():
    generator = torch.Generator().manual_seed(6)
    teacher_ND, head_VD = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    hidden_ND = (teacher_ND + 1e-4 * torch.randn(N, D, generator=generator)).requires_grad_()
    weight_VD = (head_VD + 1e-4 * torch.randn(V, D, generator=generator)).requires_grad_()
    ours = torch.autograd.grad(
        chunked_head_loss(hidden_ND, weight_VD, Distillation(HiddenTeacher(teacher_ND, head_VD), divergence="logit_mse", kd_weight=1.0)).loss,
        [hidden_ND, weight_VD],
    )
    exact_ND, exact_VD = (tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD))
    exact = losses.logit_mse(exact_ND @ exact_VD.T, teacher_ND.double() @ head_VD.double().T).mean()
    for mine, theirs in zip(ours, torch.autograd.grad(exact, [exact_ND, exact_VD]), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("with_labels", [False, True])
def test_logit_mse_without_logits_is_float64_for_float64_hidden_states(with_labels):
    hidden_ND, weight_VD = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randn(V, D)
    teacher = HiddenTeacher(torch.randn(N, D), torch.randn(V, D))
    objective = Distillation(teacher, torch.zeros(N, dtype=torch.int64) if with_labels else None, divergence="logit_mse")
    result = chunked_head_loss(hidden_ND, weight_VD, objective, return_per_token=True)
    assert result.per_token is not None
    assert {result.loss.dtype, *(part.dtype for part in (*result.parts.values(), *result.per_token.values()))} == {torch.float64}


@pytest.mark.parametrize("what", ["few tokens", "centred", "bias", "softcap", "teacher's softcap", "bfloat16", "autocast", "narrower", "module"])
def test_logit_mse_goes_through_logits_where_products_of_heads_would_not_do(what):
    tokens = D if what == "few tokens" else N
    hidden_ND, weight_VD = torch.randn(tokens, D), torch.randn(V, D)
    teacher = HiddenTeacher(
        torch.randn(tokens, E if what == "narrower" else D),
        nn.Sequential(nn.Linear(D, V, bias=False)) if what == "module" else torch.randn(V, E if what == "narrower" else D),
        head_bias_V=torch.randn(V) if what == "bias" else None,
        transform=LogitTransform(softcap=3.0) if what == "teacher's softcap" else None,
    )
    asked = []
    signal = teacher.signal
    teacher.signal = lambda *args: asked.append(1) or signal(*args)  # type: ignore[method-assign]
    if what == "bfloat16":
        hidden_ND, weight_VD = hidden_ND.bfloat16(), weight_VD.bfloat16()
    objective = Distillation(teacher, divergence="logit_mse", kd_weight=1.0, **({"centred": True} if what == "centred" else {}))
    transform = LogitTransform(softcap=3.0) if what == "softcap" else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "autocast"):
        chunked_head_loss(hidden_ND.requires_grad_(), weight_VD, objective, transform=transform).loss.backward()
    assert asked


# hidden states and attention


def test_hidden_losses_equal_a_slow_loop():
    student_NE, teacher_NE = torch.randn(4, E), torch.randn(4, E)
    mse = [sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / E for s, t in zip(student_NE.tolist(), teacher_NE.tolist(), strict=True)]
    torch.testing.assert_close(hidden_mse(student_NE, teacher_NE), torch.tensor(mse))
    torch.testing.assert_close(hidden_mse(student_NE, teacher_NE, normalise=True), torch.tensor(mse) / teacher_NE.square().mean(-1))
    cosine = [sum(a * b for a, b in zip(s, t, strict=True)) for s, t in zip(student_NE.tolist(), teacher_NE.tolist(), strict=True)]
    torch.testing.assert_close(hidden_cosine(student_NE, teacher_NE), 1 - torch.tensor(cosine) / (student_NE.norm(dim=-1) * teacher_NE.norm(dim=-1)))


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine])
def test_a_projection_is_learned_and_closes_any_linear_gap(loss):
    student_ND, projection_ED = torch.randn(5, D, dtype=torch.float64), torch.randn(E, D, dtype=torch.float64, requires_grad=True)
    teacher_NE = student_ND @ projection_ED.detach().T
    torch.testing.assert_close(loss(student_ND, teacher_NE, projection_ED).detach(), torch.zeros(5, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda s, p: loss(s, torch.randn(5, E, generator=torch.Generator().manual_seed(0)).double(), p), (student_ND.requires_grad_(), projection_ED)
    )


def test_attention_transfer_ignores_order_and_number_of_heads():
    student_BHTT, teacher_BHTT = torch.randn(2, 3, 5, 5).softmax(-1), torch.randn(2, 4, 5, 5).softmax(-1)
    loss_BT = attention_transfer(student_BHTT, teacher_BHTT)
    assert loss_BT.shape == (2, 5)
    torch.testing.assert_close(attention_transfer(student_BHTT.flip(1), teacher_BHTT), loss_BT)
    assert attention_transfer(student_BHTT, torch.cat([student_BHTT, student_BHTT], 1)).max() < 1e-10
    one, other = (F.normalize(maps[1, :, 2].mean(0), dim=0) for maps in (student_BHTT, teacher_BHTT))
    torch.testing.assert_close(loss_BT[1, 2], ((one - other) ** 2).sum())


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
    with pytest.raises(ConfigError, match="projection"):
        hidden_mse(torch.zeros(2, D), torch.zeros(2, E))
    with pytest.raises(ConfigError, match="attention maps"):
        attention_transfer(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 5))
