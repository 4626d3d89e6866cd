"""llmlite makes Hugging Face language models smaller: pruning, distillation, quantization and adapters, stock checkpoints in and out."""

__version__ = "0.1.0"
