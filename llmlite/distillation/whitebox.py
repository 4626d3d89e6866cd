"""The step `distill.whitebox`: train the model towards its teacher's whole distribution.

    loss = ce_weight * CE(text) + kd_weight * T^2 * divergence(teacher, student)  [+ losses inside the models]

Only the teacher's last hidden states are ever kept, computed beside the student or once to disk (`llmlite.distillation.cache`), and both heads are applied
chunk by chunk, so no full logits of either exist. Half cross entropy, half forward KL healed best in our measurements; from a badly broken student reverse KL
and JSD go nowhere, since they ask the student's own samples.

Source: Hinton et al. 2015, arXiv:1503.02531, section 2; the divergences name theirs in `llmlite.distillation.losses`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from llmlite.config import settings
from llmlite.distillation.student import StudentStep
from llmlite.errors import ConfigError, counted
from llmlite.models.adapted import longest_of
from llmlite.models.device_map import SPREADING, MemoryLimits
from llmlite.paths import PathText
from llmlite.step import ModelPlan, Scheme
from llmlite.training.settings import NonNegative, PositiveInt

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llmlite.context import Run
    from llmlite.distillation.cache import TeacherCache
    from llmlite.distillation.inner import InnerLosses
    from llmlite.distillation.teacher import Teacher, TeacherModel
    from llmlite.layout import Layout
    from llmlite.training.trainer import Companion, LossMaker

__all__ = ["DistillWhiteBox"]

log = logging.getLogger(__name__)

Divergence = Literal["forward_kl", "reverse_kl", "generalised_jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation", "logit_mse", "uld"]
_OPTIONS = {"beta": ("generalised_jsd",), "alpha": ("skewed_forward_kl", "skewed_reverse_kl")}


def _pairs_of(value: Any) -> Any:
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value) if isinstance(value, list | tuple) else value


LayerMap = Annotated[tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...], pydantic.BeforeValidator(_pairs_of)]
"""Pairs of a student layer and a teacher layer, each numbered from 0."""


@settings
class DistillWhiteBox(StudentStep):
    """Train the model, or an adapter on it, towards a teacher whose weights are at hand."""

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate of AdamW. None: 1e-4 for all weights; for adapters by the model's width, 1.3e-3 at 576, 2.9e-4 at 4,096."""
    teacher: PathText = "base"
    """base: the model this run started from. Else a Hub id or folder of a model with the same vocabulary (uld: any)."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the teacher is computed in. auto: as the student's base."""
    teacher_quantization: Scheme | None = None
    """Load the teacher in 8 or 4 bit, by bitsandbytes."""
    teacher_device_map: str | None = None
    """Where the teacher goes: auto, balanced or sequential spread its blocks over devices, main memory and disk (see --device_map), in one process; cuda:1 or
    cpu name one device. None: the student's device, or where the base lies."""
    teacher_max_memory: MemoryLimits = None
    """teacher_device_map only: bytes that its weights may take, by device: 0=20GB,cpu=60GB. None: nine tenths of what is free."""
    teacher_tp_plan: Literal["none", "auto"] = "none"
    """auto: cut the teacher over the processes of the launch, so that each holds a slice of its blocks; all of them read each batch together."""
    cache: Literal["auto", "none", "hidden", "top_k"] = "auto"
    """What is kept of the teacher on disk, for later epochs and runs: hidden (its last hidden states; exact), top_k (its likeliest tokens; smaller, forward_kl
    only), none. auto: what is there already, else what fits when about every row is read."""
    cache_top_k: PositiveInt = 64
    """top_k only: likeliest tokens kept for each position."""
    cache_gigabytes: Annotated[float, Field(gt=0)] = 20.0
    """auto only: largest cache to make, in 10^9 bytes; never more than half of what is free on the disk."""
    divergence: Divergence = "forward_kl"
    """Distance between teacher and student, for each token. uld compares across different tokenizers."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both distributions are softened by it; the divergence is multiplied by its square, so that gradients keep their size."""
    beta: Annotated[float, Field(ge=0, le=1)] | None = None
    """generalised_jsd only: the teacher's share of the mixture; towards 0 it acts like forward KL, towards 1 like reverse KL. None: 0.5."""
    alpha: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Skewed divergences only: how much of the other distribution is mixed in. None: 0.1."""
    ce_weight: NonNegative = 0.5
    """Weight of cross entropy on the text."""
    kd_weight: NonNegative = 0.5
    """Weight of the divergence from the teacher."""
    hidden_weight: NonNegative = 0.0
    """Weight of matching hidden states of paired layers. Where widths differ a projection is learnt for it, and thrown away."""
    hidden_loss: Literal["mse", "cosine"] = "mse"
    """How hidden states are compared: mse, relative to the teacher's mean square, or cosine."""
    attention_weight: NonNegative = 0.0
    """Weight of matching attention maps of paired layers. Computes attention eagerly, which is slower."""
    layer_map: LayerMap = ()
    """Pairs [student layer, teacher layer] for the two losses above, numbered from 0. Left out: every student layer with the teacher's at the same depth."""
    on_policy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the batches whose answers the student writes itself while the teacher says what it would have said (GKD)."""
    on_policy_tokens: PositiveInt = 128
    """Longest answer the student writes, in tokens; never longer than the one in the text."""

    # Before any weight is loaded -------------------------------------------------------------------------------------------------------

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`.

        Raises:
            ConfigError: everything that cannot work, together: weights, options of other losses, a cache that the losses cannot use, tokenizers that differ.
            LoadError: the teacher is not there.
        """
        from llmlite.models.size import expected_bytes, runtime_bytes

        teacher = self.teacher_model(run)
        problems = [*self._problems_of_losses(), *self._problems_of_cache(), *self.problems_of_student(model), *self._problems_of_teacher(model, teacher, run)]
        problems += [*self._problems_of_layout(teacher, run), *self._problems_of_vocabulary(model.config, teacher, run)]
        if problems:
            raise ConfigError("distill.whitebox", problems)
        notes = [f"{self.ce_weight:g} CE + {self.kd_weight:g} {self.divergence} to {self.teacher}, {self.student_in_words(model)}"]
        notes += [f"{self.hidden_weight:g} hidden states ({self.hidden_loss})"] if self.hidden_weight else []
        notes += [f"{self.attention_weight:g} attention maps"] if self.attention_weight else []
        notes += [f"{self.on_policy:.0%} of the batches written by the student"] if self.on_policy else []
        plan = self.student_plan(model, run)
        # while a cache is filled the whole teacher is there beside a student that does not train yet
        filling = teacher.expected_bytes() + expected_bytes(model.config, dtype=run.compute_dtype) + runtime_bytes(run.device)
        if self.cache in {"hidden", "top_k"}:
            text = teacher.config.get_text_config()
            head = teacher.compute_dtype.itemsize * int(text.vocab_size) * int(text.hidden_size) if self.cache == "hidden" else 0
            peak = max(plan.peak_bytes + head, filling)
            notes.append(f"the teacher's {'last hidden states' if self.cache == 'hidden' else counted(self.cache_top_k, 'likeliest token')} kept on disk")
        else:
            peak = max(plan.peak_bytes + teacher.expected_bytes(beside=True), filling if self.cache == "auto" else 0)
            notes += [f"each of {run.layout.processes} processes holds a share of the teacher's blocks"] if teacher.split else []
        return dataclasses.replace(plan, peak_bytes=peak, notes=(*notes, *plan.notes))

    def teacher_model(self, run: Run) -> TeacherModel:
        """The teacher as the settings say."""
        from llmlite.distillation.teacher import TeacherModel

        cut = self.teacher_tp_plan == "auto"
        return TeacherModel(run, self.teacher, self.teacher_dtype, self.teacher_quantization, self.teacher_device_map, self.teacher_max_memory, cut)

    def _problems_of_losses(self) -> list[str]:
        problems = []
        if self.ce_weight == self.kd_weight == self.hidden_weight == self.attention_weight == 0:
            problems.append("ce_weight and kd_weight are both 0, so there is nothing to learn.")
        elif self.kd_weight == self.hidden_weight == self.attention_weight == 0:
            problems.append("kd_weight=0 leaves nothing to learn from the teacher. Give it weight, or use the step finetune or lora, which need no teacher.")
        for name, users in _OPTIONS.items():
            if getattr(self, name) is not None and self.divergence not in users:
                problems.append(f"{name}={getattr(self, name):g} is an option of {' and '.join(users)}; divergence is {self.divergence}.")
        if self.layer_map and not (self.hidden_weight or self.attention_weight):
            problems.append("layer_map pairs layers for hidden_weight and attention_weight, and both are 0.")
        if self.on_policy and not self.kd_weight:
            problems.append(f"on_policy={self.on_policy:g} trains on answers of the student by the divergence alone, and kd_weight is 0.")
        return problems

    def _live_reasons(self) -> list[str]:
        """Options that need the teacher beside the student."""
        reasons = {"hidden_weight": self.hidden_weight, "attention_weight": self.attention_weight, "on_policy": self.on_policy}
        return [name for name, value in reasons.items() if value] + (["divergence=uld"] if self.divergence == "uld" else [])

    def _problems_of_cache(self) -> list[str]:
        if self.cache in {"auto", "none"}:
            return []
        if self._live_reasons():
            return [f"cache={self.cache} cannot serve {', '.join(self._live_reasons())}, for which the teacher must run. Use cache: none, or auto."]
        if self.cache == "top_k" and self.divergence != "forward_kl":
            return [f"divergence={self.divergence} needs the whole distribution; of the likeliest tokens only forward_kl can be computed. Use cache: hidden."]
        return []

    def _problems_of_layout(self, teacher: TeacherModel, run: Run) -> list[str]:
        """What keeps the teacher from lying where it should."""
        from llmlite.models.tensor_parallel import indivisible

        problems, spreads, processes = [], self.teacher_device_map in SPREADING, run.layout.processes
        if self.teacher_max_memory and not spreads:
            problems.append(
                f"teacher_max_memory={self.teacher_max_memory} limits what teacher_device_map: auto, balanced or sequential may use. Set one of them."
            )
        if spreads and processes > 1:
            problems.append(
                f"teacher_device_map={self.teacher_device_map} spreads one teacher over all devices from one process; this launch has {processes} with one "
                "each. teacher_tp_plan: auto cuts it over them, cache: hidden lets it go before the student trains."
            )
        if self.teacher_tp_plan == "none":
            return problems
        if self.teacher_device_map or self.teacher_quantization:
            problems.append("teacher_tp_plan=auto cuts a dense teacher over the processes; leave teacher_device_map and teacher_quantization out.")
        if run.layout.sharded:
            problems.append(f"teacher_tp_plan=auto under {run.layout.name} is not built. Launch it with recipes/accelerate/ddp.yaml, or use cache: hidden.")
        if self.hidden_weight or self.attention_weight:
            problems.append("hidden_weight and attention_weight look inside of the teacher, which teacher_tp_plan=auto cuts. Leave one of them out.")
        return problems + [f"teacher: {problem}" for problem in indivisible(teacher.config, processes)]

    def _problems_of_vocabulary(self, config: PretrainedConfig, teacher: TeacherModel, run: Run) -> list[str]:
        """What keeps a teacher from reading the ids of a student that a step before has taken tokens from."""
        if run.vocabulary is None and config.get_text_config().vocab_size >= run.config.get_text_config().vocab_size:
            return []
        if not teacher.is_base:
            if self.divergence == "uld":
                return []
            return [
                f"teacher '{self.teacher}': tokens have gone from the student's vocabulary, so the same id is another token to the two. Use teacher: base, "
                "which loses them too, put this step before prune.vocabulary, or use divergence: uld."
            ]
        ways = {"teacher_quantization": self.teacher_quantization, "teacher_device_map": self.teacher_device_map in SPREADING}
        ways["teacher_tp_plan"] = self.teacher_tp_plan != "none"
        return [
            f"{name} with teacher: base behind prune.vocabulary is not built: the teacher loses the same tokens, dense and on one device. Leave it out, or put "
            "this step before prune.vocabulary."
            for name, used in ways.items()
            if used
        ]

    def _problems_of_teacher(self, model: ModelPlan, teacher: TeacherModel, run: Run) -> list[str]:
        from llmlite.distillation.vocab import compare
        from llmlite.models.families import family_of

        problems = []
        config = teacher.config.get_text_config()
        if self.teacher_quantization and getattr(teacher.config, "quantization_config", None) is not None:
            problems.append(f"teacher_quantization={self.teacher_quantization}: the teacher '{self.teacher}' is quantized already.")
        longest = longest_of(config)
        if self.divergence == "uld":
            slow = [who for who, tokenizer in (("student", run.tokenizer), ("teacher", teacher.tokenizer)) if not getattr(tokenizer, "is_fast", False)]
            if slow:
                problems.append(f"divergence=uld aligns characters and needs fast tokenizers; the {' and the '.join(slow)} has none.")
        else:
            found = compare(run.tokenizer, teacher.tokenizer, int(config.vocab_size)) if not teacher.is_base else None
            for index, ours, theirs in found.renamed[:4] if found else ():
                log.warning("distill.whitebox: the special token %d is %s to the student and %s to the teacher", index, ours, theirs)
            if found and found.missing:
                log.warning(
                    "distill.whitebox: the teacher was never taught %s of the student, first %s", counted(len(found.missing), "token"), found.missing[0]
                )
            if found and found.problem:
                problems.append(
                    f"teacher '{self.teacher}' and student: {found.problem}. What one learns from the other by ids would be nonsense; "
                    "divergence: uld compares across tokenizers."
                )
            if run.recipe.data.packing and run.packs and not teacher.packs():
                problems.append(f"teacher '{self.teacher}' ({teacher.config.model_type}) does not keep packed examples apart. Set packing: false.")
            if longest and run.recipe.data.max_length > longest:
                problems.append(f"max_length={run.recipe.data.max_length} should be at most {longest}, the longest sequence that the teacher allows.")
        if self.hidden_weight or self.attention_weight:
            layers = [family_of(c).layers(c) for c in (model.config, teacher.config)]
            wrong = [pair for pair in self.layer_map if pair[0] >= layers[0] or pair[1] >= layers[1]]
            if wrong:
                problems.append(
                    f"layer_map: {', '.join(str(list(pair)) for pair in wrong[:4])}: "
                    f"the student has layers 0 to {layers[0] - 1}, the teacher 0 to {layers[1] - 1}."
                )
        return problems

    # With weights ----------------------------------------------------------------------------------------------------------------------

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Get the teacher's signals, train."""
        return self.train_student(model, run, lambda student: self._taught(student, run))

    def no_sharding(self, form: str, layout: Layout) -> str:
        """See `TrainingStep.no_sharding`."""
        if self.hidden_weight or self.attention_weight or self.on_policy:
            return f"hidden_weight, attention_weight and on_policy under {layout.name} are not built yet. Launch it with recipes/accelerate/ddp.yaml."
        return super().no_sharding(form, layout)

    def peak_learning_rate(self, hidden_size: int) -> float:
        """The learning rate as asked, else 1e-4."""
        return self.learning_rate or 1e-4

    def loss_with(self, teacher: Teacher) -> LossMaker:
        """The loss of a batch, with what the teacher says of it. A batch that the student wrote itself has no cross entropy."""
        from llmlite.distillation.objective import Distillation

        options = {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}
        return lambda inputs, labels_N: Distillation(
            teacher.signal(inputs, labels_N),
            labels_N if "rows" in inputs else None,
            divergence=self.divergence,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            **options,
        )

    @contextmanager
    def _taught(self, student: PreTrainedModel, run: Run) -> Iterator[tuple[LossMaker, Companion | None]]:
        """The loss and what goes with it; the teacher is let go at the end."""
        from llmlite.distillation.teacher import AlignedTeacher, LiveTeacher

        source = self.teacher_model(run)
        if problems := self._problems_of_vocabulary(student.config, source, run):  # texts of the Hub are read only now, and only they say what goes
            raise ConfigError("distill.whitebox", problems)
        cache = self._chosen_cache(source, run)
        if cache is not None:
            cache.fill(run, lambda: LiveTeacher(source.load(), cut=source.cut), self.per_device_train_batch_size)
            run.note(teacher_cache=cache.kind, teacher_cache_bytes_per_token=cache.bytes_per_token)
            yield self.loss_with(cache.read(run.device)), None
            return
        model = source.load(beside=True)
        inner = self._inner(student, model, run)
        live = LiveTeacher(model, cut=source.cut) if inner is None else LiveTeacher(model, inner.watching_teacher)
        teacher: Teacher = live
        if self.divergence == "uld":
            teacher = AlignedTeacher(live, run.tokenizer, source.tokenizer, longest_of(source.config))
        try:
            yield self.loss_with(teacher), self._companion(inner, student, run)
        finally:
            if inner is not None:
                inner.close()

    def _chosen_cache(self, teacher: TeacherModel, run: Run) -> TeacherCache | None:
        import shutil

        from llmlite.distillation.cache import Kind, TeacherCache, choose_kind, kinds_on_disk
        from llmlite.storage import cache_folder

        if self.cache == "none" or self._live_reasons():
            return None
        data = run.train_data
        key = data.fingerprint()
        caches: dict[Kind, TeacherCache] = {kind: TeacherCache(teacher, data, kind, self.cache_top_k, self.temperature, key) for kind in ("hidden", "top_k")}
        if self.cache != "auto":
            return caches[self.cache]

        def choose() -> Kind | None:
            steps = run.max_steps(self)
            rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * run.processes.num_processes
            place = cache_folder()
            place.mkdir(parents=True, exist_ok=True)
            return choose_kind(
                {kind: cache.bytes_per_token * data.counts.trained_tokens for kind, cache in caches.items()},
                whole=self.divergence != "forward_kl",
                passes=steps * rows / len(data.dataset) if steps else self.num_train_epochs,
                limit_bytes=int(min(1e9 * self.cache_gigabytes, shutil.disk_usage(place).free / 2)),
                complete=kinds_on_disk(caches),
            )

        kind = run.agreed(choose() if run.is_main else None)
        return caches[kind] if kind else None

    def _inner(self, student: PreTrainedModel, teacher: PreTrainedModel, run: Run) -> InnerLosses | None:
        if not (self.hidden_weight or self.attention_weight):
            return None
        from llmlite.distillation.inner import InnerLosses, InnerWeights, layer_pairs
        from llmlite.models.view import ModelView
        from llmlite.training.checkpoints import newest_complete

        pairs = self.layer_map or layer_pairs(len(ModelView(student).blocks), len(ModelView(teacher).blocks))
        checkpoint = newest_complete(run.scratch / "trainer") if run.is_main else None
        return InnerLosses(
            student,
            teacher,
            pairs,
            InnerWeights(self.hidden_weight, self.attention_weight, self.hidden_loss),
            seed=run.recipe.seed,
            checkpoint=run.agreed(checkpoint),
        )

    def _companion(self, inner: InnerLosses | None, student: PreTrainedModel, run: Run) -> Companion | None:
        if not self.on_policy:
            return inner
        from llmlite.distillation.on_policy import OnPolicy

        ends = student.generation_config.eos_token_id if student.generation_config is not None else None
        ends = run.tokenizer.eos_token_id if ends is None else ends
        end_ids = tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
        return OnPolicy(self.on_policy, self.on_policy_tokens, end_ids, run.tokenizer.pad_token_id or 0, inner)
