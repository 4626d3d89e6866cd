"""Losses inside the models, beside the one at the output: hidden states and attention maps of matched layers.

    loss += hidden_weight * mean over pairs of hidden_mse (or cosine)  +  attention_weight * mean over pairs of attention_transfer

Where the widths differ, one linear map for each pair lifts the student's states to the teacher's width. It is trained with the student, hangs on the model only
while training lasts, and is never part of what is saved; the Trainer's own checkpoints have it in a file of its own, so that a stopped run continues exactly.

Shapes: B sequences, H heads, T positions, N tokens, D hidden size of the student, E of the teacher.

Sources: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351; see `llmlite.distillation.hidden`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llmlite.distillation.hidden import attention_transfer, hidden_cosine, hidden_mse
from llmlite.errors import UnsupportedModel
from llmlite.models.view import ModelView, unwrap
from llmlite.training.trainer import Companion

__all__ = ["InnerLosses", "InnerWeights", "layer_pairs"]

_MODULE = "distillation_projections"
_FILE = "distillation_projections.safetensors"


def layer_pairs(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """Each student layer with the teacher layer at the same relative depth, numbered from 0; last with last.

    Source: the uniform strategy of Jiao et al. 2020, arXiv:1909.10351, there g(m) = 3 m for 4 of 12 layers.
    """
    return tuple((layer, max(0, round((layer + 1) * teacher_layers / student_layers) - 1)) for layer in range(student_layers))


@dataclass(frozen=True)
class InnerWeights:
    """How much each inner loss counts, and how hidden states are compared: ``mse`` (relative to the teacher's mean square) or ``cosine``."""

    hidden: float = 0.0
    attention: float = 0.0
    hidden_loss: str = "mse"


class _Seen:
    """Outputs of chosen layers of one model in its last forward pass."""

    def __init__(self, layers: Sequence[int], weights: InnerWeights) -> None:
        self.layers, self.weights = layers, weights
        self.hidden: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Keep what the layers give within the block; recomputation by gradient checkpointing happens outside of it and is not seen."""
        blocks = ModelView(model).blocks
        handles = []
        for layer in sorted(set(self.layers)):
            if self.weights.hidden:
                handles.append(blocks[layer].module.register_forward_hook(self._keep(self.hidden, layer, 0)))
            if self.weights.attention:
                handles.append(blocks[layer].attention.register_forward_hook(self._keep(self.attention, layer, 1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, store: dict[int, Tensor], layer: int, index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            if index >= len(values) or values[index] is None:
                raise UnsupportedModel("distill.whitebox: this model's attention gives no attention maps, so attention_weight cannot be used.")
            store[layer] = values[index]

        return hook


class InnerLosses(Companion):
    """Compare matched layers after each forward pass of both models.

    Args:
        student: the model that is trained; projections are hung on it until `close`.
        teacher: the live teacher.
        pairs: (student layer, teacher layer), from 0.
        weights: see `InnerWeights`.
        seed: of the projections.
        checkpoint: the Trainer's checkpoint that training continues from, or None.
    """

    def __init__(
        self, student: Any, teacher: Any, pairs: Sequence[tuple[int, int]], weights: InnerWeights, *, seed: int = 0, checkpoint: Path | None = None
    ) -> None:
        self.student, self.teacher, self.pairs, self.weights = student, teacher, pairs, weights
        self.seen_student, self.seen_teacher = _Seen([s for s, _ in pairs], weights), _Seen([t for _, t in pairs], weights)
        self.projections: nn.ModuleDict | None = None
        self.attention_of_student = unwrap(student).config._attn_implementation
        width, wanted = ModelView(student).hidden_size, ModelView(teacher).hidden_size
        if weights.hidden and width != wanted:
            device = next(student.parameters()).device
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = {str(s): nn.Linear(width, wanted, bias=False) for s, _ in pairs}
            self.projections = nn.ModuleDict(made).to(device)
            if checkpoint is not None:
                self.projections.load_state_dict(load_file(checkpoint / _FILE))
            student.add_module(_MODULE, self.projections)  # so that the optimizer, DDP and gradient clipping see it
        if weights.attention:
            for model in (student, teacher):
                unwrap(model).set_attn_implementation("eager")  # the others never have the maps

    def close(self) -> None:
        """Leave the student as it was: no projections, its own attention."""
        if self.projections is not None:
            delattr(self.student, _MODULE)
        if self.weights.attention:
            unwrap(self.student).set_attn_implementation(self.attention_of_student)

    def watching(self, model: Any) -> AbstractContextManager[None]:
        """See `Companion.watching`."""
        return self.seen_student.watching(model)

    def watching_teacher(self) -> AbstractContextManager[None]:
        """The same for the teacher."""
        return self.seen_teacher.watching(self.teacher)

    def losses(self, inputs: dict[str, Any], keep_N: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Sums over the kept tokens, each a mean over the pairs."""
        found: dict[str, tuple[float, Tensor]] = {}
        if self.weights.hidden:
            found["hidden"] = (self.weights.hidden, self._mean([self._hidden(s, t, keep_N) for s, t in self.pairs]))
        if self.weights.attention:
            found["attention"] = (self.weights.attention, self._mean([self._attention(s, t, keep_N) for s, t in self.pairs]))
        return found

    def callbacks(self) -> Sequence[TrainerCallback]:
        """One that writes the projections beside the Trainer's checkpoint."""
        return () if self.projections is None else (_SaveProjections(self.projections),)

    @staticmethod
    def _mean(values: list[Tensor]) -> Tensor:
        return torch.stack([value.to(values[0].device) for value in values]).mean()

    def _hidden(self, student_layer: int, teacher_layer: int, keep_N: Tensor) -> Tensor:
        student_ND, teacher_NE = (seen.hidden[layer].flatten(0, 1) for seen, layer in ((self.seen_student, student_layer), (self.seen_teacher, teacher_layer)))
        keep = keep_N.to(student_ND.device)
        student_KD, teacher_KE = student_ND[keep], teacher_NE.to(student_ND.device)[keep]
        projection = None if self.projections is None else self.projections[str(student_layer)].get_parameter("weight").to(student_ND.device)
        if self.weights.hidden_loss == "cosine":
            return hidden_cosine(student_KD, teacher_KE, projection).sum()
        return hidden_mse(student_KD, teacher_KE, projection, normalise=True).sum()

    def _attention(self, student_layer: int, teacher_layer: int, keep_N: Tensor) -> Tensor:
        student_BHTT = self.seen_student.attention[student_layer]
        teacher_BHTT = self.seen_teacher.attention[teacher_layer].to(student_BHTT.device)
        return attention_transfer(student_BHTT, teacher_BHTT).flatten()[keep_N.to(student_BHTT.device)].sum()


class _SaveProjections(TrainerCallback):  # type: ignore[misc]
    """Writes the projections into each checkpoint, before it is sealed."""

    def __init__(self, projections: nn.ModuleDict) -> None:
        self.projections = projections

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.projections.state_dict().items()}
            save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE)
