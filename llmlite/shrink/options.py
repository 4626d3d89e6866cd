"""What can be done to a model to make it smaller: the groups of options that `llmlite shrink` combines. Nothing is measured here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmlite.errors import counted
from llmlite.shrink.search import Option

__all__ = ["CORRECTION", "VOCABULARY", "Mixed", "mixed_options", "prune_options", "store_options"]

VOCABULARY = Option("vocabulary of the text", ({"step": "prune.vocabulary"},))
CORRECTION: dict[str, Any] = {"step": "correct", "r": 16}

_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def prune_options(keeps: Sequence[float], heal_steps: int) -> list[Option]:
    """Shares of the decoder to keep, as pruned and healed by distillation from the base when `heal_steps` is not 0."""
    options = []
    for keep in keeps:
        prune = {"step": "prune.structured", "keep_parameters": keep}
        options.append(Option(f"keep {keep:g}", (prune,)))
        if heal_steps:
            options.append(Option(f"keep {keep:g}, healed", (prune, {"step": "distill.whitebox", "max_steps": heal_steps})))
    return options


def store_options(dtypes: Sequence[str]) -> list[Option]:
    """Formats: 8 bit, calibrated 4 bit, and that with a low-rank correction.

    Args:
        dtypes: types to store what is not quantized in, as the step `quantize` names them.
    """
    options = []
    for dtype in dtypes:
        tail, more = ("", {}) if dtype == "auto" else (", 16-bit rest", {"dtype": dtype})
        nf4 = {"step": "quantize", "scheme": "nf4", **more}
        options += [
            Option(f"int8{tail}", ({"step": "quantize", "scheme": "int8", **more},)),
            Option(f"nf4{tail}", (nf4,)),
            Option(f"nf4 + rank {CORRECTION['r']}{tail}", (nf4, CORRECTION)),
        ]
    return options


@dataclass(frozen=True)
class Mixed:
    """4 bits a weight, and 16 for the layers in which 4 bits cost the prediction most for their size.

    Attributes:
        option: its figures are those of `nf4` until something better is known.
        cost_left: share of all layers' cost that is in the layers with 4 bits.
        weights_left: share of the weights that have 4 bits.
    """

    option: Option
    cost_left: float
    weights_left: float

    def expected(self, nf4: Option, trust: float) -> Option:
        """The option with figures computed from `nf4`: its KL, and the rise of its perplexity, less what the layers in 16 bit would have caused.

        Args:
            nf4: all layers in 4 bits, measured.
            trust: how far the layers' costs are to be believed, 0 to 1; at 0 every weight causes as much as any other.
        """
        left = trust * self.cost_left + (1 - trust) * self.weights_left
        speedup = 1 / (self.weights_left / nf4.decode_speedup + 1 - self.weights_left)
        return dataclasses.replace(self.option, kl=nf4.kl * left, perplexity_ratio=nf4.perplexity_ratio**left, decode_speedup=speedup)

    def trust_by(self, nf4: Option, measured: Option) -> float:
        """How far the costs are to be believed when this option, measured, is what they should have foretold."""
        if nf4.kl <= 0 or self.cost_left >= self.weights_left:
            return 0.0
        return min(1.0, max(0.0, (self.weights_left - measured.kl / nf4.kl) / (self.weights_left - self.cost_left)))


def mixed_options(nf4: Option, costs: Mapping[str, float], weights: Mapping[str, int], shares: Sequence[float] = _SHARES) -> list[Mixed]:
    """4 bits and 16 bits side by side, the layers chosen by cost for each weight.

    Args:
        nf4: all layers in 4 bits.
        costs: layer -> what 4 bits alone in this layer cost, on any scale; see `llmlite.calibration.sensitivity.cost_of_changes`.
        weights: layer -> number of its weights.
        shares: of all weights, to stay in 16 bit at most.

    Returns:
        One for each share that at least one more layer fits into.
    """
    total, everything = sum(costs.values()), sum(weights[name] for name in costs)
    ranked = sorted(costs, key=lambda name: -costs[name] / weights[name])
    found: list[Mixed] = []
    for share in shares:
        dense: list[str] = []
        room = share * everything
        for name in ranked:
            if weights[name] <= room:
                dense.append(name)
                room -= weights[name]
        if not dense or (found and len(dense) == len(found[-1].option.steps[0]["skip"])):
            continue
        option = Option(f"{nf4.name}, {counted(len(dense), 'layer')} in 16 bit", ({**nf4.steps[0], "skip": sorted(dense)},), names_layers=True)
        cost_left = 1 - sum(costs[name] for name in dense) / total if total > 0 else 1.0
        found.append(Mixed(option, cost_left, 1 - sum(weights[name] for name in dense) / everything))
    return found
