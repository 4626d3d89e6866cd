"""The search: every combination of one way to prune and one way to store, what it should give, and which of them nothing else beats.

    bytes       exact, from the configs
    KL          KL(prune) + KL(store)                  small changes of a distribution cost KL in second order, and independent ones add up
    perplexity  ratio(prune) * ratio(store)
    speed       ratio(prune) * ratio(store)

Nothing here loads a model. What the sum is worth is shown by every run: its report has expected beside obtained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Candidate", "Limits", "Option", "best", "combinations", "frontier"]


@dataclass(frozen=True)
class Option:
    """One way to prune, or one way to store, measured alone against the base.

    Attributes:
        name: for the table; empty for doing nothing.
        steps: its steps, as YAML has them.
        kl: nats a token from the base.
        perplexity_ratio: to the base.
        decode_speedup: tokens a second while writing, to the base.
    """

    name: str
    steps: tuple[dict[str, Any], ...] = ()
    kl: float = 0.0
    perplexity_ratio: float = 1.0
    decode_speedup: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A combination and what is expected of it.

    Attributes:
        prune, store: its options.
        bytes_on_disk: of everything that is needed to load it.
        weight_bytes: that the weights need in memory.
    """

    prune: Option
    store: Option
    bytes_on_disk: int
    weight_bytes: int

    @property
    def name(self) -> str:
        """Both options in words."""
        return " + ".join(option.name for option in (self.prune, self.store) if option.name) or "as it is"

    @property
    def steps(self) -> tuple[dict[str, Any], ...]:
        """All steps in order."""
        return self.prune.steps + self.store.steps

    @property
    def kl(self) -> float:
        """Expected KL from the base, nats a token."""
        return self.prune.kl + self.store.kl

    @property
    def perplexity_ratio(self) -> float:
        """Expected perplexity against the base's."""
        return self.prune.perplexity_ratio * self.store.perplexity_ratio

    @property
    def decode_speedup(self) -> float:
        """Expected decoding speed against the base's."""
        return self.prune.decode_speedup * self.store.decode_speedup


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


def combinations(prunes: Iterable[Option], stores: Sequence[Option], sizes: dict[tuple[str, str], tuple[int, int]]) -> list[Candidate]:
    """All pairs whose sizes are known.

    Args:
        prunes, stores: the options, doing nothing among them.
        sizes: (prune name, store name) -> (bytes on disk, bytes of the weights in memory).
    """
    pairs = ((prune, store) for prune in prunes for store in stores)
    return [Candidate(prune, store, *sizes[prune.name, store.name]) for prune, store in pairs if (prune.name, store.name) in sizes]


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
