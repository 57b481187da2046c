"""Causal attention on torch's scaled_dot_product_attention, with context parallelism.

Megatron's own `DotProductAttention` builds the full score matrix and refuses context parallelism; TransformerEngine's
handles both and may not be installed. This module is the plain-torch answer: queries stay where they are, keys and
values are gathered over the context-parallel group (Megatron's `--cp-comm-type all_gather`), and a mask over global
positions keeps it causal. Its memory grows with the whole sequence's keys and values, not with the score matrix, where
torch has a fused kernel; on a CPU it has none for dropout, nor for values of another width than queries (MLA). On a GPU
keys and values of grouped queries are repeated beside a mask, which no fused kernel takes otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smartmoe.errors import CompatError


def zigzag_positions(cp_rank: int, cp_size: int, num_local: int) -> torch.Tensor:
    """Global positions of the tokens that one context-parallel rank holds, `[num_local]`.

    Megatron splits a sequence into 2 x cp_size stripes and gives rank r stripe r and its mirror, so that the causal
    triangle's work is the same for every rank (`get_batch_on_this_cp_rank`).
    """
    if cp_size == 1:
        return torch.arange(num_local)
    stripe = num_local // 2
    first, mirror = cp_rank * stripe, (2 * cp_size - 1 - cp_rank) * stripe
    return torch.cat([torch.arange(first, first + stripe), torch.arange(mirror, mirror + stripe)])


def has_no_kernel_for_groups(query: torch.Tensor) -> bool:
    """Whether torch would build the full score matrix for a mask and fewer heads of keys than of queries.

    On a GPU its kernel that reads a mask takes equal numbers of heads only; on a CPU there is no fused backward pass to
    lose, and the order of sums, so every loss, stays what it was.
    """
    return query.is_cuda


def with_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Keys or values `[s, b, groups, d]` with each group repeated for its queries: `[s, b, num_heads, d]`."""
    return x.repeat_interleave(num_heads // x.size(2), dim=2) if x.size(2) != num_heads else x


class SDPAttention(MegatronModule):
    """A spec's `core_attention`: `[s, b, heads, head_dim]` queries, keys and values to `[s, b, heads * head_dim]`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        """Take the arguments of Megatron's DotProductAttention.

        Raises:
            CompatError: an option of the config that only Megatron's or TransformerEngine's attention has.
        """
        super().__init__(config=config)
        _refuse_unsupported(config, attn_mask_type)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group = groups.cp
        self._masks: dict[int, torch.Tensor] = {}

    def _causal_mask(self, num_local: int, device: torch.device) -> torch.Tensor:
        """Which gathered key each local query may see, bool `[num_local, cp_size * num_local]`."""
        if num_local not in self._masks:
            size = self.cp_group.size()
            keys = torch.cat([zigzag_positions(rank, size, num_local) for rank in range(size)])
            queries = zigzag_positions(self.cp_group.rank(), size, num_local)
            self._masks[num_local] = (keys[None, :] <= queries[:, None]).to(device)
        return self._masks[num_local]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend causally; `attention_mask` is not read, as in TransformerEngine's causal attention."""
        if packed_seq_params is not None or attention_bias is not None:
            raise CompatError(
                "SDPAttention has no packed sequences and no attention bias: install TransformerEngine for them."
            )
        num_local, batch, _, _ = query.shape
        mask = None
        if self.cp_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
            mask = self._causal_mask(num_local, query.device)
            if has_no_kernel_for_groups(query):
                key, value = (with_heads(x, query.size(2)) for x in (key, value))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s b h d] -> [b h s d]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.permute(2, 0, 1, 3).reshape(num_local, batch, -1)


def _refuse_unsupported(config: TransformerConfig, attn_mask_type: AttnMaskType) -> None:
    unsupported = {
        "--apply-query-key-layer-scaling": config.apply_query_key_layer_scaling,
        "--window-size": config.window_size is not None,
        "--softmax-type": config.softmax_type != "vanilla",
        f"attention mask {attn_mask_type.name}": attn_mask_type != AttnMaskType.causal,
    }
    for option, is_set in unsupported.items():
        if is_set:
            raise CompatError(
                f"SDPAttention does not have {option}. Pass --attention-backend unfused for Megatron's own attention, "
                "or install TransformerEngine."
            )
