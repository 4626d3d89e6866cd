"""Calibration block by block: the inputs of one block at a time, statistics of its projections, a change, and on to the next block.

The stock forward pass is run once with every block replaced by the identity, which shows what it hands to each block (attention masks, rotary embeddings,
positions), for every family alike. After that only the hidden states at the entrance of one block and the statistics of this block are held: memory
grows with the widest block and the calibration tokens, not with the number of layers. Of a model that is loaded block by block (`llmlite.models.blockwise`) no
more is in memory than that, and hidden states of many tokens lie in files.

Under torchrun each process walks with its own share of the batches and the sums are added up, so that all of them see what one process would have seen.

Shapes: B windows of a batch, T tokens of a window, D hidden size, N real tokens of a batch, I inputs of a projection.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmlite.calibration.attention import KnownAttention
from llmlite.calibration.moments import Moments
from llmlite.errors import RunError
from llmlite.models.blockwise import present, shelf_of
from llmlite.models.device_map import device_of
from llmlite.models.forward import answering
from llmlite.models.quick import quick_dtype
from llmlite.models.view import BlockView, ModelView
from llmlite.processes import places_of, rank_and_processes, sum_over_processes
from llmlite.storage import telling
from llmlite.training.backbone import hidden_and_head

__all__ = ["EVEN_SHARE", "SPILL_BYTES", "Batch", "Blocks", "Statistics", "batches_of", "last_hidden", "skipping"]

_HELD_OUT_EVERY = 4
"""One batch of this many is held out: its sums are kept apart, to choose damping on."""
SPILL_BYTES = 1_000_000_000
"""Of a model that is loaded block by block, hidden states beyond so many bytes lie in files."""

EVEN_SHARE = 0.5
"""Share of the tokens' weight that all of them get alike: where a few tokens weigh nearly everything (queries and keys), the others still have a say."""

Batch = Mapping[str, Any]
"""Inputs of a model by name: `input_ids`, int64, (B, T), and what goes with them."""


@dataclass
class Statistics:
    """What one projection heard.

    Attributes:
        fit: sums over the batches to fit on.
        held: sums over the held-out batches, or None when there were too few batches.
    """

    fit: Moments
    held: Moments | None = None

    @property
    def all(self) -> Moments:
        """Both together."""
        return self.fit if self.held is None else self.fit.merged(self.held)


def batches_of(windows_NT: Tensor, *, most: int = 8) -> list[dict[str, Tensor]]:
    """Windows without padding as model inputs; at least four batches where there are four windows, so that one can be held out."""
    size = max(1, min(most, len(windows_NT) // _HELD_OUT_EVERY))
    return [{"input_ids": windows_NT[start : start + size]} for start in range(0, len(windows_NT), size)]


@contextmanager
def skipping(blocks: Collection[BlockView], seen: Callable[[BlockView, tuple[Any, ...], dict[str, Any]], Tensor | None] | None = None) -> Iterator[None]:
    """Let some blocks do nothing: they return the hidden states they were given. `seen` is shown the arguments of each call, and may give others to return."""

    def identity(block: BlockView) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            instead = None if seen is None else seen(block, args, kwargs)
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            return hidden if instead is None else instead

        return forward

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(answering(block.module, identity(block)))
        yield


class _AllSeenError(Exception):
    """Leaves a forward pass that has shown what was wanted."""


class Blocks:
    """The hidden states of all calibration windows on their way through a model.

    Args:
        model: a stock model of a family in the table, in eval mode.
        batches: model inputs; with an `attention_mask` its zeros are padding and are never counted. Every process gives the same ones.
        quick: whether the blocks multiply in the type that this machine multiplies fastest (`llmlite.models.quick`). The stream between them and all sums keep
            their own type.
        shares: False for batches that are this process's share already: then it walks with all of them, and nothing is added up.

    Attributes:
        view: the model's view.
        shared: whether the batches are shared out over several processes; then every process must call `collect` alike.
        places: which of the batches this process has.
        hidden: for each of these the hidden states (B, T, D) at the entrance of the next block.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], *, quick: bool = False, shares: bool = True) -> None:
        self.view = ModelView(model)
        first = next(self.view.embedding.parameters())
        self._dtype = quick_dtype(first.device, first.dtype) if quick else first.dtype
        self.shared = shares and 1 < rank_and_processes()[1] <= len(batches)
        self.places = places_of(len(batches), self.shared)
        self._held_out = len(batches) >= _HELD_OUT_EVERY
        self.hidden: list[Tensor] = []
        self.real: list[Tensor | None] = []  # (B, T) bool, None where every token is real
        self._calls: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._attention = KnownAttention(self.view)
        shelf = shelf_of(model)
        self._spill = None if shelf is None else shelf.spill
        with torch.no_grad():
            for place in self.places:
                self._enter({name: value.to(first.device) if isinstance(value, Tensor) else value for name, value in batches[place].items()})

    def _enter(self, batch: dict[str, Any]) -> None:
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        entrance: list[Tensor] = []

        def seen(block: BlockView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
            if block.index == 0:
                entrance.append(args[0] if args else kwargs["hidden_states"])
            kept = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "past_key_values", "use_cache")}
            calls[block.index] = (args[1:], kept)
            return None

        with skipping(self.view.blocks, seen), _without_head(self.view):
            self.view.model(**{**batch, "use_cache": False})
        mask = batch.get("attention_mask")
        self.real.append(None if mask is None or bool(mask.all()) else mask.bool())
        self.hidden.append(self._kept(len(self.hidden), entrance[0]))
        self._calls.append(calls)

    def _kept(self, index: int, hidden_BTD: Tensor) -> Tensor:
        """The hidden states of batch `index`, in a file that goes with them where those before it fill the memory that they may take."""
        if self._spill is None or index * hidden_BTD.nbytes < SPILL_BYTES:
            return hidden_BTD
        with telling(self._spill), tempfile.NamedTemporaryFile(dir=self._spill, prefix=".hidden-") as file:
            if hasattr(os, "posix_fallocate"):  # a file whose room is not taken yet ends the process (SIGBUS) when the disk turns out to be full
                os.posix_fallocate(file.fileno(), 0, hidden_BTD.nbytes)
            stored = torch.from_file(file.name, shared=True, size=hidden_BTD.numel(), dtype=hidden_BTD.dtype)
        return stored.view(hidden_BTD.shape).copy_(hidden_BTD)

    @torch.no_grad()
    def run(self, block: BlockView, index: int, hidden_BTD: Tensor) -> Tensor:
        """One batch through one block."""
        args, kwargs = self._calls[index][block.index]
        device = device_of(block.module)
        known = self._attention.given(block, index) if hidden_BTD is self.hidden[index] else nullcontext()
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != hidden_BTD.dtype), known:
            output = block.module(hidden_BTD.to(device), *args, **kwargs)
        leaving: Tensor = output[0] if isinstance(output, tuple) else output
        return leaving.to(hidden_BTD.dtype)

    def through(self, block: BlockView, hidden: Sequence[Tensor]) -> list[Tensor]:
        """All batches through one block, from these hidden states."""
        return [self._kept(index, self.run(block, index, hidden_BTD)) for index, hidden_BTD in enumerate(hidden)]

    def advance(self, block: BlockView) -> None:
        """Go on to the next block: `hidden` is behind this one afterwards."""
        self.hidden = self.through(block, self.hidden)
        self._attention.forget()

    def tokens(self, index: int, values_BTX: Tensor) -> Tensor:
        """The values of the real tokens of batch `index`, (N, X). Some families (opt) have flattened them to (B * T, X) already."""
        mask, values = self.real[index], values_BTX.reshape(-1, values_BTX.shape[-1])
        return values if mask is None else values[mask.reshape(-1)]

    def collect(
        self,
        block: BlockView,
        roles: Sequence[str],
        *,
        dense: list[Tensor] | None = None,
        weights: Sequence[Mapping[str, Tensor]] | None = None,
        gram: bool = True,
        dtype: torch.dtype = torch.float32,
        settled: bool = False,
    ) -> dict[str, Statistics]:
        """Statistics of the inputs of some projections of a block; those that share one input (q, k and v) share one set of sums.

        Args:
            block: whose entrance `hidden` is at.
            roles: roles of the families table; those that the block does not have are left out.
            dense: hidden states of the dense model at the same entrance; then the cross moments are taken too.
            weights: how much each token counts, for each of this process's batches by the name of the projection, (B * T,); None: all alike. Those of
                projections that share an input add up, are divided by their mean, and half of it is shared out evenly (`EVEN_SHARE`).
            gram: False for sums and squares alone (`Moments`).
            dtype: of the sums: float32, or float64.
            settled: promises that nothing before `o` changes any more in this block: then what `o` is given is kept, and attention is not computed again.

        Raises:
            RunError: inputs that are not finite.
        """
        wanted = [role for role in roles if role in block.linears]
        settled = settled and "o" in wanted and bool(self.hidden) and self._attention.works(block, lambda: self.run(block, 0, self.hidden[0]))
        heard_by_o: list[Tensor] = []
        keys: dict[str, str] = {}  # role -> the role whose sums it shares
        found: dict[str, Statistics] = {}
        means: dict[str, float] = {}  # role -> mean weight of its tokens
        for index, hidden in enumerate(self.hidden):
            inputs = self._inputs(block, wanted, index, hidden)
            if settled:
                heard_by_o.append(self._kept(index, inputs["o"]))
            if not keys:
                for role in wanted:
                    keys[role] = next(first for first in wanted if inputs[first] is inputs[role])
            dense_inputs = None if dense is None else self._inputs(block, list(dict.fromkeys(keys.values())), index, dense[index])
            held = self._held_out and self.places[index] % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
            for role in dict.fromkeys(keys.values()):
                x_NI = self.tokens(index, inputs[role])
                share_N1 = None
                if weights is not None:
                    shared = [block.linears[other].name for other in wanted if keys[other] == role]
                    if role not in means:
                        means[role] = self._mean_weight(weights, shared)
                    weight_N1 = self.tokens(index, _summed_weight(weights[index], shared)[:, None]) / means[role]
                    share_N1 = (EVEN_SHARE + (1 - EVEN_SHARE) * weight_N1).to(x_NI)
                if role not in found:
                    made = [Moments(x_NI.shape[1], cross=dense is not None, gram=gram, dtype=dtype, device=x_NI.device) for _ in range(1 + self._held_out)]
                    found[role] = Statistics(*made)
                moments = found[role].held if held else found[role].fit
                assert moments is not None
                moments.add(x_NI, None if dense_inputs is None else self.tokens(index, dense_inputs[role]), share_N1)
        if settled:
            self._attention.keep(block, heard_by_o)
        for statistics in found.values() if self.shared else ():
            statistics.fit.all_reduce()
            if statistics.held is not None:
                statistics.held.all_reduce()
        for role, statistics in found.items():
            if not all(bool(part.squares_I.sum().isfinite()) for part in (statistics.fit, statistics.held) if part is not None):
                raise RunError(
                    f"calibration: block {block.index} gives {block.linears[role].name} inputs that are infinite or no numbers: nothing can be chosen by them. "
                    "Activations overflow in the type they are computed in, or weights are damaged. Try dtype: float32, or another calibration text."
                )
        return {role: found[keys[role]] for role in wanted}

    def _mean_weight(self, weights: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> float:
        """The mean over the real tokens of all processes; 1 where no token weighs anything."""
        each = [self.tokens(index, _summed_weight(one, names)[:, None]) for index, one in enumerate(weights)]
        total, tokens = self.summed(float(sum(part.double().sum() for part in each)), float(sum(len(part) for part in each)))
        return total / tokens if total > 0 else 1.0

    def _inputs(self, block: BlockView, roles: Sequence[str], index: int, hidden: Tensor) -> dict[str, Tensor]:
        """What the projections are given. The block is left as soon as all of them have been: what comes behind would be computed for nothing."""
        seen: dict[str, Tensor] = {}

        def watch(role: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
                seen[role] = args[0]
                if len(seen) == len(roles):
                    raise _AllSeenError

            return look

        handles = [block.linears[role].module.register_forward_pre_hook(watch(role)) for role in roles]
        try:
            with suppress(_AllSeenError):
                self.run(block, index, hidden)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def summed(self, *values: float) -> list[float]:
        """Numbers of this process's share, added up over the processes."""
        if not self.shared:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=next(self.view.embedding.parameters()).device)
        sum_over_processes([total])
        return [float(value) for value in total]


@torch.no_grad()
def last_hidden(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """What enters the output head, (B, T, D), for each batch; with the head, the model's whole distribution.

    Of a model that is loaded block by block all batches go through one block, then through the next, so that each block is loaded once. Under a launch every
    process gives its own batches, and waits for nobody.
    """
    if shelf_of(model) is None:
        device = next(model.parameters()).device
        for batch in batches:
            yield hidden_and_head(model, {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}).hidden
        return
    stream = Blocks(model, batches, shares=False)
    blocks = stream.view.blocks
    for block in blocks:
        with present(block):
            stream.advance(block)
    for index, batch in enumerate(batches):
        leaving = stream.hidden[index]

        def seen(block: BlockView, _args: tuple[Any, ...], _kwargs: dict[str, Any], leaving: Tensor = leaving) -> Tensor | None:
            return leaving if block.index == len(blocks) - 1 else None

        with skipping(blocks, seen):
            yield hidden_and_head(stream.view.model, batch).hidden


def _summed_weight(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    total: Tensor = sum((weights[name] for name in names[1:]), weights[names[0]])
    return total


@contextmanager
def _without_head(view: ModelView) -> Iterator[None]:
    """Show the output head nothing: its logits over all calibration tokens would cost more memory than the block."""
    handle = view.head.register_forward_pre_hook(lambda _module, args: (args[0][:, :1], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
