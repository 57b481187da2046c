"""A transformer layer whose MoE preprocessing is in a CUDA graph, beside the same layer without: equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

EXPERTS, HIDDEN, TOKENS = 8, 32, 48
MODULES = ["moe_router", "moe_preprocess"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer.

    Attributes:
        replicas: None, or how replicas are planned: device, exact (on the host) or history.
        degree: chunks of each all-to-all.
        options: of Megatron's TransformerConfig.
    """

    replicas: str | None = None
    degree: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def join(backend: str, ranks: int) -> None:
    """Be one of `ranks` expert-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group(backend)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)


def build(case: Case, device: torch.device, **options: Any) -> Any:
    """The transformer layer."""
    from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions
    from tests.support import meta_layer

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "expert_model_parallel_size": dist.get_world_size(),
        "perform_initialization": True,
    }
    if device.type == "cpu":
        sizes |= {"params_dtype": torch.float32, "bf16": False, "pipeline_dtype": torch.float32}
    of_meta = meta_layer.Case(attention=True, degree=case.degree, options=sizes | case.options | options)
    layer, _ = meta_layer.build(of_meta, device)
    if case.replicas is not None:
        exact = None if case.replicas == "history" else ExactOptions(used_slots=1, limit=1.0)
        meta_layer.with_replicas(layer.mlp, exact=exact, on_device=case.replicas == "device")
    return layer


def _use_history(layer: Any, experts: tuple[int, int]) -> None:
    """Replicas of these experts, the home of each on the other rank, on rank 0 and 1, as a plan from history has it."""
    planner = layer.mlp.planner
    slots_RS = planner._homes_RS.copy()
    slots_RS[:, -1] = experts
    planner.slots_RS = slots_RS
    planner._spare.use(slots_RS, num_passes=1)


def compare(
    case: Case,
    capture: Callable[[Any, torch.Tensor], object],
    device: torch.device,
    *,
    backward: bool = True,
) -> dict[str, Any]:
    """What differs between a layer in a graph and the same one without, in each of four micro-batches.

    Between the second and the third the homes move and other replicas are in use, as between two steps.

    Args:
        case: the layer.
        capture: puts a graph into a layer, given hidden states to capture with.
        device: of the layer.
        backward: whether gradients are compared.
    """
    from megatron_smartmoe.adapter.moe.routers import count_tokens
    from megatron_smartmoe.runtime.counts import ExpertCounts

    plain = build(case, device)
    graphed = build(case, device, cuda_graph_impl="transformer_engine", cuda_graph_modules=MODULES)
    for name, parameter in plain.named_parameters():
        graphed.get_parameter(name).data.copy_(parameter.data)
    layers = {"plain": plain, "graphed": graphed}
    counts = {name: ExpertCounts(num_layers=1, num_experts=EXPERTS, device=device) for name in layers}
    for name, layer in layers.items():
        count_tokens([(0, layer.mlp)], counts[name])
        if case.replicas == "history":
            _use_history(layer, (4, 0))
    generator = torch.Generator().manual_seed(dist.get_rank())
    dtype = plain.mlp.router.config.params_dtype
    micro_batches = [torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(device, dtype) for _ in range(4)]
    warm = [layer(micro_batches[0], attention_mask=None)[0] for layer in (plain, graphed)]  # as before a capture
    same = {"warm-up": torch.equal(*warm)}
    capture(graphed, micro_batches[1].requires_grad_())
    for at, rows in enumerate(micro_batches):
        if at == 2:
            for layer in layers.values():
                layer.mlp.set_homes(torch.tensor([5, 1, 2, 0, 4, 3, 7, 6]))
                if case.replicas == "history":
                    _use_history(layer, (6, 1))
        found = {
            "plain": _pass(plain, plain, rows, backward=backward),
            "graphed": _pass(graphed, graphed._te_cuda_graph_replay, rows, backward=backward),
        }
        for key, tensor in found["plain"].items():
            ours = found["graphed"][key]
            same[f"{at}: {key}"] = ours is tensor if tensor is None or ours is None else torch.equal(ours, tensor)
    same["counts"] = torch.equal(counts["graphed"].local_LE, counts["plain"].local_LE)
    has_replicas = case.replicas is not None and graphed.mlp.planner.slots_RS[:, -1].max() >= 0
    return {"differs": [key for key, is_same in same.items() if not is_same], "has replicas": bool(has_replicas)}


def _pass(
    layer: Any, forward: Callable[..., Any], rows: torch.Tensor, *, backward: bool
) -> dict[str, torch.Tensor | None]:
    """The output of a micro-batch, and the gradients."""
    inputs = rows.detach().clone().requires_grad_()
    output = forward(inputs, attention_mask=None)[0]
    if not backward:
        return {"output": output}
    output.square().sum().backward()
    spare = layer.mlp.experts.spare_slots
    if spare is not None:
        spare.finish_returns()
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    return {"output": output, "input": inputs.grad, **gradients}
