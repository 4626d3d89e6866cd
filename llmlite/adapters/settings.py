"""What every adapter step shares: a frozen base of any form, one peft config, the one training path, merging where the method allows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError, counted
from llmlite.step import QUANTIZED, UNQUANTIZED, ModelPlan, Names, Step
from llmlite.training.settings import TrainingStep

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llmlite.context import Run

__all__ = ["AdapterStep", "added_adapter", "added_rows", "target_shapes"]

Shapes = dict[str, tuple[int, int]]


@settings
class AdapterStep(TrainingStep):
    """Base of the steps that train an adapter. A subclass says what peft is to add, and how many numbers that is."""

    takes: ClassVar[frozenset[str]] = UNQUANTIZED | QUANTIZED
    label: ClassVar[str] = "adapter"
    """The step's name in messages."""
    mergeable: ClassVar[bool] = True
    """Whether what it learns can be added into the base's weights."""
    trains_tokens: ClassVar[bool] = False
    """Whether it can train the rows of added tokens (`Model.add_tokens`) beside its own numbers."""

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate of AdamW. None: by the model's width, 1.3e-3 at 576, 2.9e-4 at 4,096; adapters want about ten times that of full training."""
    merge: bool = False
    """Also write merged/: the adapter added into the (dequantized) base it was trained against, in 16 bit. The step `merge` goes on with it instead."""

    def peft_config(self, config: PretrainedConfig) -> Any:
        """The peft config of a fresh adapter for a model with this transformers config."""
        raise NotImplementedError(f"{type(self).__name__} does not define peft_config(config)")

    def added_parameters(self, config: PretrainedConfig) -> tuple[int, str]:
        """Numbers that the adapter holds, and a phrase for the plan. Raises ConfigError for targets that the model does not have."""
        raise NotImplementedError(f"{type(self).__name__} does not define added_parameters(config)")

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: target modules that match nothing, a merge that the method does not have, or added tokens that it cannot train.
        """
        from llmlite.training.memory import training_peak_bytes

        self._require_trainable_tokens(model, run)
        if self.merge and not self.mergeable:
            raise ConfigError(self.label, [f"merge: what {self.label} learns is no change of weights, so it cannot be merged. Keep it beside the base."])
        added, note = self.added_parameters(model.config)
        if tokens := run.recipe.model.add_tokens:
            rows = added_rows(model.config, tokens)
            added += sum(rows.values())
            note += f", {counted(len(tokens), 'added token')} in {' and '.join(rows)}"
        return dataclasses.replace(
            model,
            adapters=True,
            parameters=model.parameters + added,
            trained_parameters=added,
            disk_bytes=4 * added,
            peak_bytes=training_peak_bytes(model, added, self, run),
            tokens=run.training_tokens(self),
            notes=(note,),
        )

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Attach, train, and merge if asked."""
        from llmlite.adapters.merge import write_merged
        from llmlite.training.trainer import train

        adapted = self.attach(model, run)
        train(adapted, self, run)
        if self.merge and run.is_main:
            write_merged(adapted, run)
        return adapted

    def attach(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """A peft model with a fresh adapter, ready to train."""
        import peft
        import torch

        torch.manual_seed(run.recipe.seed)
        config = self.peft_config(model.config)
        if tokens := run.recipe.model.add_tokens:
            ids = sorted(run.tokenizer.convert_tokens_to_ids(list(tokens)))
            config.trainable_token_indices = {name: list(ids) for name in added_rows(model.config, tokens)}
        adapted: PreTrainedModel = peft.get_peft_model(model, config)
        return adapted

    def _require_trainable_tokens(self, model: ModelPlan, run: Run) -> None:
        """Raise ConfigError where added tokens would stay untrained, or come back as others."""
        from llmlite.models.size import meta_model

        tokens, problems = run.recipe.model.add_tokens, []
        if not tokens:
            return
        if not self.trains_tokens:
            problems.append(f"add_tokens: {self.label} cannot train the rows of added tokens. Use lora or bottleneck, or finetune for all weights.")
        elif clash := sorted(set(added_rows(model.config, tokens)) & set(getattr(self, "modules_to_save", ()))):
            problems.append(f"add_tokens trains single rows of {' and '.join(clash)}, modules_to_save all of them: leave one of the two out.")
        elif getattr(meta_model(model.config).get_output_embeddings(), "bias", None) is not None:
            problems.append(f"add_tokens: the head of {model.config.model_type} has a bias, which an adapter cannot carry for single tokens. Use finetune.")
        if run.layout.sharded:
            problems.append(f"add_tokens with an adapter under {run.layout.name} is not built. Launch it with recipes/accelerate/ddp.yaml.")
        if problems:
            raise ConfigError(self.label, problems)

    def peak_learning_rate(self, hidden_size: int) -> float:
        """The learning rate as asked, else 5e-4 (2000 / hidden_size)^0.781.

        Source: Schulman and Thinking Machines Lab 2025, "LoRA Without Regret", the fit for Llama models.
        """
        return self.learning_rate or 5e-4 * (2000 / hidden_size) ** 0.781


def added_adapter(step: Step) -> AdapterStep | None:
    """The adapter that a step puts on the model: the step itself, or the one that a distillation is told to train (`adapter`)."""
    return step if isinstance(step, AdapterStep) else getattr(step, "adapter", None)


def added_rows(config: PretrainedConfig, tokens: Sequence[str]) -> dict[str, int]:
    """Modules whose rows belong to added tokens -> numbers in them: the embedding, and the head where it is not the same matrix."""
    from llmlite.models.families import family_of
    from llmlite.models.size import meta_model

    family = family_of(config)
    numbers = len(tokens) * int(meta_model(config).get_input_embeddings().weight.shape[1])
    names = [family.embedding] if getattr(config, "tie_word_embeddings", False) else [family.embedding, family.head]
    return {name.rpartition(".")[2]: numbers for name in names}


def target_shapes(config: PretrainedConfig, targets: Names, label: str) -> Shapes:
    """The projections that `targets` name: whole dotted name -> (out_features, in_features).

    Args:
        config: of the model.
        targets: ``all-linear``, roles of the families table (q, k, v, o, gate, up, down, ...), or module names such as ``q_proj``.
        label: the step's name, for the message.

    Raises:
        ConfigError: a name that matches no projection.
    """
    from llmlite.models.size import linear_roles, linear_shapes

    shapes, roles = linear_shapes(config), linear_roles(config)
    if targets == ("all-linear",):
        return shapes

    def names(target: str, layer: str) -> bool:
        return target in {layer, roles[layer]} or layer.endswith(f".{target}")

    unmatched = [target for target in targets if not any(names(target, layer) for layer in shapes)]
    if unmatched:
        known = sorted({layer.rpartition(".")[2] for layer in shapes})
        raise ConfigError(label, [f"target_modules {', '.join(map(repr, unmatched))} match no layer of this model. It has: {', '.join(known)}."])
    return {layer: shape for layer, shape in shapes.items() if any(names(target, layer) for target in targets)}
