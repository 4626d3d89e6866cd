"""The step `distill.blackbox`: train the model on what a teacher behind an API says.

    text              loss = CE(the teacher's answer)
    with logprobs     loss = ce_weight * CE(answer) + kd_weight * KL(teacher's likeliest tokens and one bucket for the rest || student)

The teacher is any OpenAI-compatible server, or a model that this step serves itself on the loopback interface while it asks. Questions come from the
training rows; every answer is kept (`llmlite.distillation.api.cache`), so no question is paid for twice.

Sources: Kim and Rush 2016, arXiv:1606.07947 (training on the teacher's sequences); Hinton et al. 2015, arXiv:1503.02531 (on its distributions).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import uuid
from collections import Counter
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from llmlite.config import settings
from llmlite.distillation.student import StudentStep
from llmlite.errors import ApiError, ConfigError, counted
from llmlite.paths import PathText
from llmlite.step import ModelPlan
from llmlite.training.settings import NonNegative, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.context import Run
    from llmlite.distillation.api.answers import Accepted, Lesson
    from llmlite.distillation.api.asking import Asking
    from llmlite.distillation.api.collect import Budget, Collected
    from llmlite.distillation.api.prompts import Question
    from llmlite.training.token_loss import TokenLoss
    from llmlite.training.trainer import LossMaker

__all__ = ["DistillBlackBox"]

log = logging.getLogger(__name__)

_REFUSALS = (
    r"(i'm|i am|we're|we are) (very |so |really )?(sorry|afraid|unable|not able)|(sorry|apologies|unfortunately),? (but )?i\b"
    r"|i (can't|cannot|can not|won't) (help|assist|answer|provide|comply|do that|fulfil)|as an ai\b"
)


@settings
class DistillBlackBox(StudentStep):
    """Train on what a teacher behind an API says: its answers, or its log-probabilities too."""

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate of AdamW. None: 5e-5 for all weights, by the model's width for an adapter."""
    teacher: PathText = "serve:base"
    """The model's name at the API; or serve:base, the model this run started from, served on loopback by the step itself; or serve: and a Hub id or folder."""
    base_url: str | None = None
    """Address of an OpenAI-compatible API, with its /v1. None: $OPENAI_BASE_URL, else OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself is never written anywhere."""
    mode: Literal["text", "top_logprobs", "prompt_logprobs"] = "text"
    """text: train on the teacher's answers. top_logprobs: also on its likeliest tokens at each place. prompt_logprobs: it scores the answers of your data
    (vLLM only)."""
    top_logprobs: Annotated[int, Field(ge=1, le=1000)] = 20
    """Log-probabilities asked for at each place. Most servers give at most 20."""
    missing_logprobs: Literal["refuse", "downgrade"] = "refuse"
    """What to do when the server returns fewer or none, which some do without a word: stop, or go on with what there is."""
    prompts: PathText | None = None
    """A file with prompts alone (JSONL, JSON, CSV, Parquet, TXT) to ask instead of those in the training rows."""
    endpoint: Literal["auto", "chat", "completions"] = "auto"
    """auto: chat for prompts and chats, completions for plain text, whose first half is continued."""
    samples_per_prompt: PositiveInt = 1
    """Answers to each prompt; more than one wants a temperature."""
    max_answer_tokens: PositiveInt = 512
    """Longest answer, in the teacher's tokens."""
    temperature: NonNegative | None = 0.0
    """Of the teacher's sampling; 0 is its likeliest answer. None: not sent, for servers that refuse it."""
    truncated: Literal["drop", "cut"] = "drop"
    """Answers that reach max_answer_tokens: left out, or trained on without an end."""
    refusals: str | None = _REFUSALS
    """Regular expression of how an answer begins that is a refusal and left out. None: only what the server itself marks."""
    concurrency: Annotated[int, Field(ge=1, le=512)] = 8
    """Requests under way at once."""
    max_retries: Annotated[int, Field(ge=0, le=50)] = 5
    """Further attempts of one request, with growing pauses or those that the server asks for (Retry-After)."""
    request_timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that one attempt may take."""
    max_requests: PositiveInt | None = None
    """Ask at most so often, over all starts of the run; then train on what there is."""
    max_tokens_total: PositiveInt | None = None
    """Let the teacher read and write at most so many tokens together."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Spend at most so much, in the currency of the prices."""
    input_price: NonNegative = 0.0
    """Price of a million tokens that the teacher reads."""
    output_price: NonNegative = 0.0
    """Price of a million tokens that the teacher writes."""
    answers_cache: PathText | None = None
    """Folder of the answers that are kept for good. None: answers/ in $LLMLITE_CACHE or the user's cache folder."""
    tail: Literal["bucket", "renormalise"] = "bucket"
    """What the tokens are that the teacher does not list: one more outcome with the rest of the probability, or impossible."""
    ce_weight: NonNegative = 0.5
    """Weight of cross entropy on the answers, beside log-probabilities."""
    kd_weight: NonNegative = 0.5
    """Weight of the divergence from the teacher's log-probabilities."""

    # Before the run -------------------------------------------------------------------------------------------------------------------

    def check(self, model: ModelPlan, run: Run) -> ModelPlan:
        """See `Step.check`. Asks the server for its models, and unless it is a dry run one short question.

        Raises:
            ConfigError: every setting that cannot work, together.
            ApiError: the server cannot be reached, refuses the key, or does not return what `mode` needs.
            DataError: no prompts.
        """
        from llmlite.distillation.api.prompts import read_prompts
        from llmlite.distillation.api.teacher import ApiTeacher

        problems = self._problems(model, run)
        if problems:
            raise ConfigError("distill.blackbox", problems)
        if self.prompts:
            read_prompts(self.prompts, first=20)
        teacher = ApiTeacher(self, run)
        if teacher.own is None and run.is_main:
            teacher.check(probe=not run.recipe.dry_run)
        return self._planned(model, run)

    def _problems(self, model: ModelPlan, run: Run) -> list[str]:
        from llmlite.distillation.api.client import endpoint_problems
        from llmlite.distillation.api.serve import missing_libraries
        from llmlite.distillation.api.teacher import ApiTeacher
        from llmlite.distillation.api.vocabulary import Vocabulary

        teacher = ApiTeacher(self, run)
        problems = []
        if teacher.own is None:
            problems += endpoint_problems(teacher.url, self.api_key_env)
            if "openai" in missing_libraries():
                problems.append("the openai library is not installed: pip install 'llmlite[api]'")
        else:
            if self.base_url:
                problems.append(
                    f"base_url is given and teacher is '{self.teacher}', which this step serves itself. Say teacher: and the model's name at {self.base_url}"
                    f"{teacher.names_at(self.base_url)}."
                )
            elif missing := missing_libraries():
                problems.append(f"teacher: {self.teacher} is served by transformers serve, which needs {', '.join(missing)}: pip install 'llmlite[serving]'")
            if self.mode != "text" and self.missing_logprobs == "refuse":
                problems.append(f"mode={self.mode}: transformers serve returns no log-probabilities. Use mode: text, or the step distill.whitebox.")
        if self.mode != "text" and not Vocabulary(run.tokenizer).usable:
            problems.append(
                f"mode={self.mode}: the tokens of the student cannot be read as bytes, so the teacher's cannot be found among them. Use mode: text."
            )
        if self.mode == "prompt_logprobs" and self.prompts:
            problems.append("mode=prompt_logprobs scores the answers of the data, and prompts holds none. Use top_logprobs, or leave prompts out.")
        if self.mode != "text" and self.ce_weight == self.kd_weight == 0:
            problems.append("ce_weight and kd_weight are both 0, so there is nothing to learn.")
        if self.samples_per_prompt > 1 and self.temperature == 0 and self.mode != "prompt_logprobs":
            problems.append(f"samples_per_prompt={self.samples_per_prompt} with temperature=0 asks for the same answer again. Raise temperature, to 0.7 say.")
        if self.samples_per_prompt > 1 and self.mode == "prompt_logprobs":
            problems.append("samples_per_prompt: in mode=prompt_logprobs the teacher writes nothing, so there is one score for each row.")
        if self.max_cost is not None and not (self.input_price or self.output_price):
            problems.append("max_cost needs input_price and output_price: what a million tokens cost.")
        if self.refusals:
            try:
                re.compile(self.refusals)
            except re.error as error:
                problems.append(f"refusals is no regular expression: {error}.")
        problems += self.problems_of_student(model)
        return problems

    def _planned(self, model: ModelPlan, run: Run) -> ModelPlan:
        from llmlite.distillation.api.teacher import ApiTeacher
        from llmlite.models.size import expected_bytes

        teacher = ApiTeacher(self, run)
        where = f"{self.teacher} at {teacher.url}" if teacher.own is None else f"{self.teacher}, served on loopback"
        limits = {"requests": self.max_requests, "tokens": self.max_tokens_total, "cost": self.max_cost}
        capped = ", ".join(f"{value:,} {name}" for name, value in limits.items() if value is not None)
        notes = [f"{self.mode} from {where}" + (f", stopping at {capped}" if capped else "")]
        outlook = teacher.outlook()
        if outlook:
            questions, most = outlook
            notes.append(f"{counted(questions, 'question')}, {counted(most.prompt_tokens, 'token')} to read, at most {most.completion_tokens:,} to write")
            if self.input_price or self.output_price:
                notes.append(f"at most {self._budget.price(most):,.2f} for all of it")
        if teacher.own is None and os.environ.get(self.api_key_env):
            notes.append(f"key from ${self.api_key_env}")
        plan = self.student_plan(model, run)
        notes += [self.student_in_words(model), *plan.notes]
        if teacher.own is not None:
            notes.append(f"the server takes another {expected_bytes(teacher.config(), dtype=run.compute_dtype) / 1e6:,.0f} MB while it answers")
        return dataclasses.replace(plan, notes=tuple(notes))

    # The run --------------------------------------------------------------------------------------------------------------------------

    def apply(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Ask, then train."""
        lesson = self._lesson(run)
        loss = self.loss_with(lesson) if lesson.signals else None
        with run.training_on(lesson.data):
            return self.train_student(model, run, lambda _: nullcontext((loss, None)))

    def loss_with(self, lesson: Lesson) -> LossMaker:
        """The loss of a batch with the teacher's log-probabilities for its tokens."""
        from llmlite.distillation.api.signals import signal_of
        from llmlite.distillation.objective import Distillation, TopKTeacher

        def make_loss(inputs: dict[str, Tensor], labels_N: Tensor) -> TokenLoss:
            ids_NK, logprobs_NK = signal_of(inputs, lesson.signals, self._candidates)
            return Distillation(TopKTeacher(ids_NK, logprobs_NK, self.tail), labels_N, ce_weight=self.ce_weight, kd_weight=self.kd_weight)

        return make_loss

    def _lesson(self, run: Run) -> Lesson:
        """Collect on the main process; everybody makes the same lesson of it."""
        from llmlite.distillation.api.answers import lesson_of

        kept: list[Accepted] = run.agreed(self._collect(run) if run.is_main else [])
        lesson = lesson_of(
            kept,
            f"What {self.teacher} answered",
            run.tokenizer,
            run.recipe.data.max_length,
            candidates=self._candidates if any(answer.positions for answer in kept) else 0,
            packing=run.recipe.data.packing and run.packs,
            seed=run.recipe.seed,
        )
        if run.is_main:
            log.info("%s", lesson.data.echo)
            trained = lesson.data.counts.trained_tokens
            if lesson.signals:
                log.info("the teacher's log-probabilities cover %d of %d trained tokens", lesson.counts["covered_tokens"], trained)
                if not lesson.counts["covered_tokens"]:
                    raise ApiError("distill.blackbox: none of the teacher's tokens could be placed in the student's. Use mode: text.")
        run.note(signal=dict(lesson.counts), examples=lesson.data.counts.examples)
        return lesson

    def _collect(self, run: Run) -> list[Accepted]:
        """The usable answers. Once all are collected, a note beside the step's checkpoints says so, and nothing is asked after that."""
        from llmlite.distillation.api.answers import accepted
        from llmlite.distillation.api.collect import collect
        from llmlite.distillation.api.teacher import ADAPTED, ApiTeacher
        from llmlite.storage import write_json
        from llmlite.training.checkpoints import StopRequest, stopping_at_signals

        teacher = ApiTeacher(self, run)
        questions, done = teacher.with_room(teacher.questions()), run.scratch / "collected.json"
        stop = StopRequest()
        with closing(teacher.answers()) as answers, stopping_at_signals(stop, "waiting for the answers that are under way"):
            known = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
            asking = dataclasses.replace(teacher.asking, **known) if known else teacher.adapted(answers)
            found = collect(
                questions,
                self.samples_per_prompt,
                asking,
                teacher.identity,
                teacher.open,
                answers,
                budget=self._budget,
                concurrency=self.concurrency,
                asked_by=_name_of_this_run(run.scratch),
                count_tokens=teacher.tokens_of,
                stop=lambda: stop.asked,
                ask_nothing=known is not None,
                progress=run.is_main,
            )
        kept, left_out = accepted(found.answers, asking.mode, self.truncated, self.refusals, self.missing_logprobs == "refuse")
        self._report(run, asking, questions, found, kept, left_out)
        if known is None:
            write_json(done, {name: getattr(asking, name) for name in ("model", *ADAPTED)})
        return kept

    def _report(self, run: Run, asking: Asking, questions: list[Question], found: Collected, kept: list[Accepted], left_out: Counter[str]) -> None:
        cost = self._budget.price(found.used)
        shown = {name: count for name, count in {**found.counts, **left_out}.items() if count}
        log.info("answers: %d of %d usable; %s", len(kept), len(questions) * self.samples_per_prompt, ", ".join(f"{k} {v}" for k, v in shown.items()))
        if found.stopped_by:
            log.warning("%s ended the collecting; training on %s", found.stopped_by, counted(len(kept), "answer"))
        run.note(
            teacher=self.teacher,
            mode=asking.mode,
            top_logprobs=asking.top if asking.mode != "text" else 0,
            questions=len(questions),
            answers=len(kept),
            collecting={**found.counts, **left_out, "stopped_by": found.stopped_by, "seconds": round(found.seconds, 1)},
            used={**dataclasses.asdict(found.used), "cost": cost},
        )
        if not kept:
            raise ApiError(
                f"distill.blackbox: no answer is usable ({', '.join(f'{k} {v}' for k, v in shown.items()) or 'none was asked for'}). {_advice(left_out)}"
            )

    @property
    def _candidates(self) -> int:
        return self.top_logprobs + 1  # the token itself need not be among the likeliest

    @property
    def _budget(self) -> Budget:
        from llmlite.distillation.api.collect import Budget

        return Budget(self.max_requests, self.max_tokens_total, self.max_cost, self.input_price, self.output_price)


def _name_of_this_run(scratch: Path) -> str:
    """A name that the starts of one run share: what it has used is counted together."""
    note = scratch / "asked_by.txt"
    if not note.is_file():
        note.write_text(uuid.uuid4().hex, encoding="utf-8")
    return note.read_text(encoding="utf-8")


def _advice(left_out: Counter[str]) -> str:
    if left_out["truncated"]:
        return "Most were cut: raise max_answer_tokens, or set truncated: cut."
    if left_out["refused"]:
        return "They look like refusals: look at what was asked, or set refusals."
    if left_out["without_logprobs"]:
        return "They came without log-probabilities: use mode: text, or missing_logprobs: downgrade."
    return "Look at the messages above."
