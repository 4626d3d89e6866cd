"""Benchmark tasks by lm-eval, and how many of the base's answers flip.

Accuracy alone hides a model that answers other questions right than its base does: flips count the answers whose correctness changed, in either direction.
Multiple choice never stands alone here; perplexity and KL are always beside it.

Source: Gao et al., lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness); Dutta et al. 2024, arXiv:2407.09141, section 3 (flips).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmlite.config import near, shorten
from llmlite.errors import ConfigError, first_line
from llmlite.models.adapted import longest_text
from llmlite.paths import path_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TaskResult", "check_tasks", "flips", "run_tasks", "task_files"]

_LOCAL = frozenset({"csv", "json", "parquet", "text"})
"""What `dataset_path` says of data that lies in files."""

_MAIN = ("acc_norm,none", "acc,none", "exact_match,none", "exact_match,strict-match", "f1,none", "bleu,none", "word_perplexity,none", "perplexity,none")


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        task: its name.
        metric: the metric shown: acc_norm where there is one, else acc, else the first.
        value: the metric.
        standard_error: of the metric, or None.
        correct: for each question whether the answer was right, by its id; empty where answers are not right or wrong.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    correct: dict[str, bool]


def check_tasks(tasks: Sequence[str]) -> None:
    """Say now what would fail after the weights are loaded.

    Raises:
        ConfigError: lm-eval is not installed, a YAML file or its data is missing, it names no task, nobody knows a task of that name, or both kinds are mixed.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError:
        raise ConfigError("tasks", ["benchmark tasks need lm-eval: pip install 'llmlite[eval]'."]) from None
    own, folders = _named(tasks)
    if folders:
        _require_own(tasks, own, folders)
    names = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    known = set(_known_tasks().all_tasks) if names else set()
    unknown = [f"no task '{name}'." + (f" Did you mean '{guess}'?" if (guess := near(name, known)) else "") for name in names if name not in known]
    if unknown:
        raise ConfigError("tasks", [*unknown, "Give names that `lm-eval ls tasks` lists, or a task's YAML file."])


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8, seed: int = 0
) -> list[TaskResult]:
    """Run tasks on a model in memory.

    Args:
        model: any causal LM.
        tokenizer: its tokenizer.
        tasks: names that lm-eval knows (their data comes from the Hub), or YAML files of your own (``dataset_path: json`` with local files runs offline).
        limit: questions of each task; None for all.
        batch_size: questions at a time.
        seed: of few-shot examples and everything else random.

    Raises:
        ConfigError: see `check_tasks`; or a task whose data cannot be had, or whose answers may be longer than the model's positions.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names, folders = _named(tasks)
    longest = longest_text(model)
    try:
        with _asked_for_figures_only():
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest and min(longest, 4096)),
                tasks=list(names),
                task_manager=_manager(tuple(dict.fromkeys(folders))),
                limit=limit,
                log_samples=True,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except OSError as error:  # no connection, no file
        raise ConfigError("tasks", [f"the data of {', '.join(names)} cannot be had: {first_line(error)[:200]}"]) from None
    except AssertionError as error:
        if "requested max tokens to generate" not in str(error):
            raise
        asks = f"{', '.join(names)}: the answers that are asked for have no room: the model reads and writes {longest} tokens together"
        raise ConfigError("tasks", [f"{asks}. Lower max_gen_toks under generation_kwargs in a task of your own (256 where it says nothing)."]) from None
    return [_result(name, found["results"][name], found["samples"].get(name, [])) for name in names]


@contextmanager
def _asked_for_figures_only() -> Iterator[None]:
    """Within it lm-eval does not note which commit the working folder is at and what is installed: that takes seconds for each model, git complains aloud of a
    folder that is no repository, and nobody reads it here."""
    from lm_eval import evaluator

    with ExitStack() as stack:
        for name in ("get_git_commit_hash", "add_env_info"):
            if hasattr(evaluator, name):
                stack.callback(setattr, evaluator, name, getattr(evaluator, name))
                setattr(evaluator, name, lambda *_: None)
        yield


def _result(name: str, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> TaskResult:
    numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float) and "_stderr" not in key and key != "alias"}
    main = next((key for key in _MAIN if key in numbers), next(iter(numbers)))
    metric, _, kind = main.partition(",")
    error = metrics.get(f"{metric}_stderr,{kind}")
    correct = {str(sample["doc_id"]): bool(sample[metric]) for sample in samples if metric in sample and sample[metric] in (0, 1)}
    return TaskResult(name, metric, numbers[main], float(error) if isinstance(error, int | float) else None, correct)


def task_files(tasks: Sequence[str]) -> list[Path]:
    """The YAML files among tasks, and the files on this machine that they name: what their questions come from."""
    own = [Path(task) for task in tasks if task.endswith((".yaml", ".yml")) and Path(task).is_file()]
    return [*own, *(Path(text) for task in own for text in _texts(_yaml(task)) if not path_problem(text) and Path(text).is_file())]


def _require_own(tasks: Sequence[str], names: Sequence[str], folders: Sequence[str]) -> None:
    """Raise ConfigError for YAML files that lm-eval would not read, or of which it would read another of that name, and for data files that are not there."""
    index, problems = _manager(tuple(dict.fromkeys(folders))).task_index, []
    for task, name in zip(tasks, names, strict=True):
        entry, content = index.get(name), _yaml(Path(task))
        if entry is None or entry.yaml_path is None:
            problems.append(f"lm-eval does not take {task} for a task. Its name should end in .yaml, and its content be as docs/evaluating.md shows.")
        elif not entry.yaml_path.samefile(task):
            problems.append(f"{task} and {entry.yaml_path} are both called '{name}', and lm-eval would read the second. Give one another 'task:' name.")
        more = content.get("dataset_kwargs")
        if content.get("dataset_path") in _LOCAL and isinstance(more, dict) and "data_dir" not in more:
            gone = [text for text in _texts(more.get("data_files")) if not set("*?[:") & set(text) and not Path(text).is_file()]
            problems += [f"{task}: no file {text}, which its data_files name." for text in gone]
    if problems:
        raise ConfigError("tasks", problems)


def _yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def _texts(value: Any) -> list[str]:
    """All texts in what a YAML file gives, whatever holds them."""
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in _texts(inner)]
    return [value] if isinstance(value, str) and value else []


def flips(base: TaskResult, other: TaskResult) -> float | None:
    """Share of questions whose correctness changed, in [0, 1]; None where answers are not right or wrong."""
    shared = base.correct.keys() & other.correct.keys()
    return sum(base.correct[key] != other.correct[key] for key in shared) / len(shared) if shared else None


def _named(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Task names, and the folders of those given as YAML files."""
    names, folders, problems = [], [], []
    for task in tasks:
        if not task.endswith((".yaml", ".yml")):
            names.append(task)
            continue
        path = Path(task)
        if problem := path_problem(task):
            problems.append(f"{shorten(repr(task))} should {problem}.")
            continue
        if not path.is_file():
            problems.append(f"no file {task}.")
            continue
        try:
            name = (_yaml(path) or {}).get("task")
        except (yaml.YAMLError, AttributeError, OSError, UnicodeDecodeError, RecursionError) as error:
            problems.append(f"{task} is not a task's YAML: {first_line(error)}.")
            continue
        if not isinstance(name, str):
            problems.append(f"{task} has no 'task: NAME'.")
            continue
        names.append(name)
        folders.append(str(path.parent.absolute()))
    if folders and len(folders) < len(names):
        problems.append("tasks of your own (YAML) and tasks that lm-eval knows by name go into two calls.")
    if problems:
        raise ConfigError("tasks", problems)
    return names, folders


def _manager(folders: tuple[str, ...]) -> Any:
    """lm-eval's index of tasks. Files of your own want no other, and may change between two calls."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False) if folders else _known_tasks()


@functools.cache
def _known_tasks() -> Any:
    """Making it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()
