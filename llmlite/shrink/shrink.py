"""Measure, search, choose, write the recipe, and run it if asked. What `llmlite shrink MODEL --target 0.5` does."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import read_yaml, to_yaml
from llmlite.errors import ConfigError, RunError
from llmlite.expected import Expected
from llmlite.plan import plan_of_base
from llmlite.recipe import Recipe
from llmlite.report import Report, human_bytes
from llmlite.shrink.measure import evidence_of, layer_costs, measured, plan_after, recipe_of, sizes_of
from llmlite.shrink.options import VOCABULARY, mixed_options, prune_options, store_options
from llmlite.shrink.search import NOTHING, Candidate, Limits, Option, best, combinations, frontier
from llmlite.step import ModelPlan
from llmlite.storage import locked, read_object, telling, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from llmlite.context import Run

__all__ = ["Shrunk", "shrink"]

log = logging.getLogger(__name__)

_MEASURED_SHARE = 0.2
"""Share of the weights in 16 bit of the mixed format that is measured; the others are computed from it."""


@dataclass
class Shrunk:
    """What was found.

    Attributes:
        folder: holds shrink.yaml, the figures, and result/ when it was run.
        full_bytes: of the model in 16 bit.
        chosen: the candidate.
        front: candidates that nothing else beats, the largest first.
        limits: what was asked for.
        report: of the run, or None.
    """

    folder: Path
    full_bytes: int
    chosen: Candidate
    front: list[Candidate]
    limits: Limits
    report: Report | None = None

    def table(self) -> Table:
        """Size against expected quality."""
        from rich.table import Table

        table = Table(title="Size against expected quality", title_justify="left", caption="* is the choice", caption_justify="left")
        for name in ("", "how", "on disk", "of 16 bit", "KL", "perplexity", "decode"):
            table.add_column(name, justify="left" if name in {"", "how"} else "right", no_wrap=name != "how")
        for candidate in [*self.front, *([] if self.chosen in self.front else [self.chosen])]:
            table.add_row(
                "*" if candidate == self.chosen else "",
                candidate.name,
                human_bytes(candidate.bytes_on_disk),
                f"{candidate.bytes_on_disk / self.full_bytes:.2f}",
                f"{candidate.kl:.4f}",
                f"{candidate.perplexity_ratio:.3f}x",
                f"{candidate.decode_speedup:.2f}x",
            )
        return table


def shrink(
    recipe: Recipe,
    *,
    target: float | None = None,
    max_bytes: float | None = None,
    max_memory: float | None = None,
    min_speedup: float | None = None,
    max_perplexity_increase: float | None = None,
    keeps: Sequence[float] = (0.9, 0.8, 0.7, 0.6),
    heal_steps: int = 40,
    vocabulary: bool = False,
    run: bool = False,
) -> Shrunk:
    """Find the recipe with the least expected KL within the limits.

    Args:
        recipe: model, data, seed and output folder; its steps do not count.
        target: share of the 16-bit size that the files may have.
        max_bytes: bytes they may have.
        max_memory: bytes that the weights may need in memory.
        min_speedup: decoding speed wanted, against the base's on this machine.
        max_perplexity_increase: most that perplexity may rise, as a share.
        keeps: shares of the decoder's parameters that are tried.
        heal_steps: optimizer steps of distillation behind pruning; 0 leaves it out.
        vocabulary: also try to keep only the tokens that the training text uses.
        run: run the chosen recipe too, into ``result/``; beside the results of other choices, into ``result-2/`` and so on.

    Raises:
        ConfigError: no limit at all, or one that makes no sense.
        RunError: nothing that was tried keeps the limits; says what comes nearest.
    """
    from llmlite.context import Run
    from llmlite.models.size import expected_bytes

    limited = _limits(target, max_bytes, max_memory, min_speedup)
    problems = [f"{name}={value:g} should be a number above 0." for name, value in limited.items() if not 0 < value < math.inf]
    if max_perplexity_increase is not None and not 0 <= max_perplexity_increase < math.inf:
        problems.append(f"max_perplexity_increase={max_perplexity_increase:g} should be a number of at least 0; 0.2 lets perplexity rise by a fifth.")
    if not limited:
        problems.append("say how small: --target 0.5 (of the 16-bit size), --max_bytes 60MB, --max_memory 1GB or --min_speedup 1.5.")
    problems += [f"keeps: {keep:g} should be above 0 and below 1; it is the share of the decoder that stays." for keep in keeps if not 0 < keep < 1]
    if problems:
        raise ConfigError("llmlite shrink", problems)
    import torch

    context = Run(recipe)
    context.check_data()
    full = expected_bytes(context.config, dtype=torch.bfloat16)
    folder = recipe.folder
    wanted = min((value for value in (target and target * full, max_bytes) if value), default=None)
    limits = Limits(wanted, max_memory, min_speedup, max_perplexity_increase)
    narrow = ["bfloat16"] if context.compute_dtype == torch.float32 else []
    groups = [
        [NOTHING, *prune_options(keeps, heal_steps)],
        [NOTHING, *([VOCABULARY] if vocabulary else [])],
        [NOTHING, *store_options(narrow if narrow and min_speedup is None else ["auto", *narrow])],
    ]
    sizes = _sizes(groups, context)
    _require_reachable(limits, sizes, full, vocabulary)
    with telling(folder):
        (folder / "measured").mkdir(parents=True, exist_ok=True)
    with locked(folder):
        found_in = folder / "measured"
        evidence = evidence_of(context)
        known = [measured(recipe, [option for option in group if _fits(option.name, sizes)], found_in, evidence) for group in groups]
        mixed = _mixed(known[-1], context, found_in, evidence)
        candidates = combinations(known, sizes) + combinations([*known[:-1], mixed], _sizes([*known[:-1], mixed], context))
        chosen = best(candidates, limits)
        if chosen is None:
            raise RunError(_nothing_fits(candidates, limits))
        found = Shrunk(folder, full, chosen, frontier(candidates), limits)
        asked = _asked(recipe, chosen, folder, evidence)
        write_text(folder / "shrink.yaml", _yaml(asked, found))
    if run and chosen.steps:
        found.report = asked.run()
    return found


def _limits(target: float | None, max_bytes: float | None, max_memory: float | None, min_speedup: float | None) -> dict[str, float]:
    named = {"target": target, "max_bytes": max_bytes, "max_memory": max_memory, "min_speedup": min_speedup}
    return {name: value for name, value in named.items() if value is not None}


def _sizes(groups: Sequence[Sequence[Option]], context: Run) -> dict[tuple[str, ...], tuple[int, int]]:
    """Sizes of all combinations that the formats can hold."""
    plans: dict[tuple[str, ...], ModelPlan] = {(): plan_of_base(context)}
    for group in groups:
        plans = dict(_extended(plans, group, context))
    return {names: sizes_of(plan, context) for names, plan in plans.items()}


def _extended(plans: dict[tuple[str, ...], ModelPlan], group: Sequence[Option], context: Run) -> Iterator[tuple[tuple[str, ...], ModelPlan]]:
    for before, plan in plans.items():
        for option in group:
            if option.names_layers and any(name not in {NOTHING.name, VOCABULARY.name} for name in before):
                continue  # pruning may have taken the layers away
            try:
                yield (*before, option.name), plan_after(plan, option.steps, context)
            except ConfigError as error:
                log.info("left out: %s: %s", " + ".join(filter(None, (*before, option.name))), error.problems[0])


def _mixed(stores: Sequence[Option], context: Run, folder: Path, evidence: str) -> list[Option]:
    """Formats of 4 and 16 bit side by side, where 4 bits were measured with what is not quantized in 16 bit. One of them is measured, the others computed."""
    import torch

    nf4 = next((option for option in stores if option.steps and option.name.startswith("nf4") and len(option.steps) == 1), None)
    wide = context.compute_dtype == torch.float32 and nf4 is not None and "dtype" not in nf4.steps[0]
    if nf4 is None or wide:
        return []
    from llmlite.models.size import linear_shapes

    weights = {name: outputs * inputs for name, (outputs, inputs) in linear_shapes(context.config).items()}
    found = mixed_options(nf4, layer_costs(context, folder, evidence), weights)
    if not found:
        return []
    middle = min(found, key=lambda mixed: abs(mixed.weights_left - (1 - _MEASURED_SHARE)))
    known = measured(context.recipe, [middle.option], folder, evidence)[0]
    trust = middle.trust_by(nf4, known)
    log.info("the layers' costs foretell %.0f %% of what their place in 16 bit gives", 100 * trust)
    return [known if mixed is middle else mixed.expected(nf4, trust) for mixed in found]


def _fits(name: str, sizes: dict[tuple[str, ...], tuple[int, int]]) -> bool:
    return any(name in names for names in sizes)


def _require_reachable(limits: Limits, sizes: dict[tuple[str, ...], tuple[int, int]], full: int, vocabulary: bool) -> None:
    smallest, lightest = min(size for size, _ in sizes.values()), min(weight for _, weight in sizes.values())
    problems = []
    if limits.bytes_on_disk is not None and smallest > limits.bytes_on_disk:
        problems.append(
            f"nothing that is tried gets below {human_bytes(smallest)} ({smallest / full:.2f} of the 16-bit size); "
            f"{human_bytes(limits.bytes_on_disk)} was asked for. Add smaller --keeps (0.5,0.4)"
            + ("." if vocabulary else ", or --vocabulary, which keeps only the tokens that your text uses.")
        )
    if limits.weight_bytes is not None and lightest > limits.weight_bytes:
        problems.append(f"nothing that is tried needs less than {human_bytes(lightest)} for its weights; {human_bytes(limits.weight_bytes)} was asked for.")
    if problems:
        raise ConfigError("llmlite shrink", problems)


def _nothing_fits(candidates: Sequence[Candidate], limits: Limits) -> str:
    nearest = min(candidates, key=lambda candidate: (len(limits.broken_by(candidate)), candidate.kl))
    return (
        f"shrink: nothing that was tried keeps all limits. Nearest: {nearest.name}, {human_bytes(nearest.bytes_on_disk)}, expected perplexity "
        f"{nearest.perplexity_ratio:.2f}x, decoding {nearest.decode_speedup:.2f}x; it breaks the limit on {' and '.join(limits.broken_by(nearest))}. "
        "Heal longer (--heal_steps), try other --keeps, or loosen a limit. What was measured is kept."
    )


def _yaml(asked: Recipe, found: Shrunk) -> str:
    """The chosen recipe, runnable by `llmlite run`, with where it goes and what is expected of it."""
    chosen = found.chosen
    mapping = {key: value for key, value in asked.to_mapping(defaults=False).items() if key != "steps"}
    head = [
        f"# llmlite run {shlex.quote(str(found.folder / 'shrink.yaml'))}",
        "#",
        f"# {chosen.name}: {human_bytes(chosen.bytes_on_disk)}, {chosen.bytes_on_disk / found.full_bytes:.2f} of the 16-bit size",
        f"# expected: KL {chosen.kl:.4f} nats a token, perplexity {chosen.perplexity_ratio:.3f}x the base's, decoding {chosen.decode_speedup:.2f}x",
    ]
    return "\n".join(head) + "\n\n" + to_yaml({**mapping, "steps": [dict(step) for step in chosen.steps]})


def _asked(recipe: Recipe, chosen: Candidate, folder: Path, evidence: str) -> Recipe:
    """The choice, to be run into ``result/``, or ``result-2/`` and so on where the results of other choices lie, or of other weights and texts."""
    expected = Expected(kl=chosen.kl, perplexity_ratio=chosen.perplexity_ratio, bytes_on_disk=chosen.bytes_on_disk)
    note = folder / "measured" / "results.json"
    made_of: dict[str, Any] = read_object(note) if note.is_file() else {}
    for number in itertools.count(1):
        name = "result" if number == 1 else f"result-{number}"
        asked = recipe_of(recipe, chosen.steps, folder / name)
        place = asked.folder / "recipe.yaml"
        if not place.is_file() or (made_of.get(name) == evidence and read_yaml(place) == asked.identity()):
            break
    write_json(note, made_of | {name: evidence})
    return dataclasses.replace(asked, expected=expected)
