"""Our MoE layer: Megatron's own, with experts in slots. `--smartmoe` selects it (see adapter/moe/modules.py)."""
