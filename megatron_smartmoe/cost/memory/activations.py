"""Bytes of activations that one rank keeps for its backward pass, under a load: the hottest rank's, not the mean's.

Method. What each module keeps is a list of tensors (`saved_te`, `saved_torch`: one per implementation), and this file
adds them up. Everything up to the router scales with the rank's own tokens; what the experts keep scales with the
tokens that the busiest rank computes, which is `imbalance` times the mean. A pipeline stage holds as many micro-batches
as its schedule has in flight.

The alternative, tokens x top-k for every rank, is what every public estimator does; a run then dies hundreds of steps
in, when the load has shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_smartmoe.cost.memory import saved_te, saved_torch
from megatron_smartmoe.cost.memory.saved_tensors import Rank, total
from megatron_smartmoe.cost.step.pipeline import in_flight
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, PipelineChunk, stage_chunks

_LAYER = {"transformer_engine": saved_te.layer, "local": saved_torch.layer}
_ENDS = {"transformer_engine": saved_te.ends, "local": saved_torch.ends}


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps of one micro-batch, in bytes.

    Attributes:
        attention: norm, projections, attention.
        mlp: dense MLP, or router and shared expert with the norm before them.
        experts: what the busiest rank's experts keep.
        working: the most that is alive at once while a recomputed layer runs its forward pass again.
    """

    attention: float
    mlp: float
    experts: float
    working: float

    @property
    def kept(self) -> float:
        """Bytes that wait for the backward pass."""
        return self.attention + self.mlp + self.experts


@dataclass(frozen=True)
class ActivationBytes:
    """Activations of one chunk and micro-batch, or of the fullest moment of one stage, in bytes.

    Attributes:
        layers: what the layers and the embedding keep, without the parts below.
        experts: what the busiest rank's experts keep.
        logits: from the final norm on.
        working: the most that is alive at once while a recomputed layer runs its forward pass again.
    """

    layers: float
    experts: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return self.layers + self.experts + self.logits + self.working


@lru_cache(maxsize=100_000)
def layer_bytes(model: ModelSpec, spec: ParallelSpec, experts: bool, imbalance: float) -> LayerBytes:
    """Bytes that one layer keeps; `imbalance` is the busiest rank's tokens over the mean."""
    rank = Rank(model, spec, imbalance)
    kept = _LAYER[spec.implementation](rank, experts)
    attention, norm, mlp, routed = (total(part) for part in (kept.attention, kept.norm, kept.mlp, kept.experts))
    row = rank.tokens_local * model.hidden * rank.element
    sent = rank.tokens_local * model.moe.top_k
    moved = (sent + sent * imbalance) * model.hidden * rank.element if experts else row
    if spec.recompute == "full":
        return LayerBytes(row, 0.0, 0.0, attention + norm + mlp + routed + moved)
    if spec.recompute == "moe" and experts:
        return LayerBytes(attention, norm, 0.0, norm + mlp + routed + moved)
    if spec.recompute == "act":
        saved = [
            total(tensor for tensor in part if tensor.recomputed)
            for part in (kept.attention, kept.norm + kept.mlp, kept.experts)
        ]
        return LayerBytes(attention - saved[0], norm + mlp - saved[1], routed - saved[2], moved)
    return LayerBytes(attention, norm + mlp, routed, moved)


def chunk_bytes(model: ModelSpec, spec: ParallelSpec, chunk: PipelineChunk, imbalance: float) -> ActivationBytes:
    """Bytes that one model chunk keeps of one micro-batch."""
    dense, moe = (layer_bytes(model, spec, kind, imbalance) for kind in (False, True))
    ends = _ENDS[spec.implementation](Rank(model, spec, imbalance), chunk)
    kinds = [model.has_experts(layer) for layer in chunk.layers]
    kinds += [model.has_experts(model.layers)] * chunk.mtp_layers
    num_moe = sum(kinds)
    layers = num_moe * (moe.attention + moe.mlp) + (len(kinds) - num_moe) * dense.kept + total(ends.embedding)
    if spec.recompute == "full":
        layers += total(ends.checkpoint)
    return ActivationBytes(layers, num_moe * moe.experts, total(ends.head), max(moe.working, dense.working))


def activation_bytes(model: ModelSpec, spec: ParallelSpec, stage: int, imbalance: float) -> ActivationBytes:
    """Bytes of a stage at its fullest moment."""
    mine = [chunk_bytes(model, spec, chunk, imbalance) for chunk in stage_chunks(model, spec, stage)]
    share = in_flight(stage, spec.pp, spec.vpp, spec.micro_batches) / len(mine)
    return ActivationBytes(
        layers=sum(chunk.layers for chunk in mine) * share,
        experts=sum(chunk.experts for chunk in mine) * share,
        logits=sum(chunk.logits for chunk in mine),
        working=max(chunk.working for chunk in mine),
    )
