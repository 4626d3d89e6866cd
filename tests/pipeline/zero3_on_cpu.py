"""ZeRO-3 on CPU processes, for tests only: accelerate leaves DeepSpeed out where it computes on CPUs, so it is told that this launch is DeepSpeed's.

torchrun --nproc_per_node 2 zero3_on_cpu.py FOLDER run RECIPE.yaml ...    see fsdp2_on_cpu.py
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fsdp2_on_cpu import run_watched


def _believe() -> None:
    """Every new state of a launch over gloo is DeepSpeed's, and no accelerator hears of CPUs."""
    make, make_accelerator = PartialState.__init__, AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            from deepspeed import comm

            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
            self._shared_state["distributed_type"] = DistributedType.DEEPSPEED

    def init_accelerator(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_mixed_precision" not in AcceleratorState._shared_state:  # a state that somebody only looked at
            AcceleratorState._shared_state.clear()
        make_accelerator(self, *args, **{**kwargs, "cpu": False})

    PartialState.__init__, AcceleratorState.__init__ = init, init_accelerator


if __name__ == "__main__":
    _believe()
    run_watched()
