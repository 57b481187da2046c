"""A hierarchical dispatch gives the experts the rows of a flat one, and the layer its bits, forward and backward."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.cli.main import main as smartmoe
from megatron_smartmoe.cost.fitted import Count
from megatron_smartmoe.report.account import read_steps
from scripts.training_bench.one_layer import smart_layer
from tests.dist.test_homes import decisions
from tests.support.ranks import run_ranks
from tests.support.replicas import balance
from tests.support.training import TINY_MODEL, TINY_TRAINING, delayed_weight_gradients, losses, two_layers

pytestmark = pytest.mark.dist

RANKS, NODES, EXPERTS, TOKENS, HIDDEN = 4, 2, 16, 48, 32
CASES: dict[str, dict[str, Any]] = {  # options of the layer's configuration
    "top-4": {"moe_router_topk": 4},
    "top-1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "dropping": {"moe_router_topk": 4, "moe_expert_capacity_factor": 0.6},
    "shared experts": {"moe_router_topk": 4, "moe_shared_expert_intermediate_size": 32},
    "replicas": {"moe_router_topk": 4},
}


def _layer(case: str, dispatch_nodes: int) -> Any:
    import torch
    from megatron.core import parallel_state

    from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions
    from megatron_smartmoe.runtime.replicas.slots import SpareSlots
    from megatron_smartmoe.runtime.replicas.wire import ReplicaWire

    layer = smart_layer(
        ranks=RANKS, experts=EXPERTS, hidden=HIDDEN, ffn=48, dispatch_nodes=dispatch_nodes, **CASES[case]
    )
    layer.set_homes(torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(5)))
    if case == "replicas":
        weights = (layer.experts.weight1, layer.experts.weight2)
        totals = [torch.zeros_like(weight) for weight in weights]
        wire = ReplicaWire(parallel_state.get_expert_model_parallel_group(), NODES)
        spare = SpareSlots(weights, 1, wire, lambda: totals, keeps=False)
        layer.add_replicas(spare, num_nodes=NODES, exact=ExactOptions(used_slots=1, limit=1.0))
    return layer


def _check() -> dict[str, tuple[bool, int, int]]:
    """By case: whether both layers agree to the bit; rows that this rank sends once for each node, and all of them."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_smartmoe.adapter import cpu

    cpu.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    model_parallel_cuda_manual_seed(1)
    found = {}
    for case in CASES:
        flat, hierarchical = _layer(case, 1), _layer(case, NODES)
        for name, parameter in hierarchical.named_parameters():
            parameter.data.copy_(flat.get_parameter(name).data)
        results = [_pass(layer) for layer in (flat, hierarchical)]
        equal = all(torch.equal(*both) for both in zip(*results, strict=True))
        sizes = hierarchical.token_dispatcher._sizes
        found[case] = equal, int(sizes.once_sent_N.sum()), int(sizes.sent_NL.sum())
    return found


def _pass(layer: Any) -> list[Any]:
    """What the experts get, the layer's output, and all gradients."""
    import torch
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs = torch.randn(TOKENS, 1, HIDDEN, generator=generator).requires_grad_()
    seen: list[Any] = []

    def keep(_: Any, args: tuple[Any, ...]) -> None:  # the flat dispatcher brings home rows and spare rows apart
        seen.extend(each if torch.is_tensor(each) else torch.cat(each) for each in args)

    handle = layer.experts.register_forward_pre_hook(keep)
    output = layer(inputs)[0]
    (output * output.detach().cos()).sum().backward()
    handle.remove()
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [*(each.detach() for each in seen), output.detach(), inputs.grad, *gradients]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[bool, int, int]]]:
    log_dir: Path = tmp_path_factory.mktemp("ranks")
    return run_ranks(_check, RANKS, log_dir=log_dir)


@pytest.mark.fast
@pytest.mark.parametrize("case", CASES)
def test_rows_output_and_gradients_are_those_of_a_flat_dispatch(
    case: str, found: list[dict[str, tuple[bool, int, int]]]
) -> None:
    for equal, once, all_rows in (each[case] for each in found):
        assert equal
        assert all_rows > TOKENS / 2
        assert once == all_rows if case == "top-1" else once < 0.75 * all_rows


TOP4 = "--moe-router-topk 4"
EP2 = f"{TOP4} --expert-model-parallel-size 2"
BF16 = "--bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SHARED = "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-overlap"
SPARE = "--smartmoe-spare-slots 1 --smartmoe-replicas-margin 0 --smartmoe-replicas"
SHUFFLE = "--smartmoe-homes shuffle --smartmoe-homes-interval 1"
DELAY = "--delay-wgrad-compute"
TRAININGS: dict[str, tuple[int, int, str, str]] = {  # ranks of a node, iterations, flags, in two hops alone; 4 ranks
    "ETP2, bf16, full recompute, overlapped shared experts, exact replicas": (
        2,
        3,
        f"{EP2} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2 {BF16} {SHARED} "
        f"{SPARE} exact --smartmoe-replicas-scope group {SHUFFLE}",
        "",
    ),
    "PP2xVPP2, prediction blocks, auto replicas": (
        1,
        3,
        f"{EP2} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --mtp-num-layers 1 "
        f"{SPARE} auto --smartmoe-replicas-scope group {SHUFFLE}",
        "",
    ),
    "overlapped micro-batches, delayed weight gradients, dropping, groups, history replicas": (
        2,
        6,
        f"{TOP4} --expert-model-parallel-size 4 --bf16 --overlap-moe-expert-parallel-comm "
        "--moe-expert-capacity-factor 0.8 --moe-router-num-groups 4 --moe-router-group-topk 2 --smartmoe-homes on "
        f"--smartmoe-homes-interval 1 --smartmoe-homes-horizon 1000000 {SPARE} history "  # every small gain pays
        "--smartmoe-record-micro-batches",
        f"--ep-overlap-early-attn-memory-release {DELAY}",
    ),
}


def _train(argv: list[str], per_node: int) -> None:
    from megatron_smartmoe.adapter.pretrain import main

    local_rank = int(os.environ["RANK"]) % per_node
    os.environ.update(LOCAL_WORLD_SIZE=str(per_node), LOCAL_RANK=str(local_rank))  # as if of one of several nodes
    with delayed_weight_gradients() if DELAY in argv else contextlib.nullcontext():
        main([flag for flag in argv if flag != DELAY])


@pytest.mark.parametrize(
    "mix", [pytest.param(mix, marks=pytest.mark.long if "VPP" in mix else ()) for mix in TRAININGS]
)
def test_a_training_has_the_losses_of_a_flat_dispatch(mix: str, tmp_path: Path, data_flags: list[str]) -> None:
    """To the bit, while homes move and replicas are made; the CPU's prices say that two hops do not pay.

    What Megatron's schedule of two micro-batches may do in another order is done so in two hops alone.
    """
    per_node, iterations, flags, in_two_hops = TRAININGS[mix]
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, "--train-iters", str(iterations), *flags.split(), "--smartmoe"]
    argv += two_layers(flags)
    found, chosen, sent = {}, {}, {}
    for dispatch in ("auto", "hierarchical"):
        run_dir = tmp_path / dispatch
        more = ["--smartmoe-dispatch", dispatch, "--smartmoe-run-dir", str(run_dir)]
        more += ["--smartmoe-record-trace", str(run_dir / "trace.npz")] if "groups" in mix else []
        more += in_two_hops.split() if dispatch == "hierarchical" else []
        run_ranks(_train, RANKS, [*argv, *more], per_node, log_dir=run_dir / "ranks")
        found[dispatch] = losses(run_dir)
        chosen[dispatch] = json.loads((run_dir / "launch.json").read_text())
        steps = read_steps(run_dir)
        assert steps is not None
        sent[dispatch] = steps.record.counts_NRC[:, :, Count.PORT_TOKENS].sum()
        assert any(decision["taken"] for decision in decisions(run_dir)), "no expert has moved"
        assert sum(sum(map(sum, line["copies"])) for line in balance(run_dir)) > 0
    assert found["hierarchical"] == found["auto"]
    assert len(found["auto"]) == iterations
    how = {"overlap_degree": 1, "ranks_per_node": per_node}
    assert chosen == {"auto": {"dispatch": "flat", **how}, "hierarchical": {"dispatch": "hierarchical", **how}}
    assert sent["hierarchical"] != sent["auto"]  # the account counts the rows of both hops
    said = (tmp_path / "auto" / "ranks" / "rank0.log").read_text()
    assert "smartmoe: dispatch flat: sending a token once for each node does not save 1% of the predicted time" in said
    if "groups" in mix:
        assert smartmoe(["simulate", "--replay", str(tmp_path / "hierarchical")]) == 0
