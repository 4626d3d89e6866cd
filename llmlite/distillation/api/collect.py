"""Ask every question once, several at a time, within a budget, keeping each answer the moment it arrives.

Threads do nothing but wait for the server; one loop gives them work, keeps what they bring and counts. Before a request leaves, the most it can cost is set
aside, so that the budget is not crossed by what is under way. Ctrl-C lets what was asked arrive; a kill loses only that.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from llmlite.distillation.api.asking import Asking
from llmlite.distillation.api.cache import Answers, Spent, request_key
from llmlite.distillation.api.client import Client, Raw, Rejected, Unanswered
from llmlite.distillation.api.prompts import Question
from llmlite.errors import ApiError, Interrupted, counted

__all__ = ["Budget", "Collected", "collect"]

log = logging.getLogger(__name__)

_HOPELESS = 10
"""Questions in a row without an answer after which no more are asked."""
_DRAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Budget:
    """What may be used, over all starts of a run; None for no limit.

    Attributes:
        requests: questions sent, with or without an answer.
        tokens: read and written together.
        cost: in the currency of the prices.
        input_price, output_price: for a million tokens read or written by the teacher.
    """

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    input_price: float = 0.0
    output_price: float = 0.0

    def price(self, used: Spent) -> float:
        """What that cost."""
        return (used.prompt_tokens * self.input_price + used.completion_tokens * self.output_price) / 1e6

    def crossed(self, used: Spent) -> str | None:
        """The limit that this would cross, by its option's name, or None."""
        if self.requests is not None and used.requests > self.requests:
            return "max_requests"
        if self.tokens is not None and used.prompt_tokens + used.completion_tokens > self.tokens:
            return "max_tokens_total"
        return "max_cost" if self.cost is not None and self.price(used) > self.cost else None


@dataclass
class Collected:
    """What came of the questions.

    Attributes:
        answers: (question, body) in the order of the questions.
        counts: asked, from_cache, rejected, unanswered, retries, without_usage, not_asked.
        used: by this run, over all its starts.
        stopped_by: the limit that ended it, or None.
        seconds: spent waiting.
    """

    answers: list[tuple[Question, dict[str, Any]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    used: Spent = field(default_factory=Spent)
    stopped_by: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Task:
    place: int
    question: Question
    body: dict[str, Any]
    key: str
    most: Spent


def collect(
    questions: Sequence[Question],
    samples: int,
    asking: Asking,
    teacher: str,
    connect: Callable[[], AbstractContextManager[Client]],
    answers: Answers,
    *,
    budget: Budget,
    concurrency: int,
    asked_by: str,
    count_tokens: Callable[[Question], int],
    stop: Callable[[], bool] = lambda: False,
    ask_nothing: bool = False,
    progress: bool = True,
) -> Collected:
    """Gather the answers to all questions.

    Args:
        questions: what to ask.
        samples: answers to each.
        asking: the parameters.
        teacher: names the server in the cache.
        connect: opens the connection; not called when everything is in the cache.
        answers: the cache.
        budget: limits.
        concurrency: requests under way at once.
        asked_by: names this run in the cache, over all its starts.
        count_tokens: estimate of what a question makes the teacher read.
        stop: asked often; once true, nothing more is asked.
        ask_nothing: use the cache alone; what is not there is left out.
        progress: show a bar.

    Raises:
        Interrupted: `stop` became true.
        ApiError: the server refuses everything, or stays silent.
    """
    found: dict[int, tuple[Question, dict[str, Any]]] = {}
    waiting: deque[_Task] = deque()
    result = Collected(used=answers.spent(asked_by))
    for place, (question, sample) in enumerate((question, sample) for question in questions for sample in range(samples)):
        body = asking.body(question)
        key = request_key(teacher, question.endpoint, body, sample)
        known = answers.get(key)
        if known is not None:
            found[place] = (question, known)
        else:
            waiting.append(_Task(place, question, body, key, Spent(1, count_tokens(question), asking.written_tokens)))
    result.counts["from_cache"] = len(found)
    if waiting and not ask_nothing:
        started = time.perf_counter()
        result.stopped_by = budget.crossed(_sum(result.used, waiting[0].most))
        if result.stopped_by is None:
            with connect() as client, _bar(len(found) + len(waiting), len(found), progress) as bar:
                _Loop(client, waiting, found, result, teacher, answers, budget, concurrency, asked_by, stop, bar).run()
        result.seconds = time.perf_counter() - started
    result.counts["not_asked"] = len(waiting)
    result.answers = [found[place] for place in sorted(found)]
    return result


@dataclass
class _Loop:
    """The loop of `collect` and its state.

    Attributes:
        client, teacher, answers, budget, concurrency, asked_by, stop: see `collect`.
        waiting: what is still to be asked, in order.
        found: place of a question -> the question and its answer.
        result: counts, and what was used.
        bar: goes on with every answer.
        work: for the threads; None ends one.
        back: from the threads.
        under_way: what they have, by place.
        in_a_row, last: questions without an answer since the last one that had one, and what was said of the latest.
    """

    client: Client
    waiting: deque[_Task]
    found: dict[int, tuple[Question, dict[str, Any]]]
    result: Collected
    teacher: str
    answers: Answers
    budget: Budget
    concurrency: int
    asked_by: str
    stop: Callable[[], bool]
    bar: Any
    work: queue.SimpleQueue[_Task | None] = field(default_factory=queue.SimpleQueue)
    back: queue.SimpleQueue[tuple[_Task, Raw | Exception]] = field(default_factory=queue.SimpleQueue)
    under_way: dict[int, _Task] = field(default_factory=dict)
    in_a_row: int = 0
    last: str = ""

    def run(self) -> None:
        """Until nothing is left, or something ends it."""
        for _ in range(min(self.concurrency, len(self.waiting))):
            threading.Thread(target=self._worker, daemon=True).start()
        deadline = None
        try:
            while True:
                stopping = self.stop() or self.in_a_row >= _HOPELESS
                if not stopping:
                    self._hand_out()
                elif deadline is None:
                    deadline = time.monotonic() + _DRAIN_SECONDS
                if not self.under_way or (deadline is not None and time.monotonic() > deadline):
                    break
                try:
                    task, outcome = self.back.get(timeout=0.2)
                except queue.Empty:
                    continue
                del self.under_way[task.place]
                self._take(task, outcome)
        finally:
            for _ in range(self.concurrency):
                self.work.put(None)
        if self.stop():
            raise Interrupted(f"stopped with {len(self.found)} of {counted(len(self.found) + len(self.waiting), 'answer')} collected; they are kept.")
        if self.in_a_row >= _HOPELESS:
            raise ApiError(
                f"distill.blackbox: {self.in_a_row} questions in a row got no answer from {self.client.url}, the last: {self.last}. "
                f"{counted(len(self.found), 'answer is', 'answers are')} kept so far; the same command continues."
            )

    def _hand_out(self) -> None:
        while self.waiting and len(self.under_way) < self.concurrency and self.result.stopped_by is None:
            reserved = _sum(self.result.used, *(task.most for task in self.under_way.values()), self.waiting[0].most)
            crossed = self.budget.crossed(reserved)
            if crossed and self.under_way:
                return  # what is under way may turn out shorter than was set aside for it
            self.result.stopped_by = crossed
            if crossed is None:
                task = self.waiting.popleft()
                self.under_way[task.place] = task
                self.work.put(task)

    def _take(self, task: _Task, outcome: Raw | Exception) -> None:
        counts = self.result.counts
        if isinstance(outcome, Raw):
            used = _usage(outcome.body, task)
            counts.update(asked=1, retries=outcome.retries, without_usage=int(not isinstance(outcome.body.get("usage"), dict)))
            self.answers.add(task.key, self.teacher, task.body, outcome.body, used, self.asked_by)
            self.result.used = _sum(self.result.used, used)
            self.found[task.place] = (task.question, outcome.body)
            self.in_a_row = 0
            self.bar.update(1)
            shown = {"tokens": f"{self.result.used.prompt_tokens + self.result.used.completion_tokens:,}"}
            if self.budget.input_price or self.budget.output_price:
                shown["cost"] = f"{self.budget.price(self.result.used):.4f}"
            self.bar.set_postfix(shown, refresh=False)
        elif isinstance(outcome, Rejected | Unanswered):
            counts["rejected" if isinstance(outcome, Rejected) else "unanswered"] += 1
            self.answers.add_failed(task.key, self.asked_by)
            self.result.used = _sum(self.result.used, Spent(1, 0, 0))
            self.in_a_row, self.last = self.in_a_row + 1, str(outcome)
            log.info("%s: %s: %s", task.question.place, "refused by the server" if isinstance(outcome, Rejected) else "no answer", outcome)
        else:
            raise outcome

    def _worker(self) -> None:
        while (task := self.work.get()) is not None:
            try:
                self.back.put((task, self.client.ask(task.question.endpoint, task.body)))
            except Exception as error:  # what the client says, or a bug: the loop shall die of that, not this thread alone
                self.back.put((task, error))


def _sum(*spent: Spent) -> Spent:
    return Spent(sum(one.requests for one in spent), sum(one.prompt_tokens for one in spent), sum(one.completion_tokens for one in spent))


def _usage(body: dict[str, Any], task: _Task) -> Spent:
    """What the server says an answer used, else what was set aside for it."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return task.most
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Spent(1, read if isinstance(read, int) else task.most.prompt_tokens, written if isinstance(written, int) else task.most.completion_tokens)


def _bar(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="answer", desc="asking the teacher", disable=not shown, delay=1.0)
