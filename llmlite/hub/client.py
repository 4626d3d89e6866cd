"""One call to the Hub: bounded retries where a retry can help, and one sentence for each refusal that says what to do.

`huggingface_hub` retries uploads of large files by itself, but neither the creation of a repository nor a commit, and it tells everybody
with a full disk quota to check the token.
"""

from __future__ import annotations

import email.utils
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from llmlite.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["ATTEMPTS", "api", "call", "explain", "wait_seconds"]

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 300.0
_RETRIED = frozenset({429, 500, 502, 503, 504})


def api() -> HfApi:
    """The client, with the endpoint and the token that the environment or `hf auth login` give."""
    from huggingface_hub import HfApi

    return HfApi(library_name="llmlite")


def call(function: Callable[[], T], doing: str, repo_id: str = "", attempts: int = ATTEMPTS) -> T:
    """Call the Hub; try again after 429, 5xx and broken connections, a few times, waiting as long as the Hub asks.

    Args:
        function: the call. It may be made several times, so it must not keep state from a failed one.
        doing: what is being done, for the message: ``committing 5 files``.
        repo_id: the repository, for the message.
        attempts: how often it is tried. 1 for what must not be done twice when only the answer was lost.

    Raises:
        HubError: the last refusal, as one message; its `status` is the HTTP status, None when there was no answer.
    """
    for attempt in range(1, attempts + 1):
        try:
            return function()
        except Exception as error:
            answer = _answer(error)
            status = None if answer is None else int(answer.status_code)
            if answer is None and not _is_broken_connection(error):
                raise
            wait = wait_seconds(dict(answer.headers) if answer is not None else {}, attempt)
            retried = status is None or status in _RETRIED
            if not retried or _is_offline(error) or attempt == attempts or wait > LONGEST_WAIT_SECONDS:
                tries = f" (tried {attempt} times)" if attempt > 1 else ""
                raise HubError(f"{doing}{f' ({repo_id})' if repo_id else ''}: {explain(error)}{tries}", status) from None
            log.warning("%s: the Hub answered %s; trying again in %.0f s (%d of %d)", doing, status or type(error).__name__, wait, attempt, attempts - 1)
            time.sleep(wait)
    raise AssertionError("unreachable")


def wait_seconds(headers: dict[str, str], attempt: int) -> float:
    """How long to wait before the next try: what ``Retry-After`` says (seconds or a date), else 1, 2, 4, 8 seconds."""
    told = next((value for name, value in headers.items() if name.lower() == "retry-after"), None)
    if told is not None:
        if told.strip().isdigit():
            return float(told)
        try:
            when = email.utils.parsedate_to_datetime(told)
        except ValueError:
            return float(2 ** (attempt - 1))
        return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())  # "-0000" gives a time without a zone
    return float(2 ** (attempt - 1))


def explain(error: BaseException) -> str:
    """What the Hub's refusal means and what to do about it, in a sentence or two."""
    answer = _answer(error)
    if _is_offline(error):
        return "offline mode is on (HF_HUB_OFFLINE=1). Unset it to upload."
    if answer is None:
        return f"the Hub cannot be reached ({type(_cause(error)).__name__}). Check the network and HF_ENDPOINT."
    status = int(answer.status_code)
    said = _said(error)
    quoted = f' The Hub says: "{said}".' if said else ""
    match status:
        case 400:
            return f"the Hub did not accept what was sent (400).{quoted}"
        case 401:
            return f"the token is not valid (401): it may have expired or been revoked.{quoted} Log in with `hf auth login`, or set HF_TOKEN."
        case 402 | 413 | 507:
            return f"no room ({status}): the storage of this account or organisation is full.{quoted} Free some, or choose another namespace."
        case 403 if any(word in said.lower() for word in ("quota", "storage", "space", "exceeded")):
            return f"no room (403): the storage of this account or organisation is full.{quoted} Free some, or choose another namespace; the token is fine."
        case 403:
            return f"the token may not do this (403).{quoted} It needs the role write, or fine-grained write access to this repository."
        case 404:
            return f"not there, or hidden from this token (404).{quoted} Check the spelling of repository and revision."
        case 409 | 412:
            return f"somebody else changed the repository at the same time ({status}).{quoted} Look at it, then push again."
        case 429:
            return f"too many requests (429).{quoted} Wait some minutes."
    if status >= 500:
        return f"the Hub has a problem of its own ({status}).{quoted} Try again later; https://status.huggingface.co tells how it is."
    return f"the Hub refused ({status}).{quoted}"


def _cause(error: BaseException) -> BaseException:
    """The reason below: a failed upload of a large file is a RuntimeError around it."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _answer(error: BaseException) -> Any:
    from huggingface_hub.errors import HfHubHTTPError

    cause = _cause(error)
    return cause.response if isinstance(cause, HfHubHTTPError) else None


def _said(error: BaseException) -> str:
    answer = _answer(error)
    text = str(answer.headers.get("x-error-message") or getattr(_cause(error), "server_message", None) or "")
    return " ".join(text.split())[:300]


def _is_offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(_cause(error), OfflineModeIsEnabled)


def _is_broken_connection(error: BaseException) -> bool:
    cause = _cause(error)
    return isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith("httpx")
