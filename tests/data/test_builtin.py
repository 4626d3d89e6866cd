from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import textwrap

from llmlite.data.builtin import python_docs
from llmlite.data.text import read_splits

_IN_ANOTHER_PROCESS = """
import hashlib, sys
from llmlite.data.builtin import python_docs
docs = python_docs()
print(hashlib.sha256(repr((docs.pairs, docs.prose)).encode()).hexdigest())
print(sorted({"antigravity", "this", "tkinter", "idlelib", "test", "turtle", "torch", "datasets"} & set(sys.modules)))
"""


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_the_interpreter_documents_itself():
    docs = python_docs()
    assert len(docs.pairs) > 1500
    assert len(docs.prose) > 50
    answer = next(answer for question, answer in docs.pairs if "`textwrap.shorten`" in question)
    assert answer.startswith("`textwrap.shorten(text, width, **kwargs)`\n\n")
    assert _words(textwrap.shorten.__doc__ or "") in _words(answer)


def test_counts_add_up():
    docs = python_docs()
    counts = docs.counts
    assert counts["documented_names"] == counts["too_short_or_long"] + counts["near_duplicates"] + counts["pairs"]
    assert counts["pairs"] == len(docs.pairs)
    assert counts["prose_blocks"] == len(docs.prose)


def test_questions_vary_and_are_not_repeated():
    questions = [question for question, _ in python_docs().pairs]
    assert len({re.sub(r"`.*`", "", question) for question in questions}) > 10
    assert len(set(questions)) == len(questions)


def test_no_answer_stands_in_two_splits():
    splits = read_splits("builtin:python-docs")
    seen: dict[str, str] = {}
    for name, rows in splits.items():
        assert len(rows) > 100
        for row in rows.rows:
            docstring = _words(row["completion"].split("`\n\n", 1)[-1])
            assert seen.setdefault(docstring, name) == name


def test_no_paragraph_of_the_prose_stands_in_two_splits():
    seen: dict[str, str] = {}
    for name, rows in read_splits("builtin:python-docs-prose").items():
        for row in rows.rows:
            for paragraph in row["text"].split("\n\n"):
                assert seen.setdefault(_words(paragraph) or paragraph, name) == name or len(_words(paragraph)) == 0


def test_another_process_reads_the_same_imports_no_joke_and_no_torch():
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", _IN_ANOTHER_PROCESS], env=environment, capture_output=True, text=True, check=True)
    docs = python_docs()
    assert run.stdout.split() == [hashlib.sha256(repr((docs.pairs, docs.prose)).encode()).hexdigest(), "[]"]
    assert run.stderr == ""
