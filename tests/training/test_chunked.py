"""The chunked engine gives the loss and the gradients of full logits, and never makes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from llmlite.errors import ConfigError
from llmlite.training import chunked
from llmlite.training.chunked import chunked_head_loss, head_logits
from llmlite.training.token_loss import CrossEntropy, LogitTransform, TokenLoss, next_token_labels
from tests.training.cross_entropy import chunked_cross_entropy

B, T, V, D = 3, 11, 53, 8
TRANSFORMS = {"plain": LogitTransform(), "scaled": LogitTransform(scale=0.3), "capped": LogitTransform(softcap=2.0), "both": LogitTransform(3.0, 5.0)}


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


class Problem:
    """Hidden states, a head with a bias, and labels of which a third do not count."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden_BTD = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
        self.weight_VD = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
        self.bias_V = torch.randn(V, generator=generator).to(dtype).requires_grad_()
        self.labels_BT = torch.randint(0, V, (B, T), generator=generator).masked_fill(torch.rand(B, T, generator=generator) < 0.33, -100)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden_BTD, self.weight_VD, self.bias_V]

    def full_loss(self, transform: LogitTransform, **kwargs: object) -> Tensor:
        return ForCausalLMLoss(transform(F.linear(*self.leaves)), self.labels_BT, V, **kwargs)

    def chunked_loss(self, **kwargs: object) -> Tensor:
        return chunked_cross_entropy(self.hidden_BTD, self.weight_VD, self.labels_BT, head_bias_V=self.bias_V, **kwargs)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm() / theirs.norm()).detach())


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(17)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 256])
def test_cross_entropy_and_gradients_equal_transformers(transform, num_items, chunk_tokens):
    problem = Problem()
    theirs = problem.full_loss(transform, num_items_in_batch=num_items)
    ours = problem.chunked_loss(num_items_in_batch=num_items, transform=transform, chunk_tokens=chunk_tokens)
    assert relative(ours, theirs) < 1e-6
    for our_grad, their_grad in zip(torch.autograd.grad(ours, problem.leaves), torch.autograd.grad(theirs, problem.leaves), strict=True):
        assert relative(our_grad, their_grad) < 1e-6


def test_gradient_in_float64_passes_gradcheck():
    problem = Problem(torch.float64)
    weight_VD, bias_V = problem.weight_VD.detach(), problem.bias_V.detach()

    def loss(hidden_BTD: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden_BTD, weight_VD, problem.labels_BT, head_bias_V=bias_V, transform=LogitTransform(0.5, 3.0), chunk_tokens=5)

    assert torch.autograd.gradcheck(loss, problem.hidden_BTD)


@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 30),
    chunk_tokens=st.integers(1, 50),
    keep_share=st.floats(0, 1),
    block=st.integers(1, 200),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_no_cut_into_chunks_and_blocks_changes_the_loss(tokens, vocabulary, chunk_tokens, keep_share, block, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(tokens, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight_VD = torch.randn(vocabulary, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels_N = torch.randint(0, vocabulary, (tokens,), generator=generator)
    keep_N = torch.rand(tokens, generator=generator) < keep_share
    theirs = F.cross_entropy((hidden_ND @ weight_VD.T)[keep_N], labels_N[keep_N], reduction="sum") / 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CPU_BLOCK_ELEMENTS", block)
        ours = chunked_head_loss(hidden_ND, weight_VD, CrossEntropy(labels_N), keep_N=keep_N, num_items_in_batch=3, chunk_tokens=chunk_tokens).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, [hidden_ND, weight_VD]), torch.autograd.grad(theirs, [hidden_ND, weight_VD]))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation takes or gives, in forward and in backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel(), leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("per_block", [False, True])
def test_full_logits_never_exist(per_block):
    tokens, vocabulary = 64, 300
    hidden_ND, weight_VD = torch.randn(tokens, D, requires_grad=True), torch.randn(vocabulary, D, requires_grad=True)
    labels_N = torch.randint(0, vocabulary, (tokens,))
    loss = ByAutograd(labels_N) if per_block else CrossEntropy(labels_N)
    with Largest() as chunks:
        chunked_head_loss(hidden_ND, weight_VD, loss, chunk_tokens=16).loss.backward()
    with Largest() as naive:
        F.cross_entropy(hidden_ND @ weight_VD.T, labels_N).backward()
    assert naive.elements == tokens * vocabulary  # the ruler works
    assert chunks.elements == 16 * vocabulary


class ByAutograd(CrossEntropy):
    """Cross entropy without its analytic gradient."""

    values_and_grad_ = TokenLoss.values_and_grad_


def test_the_default_gradient_is_autograd_within_the_block():
    problem = Problem()
    hidden_ND, labels_N = problem.hidden_BTD.reshape(-1, D), next_token_labels(problem.labels_BT).reshape(-1)
    grads = []
    for kind in (CrossEntropy, ByAutograd):
        loss = chunked_head_loss(
            hidden_ND, problem.weight_VD, kind(labels_N, weight=0.7), keep_N=labels_N >= 0, transform=TRANSFORMS["both"], chunk_tokens=4
        ).loss
        grads.append(torch.autograd.grad(loss, [problem.hidden_BTD, problem.weight_VD]))
    torch.testing.assert_close(grads[0], grads[1])


def test_ignored_tokens_never_reach_the_head():
    class Counting(nn.Linear):
        tokens = 0

        def forward(self, hidden: Tensor) -> Tensor:
            Counting.tokens += len(hidden)
            return super().forward(hidden)

    problem = Problem()
    head = Counting(D, V)
    chunked_cross_entropy(problem.hidden_BTD, head, problem.labels_BT, chunk_tokens=5).backward()
    assert Counting.tokens == int((next_token_labels(problem.labels_BT) != -100).sum())


def test_ignored_tokens_get_a_zero_gradient_and_a_zero_per_token_loss():
    problem = Problem()
    labels_N = next_token_labels(problem.labels_BT).reshape(-1)
    result = chunked_head_loss(problem.hidden_BTD.reshape(-1, D), problem.weight_VD, CrossEntropy(labels_N), keep_N=labels_N >= 0, return_per_token=True)
    result.loss.backward()
    assert result.per_token is not None
    logits_NV = problem.hidden_BTD.reshape(-1, D) @ problem.weight_VD.T
    torch.testing.assert_close(result.per_token["ce"], F.cross_entropy(logits_NV, labels_N, reduction="none").detach())
    assert problem.hidden_BTD.grad is not None
    assert not problem.hidden_BTD.grad.reshape(-1, D)[labels_N < 0].any()
    torch.testing.assert_close(result.parts["ce"], result.loss.detach())


@pytest.mark.parametrize("num_items", [None, 5])
def test_a_batch_without_counted_tokens_costs_nothing_and_moves_nothing(num_items):
    problem = Problem()
    problem.labels_BT.fill_(-100)
    loss = problem.chunked_loss(num_items_in_batch=num_items)
    loss.backward()
    assert loss.item() == 0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in problem.leaves)


def test_accumulated_micro_batches_equal_one_batch():
    problem = Problem()
    counted = int((next_token_labels(problem.labels_BT) != -100).sum())
    whole = torch.autograd.grad(problem.chunked_loss(), problem.weight_VD)[0]
    parts = [
        chunked_cross_entropy(hidden, problem.weight_VD, labels, head_bias_V=problem.bias_V, num_items_in_batch=counted)
        for hidden, labels in zip(problem.hidden_BTD.split(1), problem.labels_BT.split(1), strict=True)
    ]
    torch.testing.assert_close(sum(torch.autograd.grad(part, problem.weight_VD)[0] for part in parts), whole)


def test_the_incoming_gradient_scales_the_gradients():
    problem = Problem()
    once = torch.autograd.grad(problem.chunked_loss(), problem.leaves)
    thrice = torch.autograd.grad(problem.chunked_loss() * 3, problem.leaves)
    torch.testing.assert_close([grad * 3 for grad in once], list(thrice))


def test_backward_twice_works_for_hidden_states_and_is_refused_for_the_head():
    problem = Problem()
    frozen = chunked_cross_entropy(problem.hidden_BTD, problem.weight_VD.detach(), problem.labels_BT)
    first, second = (torch.autograd.grad(frozen, problem.hidden_BTD, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    loss = problem.chunked_loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def test_tied_embeddings_get_both_gradients():
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D)
    head = nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    labels_BT = torch.randint(0, V, (B, T))
    ours = torch.autograd.grad(chunked_cross_entropy(embedding(labels_BT).tanh(), head, labels_BT, chunk_tokens=6), embedding.weight)[0]
    theirs = torch.autograd.grad(ForCausalLMLoss(head(embedding(labels_BT).tanh()), labels_BT, V), embedding.weight)[0]
    torch.testing.assert_close(ours, theirs)


class NoGradientWork(CrossEntropy):
    def values_and_grad_(self, logits_RV, *prepared):
        raise AssertionError("a gradient was computed")


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
def test_without_need_for_a_gradient_none_is_computed(mode):
    problem = Problem()
    labels_N = next_token_labels(problem.labels_BT).reshape(-1)
    expected = problem.full_loss(LogitTransform()).detach()
    leaves = [leaf.detach() for leaf in problem.leaves] if mode == "frozen" else problem.leaves
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": torch.enable_grad}[mode]():
        hidden_ND = leaves[0].reshape(-1, D)
        result = chunked_head_loss(hidden_ND, leaves[1], NoGradientWork(labels_N), head_bias_V=leaves[2], keep_N=labels_N >= 0, chunk_tokens=4)
    assert relative(result.loss, expected) < 1e-6
    assert not result.loss.requires_grad


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_only_asked_for_gradients_are_given(needs):
    problem = Problem()
    for leaf, need in zip(problem.leaves, needs, strict=True):
        leaf.requires_grad_(need)
    wanted = [leaf for leaf in problem.leaves if leaf.requires_grad]
    theirs = torch.autograd.grad(problem.full_loss(LogitTransform()), wanted)
    torch.testing.assert_close(torch.autograd.grad(problem.chunked_loss(chunk_tokens=9), wanted), theirs)


def test_bfloat16_is_as_close_to_float32_as_full_logits_are():
    exact, rounded = Problem(), Problem(torch.bfloat16)
    for leaf, other in zip(exact.leaves, rounded.leaves, strict=True):
        leaf.data.copy_(other.data)
    want = torch.autograd.grad(exact.full_loss(LogitTransform()), exact.leaves)
    naive = torch.autograd.grad(rounded.full_loss(LogitTransform()), rounded.leaves)
    loss = rounded.chunked_loss(chunk_tokens=8)
    ours = torch.autograd.grad(loss, rounded.leaves)
    assert loss.dtype == torch.float32
    for our_grad, naive_grad, want_grad in zip(ours, naive, want, strict=True):
        assert our_grad.dtype == torch.bfloat16
        assert relative(our_grad.float(), want_grad) < 1.5 * relative(naive_grad.float(), want_grad) + 1e-3


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients():
    problem = Problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = problem.full_loss(LogitTransform())
        ours = problem.chunked_loss(chunk_tokens=8)
    without = problem.chunked_loss(chunk_tokens=8)
    assert relative(ours, theirs) < 1e-5  # the same rounded logits
    assert relative(ours, without) > 1e-5
    for our_grad, their_grad in zip(torch.autograd.grad(ours, problem.leaves), torch.autograd.grad(theirs, problem.leaves), strict=True):
        assert our_grad.dtype == torch.float32
        assert relative(our_grad, their_grad) < 1e-2


class LastLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(D, V)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    lora = get_peft_model(LastLayer(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).base_model.model.lm_head
    return {"linear": nn.Linear(D, V), "lora": lora, "mlp": nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, V)), "capped": CappedHead()}


class CappedHead(nn.Linear):
    """Its backward needs its own output, which the loss must not overwrite."""

    def __init__(self) -> None:
        super().__init__(D, V)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).tanh()


@pytest.mark.parametrize("kind", ["linear", "lora", "mlp", "capped"])
def test_heads_given_as_modules_get_the_gradients_of_full_logits(kind):
    problem, head = Problem(), heads()[kind]
    wanted = [problem.hidden_BTD, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    theirs = torch.autograd.grad(ForCausalLMLoss(head(problem.hidden_BTD), problem.labels_BT, V), wanted)
    ours = torch.autograd.grad(chunked_cross_entropy(problem.hidden_BTD, head, problem.labels_BT, chunk_tokens=6), wanted)
    torch.testing.assert_close(ours, theirs)


def test_a_hooked_linear_is_called_so_that_its_hooks_run():
    problem, head = Problem(), nn.Linear(D, V)
    head.register_forward_hook(lambda module, args, output: output * 2)
    ours = chunked_cross_entropy(problem.hidden_BTD, head, problem.labels_BT)
    assert relative(ours, ForCausalLMLoss(head(problem.hidden_BTD), problem.labels_BT, V)) < 1e-6
    torch.testing.assert_close(head_logits(problem.hidden_BTD[0], head), head(problem.hidden_BTD[0]).detach())


def test_identity_as_head_takes_logits():
    logits_BTV = torch.randn(B, T, V, requires_grad=True)
    labels_BT = Problem().labels_BT
    before = logits_BTV.detach().clone()
    ours = chunked_cross_entropy(logits_BTV, nn.Identity(), labels_BT, chunk_tokens=5)
    torch.testing.assert_close(torch.autograd.grad(ours, logits_BTV), torch.autograd.grad(ForCausalLMLoss(logits_BTV, labels_BT, V), logits_BTV))
    assert torch.equal(logits_BTV, before)


def test_extreme_and_masked_logits_stay_finite():
    hidden_ND = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    weight_VD = torch.eye(2).requires_grad_()
    bias_V = torch.tensor([0.0, 0.0])
    result = chunked_head_loss(hidden_ND, weight_VD, CrossEntropy(torch.tensor([0, 0])), head_bias_V=bias_V, return_per_token=True)
    grads = torch.autograd.grad(result.loss, [hidden_ND, weight_VD])
    assert result.per_token is not None
    assert result.per_token["ce"].tolist() == [0.0, 2e4]
    assert all(grad.isfinite().all() for grad in grads)
    masked = chunked_head_loss(
        hidden_ND.detach().requires_grad_(), weight_VD, CrossEntropy(torch.tensor([0, 0])), head_bias_V=torch.tensor([0.0, -torch.inf])
    ).loss
    assert masked.item() == 0


def test_shapes_that_do_not_fit_are_all_reported():
    with pytest.raises(ConfigError) as error:
        chunked_head_loss(torch.zeros(4, 3), torch.zeros(5, 2), CrossEntropy(torch.zeros(4).long()), keep_N=torch.ones(3, dtype=torch.bool), chunk_tokens=0)
    assert all(part in str(error.value) for part in ("(5, 2)", "4 tokens", "chunk_tokens=0"))
    with pytest.raises(ConfigError, match="its own bias"):
        chunked_head_loss(torch.zeros(4, 3), nn.Linear(3, 5), CrossEntropy(torch.zeros(4).long()), head_bias_V=torch.zeros(5))
