"""The step `prune.hidden`: a narrower residual stream. Every embedding, norm and projection side that touches it loses the same dimensions.

The bluntest cut: nothing is repaired, so it wants training afterwards.

Source: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2 (importance of embedding channels from the outputs of the norms).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError, UnsupportedModel
from llmlite.pruning.settings import ADVICE, Keep, planned, require_plain
from llmlite.step import ModelPlan, Step

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["PruneHidden", "hidden_scores"]


@settings
class PruneHidden(Step):
    """Take dimensions out of the residual stream. Wants training afterwards."""

    advice: ClassVar[str] = ADVICE

    keep: Keep = 0.9
    """Share of the hidden dimensions that stays."""
    multiple_of: Annotated[int, Field(ge=1)] = 64
    """The number that stays is rounded to a multiple of this."""
    score: Literal["activation", "magnitude"] = "activation"
    """activation (mean size of each dimension behind the norms of all layers), or magnitude (weights that read or write it)."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: the family ties its hidden width to its heads, or stock code refuses the width.
        """
        from llmlite.models.families import family_of
        from llmlite.models.size import meta_model
        from llmlite.models.slicing import take_hidden
        from llmlite.models.view import ModelView

        require_plain(model, "prune.hidden")
        width = family_of(model.config).width(model.config)
        keep = self._number(width)
        try:
            config: Any = take_hidden(ModelView(meta_model(model.config)), range(keep))[0]
        except UnsupportedModel as error:
            raise ConfigError("prune.hidden", [str(error)]) from None
        calibrated = keep < width and self.score == "activation"
        return planned(model, config, run, calibrated=calibrated, notes=(f"{keep} of {width} hidden dimensions stay",))

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Choose, then slice."""
        from llmlite.models.rebuild import rebuild
        from llmlite.models.slicing import take_hidden
        from llmlite.models.view import ModelView

        view = ModelView(model)
        keep = self._number(view.hidden_size)
        if keep == view.hidden_size:
            return model
        score_D = hidden_scores(model, run.calibration_windows if self.score == "activation" else None)
        kept = sorted(int(index) for index in score_D.topk(keep).indices)
        run.note(removed_hidden=sorted(set(range(view.hidden_size)) - set(kept)))
        return rebuild(model, *take_hidden(view, kept))

    def _number(self, width: int) -> int:
        from llmlite.models.legal import round_to_multiple

        return round_to_multiple(round(self.keep * width), self.multiple_of, width)


def hidden_scores(model: PreTrainedModel, windows_NT: Tensor | None) -> Tensor:
    """Importance of each dimension of the residual stream, float32, (D,).

    Args:
        model: in eval mode.
        windows_NT: calibration windows: the mean absolute output of every norm over the hidden width, summed over norms. None: the squared weights of all
            projections that read or write the dimension.
    """
    import torch

    from llmlite.calibration.blocks import batches_of
    from llmlite.models.view import ModelView

    view = ModelView(model)
    total_D = torch.zeros(view.hidden_size, device=next(view.embedding.parameters()).device)
    if windows_NT is None:
        for linear in view.linears():
            total_D += linear.weight_OI.float().square().sum(1 if linear.role in ("o", "down") else 0)
        return total_D

    def add(_module: Any, _args: Any, output: Tensor) -> None:
        total_D.add_(output.detach().float().abs().reshape(-1, output.shape[-1]).mean(0))

    norms = [norm for block in view.blocks for role, norm in block.norms.items() if not role.endswith("post_norm")]
    handles = [norm.register_forward_hook(add) for norm in [*norms, *([view.final_norm] if view.final_norm is not None else [])]]
    try:
        with torch.no_grad():
            for batch in batches_of(windows_NT):
                view.model(input_ids=batch["input_ids"].to(total_D.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return total_D
