"""Every parameter of a model chunk as Megatron 0.19 registers it, with its size on one rank.

Method. The list is made in `named_parameters()` order, because padding, buckets and the optimizer's shards follow it
(see `buffers`). Column and row parallel weights are divided by their tensor-parallel size, experts by EP (whole
experts) and ETP (inner size); norms, routers and MLA's down projections (TransformerEngine) are whole on every rank.

The alternative, parameters per layer times layers (Megatron's own `theoretical_memory_usage`), divides what is
replicated and leaves out padding, buckets and the second copy of a tied embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, PipelineChunk


@dataclass(frozen=True)
class Parameter:
    """One parameter on one rank.

    Attributes:
        name: its last words, as in Megatron.
        numel: elements on this rank.
        expert: reduced over the expert data-parallel ranks, in a buffer of its own.
        shared: a tied embedding or output weight, which gets a bucket of its own.
    """

    name: str
    numel: int
    expert: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Sharding:
    """The part of a ParallelSpec that decides the size of a parameter."""

    tp: int
    ep: int
    etp: int
    local: bool

    @classmethod
    def of(cls, spec: ParallelSpec) -> Sharding:
        """The sharding of a launch."""
        return cls(tp=spec.tp, ep=spec.ep, etp=spec.etp, local=spec.implementation == "local")

    @property
    def separate_experts(self) -> bool:
        """Whether experts have buffers of their own; otherwise they are reduced like everything else."""
        return self.ep > 1 or self.etp != self.tp


def chunk_parameters(model: ModelSpec, spec: ParallelSpec, chunk: PipelineChunk) -> list[Parameter]:
    """Parameters of one chunk on one rank, in registration order."""
    sharding = Sharding.of(spec)
    vocab_rows = model.padded_vocab(spec.tp) // spec.tp * model.hidden
    apart = not (chunk.embedding and chunk.loss)  # embedding and loss in different chunks
    found: list[Parameter] = []
    if chunk.embedding or chunk.mtp_layers:
        shared = apart and (model.tied or bool(model.mtp_layers))
        found.append(Parameter("embedding.word_embeddings.weight", vocab_rows, shared=shared))
        if model.position == "learned_absolute":
            found.append(Parameter("embedding.position_embeddings.weight", model.seq_length * model.hidden))
    for layer in chunk.layers:
        found.extend(layer_parameters(model, sharding, model.has_experts(layer)))
    if chunk.loss:
        found.extend(_norm(model, "final_layernorm"))
    for _ in range(chunk.mtp_layers):
        found.extend([*_norm(model, "enorm"), *_norm(model, "hnorm")])
        found.append(Parameter("eh_proj.weight", 2 * model.hidden * model.hidden // spec.tp))
        found.extend(layer_parameters(model, sharding, model.has_experts(model.layers)))
        found.extend(_norm(model, "final_layernorm"))
    if chunk.loss and not (model.tied and chunk.embedding):
        found.append(Parameter("output_layer.weight", vocab_rows, shared=model.tied and not chunk.mtp_layers))
    return found


@lru_cache(maxsize=4096)
def layer_parameters(model: ModelSpec, sharding: Sharding, experts: bool) -> tuple[Parameter, ...]:
    """Parameters of one transformer layer on one rank."""
    fused = not sharding.local
    found = [] if fused and not model.latent else _norm(model, "input_layernorm")
    found += _latent_attention(model, sharding) if model.latent else _attention(model, sharding, fused)
    if experts:
        found += [*_norm(model, "pre_mlp_layernorm"), *_moe(model, sharding)]
    else:
        norm = _norm(model, "pre_mlp_layernorm")
        found += [*norm, *_mlp(model, "mlp", model.ffn, sharding.tp)]
    return tuple(found)


def _norm(model: ModelSpec, name: str, size: int | None = None) -> list[Parameter]:
    """A norm's weight, and its bias where it has one."""
    size = size or model.hidden
    weight = [Parameter(f"{name}.weight", size)]
    return [*weight, Parameter(f"{name}.bias", size)] if model.norm == "LayerNorm" else weight


def _linear(name: str, outputs: int, inputs: int, bias: int = 0, expert: bool = False) -> list[Parameter]:
    """A linear layer's weight and, where it has one, its bias of `bias` elements."""
    weight = [Parameter(f"{name}.weight", outputs * inputs, expert)]
    return [*weight, Parameter(f"{name}.bias", bias, expert)] if bias else weight


def _attention(model: ModelSpec, sharding: Sharding, fused: bool) -> list[Parameter]:
    """Ordinary attention; with TransformerEngine the norm before it belongs to `linear_qkv`."""
    tp, hidden = sharding.tp, model.hidden
    rows = (model.query_size + 2 * model.query_groups * model.head_dim) // tp
    has_bias = model.bias or model.qkv_bias
    found = _linear("linear_proj", hidden, model.value_size // tp, hidden if model.bias else 0)
    found += _norm(model, "linear_qkv.layer_norm") if fused else []
    found += _linear("linear_qkv", rows, hidden, rows if has_bias else 0)
    if model.qk_norm:
        found += [*_norm(model, "q_layernorm", model.head_dim), *_norm(model, "k_layernorm", model.head_dim)]
    return found


def _latent_attention(model: ModelSpec, sharding: Sharding) -> list[Parameter]:
    """Multi-head latent attention; TransformerEngine keeps the down projections whole on every rank."""
    latent, tp, hidden = model.latent, sharding.tp, model.hidden
    assert latent is not None
    down = tp if sharding.local else 1
    found = _linear("linear_proj", hidden, model.value_size // tp)
    if latent.q_rank:
        found += _linear("linear_q_down_proj", latent.q_rank // down, hidden)
        found += _linear("linear_q_up_proj", model.query_size // tp, latent.q_rank)
    else:
        found += _linear("linear_q_proj", model.query_size // tp, hidden)
    found += _linear("linear_kv_down_proj", (latent.kv_rank + latent.qk_rope_dim) // down, hidden)
    found += _linear("linear_kv_up_proj", model.heads * (latent.qk_head_dim + latent.v_head_dim) // tp, latent.kv_rank)
    if model.qk_norm:
        found += _norm(model, "q_layernorm", latent.q_rank) if latent.q_rank else []
        found += _norm(model, "kv_layernorm", latent.kv_rank)
    return found


def _mlp(model: ModelSpec, name: str, ffn: int, tp: int, expert: bool = False) -> list[Parameter]:
    """Two linear layers, the first twice as wide when gated."""
    rows = (2 if model.gated else 1) * ffn // tp
    first = _linear(f"{name}.linear_fc1", rows, model.hidden, rows if model.bias else 0, expert)
    second = _linear(f"{name}.linear_fc2", model.hidden, ffn // tp, model.hidden if model.bias else 0, expert)
    return [*first, *second]


def _moe(model: ModelSpec, sharding: Sharding) -> list[Parameter]:
    """Router, this rank's experts, the shared expert."""
    moe, local_experts = model.moe, model.moe.experts // sharding.ep
    found = _linear("mlp.router", moe.experts, model.hidden, moe.experts if model.bias else 0)
    one = _mlp(model, "mlp.experts", moe.ffn, sharding.etp, sharding.separate_experts)
    if sharding.local:
        found += one * local_experts
    else:  # grouped: all first weights, then all second ones
        half = len(one) // 2
        found += one[:half] * local_experts + one[half:] * local_experts
    if moe.shared_ffn:
        found += _mlp(model, "mlp.shared_experts", moe.shared_ffn, sharding.tp)
    return found
