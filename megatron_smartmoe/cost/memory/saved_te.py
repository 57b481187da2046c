"""What TransformerEngine's modules keep: fused norms, attention, activations, permutations.

Counted from the papers and the code (Korthikanti et al. 2022, arXiv 2205.05198, with fused attention and with experts);
not compared with a run, which needs a GPU. Embedding, final norm and rotary tables are left out.
"""

from __future__ import annotations

from megatron_smartmoe.cost.memory.saved_tensors import FP32, INT64, EndTensors, Kept, LayerTensors, Rank, Tensors
from megatron_smartmoe.spec.parallel import Chunk

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


def ends(rank: Rank, chunk: Chunk) -> EndTensors:
    """The logits, of a prediction block too."""
    if not chunk.loss:
        return EndTensors()
    vocab = rank.model.padded_vocab(rank.spec.tp) / rank.spec.tp
    return EndTensors(head=(Kept("logits", (1 + chunk.mtp_layers) * rank.tokens, vocab, LOGIT_BYTES),))


def _norm(rank: Rank) -> Tensors:
    hidden = rank.model.hidden
    return (
        Kept("norm's input", rank.own, hidden, rank.element),
        Kept("norm's output", rank.own, hidden, rank.element, again=True),
    )


def _mask(rank: Rank) -> Tensors:
    return (Kept("dropout mask", rank.own, rank.model.hidden, 1),) if rank.model.dropout else ()


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
        Kept("softmax statistics", rank.tokens, model.heads / tp, FP32),
        Kept("projections and the core's output", rank.tokens, widths, rank.element),
        *_mask(rank),
    )


def _inner(name: str, rank: Rank, rows: float, width: float) -> Tensors:
    """Between the two products of an MLP: the first one's output, gate and all, and the activation."""
    first = (2 if rank.model.gated else 1) * width
    return (
        Kept(f"{name}: first product", rows, first, rank.element),
        Kept(f"{name}: activation", rows, width, rank.element),
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
        Kept("logits, probabilities, map of choices", rank.own, ROUTER_COPIES * moe.experts, FP32),
        Kept("way through permute and back", rank.own, moe.top_k, INT64),
    )


def _experts(rank: Rank) -> Tensors:
    rows = rank.computed
    first, activation = _inner("experts", rank, rows, rank.model.moe.ffn / rank.spec.etp)
    return (
        Kept("experts' input", rows, rank.model.hidden, rank.element),
        first,
        activation._replace(again=True),
        Kept("way through permute and back", rows, 1, INT64),
    )
