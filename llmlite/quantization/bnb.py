"""The step `quantize`: 8- or 4-bit weights by bitsandbytes, in the format that stock `from_pretrained` loads.

Quantizing is saving and reloading with a `BitsAndBytesConfig`, which is what users do later anyway; as the first step of a recipe the
model is loaded straight into it. bitsandbytes' 4-bit types are NF4 and FP4, floating grids of 16 values, not integers. With `calibrate` their codes and
scales are chosen by second-order error on calibration text instead of by rounding; the file's format and size are the same.

Source: Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8); Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantization).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError, counted
from llmlite.step import ModelPlan, Names, Scheme, Step

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from llmlite.context import Run
    from llmlite.quantization.calibrate import CalibratedScheme

__all__ = ["Quantize"]


@settings
class Quantize(Step):
    """Store the linear layers of the decoder blocks in 8 or 4 bits. Embeddings, norms and lm_head stay as they are."""

    advice: ClassVar[str] = "calibrate: true with more calibration_sequences, scheme: int8, a step correct behind it, or skip for the worst layers"

    scheme: Scheme = "nf4"
    """int8: LLM.int8 (8.05 bits a weight), nf4: 16 normal quantiles (4.5 bits; 4.15 with double_quant), fp4: a 4-bit float."""
    double_quant: bool = True
    """Store the scales of the 4-bit schemes in 8 bits too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of what stays dense (embedding, norms, lm_head) and of the activations; it is what stock transformers will compute in. auto: the run's own, which is
    float32 on a CPU. bfloat16 makes the file of a small model a third smaller there, and slower."""
    skip: Names = ()
    """Layers to leave as they are, besides lm_head: whole dotted names, or parts of them such as down_proj, mlp or layers.0."""
    unaligned: Literal["refuse", "skip"] = "refuse"
    """What to do with layers whose input width is not a multiple of 64, which bitsandbytes gets wrong: refuse, or leave them in 16 bit."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """int8 only: input features with an outlier above this are multiplied in 16 bit. 0 multiplies all in 8 bit."""
    calibrate: bool = True
    """4-bit only: choose codes and scales by the output error on calibration text; same format, bytes and speed. False rounds to nearest, without data."""
    damping: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """calibrate only: share of the mean diagonal added to each Hessian."""
    sweeps: Annotated[int, Field(ge=0)] = 2
    """calibrate only: passes of coordinate descent over codes and scales after GPTQ."""
    token_weights: Literal["sensitivity", "equal"] = "sensitivity"
    """calibrate only: sensitivity lets tokens count by how much an error there changes the prediction: a backward pass over the rows; equal: all alike."""
    tune_epochs: Annotated[int, Field(ge=0)] = 1
    """calibrate only: passes over the rows that tune the scales end to end, with the codes fixed. 0 leaves it out."""
    report_sequences: Annotated[int, Field(ge=0)] = 8
    """Without calibration: rows that each layer's error is measured on. 0 leaves the per-layer report out."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: layers whose width bitsandbytes cannot represent, unless they are skipped; names in `skip` that no layer has; no layer left.
        """
        from llmlite.calibration.memory import backward_bytes, head_loss_bytes, walk_bytes
        from llmlite.models.quick import quick_dtype, slow_here
        from llmlite.models.size import BLOCK_SIZE, expected_bytes, linear_shapes, runtime_bytes

        self._require_known_names(model)
        unaligned = self._unaligned(model)
        if unaligned and self.unaligned == "refuse":
            names = ", ".join(f"{name} ({width})" for name, width in unaligned[:4])
            more = f" and {len(unaligned) - 4} more" if len(unaligned) > 4 else ""
            raise ConfigError(
                "quantize",
                [
                    f"{counted(len(unaligned), 'layer has', 'layers have')} an input width that is not a multiple of {BLOCK_SIZE}: {names}{more}. "
                    f"bitsandbytes gives wrong results there, silently. Prune to multiples of {BLOCK_SIZE}, or set unaligned: skip to leave "
                    "such layers in 16 bit."
                ],
            )
        skipped = self._skipped(model)
        if len(set(skipped)) >= len(linear_shapes(model.config)):
            raise ConfigError("quantize", ["skip and unaligned leave no layer to quantize. Skip fewer, or leave the step out."])
        size = expected_bytes(model.config, dtype=self._dense_dtype(run), scheme=self.scheme, double_quant=self.double_quant, skip=skipped)
        dense = run.dispatched_bytes if run.device_map is not None else expected_bytes(model.config, dtype=run.compute_dtype)
        notes = [f"{self.scheme}{' with double quantization' if self.scheme != 'int8' and self.double_quant else ''}"]
        if self.scheme == "int8":
            notes.append("in evaluation the inputs are rounded to 8 bit too (LLM.int8); in training only the weights are")
        if unaligned:
            notes.append(f"{counted(len(unaligned), 'layer stays', 'layers stay')} in 16 bit (width no multiple of {BLOCK_SIZE})")
        if slow := slow_here(run.device, self._dense_dtype(run), self.scheme):
            notes.append(slow)
        sequences = min(self._sequences(run), run.recipe.data.calibration_sequences)
        tokens = sequences * run.recipe.data.max_length
        if self.chooses_codes:
            tuned = f", scales tuned in {counted(self.tune_epochs * sequences, 'step')}" if self.tune_epochs else ""
            notes.append(f"codes and scales chosen on {counted(sequences, 'calibration row')}{tuned}")
        backward = 0
        if self._goes_backward:
            quick = quick_dtype(run.device, run.compute_dtype)
            backward = backward_bytes(model.config, run.recipe.data.max_length, quick, BLOCK_SIZE if self.tune_epochs else 0)
            if self.tune_epochs:
                backward += head_loss_bytes(model.config, run.recipe.data.max_length, quick, own_head=False)
        return dataclasses.replace(
            model,
            form=self.scheme,
            rounded=True,
            disk_bytes=size,
            peak_bytes=dense + max(size, backward) + walk_bytes(model.config, tokens) + runtime_bytes(run.device),
            tokens=tokens,
            trained_parameters=0,
            notes=tuple(notes),
        )

    def no_blocks(self) -> str:
        """See `Step.no_blocks`."""
        if self._goes_backward:
            return (
                "token_weights: sensitivity and tuned scales go backward through the whole model; with token_weights: equal and tune_epochs: 0 it can be done"
            )
        return ""

    def no_dispatch(self, form: str) -> str:
        """See `Step.no_dispatch`. Only files and codes are written."""
        return self.no_blocks()

    @property
    def _goes_backward(self) -> bool:
        return self.chooses_codes and (self.tune_epochs > 0 or self.token_weights == "sensitivity")

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Save the dense model to a scratch folder and reload it quantized."""
        from llmlite.models.blockwise import shelf_of
        from llmlite.storage import damage, writing_folder

        shelf = shelf_of(model)
        if shelf is not None:
            assert shelf.folder is not None  # the pipeline has written what the step before left
            return self._quantized(model, run, shelf.folder)
        folder = run.scratch / "dense"
        if run.is_main and damage(folder) is not None:
            with writing_folder(folder) as temporary:
                model.save_pretrained(temporary)
        run.wait()
        return self._quantized(model, run, folder)

    def load(self, run: Run) -> PreTrainedModel:
        """Load the run's base straight into the quantized form."""
        dense = run.load_base() if self._sequences(run) else None
        return self._quantized(dense, run, run.source.folder)

    def _quantized(self, dense: PreTrainedModel | None, run: Run, folder: Path) -> PreTrainedModel:
        """The model in `folder`, quantized; `dense` is the same one in memory, when calibration text is to be run through it."""
        from llmlite.quantization.calibrate import calibrate, write_calibrated
        from llmlite.quantization.error import error_report, layer_errors

        config = dense.config if dense is not None else run.config
        how = self.bitsandbytes_config(ModelPlan(config), run)
        if dense is None or not self._sequences(run):
            return self._load(run, folder, how)
        batches = self._calibration_batches(run)
        if not self.chooses_codes:
            model = self._load(run, folder, how)
            run.note(**error_report(layer_errors(dense, model, batches)))
            return model
        errors = calibrate(dense, batches, self._scheme(ModelPlan(config), run.recipe.seed), run.own_scratch / "codes", run.own_scratch / "walk")
        run.note(**error_report(errors))
        del dense
        model = self._load(run, folder, how)
        write_calibrated(model, run.own_scratch / "codes", self.scheme)  # type: ignore[arg-type]  # never int8 here
        return model

    @property
    def chooses_codes(self) -> bool:
        """Whether calibration text decides on the codes, so that rounding the base while loading would give others."""
        return self.calibrate and self.scheme != "int8"

    def _sequences(self, run: Run) -> int:
        """Calibration rows that the step reads."""
        return run.recipe.data.calibration_sequences if self.chooses_codes else self.report_sequences

    def _calibration_batches(self, run: Run) -> list[dict[str, Tensor]]:
        from llmlite.calibration.blocks import batches_of
        from llmlite.quantization.calibrate import quantization_windows

        return batches_of(quantization_windows(run)[: self._sequences(run)])

    def _scheme(self, model: ModelPlan, seed: int) -> CalibratedScheme:
        from llmlite.distillation.descent import Descent
        from llmlite.quantization.calibrate import CalibratedScheme

        assert self.scheme != "int8"
        return CalibratedScheme(
            self.scheme,
            self.double_quant,
            self.damping,
            self.sweeps,
            token_weights=self.token_weights,
            tune=Descent(epochs=self.tune_epochs, seed=seed) if self.tune_epochs else None,
            seed=seed,
            skip=self._skipped(model),
        )

    def _load(self, run: Run, folder: Path, config: BitsAndBytesConfig) -> PreTrainedModel:
        return run.load(folder, quantization_config=config, dtype=self._dense_dtype(run))

    def bitsandbytes_config(self, model: ModelPlan, run: Run) -> BitsAndBytesConfig:
        """How transformers is told to load such a model quantized."""
        from transformers import BitsAndBytesConfig

        from llmlite.models.families import family_of

        # what lies outside of the blocks stays; transformers skips lm_head by itself only while no names are given
        stay = [*self._skipped(model), *family_of(model.config).stem]
        skipped = [*stay, "lm_head"] if stay else None
        if self.scheme == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.llm_int8_threshold, llm_int8_skip_modules=skipped)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.scheme,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self._dense_dtype(run),
            bnb_4bit_quant_storage=self._dense_dtype(run) if run.layout.kind == "fsdp2" else None,  # FSDP2 splits no bytes; None: uint8
            llm_int8_skip_modules=skipped,
        )

    def _dense_dtype(self, run: Run) -> torch.dtype:
        """The type of what is not quantized."""
        from llmlite.models.load import compute_dtype

        return run.compute_dtype if self.dtype == "auto" else compute_dtype(run.device, self.dtype)

    def _skipped(self, model: ModelPlan) -> tuple[str, ...]:
        """Whole names of the layers that stay: transformers matches prefixes and suffixes only, so a part such as mlp would be ignored silently."""
        from llmlite.models.size import linear_shapes

        named = [name for name in linear_shapes(model.config) if any(_is_part(part, name) for part in self.skip)]
        return (*named, *(name for name, _ in self._unaligned(model)))

    def _unaligned(self, model: ModelPlan) -> list[tuple[str, int]]:
        if self.scheme == "int8":
            return []
        from llmlite.models.size import BLOCK_SIZE, linear_shapes

        return [
            (name, in_features)
            for name, (_, in_features) in linear_shapes(model.config).items()
            if in_features % BLOCK_SIZE and not any(_is_part(part, name) for part in self.skip)
        ]

    def _require_known_names(self, model: ModelPlan) -> None:
        from llmlite.models.size import linear_shapes

        names = list(linear_shapes(model.config))
        unknown = [part for part in self.skip if part != "lm_head" and not any(_is_part(part, name) for name in names)]
        if unknown:
            known = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            raise ConfigError(
                "quantize", [f"skip: {', '.join(map(repr, unknown))} is part of no layer's name. A layer is called {names[0]}; parts: {', '.join(known)}."]
            )


def _is_part(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."
