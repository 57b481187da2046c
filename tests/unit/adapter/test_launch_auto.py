"""`--parallel auto` in the launcher: the machine, the space of a run, a checkpoint's limits, the plan's file."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_smartmoe.adapter.flags import checkpoint_check
from megatron_smartmoe.adapter.launch import auto, checkpoint_limits, machine, search_space
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.constraints import Constraints
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.run import RunSpec

CLUSTERS = Path(__file__).parents[3] / "configs" / "clusters"
H100 = load_cluster_spec(CLUSTERS / "h100-sxm.yaml")
FILE = f"cluster file {H100.name}"
NODE = Topology(ranks_per_node=4)
NODES = Topology(num_nodes=2, ranks_per_node=8)
ARGS = Namespace(
    bf16=True,
    fp16=False,
    grad_reduce_in_bf16=False,
    accumulate_allreduce_grads_in_fp32=False,
    optimizer="adam",
    transformer_impl="transformer_engine",
    moe_grouped_gemm=True,
    smartmoe=False,
    smartmoe_experts="grouped_mm",
    smartmoe_homes="on",
    smartmoe_homes_interval=40,
    smartmoe_cluster=None,
    vocab_size=None,
    tokenizer_type="HuggingFaceTokenizer",
    tokenizer_model=None,
    metadata_path=None,
    finetune=False,
    no_load_optim=False,
)


def args(**values: Any) -> Namespace:
    return Namespace(**{**vars(ARGS), **values})


# --- the machine


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine whose GPUs have so much memory, and which has the H100's cluster file."""

    def memory(device_bytes: int) -> None:
        stub = SimpleNamespace(machine=lambda _: H100)
        monkeypatch.setitem(sys.modules, "megatron_smartmoe.adapter.cost_inputs", stub)
        monkeypatch.setattr(machine, "device_memory_bytes", lambda ranks: device_bytes)

    return memory


def test_on_one_node_the_devices_say_their_memory(gpus: Any) -> None:
    gpus(85_000_000_000)
    cluster, who = machine.find_machine(ARGS, NODE, cpu=False)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu.memory_bytes) == (1, 4, 85e9)
    assert who == "the device's own"


def test_a_named_file_may_leave_room_and_cannot_add_any(gpus: Any) -> None:
    named = args(smartmoe_cluster="mine.yaml")
    gpus(85_000_000_000)
    assert machine.find_machine(named, NODE, cpu=False)[0].gpu.memory_bytes == H100.gpu.memory_bytes
    gpus(40_000_000_000)
    assert machine.find_machine(named, NODE, cpu=False)[0].gpu.memory_bytes == 40e9


def test_several_nodes_go_by_the_file(gpus: Any) -> None:
    """Each node plans for itself; what one device says, another need not."""
    for device_bytes in (85_000_000_000, 79_000_000_000):
        gpus(device_bytes)
        cluster, who = machine.find_machine(ARGS, NODES, cpu=False)
        assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu.memory_bytes) == (2, 8, H100.gpu.memory_bytes)
        assert who == FILE


def test_a_file_of_another_product_is_refused(gpus: Any) -> None:
    gpus(40_000_000_000)
    with pytest.raises(ConfigError) as caught:
        machine.find_machine(ARGS, NODES, cpu=False)
    assert str(caught.value) == (
        f"--smartmoe-cluster = None: the GPUs here have 40.0 GB, and in {FILE} they have 80.0 GB. "
        "Pass --smartmoe-cluster FILE with this memory_bytes, the same on every node; smartmoe calibrate writes one."
    )


def test_cpu_ranks_go_by_the_file(gpus: Any) -> None:
    gpus(0)
    cluster, who = machine.find_machine(ARGS, NODE, cpu=True)
    assert (cluster.gpu.memory_bytes, who) == (H100.gpu.memory_bytes, FILE)


# --- the vocabulary


def test_flags_say_the_vocabulary() -> None:
    spec = RunSpec(name="a", data={"prefix": "p", "vocab-size": 500})
    assert machine.vocabulary(spec, args(vocab_size=100)) == 100
    assert machine.vocabulary(spec, args(vocab_size=100, tokenizer_type="NullTokenizer")) == 101


def test_the_corpus_says_it_before_it_exists() -> None:
    """Whether another node has prepared it meanwhile makes no difference."""
    tokenizer = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "absent.model"}
    assert machine.vocabulary(RunSpec(name="a", data={"prefix": "p", "vocab-size": 500}), args(**tokenizer)) == 500
    with pytest.raises(ConfigError, match=r"--tokenizer-model = 'absent.model': is not a file"):
        machine.vocabulary(
            RunSpec(name="a", data={"prefix": "p", "tokenizer-model": "absent.model"}), args(**tokenizer)
        )


def test_an_unknown_vocabulary_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--vocab-size = None: is required by --parallel auto"):
        machine.vocabulary(RunSpec(name="a"), ARGS)


# --- the space


def test_a_gpu_with_transformer_engine() -> None:
    space = search_space.space_options(ARGS, cpu=False)
    assert space == SpaceOptions(spare_slots=(0,), overlap_degrees=(1,), dispatches=("flat",), homes_interval=0)


def test_cpu_ranks() -> None:
    local = args(bf16=False, transformer_impl="local", moe_grouped_gemm=False, smartmoe=True)
    space = search_space.space_options(local, cpu=True)
    assert (space.precision, space.implementation, space.homes_interval) == ("fp32", "local", 40)
    assert (space.overlap_grad_reduce, space.overlap_param_gather, space.distributed_optimizer) == (False, False, True)
    assert space.recompute == ("none", "moe", "full")
    assert space.ffn_multiple == 1


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"moe_grouped_gemm": False}, "recompute", ("none", "moe", "full")),
        ({"smartmoe": True}, "recompute", ("none", "moe", "full")),
        ({"smartmoe": True}, "ffn_multiple", 8),
        ({"smartmoe": True, "smartmoe_experts": "transformer_engine"}, "ffn_multiple", 1),
        ({"smartmoe": True, "smartmoe_homes": "off"}, "homes_interval", 0),
        ({"optimizer": "muon"}, "distributed_optimizer", False),
        ({"optimizer": "muon"}, "overlap_param_gather", False),
        ({"grad_reduce_in_bf16": True}, "grad_reduce_in_fp32", False),
        ({"bf16": False, "fp16": True}, "grad_reduce_in_fp32", False),
    ],
)
def test_what_depends_on_the_flags(changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(search_space.space_options(args(**changes), cpu=False), field) == value


# --- a checkpoint

SAVED = Namespace(
    use_distributed_optimizer=True,
    dist_ckpt_optim_fully_reshardable=True,
    expert_model_parallel_size=4,
    expert_tensor_parallel_size=None,
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=1,
)


def limits(monkeypatch: pytest.MonkeyPatch, given: Namespace = ARGS, **changes: Any) -> Constraints:
    monkeypatch.setattr(checkpoint_check, "latest_checkpoint", lambda _: Path("c"))
    monkeypatch.setattr(checkpoint_check, "saved_arguments", lambda _: Namespace(**{**vars(SAVED), **changes}))
    return checkpoint_limits.limits_of_checkpoint(given, SpaceOptions())


def test_optimizer_state_keeps_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits(monkeypatch)
    assert found.options == replace(SpaceOptions(), expert_parallel=True)
    plain = limits(monkeypatch, use_distributed_optimizer=False, expert_model_parallel_size=1)
    assert (plain.options.distributed_optimizer, plain.options.overlap_param_gather) == (False, False)
    assert (plain.options.expert_parallel, plain.given) == (False, {"distributed_optimizer": False})
    assert plain.kept == (
        "EP 1 and an optimizer that is not distributed, as in the checkpoint (pass --no-load-optim to change it)",
    )


def test_raw_optimizer_state_keeps_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits(monkeypatch, dist_ckpt_optim_fully_reshardable=False)
    assert found.options.fixed == {"tp": 2, "pp": 1, "ep": 4, "etp": 2}


@pytest.mark.parametrize("flag", ["finetune", "no_load_optim"])
def test_weights_go_anywhere(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    found = limits(monkeypatch, args(**{flag: True}))
    assert (found.options, found.kept) == (SpaceOptions(), ())
    assert limits(monkeypatch, no_save_optim=True).kept == ()


# --- the file


def test_the_plan_appears_whole(tmp_path: Path) -> None:
    planned = auto.AutoPlan(spec=RunSpec(name="a"), command_line=[], lines=[], content={"version": 1})
    planned.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text()) == {"version": 1}


def test_a_plan_that_was_kept_is_not_written_again(tmp_path: Path) -> None:
    auto.AutoPlan(spec=RunSpec(name="a"), command_line=[], lines=[], content=None).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_replaced_is_said_with_both_values() -> None:
    spec = RunSpec(
        name="a",
        flags={
            "lr": "1",
            "micro-batch-size": "4",
            "expert-model-parallel-size": "2",
            "pipeline-model-parallel-size": "2",
            "overlap-grad-reduce": True,
            "recompute-modules": ["moe", "mlp"],
        },
    )
    flags = {"expert-model-parallel-size": "2", "pipeline-model-parallel-size": "1", "recompute-modules": "moe"}
    assert auto._replaced(spec, ["--micro-batch-size=8"], flags) == [
        "--pipeline-model-parallel-size 2 with 1",
        "--overlap-grad-reduce on with none",
        "--recompute-modules moe mlp with moe",
    ]
