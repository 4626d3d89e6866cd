"""A small GPT-2 trained from nothing on the documentation inside every Python: a second family with real, if modest, weights for the benchmarks.

    python benchmarks/train_gpt2.py FOLDER --steps 600

Learned positions, LayerNorm with biases, fused q, k and v stored transposed, GELU: nothing in it is Llama-shaped. A byte-level BPE tokenizer of 8,192 tokens is
trained on the same text. The result is a stock folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import llmlite
from llmlite.data.text import read_rows

TEXT = "builtin:python-docs-prose"
END = "<|endoftext|>"


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
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens in a step")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="auto", help="bfloat16 trains float32 weights under autocast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = [row["text"] for row in read_rows(TEXT, "train").rows]
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
        data=llmlite.Data(train=TEXT, max_length=256, evaluation_rows=32),
        steps=(train,),
        seed=args.seed,
        output_dir=str(args.folder),
    )
    report = recipe.run()
    print(report.rows[-1])


if __name__ == "__main__":
    main()
