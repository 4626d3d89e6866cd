"""Small trained parts on a frozen base: LoRA by peft, where they go, and merging them back."""
