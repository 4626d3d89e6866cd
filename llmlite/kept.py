"""What a run keeps on disk, and how it comes back.

    OUT/                  the result: weights or adapter, tokenizer, recipe.yaml, report.json
    OUT/steps/00-base/    figures of the base and its distributions on the held-out tokens
    OUT/steps/01-NAME/    the first step's result, a stock folder of its own; and so on
    OUT/steps/01-NAME.work/   what a step that was stopped continues from; gone when it is complete
    OUT/steps/evaluation.work/   figures of the reloaded models that are measured already; gone when evaluation.json is written

Every folder under steps/ is complete or absent. A recipe with other settings is refused in the same folder (`llmlite.plan`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.context import Run
from llmlite.data.vocabulary import VOCABULARY
from llmlite.errors import OutputError, counted
from llmlite.evaluation.reloaded import Checkpoint
from llmlite.recipe import Recipe
from llmlite.report import Row
from llmlite.step import step_name
from llmlite.storage import damage, link_or_copy, set_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KEPT_FIGURES", "Kept", "base_of_result", "load_result", "write_row"]

log = logging.getLogger(__name__)

KEPT_FIGURES = "evaluation.work"
"""Under steps/; see `llmlite.evaluation.reloaded`."""


@dataclass(frozen=True)
class Kept:
    """The folders of one run.

    Attributes:
        recipe: its steps name them.
        context: the run.
        out: OUT.
    """

    recipe: Recipe
    context: Run
    out: Path

    def folder(self, index: int) -> Path:
        """What a step leaves."""
        step = self.recipe.steps[index]
        name = step_name(step).rpartition(":")[2]
        return self.out / "steps" / f"{index + 1:02d}-{name}"

    def scratch(self, index: int) -> Path:
        """What a step that was stopped continues from."""
        folder = self.folder(index)
        return folder.with_name(f"{folder.name}.work")

    def row(self, folder: Path) -> Row:
        """The figures in a folder."""
        return Row(**json.loads((folder / "row.json").read_text(encoding="utf-8")))

    def usable(self, folder: Path) -> bool:
        """Whether a step's folder is whole. The main process looks, and sets a damaged one aside."""
        usable = False
        if self.context.is_main and folder.exists():
            reason = damage(folder)
            usable = reason is None
            if reason:
                log.warning("%s is damaged (%s); set aside as %s and done again", folder.name, reason, set_aside(folder).name)
        return self.context.agreed(usable)

    def complete_steps(self) -> int:
        """How many leading steps are whole on disk."""
        done = 0
        while done < len(self.recipe.steps) and self.usable(self.folder(done)):
            done += 1
        if done:
            log.info("%d of %s done before; continuing there", done, counted(len(self.recipe.steps), "step"))
        return done

    def clear_leftovers(self, done: int) -> None:
        """Remove what kills have left and nothing continues from: folders in the writing, and what steps that are complete now once continued from."""
        places = [*(self.out / "steps").glob(".*-*"), *(self.scratch(index) for index in range(done))]
        for place in places:
            shutil.rmtree(place, ignore_errors=True)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a model as a stock folder, with the tokenizer of the moment."""
        from llmlite.models.blockwise import shelf_of
        from llmlite.models.save import save_model

        shelf = shelf_of(model)
        if shelf is None:
            save_model(model, folder, self.context.storage_dtype, self.context.base_name())
        else:
            assert shelf.folder is not None  # the pipeline has written it block by block
            for file in shelf.folder.iterdir():
                link_or_copy(file, folder / file.name)
        self.context.tokenizer.save_pretrained(folder)
        if self.context.vocabulary is not None:
            self.context.vocabulary.save(folder / VOCABULARY)

    def base_of(self, index: int) -> Path:
        """The folder of the model on which the adapter of step `index` sits."""
        below = self._below_adapter(index)
        return self.context.source.folder if below is None else self.folder(below)

    def reload(self, index: int) -> PreTrainedModel:
        """What a step left, read from its folder; an adapter on its base."""
        folder = self.folder(index)
        if (folder / "adapter_config.json").is_file():
            from llmlite.adapters.load import load_adapter

            below = self._below_adapter(index)
            base = self.context.load_base() if below is None else self.reload(below)
            return load_adapter(base, folder, is_trainable=True)
        return self.context.load(folder)

    def _below_adapter(self, index: int) -> int | None:
        """The step whose model the adapter of step `index` sits on, None for the run's base: adapters of the steps before are the same one, trained less."""
        while index and (self.folder(index - 1) / "adapter_config.json").is_file():
            index -= 1
        return index - 1 if index else None

    def checkpoints(self, measuring: Run) -> list[Checkpoint]:
        """What every step left, to be read from its folder and measured; the last one is the result.

        Args:
            measuring: the run that measures, which takes over the tokens of the model of the moment.
        """

        def checkpoint(index: int) -> Checkpoint:
            folder, last = self.folder(index), index == len(self.recipe.steps) - 1

            def load() -> PreTrainedModel:
                model = self.reload(index).eval()
                measuring.take_vocabulary(folder)
                return model

            name = folder.name.partition("-")[2]
            size = self.row(folder).bytes_on_disk if (folder / "row.json").is_file() else 0
            return Checkpoint("this" if last else folder.name, load, size, folder, f"{index + 1}. {name}")

        return [checkpoint(index) for index in range(len(self.recipe.steps))]

    def link_result(self) -> None:
        """Let the folder itself hold the last step's files, without storing their bytes twice."""
        folder = self.folder(len(self.recipe.steps) - 1)
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in {"manifest.json", "row.json"}):
            target = self.out / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)


def write_row(folder: Path, row: Row) -> None:
    """Keep the figures of a step in its folder; see `Kept.row`."""
    (folder / "row.json").write_text(json.dumps(dataclasses.asdict(row), indent=2, ensure_ascii=False), encoding="utf-8")


def load_result(folder: Path | str, tensor_parallel: bool = False, **options: Any) -> tuple[PreTrainedModel, Run]:
    """The model that a finished run left, in eval mode, and the run itself: its base, data and tokenizer.

    Args:
        folder: the run's output.
        tensor_parallel: see `Run.tensor_parallel`.
        options: of the recipe, for instance ``device_map``, in place of those that it ran with.

    Raises:
        LlmliteError: the folder holds no run, or a damaged one.
    """
    out = Path(folder)
    if not (out / "recipe.yaml").is_file() or not (out / "report.json").is_file():
        raise OutputError(f"{out} holds no finished run (no recipe.yaml with report.json).")
    recipe = Recipe.from_file(out / "recipe.yaml", output_dir=str(out), **options)
    context = Run(recipe, tensor_parallel=tensor_parallel)
    model = Kept(recipe, context, out).reload(len(recipe.steps) - 1).eval()
    context.take_vocabulary(out)
    return model, context


def base_of_result(folder: Path | str) -> tuple[Path, Run]:
    """The folder of the model that a finished run's adapter sits on, and the run itself."""
    out = Path(folder)
    recipe = Recipe.from_file(out / "recipe.yaml", output_dir=str(out))
    context = Run(recipe)
    return Kept(recipe, context, out).base_of(len(recipe.steps) - 1), context
