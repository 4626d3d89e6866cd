"""The objective in the chunked engine: the gradients of full logits, which never exist, from every teacher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmlite.distillation import gradients, logit_products, losses
from llmlite.distillation.objective import DIVERGENCES, Distillation, HiddenTeacher, LogitsTeacher, TopKTeacher
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import LogitTransform
from tests.distillation.test_losses import OPTIONS, K, N, V, pair

D, E = 8, 6


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


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


@pytest.mark.parametrize("transform", [None, LogitTransform(scale=0.5, softcap=3.0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_head_in_bfloat16_rounds_none_of_the_likeliest_logits(with_bias, transform):
    hidden_ND, weight_VD, bias_V = torch.randn(N, E), torch.randn(V, E).bfloat16(), torch.randn(V).bfloat16() if with_bias else None
    where_N = torch.randperm(N)
    raw_NV = hidden_ND[where_N] @ weight_VD.float().T + (bias_V.float() if bias_V is not None else 0)
    ids_NJ = raw_NV.topk(3).indices
    likeliest_NJ = torch.empty_like(ids_NJ).index_copy_(0, where_N, ids_NJ)
    teacher = HiddenTeacher(hidden_ND, weight_VD, head_bias_V=bias_V, transform=transform, where_N=where_N, likeliest_NJ=likeliest_NJ)
    wanted_NV = raw_NV if transform is None else transform(raw_NV)
    for rows_C in (torch.arange(N), torch.tensor([4, 1]), torch.tensor([], dtype=torch.int64)):  # the second and third in the first one's buffer
        (logits_CV,) = teacher.signal(rows_C, torch.device("cpu"))
        assert logits_CV.dtype == torch.float32
        torch.testing.assert_close(logits_CV.gather(1, ids_NJ[rows_C]), wanted_NV[rows_C].gather(1, ids_NJ[rows_C]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits_CV, wanted_NV[rows_C], rtol=2e-2, atol=6e-2)
    assert not torch.equal(teacher.signal(torch.arange(N), torch.device("cpu"))[0], wanted_NV)


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
