"""What a step gets besides the model: the recipe, where the base is, tokens, a scratch folder, the device, and a place for its figures."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmlite.layout import Layout
from llmlite.models.adapted import longest_of
from llmlite.models.find import Source, find
from llmlite.models.load import compute_dtype, load_config, load_model, load_tokenizer

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmlite.data.prepare import Prepared
    from llmlite.data.split import Split
    from llmlite.data.vocabulary import Vocabulary
    from llmlite.evaluation.quality import Reference
    from llmlite.recipe import Recipe
    from llmlite.training.settings import TrainingStep

__all__ = ["Run"]

T = TypeVar("T")
_PATIENCE = datetime.timedelta(hours=12)
"""How long processes wait for each other: the main one downloads, writes and is timed alone, which takes a large model longer than the ten minutes that NCCL
waits. That one has died is noticed by the launcher, within seconds."""


@dataclass
class Run:
    """One execution of a recipe on one process.

    Nothing is loaded before it is asked for, so the same object serves `check`. `scratch` is a folder of the current step that survives
    a kill and goes when the step is complete.
    """

    recipe: Recipe
    scratch: Path = Path()
    notes: dict[str, Any] = field(default_factory=dict)
    position: int = 0
    """Place of the step that is planned or applied now."""
    corrected: set[int] = field(default_factory=set)
    """Places of the steps whose adapter starts as the correction of the quantization; the plan decides it (`llmlite.adapters.lora`)."""
    blockwise: bool = False
    """Whether models are loaded block by block; the plan decides it (`llmlite.plan`)."""
    tensor_parallel: bool = False
    """Whether models are cut over the processes, which then all read the same rows (`llmlite.models.tensor_parallel`)."""
    vocabulary: Vocabulary | None = None
    """Which of the base's tokens are left, once a step has taken some away."""

    @cached_property
    def processes(self) -> PartialState:
        """The processes of this launch, one unless torchrun or accelerate started more. Without an accelerator they talk over gloo."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(), timeout=_PATIENCE)

    @cached_property
    def layout(self) -> Layout:
        """How this launch lays a model out over its processes."""
        return Layout.of_launch()

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.processes.device
        return device

    @cached_property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return bool(self.processes.is_main_process)

    def wait(self) -> None:
        """Return when every process has come here."""
        self.processes.wait_for_everyone()

    def agreed(self, value: T) -> T:
        """The main process's value, on every process: decisions about files are made once."""
        from accelerate.utils import broadcast_object_list

        values = [value]
        if self.processes.num_processes > 1:
            broadcast_object_list(values)
        return values[0]

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """The type of activations, by device and settings."""
        return compute_dtype(self.device, self.recipe.model.dtype)

    @cached_property
    def storage_dtype(self) -> torch.dtype:
        """The type of weights in files: the base's own."""
        from llmlite.models.save import storage_dtype

        return storage_dtype(self.config)

    @cached_property
    def device_map(self) -> dict[str, int | str] | None:
        """Where the parts of the base lie by `model.device_map`; None when one device holds all of it."""
        from llmlite.models.device_map import dispatch_map

        return dispatch_map(self.config, self.recipe.model, self.compute_dtype, self.device)

    @cached_property
    def dispatched_bytes(self) -> int:
        """Bytes of the base's weights on this process's device, where `device_map` is not None."""
        from llmlite.models.device_map import held_bytes

        return held_bytes(self.config, self.device_map or {}, self.compute_dtype, self.device)

    @cached_property
    def source(self) -> Source:
        """The base model's folder. During a check only configuration and tokenizer are fetched."""
        return find(self.recipe.model, weights=False)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The base model's config."""
        return load_config(self.source, self.recipe.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model as it is now: the base's, until a step takes tokens away."""
        return load_tokenizer(self.source, self.recipe.model)

    @property
    def grown_vocabulary(self) -> int | None:
        """Rows of the embedding, where the added tokens need more than the base has; None otherwise."""
        before = load_config(self.source, dataclasses.replace(self.recipe.model, add_tokens=())).vocab_size
        return int(self.config.vocab_size) if self.config.vocab_size > before else None

    def use_vocabulary(self, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
        """Go on with fewer tokens. What was tokenised is tokenised again when it is next asked for; only the held-out text keeps the base's tokens, so that
        figures before and after are of the same ones."""
        _ = self.evaluation_data
        self.vocabulary, self.tokenizer = vocabulary, tokenizer
        for name in ("train_data", "calibration_windows"):
            self.__dict__.pop(name, None)

    def take_vocabulary(self, folder: Path) -> None:
        """Go on with the tokens of the model in a folder, where it says that some have gone."""
        from llmlite.data.vocabulary import VOCABULARY, Vocabulary

        if (folder / VOCABULARY).is_file():
            self.use_vocabulary(Vocabulary.read(folder / VOCABULARY), load_tokenizer(Source(str(folder), folder, None), self.recipe.model))

    def load_base(self) -> PreTrainedModel:
        """The dense base model, anew, with the tokens that are left: the default teacher, and the start of most recipes."""
        self.source = find(self.recipe.model, weights=True)
        model = self.load(self.source.folder, **({} if self.device_map is None else {"device_map": self.device_map}))
        if self.vocabulary is None:
            return model
        from llmlite.models.vocabulary import narrow_model

        narrowed: PreTrainedModel = narrow_model(model, self.vocabulary.kept_K.tolist())
        return narrowed

    def load(self, folder: Path, **options: Any) -> PreTrainedModel:
        """The model in a folder, whole, or of a blockwise run one block at a time.

        Args:
            folder: a stock folder.
            options: `dtype`, `device_map` and `quantization_config`, where they are not the run's own.
        """
        if not self.blockwise:
            return load_model(folder, self.recipe.model, self.device, tensor_parallel=self.tensor_parallel, **options)
        from llmlite.models.blockwise import load_blockwise

        self.recipe.folder.mkdir(parents=True, exist_ok=True)
        return load_blockwise(folder, self.recipe.model, self.device, spill=self.recipe.folder, **options)

    def base_name(self) -> str:
        """How an adapter should name its base: the Hub id where there is one, never a path of this machine that nobody else has."""
        return self.source.hub_id or Path(self.source.name).name

    @property
    def own_scratch(self) -> Path:
        """A part of `scratch` that no other process writes: for what every process works out for itself. Of a blockwise run it is the same for all, since what
        is kept there is as large as the model."""
        return self.scratch if self.is_main or self.blockwise else self.scratch / f"process-{self.processes.process_index}"

    @property
    def logs(self) -> Path:
        """Where trackers of the current step's training write. It stays when the step is complete."""
        return self.recipe.folder / "runs" / self.scratch.name.removesuffix(".work")

    def note(self, **figures: Any) -> None:
        """Keep figures of the current step for its row in the report."""
        self.notes.update(figures)

    # Data -----------------------------------------------------------------------------------------------------------------------------

    def check_data(self) -> None:
        """Raise a clear error when the data cannot be used; reads only the first rows."""
        from llmlite.calibration.mixture import SELF, parse_mixture
        from llmlite.data.text import check_source

        data = self.recipe.data
        calibration = [source for _, source in parse_mixture(self.calibration) if source != SELF]
        for source in dict.fromkeys(filter(None, (data.train, data.evaluation, *calibration))):
            check_source(source, **self.columns())

    @cached_property
    def evaluation_data(self) -> Prepared:
        """Held-out rows, never trained on."""
        data = self.recipe.data
        if data.evaluation is not None:
            return self._prepare(data.evaluation, None, data.evaluation_rows)
        return self._prepare(data.train, "test", data.evaluation_rows)

    @property
    def longest_text(self) -> int | None:
        """Tokens of text that the base and what every step makes of it read; see `llmlite.models.adapted.longest_of`."""
        return longest_of(self.config, max((getattr(step, "num_virtual_tokens", 0) for step in self.recipe.steps), default=0))

    def _require_places(self, longest: int) -> None:
        """Tokens in pieces make rows longer; a learned table of positions ends."""
        from llmlite.errors import DataError
        from llmlite.models.families import family_of

        most = self.longest_text
        if family_of(self.config).position_embedding and most and longest > most:
            raise DataError(
                f"data: a held-out row has {longest} tokens once those that went are written in pieces, and the model has {most} positions. Lower max_length."
            )

    @cached_property
    def train_data(self) -> Prepared:
        """Rows to train on, tokenised and packed when first asked for."""
        return self._prepare(self.recipe.data.train, "train", self.recipe.data.max_train_rows)

    @contextmanager
    def training_on(self, data: Prepared) -> Iterator[None]:
        """Within the block `train_data` is this: rows that a step made, for instance a teacher's answers."""
        before = self.__dict__.get("train_data")
        self.train_data = data
        try:
            yield
        finally:
            del self.train_data
            if before is not None:
                self.train_data = before

    def evaluation_batches(self, rows: int = 4) -> list[dict[str, Tensor]]:
        """Held-out rows as model inputs on the CPU, in a fixed order.

        Where tokens have gone, they are written by those that are left, and ``starts`` marks where the base's tokens begin; see `measure_quality`.
        """
        data, collate, found = self.evaluation_data, self.evaluation_data.collator(), []
        for start in range(0, len(data.dataset), rows):
            part: list[Any] = [data.dataset[i] for i in range(start, min(start + rows, len(data.dataset)))]
            if self.vocabulary is None:
                found.append(collate(part))
            else:
                part = [self.vocabulary.expand_row(row) for row in part]
                found.append(collate(part) | {"starts": self._starts(part)})
        return found

    def in_present_tokens(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Batches of one row each (``input_ids``, ``labels``) in the base's tokens, written in those that are left. See `evaluation_batches`."""
        import torch

        if self.vocabulary is None:
            return batches
        found = []
        for batch in batches:
            row = self.vocabulary.expand_row({name: batch[name][0].tolist() for name in ("input_ids", "labels")})
            found.append({name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} | {"starts": self._starts([row])})
        return found

    def over_present_tokens(self, reference: Reference) -> Reference:
        """The base's distributions over the tokens that are left, made to add up to 1."""
        import torch

        return reference if self.vocabulary is None else reference.over(torch.from_numpy(self.vocabulary.kept_K))

    def _starts(self, rows: list[dict[str, list[int]]]) -> Tensor:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        self._require_places(width)
        return torch.tensor([[*row["starts"], *[0] * (width - len(row["starts"]))] for row in rows])

    def max_steps(self, step: TrainingStep) -> int | None:
        """Optimizer steps of a training step, or None when the rows and `num_train_epochs` decide."""
        return self.recipe.max_steps or step.max_steps

    def training_tokens(self, step: TrainingStep) -> int:
        """Tokens a training step reads at most; 0 when only the data, not yet read, will tell."""
        steps = self.max_steps(step)
        rows = step.per_device_train_batch_size * step.gradient_accumulation_steps * self.layout.processes
        return steps * rows * self.recipe.data.max_length if steps else 0

    @property
    def calibration(self) -> str:
        """The calibration text as a mixture; by default half of it is written by the model itself, which generalises better than any one text. A model that is
        loaded block by block cannot write (each token would read all of it), so there the default is the training text alone."""
        data = self.recipe.data
        return data.calibration or (f"0.5*self + 0.5*{data.train}" if self.recipe.model.load == "whole" else data.train)

    @cached_property
    def calibration_windows(self) -> Tensor:
        """Calibration token ids, int64, (windows, tokens), made when first asked for."""
        from llmlite.calibration.sources import calibration_windows

        with self.processes.main_process_first():  # what it samples from the model is in the cache for the others
            return calibration_windows(self)

    def columns(self) -> dict[str, Any]:
        """Which columns of the data are read, as `read_rows` takes them."""
        data = self.recipe.data
        return {
            "text_column": data.text_column,
            "prompt_column": data.prompt_column,
            "completion_column": data.completion_column,
            "messages_column": data.messages_column,
        }

    def _prepare(self, source: str, split: Split | None, max_rows: int | None) -> Prepared:
        from llmlite.data.prepare import prepare

        data = self.recipe.data
        return prepare(
            source,
            self.tokenizer,
            data.max_length,
            split=split,
            packing=data.packing and self.packs,
            seed=self.recipe.seed,
            most_rows=max_rows,
            progress=self.is_main,
            **self.columns(),
        )

    @cached_property
    def packs(self) -> bool:
        """Whether the model keeps packed examples apart by their positions."""
        from llmlite.models.families import family_of

        return family_of(self.config).packs_by_position
