"""Drawn inputs of chosen_experts and chunk_rows, and what is true of packed and joined rows whoever makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_smartmoe.ops import packed, reference
from tests.unit.ops.dispatch_cases import DTYPES, Rows, maybe_strided


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


def check_packed(
    served: Any, case: Rows, share: float, put: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> None:
    """permute_packed, from one block of tokens and from two, permute_joined, and both ways on from packed rows.

    Args:
        served: the ops.
        case: rows and weights.
        share: of the tokens in the first block.
        put: moves a tensor to where the ops are to run.
    """
    first, parts = int(len(case.x_TH) * share), (case.x_TH.shape[1], case.weights_TK.dtype)
    rows_TK = put(case.rows_TK)
    expected = reference.permute_weighted(case.x_TH, case.weights_TK, case.rows_TK, case.num_rows)
    blocks = [
        put(each) for each in (case.x_TH[:first], case.weights_TK[:first], case.x_TH[first:], case.weights_TK[first:])
    ]
    reversed_N1 = torch.arange(case.num_rows, dtype=torch.int32).flip(0)[:, None]
    backward = reference.permute_weighted_backward(*expected, case.rows_TK)
    for arguments in ((put(case.x_TH), put(case.weights_TK), None, None), blocks):
        packed_NP = served.permute_packed(*arguments, rows_TK, case.num_rows)
        assert packed_NP.dtype == case.x_TH.dtype
        assert packed_NP.shape == (case.num_rows, packed.width(parts[0], case.x_TH.dtype, parts[1]))
        found = packed.views(packed_NP, *parts)
        turned = served.permute_weighted(found[0], found[1][:, None], put(reversed_N1), case.num_rows)
        back = served.permute_weighted_backward(*found, rows_TK)
        both_ways = (*found, *turned, *back), (*expected, *(each.flip(0) for each in expected), *backward)
        for one, other in zip(*both_ways, strict=True):
            assert torch.equal(one.cpu(), other)
    joined_NH = served.permute_joined(blocks[0], blocks[2], rows_TK, case.num_rows)
    assert torch.equal(joined_NH.cpu(), expected[0])
