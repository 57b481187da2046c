"""Saves and loads of checkpoints with their manifest: what is written, compared and said around Megatron's own."""
