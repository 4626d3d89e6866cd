"""The report and the recipe as anybody may read them: the same figures, without places, secrets and quotations of private data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmlite.config import to_yaml
from llmlite.hub.lines import loading_snippet
from llmlite.hub.public import places_of, public_json, secrets_of_this_machine
from llmlite.report import Report, Row

__all__ = ["hub_dataset", "private_places", "public_evaluation", "public_recipe", "public_report", "published"]

# settings of the run that say where, not what
_NOT_PUBLISHED = frozenset(
    {"dry_run", "overwrite_output_dir", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_accept_license"}
)


def published(report: Report) -> Report:
    """The report as anybody may read it: no secrets, folders cut to their last part, a local model or file named without its place."""
    secrets, places = secrets_of_this_machine(), private_places(report)
    values = public_json({key: value for key, value in report.to_json().items() if key != "loading"}, secrets, places)
    recipe = {key: value for key, value in values["recipe"].items() if key not in _NOT_PUBLISHED}
    base = values["base"]
    if isinstance(recipe.get("model"), dict) and base.get("name"):
        recipe["model"]["name"] = base.get("hub_id") or base["name"]
    for key, value in (report.recipe.get("data") or {}).items():
        if isinstance(value, str) and "/" in value and Path(value).expanduser().exists():
            recipe["data"][key] = Path(value).name  # a relative folder looks like a data set of the Hub
    rows = [Row(**row) for row in values.pop("rows")]
    return Report(report.path, **(values | {"recipe": recipe, "rows": rows}))


def public_recipe(report: Report) -> str:
    """The recipe as YAML, as it lies on the Hub and stands in the card."""
    return to_yaml(published(report).recipe)


def public_report(report: Report, place: str, is_adapter: bool, base_model: str | None = None) -> dict[str, Any]:
    """The values of `published`, with the lines that load the result from `place` and without quotations of private data."""
    values = published(report).to_json()
    if not _is_public_data(report):
        for row in values["rows"]:
            row["details"].pop("sample", None)  # rows of somebody's own file: nobody asked to publish them
    values["loading"] = loading_snippet(place, report.base if is_adapter else None, base_model)
    return values


def public_evaluation(report: Report, values: dict[str, Any]) -> dict[str, Any]:
    """What ``evaluation.json`` of a run says, without secrets and folders; answers to private data's questions are left out."""
    public: dict[str, Any] = public_json(values, secrets_of_this_machine(), private_places(report))
    if not _is_public_data(report):
        for model in public.get("models", {}).values():
            model["answers"] = []
    return public


def private_places(report: Report) -> tuple[str, ...]:
    """Folders that a run knows: its own, the model's, the data's."""
    model, data = report.recipe.get("model") or {}, report.recipe.get("data") or {}
    named = [model.get("name"), *(data.get(key) for key in ("train", "evaluation", "calibration"))]
    return places_of(report.path, report.recipe.get("output_dir"), *(name for name in named if name and str(name).startswith(("/", "~", "."))))


def hub_dataset(report: Report | None) -> str | None:
    """The data set on the Hub that the run read, or None for files and the built-in text."""
    name = str((report.recipe.get("data") or {}).get("train") or "") if report is not None else ""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not Path(name).suffix and not Path(name).exists()
    return name if is_id else None


def _is_public_data(report: Report) -> bool:
    data = report.recipe.get("data") or {}
    return data.get("evaluation") is None and (str(data.get("train", "")).startswith("builtin:") or hub_dataset(report) is not None)
