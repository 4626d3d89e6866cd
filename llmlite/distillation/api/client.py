"""One request to an OpenAI-compatible server and its answer, through the `openai` library: it retries (408, 409, 429, 5xx, lost connections) with backoff
and honours Retry-After up to two minutes. What it does not retry, an answer that is no JSON or holds no choice, is asked again here.

The key is read from the environment, handed to the client, and struck out of everything that comes back, should a server echo it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from llmlite.errors import ApiError

if TYPE_CHECKING:
    import openai

__all__ = ["OPENAI_URL", "Client", "Endpoint", "Fatal", "Raw", "Rejected", "Unanswered", "endpoint_problems", "environment_url", "is_loopback", "key_of"]

log = logging.getLogger(__name__)

Endpoint = Literal["chat", "completions"]
OPENAI_URL = "https://api.openai.com/v1"
_NO_KEY = "none"  # what servers without keys are given; the client insists on something
_STRUCK = "[key]"
_OURS = ("prompt_logprobs", "add_generation_prompt", "continue_final_message", "return_tokens_as_token_ids")
"""Parameters of vLLM's that the openai client does not know by name."""


class Rejected(Exception):
    """The server will not answer this request (400, 413, 422, a content filter); another one may do."""


class Unanswered(Exception):
    """No usable answer after all retries; asking later may help."""


class Fatal(ApiError):
    """No request can succeed: wrong key, no such model, no money left."""


@dataclass(frozen=True)
class Raw:
    """An answer as the server gave it.

    Attributes:
        body: the decoded JSON, without the key.
        retries: attempts before it.
    """

    body: dict[str, Any]
    retries: int


def environment_url() -> str | None:
    """``$OPENAI_BASE_URL``, where it is set."""
    return os.environ.get("OPENAI_BASE_URL") or None


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine."""
    host = (urlsplit(url).hostname or "").lower()
    return host in {"localhost", "::1"} or host.startswith("127.")


def endpoint_problems(url: str, key_variable: str) -> list[str]:
    """What is wrong with where requests go and where their key comes from, one sentence each. No value of a key is ever quoted."""
    problems = []
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        written = url if "@" not in url else "it"
        problems.append(f"base_url: {written} is no address of a server. Wanted for instance http://127.0.0.1:8000/v1 or {OPENAI_URL}.")
    if parts.username or parts.password or parts.query:
        problems.append(
            "base_url holds a user name, a password or a query, which would be written into recipe.yaml. Keys come from the environment: api_key_env."
        )
    shown = f"'{key_variable}'" if key_variable.isidentifier() and key_variable.isupper() else "(not shown, since it looks like a key rather than a name)"
    key = key_of(key_variable) if key_variable.isidentifier() else None
    if key is None and shown.startswith("("):
        problems.append(
            f"api_key_env {shown} should be the name of an environment variable that holds the key, such as OPENAI_API_KEY, and no environment variable is "
            "called so."
        )
    elif key is None and (key_variable != "OPENAI_API_KEY" or parts.hostname == urlsplit(OPENAI_URL).hostname):
        problems.append(f"api_key_env: the environment variable {shown} is not set. Set it to your key: export {key_variable}=...")
    elif key is not None and not all("!" <= letter <= "~" for letter in key):
        problems.append(
            f"api_key_env: the value of the environment variable {shown} (not shown) holds a blank, a line break or a letter outside of ASCII, which no key "
            "has and no request can carry. Copy the key once more."
        )
    return problems


def key_of(key_variable: str) -> str | None:
    """The key, from the environment, without the line break that a file behind it may have ended with; None where there is none."""
    return os.environ.get(key_variable, "").strip() or None


class Client:
    """A connection to one server.

    Args:
        url: with its /v1.
        key: None for servers that want none.
        timeout: seconds that one attempt may take.
        max_retries: attempts after the first.

    Raises:
        ApiError: the `openai` library is not installed.
    """

    def __init__(self, url: str, key: str | None, timeout: float, max_retries: int) -> None:
        try:
            import openai
        except ImportError:
            raise ApiError("distill.blackbox needs the openai library: pip install 'llmlite[api]'") from None
        self.url, self._key, self.max_retries = url, key, max_retries
        self._library = openai
        waits = openai.Timeout(timeout, connect=min(timeout, 10.0))
        self._client = openai.OpenAI(
            base_url=url,
            api_key=key or _NO_KEY,
            timeout=waits,
            max_retries=max_retries,
            http_client=openai.DefaultHttpxClient(trust_env=not is_loopback(url)),  # no proxy between us and this machine
        )

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def clean(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, _STRUCK) if self._key else text

    def _cleaned(self, value: Any) -> Any:
        """Decoded JSON without the key; before it was decoded the key may have been written otherwise, as `\\/` for `/`."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, list):
            return [self._cleaned(item) for item in value]
        return {self.clean(name): self._cleaned(item) for name, item in value.items()} if isinstance(value, dict) else value

    def models(self, timeout: float = 5.0) -> list[str] | None:
        """Names of the models the server says it has; None when it has no such list.

        Raises:
            ApiError: it cannot be reached, or refuses the key.
        """
        openai = self._library
        try:
            page = self._client.with_options(timeout=timeout, max_retries=0).models.with_raw_response.list()
            listed = json.loads(page.http_response.text).get("data")
            return [str(item["id"]) for item in listed if isinstance(item, dict) and "id" in item] if isinstance(listed, list) else None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refused_key(error) from None
        except openai.APIConnectionError as error:
            raise ApiError(f"{self.url} cannot be reached: {self._reason(error)}. Is the server running, and is base_url right (with its /v1)?") from None
        except openai.APIStatusError as error:
            if error.status_code >= 500:
                raise ApiError(f"{self.url} answers {error.status_code}: {self._said(error)}. Try again when it is well.") from None
            return None  # not every server lists its models
        except (ValueError, AttributeError):
            return None

    def ask(self, endpoint: Endpoint, body: Mapping[str, Any], max_retries: int | None = None) -> Raw:
        """Send one request.

        Args:
            endpoint: which of the two.
            body: its parameters.
            max_retries: other than the client's own.

        Raises:
            Rejected: this request will not be answered.
            Unanswered: not now.
            Fatal: no request will be.
        """
        retries = 0
        allowed = self.max_retries if max_retries is None else max_retries
        while True:
            raw, taken = self._attempt(endpoint, body, allowed - retries)
            retries += taken
            problem = _unusable(raw)
            if problem is None:
                return Raw(cast("dict[str, Any]", raw), retries)
            if retries >= allowed:
                raise Unanswered(problem)
            time.sleep(min(8.0, 0.5 * 2**retries) * random.uniform(0.75, 1.0))
            retries += 1

    def _attempt(self, endpoint: Endpoint, body: Mapping[str, Any], max_retries: int) -> tuple[Any, int]:
        """The decoded body (None for what is no JSON) and how often the library asked again."""
        openai = self._library
        client = self._client.with_options(max_retries=max(0, max_retries))
        create: Any = client.chat.completions.with_raw_response.create if endpoint == "chat" else client.completions.with_raw_response.create
        known = {name: value for name, value in body.items() if name not in _OURS}
        extra = {name: value for name, value in body.items() if name in _OURS}
        try:
            response = create(**known, extra_body=extra or None)
            text = str(response.http_response.text)
            taken = int(response.retries_taken)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refused_key(error) from None
        except openai.NotFoundError as error:
            raise Fatal(f"{self.url} answers 404: {self._said(error)}. Is the model's name right, and is base_url (with its /v1)?") from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise Rejected(self._said(error)) from None
        except openai.APIStatusError as error:
            if error.status_code == 402 or (error.status_code == 429 and "insufficient_quota" in str(getattr(error, "code", "")) + str(error)):
                raise Fatal(f"{self.url} answers {error.status_code}: the account's quota is used up ({self._said(error)}).") from None
            if error.status_code == 413:
                raise Rejected(self._said(error)) from None
            raise Unanswered(f"{error.status_code}: {self._said(error)}") from None
        except openai.APIConnectionError as error:
            raise Unanswered(self._reason(error)) from None
        try:
            return self._cleaned(json.loads(text)), taken
        except ValueError:
            return None, taken

    def _refused_key(self, error: openai.APIStatusError) -> Fatal:
        had = "the key was refused" if self._key else "a key is wanted and none was given (api_key_env)"
        return Fatal(f"{self.url} answers {error.status_code}: {had} ({self._said(error)}).")

    def _said(self, error: openai.APIStatusError) -> str:
        body = error.body
        said = body.get("message") or body.get("detail") if isinstance(body, Mapping) else body
        return self.clean(" ".join(str(said or error.message).split()))[:240]

    def _reason(self, error: Exception) -> str:
        cause = error.__cause__ or error
        return self.clean(f"{type(cause).__name__}: {' '.join(str(cause).split())}")[:200]

    def close(self) -> None:
        """End the connections."""
        self._client.close()


def _unusable(body: Any) -> str | None:
    """What keeps a decoded body from being an answer, as a phrase."""
    if not isinstance(body, dict):
        return "the answer is no JSON object"
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "the answer holds no choices"
    return None
