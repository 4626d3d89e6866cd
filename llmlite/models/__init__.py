"""Where a model keeps its parts, how large it is, and how to build a smaller one that stock transformers loads."""
