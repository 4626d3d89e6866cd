"""Does a saved folder come back? Its lines (`llmlite.hub.lines`) are run in a fresh process, and the logits compared with those of the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from llmlite.errors import RunError
from llmlite.models.adapted import tokens_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["reload_difference", "require_reload"]

# No llmlite in here but what the lines name: this is what a stranger would run.
_SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file
lines, tensors, device, dtype = sys.argv[1:5]
names = {"dtype": getattr(torch, dtype), "device": device}
exec(lines, names)
model = names["model"].eval()
# bitsandbytes' packed CPU path would repack the layers and compute in bfloat16; the comparison is of the stored weights
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
saved = load_file(tensors)
with torch.no_grad():
    logits = model(input_ids=saved["input_ids"].to(device)).logits.float().cpu()
difference = (logits - saved["logits"]).abs().max().item()
print(json.dumps({"difference": difference, "scale": saved["logits"].abs().max().item()}))
"""

# set by torchrun and accelerate launch; a child that saw them would wait for its siblings
_LAUNCHER = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID"})


@torch.no_grad()
def reload_difference(model: PreTrainedModel, lines: str) -> tuple[float, float]:
    """Run `lines` in a fresh process and compare.

    Args:
        model: the model in memory, whose folder the lines load.
        lines: Python that leaves the loaded model in ``model``.

    Returns:
        The largest absolute difference of a logit, and the largest absolute logit.

    Raises:
        RunError: the folder does not load there.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(1)
    length = tokens_left(model, 0, 32)
    input_ids_BT = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    logits_BTV = model(input_ids=input_ids_BT.to(device)).logits.float().cpu()
    model.train(was_training)
    with tempfile.TemporaryDirectory() as folder:
        tensors = Path(folder) / "expected.safetensors"
        save_file({"input_ids": input_ids_BT, "logits": logits_BTV.contiguous()}, tensors)
        command = [sys.executable, "-c", _SCRIPT, lines, str(tensors), str(device), str(model.dtype).removeprefix("torch.")]
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER} | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"the saved result does not load in a fresh process: {last}\nThe lines that failed:\n{lines}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return float(answer["difference"]), float(answer["scale"])


def require_reload(model: PreTrainedModel, lines: str, tolerance: float = 1e-3) -> float:
    """Raise unless the reloaded logits agree to `tolerance` times the largest logit. Returns the largest difference.

    Raises:
        RunError: they differ, or the folder does not load.
    """
    difference, scale = reload_difference(model, lines)
    if not difference <= tolerance * max(scale, 1.0):  # written so that NaN fails
        raise RunError(f"the saved result is not the model in memory: reloaded logits differ by {difference:.3g} (largest logit {scale:.3g}).\n{lines}")
    return difference
