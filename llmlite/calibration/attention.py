"""Attention that does not change is computed once: what its output projection `o` is given is kept, and handed to `o` in later passes through the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llmlite.models.forward import answering
from llmlite.models.view import BlockView, ModelView

__all__ = ["KnownAttention"]


class KnownAttention:
    """The inputs of one block's `o`, one for each batch, while nothing before `o` changes.

    Args:
        view: the model's.
    """

    def __init__(self, view: ModelView) -> None:
        self._view = view
        self._block: BlockView | None = None
        self._inputs: Sequence[Tensor] = ()
        self._pairs: dict[type, bool] = {}  # kind of attention -> whether it returns a pair, the output of `o` first, or that output alone

    def works(self, block: BlockView, run: Callable[[], object]) -> bool:
        """Whether this family's attention returns the output of `o` as it is. `run` runs the block once, to see it; asked once for each kind of attention."""
        if "o" not in block.linears or (attention := self._attention(block)) is block.module:
            return False
        if type(attention) not in self._pairs:
            seen: list[Any] = []
            handles = [module.register_forward_hook(lambda _module, _args, output: seen.append(output)) for module in (block.linears["o"].module, attention)]
            run()
            for handle in handles:
                handle.remove()
            made, returned = seen
            if returned is made:
                self._pairs[type(attention)] = False
            elif isinstance(returned, tuple) and len(returned) == 2 and returned[0] is made:  # beside it attention weights, which blocks only hand on
                self._pairs[type(attention)] = True
        return type(attention) in self._pairs

    def keep(self, block: BlockView, inputs: Sequence[Tensor]) -> None:
        """From now on the attention of this block is known."""
        self._block, self._inputs = block, inputs

    def forget(self) -> None:
        """The inputs of the block have changed."""
        self._block, self._inputs = None, ()

    @contextmanager
    def given(self, block: BlockView, index: int) -> Iterator[None]:
        """Within it the block's attention gives what `o` makes of its known input of batch `index`; with any other block nothing happens."""
        if self._block is not block:
            yield
            return
        output, attention, input_BTI = block.linears["o"].module, self._attention(block), self._inputs[index]
        pair = self._pairs[type(attention)]

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return (output(input_BTI), None) if pair else output(input_BTI)

        with answering(attention, forward):
            yield

    def _attention(self, block: BlockView) -> Any:
        return self._view.model.get_submodule(block.linears["o"].name.rpartition(".")[0])
