"""The three control loops in Megatron: homes, replicas, and the pool of settings; and the log of their decisions."""
