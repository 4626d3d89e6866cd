"""What a `report.json` may hold where something reads it: types and bounds, so that one that was cut, edited or made otherwise is refused at once.

Keys that are not named here may hold anything; nothing looks at them. Figures may be NaN or infinite: those of a collapsed model are.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

import pydantic
from typing_extensions import TypedDict

__all__ = ["BaseShape", "Count", "Details", "EnvironmentShape", "EvaluationShape", "ExpectedShape", "Number", "Perplexity", "RecipeShape"]

_OPEN = pydantic.ConfigDict(extra="allow", strict=True)


def _above_zero(value: float) -> float:
    if value <= 0:  # not so for NaN
        raise ValueError("be above 0")
    return value


Number = Annotated[float, pydantic.Field(strict=True)]
Count = Annotated[int, pydantic.Field(strict=True, ge=0, le=2**63)]
Perplexity = Annotated[float, pydantic.Field(strict=True), pydantic.AfterValidator(_above_zero)]
"""Changes are shares of it."""


@functools.cache
def _adapter(shape: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(shape)


def _require(shape: Any, values: Any) -> None:
    """Raise ValueError, with the first thing that is wrong, unless plain values are of a shape."""
    try:
        _adapter(shape).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"be as llmlite writes it: {f'{place}: ' if place else ''}{first['msg']}") from None


def _shaped(shape: Any) -> pydantic.AfterValidator:
    def checked(values: dict[str, Any]) -> dict[str, Any]:
        _require(shape, values)
        return values

    return pydantic.AfterValidator(checked)


# The figures of a step ------------------------------------------------------------------------------------------------------------------


@pydantic.with_config(_OPEN)
class _Sample(TypedDict):
    prompt: str
    expected: str
    answer: str


@pydantic.with_config(_OPEN)
class _Loss(TypedDict):
    step: Number
    loss: Number


@pydantic.with_config(_OPEN)
class _Energy(TypedDict):
    kind: str
    source: str
    joules: Number | None


@pydantic.with_config(_OPEN)
class _Details(TypedDict, total=False):
    text: str | None
    tokens: Count
    sample: _Sample | None
    not_measured: str
    train_loss: list[_Loss] | None
    optimizer_steps: Count
    trained_tokens: Count
    energy: _Energy | None
    block_influence: list[Number] | None
    removed_layers: list[Count] | None
    layer_sparsity: list[Number] | None
    layer_errors: dict[str, Number] | None
    processors_short: Number


@pydantic.with_config(_OPEN)
class _Growth(TypedDict):
    length_growth: dict[str, Number]
    tokens_kept: Count
    tokens_before: Count


@pydantic.with_config(_OPEN)
class _Merged(TypedDict):
    perplexity_merged: Perplexity
    perplexity_before_merge: Perplexity


@pydantic.with_config(_OPEN)
class _Errors(TypedDict):
    relative_output_error: list[Number]


@pydantic.with_config(_OPEN)
class _Removed(TypedDict):
    units: Annotated[int, pydantic.Field(ge=1, le=2**24)]
    removed: list[list[Count]]


def _known_details(values: dict[str, Any]) -> dict[str, Any]:
    _require(_Details, values)
    for key, shape in (("length_growth", _Growth), ("perplexity_merged", _Merged)):
        if values.get(key):
            _require(shape, values)
    for figures in values.values():  # of each kind of unit that was pruned
        for key, inner in (("relative_output_error", _Errors), ("removed", _Removed)):
            if isinstance(figures, dict) and figures.get(key):
                _require(inner, figures)
        if isinstance(figures, dict) and figures.get("removed") and any(unit >= figures["units"] for layer in figures["removed"] for unit in layer):
            raise ValueError(f"be as llmlite writes it: removed: there are units beyond the {figures['units']} that it names")
    return values


Details = Annotated[dict[str, Any], pydantic.AfterValidator(_known_details)]


# What they belong to --------------------------------------------------------------------------------------------------------------------


@pydantic.with_config(_OPEN)
class _Model(TypedDict, total=False):
    name: str
    add_tokens: list[str] | None


@pydantic.with_config(_OPEN)
class _Data(TypedDict, total=False):
    train: str
    evaluation: str | None
    calibration: str | None


@pydantic.with_config(_OPEN)
class _Step(TypedDict):
    step: str


@pydantic.with_config(_OPEN)
class _Recipe(TypedDict, total=False):
    model: _Model | None
    data: _Data | None
    steps: list[str | _Step] | None
    output_dir: str | None
    grid_grams_per_kwh: Number | None


@pydantic.with_config(_OPEN)
class _Evaluation(TypedDict, total=False):
    text: str | None


@pydantic.with_config(_OPEN)
class _Base(TypedDict, total=False):
    name: str
    hub_id: str | None
    revision: str
    weights: str
    license: str | list[str]
    license_name: str | list[str]
    license_link: str | list[str]
    language: str | list[str]
    made_by: list[str]
    quantization_config: dict[str, Any]
    vocabulary: Count


class _Expected(TypedDict, total=False):
    kl: Number
    perplexity: Number
    bytes_on_disk: Number


def _expected(values: dict[str, float]) -> dict[str, float]:
    if values:
        _require(_Expected, values)
    return values


RecipeShape = Annotated[dict[str, Any], _shaped(_Recipe)]
EvaluationShape = Annotated[dict[str, Any], _shaped(_Evaluation)]
EnvironmentShape = Annotated[dict[str, Any], pydantic.Field(strict=True)]
BaseShape = Annotated[dict[str, Any], _shaped(_Base)]
ExpectedShape = Annotated[dict[str, float], pydantic.AfterValidator(_expected)]
