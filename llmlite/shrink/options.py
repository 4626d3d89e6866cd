"""What can be done to a model to make it smaller: the groups of options that `llmlite shrink` combines. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmlite.shrink.search import Option

__all__ = ["CORRECTION", "VOCABULARY", "mixed_options", "prune_options", "store_options"]

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


def mixed_options(nf4: Option, costs: Mapping[str, float], weights: Mapping[str, int], shares: Sequence[float] = _SHARES) -> list[Option]:
    """4 bits a weight, and 16 for the layers in which 4 bits cost the prediction most for their size. What it gives is computed from `nf4`, not measured.

    KL is that of `nf4` less the share of it that the layers left in 16 bit would have caused; perplexity's rise goes with it.

    Args:
        nf4: all layers in 4 bits, measured.
        costs: layer -> what 4 bits alone in this layer cost, on any scale; see `llmlite.calibration.sensitivity.cost_of_changes`.
        weights: layer -> number of its weights.
        shares: of all weights, to stay in 16 bit at most.

    Returns:
        One option for each share that at least one more layer fits into.
    """
    total, everything = sum(costs.values()), sum(weights[name] for name in costs)
    ranked = sorted(costs, key=lambda name: -costs[name] / weights[name])
    options: list[Option] = []
    for share in shares:
        dense: list[str] = []
        room = share * everything
        for name in ranked:
            if weights[name] <= room:
                dense.append(name)
                room -= weights[name]
        if not dense or (options and len(dense) == len(options[-1].steps[0]["skip"])):
            continue
        left = 1 - sum(costs[name] for name in dense) / total if total > 0 else 1.0
        kept = sum(weights[name] for name in dense) / everything
        options.append(
            Option(
                f"{nf4.name}, {len(dense)} layers in 16 bit",
                ({**nf4.steps[0], "skip": sorted(dense)},),
                nf4.kl * left,
                nf4.perplexity_ratio**left,
                1 / ((1 - kept) / nf4.decode_speedup + kept),
                names_layers=True,
            )
        )
    return options
