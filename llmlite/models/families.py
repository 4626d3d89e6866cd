"""THE table: where each architecture keeps its parts, and what stock transformers lets us do to them.

One `Family` for each `model_type`. Paths are plain strings; `llmlite.models.view` resolves them on a model. No other file of llmlite knows the name of
a layer or asks for a model type: whoever needs one more fact adds a field here, and every method gains. No torch here, so checks stay fast.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from llmlite.errors import UnsupportedModel

__all__ = ["FAMILIES", "Family", "family_of"]

QkvLayout = Literal["separate", "concatenated", "interleaved"]
QkNorm = Literal["per_head", "own_per_head", "across_heads"]


@dataclass(frozen=True)
class Family:
    """One architecture as data. Module paths are relative to the block where it says so, else to the `...ForCausalLM` model; None means absent.

    The defaults are Llama's. Only differences are written in the table below.

    Attributes:
        model_type: `config.model_type`, the key of the table.
        blocks, embedding, position_embedding, final_norm, head: paths from the model. `position_embedding` is a *learned* table, None for rotary positions.
        stem: further modules outside the blocks that hold parameters (the in and out projections of opt-350m); absent ones are skipped.
        attention, ffn: the modules of a block that hold the projections below; `ffn` is the block itself ("") in opt.
        q, k, v, o: projections, relative to the block. With a fused projection `qkv` is set and q, k, v are None.
        qkv_layout: rows of `qkv`: "concatenated" is all q, then all k, then all v; "interleaved" is (q, k, v) of head 0, then of head 1, ...
        q_norm, k_norm: norms of queries and keys, relative to the block.
        qk_norm: how they normalise: "per_head" (one weight of head_dim, shared by the heads), "own_per_head" (a list with one norm for each head),
            "across_heads" (statistics over all heads together: taking a head away changes the others, so pruned differs from masked).
        gate, up, down, gate_up: FFN projections, relative to the block. `gate` is None in an FFN without gating; `gate_up` fuses gate rows, then up rows.
        attention_norm, attention_post_norm, ffn_norm, ffn_post_norm: norms before the sublayer and on its output, relative to the block.
        norm_kind: "rms" or "layer". LayerNorm subtracts the mean over the hidden width.
        norm_eps: name of the config attribute that is added to the variance.
        norm_weight_offset: 1.0 where the norm multiplies by (1 + weight), as Gemma does.
        scaled_embedding: the embedding is multiplied by sqrt(hidden_size) in the forward pass.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_width: names of config attributes. `num_kv_heads` is None where every head has its
            own keys and values; `head_dim` is None where it is always hidden_size // heads.
        ffn_width_multiple: FFN width as a multiple of the hidden size when the config leaves `ffn_width` at None.
        per_layer_lists: config attributes that are lists with one entry a layer.
        attention_bias, ffn_bias: does the *output* projection (o, down) carry a bias? True always, False never, a string is the config switch. Bias
            compensation needs True or a switch.
        no_heads: empty when heads can be taken away, else why a stock checkpoint with fewer heads would not load.
        no_hidden: the same for the hidden width alone.
        no_heads_if: config switches which forbid taking heads away, each with the reason.
        no_layers_if: the same for layers.
        head_alternative: what to do instead of taking heads away.
        packs_by_position: several documents in one row, told apart only by `position_ids` that start again at 0 (no attention mask, no cache), do not see
            each other. Where it is False they do.
        saved_names: module paths that stock transformers writes under another name in the file.
        equivalents: model types that give exactly the same logits from the same tensors under the conditions `llmlite.models.rebuild` checks.
    """

    model_type: str
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    position_embedding: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    stem: tuple[str, ...] = ()

    attention: str = "self_attn"
    q: str | None = "self_attn.q_proj"
    k: str | None = "self_attn.k_proj"
    v: str | None = "self_attn.v_proj"
    qkv: str | None = None
    qkv_layout: QkvLayout = "separate"
    o: str = "self_attn.o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    qk_norm: QkNorm | None = None

    ffn: str = "mlp"
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    gate_up: str | None = None
    down: str = "mlp.down_proj"

    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    ffn_norm: str | None = "post_attention_layernorm"
    ffn_post_norm: str | None = None
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_weight_offset: float = 0.0
    scaled_embedding: bool = False

    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    ffn_width: str = "intermediate_size"
    ffn_width_multiple: int = 4
    norm_eps: str = "rms_norm_eps"
    per_layer_lists: tuple[str, ...] = ("layer_types",)

    attention_bias: bool | str = False
    ffn_bias: bool | str = False
    no_heads: str = ""
    no_hidden: str = ""
    no_heads_if: dict[str, str] = field(default_factory=dict)
    no_layers_if: dict[str, str] = field(default_factory=dict)
    head_alternative: str = "Use prune.ffn or prune.layers."
    packs_by_position: bool = True
    saved_names: dict[str, str] = field(default_factory=dict)
    equivalents: tuple[str, ...] = ()

    @property
    def norms(self) -> dict[str, str]:
        """Norms over the hidden width in one block, role -> path relative to the block."""
        roles = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")
        return {role: path for role in roles if (path := getattr(self, role)) is not None}

    @property
    def linears(self) -> dict[str, str]:
        """Projections of one block, role -> path relative to the block, in the order the block uses them."""
        roles = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
        return {role: path for role in roles if (path := getattr(self, role)) is not None}

    def heads(self, config: Any) -> int:
        """Number of query heads."""
        return int(getattr(config, self.num_heads))

    def kv_heads(self, config: Any) -> int:
        """Number of key/value heads; the number of query heads where the family has no grouping."""
        count = getattr(config, self.num_kv_heads, None) if self.num_kv_heads else None
        return int(count) if count else self.heads(config)

    def query_groups(self, config: Any) -> int:
        """Groups of query heads of which each must keep the same number: those that read one key/value head; 1 where every query head has its own."""
        heads, kv_heads = self.heads(config), self.kv_heads(config)
        return kv_heads if kv_heads < heads else 1

    def width(self, config: Any) -> int:
        """Hidden width."""
        return int(getattr(config, self.hidden_size))

    def layers(self, config: Any) -> int:
        """Number of decoder blocks."""
        return int(getattr(config, self.num_layers))

    def ffn_channels(self, config: Any) -> int:
        """FFN width, also where the config leaves it at None."""
        return int(getattr(config, self.ffn_width, None) or self.ffn_width_multiple * self.width(config))

    def dim_of_head(self, config: Any) -> int:
        """Width of one head."""
        own = getattr(config, self.head_dim, None) if self.head_dim else None
        return int(own) if own else self.width(config) // self.heads(config)


_TIED_TO_HIDDEN = "its head_dim is hidden_size // {heads}, whatever the config says, so a checkpoint with fewer heads would not load in stock transformers"
_HIDDEN_TIED_TO_HEADS = "its attention is as wide as its hidden size, so the hidden width cannot change while the heads stay"
_GEMMA_BLOCK: dict[str, Any] = {"norm_weight_offset": 1.0, "scaled_embedding": True, "attention_bias": "attention_bias"}
_SANDWICH: dict[str, Any] = {
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_QK_NORM: dict[str, Any] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

_TABLE = (
    Family("llama", attention_bias="attention_bias", ffn_bias="mlp_bias", equivalents=("mistral", "smollm3")),
    Family("mistral", equivalents=("llama", "smollm3")),
    Family("qwen2"),
    Family("qwen3", **_QK_NORM, qk_norm="per_head", attention_bias="attention_bias"),
    Family("gemma", **_GEMMA_BLOCK),
    Family("gemma2", **_GEMMA_BLOCK, **_SANDWICH),
    Family("gemma3_text", **_GEMMA_BLOCK, **_SANDWICH, **_QK_NORM, qk_norm="per_head"),
    Family("granite", attention_bias="attention_bias", ffn_bias="mlp_bias"),
    Family("smollm3", per_layer_lists=("layer_types", "no_rope_layers"), attention_bias="attention_bias", ffn_bias="mlp_bias"),
    Family(
        "olmo2",
        **_QK_NORM,
        qk_norm="across_heads",
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        ffn_norm=None,
        ffn_post_norm="post_feedforward_layernorm",
        attention_bias="attention_bias",
    ),
    Family(
        "phi",
        final_norm="model.final_layernorm",
        o="self_attn.dense",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        qk_norm="per_head",
        gate=None,
        up="mlp.fc1",
        down="mlp.fc2",
        ffn_norm=None,
        norm_kind="layer",
        norm_eps="layer_norm_eps",
        attention_bias=True,
        ffn_bias=True,
        no_heads_if={"qk_layernorm": "with qk_layernorm its norms are hidden_size // num_attention_heads wide, whatever head_dim says"},
    ),
    Family(
        "phi3",
        q=None,
        k=None,
        v=None,
        qkv="self_attn.qkv_proj",
        qkv_layout="concatenated",
        gate=None,
        up=None,
        gate_up="mlp.gate_up_proj",
    ),
    Family(
        "stablelm",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        qk_norm="own_per_head",
        norm_kind="layer",
        norm_eps="layer_norm_eps",
        head_dim=None,
        no_heads=_TIED_TO_HIDDEN.format(heads="num_attention_heads"),
        no_hidden=_HIDDEN_TIED_TO_HEADS,
    ),
    Family(
        "gpt2",
        blocks="transformer.h",
        embedding="transformer.wte",
        position_embedding="transformer.wpe",
        final_norm="transformer.ln_f",
        attention="attn",
        q=None,
        k=None,
        v=None,
        qkv="attn.c_attn",
        qkv_layout="concatenated",
        o="attn.c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        attention_norm="ln_1",
        ffn_norm="ln_2",
        norm_kind="layer",
        norm_eps="layer_norm_epsilon",
        hidden_size="n_embd",
        num_layers="n_layer",
        num_heads="n_head",
        num_kv_heads=None,
        head_dim=None,
        ffn_width="n_inner",
        attention_bias=True,
        ffn_bias=True,
        no_heads=_TIED_TO_HIDDEN.format(heads="n_head"),
        no_hidden=_HIDDEN_TIED_TO_HEADS,
        no_layers_if={"scale_attn_by_inverse_layer_idx": "it scales attention by 1 / layer index, so every layer after a removed one would change"},
    ),
    Family(
        "opt",
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        position_embedding="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        stem=("model.decoder.project_in", "model.decoder.project_out"),
        o="self_attn.out_proj",
        ffn="",
        gate=None,
        up="fc1",
        down="fc2",
        attention_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        norm_kind="layer",
        num_kv_heads=None,
        head_dim=None,
        ffn_width="ffn_dim",
        attention_bias="enable_bias",
        ffn_bias="enable_bias",
        no_heads=_TIED_TO_HIDDEN.format(heads="num_attention_heads"),
        no_hidden=_HIDDEN_TIED_TO_HEADS,
        packs_by_position=False,
    ),
    Family(
        "gpt_neox",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        q=None,
        k=None,
        v=None,
        qkv="attention.query_key_value",
        qkv_layout="interleaved",
        o="attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norm_kind="layer",
        norm_eps="layer_norm_eps",
        num_kv_heads=None,
        head_dim=None,
        attention_bias="attention_bias",
        ffn_bias=True,
        saved_names={"lm_head": "embed_out"},
        no_heads=_TIED_TO_HIDDEN.format(heads="num_attention_heads"),
        no_hidden=_HIDDEN_TIED_TO_HEADS,
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_STILL_WORKS = "Quantization (bitsandbytes) and LoRA with explicit target_modules still work on it."
_EXPERTS_STILL_WORK = (
    "LoRA with explicit target_modules on its attention projections still works, and so does quantization of its nn.Linear layers "
    "(its experts are 3-D parameters, which bitsandbytes leaves in 16 bit)."
)


def family_of(config: Any) -> Family:
    """The table's row for a model.

    Args:
        config: any `transformers.PreTrainedConfig` (or whatever has its attributes); weights are not needed.

    Raises:
        UnsupportedModel: unknown architecture, mixture of experts, encoder-decoder, multimodal or per-layer widths; says what still works.
    """
    model_type = str(getattr(config, "model_type", "") or "")
    family = FAMILIES.get(model_type)
    problem, still = _why_not(config, known=family is not None)
    if family is not None and not problem:
        return family
    nearest = _nearest(model_type)
    hint = f"The nearest architecture in the table is {nearest}." if nearest else f"Known: {', '.join(sorted(FAMILIES))}."
    raise UnsupportedModel(f"llmlite does not know where the parts of model_type '{model_type}' are: {problem}. {still} {hint}")


def _why_not(config: Any, *, known: bool) -> tuple[str, str]:
    """What keeps a config out of the table, or "", and what can be done with it all the same."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is an encoder-decoder, and only decoder-only language models are mapped", _STILL_WORKS
    if getattr(config, "is_heterogeneous", False):
        return "its per_layer_config gives layers different widths, which is not mapped", _STILL_WORKS
    if known:
        return "", ""
    if any(getattr(config, name, None) is not None for name in ("text_config", "vision_config", "audio_config")):
        return "it is multimodal; load its text model alone if the Hub has one", _STILL_WORKS
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERT_COUNTS):
        return "it is a mixture of experts, whose experts are 3-D parameters that are not mapped yet", _EXPERTS_STILL_WORK
    return "this architecture is not in the table (llmlite/models/families.py; one row of paths adds it)", _STILL_WORKS


def _nearest(model_type: str) -> str | None:
    stems = [name for name in FAMILIES if model_type.startswith(name) or name.startswith(model_type or "?")]
    if stems:
        return max(stems, key=len)
    close = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.65)
    return close[0] if close else None
