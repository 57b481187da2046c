"""Drawn inputs of chosen_experts and chunk_rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.ops.dispatch_cases import DTYPES, maybe_strided


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Arguments of chosen_experts; tensors may be views that are not contiguous."""

    routing_map_TE: Tensor
    probs_TE: Tensor
    top_k: int


@st.composite
def routed_tokens(draw: st.DrawFn) -> Routed:
    """Tokens that chose fewer experts than top_k, as many, or more."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    num_tokens, num_experts = draw(st.integers(0, 40)), draw(st.sampled_from([1, 2, 8, 31, 32, 33, 100]))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    chosen = torch.rand(num_tokens, num_experts, generator=generator) < share
    probs = torch.rand(num_tokens, num_experts, generator=generator).to(draw(st.sampled_from(DTYPES)))
    return Routed(
        routing_map_TE=maybe_strided(draw, chosen),
        probs_TE=maybe_strided(draw, probs),
        top_k=draw(st.sampled_from([1, 2, 4, 40])),
    )


@st.composite
def chunk_counts(draw: st.DrawFn) -> Tensor:
    """Rows from each source for each slot: many chunks are empty, some are hot."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 17)), draw(st.integers(1, 9))
    counts = torch.randint(0, draw(st.sampled_from([1, 2, 5, 40])), shape, generator=generator)
    if draw(st.booleans()):
        counts[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = 500
    return maybe_strided(draw, counts)
