"""Fewer tokens for the same texts: which tokens of a byte-pair vocabulary stay, and the tokenizer that is left.

A byte-pair tokenizer (BPE) starts from characters and applies merges in the order of their rank. Take every merge away whose parts or result go: a text whose
own merges all stay is cut as before (its next merge was the first of all, so it is the first of fewer), and any other text falls into smaller pieces, in the
end into single bytes. So a kept text keeps its tokens, and every text still comes back whole.

Legend: V tokens before, K tokens that stay, T tokens of a text. Source of byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1; of keeping
the used part of a vocabulary: Abdaoui et al. 2020, arXiv:2010.05609.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmlite.data.tokens import IGNORE_INDEX
from llmlite.errors import UnsupportedModel

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Ids = NDArray[np.int64]

__all__ = ["VOCABULARY", "BytePairs", "Vocabulary", "kept_tokens", "narrow_tokenizer"]

VOCABULARY = "vocabulary.json"
"""The file beside a model's weights that says which of its base's tokens are left."""
_BYTES = 256


@dataclass(frozen=True)
class BytePairs:
    """The byte-pair model inside a fast tokenizer.

    Attributes:
        ids: token -> id, added tokens included.
        ranks: pair of tokens -> rank of its merge; lower ranks merge first.
        always: ids that never go: bytes, added and special tokens, the unknown token.
        fallback: whether a character without a token becomes the tokens <0x00> to <0xFF> of its bytes; otherwise the alphabet is the bytes themselves.
    """

    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]
    always: frozenset[int]
    fallback: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> BytePairs:
        """Read it.

        Raises:
            UnsupportedModel: another kind of tokenizer, or one that has no way to write every text in bytes.
        """
        description = _description(tokenizer)
        model = description["model"]
        if model.get("type") != "BPE":
            raise UnsupportedModel(
                f"its tokenizer is {model.get('type', 'of an unknown kind')}, not byte-pair encoding (BPE); only a BPE vocabulary can lose tokens and still "
                "cut the texts that matter as before. Keep its vocabulary; prune.ffn and prune.layers make the rest smaller."
            )
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise UnsupportedModel("its BPE tokenizer marks the inside or the end of words (continuing_subword_prefix, end_of_word_suffix), not done yet.")
        added = {entry["content"]: entry["id"] for entry in description["added_tokens"]}
        ids = {**model["vocab"], **added}
        fallback = [f"<0x{byte:02X}>" for byte in range(_BYTES)]
        if _mentions(description.get("pre_tokenizer"), "ByteLevel") or _mentions(description.get("normalizer"), "ByteLevel"):
            from tokenizers.pre_tokenizers import ByteLevel

            alphabet = [letter for letter in ByteLevel.alphabet() if letter in ids]
        elif model.get("byte_fallback") and all(token in ids for token in fallback):
            alphabet = fallback
        else:
            raise UnsupportedModel(
                "its BPE tokenizer works neither on bytes nor falls back to them, so texts with other letters would no longer come back whole."
            )
        always = {ids[token] for token in alphabet} | set(added.values()) | {ids[token] for token in [model.get("unk_token")] if token in ids}
        always |= {token for token in tokenizer.all_special_ids if token is not None}
        return cls(ids, {_pair(merge): rank for rank, merge in enumerate(model["merges"])}, frozenset(always), alphabet is fallback)

    def split(self, token: str) -> tuple[list[str], list[str]]:
        """Cut a piece of text, as the tokenizer writes it, by the merges: the tokens, and everything that was merged on the way to them."""
        symbols = [piece for letter in token for piece in self._letter(letter)]
        merged: list[str] = []
        while len(symbols) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(symbols)]
            at = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[at] == len(self.ranks):
                break
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            merged.append(symbols[at])
        return symbols, merged

    def ancestors(self, token: str) -> set[int]:
        """Ids of the tokens without which this one could not be put together; its letters among them. Itself not included."""
        symbols, merged = self.split(token)
        if symbols != [token]:
            return set()  # an added token, or one that is found whole: no merge makes it
        return {self.ids[part] for part in {*merged, *(piece for letter in token for piece in self._letter(letter))}} - {self.ids[token]}

    def narrowed(self, kept: Collection[int]) -> BytePairs:
        """The same with only some tokens, under their old ids."""
        ids = {token: index for token, index in self.ids.items() if index in set(kept)}
        ranks = {pair: rank for pair, rank in self.ranks.items() if pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids}
        order = {pair: rank for rank, pair in enumerate(sorted(ranks, key=ranks.__getitem__))}
        return BytePairs(ids, order, self.always, self.fallback)

    def _letter(self, letter: str) -> list[str]:
        return [f"<0x{byte:02X}>" for byte in letter.encode()] if self.fallback and letter not in self.ids else [letter]


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens of the base stay, and how the others are written with them.

    Attributes:
        kept_K: base ids of the tokens that stay, ascending; the place is the new id.
        pieces: for each base id its new ids: one where it stays, else the pieces of its text (none for an id without a token).
    """

    kept_K: Ids
    pieces: tuple[Ids, ...]

    @classmethod
    def of(cls, pairs: BytePairs, kept: Collection[int], size: int) -> Vocabulary:
        """Args: the base's byte pairs; base ids that stay; `size`, the rows of the base's embedding."""
        kept_K = np.array(sorted(kept), dtype=np.int64)
        new = {int(old): index for index, old in enumerate(kept_K)}
        narrow = pairs.narrowed(set(new))
        tokens = {index: token for token, index in pairs.ids.items()}
        pieces = []
        for old in range(size):
            parts = [old] if old in new else [narrow.ids[part] for part in narrow.split(tokens[old])[0]] if old in tokens else []
            pieces.append(np.array([new[part] for part in parts], dtype=np.int64))
        return cls(kept_K, tuple(pieces))

    def after(self, first: Vocabulary | None) -> Vocabulary:
        """This one, found on a vocabulary that was narrowed before, as seen from the base."""
        if first is None:
            return self
        pieces = tuple(np.concatenate([self.pieces[part] for part in parts]) if len(parts) else parts for parts in first.pieces)
        return Vocabulary(first.kept_K[self.kept_K], pieces)

    @cached_property
    def lengths(self) -> Ids:
        """New tokens of each base token, (V,)."""
        return np.array([len(part) for part in self.pieces], dtype=np.int64)

    def expand(self, ids_T: Sequence[int] | Ids) -> Ids:
        """The same text in the tokens that stay; where all of them stay, only their numbers change."""
        parts = [self.pieces[int(token)] for token in ids_T]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def expand_row(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """A tokenised row (``input_ids``, ``labels``, perhaps ``position_ids``) in the tokens that stay.

        The result also has ``starts``: 1 at the first piece of each base token that counts, so that figures can be given for each token of the base.
        """
        ids, labels = np.asarray(row["input_ids"], dtype=np.int64), np.asarray(row["labels"], dtype=np.int64)
        lengths = self.lengths[ids]
        new = self.expand(ids)
        counted = np.repeat(labels != IGNORE_INDEX, lengths)
        first = np.zeros(len(new), dtype=bool)
        first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        found = {"input_ids": new.tolist(), "labels": np.where(counted, new, IGNORE_INDEX).tolist(), "starts": (first & counted).astype(np.int64).tolist()}
        if "position_ids" in row:
            begins = [index for index, position in enumerate(row["position_ids"]) if position == 0] + [len(ids)]
            found["position_ids"] = [place for start, end in itertools.pairwise(begins) for place in range(int(lengths[start:end].sum()))]
        return found

    def save(self, file: Path) -> None:
        """Write which base ids stay and how the others are written, as JSON."""
        dropped = {str(old): part.tolist() for old, part in enumerate(self.pieces) if not (len(part) == 1 and self.kept_K[part[0]] == old)}
        file.write_text(json.dumps({"base_tokens": len(self.pieces), "kept": self.kept_K.tolist(), "written_as": dropped}), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """Read what `save` wrote."""
        stored = json.loads(file.read_text(encoding="utf-8"))
        new = {old: index for index, old in enumerate(stored["kept"])}
        pieces = [stored["written_as"].get(str(old)) if str(old) in stored["written_as"] else [new[old]] for old in range(stored["base_tokens"])]
        return cls(np.array(stored["kept"], dtype=np.int64), tuple(np.array(part, dtype=np.int64) for part in pieces))


def kept_tokens(pairs: BytePairs, counts_V: Ids, also: Collection[int], *, min_count: int = 1, keep_first: int = 0, multiple_of: int = 1) -> list[int]:
    """Which tokens stay: those that texts use, what their merges need, bytes and special tokens; filled up to a multiple with the lowest numbers.

    A BPE vocabulary is numbered in the order in which it was learned, so low numbers are the tokens that texts at large use most.

    Args:
        pairs: the tokenizer's.
        counts_V: how often each token stands in the texts.
        also: further ids that must stay, for instance those that the model's config names.
        min_count: a token used less often goes.
        keep_first: this many of the lowest numbers stay whether used or not.
        multiple_of: the number that stays is a multiple of this where there are tokens to fill up with.

    Returns:
        Ids, ascending.
    """
    tokens = {index: token for token, index in pairs.ids.items()}
    used = {int(index) for index in np.flatnonzero(counts_V >= max(min_count, 1))} & tokens.keys()
    kept = set(pairs.always) | set(also) | used
    for index in [*used, *sorted(tokens)[:keep_first]]:
        kept |= {index, *pairs.ancestors(tokens[index])}
    wanted = -(-len(kept) // multiple_of) * multiple_of
    for index in sorted(tokens):
        if len(kept) >= wanted:
            break
        family = {index, *pairs.ancestors(tokens[index])}
        if len(kept | family) <= wanted:
            kept |= family
    return sorted(kept)


def narrow_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """A stock tokenizer that has only some tokens, numbered anew in their old order; chat template, special tokens and settings stay.

    Args:
        tokenizer: fast, with a byte-pair vocabulary; not changed.
        kept: ids that stay, ascending, those of `BytePairs.always` among them. Ids without a token (rows of the embedding alone) may be there too.
    """
    from transformers import AutoTokenizer

    new = {old: index for index, old in enumerate(kept)}
    pairs = BytePairs.of(tokenizer).narrowed(kept)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for old in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
            (folder / old).unlink(missing_ok=True)
        file = folder / "tokenizer.json"
        description = json.loads(file.read_text(encoding="utf-8"))
        model, texts = description["model"], isinstance(next(iter(description["model"]["merges"]), None), str)
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
        model["merges"] = [" ".join(pair) if texts else list(pair) for pair in sorted(pairs.ranks, key=pairs.ranks.__getitem__)]
        for entry in description["added_tokens"]:
            entry["id"] = new[entry["id"]]
        if description.get("padding"):
            description["padding"]["pad_id"] = new[description["padding"]["pad_id"]]
        for part in _parts(description.get("post_processor")):
            _renumber(part, new)
        file.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in values:
            values["added_tokens_decoder"] = {str(new[int(old)]): entry for old, entry in values["added_tokens_decoder"].items() if int(old) in new}
        settings.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            f"its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, in which vocabulary and merges could be rewritten. "
            "Save a fast one: AutoTokenizer.from_pretrained(model, use_fast=True).save_pretrained(folder)."
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer and those inside of it."""
    if isinstance(part, dict):
        yield part
        for key in ("pretokenizers", "normalizers", "processors", "decoders"):
            for inner in part.get(key) or ():
                yield from _parts(inner)


def _mentions(part: Any, kind: str) -> bool:
    return any(inner.get("type") == kind for inner in _parts(part))


def _renumber(processor: dict[str, Any], new: Mapping[int, int]) -> None:
    """Ids of special tokens that a post-processor puts around a text."""
    specials = processor.get("special_tokens")
    for entry in specials.values() if isinstance(specials, dict) else ():
        entry["ids"] = [new[index] for index in entry["ids"]]
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            processor[key][1] = new[processor[key][1]]
