"""What the teacher says of the training rows, computed once and kept on disk: for later epochs, other students, sweeps.

Two kinds, for each token whose prediction is trained:

    hidden   the last hidden state in bfloat16 and the ids of the 32 likeliest tokens, 2 D + 64 or 2 D + 128 bytes; the teacher's head, kept beside it, is
             applied on the fly: the whole distribution. Where a product in bfloat16 is quicker the ids tell whose logits it may not round
    top_k    the k likeliest tokens: ids of 16 or 32 bit, log-probabilities in float16, and the mass of all others: 4 k + 4 or 6 k + 4 bytes

    CACHE/teachers/NAME-KEY/head/    the head (hidden only)
    CACHE/teachers/NAME-KEY/0007/    a shard of rows; complete or absent, so a stopped run continues with the first that is missing

KEY changes with the teacher's files and precision, with any token or label of the data, and (top_k) with the temperature. Shards are memory-mapped.

Shapes: N tokens of a batch, of which E are trained and have an entry, C of those in a chunk, M entries of a shard, K likeliest tokens, D hidden size of the
teacher, V its vocabulary, J ids kept beside a hidden state.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlite.config import fingerprint
from llmlite.distillation.losses import top_k_teacher
from llmlite.distillation.objective import HiddenTeacher, TopKTeacher
from llmlite.errors import ConfigError, RunError, counted
from llmlite.models.quick import quick_dtype
from llmlite.storage import cache_folder, damage, require_space, writing_folder
from llmlite.training.chunked import as_weight_and_bias, fitting_chunk
from llmlite.training.token_loss import IGNORE_INDEX, LogitTransform, next_token_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.context import Run
    from llmlite.data.prepare import Prepared
    from llmlite.distillation.teacher import LiveTeacher, TeacherModel

__all__ = ["CachedTeacher", "Kind", "TeacherCache", "choose_kind", "kinds_on_disk"]

log = logging.getLogger(__name__)

Kind = Literal["hidden", "top_k"]
_ROWS_PER_SHARD = 64
_CHUNK_TOKENS = 256
_LIKELIEST = 32
"""Ids beside a hidden state. KL of a product in bfloat16 from the live teacher, SmolLM2-135M: 3.1e-4 without ids, 9.4e-5 with 16, 7.5e-5 with 32, 6.0e-5 with
64; of the product in float32 2.4e-5."""


def choose_kind(bytes_of: dict[Kind, int], *, whole: bool, passes: float, limit_bytes: int, complete: tuple[Kind, ...] = ()) -> Kind | None:
    """Which cache `cache: auto` means; None runs the teacher beside the student.

    A complete cache is always used. A new one is made when the run reads about every row, so that it costs nothing: the teacher runs over each row once either
    way. The exact kind is taken where it fits.

    Args:
        bytes_of: size of the cache of each kind.
        whole: the loss needs the teacher's whole distribution, so `top_k` will not do.
        passes: how many times the run reads the rows.
        limit_bytes: largest cache to make.
        complete: kinds that are on disk already.
    """
    usable: tuple[Kind, ...] = ("hidden",) if whole else ("hidden", "top_k")
    for kind in usable:
        if kind in complete:
            return kind
    if passes < 0.9:
        return None
    return next((kind for kind in usable if bytes_of[kind] <= limit_bytes), None)


@dataclass(frozen=True)
class TeacherCache:
    """The cache of one teacher on one data set: where it is, how large, and how to fill it.

    Attributes:
        teacher: the model.
        data: the training rows.
        kind: what is kept.
        k: likeliest tokens kept (top_k).
        temperature: of the kept log-probabilities (top_k).
        data_key: the data's fingerprint, which takes a while to compute.
    """

    teacher: TeacherModel
    data: Prepared
    kind: Kind
    k: int
    temperature: float
    data_key: str

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        how = [self.k, self.temperature] if self.kind == "top_k" else []
        version = 2 if self.kind == "hidden" else 1
        key = fingerprint(self.teacher.identity(), self.data_key, self.data.packed, self.kind, how, _ROWS_PER_SHARD, version)
        source = self.teacher.source(weights=False)
        return cache_folder() / "teachers" / f"{(source.hub_id or source.folder.name).replace('/', '--')}-{self.kind}-{key}"

    @property
    def shards(self) -> int:
        """How many shards the data set makes."""
        return -(-len(self.data.dataset) // _ROWS_PER_SHARD)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one entry."""
        if self.kind == "hidden":
            ids = min(_LIKELIEST, self._vocabulary) * _id_bytes(self._vocabulary)
            return 2 * int(self.teacher.config.get_text_config().hidden_size) + ids
        return min(self.k, self._vocabulary) * (_id_bytes(self._vocabulary) + 2) + 4

    @property
    def _vocabulary(self) -> int:
        return int(self.teacher.config.get_text_config().vocab_size)

    def missing(self) -> list[str]:
        """Parts that are not there, or damaged."""
        parts = [f"{shard:04d}" for shard in range(self.shards)] + (["head"] if self.kind == "hidden" else [])
        return [part for part in parts if damage(self.folder / part) is not None]

    def fill(self, run: Run, load: Callable[[], LiveTeacher], rows_per_batch: int) -> None:
        """Compute what is missing, shared out over the processes. The teacher is loaded only for that.

        Raises:
            ConfigError: kind hidden, and the teacher's head is not a plain matrix.
            ResourceError: the disk is too full.
        """
        missing = run.agreed(self.missing() if run.is_main else [])
        if missing:
            folder = self.folder
            share = len(missing) / max(self.shards, 1)
            require_space(folder, int(self.bytes_per_token * self.data.counts.trained_tokens * share))
            log.info(
                "the teacher reads the training rows once, %d of %s; kept in %s", len(missing), counted(self.shards + (self.kind == "hidden"), "part"), folder
            )
            teacher = load()
            if "head" in missing and run.is_main:
                self._write_head(teacher.model)
            shards = [int(part) for part in missing if part != "head"]
            if not teacher.cut:  # all processes read all rows with a teacher of which each holds a slice
                shards = shards[run.processes.process_index :: run.processes.num_processes]
            rough = _Rough()
            for done, shard in enumerate(shards):
                tensors = self._shard(teacher, shard, rows_per_batch, rough)
                if not teacher.cut or run.is_main:
                    with writing_folder(folder / f"{shard:04d}") as temporary:
                        save_file(tensors, temporary / "signals.safetensors")
                log.info("teacher: part %d of %d", done + 1, len(shards))
            del teacher, rough
            gc.collect()  # its weights are not needed again
        run.wait()

    def read(self, device: torch.device) -> CachedTeacher:
        """The complete cache as a teacher."""
        files = [safe_open(self.folder / f"{shard:04d}" / "signals.safetensors", framework="pt") for shard in range(self.shards)]
        shards: list[dict[str, Tensor]] = [{name: file.get_tensor(name) for name in file.keys()} for file in files]  # type: ignore[no-untyped-call] # noqa: SIM118
        head = _Head.read(self.folder / "head" / "head.safetensors", device) if self.kind == "hidden" else None
        return CachedTeacher(shards, head)

    def _shard(self, teacher: LiveTeacher, shard: int, rows_per_batch: int, rough: _Rough) -> dict[str, Tensor]:
        """Entries of the rows of a shard, in order, and how many each row has."""
        dataset = self.data.dataset
        collate = self.data.collator(flatten="flash" in str(teacher.model.config._attn_implementation))
        rows = range(shard * _ROWS_PER_SHARD, min((shard + 1) * _ROWS_PER_SHARD, len(dataset)))
        counts = [sum(label != IGNORE_INDEX for label in dataset[row]["labels"][1:]) for row in rows]
        parts: list[dict[str, Tensor]] = []
        for start in range(rows.start, rows.stop, rows_per_batch):
            batch = collate([dataset[row] for row in range(start, min(start + rows_per_batch, rows.stop))])
            labels_N = next_token_labels(batch.pop("labels")).reshape(-1)
            parts.append(self._entries(teacher.signal(batch, labels_N), (labels_N != IGNORE_INDEX).nonzero().flatten(), rough))
        return {"counts": torch.tensor(counts), **{name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}}

    def _entries(self, signal: HiddenTeacher, rows_E: Tensor, rough: _Rough) -> dict[str, Tensor]:
        """What is kept of a batch: the entries of the tokens `rows_E`, which may be none."""
        chunks = torch.split(rows_E, _CHUNK_TOKENS)  # one empty chunk where there are no tokens
        if self.kind == "hidden":
            hidden_ED = signal.hidden_ND[rows_E.to(signal.hidden_ND.device)].to("cpu", torch.bfloat16)
            quick, count = rough.of(signal), min(_LIKELIEST, self._vocabulary)
            ids_EJ = torch.cat([quick.signal(rows_C, quick.hidden_ND.device)[0].topk(count).indices.cpu() for rows_C in chunks])
            return {"hidden": hidden_ED, "likeliest": _as_stored(ids_EJ, self._vocabulary)}
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows_C in chunks:
            ids_CK, logprobs_CK = top_k_teacher(signal.signal(rows_C, signal.hidden_ND.device)[0], self.k, self.temperature)
            tail_C = (1 - logprobs_CK.double().exp().sum(-1)).clamp(min=0.0).float()
            parts.append((ids_CK.cpu(), logprobs_CK.cpu().half(), tail_C.cpu()))
        ids_EK, logprobs_EK, tail_E = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"ids": _as_stored(ids_EK, self._vocabulary), "logprobs": logprobs_EK, "tail": tail_E}

    def _write_head(self, model: PreTrainedModel) -> None:
        from llmlite.training.backbone import logit_transform

        head = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if not (type(head) is nn.Linear and weight is not None and weight.is_floating_point() and not weight.is_meta):
            raise ConfigError(
                "distill.whitebox", [f"cache=hidden keeps the teacher's head, which must be a plain matrix; it is {type(head).__name__}. Try top_k."]
            )
        bias = getattr(head, "bias", None)
        with writing_folder(self.folder / "head") as temporary:
            _Head(weight.detach(), None if bias is None else bias.detach(), logit_transform(model.config)).save(temporary / "head.safetensors")


class _Rough:
    """Teachers with the product in the type that this machine multiplies fastest: which tokens are the likeliest is seen by that as well, and without what
    comes behind the head. The head is converted once for all batches."""

    def __init__(self) -> None:
        self._given: nn.Module | Tensor | None = None
        self._head: tuple[Tensor, Tensor | None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def of(self, signal: HiddenTeacher) -> HiddenTeacher:
        """The same of what the teacher says of a batch; itself where the head is more than a product."""
        if signal.head is not self._given:
            self._given, linear = signal.head, as_weight_and_bias(signal.head, signal.head_bias_V)
            self._head = None
            if linear is not None:
                weight_VD, bias_V = linear
                dtype = quick_dtype(weight_VD.device, weight_VD.dtype)
                self._head = weight_VD.detach().to(dtype), None if bias_V is None else bias_V.detach().to(dtype)
                self._buffers = {"logits": _buffer(weight_VD, dtype)}
        if self._head is None:
            return signal
        weight_VD, bias_V = self._head
        return HiddenTeacher(signal.hidden_ND, weight_VD, head_bias_V=bias_V, where_N=signal.where_N, buffers=self._buffers)


@dataclass(frozen=True)
class _Head:
    """The teacher's LM head without the teacher.

    Attributes:
        weight_VD: its weight.
        bias_V: its bias.
        transform: what comes after it.
        sharpen: it is to be applied in float32, and is in a quicker type that holds the same numbers.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    transform: LogitTransform
    sharpen: bool = False

    def save(self, path: Path) -> None:
        narrow = {name: _narrow(tensor) for name, tensor in (("weight", self.weight_VD), ("bias", self.bias_V)) if tensor is not None}
        save_file(narrow, path, metadata={"dtype": str(self.weight_VD.dtype).removeprefix("torch."), "transform": json.dumps(asdict(self.transform))})

    @classmethod
    def read(cls, path: Path, device: torch.device) -> _Head:
        with safe_open(path, framework="pt") as file:
            dtype = getattr(torch, file.metadata()["dtype"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sharpen = dtype == torch.float32 and {tensor.dtype for tensor in tensors.values()} == {quick_dtype(device, dtype)} != {dtype}
            tensors = {name: tensor.to(device, tensor.dtype if sharpen else dtype) for name, tensor in tensors.items()}
            return cls(tensors["weight"], tensors.get("bias"), LogitTransform(**json.loads(file.metadata()["transform"])), sharpen)


class CachedTeacher:
    """Signals read from disk. The teacher's weights are not needed any more, but for its head.

    Args:
        shards: for each shard its memory-mapped tensors: `counts` (rows,), and `hidden` (M, D) and `likeliest` (M, J), or `ids` (M, K), `logprobs`
            (M, K) and `tail` (M,).
        head: the teacher's head, with `hidden`.
    """

    def __init__(self, shards: list[dict[str, Tensor]], head: _Head | None) -> None:
        self.shards, self.head = shards, head
        self.buffers: dict[str, Tensor] = {}
        if head is not None:
            self.buffers["logits"] = _buffer(head.weight_VD, torch.float32 if head.sharpen else head.weight_VD.dtype)
            if head.sharpen:
                self.buffers["rounded"] = _buffer(head.weight_VD, head.weight_VD.dtype)
        self.starts = [torch.cat([torch.zeros(1, dtype=torch.int64), shard["counts"].cumsum(0)]).tolist() for shard in shards]

    def signal(self, inputs: dict[str, Tensor], labels_N: Tensor) -> HiddenTeacher | TopKTeacher:
        """What the teacher said of these rows.

        Raises:
            RunError: the rows are not those of the cache.
        """
        keep_E = (labels_N != IGNORE_INDEX).nonzero().flatten()
        places = list(self._places(inputs["rows"].tolist()))
        none = [(0, slice(0, 0))]  # a batch may have no rows
        entries = {name: torch.cat([self.shards[shard][name][part] for shard, part in none + places]) for name in self.shards[0] if name != "counts"}
        found = len(next(iter(entries.values())))
        if found != len(keep_E):
            raise RunError(
                f"the teacher's cache holds {counted(found, 'token')} for a batch with {len(keep_E)}: it belongs to other rows. Run with cache: none."
            )
        where_N = torch.zeros(len(labels_N), dtype=torch.int64, device=keep_E.device).index_copy_(0, keep_E, torch.arange(found, device=keep_E.device))
        if self.head is not None:
            return HiddenTeacher(
                entries["hidden"],
                self.head.weight_VD,
                head_bias_V=self.head.bias_V,
                transform=self.head.transform,
                where_N=where_N,
                likeliest_NJ=_widened(entries["likeliest"]) if self.head.sharpen else None,
                buffers=self.buffers,
            )
        return TopKTeacher(_widened(entries["ids"]), _consistent(entries["logprobs"], entries["tail"]), where_N=where_N)

    def _places(self, rows: list[int]) -> Iterator[tuple[int, slice]]:
        for row in rows:
            shard, place = divmod(row, _ROWS_PER_SHARD)
            yield shard, slice(self.starts[shard][place], self.starts[shard][place + 1])


def _buffer(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """For the logits of a chunk. Made once, whole: many of different sizes, given back in between, leave holes in the process's memory."""
    return torch.empty(fitting_chunk(len(weight_VD)), len(weight_VD), dtype=dtype, device=weight_VD.device)


def _id_bytes(vocabulary: int) -> int:
    return 2 if vocabulary <= 2**16 else 4


def _as_stored(ids: Tensor, vocabulary: int) -> Tensor:
    """Ids in 16 bit where the vocabulary allows it, unsigned; else in 32."""
    return (ids - 2**16 * (ids >= 2**15)).to(torch.int16).view(torch.uint16) if _id_bytes(vocabulary) == 2 else ids.to(torch.int32).view(torch.uint32)


def _widened(ids: Tensor) -> Tensor:
    """Stored ids as int64; torch does little with unsigned types."""
    return ids.view(torch.int16).long() & 0xFFFF if ids.dtype == torch.uint16 else ids.view(torch.int32).long() & 0xFFFFFFFF


def _consistent(logprobs_MK: Tensor, tail_M: Tensor) -> Tensor:
    """Log-probabilities that sum to one with the tail: rounding each to float16 moves their sum by more than a small tail is large."""
    logprobs_MK = logprobs_MK.float()
    return logprobs_MK + (torch.log1p(-tail_M.clamp(max=1 - 1e-6)) - logprobs_MK.logsumexp(-1))[:, None]


def _narrow(tensor: Tensor) -> Tensor:
    """In bfloat16 where that loses nothing, as with weights that were published so."""
    narrow = tensor.to(torch.bfloat16)
    return (narrow if bool((narrow.to(tensor.dtype) == tensor).all()) else tensor).contiguous().cpu()


def kinds_on_disk(caches: dict[Kind, TeacherCache]) -> tuple[Kind, ...]:
    """Which of these caches are complete."""
    return tuple(kind for kind, cache in caches.items() if not cache.missing())
