"""What TransformerEngine's modules keep: fused norms, attention, activations, permutations.

Counted from the papers and the code (Korthikanti et al. 2022, arXiv 2205.05198, with fused attention and with experts);
not compared with a run, which needs a GPU. Embedding, final norm and rotary tables are left out.
"""

from __future__ import annotations

from megatron_smartmoe.cost.memory.saved_tensors import (
    FP32,
    INT64,
    EndTensors,
    LayerTensors,
    Rank,
    SavedTensor,
    Tensors,
)
from megatron_smartmoe.spec.parallel import PipelineChunk

ROUTER_COPIES = 3  # logits, probabilities, the map of choices, each [tokens, E]
LOGIT_BYTES = 10  # per logit: bf16, its fp32 copy, the saved exponential


def layer(rank: Rank, experts: bool) -> LayerTensors:
    """One layer, with experts or with a dense MLP."""
    return LayerTensors(
        attention=_attention(rank),
        norm=(*_norm(rank), *_mask(rank)),  # dropout is after the experts, and outside what is recomputed with them
        mlp=(*(_router(rank) if experts else ()), *_mlp(rank, experts)),
        experts=_experts(rank) if experts else (),
    )


def ends(rank: Rank, chunk: PipelineChunk) -> EndTensors:
    """The logits, of a prediction block too."""
    if not chunk.loss:
        return EndTensors()
    vocab = rank.model.padded_vocab(rank.spec.tp) / rank.spec.tp
    return EndTensors(head=(SavedTensor("logits", (1 + chunk.mtp_layers) * rank.tokens, vocab, LOGIT_BYTES),))


def _norm(rank: Rank) -> Tensors:
    hidden = rank.model.hidden
    return (
        SavedTensor("norm's input", rank.tokens_local, hidden, rank.element),
        SavedTensor("norm's output", rank.tokens_local, hidden, rank.element, recomputed=True),
    )


def _mask(rank: Rank) -> Tensors:
    return (SavedTensor("dropout mask", rank.tokens_local, rank.model.hidden, 1),) if rank.model.dropout else ()


def _attention(rank: Rank) -> Tensors:
    model, tp = rank.model, rank.spec.tp
    if model.latent:
        latent = model.latent
        down = latent.q_rank + latent.kv_rank + latent.qk_rope_dim
        widths = (2 * model.query_size + 2 * model.value_size) / tp + 2 * down  # keys are as wide as queries
    else:
        heads = model.query_size + 2 * model.query_groups * model.head_dim
        widths = (heads + model.value_size) / tp
        widths += (model.query_size + model.query_groups * model.head_dim) / tp if model.qk_norm else 0
    return (
        *_norm(rank),
        SavedTensor("softmax statistics", rank.tokens, model.heads / tp, FP32),
        SavedTensor("projections and the core's output", rank.tokens, widths, rank.element),
        *_mask(rank),
    )


def _inner(name: str, rank: Rank, rows: float, width: float) -> Tensors:
    """Between the two products of an MLP: the first one's output, gate and all, and the activation."""
    first = (2 if rank.model.gated else 1) * width
    return (
        SavedTensor(f"{name}: first product", rows, first, rank.element),
        SavedTensor(f"{name}: activation", rows, width, rank.element),
    )


def _mlp(rank: Rank, experts: bool) -> Tensors:
    """The dense MLP, or the shared expert."""
    if not experts:
        return _inner("MLP", rank, rank.tokens, rank.model.ffn / rank.spec.tp)
    shared = rank.model.moe.shared_ffn
    return _inner("shared expert", rank, rank.tokens, shared / rank.spec.tp) if shared else ()


def _router(rank: Rank) -> Tensors:
    moe = rank.model.moe
    return (
        SavedTensor("logits, probabilities, map of choices", rank.tokens_local, ROUTER_COPIES * moe.experts, FP32),
        SavedTensor("way through permute and back", rank.tokens_local, moe.top_k, INT64),
    )


def _experts(rank: Rank) -> Tensors:
    rows = rank.expert_rows
    first, activation = _inner("experts", rank, rows, rank.model.moe.ffn / rank.spec.etp)
    return (
        SavedTensor("experts' input", rows, rank.model.hidden, rank.element),
        first,
        activation._replace(recomputed=True),
        SavedTensor("way through permute and back", rows, 1, INT64),
    )
