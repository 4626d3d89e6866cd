"""Several adapters side by side in one folder: what is known of them (``adapters.json``), and their model card.

FOLDER/NAME/adapter_config.json, adapter_model.safetensors      one for each, as peft itself writes several
FOLDER/adapters.json, README.md, tokenizer                      what they share
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlite.config import to_yaml
from llmlite.errors import LoadError, counted
from llmlite.hub.card import LAST_LINE, fenced, plain
from llmlite.hub.lines import adapter_loader, loading_snippet
from llmlite.hub.published import hub_dataset, published
from llmlite.report import Report
from llmlite.storage import read_object

__all__ = ["ADAPTERS", "NAME", "Adapters"]

ADAPTERS = "adapters.json"
NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What an adapter may be called."""
_ABOUT = frozenset({"kind", "numbers", "text", "perplexity_before", "perplexity", "recipe"})


@dataclass(frozen=True)
class Adapters:
    """What `adapters.json` says; nothing in it tells of this machine.

    Attributes:
        base: see `llmlite.hub.base.describe_base`.
        adapters: name -> recipe, kind, numbers, text, tokens, perplexity_before, perplexity, dataset.
        environment: versions and machine of the first run.
    """

    base: dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    environment: dict[str, Any]

    @classmethod
    def of(cls, folders: dict[str, Path]) -> Adapters:
        """Collected from the folders of finished runs."""
        adapters: dict[str, dict[str, Any]] = {}
        base: dict[str, Any] = {}
        environment: dict[str, Any] = {}
        for name, folder in folders.items():
            report = published(Report.read(folder))
            base, environment = base or report.base, environment or report.environment
            config = read_object(folder / "adapter_config.json")
            if len(report.rows) < 2:
                raise LoadError(f"{folder / 'report.json'} has no figures of an adapter, only of its base. Run the recipe again, or give another folder.")
            this, before = report.rows[-1], report.rows[-2]
            adapters[name] = {
                "kind": str(config["peft_type"]).lower(),
                "numbers": this.parameters - before.parameters,
                "perplexity_before": before.perplexity,
                "perplexity": this.perplexity,
                "text": report.evaluation.get("text"),
                "tokens": report.evaluation.get("tokens"),
                "dataset": hub_dataset(report),
                "recipe": report.recipe,
            }
        return cls(base, adapters, environment)

    @classmethod
    def read(cls, folder: Path) -> Adapters | None:
        """What `write` wrote; None where there is nothing.

        Raises:
            LoadError: the file is damaged, or somebody else's: its names become folders and stand in lines that are run.
        """
        if not (folder / ADAPTERS).is_file():
            return None
        values = read_object(folder / ADAPTERS)
        found = cls(*(values.get(field.name) for field in dataclasses.fields(cls)))  # type: ignore[arg-type]
        whole = all(isinstance(part, dict) for part in (found.base, found.adapters, found.environment)) and found.adapters
        if not whole or not all(NAME.fullmatch(name) and isinstance(about, dict) and about.keys() >= _ABOUT for name, about in found.adapters.items()):
            raise LoadError(f"{folder / ADAPTERS} is not what `llmlite export` writes. Export the adapters again.")
        return found

    def write(self, folder: Path, place: str) -> None:
        """Write ``adapters.json`` and the card of the place that the folder will be."""
        values = {"base": self.base, "adapters": self.adapters, "environment": self.environment}
        (folder / ADAPTERS).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(self.card(folder, place), encoding="utf-8")

    def loadable(self, folder: Path) -> dict[str, Any]:
        """`base` as `loading_snippet` takes it."""
        names = list(self.adapters)
        return {**self.base, "loader": adapter_loader(folder / names[0]), "adapters": names}

    def card(self, folder: Path, place: str, base_model: str | None = None) -> str:
        """The model card. See `llmlite.hub.card.model_card`; `place` is a repository, or a folder's name."""
        from huggingface_hub import ModelCardData

        title = place.rpartition("/")[2]
        base = base_model or self.base.get("hub_id")
        kinds = list(dict.fromkeys(about["kind"] for about in self.adapters.values()))
        datasets = sorted({about["dataset"] for about in self.adapters.values() if about.get("dataset")})
        data: dict[str, Any] = {
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            **{key: self.base.get(key) for key in ("license", "license_name", "license_link", "language")},
            "tags": ["llmlite", *kinds],
            "base_model": base,
            "base_model_relation": "adapter" if base else None,
            "datasets": datasets,
        }
        named = f"[{base}](https://huggingface.co/{base})" if base else f"`{self.base.get('name', 'a base model')}`, which was a local folder"
        parts = [
            f"---\n{ModelCardData(**{key: value for key, value in data.items() if value}).to_yaml()}\n---",
            f"# {title}",
            f"{counted(len(self.adapters), 'adapter')} for {named}. They are loaded side by side on one base and switched by name; none holds the "
            "base's weights.",
            "## The adapters",
            self._table(),
            "Perplexity on held-out text of each adapter's own data, before and after its training; figures of different texts do not compare.",
            "## Load them",
            f"```python\n{loading_snippet(place, self.loadable(folder), base_model)}\n```",
            "Before the export, each was switched to in a fresh process and gave the logits that it gives alone.",
            "## How they were made",
            *(part for name, about in self.adapters.items() for part in (f"`{name}`:", fenced(to_yaml(about["recipe"]), "yaml"))),
            LAST_LINE,
        ]
        return "\n\n".join(parts) + "\n"

    def _table(self) -> str:
        lines = ["| name | kind | numbers | held-out text | perplexity before | after |", "|---|---|---:|---|---:|---:|"]
        for name, about in self.adapters.items():
            figures = [f"{about['numbers']:,}", plain(str(about["text"])), f"{about['perplexity_before']:.4g}", f"{about['perplexity']:.4g}"]
            lines.append(f"| {' | '.join([plain(name), plain(str(about['kind'])), *figures])} |")
        return "\n".join(lines)
