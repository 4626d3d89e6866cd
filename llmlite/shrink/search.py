"""The search: every combination of one option from each group, what it should give, and which of them nothing else beats.

    bytes       exact, from the configs
    KL          the options' KLs added up             small changes of a distribution cost KL in second order, and independent ones add up
    perplexity  their ratios multiplied
    speed       their ratios multiplied

Nothing here loads a model. What the sum is worth is shown by every run: its report has expected beside obtained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NOTHING", "Candidate", "Limits", "Option", "best", "combinations", "frontier"]


@dataclass(frozen=True)
class Option:
    """One thing that can be done to the model, and what it did when it was done alone.

    Attributes:
        name: for the table; empty for doing nothing.
        steps: its steps, as YAML has them.
        kl: nats a token from the base.
        perplexity_ratio: to the base.
        decode_speedup: tokens a second while writing, to the base.
        names_layers: whether its steps name layers of the whole model, so that it does not go with one that takes layers away.
    """

    name: str
    steps: tuple[dict[str, Any], ...] = ()
    kl: float = 0.0
    perplexity_ratio: float = 1.0
    decode_speedup: float = 1.0
    names_layers: bool = False


NOTHING = Option("")


@dataclass(frozen=True)
class Candidate:
    """A combination and what is expected of it.

    Attributes:
        parts: its options, in the order in which their steps run.
        bytes_on_disk: of everything that is needed to load it.
        weight_bytes: that the weights need in memory.
    """

    parts: tuple[Option, ...]
    bytes_on_disk: int
    weight_bytes: int

    @property
    def name(self) -> str:
        """The options in words."""
        return " + ".join(option.name for option in self.parts if option.name) or "as it is"

    @property
    def steps(self) -> tuple[dict[str, Any], ...]:
        """All steps in order."""
        return tuple(step for option in self.parts for step in option.steps)

    @property
    def kl(self) -> float:
        """Expected KL from the base, nats a token."""
        return sum(option.kl for option in self.parts)

    @property
    def perplexity_ratio(self) -> float:
        """Expected perplexity against the base's."""
        return math.prod(option.perplexity_ratio for option in self.parts)

    @property
    def decode_speedup(self) -> float:
        """Expected decoding speed against the base's."""
        return math.prod(option.decode_speedup for option in self.parts)


@dataclass(frozen=True)
class Limits:
    """What a result has to keep; None is no limit.

    Attributes:
        bytes_on_disk, weight_bytes: at most.
        decode_speedup: at least.
        perplexity_increase: at most, as a share: 0.1 lets 20 become 22.
    """

    bytes_on_disk: float | None = None
    weight_bytes: float | None = None
    decode_speedup: float | None = None
    perplexity_increase: float | None = None

    def broken_by(self, candidate: Candidate) -> list[str]:
        """A word for each limit that the candidate breaks."""
        checks = (
            ("bytes", self.bytes_on_disk is not None and candidate.bytes_on_disk > self.bytes_on_disk),
            ("memory", self.weight_bytes is not None and candidate.weight_bytes > self.weight_bytes),
            ("speed", self.decode_speedup is not None and candidate.decode_speedup < self.decode_speedup),
            ("perplexity", self.perplexity_increase is not None and candidate.perplexity_ratio > 1 + self.perplexity_increase),
        )
        return [name for name, broken in checks if broken]


def combinations(groups: Sequence[Iterable[Option]], sizes: Mapping[tuple[str, ...], tuple[int, int]]) -> list[Candidate]:
    """All combinations whose sizes are known.

    Args:
        groups: in the order in which their steps run; doing nothing is an option of each.
        sizes: the options' names -> (bytes on disk, bytes of the weights in memory).
    """
    found = []
    for parts in itertools.product(*groups):
        names = tuple(option.name for option in parts)
        if names in sizes:
            found.append(Candidate(parts, *sizes[names]))
    return found


def frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other beats on both bytes and expected KL, the largest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.bytes_on_disk, c.kl)):
        if not front or candidate.kl < front[-1].kl:
            front.append(candidate)
    return front[::-1]


def best(candidates: Iterable[Candidate], limits: Limits) -> Candidate | None:
    """The candidate within all limits with the least expected KL; the smaller of two equals; None where there is none."""
    fitting = [candidate for candidate in candidates if not limits.broken_by(candidate)]
    return min(fitting, key=lambda c: (c.kl, c.bytes_on_disk), default=None)
