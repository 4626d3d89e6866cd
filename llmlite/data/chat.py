"""Where the answers are: a row becomes one string and the character spans of it that are trained.

The chat template of the tokenizer writes the string. Everything the assistant says is trained, up to and with the token that ends its turn;
what the user or the system says, and the template's headers, are not. Working on characters, and going over to tokens once by the
tokenizer's offsets, means one tokenisation per row, exactly the one that is used later.

Templates with `{% generation %}` markers say themselves where the assistant speaks. For the others, each turn begins where the
conversation before it, rendered with the generation prompt, ends; that this really is a prefix of the whole is checked, since templates
such as Qwen3's rewrite earlier turns. Where it is not, the answer's own text is looked up after the part that did agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmlite.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "common_prefix", "render"]

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: what is tokenised.
        spans: (start, end) in characters of the trained parts, in order.
        templated: a chat template wrote it, special tokens included, so the tokenizer adds none.
        wants_end: nothing in the text says that the answer is over; an end-of-sequence token is appended and trained.
    """

    text: str
    spans: tuple[Span, ...]
    templated: bool
    wants_end: bool


def render(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, separator: str = "\n\n") -> Rendered:
    """Write a row of any kind as text with trained spans.

    Args:
        row: as in `llmlite.data.text.Rows.rows`.
        tokenizer: with a chat template, prompt/completion rows become a user's and an assistant's message; without one, the two are
            joined by `separator` (nothing, if the prompt ends in white space already).
        where: names the row in errors.

    Raises:
        DataError: messages without a chat template; a template that refuses the row (no system role, roles that must alternate); a
            template in whose text the assistant's turns cannot be found.
    """
    if "text" in row:
        return Rendered(row["text"], ((0, len(row["text"])),), templated=False, wants_end=True)
    if _has_template(tokenizer):
        return _render_chat(_messages(row), tokenizer, where)
    prompt = _plain_prompt(row, where, separator)
    return Rendered(prompt + row["completion"], ((len(prompt), len(prompt) + len(row["completion"])),), templated=False, wants_end=True)


def _has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "messages" in row:
        return list(row["messages"])
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _plain_prompt(row: Mapping[str, Any], where: str, separator: str) -> str:
    if "messages" in row:
        raise DataError(
            f"{where} is a chat, but the tokenizer has no chat template to write it with. Take the instruction-tuned sibling of this model, "
            "set `tokenizer.chat_template`, or give prompt/completion rows, which need no template."
        )
    prompt: str = f"{row['system']}\n\n{row['prompt']}" if row.get("system") else row["prompt"]
    return prompt if prompt[-1:].isspace() or row["completion"][:1].isspace() else prompt + separator


def _render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    ends = _end_pattern(tokenizer)
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        text, spans = _marked_spans(messages, tokenizer, where)
        spans = [(start, _with_end_token(text, end, ends)) for start, end in spans]
    else:
        text = _apply(tokenizer, messages, where)
        spans = _prefix_spans(messages, text, tokenizer, ends, where)
    spans = [(start, end) for start, end in spans if end > start]
    closed = bool(spans) and any(match.end() == spans[-1][1] for match in ends.finditer(text, spans[-1][0]))
    return Rendered(text, tuple(spans), templated=True, wants_end=messages[-1]["role"] == "assistant" and not closed)


def _marked_spans(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[Span]]:
    """The template's own `{% generation %}` blocks.

    Not through `return_assistant_tokens_mask`: that maps characters to tokens by `char_to_token`, which is None where offsets leave out
    a leading blank, and then gives up on the whole row.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, indices = render_jinja_template(
            conversations=[messages], chat_template=tokenizer.get_chat_template(), return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    except Exception as error:
        raise _refused(where, error) from error
    return texts[0], [(start, end) for start, end in indices[0]]


def _prefix_spans(messages: list[dict[str, Any]], text: str, tokenizer: PreTrainedTokenizerBase, ends: re.Pattern[str], where: str) -> list[Span]:
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _turn_start(messages, index, text, tokenizer, spans[-1][1] if spans else 0, where)
        upto = _apply(tokenizer, messages[: index + 1], where) if index + 1 < len(messages) else text
        stable = text.startswith(upto) and len(upto) >= start
        limit = len(upto) if stable else len(text)
        said = _find_content(message, text, start, limit)
        if said is not None and not message.get("tool_calls"):
            end = ends.search(text, said[1], limit)
            # No end token in this turn: train what was said. A later turn's tokens are not this one's.
            spans.append((start, end.end() if end and (stable or not text[said[1] : end.start()].strip()) else said[1]))
        elif stable:
            last = max((match.end() for match in ends.finditer(text, start, limit)), default=start + len(text[start:limit].rstrip()))
            spans.append((start, last))
        else:
            raise _unstable(where, index)
    return spans


def _turn_start(messages: list[dict[str, Any]], index: int, text: str, tokenizer: PreTrainedTokenizerBase, floor: int, where: str) -> int:
    if index == 0:
        # Nothing was said before: many templates cannot render an empty conversation.
        found = _find_content(messages[0], text, 0, len(text))
        if found is None:
            raise _unstable(where, index)
        return found[0]
    before = _apply(tokenizer, messages[:index], where, generation_prompt=True)
    if text.startswith(before):
        return len(before)
    # The generation prompt is not what the template writes for a turn that is there (DeepSeek-R1 opens <think>).
    agreed = common_prefix(_apply(tokenizer, messages[:index], where), text)
    found = _find_content(messages[index], text, max(floor, agreed), len(text))
    if found is None:
        raise _unstable(where, index)
    return found[0]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters, bytes or ids two sequences begin with in common."""
    return next((position for position, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), min(len(one), len(other)))


def _find_content(message: Mapping[str, Any], text: str, start: int, limit: int) -> Span | None:
    """Where the message's content stands; templates strip it, and cut reasoning out of earlier turns."""
    content = message["content"]
    for candidate in (content.strip(), content.rpartition("</think>")[2].strip()):
        position = text.find(candidate, start, limit) if candidate else -1
        if position >= 0:
            return position, position + len(candidate)
    return None


def _with_end_token(text: str, end: int, ends: re.Pattern[str]) -> int:
    """The end of a span, moved behind an end-of-turn token that follows at once."""
    match = ends.match(text, end)
    return match.end() if match else end


def _end_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Any added token but BOS and those of blanks alone; after an answer, the first of them ends the turn."""
    added: Iterable[str] = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    bos = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
    names = sorted((token for token in added if token.strip() and token != bos), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, generation_prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt))
    except Exception as error:  # jinja2's errors, or whatever the template's raise_exception makes of it
        raise _refused(where, error) from error


def _refused(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: the tokenizer's chat template refuses this conversation: {type(error).__name__}: {error}. "
        "Some templates know no system role, or want user and assistant to take turns."
    )


def _unstable(where: str, index: int) -> DataError:
    return DataError(
        f"{where}, message {index + 1}: the chat template writes earlier turns differently once later ones follow (it is not prefix-stable), and "
        "the answer's text does not appear in its output, so the tokens to train cannot be told from the others. Put {% generation %} ... "
        "{% endgeneration %} around the assistant's text in the template, or give single-turn rows."
    )
