"""Take tokens out of a model: rows of the embedding and of the output head, and every token id that its configs name.

What stays gives the logits it gave, to rounding: nothing else in a decoder knows how many tokens there are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmlite.errors import UnsupportedModel
from llmlite.models.rebuild import rebuild
from llmlite.models.slicing import Sliced, finish, names_of, plain_state, select_units
from llmlite.models.view import ModelView

__all__ = ["named_ids", "narrow_model", "narrowed_config", "take_tokens"]

_LISTS = ("suppress_tokens", "begin_suppress_tokens")  # of a generation config, beside everything that ends in _token_id


def named_ids(*configs: Any) -> set[int]:
    """Token ids that configs name: the special ones, and those that generation must not write."""
    found: set[int] = set()
    for config in configs:
        for value in _named(config).values():
            found |= set(value) if isinstance(value, list) else {value}
    return {index for index in found if index >= 0}


def narrowed_config(config: Any, kept: Sequence[int]) -> Any:
    """The config of the model that has only the tokens `kept`, numbered anew."""
    changed = copy.deepcopy(config)
    for name, value in {**_renumbered(config, kept), "vocab_size": len(kept)}.items():
        setattr(changed, name, value)
    return changed


def take_tokens(view: ModelView, kept: Sequence[int]) -> Sliced:
    """Keep some tokens: rows of the embedding and of the head.

    Args:
        view: a plain model: not quantized, no adapters.
        kept: ids that stay, ascending; they are numbered anew in this order. All ids that the config names must be among them.

    Raises:
        UnsupportedModel: the model is quantized or wrapped.
        ValueError: an id that the config names goes, or `kept` is not ascending within the vocabulary.
    """
    total = int(view.config.vocab_size)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise ValueError(f"kept must name at least one of {total} tokens, ascending, each once; got {list(kept)[:12]}")
    state, index = plain_state(view), torch.tensor(list(kept), dtype=torch.long)
    for module in [view.embedding, None if view.tied else view.head]:
        for name in names_of(view, module):
            state[name] = select_units(state[name], 0, index)
    bias = next((name for name in names_of(view, view.head) if name.endswith("bias")), None) if view.tied else None
    if bias is not None:
        state[bias] = select_units(state[bias], 0, index)
    return finish(view, {**_renumbered(view.config, kept), "vocab_size": len(kept)}, state)


def narrow_model(model: Any, kept: Sequence[int]) -> Any:
    """A fresh model with only these tokens, its generation config renumbered too. See `take_tokens`."""
    view = ModelView(model)
    fresh: Any = rebuild(model, *take_tokens(view, kept))
    if getattr(fresh, "generation_config", None) is not None:
        for name, value in _renumbered(fresh.generation_config, kept).items():
            setattr(fresh.generation_config, name, value)
    return fresh


def _named(config: Any) -> dict[str, int | list[int]]:
    """Attribute -> the id or ids it names."""
    found: dict[str, int | list[int]] = {}
    for name, value in config.to_dict().items():
        values = value if isinstance(value, list) else [value]
        if (name.endswith("_token_id") or name in _LISTS) and all(type(entry) is int for entry in values):
            found[name] = value
        elif name in ("bad_words_ids", "sequence_bias", "forced_decoder_ids") and value:
            raise UnsupportedModel(f"its generation config has {name}, lists of token ids that taking tokens away would not follow. Remove it first.")
    return found


def _renumbered(config: Any, kept: Sequence[int]) -> Mapping[str, Any]:
    new = {old: index for index, old in enumerate(kept)}

    def of(value: int) -> int:
        if value < 0:
            return value  # some configs write -1 for none
        if value not in new:
            raise ValueError(f"token {value} is named by the config and must stay")
        return new[value]

    return {name: [of(entry) for entry in value] if isinstance(value, list) else of(value) for name, value in _named(config).items()}
