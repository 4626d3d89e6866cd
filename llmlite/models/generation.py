"""The `generation_config.json` of a model folder: looked over before weights load, since transformers would use it unseen in the first answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pydantic
from typing_extensions import TypedDict

from llmlite.config import shorten
from llmlite.errors import LoadError, first_line
from llmlite.storage import read_object

__all__ = ["require_generation_config"]

_Id = Annotated[int, pydantic.Field(ge=-1, lt=2**31)]  # -1: some write so that there is none
_Token = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_List = Annotated[list[_Token], pydantic.Field(min_length=1)]
_Ids = _Token | _List | None
_Number = Annotated[float, pydantic.Field(allow_inf_nan=False)] | None


def _with_point(value: object) -> object:
    if isinstance(value, int):
        raise ValueError("transformers wants it written with a point, such as 1.0")
    return value


_Tokens = _Token | None


@pydantic.with_config(extra="allow", strict=True)
class _Generation(TypedDict, total=False):
    bos_token_id: _Id | None
    eos_token_id: _Id | _List | None
    pad_token_id: _Id | None
    decoder_start_token_id: _Ids
    forced_bos_token_id: _Token | None
    forced_eos_token_id: _Ids
    suppress_tokens: list[_Token] | None
    begin_suppress_tokens: list[_Token] | None
    bad_words_ids: Annotated[list[_List], pydantic.Field(min_length=1)] | None
    max_length: _Tokens
    max_new_tokens: _Tokens
    min_length: _Tokens
    min_new_tokens: _Tokens
    max_time: _Number
    do_sample: bool | None
    num_beams: Annotated[int, pydantic.Field(ge=1, le=1024)] | None
    temperature: _Number
    top_k: _Id | None
    top_p: _Number
    min_p: _Number
    typical_p: _Number
    repetition_penalty: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False), pydantic.BeforeValidator(_with_point)] | None
    length_penalty: _Number
    no_repeat_ngram_size: _Tokens
    use_cache: bool | None
    stop_strings: str | Annotated[list[str], pydantic.Field(min_length=1)] | None


_SHAPE = pydantic.TypeAdapter(_Generation)


def require_generation_config(folder: Path) -> None:
    """Refuse a `generation_config.json` that is none; a folder without one is fine.

    Raises:
        LoadError: it is damaged, or a value in it cannot be used.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return
    values = read_object(file)
    try:
        _SHAPE.validate_python(values)
        GenerationConfig.from_pretrained(folder)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        wanted = str(first["msg"]).removeprefix("Input ")
        raise LoadError(f"model: {file}: {first['loc'][0]}={shorten(repr(values[str(first['loc'][0])]))}: {wanted}. Mend the value, or take it out.") from None
    except Exception as error:  # whatever a wrong value does in the checks of transformers
        reason = shorten(first_line(error), 200)
        raise LoadError(f"model: {file} cannot be used for generation ({type(error).__name__}: {reason}). Mend it, or take it away.") from None
