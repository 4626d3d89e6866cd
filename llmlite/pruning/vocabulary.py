"""The step `prune.vocabulary`: keep the tokens that some texts use, in the tokenizer, the embedding and the output head together.

Small models carry much of their weight in their vocabulary. Texts like those given are cut and predicted as before; every other text still goes in and comes
out whole, in more and smaller tokens. Byte-pair tokenizers (BPE) on bytes or with byte fallback; see `llmlite.data.vocabulary` for why this holds.

How it is measured: a token that went is written as its pieces, so perplexity stays a figure for each token of the *base* (the pieces' losses add up), and KL
and agreement compare, where a base token begins, with the base's distribution over the tokens that stay, made to add up to 1.

Source: Abdaoui et al. 2020, arXiv:2010.05609 (load what you need).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from llmlite.config import settings
from llmlite.errors import ConfigError, UnsupportedModel
from llmlite.pruning.settings import planned, require_plain
from llmlite.step import ModelPlan, Names, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmlite.context import Run
    from llmlite.data.text import Rows

__all__ = ["PruneVocabulary", "length_growth"]

log = logging.getLogger(__name__)

_OTHER_TEXT = "builtin:python-docs-prose"
_OTHER_ROWS = 200


@settings
class PruneVocabulary(Step):
    """Keep the tokens that some texts use; rewrites tokenizer, embedding and output head together."""

    advice: ClassVar[str] = "give more text to keep the tokens of (text), or keep more of the lowest-numbered tokens (keep_first)"
    memory_advice: ClassVar[str] = "Lower text_rows, or free some: the embedding is held twice"

    text: Names = ()
    """Texts whose tokens stay: files, folders, Hub ids, builtin names. Left out: the training text, its held-out part excepted."""
    text_rows: Annotated[int, Field(ge=1)] = 20_000
    """Rows read of each text, drawn by the seed."""
    min_count: Annotated[int, Field(ge=1)] = 1
    """A token that is used less often goes as well; with 1 the texts keep exactly the tokens they have."""
    keep_first: Annotated[int, Field(ge=0)] = 0
    """This many of the lowest-numbered tokens stay whether used or not: the commonest of a BPE vocabulary, for texts that are not given."""
    multiple_of: Annotated[int, Field(ge=1)] = 64
    """The vocabulary is filled up to a multiple of this with the lowest-numbered of the other tokens."""

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`. Local texts are read, so that the plan is exact; for a text on the Hub it says what there is at most.

        Raises:
            ConfigError: the tokenizer's vocabulary cannot be narrowed.
        """
        from llmlite.data.text import check_source
        from llmlite.models.vocabulary import narrowed_config

        require_plain(model, "prune.vocabulary")
        total = int(model.config.vocab_size)
        remote = [source for source in self._sources(run) if check_source(source, **run.columns()).kind is None]
        try:
            kept = list(range(total)) if remote else self._chosen(run, run.tokenizer, model.config)
            config: Any = narrowed_config(model.config, kept)
        except UnsupportedModel as error:
            raise ConfigError("prune.vocabulary", [str(error)]) from None
        at_most = f"; {', '.join(remote)} is read later, so fewer may stay" if remote else ""
        return planned(model, config, run, calibrated=False, notes=(f"{len(kept):,} of {total:,} tokens stay{at_most}",))

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Choose, slice, rewrite the tokenizer, and let the run go on with it."""
        from llmlite.data.vocabulary import BytePairs, Vocabulary, narrow_tokenizer
        from llmlite.models.vocabulary import narrow_model

        config, old = model.config, run.tokenizer
        total = int(config.vocab_size)
        kept = self._chosen(run, old, config, model.generation_config)
        if len(kept) == total:
            run.note(tokens_kept=total, tokens_before=total)
            return model
        vocabulary, new = Vocabulary.of(BytePairs.of(old), kept, total), narrow_tokenizer(old, kept)
        model = narrow_model(model, kept)
        growth = self._growth(run, old, new)
        run.note(tokens_kept=len(kept), tokens_before=total, length_growth=growth)
        run.use_vocabulary(vocabulary.after(run.vocabulary), new)
        log.info("%d of %d tokens stay; texts get longer: %s", len(kept), total, ", ".join(f"{name} {times:.3f}x" for name, times in growth.items()))
        return model

    def _sources(self, run: Run) -> list[str]:
        return list(self.text) or [run.recipe.data.train]

    def _chosen(self, run: Run, tokenizer: PreTrainedTokenizerBase, *configs: Any) -> list[int]:
        """Ids that stay, ascending."""
        import numpy as np

        from llmlite.data.tokens import token_stream
        from llmlite.data.vocabulary import BytePairs, kept_tokens
        from llmlite.models.vocabulary import named_ids

        pairs, total = BytePairs.of(tokenizer), int(configs[0].vocab_size)
        counts_V = np.zeros(total, dtype=np.int64)
        for source in self._sources(run):
            for rows in self._rows(run, source):
                counts_V += np.bincount(token_stream(rows.sample(self.text_rows, run.recipe.seed), tokenizer, progress=run.is_main), minlength=total)
        counts_V += self.min_count * np.bincount(_template_ids(tokenizer), minlength=total)
        named = {index for index in named_ids(*configs) if index < total}
        return kept_tokens(pairs, counts_V, named, min_count=self.min_count, keep_first=self.keep_first, multiple_of=self.multiple_of)

    def _rows(self, run: Run, source: str) -> list[Rows]:
        from llmlite.data.text import read_rows, read_splits

        if source != run.recipe.data.train or run.recipe.data.evaluation is not None:
            return [read_rows(source, None, **run.columns())]
        splits = read_splits(source, **run.columns())  # the held-out part must stay unseen, or its growth in length would be flattered
        return [splits["train"], splits["calibration"]]

    def _growth(self, run: Run, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[str, float]:
        from llmlite.data.text import read_rows

        return {
            "held-out text": length_growth(run.evaluation_data.rows, old, new),
            _OTHER_TEXT: length_growth(read_rows(_OTHER_TEXT, "test").sample(_OTHER_ROWS), old, new),
        }


def length_growth(rows: Rows, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> float:
    """Tokens of a text in the new vocabulary over those in the old one; 1 when nothing it uses went."""
    from llmlite.data.tokens import token_stream

    before, after = (len(token_stream(rows, tokenizer, progress=False)) for tokenizer in (old, new))
    return after / max(before, 1)


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template writes by itself, the names of the roles for instance."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    for roles in (("system", "user", "assistant"), ("user", "assistant"), ("user",)):
        chat = [{"role": role, "content": "a"} for role in roles]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=roles[-1] == "user")
        except Exception:  # templates raise what they like at roles they do not know
            continue
        return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return []
