"""What was foretold of a result. A recipe carries it, so that whoever runs it finds expected beside obtained in the report."""

from __future__ import annotations

from typing import Annotated

import pydantic

from llmlite.config import from_mapping, settings

__all__ = ["Expected", "ExpectedSettings"]


@settings
class Expected:
    """Figures of the last step's result on the held-out text, before anybody has it. What is left out is not expected."""

    kl: Annotated[float, pydantic.Field(ge=0)] | None = None
    """KL divergence from the base, nats a token."""
    perplexity_ratio: Annotated[float, pydantic.Field(gt=0)] | None = None
    """Perplexity as a multiple of the base's."""
    bytes_on_disk: Annotated[int, pydantic.Field(gt=0)] | None = None
    """Bytes that are needed to load it."""

    def of_base(self, perplexity: float) -> dict[str, float]:
        """The figures by the names that `llmlite.report.Report.expected` has for them.

        Args:
            perplexity: the base's.
        """
        ratio = self.perplexity_ratio
        figures = {"kl": self.kl, "perplexity": ratio and ratio * perplexity, "bytes_on_disk": self.bytes_on_disk}
        return {name: value for name, value in figures.items() if value is not None}


ExpectedSettings = Annotated[Expected, from_mapping(Expected)]
"""An `Expected`, or a mapping of its figures."""
