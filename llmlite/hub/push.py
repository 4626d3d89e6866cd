"""Upload one folder in one commit, private unless said otherwise, and compare what arrived with what was sent.

`upload_folder` splits a folder into several commits where hf_xet is installed, so the commit is made directly; files that the repository
has already are not sent again, and running the same command again continues.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import shorten
from llmlite.errors import HubError, OutputError, PushFailed, counted
from llmlite.evaluation.result import EVALUATION, Evaluation
from llmlite.html.images import card_images
from llmlite.html.page import PAGE, run_page
from llmlite.hub.base import base_of
from llmlite.hub.card import is_ours, model_card
from llmlite.hub.client import ATTEMPTS, api, call
from llmlite.hub.multi_adapter import ADAPTERS, Adapters
from llmlite.hub.preflight import Destination, preflight
from llmlite.hub.public import leak, places_of, public_text, result_files, secrets_of_this_machine
from llmlite.hub.published import private_places, public_evaluation, public_recipe, public_report, published
from llmlite.paths import require_path
from llmlite.report import Report, human_bytes
from llmlite.storage import read_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Pushed", "continue_command", "push", "what_is_sent"]

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        repo_id: owner/name.
        url: of the commit, or of the pull request.
        commit: its hash.
        files: names of the files in the repository that were compared and are the folder's.
        bytes: of these files.
        private: whether only its owners see the repository.
        difference: largest difference of a logit between the folder and the repository, when asked to verify.
    """

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    bytes: int
    private: bool
    difference: float | None = None


def push(
    folder: Path | str | Report,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    replace: bool = False,
    verify: bool = False,
    accept_license: bool = False,
) -> Pushed:
    """Upload a result.

    Args:
        folder: of a finished run, or its report, or any folder with a stock model or adapter.
        repo_id: owner/name, or a name in the token's own namespace.
        private: the visibility that is wanted. An existing repository of the other kind is refused.
        revision: branch to commit to; made when it is not there.
        create_pr: open a pull request instead of committing.
        base_model: Hub id of the base, where the run only knew a folder.
        replace: delete weights in the repository that this result does not have, in the same commit; without it they are refused.
        verify: afterwards load folder and repository in a fresh process and compare their logits.
        accept_license: publish what was made of a gated or non-commercial base.

    Raises:
        OutputError: the folder holds no finished result.
        HubError: the Hub was asked and refuses; nothing was sent.
        PushFailed: the upload began and did not end well. Both end with the command to continue.
    """
    place = require_path(folder.path if isinstance(folder, Report) else folder, "push", "DIR")
    flags = {"public": not private, "create_pr": create_pr, "replace": replace, "verify": verify, "accept_license": accept_license}
    command = continue_command(place, shorten(repo_id, 200), revision, base_model, **flags)
    report = _finished(place)
    several = Adapters.read(place) if report is None else None
    base = report.base if report is not None else several.base if several is not None else {}
    _require_known_base(base, place, base_model, command)
    known = base_model or base.get("hub_id")
    try:
        destination = preflight(repo_id, private, revision, create_pr, known, accept_license)
    except HubError as error:
        raise HubError(f"{error}\nNothing was sent, and {place} is whole. To try again:\n  {command}", error.status) from None
    if report is not None and destination.base_license:
        report.base.setdefault("license", destination.base_license)
    files = what_is_sent(place, report, destination.repo_id, base_model)
    try:
        pushed = _upload(destination, files, replace, report)
        if verify:
            from llmlite.hub.verify import verified_difference

            difference = verified_difference(place, pushed.repo_id, pushed.commit, base, base_model)
            pushed = dataclasses.replace(pushed, difference=difference)
    except (HubError, PushFailed) as error:
        raise PushFailed(f"{error}\n{place} is whole; what has arrived is not sent again. To continue:\n  {command}") from None
    return pushed


def continue_command(folder: Path, repo_id: str, revision: str | None = None, base_model: str | None = None, **flags: bool) -> str:
    """The command line that pushes the same folder to the same place."""
    words = ["llmlite", "push", str(folder), repo_id]
    words += ["--revision", revision] if revision else []
    words += ["--base_model", base_model] if base_model else []
    return shlex.join([*words, *(f"--{name}" for name, given in flags.items() if given)])


def _finished(folder: Path) -> Report | None:
    """The report of a finished run; None for a stock folder of another origin.

    Raises:
        OutputError: there is nothing to upload.
        LoadError: its report is not whole.
    """
    if not folder.is_dir():
        raise OutputError(f"push: there is no folder '{folder}'.")
    names = {path.name for path in folder.iterdir()}
    if "report.json" in names:
        return Report.read(folder)
    if {"steps", "recipe.yaml"} <= names:
        raise OutputError(f"push: the run in {folder} is not finished. Run its recipe again; it continues where it stopped.")
    if ADAPTERS in names:
        return None
    if not names & {"config.json", "adapter_config.json"} or not any(name.endswith(".safetensors") for name in names):
        raise OutputError(f"push: {folder} holds no model and no adapter in safetensors. It holds: {', '.join(sorted(names)[:8]) or 'nothing'}.")
    return None


def _require_known_base(base: Mapping[str, Any], folder: Path, base_model: str | None, command: str) -> None:
    """An adapter whose base nobody else has cannot be used by anybody else."""
    if base_model or not base.get("made_by"):
        return
    steps = ", ".join(base["made_by"])
    raise OutputError(
        f"push: the adapter in {folder} sits on a model that this run made itself ({steps}), which is not on the Hub, so nobody could load it. Push the "
        f"folder of the step before it (under {folder / 'steps'}) to a repository of its own, then name it here:\n  {command} --base_model OWNER/NAME"
    )


# What is sent -------------------------------------------------------------------------------------------------------------------------


def what_is_sent(folder: Path, report: Report | None, repo_id: str, base_model: str | None = None) -> dict[str, bytes | Path]:
    """Every file of the upload by its name in the repository: weights as they are, and what tells of this machine rewritten.

    Raises:
        OutputError: a file still holds a secret, or names a folder of this machine, or an evaluation is not whole.
    """
    ours, others = result_files(folder)
    if others:
        log.info("not part of the result, so not uploaded: %s", ", ".join(str(path.relative_to(folder)) for path in others[:12]))
    secrets = secrets_of_this_machine()
    places = private_places(report) if report is not None else places_of(folder)
    files: dict[str, bytes | Path] = {}
    for path in ours:
        name = path.relative_to(folder).as_posix()
        files[name] = _without_places(path, base_of(report, base_model), secrets, places) if name.endswith("config.json") else path
    is_adapter, several = "adapter_config.json" in files, Adapters.read(folder) if report is None else None
    if report is not None:
        files["recipe.yaml"] = public_recipe(report).encode()
        values = public_report(report, repo_id, is_adapter, base_model)
        files["report.json"] = _json(values)
        evaluation = Evaluation.read(folder)
        shown = Evaluation(folder, **public_evaluation(report, evaluation.to_json())) if evaluation is not None else None
        if EVALUATION in files and shown is None:
            raise OutputError(f"push: {folder / EVALUATION} is not what `llmlite evaluate` writes. Run `llmlite evaluate {folder}`, or take the file away.")
        if shown is not None:
            files[EVALUATION] = _json(shown.to_json())
        files[PAGE] = run_page(Report.of(folder, values), shown).encode()
    card = folder / "README.md"
    if not card.is_file() or is_ours(card.read_text(encoding="utf-8")):
        text = several.card(folder, repo_id, base_model) if several is not None else model_card(report, folder, repo_id, base_model)
        files["README.md"] = text.encode()
        files |= card_images(published(report)) if report is not None else {}
    for name, content in files.items():
        found = leak(name, content, secrets, places)
        if found:
            raise OutputError(f"push: {folder / name} gives away {found}. Nothing was sent. Take it out of the file, then push again.")
    return dict(sorted(files.items()))


_PLACE_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def _without_places(path: Path, base_model: str | None, secrets: tuple[str, ...], places: tuple[str, ...]) -> bytes | Path:
    """A config in which no model is named by a folder; the file itself where nothing is to be changed."""
    values = read_object(path)
    changed = dict(values)
    for key in _PLACE_KEYS:
        if isinstance(values.get(key), str) and values[key]:
            changed[key] = public_text(values[key], secrets, places)
    if base_model and isinstance(values.get("base_model_name_or_path"), str):
        changed["base_model_name_or_path"] = base_model
    return path if changed == values else _json(changed)


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


# Sending ------------------------------------------------------------------------------------------------------------------------------


def _upload(destination: Destination, files: dict[str, bytes | Path], replace: bool, report: Report | None) -> Pushed:
    hub, repo_id = api(), destination.repo_id
    if not destination.exists:
        call(lambda: hub.create_repo(repo_id, private=destination.private, exist_ok=True), "creating the repository", repo_id)
    info = call(lambda: hub.model_info(repo_id), "looking at the repository", repo_id)
    if bool(info.private) != destination.private:  # somebody else made it in the meantime, or the organisation decides
        raise PushFailed(f"{repo_id} is {'private' if info.private else 'public'} although the other was asked for. No file was sent.")
    if destination.revision and destination.revision != "main":
        call(lambda: hub.create_branch(repo_id, branch=str(destination.revision), exist_ok=True), "making the branch", repo_id)
    stale = _stale_weights(hub, destination, files)
    if stale and not replace:
        raise PushFailed(
            f"{repo_id} holds weights that this result does not have ({', '.join(stale[:4])}); both would lie there together. No file was sent. "
            "Choose another name or --revision, or let them be deleted in the same commit: --replace"
        )
    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    log.info("uploading %s, %s, to %s (%s)", counted(len(files), "file"), human_bytes(size), repo_id, "private" if destination.private else "public")
    attempts = 1 if destination.create_pr else ATTEMPTS  # a second try after a lost answer would open a second pull request
    commit = call(lambda: _commit(hub, destination, files, stale, report), f"committing {counted(len(files), 'file')}", repo_id, attempts)
    _require_same(hub, repo_id, commit.oid, files)
    url = commit.pr_url if destination.create_pr and commit.pr_url else commit.commit_url
    return Pushed(repo_id, str(url), commit.oid, tuple(files), size, destination.private)


def _commit(hub: HfApi, destination: Destination, files: dict[str, bytes | Path], stale: list[str], report: Report | None) -> Any:
    """One commit. Made anew at every try, so that a commit that succeeded without an answer is seen as done."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    steps = [str(row.name) for row in report.rows[1:]] if report is not None else []
    return hub.create_commit(
        destination.repo_id,
        operations,
        commit_message=f"Upload {', '.join(steps)} by llmlite" if steps else "Upload by llmlite",
        revision=destination.revision,
        create_pr=destination.create_pr,
    )


def _stale_weights(hub: HfApi, destination: Destination, files: dict[str, bytes | Path]) -> list[str]:
    """Weights in the repository's top folder that are not in the upload: from_pretrained might load them instead."""
    if not destination.exists:
        return []
    there = _remote(hub, destination.repo_id, destination.revision)
    return sorted(name for name in there if name.endswith(_WEIGHTS) and "/" not in name and name not in files)


def _remote(hub: HfApi, repo_id: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub.hf_api import RepoFile

    entries = call(lambda: list(hub.list_repo_tree(repo_id, recursive=True, revision=revision)), "listing the files", repo_id)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _require_same(hub: HfApi, repo_id: str, commit: str, files: dict[str, bytes | Path]) -> None:
    """Compare names, sizes and hashes.

    Raises:
        PushFailed: a file is missing in the repository, or is another one.
    """
    there = _remote(hub, repo_id, commit)
    wrong = []
    for name, content in files.items():
        if name not in there:
            wrong.append(f"{name} is missing")
            continue
        data = content if isinstance(content, bytes) else None
        size = len(data) if data is not None else Path(str(content)).stat().st_size
        lfs = there[name].lfs
        if there[name].size != size or (lfs.sha256 if lfs else there[name].blob_id) != _hash(content, size, bool(lfs)):
            wrong.append(f"{name} differs")
    if wrong:
        raise PushFailed(f"{repo_id}: what arrived is not what was sent: {', '.join(wrong[:6])}.")


def _hash(content: bytes | Path, size: int, large: bool) -> str:
    """SHA-256 of a large file; git's name of a small one: SHA-1 of ``blob SIZE\\0`` and the content."""
    digest = hashlib.sha256() if large else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest()
    with content.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
