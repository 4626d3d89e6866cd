"""Losses through the LM head: full logits against chunks, the same numbers out of both.

    python benchmarks/losses.py
    python benchmarks/losses.py --losses ce ce+forward_kl --repeats 9 --chunk-tokens 128

A step is forward and backward of the loss alone: from the hidden states of student and teacher to the gradients of the student's hidden states
and, unless `--frozen-head`, of its head. Full logits are the formulas as everybody writes them, with `torch.nn.functional`. Times are medians
over steps that alternate between the two in one process; memory is the peak of the resident set above the inputs, one fresh process for each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmlite.distillation.losses import top_k_teacher
from llmlite.distillation.objective import Distillation, HiddenTeacher, TopKTeacher
from llmlite.memory import measured_peak, resident_bytes
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.token_loss import CrossEntropy

LOSSES = (
    "ce", "forward_kl", "ce+forward_kl", "ce+forward_kl@T=2", "reverse_kl", "generalised_jsd", "skewed_forward_kl", "skewed_reverse_kl",
    "total_variation", "logit_mse", "top_k",
)  # fmt: skip
ALPHA, BETA, K = 0.1, 0.5, 32
RESULTS = Path(__file__).parent / "results" / "losses.json"


class Problem:
    """Random hidden states and heads of one size; logits about as peaked as a language model's."""

    def __init__(self, args: argparse.Namespace, tokens: int) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        self.hidden = torch.randn(tokens, args.hidden, generator=generator).requires_grad_()
        self.head = (torch.randn(args.vocabulary, args.hidden, generator=generator) * 0.1).requires_grad_(not args.frozen_head)
        noise = torch.randn(tokens, args.hidden, generator=generator)
        self.teacher_hidden = self.hidden.detach() * 0.8 + 0.6 * noise  # a student on its way
        self.teacher_head = self.head.detach().clone()
        self.labels = torch.randint(0, args.vocabulary, (tokens,), generator=generator)
        self.ids, self.logprobs = zip(*(top_k_teacher(rows @ self.teacher_head.T, K) for rows in self.teacher_hidden.split(64)), strict=True)
        self.ids, self.logprobs = torch.cat(self.ids), torch.cat(self.logprobs)

    def inputs(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.head) if tensor.requires_grad]


def full(problem: Problem, name: str) -> Tensor:
    logits = problem.hidden @ problem.head.T
    if name == "ce":
        return F.cross_entropy(logits, problem.labels)
    if name == "top_k":
        return _full_top_k(logits, problem.ids, problem.logprobs)
    with torch.no_grad():
        teacher = problem.teacher_hidden @ problem.teacher_head.T
    if name == "ce+forward_kl":
        return 0.5 * F.cross_entropy(logits, problem.labels) + 0.5 * _kl(teacher.log_softmax(-1), logits.log_softmax(-1))
    if name == "ce+forward_kl@T=2":
        return 0.5 * F.cross_entropy(logits, problem.labels) + 0.5 * 4 * _kl((teacher / 2).log_softmax(-1), (logits / 2).log_softmax(-1))
    if name == "logit_mse":
        return F.mse_loss(logits, teacher)
    logp, logq = logits.log_softmax(-1), teacher.log_softmax(-1)
    if name == "forward_kl":
        return _kl(logq, logp)
    if name == "reverse_kl":
        return _kl(logp, logq)
    if name == "generalised_jsd":
        logm = torch.log(BETA * logq.exp() + (1 - BETA) * logp.exp())
        return BETA * _kl(logq, logm) + (1 - BETA) * _kl(logp, logm)
    if name == "skewed_forward_kl":
        return _kl(logq, torch.log(ALPHA * logq.exp() + (1 - ALPHA) * logp.exp()))
    if name == "skewed_reverse_kl":
        return _kl(logp, torch.log(ALPHA * logp.exp() + (1 - ALPHA) * logq.exp()))
    assert name == "total_variation"
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1).mean()


def _kl(loga: Tensor, logb: Tensor) -> Tensor:
    return F.kl_div(logb, loga, reduction="batchmean", log_target=True)


def _full_top_k(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    logp = logits.log_softmax(-1).gather(1, ids)
    tail_q, tail_p = (1 - logprobs.exp().sum(-1)).clamp(min=1e-20), (1 - logp.exp().sum(-1)).clamp(min=1e-20)
    return ((logprobs.exp() * (logprobs - logp)).sum(-1) + tail_q * (tail_q.log() - tail_p.log())).mean()


def chunked(problem: Problem, name: str, chunk_tokens: int | None) -> Tensor:
    teacher: HiddenTeacher | TopKTeacher = HiddenTeacher(problem.teacher_hidden, problem.teacher_head)
    temperature = 2.0 if name.endswith("@T=2") else 1.0
    if name == "ce":
        loss = CrossEntropy(problem.labels)
    elif name.startswith("ce+"):
        loss = Distillation(teacher, problem.labels, divergence="forward_kl", temperature=temperature)
    elif name == "top_k":
        loss = Distillation(TopKTeacher(problem.ids, problem.logprobs), kd_weight=1.0)
    else:
        options = {"generalised_jsd": {"beta": BETA}, "skewed_forward_kl": {"alpha": ALPHA}, "skewed_reverse_kl": {"alpha": ALPHA}}
        loss = Distillation(teacher, divergence=name, kd_weight=1.0, **options.get(name, {}))
    return chunked_head_loss(problem.hidden, problem.head, loss, chunk_tokens=chunk_tokens).loss


def step(problem: Problem, name: str, variant: str, chunk_tokens: int | None) -> tuple[Tensor, ...]:
    loss = full(problem, name) if variant == "full" else chunked(problem, name, chunk_tokens)
    return (loss.detach(), *torch.autograd.grad(loss, problem.inputs()))


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of the processor: the second figure is the one to trust on a busy machine, with one thread."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def measure_memory(args: argparse.Namespace, name: str, variant: str) -> None:
    """In the child process: print the peak of one step above its inputs, in bytes."""
    step(Problem(args, 8), name, variant, args.chunk_tokens)  # load kernels and thread pools
    problem = Problem(args, args.tokens)
    with measured_peak() as peak:
        before = resident_bytes()
        step(problem, name, variant, args.chunk_tokens)
    print(peak.bytes - before)


def peak_bytes(args: argparse.Namespace, name: str, variant: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, variant]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(args: argparse.Namespace, problem: Problem, name: str) -> dict[str, float | str]:
    error = max(
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(step(problem, name, "chunked", args.chunk_tokens), step(problem, name, "full", 0), strict=True)
    )
    times: dict[str, list[tuple[float, float]]] = {"full": [], "chunked": []}
    for _ in range(args.repeats):
        for variant, taken in times.items():
            taken.append(seconds(lambda variant=variant: step(problem, name, variant, args.chunk_tokens)))
    clock, processor = ({variant: statistics.median(both[i] for both in taken) for variant, taken in times.items()} for i in (0, 1))
    peak = {variant: peak_bytes(args, name, variant) for variant in times}
    return {
        "loss": name,
        "full_seconds": round(clock["full"], 4),
        "chunked_seconds": round(clock["chunked"], 4),
        "time": round(clock["chunked"] / clock["full"], 3),
        "cpu_time": round(processor["chunked"] / processor["full"], 3),
        "full_peak_bytes": peak["full"],
        "chunked_peak_bytes": peak["chunked"],
        "memory": round(peak["chunked"] / peak["full"], 3),
        "relative_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--chunk-tokens", type=int, help="tokens in a matrix product; left out: as llmlite chooses")
    parser.add_argument("--frozen-head", action="store_true", help="no gradient for the head, as with LoRA")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        measure_memory(args, *args.child)
        return

    problem = Problem(args, args.tokens)
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, {torch.get_num_threads()} threads")
    print(f"{'loss':20} {'full s':>8} {'chunked s':>9} {'time':>6} {'cpu':>6} {'full MB':>8} {'chunked MB':>10} {'memory':>6} {'rel. error':>10}")
    settings = {key: value for key, value in vars(args).items() if key not in ("child", "output", "losses")}
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    for name in args.losses:
        row = {**compare(args, problem, name), "load": round(os.getloadavg()[0], 2)}
        seconds_text = f"{row['full_seconds']:8.3f} {row['chunked_seconds']:9.3f} {row['time']:5.2f}x {row['cpu_time']:5.2f}x"
        memory_text = f"{row['full_peak_bytes'] / 1e6:8.0f} {row['chunked_peak_bytes'] / 1e6:10.0f} {row['memory']:5.2f}x"
        print(f"{name:20} {seconds_text} {memory_text} {row['relative_error']:10.1e}", flush=True)
        record(args.output, {"settings": settings, "machine": machine}, row)


def record(path: Path, header: dict[str, object], row: dict[str, float | str]) -> None:
    """Write after every loss; rows of other losses stay if they were measured with the same settings."""
    saved = json.loads(path.read_text()) if path.exists() else {}
    same = all(saved.get(key) == value for key, value in header.items())
    rows = [other for other in saved["rows"] if other["loss"] != row["loss"]] if same else []
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted([*rows, row], key=lambda one: LOSSES.index(str(one["loss"])))
    path.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
