"""Train a small student to say what a larger teacher says."""
