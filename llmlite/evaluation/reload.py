"""Does a saved folder come back? Stock transformers loads it in a fresh process, and its logits are compared with the model's in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from llmlite.errors import RunError
from llmlite.models.device_map import places
from llmlite.models.view import ModelView
from llmlite.storage import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adapter_lines", "adapter_loader", "loading_lines", "offloaded_lines", "reload_difference", "require_reload", "resizing_line"]

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


def loading_lines(
    folder: Path | str, base: Path | str | None = None, dtype: str | None = None, vocabulary: int | None = None, adapters: Sequence[str] = ()
) -> str:
    """The Python lines that load a result with stock libraries.

    Args:
        folder: where the result lies.
        base: folder or Hub id of the base, when the result is an adapter.
        dtype: passed as ``dtype=``; None for transformers' default.
        vocabulary: rows that the base's embedding must have for the adapter's added tokens, when it has fewer.
        adapters: names of the adapters that lie side by side in the folder, the last of which is to be active; none for one adapter, or a model.
    """
    options = f', dtype="{dtype}"' if dtype else ""
    if base is None:
        return f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({_literal(folder)}{options})"
    loader, load = adapter_loader(Path(folder, *adapters[:1]))
    return (
        f"from transformers import AutoModelForCausalLM; {loader}\n"
        f"base = AutoModelForCausalLM.from_pretrained({_literal(base)}{options})\n"
        + (f"{resizing_line(vocabulary)}\n" if vocabulary else "")
        + "\n".join(adapter_lines(load, _literal(folder), adapters))
    )


def offloaded_lines(model: PreTrainedModel, folder: Path | str, dtype: str) -> str:
    """The Python lines that load a dense result with stock transformers while its blocks stay on disk, read at each forward pass."""
    view = ModelView(model)
    found = places(view, {block.name: "disk" for block in view.blocks}, "cpu")
    return f"""import tempfile; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({_literal(folder)}, dtype="{dtype}", device_map={found}, offload_folder=tempfile.mkdtemp())"""


def _literal(text: Path | str) -> str:
    """A Python string in double quotes, which nothing in the text can end."""
    return json.dumps(str(text), ensure_ascii=False)


def resizing_line(vocabulary: int) -> str:
    """The line that gives a stock base the rows of added tokens; the adapter fills them."""
    return f"base.resize_token_embeddings({int(vocabulary)}, mean_resizing=False)"


def adapter_lines(load: str, place: str, names: Sequence[str] = ()) -> list[str]:
    """The lines that put one adapter on ``base``, or several side by side and switch to the last.

    Args:
        load: what `adapter_loader` says.
        place: the folder or repository as a Python literal, and further arguments.
        names: of the adapters in subfolders; none where the place itself holds the only one.
    """
    if not names:
        return [f"model = {load}(base, {place})"]
    named = [_literal(name) for name in names]
    first, *others = [f"{place}, adapter_name={name}, subfolder={name}" for name in named]
    switch = [f"model.set_adapter({named[-1]})  # and back: model.set_adapter({named[0]})"] if others else []
    return [f"model = {load}(base, {first})", *(f"model.load_adapter({other})" for other in others), *switch]


def adapter_loader(folder: Path) -> tuple[str, str]:
    """The import, and the name of the function, that put an adapter on its base: peft's, or for a kind that peft does not have llmlite's."""
    config = folder / "adapter_config.json"
    kind = read_object(config).get("peft_type") if config.is_file() else None
    if kind == "BOTTLENECK":
        return "from llmlite import load_adapter", "load_adapter"
    return "from peft import PeftModel", "PeftModel.from_pretrained"


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
    length = min(32, getattr(model.config, "max_position_embeddings", None) or 32)
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


# set by torchrun and accelerate launch; a child that saw them would wait for its siblings
_LAUNCHER = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID"})


def require_reload(model: PreTrainedModel, lines: str, tolerance: float = 1e-3) -> float:
    """Raise unless the reloaded logits agree to `tolerance` times the largest logit. Returns the largest difference.

    Raises:
        RunError: they differ, or the folder does not load.
    """
    difference, scale = reload_difference(model, lines)
    if not difference <= tolerance * max(scale, 1.0):  # written so that NaN fails
        raise RunError(f"the saved result is not the model in memory: reloaded logits differ by {difference:.3g} (largest logit {scale:.3g}).\n{lines}")
    return difference
