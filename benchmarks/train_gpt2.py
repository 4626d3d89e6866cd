"""A small GPT-2 trained from nothing on documentation that llmlite's own dependencies carry: a second family with real, if modest, weights for the benchmarks.

    python benchmarks/train_gpt2.py FOLDER --steps 2500

The text, written to FOLDER-text.jsonl, is the docstrings of installed packages, each paragraph once. The documentation inside Python alone is too little: in
2,500 steps it was learned by heart (training loss 0.94, held-out perplexity in the thousands). Learned positions, LayerNorm with biases, fused q, k and v
stored transposed, GELU: nothing in the model is Llama-shaped. A byte-level BPE tokenizer of 8,192 tokens is trained on the same text. The result is stock.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import llmlite

PACKAGES = ["transformers", "torch", "numpy", "datasets", "accelerate", "peft", "huggingface_hub", "pydantic", "pandas", "sympy", "networkx", "matplotlib"]
ROW = 2000  # characters of a row, about; shorter than FEWEST is left out
FEWEST = 200
END = "<|endoftext|>"


def docstrings(package: str) -> Iterator[str]:
    """The documentation of every module, class and function in an installed package, cleaned of its indentation."""
    found = importlib.util.find_spec(package)
    folder = Path(str(found.origin)).parent if found else Path()
    for path in sorted(folder.rglob("*.py")) if found else ():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates and tests of broken encodings
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node, clean=False)):
                yield inspect.cleandoc(text)


def rows_of(packages: list[str], seed: int) -> list[str]:
    """Rows of whole documentations, paragraphs that were there before left out, in an order drawn from the seed."""
    seen: set[str] = set()
    rows: list[str] = []
    for package in packages:
        for text in docstrings(package):
            fresh = [part for part in text.split("\n\n") if part not in seen and not seen.add(part)]  # type: ignore[func-returns-value]
            whole = "\n\n".join(fresh)
            rows += [row for start in range(0, len(whole), ROW) if len(row := whole[start : start + ROW]) >= FEWEST]
    random.Random(seed).shuffle(rows)
    return rows


def tokenizer_of(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens in a step")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="auto", help="bfloat16 trains float32 weights under autocast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = rows_of(PACKAGES, args.seed)
    data = args.folder.with_name(f"{args.folder.name}-text.jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    print(f"{len(texts)} rows, {sum(map(len, texts)) / 1e6:.1f} million characters")
    tokenizer = tokenizer_of(texts, args.vocabulary)
    torch.manual_seed(args.seed)
    size = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.width // 64, "n_positions": 512}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **size)
    start = args.folder.with_name(f"{args.folder.name}-start")
    GPT2LMHeadModel(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    train = llmlite.Finetune(max_steps=args.steps, per_device_train_batch_size=args.rows, learning_rate=1e-3, save_steps=200, logging_steps=20)
    recipe = llmlite.Recipe(
        model=llmlite.Model(name=str(start), dtype=args.dtype),
        data=llmlite.Data(train=str(data), max_length=256, evaluation_rows=32),
        steps=(train,),
        seed=args.seed,
        output_dir=str(args.folder),
    )
    report = recipe.run()
    print(report.rows[-1])


if __name__ == "__main__":
    main()
