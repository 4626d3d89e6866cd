"""What a model is worth and what it costs: perplexity, agreement with the base, speed, memory, and whether its folder reloads."""
