"""Make this process check flags as on a machine with Hopper GPUs and TransformerEngine, neither of which is here."""

from __future__ import annotations

import os
import sys


def pretend() -> None:
    """Replace what the checks, Megatron's and ours, ask of the machine. For a process that trains nothing."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    import torch

    torch.cuda.device_count = lambda: 8
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.transformer_config as transformer_config

    for name in ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index", "fused_unpermute"):
        setattr(moe_utils, name, len)  # what is there with TransformerEngine
    moe_utils.fused_sort_chunks_by_index_with_probs = len
    transformer_config.is_te_min_version = lambda *_, **__: True

    import megatron_smartmoe.adapter.device as device
    import megatron_smartmoe.adapter.pretrain as pretrain

    device.choose_device = pretrain.choose_device = lambda asked, *, with_filters=True: False
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_smartmoe.adapter"):
            for question in ("has_transformer_engine", "has_apex"):
                if hasattr(module, question):
                    setattr(module, question, lambda: True)
