"""How good a model is on held-out tokens: perplexity, KL divergence from the base, and agreement on the most likely token.

    perplexity = exp(-(1/N) sum_n log q(x_n)),   KL = (1/N) sum_n sum_v p_n(v) (log p_n(v) - log q_n(v)),   p the base, q the model

The base's whole distribution is kept as its last hidden states and its LM head, which is exact and costs a few kilobytes a token; logits
exist for one chunk of tokens at a time.

Legend: N predicted tokens, D hidden size, V vocabulary, C tokens of a chunk.

Source for agreement beside perplexity: Dutta et al. 2024, arXiv:2407.09141 (accuracy is not all you need).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llmlite.calibration.blocks import Batch, last_hidden
from llmlite.processes import places_of, rank_and_processes, sum_over_processes
from llmlite.training.backbone import logit_transform
from llmlite.training.chunked import head_logits
from llmlite.training.token_loss import IGNORE_INDEX, LogitTransform, next_token_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Quality", "Reference", "measure_quality", "reference_of"]

_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Quality:
    """Means over the predicted tokens.

    Attributes:
        perplexity: see the module's formula.
        kl: nats a token, or None without a reference.
        top1_agreement: share of tokens whose most likely next token is the base's, or None without a reference.
        tokens: number of predicted tokens; of the base's tokens, where the model writes some of them in several pieces.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int


@dataclass(frozen=True)
class Reference:
    """The base's distributions on the held-out tokens.

    Attributes:
        hidden_ND: what enters the LM head at each predicted token, in the base's dtype.
        head_VD: the LM head's weight.
        bias_V: its bias, or None.
        transform: what the family does to the logits.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    transform: LogitTransform

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        tensors = {"hidden": self.hidden_ND.contiguous().cpu(), "head": self.head_VD.contiguous().cpu()}
        if self.bias_V is not None:
            tensors["bias"] = self.bias_V.contiguous().cpu()
        save_file(tensors, path, metadata={"transform": json.dumps(asdict(self.transform))})

    def over(self, kept_K: Tensor) -> Reference:
        """The distributions over some tokens alone, made to add up to 1: rows `kept_K` of the head."""
        return Reference(self.hidden_ND, self.head_VD[kept_K], None if self.bias_V is None else self.bias_V[kept_K], self.transform)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `save` wrote; the tensors stay on the CPU."""
        with safe_open(path, framework="pt") as file:
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118 - not a mapping
            return cls(file.get_tensor("hidden"), file.get_tensor("head"), bias, LogitTransform(**json.loads(file.metadata()["transform"])))


@torch.no_grad()
def reference_of(model: PreTrainedModel, batches: Iterable[Batch], shared: bool = False) -> tuple[Reference, Quality]:
    """Run the base once: its perplexity, and what is needed to compare others with it.

    Args:
        model: any causal LM, on its device.
        batches: see `measure_quality`.
        shared: see `measure_quality`; the hidden states are gathered too, on every process.
    """
    batches = list(batches)
    places = places_of(len(batches), shared)
    parts = {}
    counter = _Counter()
    transform = logit_transform(model.config)
    head = model.get_output_embeddings()
    for place, (hidden_ND, labels_N, _) in zip(places, _hidden(model, [batches[place] for place in places]), strict=True):
        parts[place] = hidden_ND.cpu()
        for start in range(0, len(labels_N), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            counter.add(head_logits(hidden_ND[rows], head, transform=transform).float().log_softmax(-1), labels_N[rows])
    if shared:
        counter.sum_over_processes(head.weight.device)
        parts = _gathered(parts)
    whole_ND = torch.cat([parts[place] for place in sorted(parts)])
    reference = Reference(whole_ND, head.weight.detach().cpu(), None if getattr(head, "bias", None) is None else head.bias.detach().cpu(), transform)
    return reference, counter.quality(compared=False)


@torch.no_grad()
def measure_quality(model: PreTrainedModel, batches: Iterable[Batch], reference: Reference | None = None, shared: bool = False) -> Quality:
    """Perplexity of the trained tokens of the batches, and with a reference KL and agreement on the same tokens.

    Args:
        model: any causal LM, on its device. It is put into eval mode and back.
        batches: model inputs with ``labels`` (-100 where a token does not count), the same and in the same order as the reference's. With ``starts`` (1 at the
            first piece of a token of the base) means are over the tokens of the base: losses of pieces add up, KL and agreement are taken at first pieces.
        reference: the base's distributions, from `reference_of`.
        shared: share the batches out over the processes of `torch.distributed` and add up the sums once; then every process must call this alike. With one
            process, or False, this process reads all of them.
    """
    batches = list(batches)
    places = places_of(len(batches), shared)
    starts = list(itertools.accumulate((_first_pieces(batch) for batch in batches), initial=0))  # where each batch begins in the reference
    counter = _Counter()
    transform = logit_transform(model.config)
    head = model.get_output_embeddings()
    teacher_head = teacher_bias = None
    for place, (hidden_ND, labels_N, starts_N) in zip(places, _hidden(model, [batches[place] for place in places]), strict=True):
        done = starts[place]
        device = hidden_ND.device
        if reference is not None and teacher_head is None:
            teacher_head = reference.head_VD.to(device)
            teacher_bias = None if reference.bias_V is None else reference.bias_V.to(device)
        for start in range(0, len(labels_N), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            student_CV = head_logits(hidden_ND[rows], head, transform=transform).float().log_softmax(-1)
            counter.add(student_CV, labels_N[rows], int(starts_N[rows].sum()))
            if reference is not None and teacher_head is not None:
                first_CV = student_CV[starts_N[rows]]
                hidden_CD = reference.hidden_ND[done : done + len(first_CV)].to(device)
                counter.compare(first_CV, head_logits(hidden_CD, teacher_head, teacher_bias, reference.transform).float().log_softmax(-1))
                done += len(first_CV)
    if shared:
        counter.sum_over_processes(head.weight.device)
    return counter.quality(compared=reference is not None)


def _first_pieces(batch: Batch) -> int:
    """Tokens of a batch that the reference has a distribution for."""
    counted_BT = next_token_labels(batch["labels"]) != IGNORE_INDEX
    return int((counted_BT if "starts" not in batch else counted_BT & (next_token_labels(batch["starts"]) == 1)).sum())


def _gathered(parts: dict[int, Tensor]) -> dict[int, Tensor]:
    """The parts of all processes, on every process."""
    processes = rank_and_processes()[1]
    if processes == 1:
        return parts
    found: list[Any] = [None] * processes
    torch.distributed.all_gather_object(found, parts)
    return {place: part for each in found for place, part in each.items()}


def _hidden(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """For each batch: what enters the head at the tokens that predict a counted label, (N, D), these labels, and whether each begins a token, (N,) each."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    batches = list(batches)
    inputs = [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items() if key not in ("labels", "starts")} for batch in batches
    ]
    hidden = last_hidden(model, inputs)
    try:
        quiet = True if rank_and_processes()[0] else None  # None: no bar where nobody looks
        for batch, hidden_BTD in zip(tqdm(batches, desc="measuring", leave=False, disable=quiet), hidden, strict=True):
            labels_BT = next_token_labels(batch["labels"].to(device))
            counted_BT = labels_BT != IGNORE_INDEX
            starts_BT = counted_BT if "starts" not in batch else next_token_labels(batch["starts"].to(device)) == 1
            yield hidden_BTD[counted_BT], labels_BT[counted_BT], starts_BT[counted_BT]
    finally:
        model.train(was_training)


class _Counter:
    """Sums over tokens, in float64."""

    def __init__(self) -> None:
        self.nll = self.kl = 0.0
        self.agree = self.tokens = 0

    def add(self, student_CV: Tensor, labels_C: Tensor, tokens: int | None = None) -> None:
        """Add a chunk of log-probabilities, (C, V) float32, that stand for so many tokens (None: one each)."""
        self.nll -= student_CV.gather(1, labels_C[:, None]).double().sum().item()
        self.tokens += len(labels_C) if tokens is None else tokens

    def compare(self, student_CV: Tensor, teacher_CV: Tensor) -> None:
        """Add the distance of a chunk from the base's log-probabilities at the same places."""
        shared = min(student_CV.shape[1], teacher_CV.shape[1])  # one family pads its vocabulary differently in different sizes
        student_CV, teacher_CV = student_CV[:, :shared], teacher_CV[:, :shared]
        self.agree += int((student_CV.argmax(-1) == teacher_CV.argmax(-1)).sum())
        self.kl += (teacher_CV.exp() * (teacher_CV - student_CV)).sum().double().item()

    def sum_over_processes(self, device: torch.device) -> None:
        """Add up what all processes have counted; nothing when there is one."""
        sums = torch.tensor([self.nll, self.kl, self.agree, self.tokens], dtype=torch.float64, device=device)
        sum_over_processes([sums])
        self.nll, self.kl = float(sums[0]), float(sums[1])
        self.agree, self.tokens = int(sums[2]), int(sums[3])

    def quality(self, compared: bool) -> Quality:
        """The means so far."""
        mean = self.nll / max(self.tokens, 1)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return Quality(perplexity, self.kl / max(self.tokens, 1) if compared else None, self.agree / max(self.tokens, 1) if compared else None, self.tokens)
