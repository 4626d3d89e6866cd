"""Tiny real models of every architecture in the table, for every test that wants one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from llmlite.models.families import FAMILIES

ALL_FAMILIES = tuple(FAMILIES)
HEAD_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.no_heads)
FIXED_HEAD_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.no_heads)

_COMMON: dict[str, Any] = {"vocab_size": 96, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {**_LLAMA_LIKE, "sliding_window": 8},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16, "attention_bias": True},
    "gemma": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {
        **_LLAMA_LIKE,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "smollm3": {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1], "attention_bias": True, "mlp_bias": True},
    "olmo2": {**_LLAMA_LIKE, "attention_bias": True},
    "stablelm": {**_LLAMA_LIKE, "use_qkv_bias": True, "qk_layernorm": True},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 128},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Config of a model small enough for milliseconds: 3 layers, hidden 64, 4 heads on 2 key/value heads, FFN 128, 96 tokens."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **_OWN.get(model_type, _LLAMA_LIKE), **overrides})


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Fill every parameter so that a mistake shows: no zero bias, no unit norm, and attention that is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                start = 1.0 if name.endswith("weight") and "gemma" not in model.config.model_type else 0.0
                parameter.copy_(start + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def build_tiny(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny model with random, far from degenerate weights, in eval mode."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))
    return randomise(model, seed).to(dtype).eval()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model("qwen3", seed=0, dtype=torch.float32, **config_overrides)`."""
    return build_tiny


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def kept_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descent keeps its state behind every step, however little time has gone by."""
    from llmlite.distillation import descent_state

    monkeypatch.setattr(descent_state, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(descent_state, "KEEP_SHARE", torch.inf)


@pytest.fixture
def descents(monkeypatch: pytest.MonkeyPatch, kept_each_step: None) -> Callable[[int | None], list[int]]:
    """`descents(stop)` counts the rows that a descent goes down on from now on, and interrupts it at that one; None lets it end."""
    from llmlite.distillation import descent

    real = descent._descend

    def watched(stop: int | None) -> list[int]:
        calls: list[int] = []

        def descend(*args: Any) -> float:
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(1)
            return real(*args)

        monkeypatch.setattr(descent, "_descend", descend)
        return calls

    return watched


def token_ids(rows: int = 2, length: int = 20, seed: int = 0, vocab_size: int = 96) -> torch.Tensor:
    """Random ordinary tokens (never pad, bos or eos), (rows, length), int64."""
    return torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the model on the standard tokens, (rows, length, vocabulary), float32."""
    ids_BT = token_ids() if ids_BT is None else ids_BT
    return model(input_ids=ids_BT, use_cache=False).logits.float()


_STOCK_RELOAD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    ids, expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, use_cache=False).logits
    print(folder.name, float((found - expected).abs().max()))
assert "llmlite" not in sys.modules
"""


def require_stock_reload(models: dict[str, PreTrainedModel], folder: Path) -> None:
    """Save all models, load them by stock transformers in one fresh process, and want the same logits, bit for bit."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        torch.save((token_ids(), logits_of(model)), folder / name / "expected.pt")
    done = subprocess.run([sys.executable, "-c", _STOCK_RELOAD, str(folder)], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for name in sorted(models) for word in (name, "0.0")]


# A whole model folder, with a tokenizer and a chat template, as a user would have it -------------------------------------------------

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 320 tokens whose padding token is its end token, as so often."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["What does the function do?", "It returns the answer.", "user assistant system"] * 20, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    wrapped.chat_template = _CHATML
    return wrapped


def save_tiny(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """Save a tiny model with its tokenizer. Weights are small, so that training on top is well-behaved."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **{"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, **overrides})
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_noisy(source: Path, folder: Path) -> Path:
    """Save the model of another folder with some noise on its weights: near to it and not the same."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(source)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


def save_sums(file: Path, count: int) -> Path:
    """So many sums with their answers as JSON lines."""
    rows = [{"prompt": f"What is {n} plus {n + 1}?", "completion": f"{n} plus {n + 1} is {2 * n + 1}."} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


_TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""


def save_sums_task(file: Path) -> Path:
    """A task of lm-eval's with a dozen sums and two choices for each, its rows beside it."""
    rows = [{"query": f"What is {n} plus {n}?", "choices": [str(2 * n), str(2 * n + 1)], "gold": n % 2} for n in range(12)]
    file.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(_TASK.format(file=file.with_suffix(".jsonl")))
    return file


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty questions and answers as JSON lines."""
    return save_sums(tmp_path_factory.mktemp("rows") / "pairs.jsonl", 60)
