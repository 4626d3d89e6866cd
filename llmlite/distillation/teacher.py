"""Teachers behind one seam: `Teacher.signal(batch)` says what the teacher thinks of a batch, wherever the teacher is.

    LiveTeacher      runs beside the student, in any precision, on any device, spread over several, or cut or split over the processes of a launch
    CachedTeacher    reads what a live one said before (`llmlite.distillation.cache`)
    AlignedTeacher   a live one that reads the same characters by another tokenizer

What comes back is a `TeacherSignal`, asked for a chunk of tokens at a time, so that a teacher's full logits never exist.

Shapes: B sequences, T positions, N = B * T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from llmlite.data.collate import PaddedCollator, examples_of
from llmlite.distillation.objective import HiddenTeacher, TeacherSignal
from llmlite.distillation.uld import align
from llmlite.errors import UnsupportedModel
from llmlite.models.device_map import SPREADING, memory_limits
from llmlite.step import ModelPlan, Scheme
from llmlite.training.backbone import hidden_and_head, require_known_logits
from llmlite.training.token_loss import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmlite.context import Run
    from llmlite.models.find import Source
    from llmlite.models.settings import Model

__all__ = ["AlignedSignal", "AlignedTeacher", "LiveTeacher", "Teacher", "TeacherModel"]


class Teacher(Protocol):
    """Whatever can tell what it would have said at each token of a batch."""

    def signal(self, inputs: dict[str, Tensor], labels_N: Tensor) -> TeacherSignal:
        """What the teacher says.

        Args:
            inputs: the student's inputs: `input_ids` (B, T) and what goes with them, and `rows`, see `llmlite.training.trainer.LossMaker`.
            labels_N: labels of the next token, -100 where a token does not count.
        """
        ...


class LiveTeacher:
    """A model that runs on every batch, without gradients.

    Args:
        model: in eval mode, on any device or dispatched over several.
        watching: entered around its forward pass, to see what happens inside.
        cut: every process holds a slice of the model (`llmlite.models.tensor_parallel`) and asks for signals as often as the others do.
    """

    def __init__(self, model: PreTrainedModel, watching: Callable[[], AbstractContextManager[None]] = nullcontext, cut: bool = False) -> None:
        self.model, self.watching, self.cut = model, watching, cut

    def signal(self, inputs: dict[str, Tensor], labels_N: Tensor) -> HiddenTeacher:
        """Its last hidden states, and its head."""
        return self.read({name: value for name, value in inputs.items() if name != "rows"})

    def read(self, inputs: dict[str, Any], where_N: Tensor | None = None) -> HiddenTeacher:
        """Run the model on its own inputs."""
        device = self.model.get_input_embeddings().weight.device
        for batch, own in _of_all_processes(inputs) if self.cut else [(inputs, True)]:
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            with torch.no_grad(), self.watching():
                found = hidden_and_head(self.model, moved)
            if own:
                hidden_BTD, head, transform = found
        return HiddenTeacher(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head, transform=transform, where_N=where_N)


def _of_all_processes(inputs: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    """The batches of all processes, each different one once and in the same order everywhere, and whether it is this process's own."""
    given = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, given)
    different: list[dict[str, Any]] = []
    for batch in gathered:
        if not any(_same(batch, other) for other in different):
            different.append(batch)
    return [(batch, _same(batch, given)) for batch in different]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name] for name, value in one.items()
    )


class AlignedSignal:
    """Logits over the teacher's vocabulary, and which tokens have a counterpart."""

    def __init__(self, hidden: HiddenTeacher, aligned_N: Tensor) -> None:
        self.hidden, self.aligned_N = hidden, aligned_N

    def signal(self, rows_C: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """`(logits_CW, aligned_C)`."""
        return (*self.hidden.signal(rows_C, device), self.aligned_N[rows_C.to(self.aligned_N.device)].to(device))


class AlignedTeacher:
    """A live teacher with a tokenizer of its own, for losses that compare across vocabularies. See `llmlite.distillation.uld`.

    Args:
        teacher: the model.
        student_tokenizer, teacher_tokenizer: fast tokenizers.
        most_tokens: longest text the teacher can read.
    """

    def __init__(
        self, teacher: LiveTeacher, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, most_tokens: int | None = None
    ) -> None:
        self.teacher, self.student_tokenizer, self.teacher_tokenizer, self.most_tokens = teacher, student_tokenizer, teacher_tokenizer, most_tokens

    def signal(self, inputs: dict[str, Tensor], labels_N: Tensor) -> AlignedSignal:
        """Every example with a counted token, read by the teacher in its own tokens."""
        ids_BT = inputs["input_ids"]
        labels_BT = labels_N.reshape(ids_BT.shape)
        where_BT = torch.full(ids_BT.shape, -1, dtype=torch.int64)
        found = []
        for row, places in examples_of(inputs):
            if bool((labels_BT[row, places] != IGNORE_INDEX).any()):
                found.append((row, places, align(ids_BT[row, places].tolist(), self.student_tokenizer, self.teacher_tokenizer)))
        texts = [{"input_ids": (a.teacher_ids or [0])[: self.most_tokens], "labels": []} for _, _, a in found] or [{"input_ids": [0], "labels": []}]
        batch = PaddedCollator()(texts)
        width = batch["input_ids"].shape[1]
        for index, (row, places, alignment) in enumerate(found):
            where_T = torch.tensor(alignment.places)
            where_BT[row, places] = torch.where((where_T >= 0) & (where_T < width), where_T + index * width, -1)
        where_N = where_BT.flatten()
        hidden = self.teacher.read({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, where_N.clamp(min=0))
        return AlignedSignal(hidden, where_N >= 0)


@dataclass(frozen=True)
class TeacherModel:
    """Which model teaches, and how it is loaded. Nothing is read before it is asked for.

    Attributes:
        run: of the student.
        name: ``base`` for the model the run started from, else a Hub id or folder.
        dtype: as `Model.dtype`.
        quantization: load it in 8 or 4 bit by bitsandbytes; None as it is.
        device_map: ``auto``, ``balanced`` or ``sequential`` (see `Model.device_map`), or a device such as ``cuda:1``; None for the student's device, or for
            where the base lies.
        max_memory: bytes by device, for the first three.
        cut: over the processes of the launch (`llmlite.models.tensor_parallel`).
    """

    run: Run
    name: str = "base"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Scheme | None = None
    device_map: str | None = None
    max_memory: str | None = None
    cut: bool = False

    @property
    def is_base(self) -> bool:
        """Whether it is the model the run started from."""
        return self.name == "base"

    @cached_property
    def settings(self) -> Model:
        """As settings of a model."""
        from llmlite.models.settings import Model

        base = self.run.recipe.model
        dtype = base.dtype if self.dtype == "auto" else self.dtype
        return replace(base, dtype=dtype) if self.is_base else Model(name=self.name, dtype=dtype)

    @cached_property
    def laid_out(self) -> Model:
        """The settings with `device_map`, where llmlite decides block by block; a quantized model and an unknown architecture are left to transformers."""
        if self.device_map not in SPREADING or self.quantization or getattr(self.config, "quantization_config", None) is not None or not self._known:
            return self.settings
        return replace(self.settings, device_map=self.device_map, max_memory=self.max_memory)  # type: ignore[arg-type]  # one of its names

    @property
    def _known(self) -> bool:
        from llmlite.models.families import family_of

        try:
            return bool(family_of(self.config))
        except UnsupportedModel:
            return False

    def source(self, weights: bool) -> Source:
        """Where it is; see `llmlite.models.find.find`."""
        from llmlite.models.find import find

        return find(self.settings, weights)

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its config. That of the base has lost the tokens that the student has lost by now."""
        from llmlite.models.load import load_config
        from llmlite.models.vocabulary import narrowed_config

        if not self.is_base:
            return load_config(self.source(weights=False), self.settings)
        narrowed: PretrainedConfig = narrowed_config(self.run.config, self._kept) if self._kept else self.run.config
        return narrowed

    @property
    def _kept(self) -> list[int]:
        """Ids of the base's vocabulary that a step before has left, in the order of the student's; empty where all are there, and of another teacher."""
        vocabulary = self.run.vocabulary if self.is_base else None
        return [] if vocabulary is None else [int(index) for index in vocabulary.kept_K]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        from llmlite.models.load import load_tokenizer

        return self.run.tokenizer if self.is_base else load_tokenizer(self.source(weights=False), self.settings)

    def identity(self) -> list[Any]:
        """Plain values that change when its signals would."""
        from llmlite.models.find import config_text, weight_files

        folder = self.source(weights=True).folder
        return [str(folder.resolve()), config_text(folder), weight_files(folder), self._kept, str(self.compute_dtype), self.quantization]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type it computes in."""
        from llmlite.models.load import compute_dtype

        return compute_dtype(self.run.device, self.settings.dtype)

    @property
    def split(self) -> bool:
        """Whether each process holds a share of its blocks while the student trains, as it does of the student: under FSDP2, where nothing says where it goes.
        A block is whole while it computes, so each process reads its own rows."""
        placed = self.quantization or self.device_map or getattr(self.config, "quantization_config", None) is not None
        return self.run.layout.kind == "fsdp2" and not placed and self._known

    def expected_bytes(self, beside: bool = False) -> int:
        """Bytes of its weights on this process's device; of an architecture that is not in the families table, those of its files.

        Args:
            beside: the student, in training; see `split`.
        """
        from llmlite.models.device_map import dispatch_map, held_bytes
        from llmlite.models.families import family_of
        from llmlite.models.find import weight_files
        from llmlite.models.size import expected_bytes, size_of_config

        if not self._known:
            return sum(size for _, size, _ in weight_files(self.source(weights=False).folder))
        found = None if self.quantization else dispatch_map(self.config, self.laid_out, self.compute_dtype, self.run.device)
        if found is not None:
            return held_bytes(self.config, found, self.compute_dtype, self.run.device)
        whole = expected_bytes(self.config, dtype=self.compute_dtype, scheme=self.quantization, double_quant=True)
        processes = self.run.layout.processes if self.cut or (beside and self.split) else 1
        decoder = self.compute_dtype.itemsize * size_of_config(self.config).decoder
        gathered = decoder // max(1, family_of(self.config).layers(self.config)) if beside and self.split else 0
        return whole - decoder * (processes - 1) // processes + gathered

    def packs(self) -> bool:
        """Whether it keeps packed examples apart by their positions, as far as is known."""
        from llmlite.models.families import family_of

        return self._known and family_of(self.config).packs_by_position

    def load(self, beside: bool = False) -> PreTrainedModel:
        """The model, frozen, in eval mode.

        Args:
            beside: the student, in training; see `split`. Otherwise it may be let go before, and processes may run it a different number of times.

        Raises:
            UnsupportedModel: an architecture that is not in the families table, and makes something else of its logits than its config says.
        """
        from llmlite.models.load import load_model
        from llmlite.models.view import ModelView
        from llmlite.models.vocabulary import narrow_model
        from llmlite.training.sharded import share_out

        options: dict[str, Any] = {"tensor_parallel": self.cut}
        if beside and self.split:
            options["device_map"] = {"": "cpu"}  # the device takes its share only
        if self.device_map and self.laid_out.device_map == "none":
            options["device_map"] = self.device_map
            options |= {"max_memory": memory_limits(self.max_memory)} if self.max_memory else {}
        if self.quantization:
            from llmlite.quantization.bnb import Quantize

            options["quantization_config"] = Quantize(scheme=self.quantization, unaligned="skip").bitsandbytes_config(ModelPlan(self.config), self.run)
        model = load_model(self.source(weights=True), self.laid_out, self.run.device, **options)
        if self._kept:
            model = narrow_model(model, self._kept).eval()
        model.requires_grad_(False)
        if not self._known:
            try:
                require_known_logits(model)
            except UnsupportedModel as error:
                raise UnsupportedModel(f"teacher '{self.name}': {error} Its answers can be had: step distill.blackbox, teacher: serve:{self.name}.") from None
        if beside and self.split:
            share_out(model, [block.module for block in ModelView(model).blocks], self.run.device)
        return model
