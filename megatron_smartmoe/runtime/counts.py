"""Tokens per logical expert and layer, counted where they are routed, reduced only when somebody asks.

Each MoE layer adds one `[E]` vector per micro-batch on its own device: no host round trip, no communication. The sum
over ranks is one all-reduce of `[L, E]` numbers at the moment of the question.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class ExpertCounts:
    """Accumulates assignments (tokens x top-k, before dropping) of this rank.

    Args:
        num_layers: L, of the whole model; layers on other pipeline stages stay zero here.
        num_experts: E, logical experts.
        device: where the routers run.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str) -> None:
        self.local_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, routing_map_TE: torch.Tensor) -> None:
        """Count one micro-batch of one layer; `routing_map_TE` is bool `[tokens, E]`, `layer` counts from 0."""
        self.local_LE[layer] += routing_map_TE.sum(dim=0)

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.local_LE.zero_()

    def reduced(self, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Counts `[L, E]` summed over all ranks of `group` (default: everyone), on the CPU. A collective call."""
        total_LE = self.local_LE.clone()
        dist.all_reduce(total_LE, group=group)
        return total_LE.cpu()
