"""The layers that a GPU runs, forward and backward on meta tensors: what can be said of them without a GPU.

Meta tensors have shapes, dtypes, strides and a device, and no values. What this finds: dtypes and strides that CUDA's
grouped GEMM refuses, tensors on the CPU that meet tensors on the device, waits of the host for the device, and the
number of kernels that a layer launches. What it cannot find: anything about values, streams and time.

The process group is torch's fake one, of `EP` ranks. The counts that a dispatcher brings to the host need values: those
of an even routing, or of a skewed one where there are replicas (`_Host.read`). Everything is bf16, the one type that
the grouped GEMM takes on meta, and on a GPU without a slow path. Fake CUDA tensors would be one step closer to a GPU,
but autograd asks the driver for a stream and stops.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EP, EXPERTS, TOP_K, TOKENS, HIDDEN, FFN = 8, 32, 8, 512, 256, 128
META = torch.device("meta")
Fault = Callable[[torch.Tensor], torch.Tensor]
_FREE = frozenset(  # views, and what allocates: no kernel
    "view reshape _unsafe_view t transpose permute slice select expand split detach alias unsqueeze squeeze as_strided "
    "empty new_empty empty_like empty_strided new_empty_strided split_with_sizes unbind chunk _reshape_alias "
    "lift_fresh narrow is_pinned _has_compatible_shallow_copy_type".split()
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer to run.

    Attributes:
        degree: chunks of each all-to-all.
        replicas: whether there is a spare slot, planned from exact counts.
        on_device: whether it is planned where the counts are.
        accumulates: whether weight gradients are added to float32 sums as they are computed.
        attention: whether the whole transformer layer is run and not only its MoE layer.
        graphed: whether only what a CUDA graph of the preprocessing holds is run.
        options: of Megatron's TransformerConfig.
    """

    degree: int = 1
    replicas: bool = False
    on_device: bool = False
    accumulates: bool = False
    attention: bool = False
    graphed: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Found:
    """What running a layer showed.

    Attributes:
        forward: kernels that its forward pass launches, by operator.
        backward: those of its backward pass.
        posted: collectives and messages, by name.
        waits: waits of the host for the device, by the function that waits.
        sent: copies from the host to the device, which no CUDA graph may hold, by the function that makes them.
        error: where and why it stopped, if it did.
    """

    forward: collections.Counter[str] = field(default_factory=collections.Counter)
    backward: collections.Counter[str] = field(default_factory=collections.Counter)
    posted: collections.Counter[str] = field(default_factory=collections.Counter)
    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    sent: collections.Counter[str] = field(default_factory=collections.Counter)
    error: str = ""


class _Work:
    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Host(TorchDispatchMode):
    """Counts launches and the host's waits, and gives the host the numbers that it reads from the device."""

    def __init__(self, found: Found, skewed: bool) -> None:
        super().__init__()
        self._found, self._skewed = found, skewed
        self.launches: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        to_host = name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or META).type == "cpu"
        if name == "_local_scalar_dense" and args[0].is_meta:
            self._waits()
            return self.read(args[0]).item()
        if to_host:
            if not kwargs.get("non_blocking"):
                self._waits()
            return self.read(args[0])
        if name == "copy_" and not args[0].is_meta and args[1].is_meta:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self._waits()
            return args[0].copy_(self.read(args[1]).view(args[0].shape))
        from_host = [tensor for tensor in tensors if not tensor.is_meta and tensor.dim()]
        if name in ("_to_copy", "copy_"):
            moves = (name == "copy_" and args[0].is_meta) or torch.device(kwargs.get("device") or "cpu").type == "meta"
            self._found.sent[_caller()] += bool(from_host and moves)
            if from_host and moves and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self._waits()  # torch copies to the device and synchronizes the stream
        elif from_host and len(from_host) < len(tensors):
            raise AssertionError(f"{name}: a tensor on the CPU meets tensors on the device")
        result = func(*args, **kwargs)
        on_device = any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((tensors, result)))
        if on_device and namespace == "c10d":
            self._found.posted[name.strip("_")] += 1
        elif on_device and not (namespace == "aten" and name in _FREE):
            self.launches[name] += 1
        return result

    def _waits(self) -> None:
        self._found.waits[_caller()] += 1

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a tensor of counts, known by its shape: of rows to or from each rank, of each slot, of all."""
        slots, rows = EXPERTS // EP, TOKENS * TOP_K
        shape = tuple(tensor.shape)
        if tensor.numel() == EP * EXPERTS:
            return torch.from_numpy(counts_RE(self._skewed)).view(shape)
        if tensor.numel() == 2 * EP + 3 * EP * (slots + 1) + EXPERTS:
            return _planned()
        each = {(EP,): rows // EP, (EP, slots): rows // EXPERTS, (slots,): EP * rows // EXPERTS, (1,): rows, (): rows}
        assert shape in each, f"{_caller()} reads a tensor {shape}, and nobody said what is in it"
        return torch.full(shape, each[shape], dtype=tensor.dtype)


def counts_RE(skewed: bool) -> np.ndarray:
    """Tokens that each rank routes to each expert."""
    counts = np.full((EP, EXPERTS), TOKENS * TOP_K // EXPERTS, dtype=np.int64)
    if skewed:  # from every other expert to the first
        counts[:, EXPERTS // EP :] -= 8
        counts[:, 0] += 8 * (EXPERTS - EXPERTS // EP)
    return counts


def _planned() -> torch.Tensor:
    """What the host reads of a plan that was made on the device."""
    from megatron_smartmoe.runtime.replicas.device_plan import DevicePlanner
    from megatron_smartmoe.runtime.replicas.dispatch_plan import RankView

    sizes = {"num_ranks": EP, "num_experts": EXPERTS, "num_slots": EXPERTS // EP + 1, "num_nodes": 1}
    planner = DevicePlanner(RankView(**sizes, tp_size=1, rank=0, tp_rank=0), pinned=False)
    planner.plan(torch.from_numpy(counts_RE(True)), _exact())
    return planner._on_host.clone()


def _exact() -> Any:
    from megatron_smartmoe.cost.replicas import TransferPrice
    from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions

    return ExactOptions(used_slots=1, limit=1.01, price=TransferPrice.of_each(1.0))


def _caller() -> str:
    """The innermost function of the project or of Megatron on the stack."""
    for frame in reversed(traceback.extract_stack()):
        ours = "/megatron_smartmoe/" in frame.filename and "/adapter/cpu/" not in frame.filename
        if ours or "/megatron/core/" in frame.filename:
            return frame.name
    return "autograd"


def run(cases: dict[str, Case], faults: Mapping[str, Fault] | None = None) -> dict[str, Found]:
    """Run every case in this process, which must be a rank of its own, and the first case with each fault.

    Args:
        cases: what to run, by name.
        faults: what to do to the rows that reach the experts, by name.
    """
    join()
    found = {name: _run(case) for name, case in cases.items()}
    first = next(iter(cases.values()))
    for name, fault in (faults or {}).items():
        with _faulty(fault):
            found[name] = _run(first)
    return found


def join() -> None:
    """Be rank 0 of `EP` expert-parallel ranks, of which there is no other."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    store: Any = FakeStore()
    dist.init_process_group("fake", rank=0, world_size=EP, store=store)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=EP, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)


@contextmanager
def _faulty(fault: Fault) -> Iterator[None]:
    from megatron_smartmoe.adapter.moe.experts import SlottedExperts

    forward = SlottedExperts.forward

    def faulty(experts: Any, rows: torch.Tensor, *args: Any) -> Any:
        return forward(experts, fault(rows), *args)

    with mock.patch.object(SlottedExperts, "forward", faulty):
        yield


def _run(case: Case) -> Found:
    found = Found()
    try:
        with _pretending(found):
            layer, config = build(case, META)
            rows = torch.empty(TOKENS, 1, HIDDEN, device=META, dtype=config.params_dtype, requires_grad=True)
            with _Host(found, case.replicas) as host, _captured() if case.graphed else nullcontext():
                output = layer(rows, attention_mask=None)[0] if case.attention else layer(rows)[0]
            found.forward = host.launches
            with _Host(found, case.replicas) as host:
                output.backward(torch.empty_like(output))
                if case.graphed:
                    return found
                for module in layer.modules():
                    spare: Any = getattr(module, "spare_slots", None)
                    if spare is not None:
                        spare.finish_returns()  # as before the reduction over data-parallel ranks
            found.backward = host.launches
        _check_gradients(layer, rows)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found.error = f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
    return found


@contextmanager
def _captured() -> Iterator[None]:
    """Megatron's state while it captures a CUDA graph: a layer returns what the graph leaves."""
    from megatron.core.transformer import cuda_graphs

    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()


def _check_gradients(layer: torch.nn.Module, rows: torch.Tensor) -> None:
    """Everything that is trained has a gradient of its own shape and type."""
    for name, parameter in [("rows", rows), *layer.named_parameters()]:
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype), name


@contextmanager
def _pretending(found: Found) -> Iterator[None]:
    """Collectives that touch nothing, meta as the current device, and a facade that counts the host's waits."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_smartmoe.adapter.cpu import devices

    def counted(name: str) -> Callable[..., Any]:
        def post(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            found.posted[name] += 1
            return _Work() if async_op else None

        return post

    def batch(operations: list[dist.P2POp]) -> list[_Work]:
        found.posted.update(operation.op.__name__ for operation in operations)
        return [_Work()]

    def waits(*args: object) -> None:
        found.waits[_caller()] += 1

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not torch.is_tensor(tensor) or not tensor.is_meta:
            return tensor
        on_host = tensor.to("cpu", non_blocking=True)
        return on_host.numpy() if as_numpy else on_host

    with ExitStack() as stack:
        for name in ("all_to_all_single", "all_gather_into_tensor", "_all_gather_base", "all_reduce"):
            for module in (dist, dist.distributed_c10d):
                stack.enter_context(mock.patch.object(module, name, counted(name)))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", batch))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=META))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", waits))
        for kind in (devices.Event, devices.Stream):
            stack.enter_context(mock.patch.object(kind, "synchronize", waits))
        # Megatron's asks a tensor whether it is on a CUDA device
        stack.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", to_host))
        yield


def _config(case: Case) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    options = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_ffn_hidden_size": FFN,
        "ffn_hidden_size": FFN,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "expert_model_parallel_size": EP,
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "pipeline_dtype": torch.bfloat16,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "perform_initialization": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    kind = MLATransformerConfig if case.options.get("multi_latent_attention") else TransformerConfig
    return kind(**(options | case.options))


def build(case: Case, device: torch.device, *, stock: bool = False) -> tuple[torch.nn.Module, Any]:
    """The layer that the product builds without TransformerEngine, or Megatron's own, and its configuration."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_smartmoe.adapter import hooks
    from megatron_smartmoe.adapter.moe.modules import Modules

    config = _config(case)
    hooks.use_modules(
        Modules(
            balances=not stock,
            slotted=True,
            replicates=False,
            may_cut=False,
            overlap_degree=lambda: case.degree,
            norm="all",
            sdpa=True,
        )
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        multi_latent_attention=bool(case.options.get("multi_latent_attention")),
        normalization="RMSNorm",
    )
    whole = spec.module(config, submodules=spec.submodules, layer_number=1).to(device)
    if case.accumulates:  # the flag alone would ask for apex, whose kernel Megatron's attention takes
        whole.mlp.experts.accumulates = True
        for weight in whole.mlp.experts.parameters():  # as Megatron's wrapper for data parallelism gives them
            weight.main_grad = torch.empty_like(weight, dtype=torch.float32)
    if case.replicas:
        with_replicas(whole.mlp, exact=_exact(), on_device=case.on_device)
    return (whole if case.attention else whole.mlp), config


def with_replicas(layer: Any, *, exact: Any, on_device: bool = False) -> None:
    """Give the layer a spare slot, as `adapter.loops.replicas` does; `exact` as `LayerPlanner` has it."""
    from megatron.core import parallel_state

    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    experts = layer.experts
    weights = experts.slot_weights()
    wire = ReplicaWire(parallel_state.get_expert_model_parallel_group())
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    spare = SpareSlots(weights, 1, wire, lambda: totals, keeps=exact is None)
    layer.add_replicas(spare, exact=exact, on_device=on_device)
