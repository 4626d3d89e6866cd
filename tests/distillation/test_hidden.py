"""Distances of hidden states and attention maps: against slow loops, at other widths, and with other numbers of heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from llmlite.distillation.hidden import attention_transfer, hidden_cosine, hidden_mse
from llmlite.errors import ConfigError

D, E = 8, 6


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


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


def test_shapes_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match="projection"):
        hidden_mse(torch.zeros(2, D), torch.zeros(2, E))
    with pytest.raises(ConfigError, match="attention maps"):
        attention_transfer(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 5))
