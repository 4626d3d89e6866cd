"""How a question becomes the body of a request, for each mode, and what a server turns out to return.

    text              the teacher answers; its words are trained on
    top_logprobs      the same, with the log-probabilities of its likeliest tokens at each place
    prompt_logprobs   the teacher scores the answers that the data holds (vLLM's parameter of that name); one token is generated and thrown away

A server that does not know a parameter may refuse the request, or ignore the parameter and say nothing. So a short question is asked first, and what comes
back is looked at rather than what was promised.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llmlite.distillation.api.client import Client, Endpoint, Fatal, Rejected, Unanswered
from llmlite.distillation.api.logprobs import Position, generated_positions, prompt_positions
from llmlite.distillation.api.prompts import Question
from llmlite.errors import ApiError

__all__ = ["Asking", "Mode", "positions_of", "probed"]

Mode = Literal["text", "top_logprobs", "prompt_logprobs"]
_PROBE = Question([{"role": "user", "content": "Say hello."}], {"prompt": "Say hello."}, "Hello there, friend.", "the probe")
_TEXT_PROBE = Question("Hello there,", {"text": "Hello there,"}, " my dear friend.", "the probe")
_FEWER = (20, 10, 5, 1)


@dataclass(frozen=True)
class Asking:
    """The parameters of every request of a step.

    Attributes:
        model: the name under which the server knows the teacher.
        mode: see above.
        top: log-probabilities asked for at each place.
        answer_tokens: longest answer.
        temperature: of the teacher's sampling; None leaves it to the server.
        limit: what the server calls the longest answer.
    """

    model: str
    mode: Mode
    top: int
    answer_tokens: int
    temperature: float | None
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    @property
    def written_tokens(self) -> int:
        """Tokens the teacher writes at most for one question."""
        return 1 if self.mode == "prompt_logprobs" else self.answer_tokens

    def body(self, question: Question) -> dict[str, Any]:
        """The request's body."""
        body: dict[str, Any] = {"model": self.model}
        limit = self.limit if question.endpoint == "chat" else "max_tokens"
        if self.mode == "prompt_logprobs":
            body |= self._scored(question) | {limit: 1, "prompt_logprobs": self.top}
            return body
        body |= {"prompt": question.asked} if isinstance(question.asked, str) else {"messages": question.asked}
        body[limit] = self.answer_tokens if question.room is None else min(question.room, self.answer_tokens)
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.mode == "top_logprobs":
            body |= {"logprobs": True, "top_logprobs": self.top} if question.endpoint == "chat" else {"logprobs": self.top}
        return body

    def _scored(self, question: Question) -> dict[str, Any]:
        """The question with the answer that is to be scored, left open so that the teacher's template ends it nowhere."""
        if isinstance(question.asked, str):
            return {"prompt": question.asked + question.expected}
        answered = [*question.asked, {"role": "assistant", "content": question.expected}]
        return {"messages": answered, "add_generation_prompt": False, "continue_final_message": True}


def positions_of(mode: Mode, body: dict[str, Any]) -> list[Position] | None:
    """The log-probabilities of an answer, as the mode has them; None when there are none."""
    return prompt_positions(body) if mode == "prompt_logprobs" else generated_positions(body["choices"][0])


def probed(client: Client, asking: Asking, endpoint: Endpoint, downgrade: bool) -> tuple[Asking, str | None]:
    """Ask a short question and adapt to what comes back.

    Args:
        client: of the server.
        asking: as configured.
        endpoint: which of the two will be used.
        downgrade: accept fewer log-probabilities, or text alone.

    Returns:
        The parameters that work, and what had to be given up, as a phrase.

    Raises:
        ApiError: the server does not return what the mode needs, and `downgrade` is off; or it does not answer.
    """
    question = _PROBE if endpoint == "chat" else _TEXT_PROBE
    asking, body, refusal = _answered(client, asking, question)
    if body is not None:
        found = 0 if asking.mode == "text" else min((len(position.candidates) for position in positions_of(asking.mode, body) or ()), default=0)
        if asking.mode == "text" or found >= asking.top:
            return asking, None
        less = f"it returns {found} at a place" if found else "it answers, but silently leaves the log-probabilities out"
    else:
        less, found = f"it refuses the request: {refusal}", _most(client, asking, question) if asking.top > 1 else 0
        less += f" (it does return {found})" if found else ""
    what = f"mode={asking.mode} asks {client.url} for {asking.top} log-probabilities at each place, and {less}."
    if not downgrade:
        fix = f"Set top_logprobs: {found}" if found else "Use mode: text"
        if asking.mode == "prompt_logprobs" and not found:
            fix = "Use mode: top_logprobs or text; prompt_logprobs is vLLM's"
        raise ApiError(f"distill.blackbox: {what} {fix}, let missing_logprobs: downgrade choose, or take another server.")
    asking = dataclasses.replace(asking, top=found) if found else dataclasses.replace(asking, mode="text")
    if not found:
        asking, body, refusal = _answered(client, asking, question)
        if body is None:
            raise ApiError(f"distill.blackbox: {client.url} refuses the request: {refusal}.")
    return asking, what + (f" Going on with {found}." if found else " Going on with text alone.")


def _answered(client: Client, asking: Asking, question: Question) -> tuple[Asking, dict[str, Any] | None, str]:
    """A probe's answer, with the name for the longest answer that the server wants; None and the server's words when it refuses."""
    try:
        return asking, client.ask(question.endpoint, _short(asking).body(question), max_retries=1).body, ""
    except Rejected as error:
        if "max_completion_tokens" in str(error) and asking.limit == "max_tokens":
            return _answered(client, dataclasses.replace(asking, limit="max_completion_tokens"), question)
        if asking.mode == "text":
            hint = ". Leave temperature to the server: temperature: null" if "temperature" in str(error) else ""
            raise Fatal(f"distill.blackbox: {client.url} refuses the request: {error}{hint}") from None
        return asking, None, str(error)
    except Unanswered as error:
        raise ApiError(f"distill.blackbox: {client.url} gives no usable answer to a short question: {error}.") from None


def _short(asking: Asking) -> Asking:
    return dataclasses.replace(asking, answer_tokens=min(asking.answer_tokens, 8))


def _most(client: Client, asking: Asking, question: Question) -> int:
    """How many log-probabilities the server returns, when it refuses as many as were asked."""
    for fewer in (count for count in _FEWER if count < asking.top):
        _, body, _ = _answered(client, dataclasses.replace(asking, top=fewer), question)
        found = min((len(position.candidates) for position in positions_of(asking.mode, body) or ()), default=0) if body else 0
        if found:
            return min(found, fewer)
    return 0
