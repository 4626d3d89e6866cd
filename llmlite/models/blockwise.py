"""A model of which one decoder block at a time is in memory. What lies outside the blocks (embeddings, final norm, head) always is.

The blocks of a stock model are left on the meta device. `present` brings one in from its files and lets it go again; within it the block is as it would be in
a whole model, so statistics, changes and forward passes need no second version. A plain forward pass works as well and brings in one block after the other.

    for block in ModelView(model).blocks:
        with present(block):
            ...                               # read it, run it, change it
        replace(block, file)                  # a changed block must have been written: letting go forgets
    write_blockwise(model, folder, dtype)     # a stock folder, one shard for each block

Changes go to new files only: writing into weights that a library has offloaded does nothing, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmlite.errors import LoadError, UnsupportedModel, counted
from llmlite.models.device_map import brought
from llmlite.models.safety import make_safe
from llmlite.models.tensor_files import TensorFiles
from llmlite.models.view import BlockView, ModelView
from llmlite.storage import flush, write_json

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from llmlite.models.settings import Model
    from llmlite.models.slicing import Sliced

__all__ = ["is_blockwise", "load_blockwise", "present", "rebuilt", "replace", "shelf_of", "write_blockwise"]

Tensors = dict[str, Tensor]


class Shelf:
    """Where the blocks of one model are while they are not in memory.

    Attributes:
        model: the stock model.
        folder: the stock folder that it was loaded from, or None for one that is in no folder yet.
        spill: a folder on disk for activations that are too many for memory, or None.
        arrived: called with each block that was brought in, for instance to put calibrated codes in place.
    """

    def __init__(self, model: Any, folder: Path | None, source: Callable[[str], Tensors], dtype: torch.dtype, device: torch.device, spill: Path | None) -> None:
        self.model, self.folder, self.spill = model, folder, spill
        self.arrived: Callable[[BlockView], object] | None = None
        self._source, self._dtype, self._device = source, dtype, device
        self._replaced: dict[str, Path] = {}
        self._inside: dict[str, int] = {}  # how deep `present` is nested
        model.tie_weights()  # before, so that a tied head is not asked for; and after, so that it is the embedding that came
        blocks = ModelView(model).blocks
        self._empty = {block.name: dict(block.module.named_parameters()) for block in blocks}
        outside = [name for name, _ in model.named_parameters() if not name.startswith(tuple(f"{block.name}." for block in blocks))]
        self.fill("", outside, source(""))
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        for block in blocks:
            block.module.__dict__["shelf"] = self
            block.module.forward = partial(_forward, block)

    def replace(self, block: BlockView, file: Path) -> None:
        """From now on the block is what this file holds, under names relative to the block."""
        self._replaced[block.name] = file

    @contextmanager
    def present(self, block: BlockView) -> Iterator[None]:
        """See the function of this name."""
        depth = self._inside.get(block.name, 0)
        if not depth:
            self._bring(block)
        self._inside[block.name] = depth + 1
        try:
            yield
        finally:
            self._inside[block.name] -= 1
            if not depth:
                self._let_go(block)

    def _bring(self, block: BlockView) -> None:
        if block.name in self._replaced:
            files = TensorFiles(self._replaced[block.name])
            tensors = {f"{block.name}.{name}": files.read(name) for name in files.names()}
        else:
            tensors = self._source(block.name)
        self.fill(f"{block.name}.", list(self._empty[block.name]), tensors)
        if self.arrived is not None:
            self.arrived(block)

    def _let_go(self, block: BlockView) -> None:
        for name, parameter in self._empty[block.name].items():
            module, leaf = _owner(block.module, name)
            module._parameters[leaf] = parameter
            if "quant_state" in module.__dict__:  # bitsandbytes' layers hold what they need a second time: 4 bit here,
                module.__dict__["quant_state"] = None
            state: Any = module.__dict__.get("state")
            if hasattr(state, "CB"):  # 8 bit there
                state.CB = state.SCB = state.subB = state.idx = None

    def fill(self, prefix: str, names: list[str], tensors: Tensors) -> None:
        """Put tensors into parameters that were empty; those of bitsandbytes layers are quantized, or taken as they were quantized."""
        for name in names:
            full = prefix + name
            if full not in tensors:
                raise LoadError(
                    f"model: '{self.folder}' has no tensor '{full}' under that name, so it cannot be loaded block by block. Use load: whole, or save it once "
                    "with stock transformers: model.save_pretrained(new_folder)."
                )
            module, leaf = _owner(self.model, full)
            empty, value = module._parameters[leaf], tensors[full].to(self._device)
            assert empty is not None
            quantizer = getattr(self.model, "hf_quantizer", None)
            if quantizer is not None and quantizer.param_needs_quantization(self.model, full):
                filled = _quantized(self.model, full, value, tensors, self._dtype)
            else:
                filled = nn.Parameter(value.to(self._dtype), requires_grad=empty.requires_grad)
                if filled.shape != empty.shape:
                    raise LoadError(f"model: '{self.folder}' holds {full} with shape {tuple(filled.shape)}, its config.json wants {tuple(empty.shape)}.")
            module._parameters[leaf] = filled


def is_blockwise(model: nn.Module) -> bool:
    """Whether the blocks of this model come and go."""
    return shelf_of(model) is not None


def shelf_of(model: nn.Module) -> Shelf | None:
    """The shelf of a model of which one block at a time is in memory, or None for a whole one."""
    return next((module.__dict__["shelf"] for module in model.modules() if "shelf" in module.__dict__), None)


@contextmanager
def present(block: BlockView) -> Iterator[None]:
    """Within it the block is in memory; afterwards it is not, and what was changed in it is forgotten. With a whole model nothing happens."""
    shelf: Shelf | None = block.module.__dict__.get("shelf")
    with brought(block.module) if shelf is None else shelf.present(block):
        yield


def replace(block: BlockView, file: Path) -> None:
    """From now on the block is what this file holds, under names relative to the block. For a whole model nothing happens: the change is in memory."""
    shelf: Shelf | None = block.module.__dict__.get("shelf")
    if shelf is not None:
        shelf.replace(block, file)


def _forward(block: BlockView, *args: Any, **kwargs: Any) -> Any:
    with present(block):
        return type(block.module).forward(block.module, *args, **kwargs)


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


def _quantized(model: Any, name: str, value: Tensor, tensors: Tensors, dtype: torch.dtype) -> nn.Parameter:
    """A bitsandbytes parameter, made by the operations of stock transformers."""
    quantizer = model.hf_quantizer
    if not quantizer.pre_quantized:
        made = quantizer.get_quantize_ops().convert({name: value.to(dtype)}, full_layer_name=name, model=model)
        parameter: nn.Parameter = next(iter(made.values()))
        return parameter
    path, _, leaf = name.rpartition(".")
    stored = {part: tensors[f"{path}.{part}"].to(value.device) for part in quantizer.serialized_names[leaf] if f"{path}.{part}" in tensors}
    made = quantizer.get_load_operations()["deserialize"](quantizer).convert({**stored, leaf: value}, model=model, full_layer_name=name)
    stored_parameter: nn.Parameter = made[leaf]
    return stored_parameter


# loading ------------------------------------------------------------------------------------------------------------------------------


def load_blockwise(
    folder: Path,
    settings: Model,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    spill: Path | None = None,
) -> PreTrainedModel:
    """What `llmlite.models.load.load_model` loads, one block at a time in memory.

    Args:
        folder: a stock folder, quantized by bitsandbytes or not.
        settings: `dtype`, `attn_implementation` and `trust_remote_code` of the model.
        device: where blocks are brought to.
        dtype: of the weights; None for what the settings say.
        quantization_config: quantize each block as it comes in.
        spill: see `Shelf`.

    Raises:
        LoadError: tensors are missing, or have names of other times, which only a whole load translates.
    """
    from transformers import AutoConfig

    from llmlite.models.load import compute_dtype, fill_added_tokens

    config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    dtype = dtype or compute_dtype(device, settings.dtype)
    kept = getattr(config, "quantization_config", None)
    quantizer: Any = None
    if kept is not None or quantization_config is not None:
        from transformers.quantizers import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(kept or quantization_config, pre_quantized=kept is not None)
        dtype = config.dtype if kept is not None else dtype  # as stock transformers: a quantized checkpoint is computed in the type it is stored in
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model = _skeleton(config, dtype, settings.attn_implementation, quantizer)
    generation = folder / "generation_config.json"
    if generation.is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    Shelf(model, folder, partial(_from_files, TensorFiles(folder), ModelView(model)), dtype, device, spill)
    fill_added_tokens(model, folder, settings)
    make_safe(model)
    return model.eval()


def _skeleton(config: Any, dtype: torch.dtype, attention: str | None, quantizer: Any = None) -> Any:
    """A stock model whose parameters are on the meta device and whose buffers are real, without a moment in which parameters take memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **({"attn_implementation": attention} if attention else {}))
    for module in model.modules():  # rotary frequencies and the like are in no file; stock loading computes them in the same way
        empty = {name: torch.empty_like(buffer, device="cpu") for name, buffer in module.named_buffers(recurse=False)}
        module._buffers.update(empty)
        if empty:
            model._init_weights(module)
    if quantizer is not None:
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    return model


def _from_files(files: TensorFiles, view: ModelView, block: str) -> Tensors:
    """The tensors of one block, or of what lies outside all blocks (""), by the names of the model.

    Files may leave out the name of the decoder in front (gpt2 on the Hub), or carry another name for a module (see `Family.saved_names`).
    """
    saved = {old: new for new, old in view.family.saved_names.items()}
    decoder = f"{view.model.base_model_prefix}."
    inside = tuple(f"{each.name}." for each in view.blocks)
    own = {name.rpartition(".")[0] for name, _ in view.model.named_parameters()}
    found: Tensors = {}
    for name in files.names():
        path, _, leaf = name.rpartition(".")
        full = f"{saved.get(path, path)}.{leaf}"
        if not full.startswith(decoder) and f"{decoder}{full}".rpartition(".")[0] in own:
            full = decoder + full
        if full.startswith(f"{block}.") if block else not full.startswith(inside) and _parents(full) & own:
            found[full] = files.read(name)  # nothing that the model does not have: under other names that could be all of it
    return found


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


def rebuilt(model: PreTrainedModel, take: Callable[[ModelView], Sliced]) -> PreTrainedModel:
    """A fresh stock model from a new config and sliced tensors, as `llmlite.models.rebuild.rebuild` makes it; of a blockwise model each block is sliced when
    it is brought in.

    Args:
        model: a plain model; not to be used afterwards.
        take: a function of `llmlite.models.slicing`, given all but the view.
    """
    from llmlite.models.rebuild import rebuild

    shelf = shelf_of(model)
    if shelf is None:
        return rebuild(model, *take(ModelView(model)))
    view = ModelView(model)
    config, outside = take(view)
    old = {block.name: block for block in view.blocks}

    def source(name: str) -> Tensors:
        if not name:
            return {full: tensor for full, tensor in outside.items() if not tensor.is_meta}
        with present(old[name]):
            return {full: tensor for full, tensor in take(view)[1].items() if full.startswith(f"{name}.")}

    fresh = _skeleton(config, shelf._dtype, model.config._attn_implementation)
    fresh.generation_config = model.generation_config
    Shelf(fresh, None, source, shelf._dtype, shelf._device, shelf.spill)
    return fresh.eval()


# writing ------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_blockwise(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a complete stock folder, one shard for what lies outside the blocks and one for each block; the index and the config come last.

    The numbers are those that `llmlite.models.save` would write. Shards that are there already are not written again, so a write that was stopped goes on.

    Args:
        model: blockwise.
        folder: written into; shards in it must be of this model.
        dtype: dense weights are rounded to it, and kept in it unless the model is quantized.
    """
    view, quantized = ModelView(model), getattr(model, "hf_quantizer", None) is not None
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    size, total = 0, len(view.blocks) + 1
    for number, block in enumerate([None, *view.blocks], start=1):
        file = folder / f"model-{number:05d}-of-{total:05d}.safetensors"
        if not file.is_file():
            _write_shard(file, _outside(view, dtype, quantized) if block is None else _of_block(block, dtype, quantized))
        stored = TensorFiles(file)
        weight_map |= dict.fromkeys(stored.names(), file.name)
        size += sum(stored.bytes_of(name) for name in stored.names())
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = str(next(p for p in view.embedding.parameters()).dtype if quantized else dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)  # whole or not at all: it says that the folder is complete


def _of_block(block: BlockView, dtype: torch.dtype, quantized: bool) -> Tensors:
    with present(block):
        dense = {name for name, parameter in block.module.named_parameters() if parameter.is_floating_point() and not hasattr(parameter, "quant_state")}
        return {
            f"{block.name}.{name}": _stored(tensor, dtype, quantized) if name in dense else tensor.cpu().contiguous()
            for name, tensor in block.module.state_dict().items()
        }


def _outside(view: ModelView, dtype: torch.dtype, quantized: bool) -> Tensors:
    inside = tuple(f"{block.name}." for block in view.blocks)
    found = {}
    for name, tensor in view.model.named_parameters():  # a tied head comes once
        path, _, leaf = name.rpartition(".")
        if not name.startswith(inside):
            found[f"{view.family.saved_names.get(path, path)}.{leaf}"] = _stored(tensor.data, dtype, quantized)
    return found


def _stored(tensor: Tensor, dtype: torch.dtype, quantized: bool) -> Tensor:
    """The tensor as it goes into the file; see `llmlite.models.save`."""
    if tensor.dtype.itemsize <= dtype.itemsize:
        return tensor.cpu().contiguous()
    return (tensor.to(dtype).to(tensor.dtype) if quantized else tensor.to(dtype)).cpu().contiguous()


def _write_shard(file: Path, tensors: Tensors) -> None:
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise UnsupportedModel(f"{counted(len(meta), 'tensor')} of {file.name} not in memory, first {meta[0]}.")
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    flush(part)
    part.replace(file)
