"""`builtin:python-docs`: real text that every machine already has, the documentation inside the Python interpreter.

Two sources, both read from the running interpreter, nothing downloaded or bundled:

- instruction pairs: a question about a public name of the standard library, answered by its signature and docstring. Python modules
  are parsed with `ast`, never imported (importing `antigravity` opens a browser, `this` prints); only a few C modules that are
  compiled into or loaded by every interpreter are looked at in place.
- prose: the language reference in `pydoc_data.topics`.

Texts that nearly repeat an earlier one are left out, so no answer can stand in both the training and the test split. The same
interpreter always gives the same rows in the same order; another Python version has other documentation.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmlite.errors import DataError

__all__ = ["PYTHON_DOCS", "PYTHON_DOCS_PROSE", "PythonDocs", "python_docs"]

PYTHON_DOCS = "builtin:python-docs"
PYTHON_DOCS_PROSE = "builtin:python-docs-prose"

# Not worth reading (tests, demos, tables of encodings) or jokes.
_SKIPPED = {"antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "nturl2path", "pydoc_data", "sre_compile"}
_SKIPPED |= {"sre_constants", "sre_parse", "test", "this", "tkinter", "turtle", "turtledemo"}
_C_MODULES = ("builtins", "itertools", "math", "sys", "time")

_SHORTEST_ANSWER, _LONGEST_ANSWER = 40, 4000  # characters
_SHORTEST_PROSE, _PROSE_BLOCK = 80, 2000  # characters
_SHINGLE_WORDS = 5

_QUESTIONS = {
    "function": (
        "What does `{name}` do?",
        "Explain what the Python function `{name}` does.",
        "How does `{name}` work in Python?",
        "Describe the function `{name}` from Python's standard library.",
        "I found `{name}` in some Python code. What is it for?",
    ),
    "method": (
        "What does the method `{name}` do?",
        "Explain the Python method `{name}`.",
        "When I call `{name}`, what happens?",
        "Describe the method `{name}` from Python's standard library.",
        "What is `{name}` for?",
    ),
    "class": (
        "What is the class `{name}`?",
        "Describe the Python class `{name}`.",
        "What is `{name}` used for in Python?",
        "Explain the class `{name}` from Python's standard library.",
        "When would I use `{name}`?",
    ),
    "module": (
        "What is the Python module `{name}` for?",
        "Describe the module `{name}` of Python's standard library.",
        "What does `import {name}` give me?",
        "Give an overview of Python's `{name}` module.",
    ),
}


@dataclass(frozen=True)
class _Entry:
    name: str
    kind: str
    signature: str
    docstring: str


@dataclass(frozen=True)
class PythonDocs:
    """What the interpreter had to say.

    Attributes:
        pairs: (question, answer), sorted by the documented name.
        prose: blocks of whole paragraphs, up to about 2,000 characters each.
        counts: documented names seen, and how many pairs and paragraphs were left out and why.
    """

    pairs: tuple[tuple[str, str], ...]
    prose: tuple[str, ...]
    counts: dict[str, int]


@functools.cache
def python_docs() -> PythonDocs:
    """Collect the pairs and the prose; about two seconds the first time, then remembered.

    Raises:
        DataError: the interpreter ships neither sources nor topics, as some embedded distributions do.
    """
    entries = sorted(_entries(), key=lambda entry: entry.name)
    counts = {"documented_names": len(entries)}
    usable = [entry for entry in entries if _SHORTEST_ANSWER <= len(entry.docstring) <= _LONGEST_ANSWER]
    counts["too_short_or_long"] = len(entries) - len(usable)
    distinct = _without_near_duplicates(usable)
    counts["near_duplicates"] = len(usable) - len(distinct)
    pairs = tuple((_question(entry), _answer(entry)) for entry in distinct)
    prose, counts["repeated_paragraphs"] = _prose()
    if not pairs or not prose:
        raise DataError(
            f"{PYTHON_DOCS}: this Python ({sys.executable}) ships without "
            f"{'the sources of its standard library' if not pairs else 'pydoc_data.topics'}, so there is no text to take. Name a data file instead."
        )
    counts |= {"pairs": len(pairs), "prose_blocks": len(prose)}
    return PythonDocs(pairs, prose, counts)


def _entries() -> Iterator[_Entry]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        if not name.startswith("_"):
            for path in _module_files(library, name):
                yield from _parsed(path, library)
    for name in _C_MODULES:
        yield from _inspected(name)


def _module_files(library: Path, name: str) -> list[Path]:
    if (library / f"{name}.py").is_file():
        return [library / f"{name}.py"]
    found = []
    for path in sorted((library / name).rglob("*.py")):
        inner = path.relative_to(library).parts[1:]
        if not any(part in ("test", "tests", "idle_test") or (part.startswith("_") and part != "__init__.py") for part in inner):
            found.append(path)
    return found


def _parsed(path: Path, library: Path) -> Iterator[_Entry]:
    """The public documented names of one source file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, OSError, ValueError):  # a file for another version, or unreadable: one module less
        return
    parts = path.relative_to(library).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if docstring := ast.get_docstring(tree):
        yield _Entry(module, "module", "", _clean(docstring))
    yield from _members(tree, module, inside_class=False)


def _members(node: ast.Module | ast.ClassDef, prefix: str, inside_class: bool) -> Iterator[_Entry]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if isinstance(child, ast.ClassDef):
            if docstring:
                yield _Entry(name, "class", "", _clean(docstring))
            yield from _members(child, name, inside_class=True)
        elif docstring:
            yield _Entry(name, "method" if inside_class else "function", f"{name}{_arguments(child, inside_class)}", _clean(docstring))


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef, inside_class: bool) -> str:
    if any("property" in ast.unparse(decorator) for decorator in function.decorator_list):
        return ""
    written = ast.unparse(function.args)
    if inside_class:
        written = re.sub(r"^(self|cls)(, /)?(, |$)", "", written)
    return f"({written})"


def _inspected(module_name: str) -> Iterator[_Entry]:
    """The public names of a C module; builtins lose their module's name, as people write them."""
    module = importlib.import_module(module_name)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name, value in sorted(vars(module).items()):
        # debuggers and test runners replace sys.excepthook and its like, and the text is to be the same under all of them
        if name.startswith("_") or name.endswith("hook") or not callable(value) or getattr(value, "__module__", None) != module_name:
            continue
        is_class = inspect.isclass(value)
        yield from _live_entry(f"{prefix}{name}", "class" if is_class else "function", value)
        if is_class and not issubclass(value, BaseException):
            for method_name, method in sorted(vars(value).items()):
                if not method_name.startswith("_") and callable(method):
                    yield from _live_entry(f"{prefix}{name}.{method_name}", "method", method)


def _live_entry(name: str, kind: str, value: object) -> Iterator[_Entry]:
    docstring = inspect.getdoc(value)
    if not docstring:
        return
    signature = ""
    if kind != "class":
        try:
            written = str(inspect.signature(value))  # type: ignore[arg-type]
        except (ValueError, TypeError):
            written = ""
        written = re.sub(r"^\((?:self|cls|type)(?:, /)?(?:, |(?=\)))", "(", written)
        # Addresses of default values would change from run to run.
        signature = f"{name}{written}" if written and " at 0x" not in written else ""
    yield _Entry(name, kind, signature, _clean(docstring))


def _clean(docstring: str) -> str:
    """Without form feeds, trailing blanks and runs of blank lines."""
    lines = [line.rstrip() for line in docstring.expandtabs().replace("\f", "").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _question(entry: _Entry) -> str:
    templates = _QUESTIONS[entry.kind]
    digest = hashlib.blake2b(entry.name.encode(), digest_size=4).digest()
    return templates[int.from_bytes(digest, "big") % len(templates)].format(name=entry.name)


def _answer(entry: _Entry) -> str:
    return f"`{entry.signature}`\n\n{entry.docstring}" if entry.signature else entry.docstring


def _without_near_duplicates(entries: list[_Entry]) -> list[_Entry]:
    """Keep the first of every group of docstrings that share half of the shorter one's runs of five words."""
    kept: list[_Entry] = []
    sizes: list[int] = []
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for entry in entries:
        shingles = _shingles(entry.docstring)
        shared: defaultdict[int, int] = defaultdict(int)
        for shingle in shingles:
            for other in owners.get(shingle, ()):
                shared[other] += 1
        if any(2 * count >= min(sizes[other], len(shingles)) for other, count in shared.items()):
            continue
        for shingle in shingles:
            owners[shingle].append(len(kept))
        kept.append(entry)
        sizes.append(len(shingles))
    return kept


def _shingles(text: str) -> set[int]:
    """The runs of words in a text; only compared within this process, so Python's own hash serves."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[start : start + _SHINGLE_WORDS])) for start in range(max(1, len(words) - _SHINGLE_WORDS + 1))}


def _prose() -> tuple[tuple[str, ...], int]:
    """Blocks of paragraphs of the language reference, and how many paragraphs repeated earlier ones (topics quote each other)."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return (), 0
    seen: set[str] = set()
    blocks: list[str] = []
    repeated = 0
    for name in sorted(topics):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", _clean(topics[name])):
            key = re.sub(r"[^a-z0-9]+", "", paragraph.lower())
            if key in seen:
                repeated += 1
            elif key:
                seen.add(key)
                paragraphs.append(paragraph)
        block = ""
        for paragraph in paragraphs:
            if block and len(block) + len(paragraph) > _PROSE_BLOCK:
                blocks.append(block)
                block = ""
            block = f"{block}\n\n{paragraph}" if block else paragraph
        if block:
            blocks.append(block)
    return tuple(block for block in blocks if len(block) >= _SHORTEST_PROSE), repeated
