"""llmlite makes Hugging Face language models smaller: pruning, distillation, quantization and adapters, stock checkpoints in and out.

Names are imported when first used, so that `import llmlite` stays quick and free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmlite.adapters.bottleneck import Bottleneck as Bottleneck
    from llmlite.adapters.correct import Correct as Correct
    from llmlite.adapters.ia3 import Ia3 as Ia3
    from llmlite.adapters.load import load_adapter as load_adapter
    from llmlite.adapters.lora import Lora as Lora
    from llmlite.adapters.merge import Merge as Merge
    from llmlite.adapters.prefix import Prefix as Prefix
    from llmlite.data.settings import Data as Data
    from llmlite.distillation.blackbox import DistillBlackBox as DistillBlackBox
    from llmlite.distillation.whitebox import DistillWhiteBox as DistillWhiteBox
    from llmlite.errors import LlmliteError as LlmliteError
    from llmlite.hub.push import push as push
    from llmlite.models.settings import Model as Model
    from llmlite.multi_adapter import export as export
    from llmlite.plan import check as check
    from llmlite.pruning.ffn import PruneFfn as PruneFfn
    from llmlite.pruning.heads import PruneHeads as PruneHeads
    from llmlite.pruning.hidden import PruneHidden as PruneHidden
    from llmlite.pruning.layers import PruneLayers as PruneLayers
    from llmlite.pruning.rescale import PruneRescale as PruneRescale
    from llmlite.pruning.structured import PruneStructured as PruneStructured
    from llmlite.pruning.vocabulary import PruneVocabulary as PruneVocabulary
    from llmlite.pruning.weights import PruneWeights as PruneWeights
    from llmlite.quantization.bnb import Quantize as Quantize
    from llmlite.recipe import Recipe as Recipe
    from llmlite.recipes.lora_int4 import LoraInt4 as LoraInt4
    from llmlite.recipes.lora_int8 import LoraInt8 as LoraInt8
    from llmlite.recipes.quantize_int8 import QuantizeInt8 as QuantizeInt8
    from llmlite.recipes.quantize_nf4 import QuantizeNf4 as QuantizeNf4
    from llmlite.report import Report as Report
    from llmlite.side_by_side import evaluate as evaluate
    from llmlite.step import Step as Step
    from llmlite.training.finetune import Finetune as Finetune

_HOMES = {
    "Bottleneck": "llmlite.adapters.bottleneck",
    "Correct": "llmlite.adapters.correct",
    "Data": "llmlite.data.settings",
    "DistillBlackBox": "llmlite.distillation.blackbox",
    "DistillWhiteBox": "llmlite.distillation.whitebox",
    "Finetune": "llmlite.training.finetune",
    "Ia3": "llmlite.adapters.ia3",
    "LlmliteError": "llmlite.errors",
    "Lora": "llmlite.adapters.lora",
    "LoraInt4": "llmlite.recipes.lora_int4",
    "LoraInt8": "llmlite.recipes.lora_int8",
    "Merge": "llmlite.adapters.merge",
    "Model": "llmlite.models.settings",
    "Prefix": "llmlite.adapters.prefix",
    "PruneFfn": "llmlite.pruning.ffn",
    "PruneHeads": "llmlite.pruning.heads",
    "PruneHidden": "llmlite.pruning.hidden",
    "PruneLayers": "llmlite.pruning.layers",
    "PruneRescale": "llmlite.pruning.rescale",
    "PruneStructured": "llmlite.pruning.structured",
    "PruneVocabulary": "llmlite.pruning.vocabulary",
    "PruneWeights": "llmlite.pruning.weights",
    "Quantize": "llmlite.quantization.bnb",
    "QuantizeInt8": "llmlite.recipes.quantize_int8",
    "QuantizeNf4": "llmlite.recipes.quantize_nf4",
    "Recipe": "llmlite.recipe",
    "Report": "llmlite.report",
    "Step": "llmlite.step",
    "check": "llmlite.plan",
    "evaluate": "llmlite.side_by_side",
    "export": "llmlite.multi_adapter",
    "load_adapter": "llmlite.adapters.load",
    "push": "llmlite.hub.push",
}

__all__ = ["__version__", "run", *_HOMES]


def run(recipe: Any, **options: Any) -> Report:
    """Run a recipe, or the one in a YAML file, to its end; what an earlier run of the same recipe left is continued.

    Args:
        recipe: a `Recipe`, or the path of its YAML file.
        options: of the file's recipe, each instead of what the file says; see `Recipe.from_file`. A `Recipe` takes none.

    Raises:
        LlmliteError: whatever cannot work; see `llmlite.errors`.
    """
    from pathlib import Path

    from llmlite.errors import ConfigError
    from llmlite.recipe import Recipe

    if isinstance(recipe, str | Path):
        recipe = Recipe.from_file(recipe, **options)
    elif options:
        raise ConfigError("llmlite.run", [f"{', '.join(options)}: options go with a file. A recipe has its own: dataclasses.replace(recipe, seed=1)."])
    report: Report = recipe.run()
    return report


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmlite' has no attribute {name!r}")
