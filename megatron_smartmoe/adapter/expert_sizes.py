"""Sizes of one expert, from Megatron's arguments: as parsed, so that start-up checks can ask, and as validated."""

from __future__ import annotations

from argparse import Namespace

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.memory.buffers import expert_state_bytes


def expert_shape(options: Namespace) -> ExpertShape:
    """Sizes of one expert as a rank computes it."""
    etp = options.expert_tensor_parallel_size or options.tensor_model_parallel_size
    return ExpertShape(
        hidden=options.moe_latent_size or options.hidden_size,
        ffn=(options.moe_ffn_hidden_size or options.ffn_hidden_size) // etp,
        gated=options.swiglu,
        element_bytes=2 if options.bf16 or options.fp16 else 4,
    )


def state_bytes(options: Namespace) -> int:
    """Bytes that move with an expert: weights, fp32 main weights where they are apart, and Adam's moments."""
    return expert_state_bytes(expert_shape(options))
