"""Everything of a layer but its experts, on one rank and for one micro-batch, forward and backward, in seconds.

Method. A matrix product takes as long as its arithmetic or its bytes, whichever is more (roofline; Williams, Waterman,
Patterson 2009), and backward is twice forward. Norms, residuals and activations are counted as passes over H-wide rows.
Fused attention is causal (half of the scores) and arithmetic only; unfused attention writes its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smartmoe.cost.step.constants import StepConstants
from megatron_smartmoe.cost.step.groups import Group, all_reduce_s, ring_s
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec

PASSES = 3.0  # forward, and backward for the input and for the weights
SCORE_PASSES = 14.0  # over the scores, unfused, both ways: product, mask, softmax, dropout, and their gradients
LOGIT_PASSES = 8.0  # over the fp32 logits: cast, maximum, exponential, gradient
LOSS_REDUCTIONS = 3.0  # over the vocabulary: maximum, the label's logit, sum of exponentials
FORWARD_TENSOR_COLLECTIVES = 2.0  # per sequence-parallel block: an all-gather before it, a reduce-scatter after it
TENSOR_COLLECTIVES = 5.0  # per block: those, 2 backward, and its input gathered again for the weights' gradient


@dataclass(frozen=True)
class DenseTimes:
    """Seconds of one micro-batch on one rank; per layer except `loss_s` and `mtp_extra_s`."""

    attention_s: float
    dense_mlp_s: float
    shared_expert_s: float
    tensor_comm_attention_s: float
    tensor_comm_mlp_s: float
    context_comm_s: float
    loss_s: float
    mtp_extra_s: float


def tokens_of(model: ModelSpec, spec: ParallelSpec) -> float:
    """Tokens of one micro-batch that a tensor-parallel group works on."""
    return spec.micro_batch * model.seq_length / spec.cp


def dense_times(model: ModelSpec, spec: ParallelSpec, cluster: ClusterSpec, constants: StepConstants) -> DenseTimes:
    """Times of a launch's dense parts."""
    machine = _Machine(cluster, constants, spec.element_bytes)
    tokens, tp, hidden = tokens_of(model, spec), spec.tp, model.hidden
    core_s, context_s = _core(model, spec, machine)
    rows_s = machine.rows(constants.row_passes * tokens / tp, hidden)
    launches_s = constants.launches_per_layer * constants.launch_s
    attention_s = PASSES * _projections(model, spec, machine, tokens) + core_s + rows_s + launches_s
    whole, tensor_group = tokens * hidden * spec.element_bytes, Group(tp, 1)
    block_s = TENSOR_COLLECTIVES * ring_s(whole, tensor_group, cluster, constants)
    vocab = model.padded_vocab(tp)
    logits_s = machine.memory(LOGIT_PASSES * tokens * vocab / tp * 4)
    loss_s = PASSES * machine.gemm(tokens, hidden, vocab / tp) + logits_s
    # Embedding and logits make the collectives of one block between them; the loss reduces three numbers per token.
    loss_s += block_s + LOSS_REDUCTIONS * all_reduce_s(4.0 * tokens, tensor_group, cluster, constants)
    return DenseTimes(
        attention_s=attention_s,
        dense_mlp_s=PASSES * _mlp(model, model.ffn / tp, machine, tokens),
        shared_expert_s=PASSES * _mlp(model, model.moe.shared_ffn / tp, machine, tokens),
        tensor_comm_attention_s=block_s,
        tensor_comm_mlp_s=block_s,
        context_comm_s=context_s,
        loss_s=loss_s,
        mtp_extra_s=PASSES * machine.gemm(tokens, 2 * hidden, hidden / tp) + loss_s if model.mtp_layers else 0.0,
    )


@dataclass(frozen=True)
class _Machine:
    """Peaks of one GPU as they are reached."""

    cluster: ClusterSpec
    constants: StepConstants
    element_bytes: int

    def gemm(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of one product, rows x inner by inner x columns."""
        if not (rows and inner and columns):
            return 0.0
        arithmetic_s = 2.0 * rows * inner * columns / (self.cluster.gpu.peak_flops * self.constants.gemm)
        return max(arithmetic_s, self.memory((rows * inner + inner * columns + rows * columns) * self.element_bytes))

    def memory(self, num_bytes: float) -> float:
        """Seconds to move bytes through memory."""
        return num_bytes / (self.cluster.gpu.memory_bandwidth_bytes_s * self.constants.memory)

    def rows(self, count: float, width: int) -> float:
        """Seconds to read or write rows."""
        return self.memory(count * width * self.element_bytes)


def _projections(model: ModelSpec, spec: ParallelSpec, machine: _Machine, tokens: float) -> float:
    """Forward products around the attention core."""
    tp, hidden = spec.tp, model.hidden
    out_s = machine.gemm(tokens, model.value_size / tp, hidden)
    if not model.latent:
        columns = (model.query_size + 2 * model.query_groups * model.head_dim) / tp
        return out_s + machine.gemm(tokens, hidden, columns)
    latent = model.latent
    # The down projections are whole on every rank, on that rank's share of the sequence.
    query_s = machine.gemm(tokens, latent.q_rank or hidden, model.query_size / tp)
    down = latent.q_rank + latent.kv_rank + latent.qk_rope_dim
    up = model.heads * (latent.qk_head_dim + latent.v_head_dim) / tp
    return out_s + query_s + machine.gemm(tokens / tp, hidden, down) + machine.gemm(tokens, latent.kv_rank, up)


def _core(model: ModelSpec, spec: ParallelSpec, machine: _Machine) -> tuple[float, float]:
    """(attention core, context-parallel traffic that does not fit behind it), forward and backward."""
    tokens, constants, cluster = tokens_of(model, spec), machine.constants, machine.cluster
    causal = 0.5 if constants.fused_attention else 1.0
    flops = 2.0 * tokens * model.seq_length * (model.query_size + model.value_size) / spec.tp * causal
    backward = 2.5 if constants.fused_attention else 2.0  # the fused one recomputes its scores
    efficiency = constants.attention if constants.fused_attention else constants.gemm
    core_s = (1 + backward) * flops / (cluster.gpu.peak_flops * efficiency)
    if not constants.fused_attention:
        scores = tokens * model.seq_length * model.heads / spec.tp
        core_s += machine.memory(SCORE_PASSES * scores * machine.element_bytes)
    if spec.cp == 1:
        return core_s, 0.0
    width = 2 * model.query_groups * model.head_dim / spec.tp
    traffic = 3.0 * tokens * width * machine.element_bytes * (spec.cp - 1)
    group = Group(spec.cp, spec.tp)
    bandwidth = cluster.intra_node.bandwidth_bytes_s * constants.ring_intra
    if group.crosses_nodes(cluster):
        bandwidth = cluster.inter_node.bandwidth_bytes_s * constants.ring_inter
    return core_s, max(0.0, traffic / bandwidth - core_s) + 3 * spec.cp * cluster.intra_node.latency_s


def _mlp(model: ModelSpec, ffn: float, machine: _Machine, tokens: float) -> float:
    """Forward products of a dense MLP."""
    return machine.gemm(tokens, model.hidden, (2 if model.gated else 1) * ffn) + machine.gemm(tokens, ffn, model.hidden)
