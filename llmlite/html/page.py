"""The report of one run as a self-contained HTML file, for somebody who was not there: what was asked, what came out, what it cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmlite.config import to_yaml
from llmlite.errors import counted
from llmlite.evaluation.result import Evaluation
from llmlite.gate import COLLAPSE
from llmlite.html import plots
from llmlite.report import Report, Row, held_up, human_bytes, human_figure
from llmlite.step import step_class
from llmlite.storage import write_text

__all__ = ["PAGE", "render", "run_page", "write_page"]

PAGE = "report.html"


def write_page(report: Report) -> Path:
    """Write the page of a finished run beside its report, with what `llmlite evaluate` has found there. Returns its place."""
    file = report.path / PAGE
    write_text(file, run_page(report, Evaluation.read(report.path)))
    return file


def run_page(report: Report, evaluation: Evaluation | None = None) -> str:
    """The whole page. Everything that comes from the run (names, samples, settings) is escaped.

    Args:
        report: with at least the base's row.
        evaluation: of the same result, where `llmlite evaluate` has measured it afterwards.
    """
    base, this = report.rows[0], report.rows[-1]
    samples = [{"name": row.name, "answer": row.details["sample"]["answer"]} for row in report.rows if row.details.get("sample")]
    sample: dict[str, str] = next((row.details["sample"] for row in report.rows if row.details.get("sample")), {})
    limits = COLLAPSE.crossed(base.perplexity, this.perplexity, this.kl, this.top1_agreement) if len(report.rows) > 1 else []
    reload = report.reload_difference
    return render(
        "run.html.jinja",
        title=f"{_model_name(report)}: {', then '.join(row.name for row in report.rows[1:]) or 'base'}",
        summary=_summary(report),
        warnings=[f"This model is far from its base: {text}." for text in limits],
        cards=_cards(base, this),
        steps=[_step(step) for step in report.recipe.get("steps") or []],
        conditions=_conditions(report),
        expectation=report.expectation(),
        energy=report.energy_sentences(),
        evaluation=_evaluated(evaluation) if evaluation is not None else None,
        worst=[{"name": row.name, "text": text} for row in report.rows if (text := row.worst_layers())],
        table=[["", *(row.name for row in report.rows)], *([name.strip(), *cells] for name, cells in report.lines().items())],
        groups=_groups(report) if plots.available() else [],
        samples=samples if any(row.details.get("sample") for row in report.rows[1:]) else [],
        question=sample.get("prompt", ""),
        expected=sample.get("expected", ""),
        loading=report.loading,
        reload="" if reload is None else f"A fresh process loaded it with these lines; the largest difference of a logit was {reload:.1e}.",
        recipe=to_yaml(report.recipe),
        environment=", ".join(f"{name} {value}" for name, value in report.environment.items() if value not in (None, "")),
    )


def render(template: str, **values: Any) -> str:
    """Fill one of the package's templates, with everything escaped."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("llmlite.html", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text: str = environment.get_template(template).render(**values)
    return text


def _model_name(report: Report) -> str:
    named = report.base.get("hub_id") or (report.recipe.get("model") or {}).get("name") or "model"
    return str(named).rstrip("/").rpartition("/")[2]


def _summary(report: Report) -> str:
    base, this = report.rows[0], report.rows[-1]
    size = (
        f"The weights went from {human_bytes(base.bytes_on_disk)} to {human_bytes(this.bytes_on_disk)} ({this.bytes_on_disk / max(base.bytes_on_disk, 1):.2f}x)"
    )
    change = this.perplexity / base.perplexity - 1
    quality = f"perplexity on held-out text from {base.perplexity:.4g} to {this.perplexity:.4g} ({change:+.1%})"
    rest = f"; on {this.top1_agreement:.0%} of the tokens it would say what the base says" if this.top1_agreement is not None else ""
    return f"{size}, {quality}{rest}."


def _cards(base: Row, this: Row) -> list[dict[str, str]]:
    cards = [
        {"name": "on disk", "value": human_bytes(this.bytes_on_disk), "note": f"{this.bytes_on_disk / max(base.bytes_on_disk, 1):.2f}x the base"},
        {"name": "perplexity", "value": f"{this.perplexity:.4g}", "note": f"{this.perplexity / base.perplexity - 1:+.1%} against the base"},
    ]
    if this.kl is not None and this.top1_agreement is not None:
        cards.append({"name": "as the base", "value": f"{this.top1_agreement:.0%}", "note": f"top-1 tokens; KL {this.kl:.3g}"})
    for name, now, before, digits in (
        ("writing", this.decode_tokens_per_second, base.decode_tokens_per_second, 3),
        ("reading", this.prefill_tokens_per_second, base.prefill_tokens_per_second, 4),
    ):
        if now and before:
            speed = human_figure(now, digits)
            if held_up(max(base.processors_short, this.processors_short)):
                cards.append({"name": name, "value": speed, "note": "tokens a second, beside other programs: not to be compared"})
            else:
                cards.append({"name": name, "value": f"{now / before:.2f}x", "note": f"{speed} tokens a second"})
    return cards


def _step(step: Any) -> dict[str, str]:
    values = dict(step) if isinstance(step, Mapping) else {"step": step}
    name = str(values.pop("step"))
    try:
        cls = step_class(name)
        doc, usual = (cls.__doc__ or "").strip().splitlines()[0], {key: getattr(cls, key, None) for key in values}
    except ValueError:  # a step of somebody's own, read on another machine
        doc, usual = "", {}
    values = {key: value for key, value in values.items() if value != usual.get(key)}
    shown = ", ".join(f"{key} {value}" for key, value in values.items() if isinstance(value, str | int | float))
    return {"name": name, "doc": doc.rstrip("."), "settings": shown}


def _conditions(report: Report) -> str:
    about, text = report.environment, report.evaluation
    tokens, examples = counted(text.get("tokens", "?"), "held-out token"), counted(text.get("examples", "?"), "example")
    quality = f"Quality on {tokens} ({examples}) of {text.get('text', 'held-out text')}"
    conditions = f"{quality}; {_machine(about)}; {about.get('date', '')}; seed {report.recipe.get('seed', 0)}."
    return " ".join(filter(None, (conditions, report.speed_on())))


def _machine(about: dict[str, Any]) -> str:
    return f"{about.get('device', '?')} ({about.get('cpu', '?')}, {counted(about.get('cores', '?'), 'core')})"


def _evaluated(evaluation: Evaluation) -> dict[str, Any]:
    """What `llmlite evaluate` found: a table of base, steps and result, what it was measured on, and their answers to the same questions."""
    about = evaluation.about
    when = f"; {about['date']}" if about.get("date") else ""
    conditions = " ".join(filter(None, (about.get("quality_on", ""), evaluation.speed_on())))
    return {
        "title": evaluation.title(),
        # a narrow column may break a step's name behind its dot
        "table": [
            ["", *(name.replace(".", ".\u200b") for name in evaluation.headings())],
            *([name.strip(), *cells] for name, cells in evaluation.lines().items()),
        ],
        "conditions": f"{conditions} Speed and energy on {_machine(about)}{when}.{evaluation.grid()}",
        "answers": [{"question": asked["prompt"], "expected": asked.get("expected", ""), "given": given} for asked, given in evaluation.answers()],
    }


# Plots ---------------------------------------------------------------------------------------------------------------------------------


def _groups(report: Report) -> list[dict[str, Any]]:
    rows = report.rows
    names = [row.name for row in rows]

    def figures(title: str, values: list[float | None], digits: int | None) -> dict[str, str]:
        labels = ["" if value is None else human_bytes(value) if digits is None else human_figure(value, digits) for value in values]
        return {"title": title, "svg": plots.bars(title, names, values, labels)}

    groups: list[dict[str, Any]] = [
        {
            "title": "Step by step",
            "text": "",
            "plots": [
                figures("Bytes on disk", [row.bytes_on_disk for row in rows], None),
                figures("Perplexity on held-out text", [_finite(row.perplexity) for row in rows], 4),
                figures("KL to the base, nats a token", [row.kl for row in rows], 3),
                figures("Peak memory of the step", [row.peak_memory_bytes for row in rows], None),
                figures("Tokens a second, reading (prefill)", [row.prefill_tokens_per_second for row in rows], 4),
                figures("Tokens a second, writing (decode)", [row.decode_tokens_per_second for row in rows], 3),
            ],
        },
        {"title": "Training", "text": "Loss of the training text as it went.", "plots": [plot for row in rows for plot in _loss(row)]},
        {"title": "Layers", "text": "Which layers a step found easy or hard.", "plots": [plot for row in rows for plot in _layers(row)]},
        {"title": "What went", "text": "Darker where more went.", "plots": [plot for row in rows for plot in _removed(row)]},
    ]
    for group in groups:
        group["plots"] = [plot for plot in group["plots"] if plot["svg"]]
    return [group for group in groups if group["plots"]]


def _finite(value: float) -> float | None:
    return value if value < 1e30 else None


def _loss(row: Row) -> list[dict[str, str]]:
    history = row.details.get("train_loss") or []
    title = f"{row.name}: training loss"
    return [{"title": title, "svg": plots.lines(title, [e["step"] for e in history], {"loss": [e["loss"] for e in history]}, "optimizer step", "loss")}]


def _layers(row: Row) -> list[dict[str, str]]:
    found = []
    if influence := row.details.get("block_influence"):
        title = f"{row.name}: block influence; what went in the other colour"
        found.append({"title": title, "svg": plots.layer_errors(title, influence, "influence", row.details.get("removed_layers") or ())})
    if sparsity := row.details.get("layer_sparsity"):
        title = f"{row.name}: share of zeros"
        found.append({"title": title, "svg": plots.layer_errors(title, sparsity, "share")})
    if errors := row.details.get("layer_errors"):
        title = f"{row.name}: relative output error, mean of a layer's projections"
        found.append({"title": title, "svg": plots.layer_errors(title, _by_layer(errors), "error")})
    for kind, figures in row.details.items():
        if isinstance(figures, Mapping) and figures.get("relative_output_error"):
            title = f"{row.name}: relative output error after repair, {_unit(kind)}"
            found.append({"title": title, "svg": plots.layer_errors(title, figures["relative_output_error"], "error")})
    return found


def _removed(row: Row) -> list[dict[str, str]]:
    found = []
    if growth := row.details.get("length_growth"):
        title = f"{row.name}: tokens of a text, {row.details['tokens_kept']:,} of {row.details['tokens_before']:,} tokens kept"
        labels = ["1x", *(f"{times:.3f}x" for times in growth.values())]
        found.append({"title": title, "svg": plots.bars(title, ["base", *growth], [1, *growth.values()], labels)})
    for kind, figures in row.details.items():
        if isinstance(figures, Mapping) and figures.get("removed"):
            title = f"{row.name}: {_unit(kind)} that went"
            found.append({"title": title, "svg": plots.removed_map(title, figures["removed"], figures["units"], _unit(kind))})
    return found


def _by_layer(errors: Mapping[str, float]) -> list[float]:
    """Means over the projections of each layer; the layer is the first number in a projection's name."""
    groups: dict[int, list[float]] = {}
    for name, error in errors.items():
        if number := re.search(r"\.(\d+)\.", name):
            groups.setdefault(int(number[1]), []).append(error)
    return [sum(groups[index]) / len(groups[index]) for index in sorted(groups)]


def _unit(kind: str) -> str:
    return {"ffn": "FFN channels", "kv_groups": "key/value groups", "query_heads": "query heads"}.get(kind, kind.replace("_", " "))
