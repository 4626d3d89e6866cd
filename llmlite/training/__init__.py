"""One training path: `transformers.Trainer`, and the losses it minimises."""
