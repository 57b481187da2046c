"""Bytes of parameters, gradients and optimizer state on one rank: Megatron's allocation, to the byte.

Method. Megatron's DistributedDataParallel lays a chunk's gradients into one contiguous buffer per kind (dense, expert),
in reverse order of registration. With the distributed optimizer the parameters lie in a twin of that buffer, every
parameter starts at a multiple of 64 elements, and a bucket ends at a multiple of lcm(data-parallel ranks, 128); buckets
end when they reach `max(40e6, 1e6 x ranks)` elements, only on the first stage's first chunk and only when
gradients are reduced while the backward pass runs; a tied embedding gets a bucket to itself. Each data-parallel rank
owns an equal slice of every bucket; fp32 main parameters and both moments exist for the parameters' part of it only, so
ranks differ by a few elements. Without the distributed optimizer there is no padding and every rank holds everything.

Source: `param_layout.py`, `distrib_optimizer.py`, `param_and_grad_buffer.py`, `training.py` of megatron-core 0.19.0.
The real allocation of short runs is compared with this, rank by rank, in tests/megatron/test_memory_bytes.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.memory.parameters import Parameter, Sharding, chunk_parameters, layer_parameters
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec, PipelineChunk, stage_chunks

STAGING_LIMIT_BYTES = 1 << 30  # the default of --smartmoe-migration-staging-mib
MIGRATION_CHUNK_BYTES = 8 << 20  # experts are sent in chunks of at most this, and two are packed at a time

PARAM_ALIGNMENT = 64  # elements
BUCKET_ALIGNMENT = 128  # elements
MAIN_BYTES = 4  # bytes of an fp32 main parameter
MOMENT_BYTES = 8  # bytes of Adam's two fp32 moments
BUCKET_ELEMENTS = 40_000_000  # Megatron's smallest bucket
BUCKET_ELEMENTS_PER_RANK = 1_000_000  # its growth with the data-parallel ranks


@dataclass(frozen=True)
class Layout:
    """One buffer.

    Attributes:
        total: elements with padding.
        owned_D: parameters' elements in the slices of each of the data-parallel ranks.
    """

    total: int
    owned_D: IntArray


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Static memory of one rank, in bytes. `total` is the sum of the parts."""

    params: int = 0
    gradients: int = 0
    main_params: int = 0
    moments: int = 0

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            params=self.params + other.params,
            gradients=self.gradients + other.gradients,
            main_params=self.main_params + other.main_params,
            moments=self.moments + other.moments,
        )

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.params + self.gradients + self.main_params + self.moments


def layout(params: Sequence[Parameter], bucket_size: int | None, num_ranks: int) -> Layout:
    """Lay `params` (registration order) into one buffer of the distributed optimizer, sliced over `num_ranks`."""
    starts, ends, buckets = [], [], []
    start = bucket_start = end = 0
    in_bucket = False

    def close(at: int) -> int:
        divisor = math.lcm(num_ranks, BUCKET_ALIGNMENT)
        bucket_end = -(-at // divisor) * divisor
        buckets.append((bucket_start, bucket_end))
        return bucket_end

    for param in reversed(params):
        start = -(-start // PARAM_ALIGNMENT) * PARAM_ALIGNMENT
        if param.shared and in_bucket:
            start = bucket_start = close(start)
            in_bucket = False
        end = start + param.numel
        starts.append(start)
        ends.append(end)
        in_bucket = True
        start = end
        if param.shared or (bucket_size is not None and end - bucket_start >= bucket_size):
            start = bucket_start = close(end)
            in_bucket = False
    if in_bucket:
        close(end)
    return Layout(buckets[-1][1] if buckets else 0, _owned(starts, ends, buckets, num_ranks))


def _owned(starts: list[int], ends: list[int], buckets: list[tuple[int, int]], num_ranks: int) -> IntArray:
    """Parameters' elements in each rank's slices: covered elements up to a point, interpolated at the slices' ends."""
    owned_D = np.zeros(num_ranks, dtype=np.int64)
    if not starts:
        return owned_D
    point_P = np.stack([starts, ends], axis=1).ravel()
    sizes_P = np.asarray(ends) - np.asarray(starts)
    after_P = np.cumsum(sizes_P)
    covered_P = np.stack([after_P - sizes_P, after_P], axis=1).ravel()
    for begin, end in buckets:
        bounds = begin + np.arange(num_ranks + 1) * ((end - begin) // num_ranks)
        owned_D += np.diff(np.rint(np.interp(bounds, point_P, covered_P)).astype(np.int64))
    return owned_D


@dataclass(frozen=True)
class StateKey:
    """What the static memory of a chunk depends on; launches with equal keys share the result."""

    sharding: Sharding
    chunk: PipelineChunk
    dense_ranks: int
    expert_ranks: int
    bucket_size: int | None
    distributed: bool
    element_bytes: int
    grad_bytes: int


def optimizer_bytes(element_bytes: int) -> int:
    """Bytes that Adam keeps per parameter: two moments, and an fp32 main parameter unless the weight itself is fp32."""
    return MOMENT_BYTES + (MAIN_BYTES if element_bytes < MAIN_BYTES else 0)


def expert_state_bytes(expert: ExpertShape, optimizer: int | None = None) -> int:
    """Bytes that move with an expert: its weights and their optimizer state.

    Args:
        expert: its sizes.
        optimizer: bytes that the optimizer keeps for each parameter; None for Adam's.
    """
    each = optimizer_bytes(expert.element_bytes) if optimizer is None else optimizer
    return expert.weight_bytes + expert.num_params * each


def staging_bytes(expert_bytes: int, home_slots: int, limit_bytes: int = STAGING_LIMIT_BYTES) -> int:
    """Bytes that a rank allocates for experts in transit: at most a layer's home experts arrive together.

    Args:
        expert_bytes: Of one expert's weights and optimizer state.
        home_slots: S, the rank's experts of a layer.
        limit_bytes: The bound that `--smartmoe-migration-staging-mib` gives.
    """
    return min(limit_bytes, home_slots * expert_bytes + 2 * MIGRATION_CHUNK_BYTES)


def largest_state_bytes(model: ModelSpec, spec: ParallelSpec, stage: int) -> tuple[StateBytes, StateBytes]:
    """(dense, expert) static memory of the fullest rank of a pipeline stage, all its chunks together."""
    # A search asks for every micro-batch, recomputation mode and number of spare slots, which change nothing here.
    bare = replace(
        spec,
        micro_batch=1,
        global_batch=1,
        recompute="none",
        spare_slots=0,
        replicas="off",
        homes_interval=0,
        overlap_degree=1,
    )
    return _largest_of_stage(model, bare, stage)


@lru_cache(maxsize=20_000)
def _largest_of_stage(model: ModelSpec, spec: ParallelSpec, stage: int) -> tuple[StateBytes, StateBytes]:
    dense_sum, expert_sum = StateBytes(), StateBytes()
    for chunk in stage_chunks(model, spec, stage):
        dense, expert = _largest(model, state_key(model, spec, chunk))
        dense_sum, expert_sum = dense_sum + dense, expert_sum + expert
    return dense_sum, expert_sum


def least_state_bytes(model: ModelSpec, spec: ParallelSpec) -> float:
    """A lower bound of the first stage's static bytes, without embedding and padding; quick where `layout` is not."""
    sharding = Sharding.of(spec)
    sums = {kind: _layer_numel(model, sharding, kind) for kind in (False, True)}
    dense = expert = 0
    for chunk in stage_chunks(model, spec, 0):
        for layer in chunk.layers:
            one = sums[model.has_experts(layer)]
            dense, expert = dense + one[0], expert + one[1]
    whole = spec.element_bytes + spec.grad_bytes
    state = optimizer_bytes(spec.element_bytes)
    shards = (spec.dp * spec.cp, spec.edp) if spec.distributed_optimizer else (1, 1)
    return dense * (whole + state / shards[0]) + expert * (whole + state / shards[1])


@lru_cache(maxsize=4096)
def _layer_numel(model: ModelSpec, sharding: Sharding, experts: bool) -> tuple[int, int]:
    """(dense, expert) elements of one layer on one rank."""
    params = layer_parameters(model, sharding, experts)
    total = sum(param.numel for param in params)
    expert = sum(param.numel for param in params if param.expert)
    return total - expert, expert


def state_key(model: ModelSpec, spec: ParallelSpec, chunk: PipelineChunk) -> StateKey:
    """What decides the static memory of a chunk, the same for chunks that differ in their place alone."""
    first = chunk.stage == 0 and chunk.virtual == 0
    dense_ranks = spec.dp * spec.cp
    bucket_size = max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK * dense_ranks)
    # What depends on the layer's place is only whether it has experts: renumber, so that equal chunks share a key.
    return StateKey(
        sharding=Sharding.of(spec),
        chunk=_canonical(model, chunk),
        dense_ranks=dense_ranks,
        expert_ranks=spec.edp,
        bucket_size=bucket_size if first and spec.overlap_grad_reduce else None,
        distributed=spec.distributed_optimizer,
        element_bytes=spec.element_bytes,
        grad_bytes=spec.grad_bytes,
    )


@lru_cache(maxsize=4096)
def _canonical(model: ModelSpec, chunk: PipelineChunk) -> PipelineChunk:
    first_moe = next((layer for layer in range(model.layers) if model.has_experts(layer)), 0)
    dense = next((layer for layer in range(model.layers) if not model.has_experts(layer)), first_moe)
    layers = tuple(first_moe if model.has_experts(layer) else dense for layer in chunk.layers)
    return replace(chunk, stage=0, virtual=0, layers=layers)


@lru_cache(maxsize=20_000)
def _largest(model: ModelSpec, key: StateKey) -> tuple[StateBytes, StateBytes]:
    """(dense, expert) static memory of the rank that owns most."""
    (dense, dense_D), (expert, expert_D) = _buffers(model, key)
    return _slice(dense, int(dense_D.max()), key), _slice(expert, int(expert_D.max()), key)


def state_slices(model: ModelSpec, key: StateKey) -> tuple[list[StateBytes], list[StateBytes]]:
    """(dense, expert) static memory, each entry one data-parallel (one EDP) rank's slice."""
    (dense, dense_D), (expert, expert_D) = _buffers(model, key)
    return [_slice(dense, n, key) for n in dense_D.tolist()], [_slice(expert, n, key) for n in expert_D.tolist()]


def _buffers(model: ModelSpec, key: StateKey) -> tuple[tuple[int, IntArray], tuple[int, IntArray]]:
    """For the dense and the expert buffer: its elements, and those that each rank owns."""
    sharding = key.sharding
    spec = ParallelSpec(
        gpus=sharding.tp * sharding.ep * sharding.etp,  # not read: only the sizes of parameters are wanted
        tp=sharding.tp,
        ep=sharding.ep,
        etp=sharding.etp,
        implementation="local" if sharding.local else "transformer_engine",
    )
    params = chunk_parameters(model, spec, key.chunk)
    dense = _buffer([p for p in params if not p.expert], key.dense_ranks, key)
    expert = _buffer([p for p in params if p.expert], key.expert_ranks, key)
    return dense, expert


def _buffer(params: list[Parameter], num_ranks: int, key: StateKey) -> tuple[int, IntArray]:
    """One kind's buffer: its elements, and those that each data-parallel rank owns."""
    if not key.distributed:
        numel = sum(param.numel for param in params)
        return numel, np.full(num_ranks, numel)
    laid = layout(params, key.bucket_size, num_ranks)
    return laid.total, laid.owned_D


def _slice(numel: int, owned: int, key: StateKey) -> StateBytes:
    """Static memory of a rank that holds `numel` elements of a buffer and owns `owned` of them."""
    has_main = key.element_bytes < MAIN_BYTES  # fp32 weights are their own main parameters
    return StateBytes(
        params=numel * key.element_bytes,
        gradients=numel * key.grad_bytes,
        main_params=owned * MAIN_BYTES * has_main,
        moments=owned * MOMENT_BYTES,
    )
