"""Damaged bitsandbytes checkpoints: codes and scales that do not belong together are refused before weights load, whatever bitsandbytes would make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmlite.errors import LoadError
from llmlite.models.find import find
from llmlite.models.load import load_model
from llmlite.models.settings import Model
from tests.conftest import logits_of, save_tiny

SCHEMES: dict[str, dict[str, Any]] = {
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "codes as float32": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
    "int8": {"load_in_8bit": True},
}
LAYER = "model.layers.1.mlp.up_proj"
PARTS = (".weight", ".weight.absmax", ".weight.nested_absmax", ".weight.quant_map", ".weight.nested_quant_map", ".SCB")
DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "half of it": lambda part: part[: len(part) // 2],
    "one less": lambda part: part[:-1],
    "one more": lambda part: torch.cat([part, part[:1]]),
    "none of it": lambda part: part[:0],
    "missing": lambda part: None,
}
STATES: list[Any] = [
    [],
    3,
    {},
    {"shape": [64, 64]},
    {"shape": "x"},
    {"shape": [-1, 64]},
    {"shape": [True, 64]},
    {"blocksize": 0},
    {"blocksize": 4096},
    {"shape": []},
]


@pytest.fixture(scope="module", params=SCHEMES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stored")
    dense = save_tiny(place / "dense")
    config = BitsAndBytesConfig(**SCHEMES[request.param])
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map={"": "cpu"}).save_pretrained(place / "model")
    return place / "model"


def mutants(folder: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """Copies in which one part of one layer is damaged, and what it is."""
    whole = load_file(folder / "model.safetensors")
    copied = shutil.copytree(folder, place)
    for name in (f"{LAYER}{part}" for part in PARTS if f"{LAYER}{part}" in whole):
        for kind, damaged in DAMAGE.items():
            if name.endswith(".nested_absmax") and kind == "half of it":
                continue  # of one, that is none
            part = damaged(whole[name])
            tensors = {key: value for key, value in whole.items() if key != name} | ({} if part is None else {name: part.clone()})
            save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
            yield f"{name}: {kind}", copied


def test_a_whole_one_is_read_and_gives_numbers(stored: Path) -> None:
    assert logits_of(load_model(find(Model(name=str(stored))), Model(), torch.device("cpu"))).isfinite().all()


def test_parts_of_another_size_are_refused_before_weights_load(stored: Path, tmp_path: Path) -> None:
    tried = 0
    for what, folder in mutants(stored, tmp_path / "model"):
        if what.endswith("SCB: missing"):  # then nothing says that it was quantized so; the weights are refused when they load
            with pytest.raises(LoadError):
                load_model(find(Model(name=str(folder))), Model(), torch.device("cpu"))
            continue
        with pytest.raises(LoadError, match="damaged") as refused:
            find(Model(name=str(folder)))
        assert LAYER in str(refused.value), what
        tried += 1
    assert tried >= 9


@pytest.mark.parametrize("change", STATES, ids=str)
def test_a_quant_state_that_is_none_or_of_another_shape_is_refused(change: Any, stored: Path, tmp_path: Path) -> None:
    tensors = load_file(stored / "model.safetensors")
    name = next((name for name in tensors if name.startswith(f"{LAYER}.weight.quant_state")), None)
    if name is None:
        pytest.skip("8 bit has none")
    state = json.loads(bytes(tensors[name].tolist()))
    text = json.dumps({**state, **change} if isinstance(change, dict) and change else change)
    folder = shutil.copytree(stored, tmp_path / "model")
    save_file({**tensors, name: torch.tensor(list(text.encode()), dtype=torch.uint8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="damaged"):
        find(Model(name=str(folder)))


def test_codes_of_another_shape_than_the_config_gives_are_refused(stored: Path, tmp_path: Path) -> None:
    tensors = load_file(stored / "model.safetensors")
    name = next((name for name in tensors if name.startswith(f"{LAYER}.weight.quant_state")), None)
    if name is None:
        pytest.skip("8 bit has none")
    state = json.loads(bytes(tensors[name].tolist()))
    text = json.dumps({**state, "shape": state["shape"][::-1]})
    folder = shutil.copytree(stored, tmp_path / "model")
    save_file({**tensors, name: torch.tensor(list(text.encode()), dtype=torch.uint8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="do not belong together"):
        load_model(find(Model(name=str(folder))), Model(), torch.device("cpu"))
