"""Bytes of activations that one rank keeps for its backward pass, under a load: the hottest rank's, not the mean's.

Method. What each module saves is counted tensor by tensor (Korthikanti et al. 2022, arXiv 2205.05198, with fused
attention and with experts). Everything up to the router scales with the rank's own tokens; what the experts save scales
with the tokens that the busiest rank computes, which is `hot` times the mean. A pipeline stage holds as many
micro-batches as its schedule has in flight.

The alternative, tokens x top-k for every rank, is what every public estimator does; a run then dies hundreds of steps
in, when the load has shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_smartmoe.cost.step.pipeline import in_flight
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, chunks

STATISTICS_BYTES = 4  # fp32: of attention's softmax, of a norm, a router's logits
ROUTER_COPIES = 3  # logits, probabilities, the map of choices, each [tokens, E]
INDEX_BYTES = 8  # of one row's way through permute and back
LOGIT_BYTES = 10  # per logit: bf16, its fp32 copy, the saved exponential


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps of one micro-batch, in bytes.

    Attributes:
        attention: norm, projections, attention.
        mlp: dense MLP, or router and shared expert with the norm before them.
        experts: what the busiest rank's experts keep.
        working: the largest that is alive at once while a recomputed layer runs again.
    """

    attention: float
    mlp: float
    experts: float
    working: float

    @property
    def kept(self) -> float:
        """All that waits for the backward pass."""
        return self.attention + self.mlp + self.experts


@dataclass(frozen=True)
class ActivationBytes:
    """Activations of the fullest moment of one stage, in bytes."""

    layers: float
    experts: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.layers + self.experts + self.logits + self.working


@lru_cache(maxsize=100_000)
def layer_bytes(model: ModelSpec, spec: ParallelSpec, experts: bool, hot: float) -> LayerBytes:
    """One layer; `hot` is the busiest rank's tokens over the mean."""
    element, tp = spec.element_bytes, spec.tp
    tokens = spec.micro_batch * model.seq_length / spec.cp
    own = tokens / tp  # under sequence parallelism
    row = own * model.hidden * element
    attention = _attention(model, spec, tokens, row)
    mask = own * model.hidden if model.dropout else 0.0
    if not experts:
        inner = tokens * model.ffn / tp * element
        mlp, routed = 2 * row + ((3 if model.gated else 2) * inner) + mask, 0.0
    else:
        computed = own * model.moe.top_k * hot * spec.etp
        inner = computed * model.moe.ffn / spec.etp * element
        routed = computed * model.hidden * element + (3 if model.gated else 2) * inner + computed * INDEX_BYTES
        mlp = 2 * row + own * (ROUTER_COPIES * model.moe.experts * STATISTICS_BYTES + model.moe.top_k * INDEX_BYTES)
        mlp += (3 if model.gated else 2) * tokens * model.moe.shared_ffn / tp * element + mask
    everything = attention + mlp + routed
    moved = (own * model.moe.top_k + own * model.moe.top_k * hot) * model.hidden * element if experts else row
    if spec.recompute == "full":
        return LayerBytes(row, 0.0, 0.0, everything + moved)
    if spec.recompute == "moe" and experts:
        return LayerBytes(attention, 2 * row, 0.0, mlp + routed + moved)
    if spec.recompute == "act":
        attention, mlp = attention - row, mlp - row
        routed -= inner if experts else 0.0
    return LayerBytes(attention, mlp, routed, moved)


def _attention(model: ModelSpec, spec: ParallelSpec, tokens: float, row: float) -> float:
    """Norm input and output, projections, the core's output and statistics."""
    element, tp = spec.element_bytes, spec.tp
    kept = 2 * row + tokens * (model.heads / tp) * STATISTICS_BYTES
    if model.latent:
        latent = model.latent
        down = latent.q_rank + latent.kv_rank + latent.qk_rope_dim
        widths = (2 * model.query_size + 2 * model.value_size) / tp + 2 * down  # keys are as wide as queries
    else:
        heads = model.query_size + 2 * model.query_groups * model.head_dim
        widths = (heads + model.value_size) / tp
        widths += (model.query_size + model.query_groups * model.head_dim) / tp if model.qk_norm else 0
    if model.dropout:
        kept += row / element
    return kept + tokens * widths * element


def activation_bytes(model: ModelSpec, spec: ParallelSpec, stage: int, hot: float) -> ActivationBytes:
    """The fullest moment of a stage."""
    dense, moe = (layer_bytes(model, spec, kind, hot) for kind in (False, True))
    mine = [chunk for chunk in chunks(model, spec) if chunk.stage == stage]
    held = in_flight(stage, spec.pp, spec.vpp, spec.micro_batches)
    layers = experts = logits = 0.0
    for chunk in mine:
        kinds = [model.has_experts(layer) for layer in chunk.layers]
        kinds += [model.has_experts(model.layers)] * chunk.mtp_layers
        num_moe = sum(kinds)
        layers += num_moe * (moe.attention + moe.mlp) + (len(kinds) - num_moe) * dense.kept
        experts += num_moe * moe.experts
        if chunk.loss:
            tokens = spec.micro_batch * model.seq_length / spec.cp
            logits += (1 + chunk.mtp_layers) * tokens * model.padded_vocab(spec.tp) / spec.tp * LOGIT_BYTES
    share = held / len(mine)
    working = max(moe.working, dense.working)
    return ActivationBytes(layers * share, experts * share, logits, working)
