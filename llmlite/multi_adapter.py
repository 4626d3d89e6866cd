"""Several adapters on one base as one folder, side by side: each was trained by a run of its own, stock peft loads them all and switches by name.

    model = PeftModel.from_pretrained(base, OUT, adapter_name="sql", subfolder="sql")
    model.load_adapter(OUT, adapter_name="chat", subfolder="chat")
    model.set_adapter("chat")

Numbers of an adapter mean something on the weights it was trained against only, so the bases are compared by the sums of their files, and every adapter is
switched to in a fresh process and must give the logits that it gives alone.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlite.errors import ConfigError, OutputError, counted
from llmlite.hub.multi_adapter import ADAPTERS, NAME, Adapters
from llmlite.kept import base_of_result, load_result
from llmlite.models.adapted import MARKS
from llmlite.paths import require_path
from llmlite.storage import MANIFEST, file_sums, read_object, writing_folder

__all__ = ["Exported", "export"]

log = logging.getLogger(__name__)

_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder.
        names: of the adapters in it.
        loading: the lines that load all of them and switch to the last.
        difference: largest difference of a logit between an adapter alone and the same one switched to, in a fresh process.
    """

    path: Path
    names: tuple[str, ...]
    loading: str
    difference: float


def export(folders: Sequence[Path | str], output_dir: Path | str, names: Sequence[str] = ()) -> Exported:
    """Put the adapters of finished runs side by side into one folder, and switch to each of them in a fresh process.

    Args:
        folders: of runs whose result is an adapter; all on the same base, of the same kind.
        output_dir: new, empty, or an earlier export, which is replaced.
        names: one for each folder. None given: the folders' own names.

    Raises:
        ConfigError: adapters that cannot lie side by side; every reason.
        OutputError: a folder without an adapter, or an output folder that holds something else.
        RunError: a fresh process gets other logits from them.
    """
    from llmlite.evaluation.reload import require_reload
    from llmlite.hub.lines import dtype_of, loading_lines

    out = require_path(output_dir, "llmlite export", "output_dir")
    places = [require_path(folder, "llmlite export", "DIR") for folder in folders]
    _require_free(out)
    named = _named(places, names)
    base, context, vocabulary = _require_one_base(named)
    with writing_folder(out) as temporary:
        for name, folder in named.items():
            (temporary / name).mkdir()
            for file in _WEIGHTS:
                shutil.copy2(folder / file, temporary / name / file)
        first = next(iter(named.values()))
        for file in _TOKENIZER:
            if (first / file).is_file():
                shutil.copy2(first / file, temporary / file)
        differences = []
        for name in named:  # each is the last one of its lines, and so the active one
            order = [*(other for other in named if other != name), name]
            model, _ = load_result(named[name])
            dtype = dtype_of(model, context.compute_dtype)
            lines = loading_lines(temporary, base, dtype, vocabulary, order)
            log.info("switching to '%s' in a fresh process", name)
            differences.append(require_reload(model, lines))
            del model
        Adapters.of(named).write(temporary, out.absolute().name)
    return Exported(out, tuple(named), loading_lines(out, base, dtype, vocabulary, list(named)), max(differences))


def _require_free(out: Path) -> None:
    """Raise OutputError unless the folder is new, empty, or an earlier export and nothing else: it will be replaced as a whole."""
    own = read_object(out / MANIFEST) if (out / MANIFEST).is_file() and (out / ADAPTERS).is_file() else {}
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()] if out.is_dir() else []
    names = sorted({*files} - {*own} - ({MANIFEST} if own else set()))
    if out.is_file() or names:
        raise OutputError(f"export: {out} holds something else ({', '.join(names[:5]) or 'a file'}). Choose another --output_dir; nothing in it was touched.")


def _named(folders: list[Path], names: Sequence[str]) -> dict[str, Path]:
    problems = []
    if names and len(names) != len(folders):
        problems.append(f"--names gives {counted(len(names), 'name')} for {counted(len(folders), 'folder')}.")
        names = ()
    chosen = list(names) or [folder.absolute().name for folder in folders]
    problems += [f"'{name}' is the name of two adapters. Say others: --names a,b" for name in dict.fromkeys(chosen) if chosen.count(name) > 1]
    problems += [f"'{name}' is no name for an adapter: letters, digits, _ and - only. Say others: --names a,b" for name in chosen if not NAME.fullmatch(name)]
    problems += [f"'{name}' cannot be the name of an adapter: {reason}. Say others: --names a,b" for name in chosen if (reason := _taken(name))]
    if len(folders) < 2:
        problems.append("one adapter is whole as it is; give two or more folders.")
    if problems:
        raise ConfigError("llmlite export", problems)
    for folder in folders:
        if not all((folder / file).is_file() for file in (*_WEIGHTS, "recipe.yaml", "report.json")):
            raise OutputError(f"export: {folder} holds no finished run whose result is an adapter (wanted: {', '.join(_WEIGHTS)}, report.json).")
    return dict(zip(chosen, folders, strict=True))


def _taken(name: str) -> str:
    """Why stock peft cannot load an adapter of this name, as a phrase; empty when it can."""
    from torch import nn

    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        return "torch's dictionaries, in which peft keeps adapters, have something of that name"
    if marks := [mark for mark in MARKS if name in mark]:
        return f"peft takes it for a part of '{marks[0]}' in the names of weights, and would not read them"
    return ""


def _require_one_base(named: Mapping[str, Path]) -> tuple[Path, Any, int | None]:
    """The folder of the base of all adapters, the first run, and the rows that added tokens need of the base.

    Raises:
        ConfigError: they differ in base, kind or tokenizer.
    """
    found = {name: base_of_result(folder) for name, folder in named.items()}
    first = next(iter(named))
    base, context = found[first]
    problems = []
    for name in list(named)[1:]:
        other, run = found[name]
        if other.resolve() != base.resolve() and file_sums(other) != file_sums(base):
            problems.append(f"'{name}' was trained on another base than '{first}' ({run.recipe.model.name}, other weights), so one cannot serve both.")
        kinds = [read_object(named[one] / _WEIGHTS[0]).get("peft_type") for one in (first, name)]
        if kinds[0] != kinds[1]:
            problems.append(f"'{name}' is {kinds[1]} and '{first}' {kinds[0]}: peft puts only one kind of adapter on a model. Export them apart.")
        if run.recipe.model.add_tokens != context.recipe.model.add_tokens:
            problems.append(f"'{name}' and '{first}' have other added tokens, so they need other tokenizers and embeddings.")
    if problems:
        raise ConfigError("llmlite export", problems)
    return base, context, context.grown_vocabulary if base == context.source.folder else None
