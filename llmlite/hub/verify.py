"""Does the repository hold the model of the folder? Stock libraries load both in one fresh process, by the card's own lines, and compare logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmlite.errors import PushFailed
from llmlite.hub.lines import adapter_loader, loading_snippet
from llmlite.hub.multi_adapter import Adapters
from llmlite.storage import read_object

__all__ = ["verified_difference"]

# No llmlite in here but what the lines name: this is what a stranger would run.
_SCRIPT = """
import json, sys
import torch
logits = []
for lines in sys.argv[1:3]:
    names = {}
    exec(lines, names)
    model = names["model"].eval()
    adapters = getattr(model, "peft_config", {}).values()
    taken = max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0)
    length = min(32, (getattr(model.config, "max_position_embeddings", None) or 32 + taken) - taken)
    input_ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits.append(model(input_ids=input_ids.to(model.device)).logits.float().cpu())
    del model, names
print(json.dumps({"difference": (logits[0] - logits[1]).abs().max().item(), "scale": logits[0].abs().max().item()}))
"""

_TOLERANCE = 1e-5
"""Allowed difference, as a share of the largest logit."""


def verified_difference(folder: Path, repo_id: str, commit: str, base: Mapping[str, Any], base_model: str | None = None) -> float:
    """The largest difference of a logit between a folder and a commit on the Hub.

    Args:
        folder: the result here.
        repo_id: the repository.
        commit: loaded exactly this one, so that nothing older is taken from the cache.
        base: what the report says of the base; used for adapters, whose base is loaded from the Hub both times.
        base_model: Hub id of an adapter's base, when the report does not know it.

    Raises:
        PushFailed: it does not load, or gives other logits.
    """
    several = Adapters.read(folder)
    if several is not None:  # each of them switched to in turn
        names = list(several.adapters)
        orders = [[*(other for other in names if other != name), name] for name in names]
        return max(_difference(folder, repo_id, commit, several.loadable(folder) | {"adapters": order}, base_model) for order in orders)
    config = folder / "adapter_config.json"
    known: dict[str, Any] | None = {**base, "loader": adapter_loader(folder)} if config.is_file() else None
    if known is not None and "name" not in known:
        known["name"] = read_object(config).get("base_model_name_or_path")
    return _difference(folder, repo_id, commit, known, base_model)


def _difference(folder: Path, repo_id: str, commit: str, known: Mapping[str, Any] | None, base_model: str | None) -> float:
    lines = [loading_snippet(str(folder.absolute()), known, base_model), loading_snippet(repo_id, known, base_model, commit)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", _SCRIPT, *lines], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PushFailed(f"{repo_id} was uploaded, and the lines on its card do not load it in a fresh process: {last}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if not answer["difference"] <= _TOLERANCE * max(answer["scale"], 1.0):  # written so that NaN fails
        raise PushFailed(f"{repo_id} was uploaded, and gives other logits than {folder}: they differ by {answer['difference']:.3g}.")
    return float(answer["difference"])
