"""ParallelSpec: one way to spread a model over ranks, and where Megatron puts its layers.

Megatron 0.19's rules ("parallel folding"): the attention part of a pipeline stage's ranks is TP x CP x DP, the expert
part of the same ranks is ETP x EP x EDP; only the pipeline stage is common to both. Ranks are numbered tensor first,
then context, expert, data, pipeline (`tp-cp-ep-dp-pp`), so the groups with the most traffic have the smallest strides.

`violation` returns the first rule that a spec breaks; the planner keeps it as the reason why a point was rejected.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_smartmoe.spec.model import ModelSpec

Recompute = Literal["none", "act", "moe", "full"]
Replicas = Literal["off", "history", "exact", "auto"]
Precision = Literal["bf16", "fp32"]
Implementation = Literal["transformer_engine", "local"]
Dispatch = Literal["flat", "hierarchical"]
FLAT: Literal["flat"] = "flat"
HIERARCHICAL: Literal["hierarchical"] = "hierarchical"
DISPATCHES: tuple[Dispatch, ...] = (FLAT, HIERARCHICAL)


def is_recomputable(mode: Recompute, *, grouped_by_te: bool) -> bool:
    """Whether Megatron can recompute so: the experts' activation only in TransformerEngine's grouped GEMM."""
    return mode != "act" or grouped_by_te


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """One launch: parallel sizes, batch, and what SmartMoE does.

    Attributes:
        gpus: ranks of the job.
        tp: tensor parallel ranks of attention and dense MLPs; sequence parallelism is on whenever tp > 1.
        pp: pipeline stages.
        vpp: model chunks per stage (interleaved schedule); 1 for none.
        ep: expert parallel ranks.
        etp: tensor parallel ranks of one expert.
        cp: context parallel ranks.
        micro_batch: samples of one micro-batch.
        global_batch: samples of one step.
        layers_of_chunk: transformer layers of each model chunk in pipeline order, where they are not all equal.
        recompute: `none`; `act`: norms and the experts' activation; `moe`: whole MoE layers; `full`: every layer.
        spare_slots: K, replica slots per rank.
        replicas: what replicas are planned from; `off` for none.
        homes_interval: homes are re-evaluated every so many iterations; 0 never moves them.
        overlap_degree: chunks of each all-to-all; 1 for no overlap.
        dispatch: `flat`: a token is sent once for each expert; `hierarchical`: between nodes once for each node.
        distributed_optimizer: optimizer state is sharded over the data-parallel ranks.
        overlap_grad_reduce: gradients are reduced while the backward pass runs.
        overlap_param_gather: parameters are gathered while the forward pass runs.
        grad_reduce_in_fp32: gradients are accumulated and reduced in fp32.
        precision: type of weights and activations.
        implementation: `--transformer-impl`, whose layers Megatron uses.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    layers_of_chunk: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    spare_slots: int = 0
    replicas: Replicas = "off"
    homes_interval: int = 0
    overlap_degree: int = 1
    dispatch: Dispatch = FLAT
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    grad_reduce_in_fp32: bool = True
    precision: Precision = "bf16"
    implementation: Implementation = "transformer_engine"

    @property
    def dp(self) -> int:
        """Data-parallel ranks of the attention part."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Data-parallel ranks of an expert."""
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank and step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def grad_bytes(self) -> int:
        """Bytes of a gradient in its buffer."""
        return 4 if self.grad_reduce_in_fp32 else self.element_bytes

    @property
    def smartmoe(self) -> bool:
        """Whether the launch balances, overlaps or dispatches in two hops, and so runs with `--smartmoe`."""
        own_exchange = self.overlap_degree > 1 or self.dispatch != FLAT
        return bool(self.homes_interval or self.replicas != "off" or own_exchange)

    def recomputes(self, mode: Recompute) -> bool:
        """Whether Megatron supports the mode; `act` needs TransformerEngine's grouped GEMM."""
        grouped_by_te = self.implementation == "transformer_engine" and not self.smartmoe
        return is_recomputable(mode, grouped_by_te=grouped_by_te)

    def label(self) -> str:
        """A short name that differs between any two plans of a search."""
        parts = [f"TP{self.tp}", f"PP{self.pp}"]
        parts += [f"VPP{self.vpp}"] if self.vpp > 1 else []
        parts += [f"EP{self.ep}"]
        parts += [f"ETP{self.etp}"] if self.etp > 1 else []
        parts += [f"CP{self.cp}"] if self.cp > 1 else []
        parts += [f"DP{self.dp}", f"mbs{self.micro_batch}"]
        parts += [f"re:{self.recompute}"] if self.recompute != "none" else []
        parts += [f"K{self.spare_slots}"] if self.spare_slots else []
        parts += [f"ov{self.overlap_degree}"] if self.overlap_degree > 1 else []
        parts += ["hier"] if self.dispatch == HIERARCHICAL else []
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Its fields and the sizes that follow from them, for plan.json."""
        return {**asdict(self), "dp": self.dp, "edp": self.edp, "micro_batches": self.micro_batches}


@dataclass(frozen=True, kw_only=True)
class PipelineChunk:
    """One of Megatron's model chunks: the `virtual`-th part of the layers of pipeline stage `stage`."""

    stage: int
    virtual: int
    layers: tuple[int, ...]
    embedding: bool
    loss: bool
    mtp_layers: int


def pipeline_chunks(model: ModelSpec, parallel: ParallelSpec) -> tuple[PipelineChunk, ...]:
    """Every chunk in pipeline order: stage 0 to PP - 1 of virtual part 0, then of part 1."""
    return _chunks(model.layers, model.mtp_layers, parallel.pp, parallel.vpp, parallel.layers_of_chunk)


def stage_chunks(model: ModelSpec, parallel: ParallelSpec, stage: int) -> tuple[PipelineChunk, ...]:
    """The chunks of one pipeline stage."""
    return pipeline_chunks(model, parallel)[stage :: parallel.pp]


@lru_cache(maxsize=1024)
def distinct_stages(model: ModelSpec, pp: int, vpp: int, layers_of_chunk: tuple[int, ...] | None) -> tuple[int, ...]:
    """Of the stages that hold the same chunks the first, which has the most micro-batches in flight."""
    spec = ParallelSpec(gpus=pp, pp=pp, vpp=vpp, layers_of_chunk=layers_of_chunk)
    first: dict[tuple[object, ...], int] = {}
    for stage in range(pp):
        content = (
            (tuple(map(model.has_experts, chunk.layers)), chunk.embedding, chunk.loss, chunk.mtp_layers)
            for chunk in stage_chunks(model, spec, stage)
        )
        first.setdefault(tuple(content), stage)
    return tuple(first.values())


@lru_cache(maxsize=1024)
def _chunks(
    num_layers: int, mtp_layers: int, pp: int, vpp: int, layers_of_chunk: tuple[int, ...] | None
) -> tuple[PipelineChunk, ...]:
    """A search asks for the same few layouts hundreds of thousands of times."""
    found, begin, total = list[PipelineChunk](), 0, pp * vpp
    for at, size in enumerate(layers_of_chunk or (num_layers // total,) * total):
        last = at == total - 1
        found.append(
            PipelineChunk(
                stage=at % pp,
                virtual=at // pp,
                layers=tuple(range(begin, begin + size)),
                embedding=at == 0,
                loss=last,
                mtp_layers=mtp_layers if last else 0,
            )
        )
        begin += size
    return tuple(found)


def violation(model: ModelSpec, spec: ParallelSpec) -> str | None:
    """The first rule of Megatron 0.19 that a spec breaks, or None."""
    for check in (_ranks, _divisions, _pipeline, _batch, _balancing):
        reason = check(model, spec)
        if reason:
            return reason
    return None


def _ranks(model: ModelSpec, spec: ParallelSpec) -> str | None:
    for size, name in ((spec.tp * spec.pp * spec.cp, "TP x PP x CP"), (spec.etp * spec.ep * spec.pp, "ETP x EP x PP")):
        if spec.gpus % size:
            return f"{name} = {size} does not divide {spec.gpus} ranks"
    return None


def _divisions(model: ModelSpec, spec: ParallelSpec) -> str | None:
    groups = model.heads if model.latent else model.query_groups
    rules = (
        (model.moe.experts, spec.ep, f"EP {spec.ep} does not divide {model.moe.experts} experts"),
        (model.heads, spec.tp, f"TP {spec.tp} does not divide {model.heads} attention heads"),
        (groups, spec.tp, f"TP {spec.tp} does not divide {groups} query groups"),
        (model.ffn, spec.tp, f"TP {spec.tp} does not divide the dense inner size {model.ffn}"),
        (model.moe.ffn, spec.etp, f"ETP {spec.etp} does not divide the experts' inner size {model.moe.ffn}"),
        (model.moe.shared_ffn, spec.tp, f"TP {spec.tp} does not divide the shared expert's {model.moe.shared_ffn}"),
        (model.seq_length, spec.tp * spec.cp, f"TP x CP = {spec.tp * spec.cp} does not divide {model.seq_length}"),
    )
    for value, divisor, reason in rules:
        if value % divisor:
            return reason
    if spec.cp > 1 and model.seq_length % (2 * spec.cp):
        return f"2 x CP = {2 * spec.cp} does not divide the sequence of {model.seq_length}"
    if spec.cp > 1 and not model.latent and spec.tp * spec.cp > 1 and model.seq_length // (2 * spec.cp) % spec.tp:
        return f"2 x CP x TP does not divide the sequence of {model.seq_length}"
    if spec.etp > 1 and model.bias:
        return "experts with biases need ETP 1"
    return None


def _pipeline(model: ModelSpec, spec: ParallelSpec) -> str | None:
    total = spec.pp * spec.vpp
    if spec.vpp > 1 and spec.pp < 2:
        return "the interleaved schedule needs at least two stages"
    if spec.layers_of_chunk is None:
        if model.layers % total:
            return f"PP x VPP = {total} does not divide {model.layers} layers evenly"
    elif len(spec.layers_of_chunk) != total or sum(spec.layers_of_chunk) != model.layers:
        return f"layers_of_chunk must be {total} numbers that sum to {model.layers}"
    if not spec.recomputes(spec.recompute):
        return "recomputation of the experts' activation needs TransformerEngine's grouped GEMM"
    return None


def _batch(model: ModelSpec, spec: ParallelSpec) -> str | None:
    per_round = spec.micro_batch * spec.dp
    if spec.global_batch % per_round:
        return f"micro-batch x DP = {per_round} does not divide the global batch of {spec.global_batch}"
    if spec.vpp > 1 and spec.micro_batches < spec.pp:
        return f"the interleaved schedule needs {spec.pp} micro-batches, there are {spec.micro_batches}"
    return None


def _balancing(model: ModelSpec, spec: ParallelSpec) -> str | None:
    if spec.replicas != "off" and (spec.ep == 1 or not spec.spare_slots):
        return "replicas need EP > 1 and spare slots"
    if spec.spare_slots and spec.replicas == "off":
        return "spare slots need replicas: auto, history or exact"
    if spec.overlap_degree > 1 and spec.ep == 1:
        return "there is no all-to-all to overlap with EP 1"
    if spec.dispatch == HIERARCHICAL and (spec.ep == 1 or spec.overlap_degree > 1):
        return "a hierarchical dispatch needs EP > 1 and all-to-alls in one chunk"
    if spec.overlap_param_gather and not (spec.overlap_grad_reduce and spec.distributed_optimizer):
        return "overlapping the parameter gather needs the distributed optimizer and overlapped gradients"
    return None
