"""Quality gates: how far a step's result may be from the base before the run stops.

A gate is checked on the held-out text after each step, or where it says so at the end only, for steps that mend what others break. Perplexity alone can
look healthy while the model answers differently, so divergence and agreement have limits of their own (Dutta et al. 2024, arXiv:2407.09141).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import pydantic

from llmlite.config import from_mapping, settings

__all__ = ["COLLAPSE", "Gate", "GateSettings", "collapse_warning"]


@settings
class Gate:
    """Limits on what a step may cost, each against the base on the held-out text. A limit left out is not checked."""

    perplexity_increase: Annotated[float, pydantic.Field(ge=0)] | None = None
    """Most that perplexity may rise, as a share: 0.05 lets 20 become 21."""
    kl: Annotated[float, pydantic.Field(ge=0)] | None = None
    """Most that the KL divergence from the base may be, in nats a token."""
    agreement: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    """Least share of tokens whose most likely next token is the base's."""
    when: Literal["step", "end"] = "step"
    """step: after every step. end: after the last one, so that a later step may heal what an earlier one broke; of a recipe's gate only."""

    def crossed(self, base_perplexity: float, perplexity: float, kl: float | None, agreement: float | None) -> list[str]:
        """A phrase for each limit that these figures cross; none when all hold. What is no number crosses every limit on it."""
        found = []
        increase = perplexity / base_perplexity - 1
        if self.perplexity_increase is not None and not increase <= self.perplexity_increase:
            shown = "without bound" if not math.isfinite(increase) else f"{increase:+.1%}" if increase < 100 else f"{increase + 1:.3g} times"
            found.append(f"perplexity {base_perplexity:.4g} -> {perplexity:.4g} ({shown}; limit {self.perplexity_increase:+.1%})")
        if self.kl is not None and kl is not None and not kl <= self.kl:
            found.append(f"KL to the base {kl:.4g} nats a token (limit {self.kl:.4g})")
        if self.agreement is not None and agreement is not None and not agreement >= self.agreement:
            found.append(f"top-1 agreement with the base {agreement:.1%} (limit {self.agreement:.1%})")
        return found

    def __bool__(self) -> bool:
        """Whether anything is checked."""
        return any(getattr(self, field.name) is not None for field in dataclasses.fields(self) if field.name != "when")


COLLAPSE = Gate(perplexity_increase=1.0, kl=1.0, agreement=0.5)
"""What is warned of when no gate was set: a model this far from its base has hardly survived."""


def collapse_warning(base_perplexity: float, perplexity: float, kl: float | None, agreement: float | None) -> str:
    """A sentence for a model that is so far from its base, empty for any other: wherever a model's figures are shown, this stands beside them."""
    crossed = COLLAPSE.crossed(base_perplexity, perplexity, kl, agreement)
    return f"This model is far from its base: {'; '.join(crossed)}." if crossed else ""


GateSettings = Annotated[Gate, from_mapping(Gate)]
"""A `Gate`, or a mapping of its limits."""
