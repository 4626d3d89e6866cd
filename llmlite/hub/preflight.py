"""May this be uploaded there? Asked before any compute: the token, its role, the namespace, the repository and who can see it.

An existing public repository is never filled when a private one was asked for: `create_repo(private=True, exist_ok=True)` leaves it public
without a word.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmlite.config import shorten
from llmlite.errors import HubError
from llmlite.hub.client import api, call

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Destination", "preflight"]


@dataclass(frozen=True)
class Destination:
    """Where an upload goes, after the Hub was asked.

    Attributes:
        repo_id: owner/name.
        private: whether it is, or will be, private.
        exists: whether the repository is there already.
        revision: branch to commit to; None for the default one.
        create_pr: open a pull request instead of committing.
        base_license: the licence that the base's repository declares, where it can be seen.
    """

    repo_id: str
    private: bool
    exists: bool
    revision: str | None = None
    create_pr: bool = False
    base_license: str | None = None


def preflight(
    repo_id: str,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    accept_license: bool = False,
) -> Destination:
    """Ask the Hub everything that would make the upload fail, in two or three requests. Nothing is created or sent.

    Args:
        repo_id: owner/name, or a name in the token's own namespace.
        private: the visibility that is wanted.
        revision: branch to commit to.
        create_pr: open a pull request, for which no right to write is needed.
        base_model: Hub id of the base, whose terms hold for what is made of it.
        accept_license: the user has read the terms of a gated or non-commercial base and may publish.

    Raises:
        HubError: no token, no right, another visibility, terms to be read first, no such place; or no answer.
    """
    _require_name(repo_id)
    if create_pr and revision is not None:
        raise HubError(f"{repo_id}: create_pr and revision={revision!r} exclude each other: pull requests are opened against the default branch.")
    hub = api()
    me = _whoami(hub)
    namespace, _, name = repo_id.rpartition("/")
    namespace = namespace or str(me.get("name"))
    repo_id = f"{namespace}/{name}"
    if not create_pr:
        _require_namespace(me, namespace, repo_id)
    _require_role(me, namespace, repo_id, create_pr)
    found = call(lambda: _model_info(hub, repo_id), "looking for the repository", repo_id)
    if found is None:
        if create_pr:
            raise HubError(f"{repo_id}: create_pr needs a repository that exists, and there is none that this token can see.")
        return Destination(repo_id, private, False, revision, False, _terms(hub, base_model, private, accept_license))
    is_private = bool(found.private)
    if private and not is_private:
        raise HubError(
            f"{repo_id} exists and is public; a private one was asked for. Nothing was sent. Choose another name, make it private on its settings page, "
            "or say that public is meant: --public (hub_private_repo: false in a recipe)."
        )
    if not private and is_private:
        raise HubError(
            f"{repo_id} exists and is private; a public one was asked for. Nothing was sent. Leave --public out (hub_private_repo: true), "
            "or make it public on its settings page."
        )
    return Destination(repo_id, is_private, True, revision, create_pr, _terms(hub, base_model, is_private, accept_license))


def _require_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{shorten(repr(repo_id))} is no name for a repository: {shorten(str(error), 200)} Wanted: owner/name, for instance me/llama-lite."
        ) from None
    if os.path.isabs(repo_id):
        raise HubError(f"'{repo_id}' is a folder. Wanted: owner/name, for instance me/llama-lite.")


def _whoami(hub: HfApi) -> dict[str, Any]:
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        return call(hub.whoami, "asking the Hub who the token belongs to")
    except LocalTokenNotFoundError:
        raise HubError("no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN to a token with the role write.") from None


def _model_info(hub: HfApi, repo_id: str) -> Any:
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError

    try:
        return hub.model_info(repo_id)
    except GatedRepoError:
        raise HubError(f"{repo_id} exists and is gated for this token. Choose another name.") from None
    except DisabledRepoError:
        raise HubError(f"{repo_id} exists and was disabled on the Hub. Choose another name.") from None
    except RepositoryNotFoundError:
        return None


def _terms(hub: HfApi, base_model: str | None, private: bool, accepted: bool) -> str | None:
    """The base's licence; before anything is published, stop at terms that a person should have read.

    Raises:
        HubError: the base is gated or its licence non-commercial, the upload would be public, and nobody said that this is all right.
    """
    if base_model is None:
        return None
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    def ask() -> Any:
        try:
            return hub.model_info(base_model)
        except GatedRepoError:
            return "gated"
        except (RepositoryNotFoundError, HfHubHTTPError) as error:
            if isinstance(error, RepositoryNotFoundError) or error.response.status_code < 429:
                return None  # gone, or not ours to see: nothing is known of its terms
            raise

    base = call(ask, "looking at the base's terms", base_model)
    card = getattr(base, "card_data", None)
    licence = card.get("license") if card is not None else None
    licence = licence if isinstance(licence, str) else None
    gated = base == "gated" or bool(getattr(base, "gated", False))
    restricted = licence is not None and ("-nc" in licence or "noncommercial" in licence.replace("-", ""))
    if (gated or restricted) and not private and not accepted:
        why = " and ".join(filter(None, ("gated" if gated else "", f"under {licence}" if restricted else "")))
        raise HubError(
            f"the base {base_model} is {why}: what is made of it may be published only under its terms. Nothing was sent. Read them on its page; then say so "
            "with --accept_license (hub_accept_license: true), or push privately."
        )
    return licence


def _require_namespace(me: dict[str, Any], namespace: str, repo_id: str) -> None:
    organisations = {str(org.get("name")): org for org in me.get("orgs") or []}
    if namespace == me.get("name"):
        return
    if namespace not in organisations:
        own = ", ".join([str(me.get("name")), *organisations])
        raise HubError(f"{repo_id}: this token belongs to {me.get('name')}, who cannot write to '{namespace}'. Namespaces it can write to: {own}.")
    if organisations[namespace].get("roleInOrg") == "read":
        raise HubError(f"{repo_id}: {me.get('name')} may only read in the organisation '{namespace}'. Ask for the role contributor or write.")


def _require_role(me: dict[str, Any], namespace: str, repo_id: str, create_pr: bool) -> None:
    token = (me.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        raise HubError("the token for the Hub can only read. Make one with the role write at https://huggingface.co/settings/tokens, then `hf auth login`.")
    if role != "fineGrained":
        return
    wanted = "discussion.write" if create_pr else "repo.write"
    granted = token.get("fineGrained") or {}
    scopes = granted.get("scoped") or []
    covers = [scope for scope in scopes if (scope.get("entity") or {}).get("name") in {namespace, repo_id}]
    allowed = {permission for scope in covers for permission in scope.get("permissions") or []} | set(granted.get("global") or [])
    if not allowed & {wanted, "repo.write"}:
        raise HubError(f"{repo_id}: the token is fine-grained and has no '{wanted}' for '{namespace}'. Add it at https://huggingface.co/settings/tokens.")
