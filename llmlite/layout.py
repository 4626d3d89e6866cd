"""How a launch lays models out over its processes, from what torchrun and accelerate put into the environment. Imports no torch.

    one      a single process
    ddp      every process holds whole models and reads its own rows
    fsdp2    as ddp, but while a step trains, weights, gradients and optimizer are split over the processes (`llmlite.training.sharded`)
    zero3    the same by DeepSpeed

Other layouts (FSDP1, other stages of DeepSpeed) are recognised so that they can be refused.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """A launch.

    Attributes:
        kind: see the module.
        processes: how many there are, each with a device of its own.
        split_loading: accelerate was asked to load weights on the first process alone, or each process a part of them.
    """

    kind: Literal["one", "ddp", "fsdp1", "fsdp2", "zero3", "deepspeed"] = "one"
    processes: int = 1
    split_loading: bool = False

    @classmethod
    def of_launch(cls, environment: Mapping[str, str] | None = None) -> Layout:
        """The layout of this launch, or of the one that an environment describes."""
        found = os.environ if environment is None else environment

        def on(name: str) -> bool:
            return found.get(name, "").lower() in {"1", "true", "yes", "on", "y", "t"}

        processes = int(found.get("WORLD_SIZE", "1"))
        kind: Literal["one", "ddp", "fsdp1", "fsdp2", "zero3", "deepspeed"] = "ddp" if processes > 1 else "one"
        if on("ACCELERATE_USE_DEEPSPEED"):
            kind = "zero3" if found.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "deepspeed"
        elif on("ACCELERATE_USE_FSDP"):
            kind = "fsdp2" if found.get("FSDP_VERSION", "1") == "2" else "fsdp1"
        return cls(kind, processes, on("FSDP_CPU_RAM_EFFICIENT_LOADING") or on("ACCELERATE_DEEPSPEED_ZERO3_INIT"))

    @property
    def sharded(self) -> bool:
        """Whether weights are split over the processes while a step trains."""
        return self.kind in {"fsdp2", "zero3"}

    @property
    def name(self) -> str:
        """What people call it."""
        return {"fsdp2": "FSDP2", "zero3": "ZeRO-3", "ddp": "DDP"}.get(self.kind, self.kind)

    def not_as_asked(self, launcher: Sequence[str] | None = None) -> str:
        """Why this is not the launch that was asked for, as a sentence; empty when it is, or when nobody can tell.

        ``accelerate launch --cpu --num_processes 2`` starts one process and does not say so.

        Args:
            launcher: words of the command that started this process; None reads those of the parent process, where the system shows them.
        """
        asked = _asked_processes(_parent_command() if launcher is None else launcher)
        if asked is None or asked == self.processes:
            return ""
        started = f"accelerate was asked for {asked} process{'es' if asked > 1 else ''} and started {self.processes if self.processes > 1 else 'one'}."
        if self.processes > 1:
            return f"{started} WORLD_SIZE={self.processes} may be left in the environment of another launch: unset it, or ask for {self.processes}."
        return (
            f"{started} On CPUs: ACCELERATE_USE_CPU=1 accelerate launch --config_file recipes/accelerate/cpu2.yaml ..., or ACCELERATE_USE_CPU=1 torchrun "
            "--nproc_per_node 2 -m ...; on GPUs: recipes/accelerate/ddp.yaml. For one process leave --num_processes out."
        )

    def problems(self, on_accelerators: bool) -> list[str]:
        """Why this launch cannot work, as sentences.

        Args:
            on_accelerators: whether the processes compute on GPUs or the like; on CPUs accelerate takes DDP for FSDP2 and does not say so.
        """
        if self.kind == "deepspeed":
            return [
                "this launch uses DeepSpeed with a stage or a configuration of its own. ZeRO stage 3 is what is built: recipes/accelerate/zero3.yaml; "
                "fsdp2.yaml splits the same things without DeepSpeed."
            ]
        if self.kind == "fsdp1":
            return ["this launch uses FSDP version 1. Set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does."]
        if not self.sharded:
            return []
        problems = []
        if not on_accelerators:
            problems.append(f"{self.name} splits nothing on CPUs: accelerate would run without it and not say so. Use recipes/accelerate/cpu2.yaml.")
        if self.split_loading:
            option = "fsdp_cpu_ram_efficient_loading" if self.kind == "fsdp2" else "zero3_init_flag"
            problems.append(f"{option} gives processes empty weights to measure and calibrate with. Set it to false.")
        if self.kind == "zero3" and importlib.util.find_spec("deepspeed") is None:
            problems.append("this launch uses DeepSpeed, which is not installed: pip install deepspeed. recipes/accelerate/fsdp2.yaml splits the same things.")
        return problems

    def peak_bytes(self, peak: int, trained: int, parameters: int, whole: int) -> int:
        """Peak bytes on one device in a step, from what one process without a launch would need.

            fsdp2, zero3: max(peak - 16 trained (1 - 1/processes), whole)

        Args:
            peak: of one process.
            trained: parameters trained, 16 bytes each in float32 with their gradient and AdamW's two moments.
            parameters: all of them.
            whole: what measuring the whole base needs, which every device does before and after training.
        """
        if not self.sharded or not trained:
            return peak
        if trained == parameters:  # all weights are made float32 before they are split, and are gathered in float32
            whole += 4 * parameters
        return max(peak - 16 * trained * (self.processes - 1) // self.processes, whole)

    def sentence(self, blockwise: bool = False) -> str:
        """What the launch means, for the plan; empty for one process.

        Args:
            blockwise: whether models are loaded block by block.
        """
        if self.processes == 1:
            return ""
        if blockwise:
            return f"{self.processes} processes, each of which reads all blocks, one at a time; rows are shared out, and the main process writes."
        if self.sharded:
            return (
                f"{self.processes} processes, {self.name}: weights, gradients and optimizer are split while a step trains; before and after it, and while "
                "calibrating, each device holds the whole model."
            )
        return f"{self.processes} processes, DDP: the whole model, its gradients and optimizer on each device; rows are shared out."


def _parent_command() -> list[str]:
    """Words of the command that started this process; empty where the system does not show them."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _asked_processes(words: Sequence[str]) -> int | None:
    """How many processes an `accelerate launch` command line or its config file asks for; None when it is another command or says nothing."""
    if not any(word.endswith(("accelerate", "accelerate-launch")) or "accelerate.commands" in word for word in words[:4]):
        return None
    options = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for place, word in enumerate(options[:-1]):
        if word.replace("-", "_") in {"__num_processes", "__num_process"} and options[place + 1].isdigit():
            return int(options[place + 1])
    for place, word in enumerate(options[:-1]):
        if word.replace("-", "_") == "__config_file" and Path(options[place + 1]).is_file():
            found = re.search(r"^num_processes:\s*(\d+)", Path(options[place + 1]).read_text(encoding="utf-8"), re.MULTILINE)
            return int(found[1]) if found else None
    return None
