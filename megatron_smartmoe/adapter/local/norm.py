"""Torch's LayerNorm and RMSNorm, with the mark that sequence parallelism needs.

Under sequence parallelism each tensor-parallel rank normalises its own part of the sequence, so the gradients of the
norm's weights must be summed over the tensor-parallel group. Megatron does that for every parameter that carries
`sequence_parallel = True`. Its own wrapper of torch's norms refuses sequence parallelism only because it does not set
the mark; MoE with tensor parallelism cannot do without. Used through the layer spec where TransformerEngine is absent.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchNorm:
    """Builds the norm that `config.normalization` names; called by Megatron's spec as a class."""

    def __new__(  # type: ignore[misc]  # a spec's "class" may build another, as Megatron's own wrapper does
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        """Return the torch norm over the last dimension of `[..., hidden_size]`, its parameters marked."""
        norm_cls = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        norm: torch.nn.Module = norm_cls(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class WideNorm(torch.nn.Module):
    """RMSNorm over all heads of a token together, where Megatron's norms of queries and keys are per head (OLMoE).

    It is for a model without tensor parallelism, which would spread the heads of a token over ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, num_heads: int, **unused: object
    ) -> None:
        """Take the arguments of Megatron's norms of queries and keys, and the number of heads.

        Args:
            config: of the model.
            hidden_size: of one head.
            eps: added to the mean of the squares.
            num_heads: of queries, or of keys.
        """
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_heads * hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, heads_SBNH: torch.Tensor) -> torch.Tensor:
        """Normalise `[tokens, batch, heads, head size]`."""
        flat = heads_SBNH.flatten(-2)
        return torch.nn.functional.rms_norm(flat, self.weight.shape, self.weight, self.eps).view(heads_SBNH.shape)
