"""What the modules of `--transformer-impl local` keep on CPU ranks: plain torch, nothing fused.

Every entry is a tensor that autograd was seen to hold in a run of Megatron 0.19 on torch 2.11 without a GPU;
tests/megatron/test_activation_bytes.py compares the sums. What is far below a byte per token and layer is left out:
tokens per expert, losses, scalars.
"""

from __future__ import annotations

from megatron_smartmoe.cost.memory.saved_tensors import (
    BOOL,
    FP32,
    INT32,
    INT64,
    EndTensors,
    LayerTensors,
    Rank,
    SavedTensor,
    Tensors,
)
from megatron_smartmoe.spec.model import LatentAttention
from megatron_smartmoe.spec.parallel import PipelineChunk


def layer(rank: Rank, experts: bool) -> LayerTensors:
    """One layer, with experts or with a dense MLP."""
    hidden = rank.model.hidden
    output = SavedTensor("input of router, shared expert or MLP", rank.tokens_local, hidden, rank.element)
    return LayerTensors(
        attention=_attention(rank),
        norm=(
            *_norm("norm before the MLP", rank, rank.tokens_local, hidden),
            output,
            *_dropout_mask("after the MLP", rank),
        ),
        mlp=(*_router(rank), *_dispatch(rank), *_shared(rank)) if experts else _dense(rank),
        experts=_experts(rank) if experts else (),
    )


def ends(rank: Rank, chunk: PipelineChunk) -> EndTensors:
    """Embedding, loss, the way into prediction blocks, and what recomputation of layers is given."""
    return EndTensors(
        embedding=_embedding(rank) if chunk.embedding else (),
        head=_head(rank) * (1 + chunk.mtp_layers) + _prediction(rank) * chunk.mtp_layers if chunk.loss else (),
        checkpoint=_checkpoint(rank, has_batch=chunk.embedding or chunk.loss),
    )


def _norm(name: str, rank: Rank, rows: float, width: float) -> Tensors:
    """A norm's input first, in the type that the norm computes in."""
    if rank.model.norm == "LayerNorm":
        return (
            SavedTensor(f"{name}: input", rows, width, rank.element),
            SavedTensor(f"{name}: mean and deviation", rows, 2, rank.element),
        )
    return (  # RMSNorm computes in fp32 and keeps what it multiplied
        SavedTensor(f"{name}: input in fp32", rows, width, FP32),
        SavedTensor(f"{name}: input over its size", rows, width, FP32),
        SavedTensor(f"{name}: size", rows, 1, FP32),
    )


def _dropout_mask(where: str, rank: Rank) -> Tensors:
    """Dropout without a fused kernel multiplies by a tensor of the same type."""
    return (
        (SavedTensor(f"dropout {where}", rank.tokens_local, rank.model.hidden, rank.element),)
        if rank.model.dropout
        else ()
    )


def _attention(rank: Rank) -> Tensors:
    """Norm, projections, rotary tables, core, residual."""
    model, latent = rank.model, rank.model.latent
    turned = latent.qk_rope_dim if latent else model.head_dim if model.position == "rope" else 0
    return (
        *_norm("norm before attention", rank, rank.tokens_local, model.hidden),
        SavedTensor("input of the first projections", rank.tokens_local, model.hidden, rank.element),
        *(_latent_projections(rank, latent) if latent else _projection(rank)),
        # cosines and sines, made anew for queries and for keys; of every position, whatever TP
        SavedTensor("rotary tables", rank.sequence, 4 * turned, rank.element),
        *(_core(rank) if _has_flash(rank) else _core_in_steps(rank)),
        SavedTensor("attention's output", rank.tokens, model.value_size / rank.spec.tp, rank.element),
        *_dropout_mask("after attention", rank),
    )


def _projection(rank: Rank) -> Tensors:
    """Queries, keys and values in one tensor, where something keeps a view of it, and the norms of the first two."""
    model, tp = rank.model, rank.spec.tp
    found: list[SavedTensor] = []
    view_in_norm = False
    if model.qk_norm:
        queries = _norm("norm of queries", rank, rank.tokens * model.heads / tp, model.head_dim)
        keys = _norm("norm of keys", rank, rank.tokens * model.query_groups / tp, model.head_dim)
        view_in_norm = keys[0].element == rank.element  # not converted, the input is a view
        found += queries[1:] if view_in_norm and not _copies_queries(rank) else queries
        found += keys[1:] if view_in_norm else keys
    if view_in_norm or _views_values(rank):
        width = (model.query_size + 2 * model.query_groups * model.head_dim) / tp
        found.append(SavedTensor("queries, keys and values as projected", rank.tokens, width, rank.element))
    return tuple(found)


def _copies_queries(rank: Rank) -> bool:
    """Whether taking the queries out of their projection copies them: heads of several groups do not lie in a row."""
    return rank.spec.tp < rank.model.query_groups < rank.model.heads


def _views_values(rank: Rank) -> bool:
    """Whether the core reads values from where they were projected: not if gathered, converted or spread to heads."""
    model, spec = rank.model, rank.spec
    as_projected = model.query_groups == model.heads and rank.element == FP32
    return not model.latent and spec.cp == 1 and (_has_flash(rank) or as_projected)


def _latent_projections(rank: Rank, latent: LatentAttention) -> Tensors:
    """From the compressed rows up; each rank has those of its own tokens."""
    model, own = rank.model, rank.tokens_local
    found: list[SavedTensor] = []
    if latent.q_rank:
        found += _norm("norm of compressed queries", rank, own, latent.q_rank) if model.qk_norm else ()
        found.append(SavedTensor("input of the queries' projection", own, latent.q_rank, rank.element))
    width = latent.kv_rank
    if model.qk_norm:
        found += _norm("norm of compressed keys and values", rank, own, width)
    elif rank.spec.tp == 1:
        width += latent.qk_rope_dim  # a view of both, not yet split
    found.append(SavedTensor("input of the keys' and values' projection", own, width, rank.element))
    return tuple(found)


def _has_flash(rank: Rank) -> bool:
    """Whether torch's fused attention for the CPU applies: equal widths and no dropout; else it goes step by step."""
    latent = rank.model.latent
    equal = latent is None or latent.qk_head_dim + latent.qk_rope_dim == latent.v_head_dim
    return equal and not rank.model.dropout


def _core(rank: Rank) -> Tensors:
    """Fused attention: queries, keys, values, statistics. With CP keys and values are gathered, and masked."""
    model, spec, element = rank.model, rank.spec, rank.element
    tokens, gathered = rank.tokens, rank.tokens * spec.cp
    queries, values = model.query_size / spec.tp, model.value_size / spec.tp
    keys = queries if model.latent else model.query_groups * model.head_dim / spec.tp
    found = [SavedTensor("statistics of the scores", tokens, model.heads / spec.tp, FP32)]
    changed = bool(model.latent) or model.qk_norm or model.position == "rope"  # no views of the projection
    if changed or _copies_queries(rank):
        found.append(SavedTensor("queries", tokens, queries, element))
    if changed or spec.cp > 1:
        found.append(SavedTensor("keys", gathered, keys, element))
    if not _views_values(rank):
        found.append(SavedTensor("values", gathered, values if model.latent else keys, element))
    if spec.cp > 1:
        found.append(SavedTensor("mask", rank.sequence, model.seq_length, element))
    return tuple(found)


def _core_in_steps(rank: Rank) -> Tensors:
    """Torch's attention without a fused kernel: all in fp32, keys and values of every head, whole scores."""
    model, spec = rank.model, rank.spec
    tokens, gathered = rank.tokens, rank.tokens * spec.cp
    matrices = 3 if model.dropout else 1  # probabilities, noise, their product
    values = () if _views_values(rank) else (SavedTensor("values", gathered, model.value_size / spec.tp, FP32),)
    return (
        SavedTensor("scaled queries", tokens, model.query_size / spec.tp, FP32),
        SavedTensor("scaled keys", gathered, model.query_size / spec.tp, FP32),
        *values,
        SavedTensor("scores", tokens * model.heads / spec.tp, matrices * model.seq_length, FP32),
    )


def _inner(name: str, rank: Rank, rows: float, width: float) -> Tensors:
    """Between the two products of an MLP: what the activation, step by step, keeps."""
    if not rank.model.gated:
        steps: tuple[tuple[str, int], ...] = (("GELU's input, first product and bias", 1), ("GELU's output", 1))
    else:
        # Megatron adds its --glu-linear-offset, which is 0, and gets a second copy of the linear half
        steps = (("first product", 2), ("SiLU of the gate", 1), ("linear half", 1), ("gated product", 1))
    return tuple(SavedTensor(f"{name}: {step}", rows, count * width, rank.element) for step, count in steps)


def _dense(rank: Rank) -> Tensors:
    return _inner("MLP", rank, rank.tokens, rank.model.ffn / rank.spec.tp)


def _shared(rank: Rank) -> Tensors:
    shared = rank.model.moe.shared_ffn
    return _inner("shared expert", rank, rank.tokens, shared / rank.spec.tp) if shared else ()


def _router(rank: Rank) -> Tensors:
    """Scores, choices and the auxiliary loss."""
    moe, own = rank.model.moe, rank.tokens_local
    found = [SavedTensor("chosen experts", own, moe.top_k, INT64)]
    if moe.score_function == "sigmoid":
        found.append(SavedTensor("scores of all experts", own, moe.experts, FP32))
        if moe.top_k > 1:  # they are divided by their sum
            found += [SavedTensor("scores of the chosen", own, moe.top_k, FP32), SavedTensor("their sum", own, 1, FP32)]
    else:
        found.append(SavedTensor("softmax", own, moe.experts if moe.pre_softmax else moe.top_k, FP32))
    if moe.group_top_k:
        found.append(SavedTensor("mask of groups", own, moe.experts, BOOL))
    if moe.aux_loss_coeff and moe.balancing != "none":
        found.append(SavedTensor("scores for the auxiliary loss", own, moe.experts, FP32))
        if moe.score_function == "sigmoid":
            found.append(SavedTensor("sum of scores for the auxiliary loss", own, 1, FP32))
    return tuple(found)


def _dispatch(rank: Rank) -> Tensors:
    """The way of each token to its experts and back."""
    spec, own, experts, top_k = rank.spec, rank.tokens_local, rank.model.moe.experts, rank.model.moe.top_k
    if spec.smartmoe:
        # where the first chunk is the rank's own rows alone, it is a view of all that the rank sends
        own_chunk = spec.etp == 1 and spec.overlap_degree > 1 and spec.ep // spec.overlap_degree == 1
        to_others = own * top_k - rank.expert_rows / spec.ep if own_chunk else 0.0
        return (
            SavedTensor("rows for other ranks, beside the rank's own", to_others, rank.model.hidden, rank.element),
            SavedTensor("weights of all experts", own, experts, FP32),  # `gather` keeps what it reads
            SavedTensor("chosen experts, sorted", own, top_k, INT64),
            SavedTensor("rows of choices", own, top_k, INT32),
            SavedTensor("rows of choices, for their weights", own, top_k, INT32),
        )
    return (
        SavedTensor("order of all entries of the map", own, experts, INT64),  # the chosen ones are a view of it
        SavedTensor("tokens of the chosen entries", own, top_k, INT64),
    )


def _experts(rank: Rank) -> Tensors:
    """SequentialMLP and the slotted experts keep the same, the latter chunk by chunk."""
    rows, width = rank.expert_rows, rank.model.moe.ffn / rank.spec.etp
    return (
        SavedTensor("experts' input", rows, rank.model.hidden, rank.element),
        *_inner("experts", rank, rows, width),
        SavedTensor("experts: product with the weights", rows, width, rank.element),
        SavedTensor("experts: weights", rows, 1, FP32),
    )


def _embedding(rank: Rank) -> Tensors:
    found = [SavedTensor("ids of tokens", rank.tokens, 1, INT64), *_dropout_mask("after the embedding", rank)]
    if rank.spec.tp > 1:
        found.append(SavedTensor("ids of other ranks", rank.tokens, 1, BOOL))
    if rank.model.position == "learned_absolute":
        found.append(SavedTensor("positions", rank.tokens, 1, INT64))
    return tuple(found)


def _head(rank: Rank) -> Tensors:
    """Final norm, output layer and loss."""
    model, tokens = rank.model, rank.tokens
    return (
        *_norm("final norm", rank, rank.tokens_local, model.hidden),
        SavedTensor("output layer's input", rank.tokens_local, model.hidden, rank.element),
        SavedTensor("softmax of the logits", tokens, model.padded_vocab(rank.spec.tp) / rank.spec.tp, FP32),
        SavedTensor("labels", tokens, 1, INT64),
        SavedTensor("labels of other ranks", tokens, 1, BOOL),
        SavedTensor("mask of the loss", tokens, 1, FP32),
    )


def _prediction(rank: Rank) -> Tensors:
    """A prediction block's way into its layer."""
    hidden = rank.model.hidden
    return (
        *_norm("norm of the embedding", rank, rank.tokens_local, hidden),
        *_norm("norm of the hidden state", rank, rank.tokens_local, hidden),
        SavedTensor("both, side by side", rank.tokens_local, 2 * hidden, rank.element),
    )


def _checkpoint(rank: Rank, has_batch: bool) -> Tensors:
    """Beside its input each recomputed layer is given the angles of the positions and, where the batch is, the mask."""
    found: list[SavedTensor] = []
    if rank.model.position == "rope" and not rank.model.latent:
        found.append(SavedTensor("angles of positions", rank.sequence, rank.model.head_dim, FP32))
    if has_batch:
        found.append(SavedTensor("attention mask of the batch", rank.tokens, rank.model.seq_length, BOOL))
    return tuple(found)
