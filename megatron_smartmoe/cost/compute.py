"""Compute: the time of a rank's grouped GEMMs from the tokens of each of its experts.

Method. An expert with n > 0 tokens takes `expert_s + n * token_s`: a constant for reading its weights and launching
its kernels, and the arithmetic of its tokens. That is the efficiency curve n / (n + n_half) with
n_half = expert_s / token_s: half of the full rate at n_half tokens, all of it far beyond. An expert without tokens is
skipped and costs nothing. The layer waits for the rank whose sum is largest.

The alternative, a table of measured efficiencies per shape, fits better where it was measured and says nothing
elsewhere; two constants extrapolate and have a physical meaning each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smartmoe.spec.arrays import FloatArray, IntArray

_SCALE_BYTES, _BLOCK_ELEMENTS = 4, 128 * 128  # of blockwise fp8


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """One expert: hidden -> ffn -> hidden, with a second input projection when gated (SwiGLU).

    Attributes:
        hidden: H.
        ffn: F, intermediate size of one expert.
        gated: three matrices instead of two.
        element_bytes: bytes of a weight or an activation; 2 for bf16.
        grad_bytes: bytes of an element of a replica's gradient on its way home; 4 for fp32.
        biases: every matrix has a bias for each of its rows.
        fp8_weights: a replica's weights travel as fp8 with an fp32 scale for each block of 128 x 128.
    """

    hidden: int
    ffn: int
    gated: bool = True
    element_bytes: int = 2
    grad_bytes: int = 4
    biases: bool = False
    fp8_weights: bool = False

    @property
    def num_weights(self) -> int:
        """Elements of one expert's matrices."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def num_params(self) -> int:
        """Elements of one expert's matrices and biases."""
        return self.num_weights + (((2 if self.gated else 1) * self.ffn + self.hidden) if self.biases else 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return self.num_params * self.element_bytes

    @property
    def sent_weight_bytes(self) -> float:
        """Bytes of one replica's weights on their way out."""
        if not self.fp8_weights:
            return self.weight_bytes
        num_biases = self.num_params - self.num_weights
        return self.num_weights * (1 + _SCALE_BYTES / _BLOCK_ELEMENTS) + num_biases * self.element_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one replica's gradient."""
        return self.num_params * self.grad_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's activation in an all-to-all."""
        return self.hidden * self.element_bytes

    @property
    def flops_per_token(self) -> float:
        """Forward and backward: 2 per weight forward, 4 backward."""
        return 6.0 * self.num_weights


def replica_grad_bytes(mode: str, element_bytes: int) -> int:
    """Bytes per weight of a replica's gradient on its way home.

    Replicas planned exactly serve one backward pass and send its gradient as it is; those from history send the sum of
    an iteration, in fp32.
    """
    return element_bytes if mode == "exact" else 4


@dataclass(frozen=True, kw_only=True)
class BusiestRank:
    """The rank that the others wait for."""

    rank: int
    tokens: float
    active_experts: float


def busiest_rank(
    tokens_R: FloatArray, active_R: FloatArray | IntArray, half_rate_tokens: float, ranks_per_device: float = 1.0
) -> BusiestRank:
    """The rank with the longest grouped GEMM.

    Where ranks share a device, its counts are scaled down to what would take as long on a rank of its own
    (`time_shared`).

    Args:
        tokens_R: tokens that rank r computes.
        active_R: experts that have any of them.
        half_rate_tokens: tokens of one expert at which its GEMMs reach half of their full rate.
        ranks_per_device: see `GpuSpec`.
    """
    work_R = tokens_R + half_rate_tokens * active_R
    rank = int(np.argmax(work_R))
    faster = time_shared(work_R, ranks_per_device) / max(float(work_R[rank]), 1e-300)
    return BusiestRank(rank=rank, tokens=float(tokens_R[rank]) * faster, active_experts=float(active_R[rank]) * faster)


def time_shared(work_R: FloatArray | Sequence[float], ranks_per_device: float) -> float:
    """Seconds until the last of several ranks is done that begin together and share a device.

    Args:
        work_R: seconds that each rank's work takes while all ranks work.
        ranks_per_device: how many times as fast a rank is alone; k of R ranks are min(this, R / k) times as fast, as
            a scheduler shares cores out. With 1 the result is the longest work.
    """
    ranks = len(work_R)
    more_R = np.sort(np.asarray(work_R, dtype=np.float64))
    more_R[1:] -= more_R[:-1]  # than the rank before it
    if ranks_per_device > 1:
        more_R /= np.maximum(1.0, np.minimum(ranks_per_device, ranks / np.arange(ranks, 0, -1)))
    return float(more_R.cumsum()[-1])
