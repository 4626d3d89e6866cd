"""llmlite makes Hugging Face language models smaller: pruning, distillation, quantization and adapters, stock checkpoints in and out.

Names are imported when first used, so that `import llmlite` stays quick and free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmlite.adapters.bottleneck import Bottleneck as Bottleneck
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
    from llmlite.report import Report as Report
    from llmlite.side_by_side import evaluate as evaluate
    from llmlite.step import Step as Step
    from llmlite.training.finetune import Finetune as Finetune

_HOMES = {
    "Bottleneck": "llmlite.adapters.bottleneck",
    "Correct": "llmlite.adapters.correct",
    "DistillBlackBox": "llmlite.distillation.blackbox",
    "DistillWhiteBox": "llmlite.distillation.whitebox",
    "Ia3": "llmlite.adapters.ia3",
    "Merge": "llmlite.adapters.merge",
    "Prefix": "llmlite.adapters.prefix",
    "load_adapter": "llmlite.adapters.load",
    "Finetune": "llmlite.training.finetune",
    "Data": "llmlite.data.settings",
    "LlmliteError": "llmlite.errors",
    "Lora": "llmlite.adapters.lora",
    "LoraInt4": "llmlite.recipes.lora_int4",
    "LoraInt8": "llmlite.recipes.lora_int8",
    "Model": "llmlite.models.settings",
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
    "push": "llmlite.hub.push",
}

__all__ = ["__version__", "run", *_HOMES]


def run(recipe: Any, **options: Any) -> Report:
    """Run a recipe, or the one in a YAML file; keyword options win over the file.

    Raises:
        LlmliteError: whatever cannot work; see `llmlite.errors`.
    """
    from pathlib import Path

    from llmlite.recipe import Recipe

    if isinstance(recipe, str | Path):
        recipe = Recipe.from_file(recipe, **options)
    report: Report = recipe.run()
    return report


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmlite' has no attribute {name!r}")
