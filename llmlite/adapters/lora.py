"""The step `lora`: train a low-rank adapter on a frozen base, in 16/32 bit or on a bitsandbytes base (QLoRA).

    h = W x + (alpha / r) B A x,    A: (r, in), B: (out, r), W frozen

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; on a 4-bit base Dettmers et al. 2023, arXiv:2305.14314. Variants by peft's names: rsLoRA divides alpha by
sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732); DoRA trains the size of each output row apart from its direction (Liu et al. 2024, arXiv:2402.09353);
LoRA+ lets B learn faster than A (Hayou et al. 2024, arXiv:2402.12354).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmlite.adapters.settings import AdapterStep, target_shapes
from llmlite.config import near, settings
from llmlite.errors import ConfigError, counted
from llmlite.step import QUANTIZED, ModelPlan, Names
from llmlite.training.settings import PositiveInt

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from llmlite.context import Run

__all__ = ["Lora", "correction_peak_bytes", "quantize_step"]

_FOUR_BITS = frozenset({"nf4", "fp4"})
_FEWEST_ROWS = 16
_TOKENS_FOR_EACH_INPUT = 4
"""Calibration tokens for each input of the widest layer. On SmolLM2-135M-Instruct twice as many left the same divergence (0.317 and 0.320 of stock NF4's)."""


@settings
class Lora(AdapterStep):
    """Train a LoRA adapter on the frozen model."""

    label: ClassVar[str] = "lora"
    trains_tokens: ClassVar[bool] = True

    r: PositiveInt = 16
    """Rank of the adapter: rows of A, columns of B."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero in training."""
    target_modules: Names = ("all-linear",)
    """Layers that get an adapter: all-linear (every linear layer of the decoder blocks), or names such as q_proj, or roles such as down."""
    rank_pattern: dict[str, PositiveInt] = dataclasses.field(default_factory=dict)
    """Other ranks for some of these layers, by name or role: {down_proj: 32, q: 8}."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, which keeps large ranks learning (rsLoRA)."""
    use_dora: bool = False
    """Train the size of each output row apart from its direction (DoRA): often better at small ranks, a fifth to a third slower."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """Learn B with this many times the learning rate of A (LoRA+; its authors use 16). None: the same rate."""
    modules_to_save: Names = ()
    """Modules trained whole and saved with the adapter, such as embed_tokens and lm_head when the vocabulary means something new."""
    init_lora_weights: Literal["auto", "default", "gaussian", "orthogonal", "quantization_error"] = "auto"
    """quantization_error starts as the low-rank correction of what the quantize step broke, from calibration text; the others start as the base.
    auto: quantization_error after a 4-bit quantize step, where the dense base fits into memory beside the quantized one; else default."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: targets that match nothing, or options that do not go together.
        """
        problems = []
        if self.init_lora_weights == "quantization_error":
            if model.form not in QUANTIZED or not model.rounded:
                problems.append("init_lora_weights=quantization_error corrects what a quantize step of this recipe broke; there is none before it.")
            if self.use_dora:
                problems.append("use_dora measures row sizes at the start, which init_lora_weights=quantization_error changes. Choose one of the two.")
        if self.init_lora_weights == "orthogonal" and (odd := sorted({rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2})):
            problems.append(f"init_lora_weights=orthogonal needs even ranks, got {', '.join(map(str, odd))}.")
        if self.use_dora and model.form == "int8":  # seen with peft 0.21.2 and bitsandbytes 0.50.2: a copy of the layer takes the scales with it
            problems.append("use_dora does not train on an int8 base: bitsandbytes loses the layers' scales there. Use scheme: nf4, or leave use_dora out.")
        if problems:
            raise ConfigError("lora", problems)
        return self._planned_start(super().check(model, run), model, run)

    def _planned_start(self, plan: ModelPlan, model: ModelPlan, run: Run) -> ModelPlan:
        """`plan` with what the start adds to it; whether `auto` is a correction is decided here."""
        from llmlite.memory import free_bytes
        from llmlite.report import human_bytes

        run.corrected.discard(run.position)
        # in int8 `auto` would repair nothing: the inputs are rounded too
        by_itself = self.init_lora_weights == "auto" and model.form in _FOUR_BITS and model.rounded
        if self.init_lora_weights != "quantization_error" and not by_itself:
            return plan
        if by_itself and (reason := self._not_corrected(run)):
            return dataclasses.replace(plan, notes=(*plan.notes, f"starts as the quantized base: {reason}"))
        rows = self._correction_rows(model.config, run)
        peak = correction_peak_bytes(model, rows, run)
        free = free_bytes(run.device.type) // (run.layout.processes if run.device.type == "cpu" else 1)
        if by_itself and not run.agreed(peak <= free):
            note = f"starts as the quantized base; starting as its correction would take {human_bytes(peak)} with the dense base, {human_bytes(free)} are free"
            return dataclasses.replace(plan, notes=(*plan.notes, note))
        run.corrected.add(run.position)
        note = f"starts as the correction of the quantization, from {counted(rows, 'calibration row')}"
        return dataclasses.replace(plan, peak_bytes=max(plan.peak_bytes, peak), notes=(*plan.notes, note))

    def _not_corrected(self, run: Run) -> str:
        """Why `auto` is no correction although there is something to correct, as a phrase; empty when it is one."""
        if self.use_dora:
            return "DoRA measures row sizes at the start"
        if run.layout.sharded:
            return f"its correction under {run.layout.name} is not built"
        return "its correction goes backward through the dense base, which device_map spreads" if run.device_map is not None else ""

    def _correction_rows(self, config: PretrainedConfig, run: Run) -> int:
        """Calibration rows that the correction is computed from: all that the run has when it is asked for, as many as it gains from by itself."""
        from llmlite.models.size import linear_shapes

        data = run.recipe.data
        if self.init_lora_weights == "quantization_error":
            return data.calibration_sequences
        widest = max(in_features for _, in_features in linear_shapes(config).values())
        return min(data.calibration_sequences, max(_FEWEST_ROWS, -(-_TOKENS_FOR_EACH_INPUT * widest // data.max_length)))

    def no_dispatch(self, form: str) -> str:
        """See `Step.no_dispatch`."""
        if self.init_lora_weights == "quantization_error":
            return "the correction of the quantization goes backward through the whole dense base"
        return super().no_dispatch(form)

    def added_parameters(self, config: PretrainedConfig) -> tuple[int, str]:
        """r (out + in) for each layer, a size for each row with DoRA, and the modules that are trained whole."""
        shapes = target_shapes(config, self.target_modules, "lora")
        ranks = self._ranks(config)
        added = sum(ranks.get(name, self.r) * (out_features + in_features) for name, (out_features, in_features) in shapes.items())
        if self.use_dora:
            added += sum(out_features for out_features, _ in shapes.values())
        whole = self._whole_modules(config)
        kind = "DoRA rank" if self.use_dora else "rank"
        note = f"{kind} {self.r} on {counted(len(shapes), 'layer')}" + (f", {', '.join(whole)} trained whole" if whole else "")
        return added + sum(whole.values()), note

    def peft_config(self, config: PretrainedConfig) -> Any:
        """`peft.LoraConfig` with whole layer names, so that it means the same on every family."""
        import peft

        whole = list(self._whole_modules(config))
        return peft.LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=sorted(target_shapes(config, self.target_modules, "lora")),
            rank_pattern=self._ranks(config),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            modules_to_save=whole or None,
            ensure_weight_tying=bool(whole) and bool(getattr(config, "tie_word_embeddings", False)),
            init_lora_weights=True if self.init_lora_weights in {"auto", "default", "quantization_error"} else self.init_lora_weights,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """A peft model with a fresh adapter, ready to train."""
        from llmlite.adapters.initialise import initialise_for_run

        adapted = super().attach(model, run)
        quantize = quantize_step(run)
        if quantize is not None and (self.init_lora_weights == "quantization_error" or (self.init_lora_weights == "auto" and run.position in run.corrected)):
            initialise_for_run(adapted, run, quantize, self._correction_rows(adapted.config, run))
        return adapted

    def optimizer(self, model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer | None:
        """AdamW with two rates where LoRA+ is asked for."""
        if self.loraplus_lr_ratio is None:
            return None
        import torch
        from peft.optimizers import create_loraplus_optimizer

        made: torch.optim.Optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=self.loraplus_lr_ratio, loraplus_weight_decay=self.weight_decay
        )
        return made

    def _ranks(self, config: PretrainedConfig) -> dict[str, int]:
        """`rank_pattern` by whole layer names."""
        targeted = target_shapes(config, self.target_modules, "lora")
        ranks: dict[str, int] = {}
        for target, rank in self.rank_pattern.items():
            named = [name for name in target_shapes(config, (target,), "lora") if name in targeted]
            if not named:
                raise ConfigError("lora", [f"rank_pattern: '{target}' names layers that target_modules leaves out."])
            ranks |= dict.fromkeys(named, rank)
        return ranks

    def _whole_modules(self, config: PretrainedConfig) -> dict[str, int]:
        """Name and parameters of each of `modules_to_save`."""
        from llmlite.models.size import meta_model

        if not self.modules_to_save:
            return {}
        sizes: dict[str, int] = {}
        for path, module in meta_model(config).named_modules():
            if path and any(True for _ in module.parameters()):
                sizes[path.rpartition(".")[2]] = sum(parameter.numel() for parameter in module.parameters())
        unknown = [name for name in self.modules_to_save if name not in sizes]
        if unknown:
            guesses = [f"'{name}'" + (f" (did you mean '{guess}'?)" if (guess := near(name, sizes)) else "") for name in unknown]
            raise ConfigError("lora", [f"modules_to_save: no module {', '.join(guesses)} in this model."])
        return {name: sizes[name] for name in self.modules_to_save}


def correction_peak_bytes(model: ModelPlan, rows: int, run: Run) -> int:
    """Expected peak bytes while a correction is computed: the quantized model beside the dense one, a backward pass through that and a walk.

    Args:
        model: as `quantize` leaves it.
        rows: calibration rows.
        run: their length, the device.
    """
    from llmlite.calibration.memory import backward_bytes, walk_bytes
    from llmlite.models.quick import quick_dtype
    from llmlite.models.size import expected_bytes, runtime_bytes

    length, device = run.recipe.data.max_length, run.device
    backward = backward_bytes(model.config, length, quick_dtype(device, run.compute_dtype))
    dense = expected_bytes(model.config, dtype=run.compute_dtype)
    return dense + model.disk_bytes + backward + walk_bytes(model.config, rows * length) + runtime_bytes(device)


def quantize_step(run: Run) -> int | None:
    """Place of the `quantize` step that made the base of the run's present step; None where this recipe did not."""
    from llmlite.quantization.bnb import Quantize

    return next((index for index in reversed(range(run.position)) if isinstance(run.recipe.steps[index], Quantize)), None)
