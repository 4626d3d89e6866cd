"""The one training path: transformers.Trainer, a loss that never holds all logits, checkpoints that are complete or absent."""
