"""Collecting: the cache, the budget, the limit of requests under way, and ending early. The client is a function; what HTTP does is tested elsewhere."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmlite.distillation.api.asking import Asking
from llmlite.distillation.api.cache import Answers, Spent, request_key
from llmlite.distillation.api.client import Fatal, Raw, Rejected, Unanswered
from llmlite.distillation.api.collect import Budget, Collected, collect
from llmlite.distillation.api.prompts import Question, questions_of, read_prompts
from llmlite.errors import ApiError, Interrupted, OutputError

ASKING = Asking("m", "text", 5, 10, 0.0)


def question(number: int) -> Question:
    return Question([{"role": "user", "content": f"q{number}"}], {"prompt": f"q{number}"}, "", f"row {number}")


class Teacher:
    """Answers after a moment, and remembers."""

    url = "http://teacher/v1"

    def __init__(self, answer: Callable[[str], Any] = lambda asked: f"a{asked}", seconds: float = 0.0, usage: bool = True) -> None:
        self.answer, self.seconds, self.usage = answer, seconds, usage
        self.asked: list[str] = []
        self.under_way = self.most = self.connections = 0
        self.lock = threading.Lock()

    def ask(self, endpoint: str, body: dict[str, Any]) -> Raw:
        asked = body["messages"][-1]["content"]
        with self.lock:
            self.asked.append(asked)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(self.seconds)
        with self.lock:
            self.under_way -= 1
        said = self.answer(asked)
        if isinstance(said, Exception):
            raise said
        body = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
        return Raw(body | ({"usage": {"prompt_tokens": 4, "completion_tokens": 6}} if self.usage else {}), 0)

    @contextmanager
    def connect(self) -> Iterator[Any]:
        self.connections += 1
        yield self


def gather(teacher: Teacher, answers: Answers, numbers: range, **options: Any) -> Collected:
    values: dict[str, Any] = {"budget": Budget(), "concurrency": 4, "asked_by": "run", "count_tokens": lambda _: 4, "progress": False, **options}
    samples = values.pop("samples", 1)
    return collect([question(n) for n in numbers], samples, ASKING, "t", teacher.connect, answers, **values)


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    opened = Answers(tmp_path / "cache" / "answers.sqlite")
    yield opened
    opened.close()


def texts(found: Collected) -> list[str]:
    return [body["choices"][0]["message"]["content"] for _, body in found.answers]


def test_answers_come_in_the_order_of_the_questions_and_never_more_than_the_limit_are_under_way(answers: Answers) -> None:
    teacher = Teacher(seconds=0.01)
    found = gather(teacher, answers, range(20), concurrency=3)
    assert texts(found) == [f"aq{n}" for n in range(20)]
    assert teacher.most == 3
    assert found.counts["asked"] == 20
    assert found.used == Spent(20, 80, 120)


def test_a_second_collection_asks_nothing_and_opens_no_connection(answers: Answers) -> None:
    gather(Teacher(), answers, range(6))
    again = Teacher()
    found = gather(again, answers, range(6), asked_by="another run")
    assert (again.connections, found.counts["from_cache"], found.used) == (0, 6, Spent())
    assert texts(found) == [f"aq{n}" for n in range(6)]


def test_only_what_is_new_is_asked(answers: Answers) -> None:
    gather(Teacher(), answers, range(4))
    teacher = Teacher()
    gather(teacher, answers, range(6))
    assert sorted(teacher.asked) == ["q4", "q5"]


def test_samples_of_one_question_are_asked_separately(answers: Answers) -> None:
    teacher = Teacher()
    assert len(gather(teacher, answers, range(2), samples=3).answers) == 6
    assert len(answers) == 6


@pytest.mark.parametrize(
    ("budget", "asked", "by"),
    [
        (Budget(requests=5), 5, "max_requests"),
        (Budget(tokens=75), 7, "max_tokens_total"),  # 10 each, and 4 + 10 set aside for the next
        (Budget(cost=0.0005, input_price=10.0, output_price=10.0), 4, "max_cost"),
        (Budget(requests=100), 12, None),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 5])
def test_a_budget_stops_cleanly_and_is_never_crossed(answers: Answers, budget: Budget, asked: int, by: str | None, concurrency: int) -> None:
    teacher = Teacher(seconds=0.002)
    found = gather(teacher, answers, range(12), budget=budget, concurrency=concurrency)
    assert (len(teacher.asked), found.stopped_by, len(found.answers)) == (asked, by, asked)
    assert found.counts["not_asked"] == 12 - asked
    assert budget.crossed(found.used) is None


def test_the_budget_of_a_run_spans_its_starts(answers: Answers) -> None:
    gather(Teacher(), answers, range(12), budget=Budget(requests=5))
    teacher = Teacher()
    found = gather(teacher, answers, range(12), budget=Budget(requests=8))
    assert (len(teacher.asked), found.used.requests) == (3, 8)


def test_questions_without_an_answer_count_over_the_starts_of_a_run(answers: Answers) -> None:
    bad = {"q0": Rejected("too long"), "q1": Unanswered("500")}

    def start(most: int) -> tuple[list[str], Collected]:
        teacher = Teacher(lambda asked: bad.get(asked, "yes"))
        found = gather(teacher, answers, range(12), budget=Budget(requests=most), concurrency=1)
        return teacher.asked, found

    assert start(3)[0] == ["q0", "q1", "q2"]
    asked, found = start(5)  # two of them are left
    assert (asked, found.used.requests, found.stopped_by) == (["q0", "q1"], 5, "max_requests")
    assert start(5)[0] == []
    assert answers.spent("another run") == Spent()


def test_the_progress_line_shows_the_rate_the_tokens_and_the_cost(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    line, bar = io.StringIO(), tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bar(**{**options, "file": line, "delay": 0, "mininterval": 0}))
    gather(Teacher(seconds=0.01), answers, range(6), progress=True, budget=Budget(input_price=10.0, output_price=10.0))
    shown = line.getvalue().replace("\r", "\n").splitlines()
    assert "asking the teacher" in shown[-1]
    assert "6/6" in shown[-1]
    assert re.search(r"[\d.]+ ?(answer/s|s/answer)", shown[-1])
    assert "cost=0.0006" in shown[-1]  # six times ten tokens at 10 a million
    assert "tokens=60" in shown[-1]
    line.truncate(0)
    gather(Teacher(), answers, range(8), progress=True)
    assert "cost" not in line.getvalue()  # nobody said what it costs


def test_without_usage_what_was_set_aside_counts(answers: Answers) -> None:
    found = gather(Teacher(usage=False), answers, range(2))
    assert (found.used, found.counts["without_usage"]) == (Spent(2, 8, 20), 2)


def test_refused_and_lost_questions_are_counted_and_the_others_go_on(answers: Answers) -> None:
    bad = {"q1": Rejected("too long"), "q3": Unanswered("500")}
    found = gather(Teacher(lambda asked: bad.get(asked, "yes")), answers, range(6))
    assert (len(found.answers), found.counts["rejected"], found.counts["unanswered"]) == (4, 1, 1)
    assert len(answers) == 4  # what failed is asked again next time


def test_a_server_that_answers_nothing_ends_the_collecting(answers: Answers) -> None:
    teacher = Teacher(lambda asked: Unanswered("503: busy") if asked > "q0" else "yes")
    with pytest.raises(ApiError, match=r"10 questions in a row got no answer.*503: busy.*1 answer is kept so far"):
        gather(teacher, answers, range(100), concurrency=1)
    assert len(teacher.asked) == 11


@pytest.mark.parametrize("error", [Fatal("no money"), ZeroDivisionError("a bug")])
def test_a_fatal_refusal_and_a_bug_end_it_at_once(answers: Answers, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        gather(Teacher(lambda _: error), answers, range(50))


def test_a_stop_lets_what_was_asked_arrive(answers: Answers) -> None:
    teacher = Teacher(seconds=0.05)
    with pytest.raises(Interrupted, match="of 30 answers collected; they are kept"):
        gather(teacher, answers, range(30), stop=lambda: len(teacher.asked) >= 6)
    assert len(answers) == len(teacher.asked) < 30


def test_once_all_is_collected_only_the_cache_is_read(answers: Answers) -> None:
    gather(Teacher(), answers, range(3))
    teacher = Teacher()
    found = gather(teacher, answers, range(5), ask_nothing=True)
    assert (teacher.connections, len(found.answers), found.counts["not_asked"]) == (0, 3, 2)


# The cache -----------------------------------------------------------------------------------------------------------------------------


def test_the_key_depends_on_everything_that_is_sent() -> None:
    keys = {
        request_key("t", "chat", {"model": "a"}, 0),
        request_key("u", "chat", {"model": "a"}, 0),
        request_key("t", "completions", {"model": "a"}, 0),
        request_key("t", "chat", {"model": "b"}, 0),
        request_key("t", "chat", {"model": "a"}, 1),
    }
    assert len(keys) == 5
    assert request_key("t", "chat", {"a": 1, "b": 2}, 0) == request_key("t", "chat", {"b": 2, "a": 1}, 0)


def test_an_answer_is_never_replaced(answers: Answers) -> None:
    for text in ("first", "second"):
        answers.add("k", "t", {}, {"said": text}, Spent(1, 1, 1), "r")
    assert answers.get("k") == {"said": "first"}


def test_a_damaged_answer_is_asked_again(answers: Answers) -> None:
    answers.add("k", "t", {}, {"said": "x"}, Spent(1, 1, 1), "r")
    answers._database.execute("update answers set answer = x'00'")
    assert answers.get("k") is None


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    file.write_text("my thesis, my thesis, my thesis, my thesis, my thesis, my thesis, my thesis, my thesis, my thesis" * 3)
    with pytest.raises(OutputError, match="cannot be used"):
        Answers(file)
    assert file.read_text().startswith("my thesis")


# What is asked -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "asked"),
    [
        ("p.jsonl", '{"prompt": "one?"}\n{"prompt": ""}\n{"prompt": "two?"}\n', ["one?", "two?"]),
        ("p.jsonl", '{"instruction": "add", "input": "1 2"}\n', ["add\n\n1 2"]),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n', ["hi"]),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n', ["hi"]),
        ("p.csv", "question,system\nwhy?,be brief\n", ["be brief", "why?"]),
        ("p.jsonl", '{"prompt": "one?"}\n{"prompt": "one?"}\n', ["one?"]),
    ],
)
def test_prompts_without_answers(tmp_path: Path, name: str, content: str, asked: list[str]) -> None:
    (tmp_path / name).write_text(content)
    found = questions_of(read_prompts(str(tmp_path / name)))
    assert [message["content"] for one in found for message in one.asked] == asked  # type: ignore[union-attr, index]
