"""A distillation step with the teacher beside the student against one that reads what the teacher said from disk.

    python benchmarks/distillation_cache.py
    python benchmarks/distillation_cache.py --threads 2 --repeats 7 --kinds live hidden top_k-32

A step is all of it, as the recipe distill_whitebox makes it: the teacher's signal, forward and backward of the student, twice, then AdamW. Students are the
teacher with a fifth of its layers gone, with half of them gone, and the first with a LoRA that alone is trained. Steps of all kinds alternate in one process on
the same batches, and the figure is the median ratio to the live step of the same round and student, on the clock and of the processor.

The error of a kind is that of the gradient which enters the student's body from the loss (0.5 CE + 0.5 forward KL, and the KL alone), relative to the live
teacher's. The cache is made in a temporary folder; how long the teacher took to fill it is given in live steps for the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmlite
from llmlite.context import Run
from llmlite.distillation.cache import TeacherCache
from llmlite.distillation.objective import Distillation
from llmlite.distillation.teacher import LiveTeacher, TeacherModel
from llmlite.models.find import find
from llmlite.models.rebuild import rebuild
from llmlite.models.settings import DEFAULT_MODEL
from llmlite.models.slicing import take_layers
from llmlite.models.view import ModelView
from llmlite.training.backbone import hidden_and_head
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import IGNORE_INDEX, next_token_labels

RESULTS = Path(__file__).parent / "results" / "distillation_cache.json"


def context(args: argparse.Namespace) -> Run:
    data = llmlite.Data(max_length=args.max_length, max_train_rows=args.examples)
    model = find(llmlite.Model(name=args.model)).folder  # found before the cache moves to a temporary folder
    return Run(llmlite.Recipe(model=str(model), data=data, steps=[llmlite.DistillWhiteBox()], seed=args.seed))


STUDENTS = {"a fifth gone": (0.2, None), "half gone": (0.5, None), "a fifth gone, LoRA": (0.2, llmlite.Lora())}
"""Share of the layers that is gone, and the adapter that is trained instead of all weights."""


def student_of(teacher: Any, run: Run, share: float, adapter: llmlite.Lora | None) -> Any:
    """The teacher without some of its layers, evenly from the middle; which ones does not matter for the time."""
    view = ModelView(teacher)
    count = len(view.blocks)
    layers = round(share * count)
    gone = {count // 4 + i * (count // 2) // max(layers, 1) for i in range(layers)}
    student = rebuild(teacher, *take_layers(view, [i for i in range(count) if i not in gone])).float().train()
    student.requires_grad_(True)
    return student if adapter is None else adapter.attach(student, run)


def batches_of(run: Run, rows: int, count: int) -> list[tuple[dict[str, Any], Tensor]]:
    data, found = run.train_data, []
    for index in range(count):
        chosen = [(index * rows + i) % len(data.dataset) for i in range(rows)]
        batch = data.collator()([data.dataset[row] for row in chosen])
        labels_N = next_token_labels(batch.pop("labels")).reshape(-1)
        found.append(({**batch, "rows": torch.tensor(chosen)}, labels_N))
    return found


def train_step(student: Any, optimizer: torch.optim.Optimizer, teacher: Any, batches: list[tuple[dict[str, Any], Tensor]]) -> None:
    for inputs, labels_N in batches:
        hidden_BTD, head, transform = hidden_and_head(student, {name: value for name, value in inputs.items() if name != "rows"})
        loss = Distillation(teacher.signal(inputs, labels_N), labels_N)
        chunked_head_loss(hidden_BTD.flatten(0, 1), head, loss, keep_N=labels_N != IGNORE_INDEX, transform=transform).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def errors(student: Any, teachers: dict[str, Any], batches: list[tuple[dict[str, Any], Tensor]], ce_weight: float) -> dict[str, float]:
    """Relative error of the gradient by what enters the student's head, mean over the batches; the live teacher's comes first and is the reference."""
    found: dict[str, list[float]] = {name: [] for name in teachers}
    for inputs, labels_N in batches:
        with torch.no_grad():
            hidden_BTD, head, transform = hidden_and_head(student, {name: value for name, value in inputs.items() if name != "rows"})
        hidden_ND = hidden_BTD.flatten(0, 1).requires_grad_()
        weight_VD = head.weight.detach()
        reference = None
        for name, teacher in teachers.items():
            loss = Distillation(teacher.signal(inputs, labels_N), labels_N, ce_weight=ce_weight)
            value = chunked_head_loss(hidden_ND, weight_VD, loss, keep_N=labels_N != IGNORE_INDEX, transform=transform).loss
            (grad_ND,) = torch.autograd.grad(value, hidden_ND)
            reference = grad_ND if reference is None else reference
            found[name].append(float((grad_ND - reference).norm() / reference.norm()))
    return {name: statistics.mean(values) for name, values in found.items()}


def steps_of(student: Any, teachers: dict[str, Any], batches: list[Any], accumulate: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step, on the clock and of the processor, by teacher; the first round warms up and does not count."""
    optimizer = torch.optim.AdamW([parameter for parameter in student.parameters() if parameter.requires_grad], lr=1e-5)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in teachers}
    for first in range(0, len(batches), accumulate):
        for name, teacher in teachers.items():
            clock, processor = time.perf_counter(), time.process_time()
            train_step(student, optimizer, teacher, batches[first : first + accumulate])
            if first:
                times[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--kinds", nargs="+", default=["hidden", "top_k-32", "top_k-64", "top_k-128"])
    parser.add_argument("--rows", type=int, default=1, help="rows in a batch")
    parser.add_argument("--accumulate", type=int, default=2, help="batches in a step, as gradient_accumulation_steps of the recipe")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    run = context(args)
    source = TeacherModel(run)
    model = source.load()
    live = LiveTeacher(model)
    data, key = run.train_data, run.train_data.fingerprint()
    teachers: dict[str, Any] = {"live": live}
    rows = {"live": {"kind": "live", "bytes_per_token": 0}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMLITE_CACHE"] = folder
        for name in args.kinds:
            kind, _, k = name.partition("-")
            cache = TeacherCache(source, data, kind, int(k or 0), 1.0, key)  # type: ignore[arg-type]
            started = time.process_time()
            cache.fill(run, lambda: live, args.rows)
            rows[name] = {"kind": name, "bytes_per_token": cache.bytes_per_token, "fill_cpu_seconds": time.process_time() - started}
            teachers[name] = cache.read(run.device)
        batches = batches_of(run, args.rows, args.accumulate * (args.repeats + 1))
        students = {name: student_of(model, run, *STUDENTS[name]) for name in args.students}
        for ce_weight, what in ((0.5, "gradient_error"), (0.0, "gradient_error_kl_alone")):
            for name, error in errors(students[args.students[0]], teachers, batches[:2], ce_weight).items():
                rows[name][what] = error
        print("caches filled, gradients compared", flush=True)
        taken = {name: steps_of(student, teachers, batches, args.accumulate) for name, student in students.items()}
    live_steps = len(data.dataset) / args.rows / args.accumulate
    for student, times in taken.items():
        for name, row in rows.items():
            clock, processor = (statistics.median(a[i] / b[i] for a, b in zip(times[name], times["live"], strict=True)) for i in (0, 1))
            row.setdefault("students", {})[student] = {"time": round(clock, 3), "cpu_time": round(processor, 3)}  # type: ignore[index]
    live_seconds = statistics.median(processor for _, processor in taken[args.students[0]]["live"])
    for row in rows.values():
        if "fill_cpu_seconds" in row:
            row["fill_in_live_steps"] = round(row.pop("fill_cpu_seconds") / live_steps / live_seconds, 3)  # type: ignore[operator]
    trained = sum(int((labels_N != IGNORE_INDEX).sum()) for _, labels_N in batches) / sum(len(labels_N) for _, labels_N in batches)
    size = f"{args.accumulate} x {args.rows} x {args.max_length}"
    print(f"{size} tokens a step, {trained:.0%} of them trained, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'teacher':12} {'bytes/token':>12} {'grad. error':>12} {'KL alone':>9} {'filling':>8}  step's processor time: {', '.join(args.students)}")
    for name, row in rows.items():
        filling = f"{row['fill_in_live_steps']:.2f}" if "fill_in_live_steps" in row else ""
        figures = f"{row['bytes_per_token']:12,} {row['gradient_error']:12.1e} {row['gradient_error_kl_alone']:9.1e}"
        print(f"{name:12} {figures} {filling:>8}  {'  '.join(format(one['cpu_time'], '.2f') for one in row['students'].values())}")  # type: ignore[attr-defined]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({"settings": settings, "trained_share": round(trained, 3), "machine": machine, "rows": list(rows.values())}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
