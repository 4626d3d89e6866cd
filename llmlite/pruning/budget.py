"""Where to cut: a share of the decoder's parameters spread over layers, heads and FFN channels by measuring what each costs, not by a rule.

One pass of the dense model over some calibration rows keeps, for each block, the sums that choosing and repairing need. With them any spread can be tried in
seconds: skip the layers, cut and repair the output projections, and read held-out calibration rows. The search starts at channels alone; each turn it tries one
more layer, one more query head of each group, or one more key/value group, the channels making up the rest of the budget, and goes where the loss falls most.

    spread*  =  argmin over spreads with keep_parameters of the decoder  of  loss(held-out calibration rows | spread, repaired)

Sources: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.4 (candidates of one budget, ranked by measuring them); Sandri et al. 2025 (2SSP),
arXiv:2501.17771 (depth and width by different scores).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.errors import ConfigError, UnsupportedModel, counted
from llmlite.storage import damage, write_json, writing_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmlite.calibration.blocks import Statistics
    from llmlite.pruning.settings import UnitStep
    from llmlite.pruning.units import Cut

__all__ = ["Spread", "Trials", "cuts_of", "fitted", "neighbours", "search"]

log = logging.getLogger(__name__)

_LEAST_FFN = 0.25
"""Share of the FFN channels that stays at least."""


@dataclass(frozen=True)
class Spread:
    """How a removal is spread. Attributes: what goes."""

    layers: int = 0
    kv_groups: int = 0
    query_heads: int = 0
    channels: int = 0

    def __str__(self) -> str:
        parts = [(self.layers, "layer"), (self.kv_groups, "key/value group"), (self.query_heads, "query head"), (self.channels, "FFN channel")]
        return ", ".join(counted(count, name) for count, name in parts if count) or "nothing"


def fitted(config: Any, spread: Spread, keep_parameters: float, multiple_of: int = 1) -> Spread | None:
    """The spread with as many channels gone as the budget wants, or None where it cannot be: no stock config, or too few channels left.

    Args:
        config: the model's.
        spread: what else goes; its channels are ignored.
        keep_parameters: share of the decoder's parameters that stays.
        multiple_of: the channels that stay are rounded to it.
    """
    from llmlite.models.families import family_of
    from llmlite.models.legal import round_to_multiple
    from llmlite.models.size import size_of_config
    from llmlite.pruning.ffn import config_with_channels

    family = family_of(config)
    if spread.layers >= family.layers(config):
        return None
    channels, dense = family.ffn_channels(config), size_of_config(config).decoder
    try:
        narrowed = _without_channels(config, spread)
    except (ConfigError, UnsupportedModel):
        return None
    before = size_of_config(narrowed).decoder
    one = before - size_of_config(config_with_channels(narrowed, channels - 1)).decoder if channels > 1 else before
    keep = channels - (before - keep_parameters * dense) / one
    kept = round_to_multiple(max(1, round(keep)), multiple_of, channels)
    if keep < max(1, _LEAST_FFN * channels) or keep > channels + max(multiple_of / 2, 1):
        return None
    return dataclasses.replace(spread, channels=channels - min(kept, channels))


def cuts_of(config: Any, spread: Spread, head_score: str | None = None) -> tuple[list[Cut], Any]:
    """What goes from the projections of the layers that stay, and the config that is left."""
    from llmlite.models.families import family_of
    from llmlite.pruning.ffn import config_with_channels
    from llmlite.pruning.units import Cut

    family = family_of(config)
    heads, kv_heads, channels = family.heads(config), family.kv_heads(config), family.ffn_channels(config)
    cuts = []
    if spread.kv_groups:
        cuts.append(Cut("kv_groups", kv_heads, kv_heads - spread.kv_groups, score=head_score))
    if spread.query_heads:
        cuts.append(Cut("query_heads", heads, heads - spread.query_heads, family.query_groups(config), score=head_score))
    if spread.channels:
        cuts.append(Cut("ffn", channels, channels - spread.channels))
    return cuts, config_with_channels(_without_channels(config, spread), channels - spread.channels)


def neighbours(config: Any, spread: Spread) -> Iterator[Spread]:
    """Spreads with one thing more taken away, the channels left open. Query heads and key/value groups do not go together."""
    from llmlite.models.families import family_of

    family = family_of(config)
    heads, kv_heads, step = family.heads(config), family.kv_heads(config), family.query_groups(config)
    yield dataclasses.replace(spread, layers=spread.layers + 1)
    if kv_heads < heads and not spread.query_heads and spread.kv_groups + 1 < kv_heads:
        yield dataclasses.replace(spread, kv_groups=spread.kv_groups + 1)
    if not spread.kv_groups and spread.query_heads + step < heads:
        yield dataclasses.replace(spread, query_heads=spread.query_heads + step)


def search(config: Any, keep_parameters: float, loss_of: Callable[[Spread], float], most: int = 12) -> tuple[Spread, dict[Spread, float]]:
    """Walk downhill from channels alone.

    Args:
        config: the model's.
        keep_parameters: the budget.
        loss_of: measures a spread.
        most: measurements at most.

    Returns:
        The best spread found, and the loss of all that were measured.

    Raises:
        ConfigError: no spread reaches the budget.
    """
    from llmlite.models.families import family_of

    found: dict[Spread, float] = {}

    def measure(spread: Spread) -> Spread | None:
        whole = fitted(config, spread, keep_parameters)
        if whole is not None and whole not in found and len(found) < most:
            found[whole] = loss_of(whole)
            log.info("%s gone: calibration loss %.4f", whole, found[whole])
        return whole if whole in found else None

    best, start = None, Spread()
    while best is None:
        best = measure(start)
        if best is None:
            if start.layers + 1 >= family_of(config).layers(config):
                raise ConfigError("prune.structured", [f"keep_parameters={keep_parameters} cannot be reached by layers, heads and FFN channels together."])
            start = dataclasses.replace(start, layers=start.layers + 1)
    while len(found) < most:
        tried = [whole for near in neighbours(config, best) if (whole := measure(near)) is not None]
        better = min(tried, key=found.__getitem__, default=best)
        if found[better] >= found[best]:
            break
        best = better
    return best, found


class Trials:
    """Measures spreads on a dense model, which is unchanged afterwards.

    Args:
        model: in eval mode.
        windows_NT: calibration windows; one in five, at most eight, is held out to be read.
        step: how units are chosen and repaired.
        head_score: score of the heads.
        folder: keeps sums and losses, so that a search that was stopped goes on.
    """

    def __init__(self, model: PreTrainedModel, windows_NT: Tensor, step: UnitStep, head_score: str | None, folder: Path) -> None:
        from llmlite.models.view import ModelView
        from llmlite.pruning.units import Cut, gradients_for

        self.model, self.step, self.head_score, self.folder = model, step, head_score, folder
        held = min(8, max(1, len(windows_NT) // 5))
        self.held_NT, fit_NT = windows_NT[:held], windows_NT[held:] if len(windows_NT) > held else windows_NT
        self.view = ModelView(model)
        kinds = [Cut("kv_groups", self.view.kv_heads, 1, score=head_score), Cut("query_heads", self.view.heads, 1, score=head_score)]
        self.gradients = gradients_for(model, fit_NT, [*kinds, Cut("ffn", self.view.ffn_channels, 1)], step, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "trials.json"
        stored = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {"losses": {}, "dampings": {}}
        self.known: dict[str, float] = stored["losses"]
        self._dampings: dict[str, float] = stored["dampings"]  # chosen in the first trial of each kind; they hardly depend on how much goes
        self._keep_sums(fit_NT)
        self.influence = [json.loads((self._place(block.index) / "influence.json").read_text()) for block in self.view.blocks]

    def _place(self, index: int) -> Path:
        return self.folder / f"sums-{index:03d}"

    def _keep_sums(self, fit_NT: Tensor) -> None:
        """One pass of the dense model; behind the last block that every process has kept."""
        from llmlite.calibration.blocks import Blocks, batches_of
        from llmlite.processes import least_over_processes
        from llmlite.pruning.layers import influence_of

        whole = [damage(self._place(block.index)) is None for block in self.view.blocks]
        complete = least_over_processes(whole.index(False) if False in whole else len(whole), next(self.view.embedding.parameters()).device)
        if complete == len(whole):
            return
        stream = Blocks(self.model, batches_of(fit_NT), quick=True)
        for block in self.view.blocks:
            if block.index < complete:
                stream.advance(block)
                continue
            found = stream.collect(block, ("o", "down"))
            _write_sums(self._place(block.index), found, influence_of(stream, block))

    def removed_layers(self, spread: Spread) -> list[int]:
        """The layers of least block influence."""
        return sorted(sorted(range(len(self.influence)), key=self.influence.__getitem__)[: spread.layers])

    def loss(self, spread: Spread) -> float:
        """Mean negative log-likelihood of the held-out rows, nats a token, with the spread cut and repaired for dense inputs."""
        import torch

        from llmlite.pruning.layers import calibration_loss
        from llmlite.pruning.units import cut_block

        key = str(spread)
        if key in self.known:
            return self.known[key]
        cuts, _ = cuts_of(self.model.config, spread, self.head_score)
        gone, before = self.removed_layers(spread), {}
        try:
            with torch.no_grad():
                for block in self.view.blocks:
                    found = {} if block.index in gone else _read_sums(self._place(block.index), block.linears["o"].weight_OI.device)
                    for cut in cuts if found else ():
                        linear = block.linears[cut.role]
                        before[linear.name] = (linear, linear.weight_OI.clone(), None if linear.bias is None else linear.bias.detach().clone())
                        gradient_U, name = self.gradients.get((cut.kind, block.index)), f"{cut.kind} {block.index}"
                        made = cut_block(linear, cut, found[cut.role], self.step, gradient_U, self._dampings.get(name))
                        self._dampings.setdefault(name, made["damping"])
            self.known[key] = calibration_loss(self.model, self.held_NT, gone)
        finally:
            for linear, weight_OI, bias in before.values():
                linear.weight_OI.copy_(weight_OI)
                if bias is not None and linear.bias is not None:
                    linear.bias.data.copy_(bias)
        write_json(self._file, {"losses": self.known, "dampings": self._dampings})
        return self.known[key]


def _without_channels(config: Any, spread: Spread) -> Any:
    """The config without the layers and heads of a spread."""
    from llmlite.models.families import family_of
    from llmlite.pruning.heads import config_with_heads
    from llmlite.pruning.layers import config_with_layers

    family = family_of(config)
    if spread.layers:
        config = config_with_layers(config, family.layers(config) - spread.layers)
    if spread.kv_groups:
        config = config_with_heads(config, family.kv_heads(config) - spread.kv_groups, "kv_groups")
    if spread.query_heads:
        config = config_with_heads(config, family.heads(config) - spread.query_heads, "query_heads")
    return config


def _write_sums(place: Path, found: dict[str, Statistics], influence: float) -> None:
    from safetensors.torch import save_file

    with writing_folder(place) as temporary:
        for role, statistics in found.items():
            for part, moments in (("fit", statistics.fit), ("held", statistics.held)):
                if moments is not None:
                    tensors = {"gram": moments.gram_II.cpu(), "total": moments.total_I.cpu()}
                    save_file(tensors, temporary / f"{role}.{part}.safetensors", metadata={"tokens": str(moments.tokens)})
        (temporary / "influence.json").write_text(json.dumps(influence), encoding="utf-8")


def _read_sums(place: Path, device: Any) -> dict[str, Statistics]:
    from safetensors import safe_open

    from llmlite.calibration.blocks import Statistics
    from llmlite.calibration.moments import Moments

    parts: dict[str, dict[str, Moments]] = {}
    for file in sorted(place.glob("*.safetensors")):
        role, part, _ = file.name.split(".")
        with safe_open(file, framework="pt", device=str(device)) as stored:
            gram_II = stored.get_tensor("gram")
            moments = Moments(len(gram_II), dtype=gram_II.dtype, device=device)
            moments.gram_II, moments.total_I, moments.tokens = gram_II, stored.get_tensor("total"), int(stored.metadata()["tokens"])
        parts.setdefault(role, {})[part] = moments
    return {role: Statistics(found["fit"], found.get("held")) for role, found in parts.items()}
