"""Tokens that a model has not had: the tokenizer gets them, and embedding and head get rows for them.

    row(t) = mean of the rows of the pieces that t was written in before

so that the model reads and writes the new token, before any training, much as it did its text. What is trained of them is for the steps to say:
adapters train these rows alone, by peft's ``trainable_token_indices``, and hold nothing else of the embedding.

Legend: V tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmlite.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["add_to_tokenizer", "fill_rows", "pieces_of"]


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Let the tokenizer know these tokens, taken literally wherever they stand; those that it knows stay as they are.

    Raises:
        LoadError: an empty or blank token.
    """
    from tokenizers import AddedToken

    if any(not token.strip() for token in tokens):
        raise LoadError("model: add_tokens holds an empty token.")
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens if token not in known])


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[str, list[int]]:
    """For each token that a tokenizer does not know, the ids that it writes it in."""
    known = tokenizer.get_vocab()
    return {token: list(tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]) for token in tokens if token not in known}


def fill_rows(model: Any, rows: Mapping[int, Sequence[int]], tokens: int) -> None:
    """Give a model rows for added tokens, in place.

    Args:
        model: any causal LM; its blocks may be quantized, its embedding and head may not.
        rows: id of an added token -> ids of its pieces.
        tokens: V that the tokenizer has now. A model padded to more keeps its size.
    """
    import torch

    if tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    with torch.no_grad():
        for table in tables:
            for index, pieces in rows.items():
                parts = list(pieces) or slice(min(rows))  # a token that the tokenizer left out: the mean of all that it knew
                table[index] = table[parts].float().mean(0).to(table.dtype)
