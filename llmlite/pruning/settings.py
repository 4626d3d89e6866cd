"""The options that structured pruning steps share, and what their plans have in common. No torch at import."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError
from llmlite.step import ModelPlan, Step

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from llmlite.context import Run

__all__ = [
    "ADVICE",
    "WITH_GRADIENTS",
    "Keep",
    "Score",
    "UnitStep",
    "calibration_tokens",
    "compensated",
    "kept_in",
    "needs_gradients",
    "planned",
    "require_plain",
    "walk_state",
]

ADVICE = "keep more, calibrate on text nearer to yours, or train what is left before measuring it (recipes/*_heal.yaml)"
Keep = Annotated[float, Field(gt=0, le=1)]
Score = Literal["flap", "wanda", "magnitude", "taylor", "fisher", "obs"]
"""How heads and FFN channels are judged, see `llmlite.pruning.scores` and `llmlite.calibration.sensitivity.cost_of_silence`."""
WITH_GRADIENTS = ("taylor", "fisher")
_FROM_SUMS = ("flap", "wanda", "obs")  # over what the projections hear


@settings
class UnitStep(Step):
    """Base of the steps that take inputs away from output projections: FFN channels from `down`, heads from `o`."""

    advice: ClassVar[str] = ADVICE

    score: Score = "flap"
    """How units are judged: flap (how much of the output fluctuates with it), wanda (weight times input norm), magnitude, taylor (weight times gradient,
    over all weights that go with the unit), fisher (what it would cost the prediction, by gradients), obs (second order in the output, unit after unit)."""
    reconstruct: bool = True
    """Solve the remaining output projection anew by least squares on the calibration text, so that what stays makes up for what went."""
    bias_compensation: bool = False
    """Put the mean of what was lost into a bias (FLAP). The checkpoint gets output biases where its family has a switch for them; others are refused."""
    inputs: Literal["compressed", "dense"] = "compressed"
    """What each block hears during calibration: the blocks before it as already pruned, or the dense model (one pass cheaper)."""
    target: Literal["own", "dense"] = "own"
    """What the repaired projection aims at: own (its old outputs on the same inputs), or dense (the dense model's outputs, which also corrects the blocks
    before; one pass dearer)."""

    @property
    def _scores(self) -> tuple[Score, ...]:
        return (self.score,)

    @property
    def _goes_backward(self) -> bool:
        return any(score in WITH_GRADIENTS for score in self._scores)

    @property
    def listens(self) -> bool:
        """Whether the step needs sums over what the projections hear: to repair, to fill a bias, or to judge."""
        return self.reconstruct or self.bias_compensation or any(score in _FROM_SUMS for score in self._scores)

    @property
    def reads_text(self) -> bool:
        """Whether the step needs calibration text at all."""
        return self.listens or self._goes_backward

    def windows(self, run: Run) -> Tensor | None:
        """The calibration text, (N, T) token ids, or None where the step reads none."""
        return run.calibration_windows if self.reads_text else None

    def no_blocks(self) -> str:
        """See `Step.no_blocks`."""
        return needs_gradients("score", self.score)


def needs_gradients(option: str, score: str) -> str:
    """Why a model that is loaded block by block cannot be judged so, or "" where it can."""
    return f"{option}: {score} needs gradients of the whole model; flap, wanda, magnitude and obs need none" if score in WITH_GRADIENTS else ""


def require_plain(model: ModelPlan, name: str) -> None:
    """Refuse a model with an adapter.

    Raises:
        ConfigError: as said.
    """
    if model.adapters:
        raise ConfigError(name, ["the model carries an adapter, which pruning would not follow. Put the pruning before the lora step."])


def compensated(config: Any, name: str, *, attention: bool = False, ffn: bool = False) -> Any:
    """The config with biases at the output projections, for bias compensation.

    Raises:
        ConfigError: neither the family nor an equivalent has them.
    """
    from llmlite.errors import UnsupportedModel
    from llmlite.models.legal import with_bias_switches

    try:
        return with_bias_switches(config, attention=attention, ffn=ffn)[0]
    except UnsupportedModel as error:
        raise ConfigError(name, [f"bias_compensation: {error}"]) from None


def calibration_tokens(run: Run) -> int:
    """Tokens that calibration reads at most."""
    data = run.recipe.data
    return data.calibration_sequences * data.max_length


def planned(model: ModelPlan, config: Any, run: Run, *, calibrated: bool, notes: tuple[str, ...], form: str | None = None, backward: bool = False) -> ModelPlan:
    """The plan after a pruning step, counted from the new config. `backward`: whether a backward pass over the dense model comes first."""
    from llmlite.calibration.memory import backward_bytes, walk_bytes
    from llmlite.models.quick import quick_dtype
    from llmlite.models.size import expected_bytes, runtime_bytes, size_of_config

    tokens = calibration_tokens(run) if calibrated else 0
    dense = expected_bytes(model.config, dtype=run.compute_dtype)
    peak = 2 * dense + walk_bytes(model.config, tokens)  # both models while rebuilding, and the walk
    if tokens and backward:
        peak = max(peak, dense + backward_bytes(model.config, run.recipe.data.max_length, quick_dtype(run.device, run.compute_dtype)))
    return dataclasses.replace(
        model,
        config=config,
        form=form or model.form,
        parameters=size_of_config(config).parameters,
        trained_parameters=0,
        disk_bytes=expected_bytes(config, dtype=run.storage_dtype),
        peak_bytes=peak + runtime_bytes(run.device),
        tokens=tokens,
        notes=notes,
    )


def kept_in(run: Run, name: str) -> Path | None:
    """Where a step keeps something while it works (the blocks of a walk, the state of a search), of this process; `None` outside of a pipeline."""
    from pathlib import Path

    return None if run.scratch == Path() else run.own_scratch / name


def walk_state(run: Run) -> Path | None:
    """Where a walk keeps what it did; see `kept_in`."""
    return kept_in(run, "blocks")
