"""A Step: one thing done to a model. Settings are its fields; `check` says early what cannot work; `apply` takes a model and returns one.

To write your own, subclass `Step` in a module of yours and name it in YAML as ``step: my_package.my_module:MyStep``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import pydantic

from llmlite.config import near, settings, shorten, validate
from llmlite.gate import Gate, GateSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llmlite.context import Run

__all__ = ["QUANTIZED", "STEPS", "UNQUANTIZED", "ModelPlan", "Names", "Scheme", "Step", "name_of_step", "parse_step", "step_class", "step_name"]

# Short name -> where the class lives. Imported when used, so that a recipe pays only for what it names.
STEPS: dict[str, str] = {
    "bottleneck": "llmlite.adapters.bottleneck:Bottleneck",
    "correct": "llmlite.adapters.correct:Correct",
    "distill.blackbox": "llmlite.distillation.blackbox:DistillBlackBox",
    "distill.whitebox": "llmlite.distillation.whitebox:DistillWhiteBox",
    "finetune": "llmlite.training.finetune:Finetune",
    "ia3": "llmlite.adapters.ia3:Ia3",
    "lora": "llmlite.adapters.lora:Lora",
    "merge": "llmlite.adapters.merge:Merge",
    "prefix": "llmlite.adapters.prefix:Prefix",
    "prune.ffn": "llmlite.pruning.ffn:PruneFfn",
    "prune.heads": "llmlite.pruning.heads:PruneHeads",
    "prune.hidden": "llmlite.pruning.hidden:PruneHidden",
    "prune.layers": "llmlite.pruning.layers:PruneLayers",
    "prune.rescale": "llmlite.pruning.rescale:PruneRescale",
    "prune.structured": "llmlite.pruning.structured:PruneStructured",
    "prune.vocabulary": "llmlite.pruning.vocabulary:PruneVocabulary",
    "prune.weights": "llmlite.pruning.weights:PruneWeights",
    "quantize": "llmlite.quantization.bnb:Quantize",
}

Scheme = Literal["int8", "nf4", "fp4"]
"""A way in which bitsandbytes stores weights."""
QUANTIZED: frozenset[str] = frozenset(get_args(Scheme))
"""Forms of model whose weights are such; see `ModelPlan.form`."""
UNQUANTIZED: frozenset[str] = frozenset({"dense", "sparse"})
"""Forms of model whose weights are numbers of 16 or 32 bit."""


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_tuple)]
"""A list of names in YAML or Python; on the command line, or for one name, also `q_proj` or `q_proj,v_proj`."""


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """What is known of a model while no weight is loaded. A step's `check` takes one and returns the one it will leave behind.

    Attributes:
        config: the transformers config after the step.
        form: what the weights are: ``dense`` (16 or 32 bit), ``sparse`` (dense storage with zeros to keep), or a bitsandbytes scheme.
        rounded: whether a step of the recipe has rounded the weights to it, so that they are at hand as they were before.
        adapters: whether a peft adapter sits on the model.
        parameters: number of parameters, adapters included.
        trained_parameters: number of them that the step trains.
        disk_bytes: bytes of the step's checkpoint.
        peak_bytes: expected peak memory of the step, in bytes.
        tokens: tokens that the step reads, training and calibration together.
        notes: what the plan should say about the step, for a person.
    """

    config: PretrainedConfig
    form: str = "dense"
    rounded: bool = False
    adapters: bool = False
    parameters: int = 0
    trained_parameters: int = 0
    disk_bytes: int = 0
    peak_bytes: int = 0
    tokens: int = 0
    notes: tuple[str, ...] = ()


@settings
class Step:
    """Base of all steps."""

    takes: ClassVar[frozenset[str]] = UNQUANTIZED
    """Forms of model the step can work on. See `ModelPlan.form`."""

    takes_adapters: ClassVar[bool] = False
    """Whether the model may carry a peft adapter."""

    advice: ClassVar[str] = "ask less of this step"
    """What to try when its result is too far from the base."""

    memory_advice: ClassVar[str] = "Lower calibration_sequences or max_length"
    """What to do when memory does not suffice for it."""

    gate: GateSettings = Gate()
    """Limits for this step's result, instead of the recipe's gate."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """Say what the step will leave behind.

        Raises:
            LlmliteError: the step cannot work on such a model or with such settings.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define check(model, run)")

    def no_blocks(self) -> str:
        """Why the step cannot work on a model of which one block at a time is in memory (`load: blocks`), or "" when it can.

        A step that can treats blocks within `llmlite.models.blockwise.present`, through `walk_blocks` say, and hands back a blockwise model.
        """
        return "it works on the whole model"

    def no_dispatch(self, form: str) -> str:
        """Why the step cannot work where the blocks of the dense base lie on several devices, in main memory or on disk (`device_map`), or "" when it can.

        Args:
            form: of the model that the step gets. A quantized one lies on one device, whatever its base did.
        """
        return "changes to weights that lie elsewhere would vanish, and gradients stop at them" if form in UNQUANTIZED else ""

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Do it: take the model, return the model that the next step gets. The caller saves it."""
        raise NotImplementedError(f"{type(self).__name__} does not define apply(model, run)")

    def load(self, run: Run) -> PreTrainedModel:
        """Load the run's base model and apply the step: what happens when it is the first one. Overridden where loading can be cheaper."""
        return self.apply(run.load_base(), run)


def step_class(name: str) -> type[Step]:
    """The class behind a short name or a ``module:Class`` path.

    Raises:
        ValueError: no such step; the message is a sentence for the user.
    """
    path = STEPS.get(name, name)
    shown = shorten(name)
    if ":" not in path:
        guess = near(name, STEPS)
        raise ValueError(f"no step '{shown}'. " + (f"Did you mean '{guess}'?" if guess else f"Known: {', '.join(STEPS)}; your own: 'module:Class'."))
    module_name, _, class_name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise ValueError(f"step '{shown}' is no place of a class. Write it as 'package.module:Class'.")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"step '{shown}' cannot be imported: {shorten(str(error))}.") from None
    if not (isinstance(found, type) and issubclass(found, Step)):
        raise ValueError(f"step '{shown}' is not a subclass of llmlite.Step.")
    return found


def name_of_step(cls: type[Any]) -> str | None:
    """The name a step has in YAML, or None for a class that is no step."""
    if not issubclass(cls, Step):
        return None
    path = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, known in STEPS.items() if known == path), path)


def step_name(step: Step) -> str:
    """The name of a step in YAML."""
    return str(name_of_step(type(step)))


def parse_step(value: Any, index: int) -> tuple[Step | None, list[str]]:
    """Build a step from its YAML, or say every problem it has.

    Args:
        value: a mapping with ``step:`` and the step's options, or a bare step name, or a Step.
        index: its place in the list, for the messages.
    """
    if isinstance(value, Step):
        return value, []
    if isinstance(value, str):
        value = {"step": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("step"), str):
        return None, [f"steps[{index}]: should be a mapping with 'step: NAME' and the step's options, got {value!r}."]
    name = value["step"]
    try:
        cls = step_class(name)
    except ValueError as error:
        return None, [f"steps[{index}]: {error}"]
    return validate(cls, {key: item for key, item in value.items() if key != "step"}, f"steps[{index}] {name}")
