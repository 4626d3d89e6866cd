"""FSDP2 on CPU processes, for tests only: accelerate shards only what it believes to be on accelerators, so it is told that the launch is.

torchrun --nproc_per_node 2 fsdp2_on_cpu.py FOLDER run RECIPE.yaml ...    the command line of llmlite; FOLDER gets each process's local sizes

With STOP_AT_STEP=N in the environment the run breaks off there, and the same command is given again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


def believe() -> None:
    """Every new state of a launch over gloo calls itself MULTI_GPU, which accelerate turns into FSDP."""
    make = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def _sizes(parameter: Any) -> list[int]:
    """Numbers of a whole parameter, and of this process's share."""
    if hasattr(parameter, "ds_id"):  # DeepSpeed
        return [parameter.ds_numel, parameter.ds_tensor.numel()]
    return [parameter.numel(), (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()]


class _StoppedError(BaseException):
    """Nothing catches it, as nothing catches a kill; but a new process would cost the seconds of its imports."""


def _watch(folder: Path) -> None:
    """Write how many numbers of each parameter this process holds, at the first loss of each training and the first word of each teacher; break off where
    that is asked for."""
    from llmlite.distillation.teacher import LiveTeacher
    from llmlite.training.trainer import LiteTrainer

    compute, read = LiteTrainer.compute_loss, LiveTeacher.read

    def reading(self: Any, *args: Any) -> Any:
        found = read(self, *args)
        write(f"teacher-{os.environ['RANK']}.json", self.model)  # what was whole to compute has gone again
        return found

    def write(name: str, model: Any) -> None:
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps({name: _sizes(p) for name, p in model.named_parameters()}), encoding="utf-8")

    def watching(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if str(self.state.global_step) == os.environ.get("STOP_AT_STEP"):
            raise _StoppedError
        write(f"{Path(self.args.output_dir).parent.name}-{os.environ['RANK']}.json", model)
        return compute(self, model, *args, **kwargs)

    LiteTrainer.compute_loss, LiveTeacher.read = watching, reading


def run_watched() -> None:
    """The command line, and once more where it breaks off."""
    from llmlite.cli import main

    _watch(Path(sys.argv[1]))
    try:
        main(sys.argv[2:])
    except _StoppedError:
        del os.environ["STOP_AT_STEP"]
        print("broken off", flush=True)
        main(sys.argv[2:])


if __name__ == "__main__":
    believe()
    run_watched()
