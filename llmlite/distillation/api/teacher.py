"""The teacher of a `distill.blackbox` step: where it is, how it is reached, what it is asked.

Somebody else's server, or a model of one's own (`serve:base`, `serve:NAME`) that is served on the loopback interface for as long as it is asked.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import fingerprint, near
from llmlite.distillation.api.asking import Asking, probed
from llmlite.distillation.api.cache import Answers, Spent, request_key
from llmlite.distillation.api.client import OPENAI_URL, Client, Endpoint, environment_url, is_loopback, key_of
from llmlite.distillation.api.prompts import Question, questions_of, read_prompts
from llmlite.distillation.api.serve import served
from llmlite.errors import ApiError, counted
from llmlite.models.adapted import longest_of
from llmlite.models.find import Source, find, model_files
from llmlite.models.load import load_config, load_tokenizer
from llmlite.models.settings import Model
from llmlite.storage import cache_folder

if TYPE_CHECKING:
    from llmlite.context import Run
    from llmlite.distillation.blackbox import DistillBlackBox

__all__ = ["ADAPTED", "SERVE", "ApiTeacher"]

log = logging.getLogger(__name__)

SERVE = "serve:"
_SOME = 200  # questions whose lengths stand for all
ADAPTED = ("mode", "top", "limit")
"""Fields of `Asking` that a server may want otherwise."""


@dataclass
class ApiTeacher:
    """A step's settings and a run, as a teacher."""

    step: DistillBlackBox
    run: Run

    @property
    def own(self) -> str | None:
        """What is served here, or None when the teacher is somebody else's."""
        return self.step.teacher.removeprefix(SERVE) if self.step.teacher.startswith(SERVE) else None

    @property
    def url(self) -> str:
        """Somebody else's address: as asked, else from the environment, else OpenAI's."""
        return (self.step.base_url or environment_url() or OPENAI_URL).rstrip("/")

    @property
    def asking(self) -> Asking:
        """The parameters as configured."""
        step = self.step
        return Asking(step.teacher, step.mode, step.top_logprobs, step.max_answer_tokens, step.temperature)

    @cached_property
    def identity(self) -> str:
        """What names the teacher in the cache: the address, or the model that is served: its weights, configs, tokenizer and template."""
        if self.own is None:
            return self.url
        return f"served {fingerprint(model_files(self.source.folder))}"

    # Connections ----------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator[Client]:
        """A connection to the teacher; one of one's own is served for as long."""
        run = self.run
        if self.own is None:
            with closing(self._client(self.url, key_of(self.step.api_key_env))) as client:
                yield client
            return
        device = "cpu" if run.device.type == "cpu" else str(run.device)
        with served(self.source.folder, device, str(run.compute_dtype).removeprefix("torch.")) as url, closing(self._client(url, None)) as client:
            yield client

    def _client(self, url: str, key: str | None) -> Client:
        return Client(url, key, self.step.request_timeout, self.step.max_retries)

    def answers(self) -> Answers:
        """The cache."""
        folder = Path(self.step.answers_cache).expanduser() if self.step.answers_cache else cache_folder() / "answers"
        return Answers(folder / "answers.sqlite")

    def names_at(self, url: str) -> str:
        """What a server calls its models, as the end of a sentence; nothing when it does not say."""
        try:
            with closing(self._client(url, None)) as client:
                listed = client.models(timeout=3.0)
        except ApiError:
            return ""
        return f" ({', '.join(listed[:5])})" if listed else ""

    def check(self, probe: bool) -> None:
        """See that somebody else's server is there, takes the key, and returns what is wanted.

        Args:
            probe: also ask it a short question.

        Raises:
            ApiError: it is not, or does not.
        """
        if key_of(self.step.api_key_env) and self.url.startswith("http:") and not is_loopback(self.url):
            log.warning("the key travels unencrypted to %s; https would hide it", self.url)
        with self.open() as client, closing(self.answers()) as answers:
            listed = client.models()
            if listed and self.step.teacher not in listed:
                guess = near(self.step.teacher, listed)
                hint = f"Did you mean '{guess}'?" if guess else f"It lists {', '.join(listed[:5])}."
                log.warning("%s does not list a model '%s'. %s", self.url, self.step.teacher, hint)
            if probe:
                _, given_up = self._probed(client, answers)
                if given_up:
                    log.warning("%s", given_up)

    def adapted(self, answers: Answers) -> Asking:
        """The parameters that work with this server.

        Raises:
            ApiError: none do.
        """
        if self.own is not None:
            return dataclasses.replace(self.asking, model=str(self.source.folder), mode="text")
        with self.open() as client:
            return self._probed(client, answers)[0]

    def _probed(self, client: Client, answers: Answers) -> tuple[Asking, str | None]:
        """See `probed`; what worked before is not asked again."""
        key = request_key(self.url, self._endpoint, dataclasses.asdict(self.asking), -1)
        known = answers.get(key)
        if known is not None:
            return dataclasses.replace(self.asking, **known), None
        found, given_up = probed(client, self.asking, self._endpoint, self.step.missing_logprobs == "downgrade")
        if given_up is None:
            answers.add(key, self.url, {}, {name: getattr(found, name) for name in ADAPTED}, Spent(), "probe")
        return found, given_up

    # Questions ------------------------------------------------------------------------------------------------------------------------

    @property
    def _endpoint(self) -> Endpoint:
        if self.step.endpoint != "auto":
            return self.step.endpoint
        from llmlite.data.text import check_source

        source = check_source(self.run.recipe.data.train, **self.run.columns())
        return "completions" if not self.step.prompts and source.kind == "text" else "chat"

    def questions(self) -> list[Question]:
        """What it is asked: the prompts of the training rows, or of a file."""
        from llmlite.data.text import read_rows

        endpoint, data = self.step.endpoint, self.run.recipe.data
        if endpoint == "auto" and self.own is not None and not self._chats:
            endpoint = "completions"
        rows = read_prompts(self.step.prompts) if self.step.prompts else read_rows(data.train, "train", **self.run.columns())
        return questions_of(rows if data.max_train_rows is None else rows.sample(data.max_train_rows, self.run.recipe.seed), endpoint)

    def with_room(self, questions: list[Question]) -> list[Question]:
        """The questions that leave the teacher a position for its answer, each with what it leaves; those of somebody else's teacher as they are.

        `transformers serve` reads and writes on behind the last position of a model, where a learned table ends with an error.
        """
        longest = None if self.own is None else longest_of(self.config())
        if longest is None:
            return questions
        placed = [dataclasses.replace(question, room=longest - self._read_tokens(question)) for question in questions]
        found = [question for question in placed if question.room and question.room > 0]
        if full := [question.place for question in placed if question not in found]:
            log.warning(
                "distill.blackbox: %s not asked, first %s: of the %d tokens that the teacher reads and writes together, none is left for the answer",
                counted(len(full), "question is", "questions are"),
                full[0],
                longest,
            )
        return found

    def _read_tokens(self, question: Question) -> int:
        """How many tokens a question makes a teacher of one's own read, by its tokenizer and template."""
        if isinstance(question.asked, str):
            return len(self._tokenizer(question.asked, verbose=False)["input_ids"])
        return len(self._tokenizer.apply_chat_template(question.asked, add_generation_prompt=True, return_dict=True)["input_ids"])

    def outlook(self) -> tuple[int, Spent] | None:
        """How many questions there are, and about what all answers use at most; None when only a download would tell."""
        from llmlite.data.text import check_source

        if not self.step.prompts and check_source(self.run.recipe.data.train, **self.run.columns()).kind is None:
            return None
        questions = self.questions()
        some = questions[:: max(1, len(questions) // _SOME)][:_SOME]
        asked = len(questions) * self.step.samples_per_prompt
        read = sum(map(self.tokens_of, some)) / max(1, len(some))
        return len(questions), Spent(asked, round(asked * read), asked * self.asking.written_tokens)

    def tokens_of(self, question: Question) -> int:
        """About how many tokens a question makes the teacher read, by the student's tokenizer."""
        texts = [question.asked] if isinstance(question.asked, str) else [str(message.get("content") or "") for message in question.asked]
        texts += [question.expected] * (self.step.mode == "prompt_logprobs")
        return sum(8 + len(self.run.tokenizer(text, verbose=False)["input_ids"]) for text in texts)

    # A model of one's own -------------------------------------------------------------------------------------------------------------

    @property
    def _model(self) -> Model:
        return self.run.recipe.model if self.own == "base" else Model(name=self.own or "")

    @cached_property
    def source(self) -> Source:
        """The folder that is served."""
        return find(self._model, weights=True)

    def config(self) -> Any:
        """Its config, without fetching weights."""
        return self.run.config if self.own == "base" else load_config(find(self._model, weights=False), self._model)

    @cached_property
    def _tokenizer(self) -> Any:
        return self.run.tokenizer if self.own == "base" else load_tokenizer(self.source, self._model)

    @property
    def _chats(self) -> bool:
        """Whether it has a chat template."""
        return bool(self._tokenizer.chat_template)
