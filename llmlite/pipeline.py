"""Run a recipe: base, steps in order with a checkpoint after each, evaluation after each, one result, a report.

What lies on disk meanwhile, and how it comes back, is in `llmlite.kept`: the same command continues after a kill at any moment.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.context import Run
from llmlite.errors import GateFailed, LlmliteError, LoadError, OutputError, ResourceError, RunError, counted, first_line
from llmlite.gate import COLLAPSE, Gate
from llmlite.kept import KEPT_FIGURES, Kept, write_row
from llmlite.models.adapted import adapter_parameters, is_adapted
from llmlite.models.find import find, weight_bytes, weights_fingerprint
from llmlite.plan import check, claim, made_before_adapter
from llmlite.recipe import Recipe
from llmlite.report import Report, Row, environment, human_bytes
from llmlite.step import Step, step_name
from llmlite.storage import folder_bytes, locked, telling, telling_refused, writing_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmlite.evaluation.quality import Reference
    from llmlite.evaluation.speed import Speed

__all__ = ["run"]

log = logging.getLogger(__name__)

_SHARDS = "shards"
_TO_LOAD = "Set load: blocks, which holds one block at a time, or device_map: auto"
_TO_EVALUATE = "Lower evaluation_rows or max_length"
_TO_ANSWER = "Free some, or set load: blocks, with which neither speed nor answers are measured"
_TO_MEASURE = "Lower evaluate.batch_sizes, or leave evaluate out: the result is whole without it"
_TO_SAVE = "Free some, or set load: blocks, with which one block at a time is written"
_NOT_IN_BLOCKS = "speed and answers: the model was loaded block by block"
_NOT_OFFLOADED = "speed and answers of the base: part of it was brought in for each forward pass"


def run(recipe: Recipe, context: Run | None = None) -> Report:
    """Run a recipe to its end, or continue it.

    Args:
        recipe: what to run.
        context: a `Run` of this recipe that `check` has seen; without one the recipe is checked first.

    Returns:
        The report; its `path` holds the result.

    Raises:
        LlmliteError: with everything worth keeping on disk; the same call continues.
    """
    if context is None:
        context = Run(recipe)
        check(recipe, context)
    out = recipe.folder
    with locked(out) if context.is_main else nullcontext():
        if context.is_main:
            claim(recipe)
        context.wait()
        with telling_refused(out):
            return _Pipeline(recipe, context, out).run()


class _Pipeline:
    """The state of one run: the model as the last step left it, the base's distributions, the report so far."""

    def __init__(self, recipe: Recipe, context: Run, out: Path) -> None:
        self.recipe, self.context, self.out = recipe, context, out
        self.kept = Kept(recipe, context, out)
        self.model: PreTrainedModel | None = None
        self.report = Report(out, recipe.to_mapping(), {}, environment(context.device.type))

    def run(self) -> Report:
        """All steps, then the result."""
        reference = self._base()
        done = self.kept.complete_steps()
        if self.context.is_main:
            self.kept.clear_leftovers(done)
        finished = self._finished_report() if done == len(self.recipe.steps) else None
        if finished is not None:
            log.info("%s is complete; nothing is done again", self.out)
            self.report = finished
            for index, row in enumerate(self.report.rows[1:]):
                self._gate(index, row)
            if self.context.is_main:
                self._expect()
                self.kept.link_result()
            del reference
            self._evaluate()
            self._push()
            self.context.wait()
            return self.report
        if done:
            self.context.take_vocabulary(self.kept.folder(done - 1))
        for index in range(len(self.recipe.steps)):
            if index >= done:
                self._step(index, reference)
            self.report.rows.append(self.kept.row(self.kept.folder(index)))
            self._gate(index, self.report.rows[-1])
        with _memory_advice("the result, loaded once more", _TO_SAVE):
            self._finish()
        del reference
        self._evaluate()
        self._push()
        return self.report

    def _finished_report(self) -> Report | None:
        """The report of a run whose steps are all whole, or None where it is still to be written, or once more: it is made of the steps' figures."""
        found = None
        if self.context.is_main and (self.out / "report.json").is_file():
            try:
                found = Report.read(self.out)
            except LoadError as error:
                log.warning("report.json is damaged (%s); written again from what the steps have left", str(error).rstrip("."))
        return self.context.agreed(found)

    # the base -------------------------------------------------------------------------------------------------------------------------

    def _base(self) -> Reference:
        from llmlite.evaluation.quality import Reference, reference_of
        from llmlite.evaluation.speed import measure_speed
        from llmlite.memory import measured_peak
        from llmlite.models.blockwise import is_blockwise
        from llmlite.models.device_map import is_offloaded

        folder = self.out / "steps" / "00-base"
        if not self.kept.usable(folder):
            log.info("base: loading %s and measuring it on the held-out text", self.recipe.model.name)
            started = time.perf_counter()
            with self.context.processes.main_process_first():  # which downloads; the others find it in the cache
                find(self.recipe.model, weights=True)
            with measured_peak(self.context.device.type) as peak:
                with _memory_advice("base, loaded", _TO_LOAD):
                    model = self.context.load_base()
                with _memory_advice("base, measured", _TO_EVALUATE):
                    reference, quality = reference_of(model, self.context.evaluation_batches(), shared=True)
            _require_numbers(self.recipe, quality.perplexity, self.context.compute_dtype)
            if self.context.is_main:  # one process writes and is timed, the others keep still
                skipped = _NOT_IN_BLOCKS if is_blockwise(model) else _NOT_OFFLOADED if is_offloaded(model) else ""
                with _memory_advice("base, timed", _TO_ANSWER):
                    speed = None if skipped else measure_speed(model)
                    figures = {"not_measured": skipped} if skipped else self._sample(model)
                row = Row(
                    "base",
                    model.num_parameters(),
                    weight_bytes(self.context.source.folder),
                    quality.perplexity,
                    prefill_tokens_per_second=speed.prefill_tokens_per_second if speed else None,
                    decode_tokens_per_second=speed.decode_tokens_per_second if speed else None,
                    peak_memory_bytes=peak.bytes,
                    seconds=time.perf_counter() - started,
                    details={
                        "tokens": quality.tokens,
                        "text": self.context.evaluation_data.fingerprint(),
                        "weights": weights_fingerprint(self.context.source.folder),
                        **figures,
                        **_held_up(speed),
                    },
                )
                with _memory_advice("base, saved", _TO_EVALUATE), writing_folder(folder) as temporary:
                    reference.save(temporary / "reference.safetensors")
                    write_row(temporary, row)
            self.context.wait()
            del model
            gc.collect()
        row = self.kept.row(folder)
        data = self.context.evaluation_data
        if row.details["text"] != data.fingerprint():
            raise OutputError(
                f"output_dir: the held-out text of {self.recipe.data.evaluation or self.recipe.data.train} has changed since the run in {self.out} "
                "began, so its figures could not be compared. Restore the text, choose another --output_dir, or start afresh with --overwrite_output_dir."
            )
        weights = weights_fingerprint(self.context.source.folder)
        if weights and row.details.get("weights") not in {None, weights}:
            raise OutputError(
                f"output_dir: the weights of {self.recipe.model.name} have changed since the run in {self.out} began, so its steps are of another model. Put "
                "them back, choose another --output_dir, or start afresh with --overwrite_output_dir."
            )
        self.report.rows = [row]
        self.report.evaluation = {
            "text": self.recipe.data.evaluation or f"{self.recipe.data.train}, held-out part",
            "examples": data.counts.examples,
            "tokens": row.details["tokens"],
        }
        return Reference.read(folder / "reference.safetensors")

    # steps ----------------------------------------------------------------------------------------------------------------------------

    def _step(self, index: int, reference: Reference) -> None:
        from llmlite.evaluation.energy import measured_energy
        from llmlite.evaluation.quality import measure_quality
        from llmlite.evaluation.speed import measure_speed
        from llmlite.memory import measured_peak
        from llmlite.models.blockwise import is_blockwise
        from llmlite.models.safety import packed_generation
        from llmlite.models.save import settle

        step, folder = self.recipe.steps[index], self.kept.folder(index)
        name = step_name(step)
        log.info("step %d of %d: %s", index + 1, len(self.recipe.steps), name)
        scratch = self.kept.scratch(index)
        with telling(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        self.context.position, self.context.scratch, self.context.notes = index, scratch, {}
        device = self.context.device.type
        used = scratch / "energy.json" if self.context.is_main else None
        advice = self._to_apply(step)
        with measured_energy(device, estimate=self.recipe.estimate_energy, keep=used) as energy, measured_peak(device) as peak, _memory_advice(name, advice):
            model = self._apply(index, step)
            if is_blockwise(model):
                model = self._written(model, scratch / _SHARDS)
            elif not is_adapted(model):
                settle(model, self.context.storage_dtype)
        self.context.note(energy=energy.to_json())
        log.info("step %d of %d: %s took %.0f s; measuring", index + 1, len(self.recipe.steps), name, energy.seconds)
        with _memory_advice(f"{name}, measured", _TO_EVALUATE):
            quality = measure_quality(model, self.context.evaluation_batches(), self.context.over_present_tokens(reference), shared=True)
        if self.context.is_main:  # one process writes and is timed, the others keep still
            speed = None
            if is_blockwise(model):
                self.context.note(not_measured=_NOT_IN_BLOCKS)
            else:
                with _memory_advice(f"{name}, timed", _TO_ANSWER), packed_generation(model):  # as stock transformers runs it
                    speed = measure_speed(model)
                    self.context.note(**self._sample(model))
            row = Row(
                name,
                _logical_parameters(model),
                0,
                quality.perplexity,
                quality.kl,
                quality.top1_agreement,
                speed.prefill_tokens_per_second if speed else None,
                speed.decode_tokens_per_second if speed else None,
                peak.bytes,
                energy.seconds,
                {**self.context.notes, **_held_up(speed)},
            )
            if worst := row.worst_layers():
                log.info("%s: %s", name, worst)
            with _memory_advice(f"{name}, saved", _TO_SAVE), writing_folder(folder) as temporary:
                self.kept.save(model, temporary)
                size = folder_bytes(temporary) + (weight_bytes(self.kept.base_of(index)) if is_adapted(model) else 0)
                write_row(temporary, dataclasses.replace(row, bytes_on_disk=size))
                for extra in sorted(scratch.glob("keep/*")):  # what the step wants beside its weights, for instance a merged model
                    shutil.move(extra, temporary / extra.name)
            shutil.rmtree(scratch, ignore_errors=True)
        self.context.wait()
        self.model = None if is_blockwise(model) else model  # its files have moved

    def _written(self, model: PreTrainedModel, shards: Path) -> PreTrainedModel:
        """What a step made of a blockwise model, from the stock folder that it is written to, block by block, by the main process."""
        from llmlite.models.blockwise import write_blockwise

        if self.context.is_main and not (shards / "model.safetensors.index.json").is_file():
            log.info("writing the new shards")
            write_blockwise(model, shards, self.context.storage_dtype)
        self.context.wait()
        del model
        gc.collect()
        return self.context.load(shards)

    def _sample(self, model: PreTrainedModel) -> dict[str, Any]:
        from llmlite.evaluation.sample import sample

        return {"sample": sample(model, self.context.tokenizer, self.context.evaluation_data.rows)}

    def _gate(self, index: int, row: Row) -> None:
        """Stop when a step's figures cross its gate; where no gate is for this step, warn of a collapse.

        Raises:
            GateFailed: the step's folder stays, so that a looser gate continues behind it.
        """
        step, whole = self.recipe.steps[index], self.recipe.gate
        at_end = whole and whole.when == "end" and not step.gate
        gate = Gate() if at_end and index < len(self.recipe.steps) - 1 else step.gate or whole
        crossed = self._crossed(gate or COLLAPSE, row)
        if not crossed:
            return
        if not gate:
            advice = "The gate is for the end, so the steps behind may heal it." if at_end else "To stop at such a step, set a gate."
            log.warning("%s: the model is far from its base: %s. %s", row.name, "; ".join(crossed), advice)
            return
        good = self._last_good(index)
        raise GateFailed(
            (f"gate: the result, behind step {index + 1}, {row.name}, is" if at_end else f"gate: step {index + 1}, {row.name}, went")
            + f" too far{' from the base' if at_end else ''}: {'; '.join(crossed)}.\n"
            + (f"The last good model is in {good}. " if good else f"The last good model is the base, {self.recipe.model.name}. ")
            + f"Try: {step.advice}. Or loosen the gate: the same command then continues behind this step."
        )

    def _crossed(self, gate: Gate, row: Row) -> list[str]:
        return gate.crossed(self.report.rows[0].perplexity, row.perplexity, row.kl, row.top1_agreement)

    def _last_good(self, index: int) -> Path | None:
        """The folder of the last step before `index` that keeps its own gate's limits, or the recipe's, also where those are for the end. None for the base."""
        for before in range(index - 1, -1, -1):
            if not self._crossed(self.recipe.steps[before].gate or self.recipe.gate, self.report.rows[before + 1]):
                return self.kept.folder(before)
        return None

    def _to_apply(self, step: Step) -> str:
        """What to do when memory does not suffice for a step."""
        whole = step.no_blocks() or self.context.blockwise
        return step.memory_advice + ("" if whole else ", or set load: blocks, which works on one block at a time")

    def _apply(self, index: int, step: Step) -> PreTrainedModel:
        if index == 0:
            return step.load(self.context)
        if self.model is None:
            self.model = self.kept.reload(index - 1)
        model, self.model = self.model, None
        return step.apply(model, self.context)

    # the result -----------------------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        from llmlite.evaluation.reload import require_reload
        from llmlite.html.page import write_page
        from llmlite.hub.base import describe_base
        from llmlite.hub.card import write_card
        from llmlite.hub.lines import dtype_of, loading_lines, offloaded_lines
        from llmlite.models.blockwise import is_blockwise

        last = len(self.recipe.steps) - 1
        if self.model is None:
            self.model = self.kept.reload(last)
        if not self.context.is_main:
            return
        self.kept.link_result()
        dtype = dtype_of(self.model, self.context.compute_dtype)
        adapter = is_adapted(self.model)
        base, vocabulary = self.kept.base_of(last) if adapter else None, self.context.grown_vocabulary if adapter else None
        self.report.loading = loading_lines(self.out, base, dtype, vocabulary if base == self.context.source.folder else None)
        log.info("reloading the result in a fresh process")
        lines = self.report.loading
        if is_blockwise(self.model) and getattr(self.model, "hf_quantizer", None) is None:
            lines = offloaded_lines(self.model, self.out, dtype)  # the whole of it would not fit
        self.report.reload_difference = require_reload(self.model, lines)
        made_by = made_before_adapter(self.recipe) if adapter else None
        self.report.base = describe_base(self.context.source, self.model.config if adapter else None, made_by, vocabulary)
        self.report.expected = self.recipe.expected.of_base(self.report.rows[0].perplexity)
        self.report.save()
        write_card(self.report)
        write_page(self.report)

    def _expect(self) -> None:
        """Put what the recipe expects into the report of a run that was complete already, where something else stands there."""
        from llmlite.html.page import write_page

        expected = self.recipe.expected.of_base(self.report.rows[0].perplexity)
        if expected and expected != self.report.expected:
            self.report.expected = expected
            self.report.save()
            write_page(self.report)

    def _evaluate(self) -> None:
        """Measure what the steps left as it comes back from disk, where the recipe asks for it. A run that was stopped meanwhile measures the rest only."""
        from llmlite.evaluation.reloaded import Reloaded, publish
        from llmlite.evaluation.result import Evaluation

        recipe, asked = self.recipe, self.recipe.evaluate
        if asked is None:
            self._say_kept_figures()
            return
        self.model = None  # never two at a time
        gc.collect()
        if self.context.is_main:
            context = Run(recipe)  # with all tokens of the base, some of which the steps may have taken away
            measuring = Reloaded(context, asked, recipe.estimate_energy, recipe.grid_grams_per_kwh, self.out / "steps" / KEPT_FIGURES)
            checkpoints = Kept(recipe, context, self.out).checkpoints(context)[0 if asked.each_step else -1 :]
            before = Evaluation.read(self.out)
            if before is None or before.about.get("asked") != measuring.fingerprint(checkpoints):
                log.info("measuring the base and %s", counted(len(checkpoints), "reloaded model"))
                with _memory_advice("evaluate", _TO_MEASURE):
                    found = measuring.measure(self.out, checkpoints)
                publish(found, self.report)
            measuring.forget()
        self.context.wait()

    def _say_kept_figures(self) -> None:
        """Name what an evaluation left that was stopped and is asked for no longer: it may have taken hours, so it is not for a run to throw away."""
        place = self.out / "steps" / KEPT_FIGURES
        if self.context.is_main and place.is_dir():
            log.info(
                "%s holds %s of an evaluation that was stopped. evaluate in the recipe, or llmlite evaluate %s --each_step, with the same options, goes on "
                "behind what it has measured and clears it away; without it, delete that folder.",
                place,
                human_bytes(folder_bytes(place, "*/*")),
                shlex.quote(str(self.out)),
            )

    def _push(self) -> None:
        """Upload the result where that was asked for. A failed upload loses nothing: the run stays complete."""
        from llmlite.hub.push import push

        recipe = self.recipe
        if recipe.push_to_hub and self.context.is_main:
            pushed = push(
                self.report,
                recipe.hub_model_id or "",
                private=recipe.hub_private_repo,
                revision=recipe.hub_revision,
                accept_license=recipe.hub_accept_license,
            )
            log.info("uploaded to %s: %s, compared with the folder", pushed.url, counted(len(pushed.files), "file"))


def _require_numbers(recipe: Recipe, perplexity: float, dtype: torch.dtype) -> None:
    """Raise RunError for a base that computes no numbers: nothing could be compared with it, and what is calibrated on it is noise."""
    if not math.isfinite(perplexity):
        raise RunError(
            f"base: the perplexity of {recipe.model.name} on the held-out text is {perplexity}, computed in {str(dtype).removeprefix('torch.')}. "
            "Its weights hold numbers that are infinite or none, or activations overflow. Download it again, or try dtype: float32."
        )


def _held_up(speed: Speed | None) -> dict[str, float]:
    """What a row notes of a speed that other programs held up."""
    return {"processors_short": speed.processors_short} if speed and speed.processors_short else {}


def _logical_parameters(model: PreTrainedModel) -> int:
    """Numbers that the weights stand for: a packed 4-bit byte counts as two. Adapters are included."""
    from llmlite.models.size import size_of_model

    return int(size_of_model(model).parameters + adapter_parameters(model))


@contextmanager
def _memory_advice(name: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation into what to do about it.

    Args:
        name: what was going on.
        advice: what to lower.
    """
    from llmlite.memory import out_of_memory

    try:
        yield
    except LlmliteError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(f"{name}: out of memory ({first_line(error)[:120]}). {advice}. What was finished is kept; the same command continues.") from error
