"""Take units out of a model: key/value groups, query heads, FFN channels, layers, hidden width.

Each function is pure: it reads a view and which units *stay*, and returns (new config, new state dict) without touching the model.
`llmlite.models.rebuild.rebuild` makes a model of them. What comes out is a config that stock transformers loads, or an error that says why not.
Keeping every unit returns the same numbers, bit for bit. On a meta model they return shapes, which is how a plan counts.

Letters: H query heads, K key/value heads, D head_dim, C FFN channels.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmlite.errors import UnsupportedModel
from llmlite.models.legal import legal_config, with_bias_switches
from llmlite.models.size import meta_model
from llmlite.models.view import BlockView, LinearView, ModelView

__all__ = [
    "Sliced",
    "finish",
    "head_rows",
    "names_of",
    "plain_state",
    "select_units",
    "take_ffn_channels",
    "take_hidden",
    "take_kv_groups",
    "take_layers",
    "take_query_heads",
    "with_zero_biases",
]

log = logging.getLogger(__name__)

Sliced = tuple[Any, dict[str, Tensor]]
PerLayer = Sequence[Sequence[int]]


def take_kv_groups(view: ModelView, keep: PerLayer) -> Sliced:
    """Keep some key/value heads in each layer, each with all query heads that read it.

    Equal to masking (zeroing the input columns of `o` that belong to the heads that go), except where queries and keys are normalised across all heads
    together (olmo2): there the statistics change with the heads.

    Args:
        view: a plain model: not quantized, no adapters.
        keep: for each layer the key/value heads that stay, ascending; the same number in every layer, since stock configs have one number for all.

    Raises:
        UnsupportedModel: the family cannot express fewer heads, or stock code refuses the resulting config; the message has the alternative.
        ValueError: `keep` is not one ascending list of equal length for each layer.
    """
    _check_lists(view, keep, view.kv_heads, "key/value heads")
    group = view.heads // view.kv_heads
    return _take_heads(view, [[kv * group + member for kv in kept for member in range(group)] for kept in keep], keep)


def take_query_heads(view: ModelView, keep: PerLayer) -> Sliced:
    """Keep some query heads in each layer, evenly in each group; all key/value heads stay.

    A model without groups (every query head has its own keys and values) loses the keys and values with the heads.

    Args:
        view: a plain model: not quantized, no adapters.
        keep: for each layer the query heads that stay, ascending; the same number from every group (heads kv * group ... kv * group + group - 1 read
            key/value head kv) and in every layer.

    Raises:
        UnsupportedModel, ValueError: as in `take_kv_groups`; also when a group keeps more heads than another.
    """
    _check_lists(view, keep, view.heads, "query heads")
    group = view.heads // view.kv_heads
    if group == 1:
        return _take_heads(view, keep, keep)
    for layer, kept in enumerate(keep):
        sizes = [sum(head // group == kv for head in kept) for kv in range(view.kv_heads)]
        if len(set(sizes)) != 1:
            raise ValueError(f"layer {layer} keeps {sizes} query heads in its {view.kv_heads} groups; stock attention needs the same number in each")
    return _take_heads(view, keep, [range(view.kv_heads)] * len(keep))


def take_ffn_channels(view: ModelView, keep: PerLayer) -> Sliced:
    """Keep some FFN channels in each layer: rows of gate and up, columns of down. Equal to zeroing the columns of `down` that go.

    Args:
        view: a plain model: not quantized, no adapters.
        keep: for each layer the channels that stay, ascending; the same number in every layer.

    Raises:
        UnsupportedModel: the model is quantized or wrapped.
        ValueError: `keep` is not one ascending list of equal length for each layer.
    """
    channels = view.ffn_channels
    _check_lists(view, keep, channels, "FFN channels")
    state = plain_state(view)
    for block, kept in zip(view.blocks, keep, strict=True):
        index = _index(kept)
        for role in ("gate", "up"):
            _take_rows(state, block.linears.get(role), index)
        _take_rows(state, block.linears.get("gate_up"), torch.cat([index, index + channels]))
        _take_columns(state, block.linears["down"], index)
    return finish(view, {view.family.ffn_width: len(keep[0])}, state)


def take_layers(view: ModelView, keep: Sequence[int]) -> Sliced:
    """Keep some decoder blocks. Equal to skipping the others; layers are numbered anew, so caches work, and per-layer lists in the config follow.

    Args:
        view: a plain model: not quantized, no adapters.
        keep: the layers that stay, ascending.

    Raises:
        UnsupportedModel: a setting of the model makes a layer depend on its number.
        ValueError: `keep` is empty, not ascending or out of range.
    """
    _check_indices(keep, len(view.blocks), "layers", "keep")
    if len(keep) < len(view.blocks):
        _refuse_switches(view, view.family.no_layers_if, "remove layers from")
    prefix = f"{view.family.blocks}."
    state = {}
    new_index = {str(old): new for new, old in enumerate(keep)}
    for name, tensor in plain_state(view).items():
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        old, _, rest = name.removeprefix(prefix).partition(".")
        if old in new_index:
            state[f"{prefix}{new_index[old]}.{rest}"] = tensor
    lists = {name: values for name in view.family.per_layer_lists if (values := getattr(view.config, name, None)) is not None}
    changes: dict[str, Any] = {name: [values[old] for old in keep] for name, values in lists.items()}
    return finish(view, {view.family.num_layers: len(keep), **changes}, state)


def take_hidden(view: ModelView, keep: Sequence[int]) -> Sliced:
    """Keep some dimensions of the residual stream: embeddings, norms, and every in and out side that touches it. Heads and FFN channels stay.

    An RMSNorm divides by the root of the *mean* square, and the mean now runs over fewer dimensions: with h of H left, a norm whose removed inputs are 0 would
    come out smaller by sqrt(h / H). That factor is folded into the norm weights (and H / h into eps), so that for RMSNorm families pruned equals
    masked: the model in which those embedding columns and output rows are zero. It holds to rounding; not quite where one eps serves norms of different widths
    (qwen3, gemma2, gemma3_text: differences of the order of eps). Gemma multiplies its embedding by sqrt(hidden_size): there the outputs of the sublayers
    shrink by the same factor. LayerNorm (phi) also subtracts the mean: no such identity holds and nothing is rescaled.

    Args:
        view: a plain model: not quantized, no adapters.
        keep: the dimensions that stay, ascending, the same for the whole model.

    Raises:
        UnsupportedModel: the family ties its hidden width to its heads, or stock code refuses the resulting config.
        ValueError: `keep` is empty, not ascending or out of range.
    """
    family, total = view.family, view.hidden_size
    _check_indices(keep, total, "hidden dimensions", "keep")
    if family.no_hidden and len(keep) < total:
        raise UnsupportedModel(f"prune.hidden cannot shrink {family.model_type}: {family.no_hidden}. {family.head_alternative}")
    state, index = plain_state(view), _index(keep)
    for linear in view.linears():
        (_take_rows if linear.role in ("o", "down") else _take_columns)(state, linear, index)
    for module in [view.embedding, view.position_embedding, None if view.tied else view.head]:
        for name in names_of(view, module):
            if name.endswith("weight"):  # phi's head has a bias over the vocabulary
                state[name] = select_units(state[name], 1, index)
    for norm in _hidden_norms(view):
        for name in names_of(view, norm):
            state[name] = select_units(state[name], 0, index)
    changes: dict[str, Any] = {family.hidden_size: len(keep)}
    if family.norm_kind == "rms" and len(keep) < total:
        changes |= _keep_scale(view, state, total / len(keep))
    if family.head_dim:
        changes[family.head_dim] = view.head_dim
    return finish(view, changes, state)


def with_zero_biases(view: ModelView, *, attention: bool = False, ffn: bool = False) -> Sliced:
    """Give the output projections (o, down) a bias of zeros, so that bias compensation has somewhere to go. The logits stay the same.

    Raises:
        UnsupportedModel: neither the family nor an equivalent one has a bias there.
    """
    config, note = with_bias_switches(view.config, attention=attention, ffn=ffn)
    state = plain_state(view)
    like = next(iter(state.values()))
    for name, parameter in meta_model(config).named_parameters():
        if name not in state and name.endswith(".bias"):
            state[name] = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
    if note:
        log.info("%s", note)
    return config, state


def head_rows(view: ModelView, role: str, heads: Sequence[int]) -> Tensor:
    """Rows of a projection that belong to heads, fused or not.

    Args:
        view: the model.
        role: "q", "k" or "v". In a fused projection the rows returned are those of `qkv`.
        heads: query heads for "q", key/value heads for "k" and "v".

    Returns:
        Row indices, int64, (len(heads) * D,), head by head.
    """
    part, head_dim = "qkv".index(role), view.head_dim
    start_H = _index(heads) * head_dim
    if view.family.qkv_layout == "interleaved":
        start_H = 3 * start_H + part * head_dim
    elif view.family.qkv_layout == "concatenated":
        start_H = start_H + (0, view.heads, view.heads + view.kv_heads)[part] * head_dim
    return (start_H[:, None] + torch.arange(head_dim)).flatten()


def _take_heads(view: ModelView, q_keep: PerLayer, kv_keep: PerLayer) -> Sliced:
    family = view.family
    if len(q_keep[0]) < view.heads:
        if family.no_heads:
            raise UnsupportedModel(f"prune.heads cannot shrink {family.model_type}: {family.no_heads}. {family.head_alternative}")
        _refuse_switches(view, family.no_heads_if, "take heads away from")
    state = plain_state(view)
    for block, q_heads, kv_heads in zip(view.blocks, q_keep, kv_keep, strict=True):
        rows = {role: head_rows(view, role, heads) for role, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads))}
        for role, index in rows.items():
            _take_rows(state, block.linears.get(role), index)
        _take_fused_rows(state, block, q_heads, rows, view)
        columns = (_index(q_heads)[:, None] * view.head_dim + torch.arange(view.head_dim)).flatten()
        _take_columns(state, block.linears["o"], columns)
        if family.qk_norm == "across_heads":
            for norm, index in ((block.q_norm, rows["q"]), (block.k_norm, rows["k"])):
                for name in names_of(view, norm):
                    state[name] = select_units(state[name], 0, index)
    changes: dict[str, Any] = {family.num_heads: len(q_keep[0])}
    if family.num_kv_heads:
        changes[family.num_kv_heads] = len(kv_keep[0])
    if family.head_dim:
        changes[family.head_dim] = view.head_dim
    return finish(view, changes, state)


def _take_fused_rows(state: dict[str, Tensor], block: BlockView, q_heads: Sequence[int], rows: dict[str, Tensor], view: ModelView) -> None:
    order = torch.cat(list(rows.values()))
    if view.family.qkv_layout == "interleaved":  # q, k and v of one head stand together
        order = torch.cat([part.view(len(q_heads), -1) for part in rows.values()], dim=1).flatten()
    _take_rows(state, block.linears.get("qkv"), order)


def plain_state(view: ModelView) -> dict[str, Tensor]:
    """All tensors of the model, a tied head left out. No copies.

    Raises:
        UnsupportedModel: quantized, wrapped by adapters, or with parameters that the table does not know.
    """
    if view.wrapped:
        raise UnsupportedModel("the model carries PEFT layers, which slicing would not follow. Merge or unload the adapter first.")
    if view.quantized:
        raise UnsupportedModel("the model is quantized, and packed weights cannot be sliced. Prune first, quantize afterwards.")
    unmapped = view.unmapped_parameters()
    if unmapped:
        raise UnsupportedModel(f"{view.family.model_type} has parameters that the families table does not know: {', '.join(unmapped[:5])}.")
    tied = set(names_of(view, view.head)) - {name for name in names_of(view, view.head) if name.endswith("bias")} if view.tied else set()
    return {name: tensor.detach() for name, tensor in view.model.state_dict().items() if name not in tied}


def finish(view: ModelView, changes: dict[str, Any], state: dict[str, Tensor]) -> Sliced:
    """The config with some values changed, made legal, and the tensors that go with it."""
    config = copy.deepcopy(view.config)
    for name, value in changes.items():
        if getattr(config, name, None) != value and not (name == view.family.ffn_width and value == view.ffn_channels):
            setattr(config, name, value)
    legal, note = legal_config(config)
    if note:
        log.info("%s", note)
    return legal, state


def _hidden_norms(view: ModelView) -> list[Any]:
    inside = [norm for block in view.blocks for norm in block.norms.values()]
    return inside if view.final_norm is None else [*inside, view.final_norm]


def _keep_scale(view: ModelView, state: dict[str, Tensor], shrink: float) -> dict[str, Any]:
    """Fold H / h = `shrink` into the RMSNorm weights; returns the config values that change. See `take_hidden`."""
    family = view.family
    stream = shrink**-0.5 if family.scaled_embedding else 1.0
    post_norms = [norm for block in view.blocks for role, norm in block.norms.items() if role.endswith("post_norm")]
    for norm in _hidden_norms(view):
        on_output = any(norm is post for post in post_norms)
        for name in names_of(view, norm):
            factor = shrink**0.5 * (stream if on_output else 1.0)
            scaled = (state[name].float() + family.norm_weight_offset) * factor - family.norm_weight_offset
            state[name] = scaled.to(state[name].dtype)
    if family.scaled_embedding and not post_norms:
        for linear in view.linears(("o", "down")):
            for name in (f"{linear.name}.weight", f"{linear.name}.bias"):
                if name in state:
                    state[name] = state[name] * stream
    return {} if family.scaled_embedding else {family.norm_eps: getattr(view.config, family.norm_eps) * shrink}


def _take_rows(state: dict[str, Tensor], linear: LinearView | None, index: Tensor) -> None:
    """Keep outputs of a projection: weight rows and bias."""
    if linear is None:
        return
    weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
    state[weight] = select_units(state[weight], 1 if linear.conv1d else 0, index)
    if bias in state:
        state[bias] = select_units(state[bias], 0, index)


def _take_columns(state: dict[str, Tensor], linear: LinearView, index: Tensor) -> None:
    """Keep inputs of a projection: weight columns."""
    weight = f"{linear.name}.weight"
    state[weight] = select_units(state[weight], 0 if linear.conv1d else 1, index)


def select_units(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Some entries along one dimension, a copy."""
    return tensor.index_select(dim, index.to(tensor.device))


def names_of(view: ModelView, module: Any) -> list[str]:
    """Dotted names of a module's own tensors."""
    if module is None:
        return []
    prefix = next(name for name, candidate in view.model.named_modules() if candidate is module)
    return [f"{prefix}.{name}" for name, _ in module.named_parameters()]


def _index(units: Sequence[int]) -> Tensor:
    return torch.tensor(list(units), dtype=torch.long)


def _refuse_switches(view: ModelView, switches: dict[str, str], verb: str) -> None:
    for switch, reason in switches.items():
        if getattr(view.config, switch, False):
            raise UnsupportedModel(f"cannot {verb} this {view.family.model_type}: {reason}. {view.family.head_alternative}")


def _check_lists(view: ModelView, keep: PerLayer, total: int, unit: str) -> None:
    if len(keep) != len(view.blocks):
        raise ValueError(f"keep has {len(keep)} lists, the model has {len(view.blocks)} layers; give one list of {unit} for each layer")
    for layer, kept in enumerate(keep):
        _check_indices(kept, total, unit, f"keep[{layer}]")
    sizes = sorted({len(kept) for kept in keep})
    if len(sizes) > 1:
        raise ValueError(f"layers keep different numbers of {unit} ({sizes}); a stock config has one number for all layers")


def _check_indices(kept: Sequence[int], total: int, unit: str, where: str) -> None:
    if not len(kept) or any(b <= a for a, b in itertools.pairwise(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise ValueError(f"{where} must name at least one of {total} {unit}, ascending, each once; got {list(kept)[:12]}")
