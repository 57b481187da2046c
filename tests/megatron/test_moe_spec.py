"""`megatron_smartmoe.moe_spec`: layers that are taken, and those that are refused by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]


def test_what_is_taken_and_what_is_refused(tmp_path: Path) -> None:
    assert run_ranks(_look, 1, log_dir=tmp_path) == [None]


def _look() -> None:
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    import megatron_smartmoe
    from megatron_smartmoe.adapter import hooks
    from megatron_smartmoe.adapter.gates.noisy_top_k import NoisyTopKRouter
    from megatron_smartmoe.adapter.moe.experts import SlottedExperts
    from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
    from megatron_smartmoe.adapter.moe.modules import Modules, check_layers
    from megatron_smartmoe.adapter.moe.overlap import OverlappedMoELayer
    from megatron_smartmoe.errors import CompatError

    submodules = MoESubmodules(experts=partial(SequentialMLP, submodules=None))
    made = partial(MoELayer, submodules=submodules)

    # Before the flags are known nothing can be said.
    with pytest.raises(CompatError, match="called before Megatron's flags were validated"):
        megatron_smartmoe.moe_spec(made)
    plain: dict[str, Any] = {"slotted": True, "replicates": False, "may_cut": False, "norm": "none", "sdpa": False}
    hooks.use_modules(Modules(balances=False, overlap_degree=lambda: 1, **plain))
    assert megatron_smartmoe.moe_spec(made) is made  # without --smartmoe

    # Both forms, once and again, and with chunks.
    hooks.use_modules(Modules(balances=True, overlap_degree=lambda: 1, **plain))
    ours = megatron_smartmoe.moe_spec(made)
    assert ours.func is SmartMoELayer
    assert ours.keywords["submodules"].experts is SlottedExperts
    assert megatron_smartmoe.moe_spec(ours) is ours
    old_form = megatron_smartmoe.moe_spec(ModuleSpec(module=MoELayer, submodules=submodules, metainfo={"a": 1}))
    assert (old_form.module, old_form.metainfo) == (SmartMoELayer, {"a": 1})
    hooks.use_modules(Modules(balances=True, overlap_degree=lambda: 2, **plain))
    cut = megatron_smartmoe.moe_spec(ModuleSpec(module=MoELayer, submodules=submodules))
    assert (cut.module, cut.params) == (OverlappedMoELayer, {"overlap_degree": 2})
    hooks.use_modules(Modules(balances=True, overlap_degree=lambda: 1, **plain))

    # A gate, with this project's layer and with Megatron's; a router of one's own is not replaced.
    hooks.use_modules(Modules(balances=True, gate=NoisyTopKRouter, overlap_degree=lambda: 1, **plain))
    gated = megatron_smartmoe.moe_spec(made)
    assert (gated.func, gated.keywords["submodules"].router) == (SmartMoELayer, NoisyTopKRouter)
    assert megatron_smartmoe.moe_spec(gated).keywords == gated.keywords
    hooks.use_modules(Modules(balances=False, gate=NoisyTopKRouter, overlap_degree=lambda: 1, **plain))
    old_form = megatron_smartmoe.moe_spec(ModuleSpec(module=MoELayer, submodules=submodules))
    assert (old_form.module, old_form.submodules.router) == (MoELayer, NoisyTopKRouter)
    own_router = type("Router", (), {"__module__": "lab.moe"})
    with pytest.raises(CompatError, match=r"^--smartmoe-gate: the router of a MoE layer = lab\.moe\.Router: would be"):
        megatron_smartmoe.moe_spec(partial(MoELayer, submodules=MoESubmodules(experts=None, router=own_router)))
    with pytest.raises(CompatError, match=r"^--smartmoe-gate: the spec of a MoE layer"):
        megatron_smartmoe.moe_spec(partial(MLP, submodules=None))
    hooks.use_modules(Modules(balances=True, overlap_degree=lambda: 1, **plain))

    # A subclass that leaves the way of the tokens alone, and those that do not.
    class Gained(MoELayer):
        def postprocess(self, output: Any, shared_expert_output: Any) -> Any:
            return super().postprocess(output, shared_expert_output)

    taken = megatron_smartmoe.moe_spec(partial(Gained, submodules=submodules)).func
    assert issubclass(taken, SmartMoELayer)
    assert issubclass(taken, Gained)
    for method in ("forward", "route", "dispatch"):
        other = type("Other", (Gained,), {method: lambda self: None, "__module__": "lab.moe"})
        with pytest.raises(CompatError) as refused:
            megatron_smartmoe.moe_spec(partial(other, submodules=submodules))
        assert str(refused.value) == (
            f"--smartmoe: a subclass of MoELayer = lab.moe.Other.{method}: overrides what this project replaces. Move "
            "it out of these methods (__init__, postprocess and others may be overridden), or remove --smartmoe."
        )

    # Experts, routers and layers of another kind.
    own_experts = type("Experts", (), {"__module__": "lab.moe"})
    with pytest.raises(CompatError, match=r"^--smartmoe: experts = lab\.moe\.Experts: would be replaced by"):
        megatron_smartmoe.moe_spec(partial(MoELayer, submodules=MoESubmodules(experts=own_experts)))
    router = type("InferenceTopKRouter", (), {})
    with pytest.raises(CompatError, match="the router InferenceTopKRouter is for inference only"):
        megatron_smartmoe.moe_spec(partial(MoELayer, submodules=MoESubmodules(experts=own_experts, router=router)))
    with pytest.raises(CompatError, match="must be Megatron's MoELayer or a subclass"):
        megatron_smartmoe.moe_spec(partial(MLP, submodules=None))
    with pytest.raises(CompatError, match=r"^--smartmoe: the model = no MoE layer: there is nothing to balance"):
        check_layers([], [])
    stock: Any = object()
    with pytest.raises(CompatError, match=r"^--smartmoe: MoE layer 3 = builtins\.object: was not built through"):
        check_layers([(3, stock)], [3])
