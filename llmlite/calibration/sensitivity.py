"""How much an error in a projection's output would change what the model says, token by token.

    s[t] = sum_o (d loss / d y[t, o])^2,    loss = sum over tokens of -log p(label),    each label drawn from the model itself

With labels of its own the expected square of this gradient is the Fisher information, which is the curvature of the divergence from the dense model. A Hessian
sum_t s[t] x_t x_t^T then counts the tokens that matter, where sum_t x_t x_t^T counts all alike. One forward and one backward pass over the calibration text.

Source: Kim et al. 2025, arXiv:2505.07004 (GuidedQuant, with one group of output channels); Martens 2014, arXiv:1412.1193, section 5 (whose labels to take).

Legend: N tokens, R rows of a chunk, V vocabulary, O outputs, I inputs of a projection, U units of S neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmlite.calibration.kept import digest_of, made_once
from llmlite.models.quick import quick_dtype_of, quickened
from llmlite.models.view import LinearView, ModelView
from llmlite.processes import places_of, rank_and_processes, sum_over_processes
from llmlite.training.backbone import hidden_and_head
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import TokenLoss

if TYPE_CHECKING:
    from llmlite.calibration.blocks import Batch

__all__ = ["OwnLabels", "cost_of_changes", "cost_of_silence", "quick_sensitivity", "quick_silence", "token_sensitivity"]

Watch = Callable[[LinearView, Tensor], "Callable[[Tensor], None] | None"]
"""Shown a projection and its input (B, T, I) in the forward pass, gives what is to be shown the gradient of its output (B, T, O), if anything."""


class OwnLabels(TokenLoss):
    """Cross entropy against labels drawn from the model's own prediction.

    Args:
        uniform_N: a number in [0, 1) for each token, which says where in the cumulated distribution its label lies.
    """

    names = ("own",)
    weights = (1.0,)

    def __init__(self, uniform_N: Tensor) -> None:
        self.uniform_N = uniform_N

    def prepare(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """The chunk's numbers."""
        return (self.uniform_N[rows_C.to(self.uniform_N.device)].to(device),)

    def values(self, logits_RV: Tensor, *prepared: Tensor) -> tuple[Tensor, ...]:
        """Nats of the drawn labels."""
        logprobs_RV = torch.log_softmax(logits_RV, -1)
        total_RV = logprobs_RV.detach().exp().cumsum(-1)
        labels_R1 = torch.searchsorted(total_RV, prepared[0][:, None] * total_RV[:, -1:], right=True).clamp_max(logits_RV.shape[-1] - 1)
        return (-logprobs_RV.gather(1, labels_R1).squeeze(1),)


def token_sensitivity(model: nn.Module, batches: Sequence[Batch], places: Sequence[int], seed: int = 0) -> list[dict[str, Tensor]]:
    """The sensitivity of each token in each projection's output.

    Args:
        model: the dense model in eval mode; its weights get no gradient.
        batches: calibration inputs.
        places: which of the batches to read.
        seed: of the labels; those of a batch do not depend on which other batches are read.

    Returns:
        For each place: name of the projection -> (B * T,) float32, on the model's device. Padding has numbers too, which mean nothing.
    """
    found = []
    for place in places:
        rows: dict[str, list[Tensor]] = {}

        def watch(linear: LinearView, _input: Tensor, rows: dict[str, list[Tensor]] = rows) -> Callable[[Tensor], None]:
            def keep(grad: Tensor) -> None:
                rows.setdefault(linear.name, []).append(grad.reshape(-1, grad.shape[-1]).float().square().sum(-1))

            return keep

        _gradients(model, batches[place], place, seed, watch)
        found.append({name: torch.cat(each) for name, each in rows.items()})
    return found


def quick_sensitivity(model: nn.Module, batches: Sequence[Batch], places: Sequence[int], seed: int = 0, state: Path | None = None) -> list[dict[str, Tensor]]:
    """`token_sensitivity` in the type that this machine multiplies fastest, on a copy where that is not the model's own.

    Args:
        model, batches, places, seed: see `token_sensitivity`.
        state: a folder of this process; each batch's sensitivities are kept there (`sensitivity-000` and so on), and a pass that was stopped goes on behind
            those that are complete. The model has to be the same one.
    """
    device, dtype = next(model.parameters()).device, quick_dtype_of(model)
    copies: list[nn.Module] = []

    def make(place: int) -> dict[str, Tensor]:
        if not copies:  # none where all batches are kept
            copies.append(quickened(model))
        return token_sensitivity(copies[0], batches, [place], seed)[0]

    found = []
    for place in places:
        folder = None if state is None else state / f"sensitivity-{place:03d}"
        made_of = digest_of("sensitivity", batches[place], seed, dtype)
        found.append(made_once(folder, made_of, partial(make, place), device))
    return found


def cost_of_changes(model: nn.Module, batches: Sequence[Batch], changes: Mapping[str, Tensor], seed: int = 0) -> dict[str, float]:
    """What the change of each projection alone would cost the prediction: KL from the model as it is, in nats a token, to second order.

        KL = 1 / (2 N) sum_t (g[t] . D x[t])^2,    g[t] = d loss / d y[t],  D the change of the weights

    What tokens do to one another is left out, and so is what projections do to one another: the figures are for comparing layers, and their sum is not the KL
    of changing all.

    Args:
        model: the dense model in eval mode; its weights get no gradient.
        batches: calibration inputs.
        changes: projection -> new weights minus old ones, (O, I). Others are left out.
        seed: of the labels.

    Returns:
        For each of these projections its cost, 0 or more.

    Source: Martens 2014, arXiv:1412.1193, section 5 (the Fisher matrix is the curvature of the divergence).
    """
    costs: dict[str, float] = {}
    tokens = 0

    def watch(linear: LinearView, input_BTI: Tensor) -> Callable[[Tensor], None] | None:
        if linear.name not in changes:
            return None
        error_BTO = torch.nn.functional.linear(input_BTI.detach(), changes[linear.name].to(input_BTI))

        def keep(grad_BTO: Tensor) -> None:
            per_token_BT = (grad_BTO.reshape(error_BTO.shape) * error_BTO).float().sum(-1)
            costs[linear.name] = costs.get(linear.name, 0.0) + float(per_token_BT.double().square().sum())

        return keep

    for place, batch in enumerate(batches):
        tokens += _gradients(model, batch, place, seed, watch)
    return {name: cost / (2 * max(tokens, 1)) for name, cost in costs.items()}


def cost_of_silence(model: nn.Module, batches: Sequence[Batch], units: Collection[tuple[str, int]], seed: int = 0) -> dict[tuple[str, int], Tensor]:
    """What it would cost the prediction if a unit of a projection's inputs said the same to every token, its mean: KL in nats a token, to second order.

        KL_u = 1 / (2 N) sum_t ( sum_{i in u} (x[t, i] - mean_t x[t, i]) dL/dx[t, i] )^2

    A constant is left in, since what stays can give it.

    Args:
        model: the dense model in eval mode; its weights get no gradient.
        batches: calibration inputs without padding; under `torch.distributed` every process gives the same ones, reads its share, and the sums are added up.
        units: names of projections, each with the number of units that its inputs make, runs of equally many. Others are left out.
        seed: of the labels.

    Returns:
        For each of these (U,) float32, 0 or more, on the model's device.

    Source: Kwon et al. 2022, arXiv:2204.09656, section 4.1 (the Fisher information of a mask); An et al. 2023, arXiv:2312.11983, section 3.2 (what fluctuates).
    """
    shared = _is_shared(batches)
    return _silence_costs(_silence_sums(model, batches, units, places_of(len(batches), shared), seed), shared)


def quick_silence(
    model: nn.Module, batches: Sequence[Batch], units: Collection[tuple[str, int]], seed: int = 0, state: Path | None = None
) -> dict[tuple[str, int], Tensor]:
    """`cost_of_silence` in the type that this machine multiplies fastest, on a copy where that is not the model's own.

    Args:
        model, batches, units, seed: see `cost_of_silence`.
        state: a folder of this process; the sums over its batches are kept there (`silence`), before they are added to those of other processes, so that a
            run that was stopped behind them goes backward no more. The model has to be the same one.
    """
    shared = _is_shared(batches)
    places = places_of(len(batches), shared)
    made_of = digest_of("silence", *(batches[place] for place in places), sorted(units), seed, quick_dtype_of(model), places)

    def make() -> dict[str, Tensor]:
        sums = _silence_sums(quickened(model), batches, units, places, seed)
        return {f"{name} {count} {part}": tensor for (name, count), each in sums.items() for part, tensor in enumerate(each.sums)}

    device = next(ModelView(model).embedding.parameters()).device
    found = made_once(None if state is None else state / "silence", made_of, make, device)
    return _silence_costs({(name, count): _Silence([found[f"{name} {count} {part}"] for part in range(5)]) for name, count in sorted(units)}, shared)


def _is_shared(batches: Sequence[Batch]) -> bool:
    """Whether every process of this launch reads a share of the batches."""
    return 1 < rank_and_processes()[1] <= len(batches)


def _silence_sums(
    model: nn.Module, batches: Sequence[Batch], units: Collection[tuple[str, int]], places: Sequence[int], seed: int
) -> dict[tuple[str, int], _Silence]:
    """The sums over the batches at those places."""
    sums = {each: _Silence() for each in sorted(units)}  # alike on every process: a set has an order of its own in each

    def watch(linear: LinearView, input_BTI: Tensor) -> Callable[[Tensor], None] | None:
        counts = [count for name, count in sums if name == linear.name]
        input_NI = input_BTI.detach().reshape(-1, input_BTI.shape[-1])

        def keep(grad_BTO: Tensor) -> None:
            grad_NI = grad_BTO.reshape(len(input_NI), -1) @ linear.weight_OI.to(grad_BTO.dtype)
            for count in counts:
                sums[linear.name, count].add(*(values_NI.float().reshape(len(input_NI), count, -1) for values_NI in (input_NI, grad_NI)))

        return keep if counts else None

    for place in places:
        _gradients(model, batches[place], place, seed, watch)
    return sums


def _silence_costs(sums: Mapping[tuple[str, int], _Silence], shared: bool) -> dict[tuple[str, int], Tensor]:
    """The costs, from the sums of this process, or with those of all others where each has read a share."""
    for each in sums.values() if shared else ():
        sum_over_processes(each.sums)
    return {name: each.cost_U() for name, each in sums.items()}


class _Silence:
    """Sums over the inputs x of one projection and their gradients g, enough for the cost once the mean of x is known."""

    def __init__(self, sums: Sequence[Tensor] = ()) -> None:
        self.sums = list(sums)

    def add(self, input_NUS: Tensor, grad_NUS: Tensor) -> None:
        product_NU = (input_NUS * grad_NUS).sum(-1)
        more = [
            torch.tensor(float(len(input_NUS)), device=input_NUS.device),
            input_NUS.sum(0),
            product_NU.square().sum(0),
            torch.einsum("nu,nus->us", product_NU, grad_NUS),
            torch.einsum("nus,nur->usr", grad_NUS, grad_NUS),
        ]
        self.sums = [old + new for old, new in zip(self.sums, more, strict=True)] if self.sums else more

    def cost_U(self) -> Tensor:  # noqa: N802 - a tensor with its shape suffix
        tokens, input_US, product_U, joint_US, grads_USS = self.sums
        mean_US = input_US / tokens
        square_U = product_U - 2 * (joint_US * mean_US).sum(-1) + torch.einsum("us,usr,ur->u", mean_US, grads_USS, mean_US)
        cost_U: Tensor = square_U.clamp(min=0) / (2 * tokens)
        return cost_U


def _gradients(model: nn.Module, batch: Batch, place: int, seed: int, watch: Watch) -> int:
    """Forward and backward through a batch, one row's activations at a time. Returns the number of real tokens."""
    view = ModelView(model)
    device = next(view.embedding.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
    for row in range(len(inputs["input_ids"])):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        _through_row(view, one, torch.rand(one["input_ids"].numel(), generator=generator), watch)
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def _through_row(view: ModelView, inputs: dict[str, Tensor], uniform_N: Tensor, watch: Watch) -> None:
    def look_at(linear: LinearView) -> Any:
        def look(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if (keep := watch(linear, args[0])) is not None:
                output.register_hook(keep)  # type: ignore[no-untyped-call]

        return look

    trained = [parameter for parameter in view.model.parameters() if parameter.requires_grad]
    handles = [linear.module.register_forward_hook(look_at(linear)) for linear in view.linears()]
    handles.append(view.embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_()))  # where gradients begin
    mask = inputs.get("attention_mask")
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            hidden, head, transform = hidden_and_head(view.model, inputs)
            chunked_head_loss(
                hidden.reshape(-1, hidden.shape[-1]),
                head,
                OwnLabels(uniform_N),
                keep_N=None if mask is None else mask.reshape(-1).bool(),
                num_items_in_batch=1.0,
                transform=transform,
            ).loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
