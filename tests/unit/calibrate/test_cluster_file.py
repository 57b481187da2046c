"""From measured points to a cluster file, and on to the cost model: a measured number is discounted nowhere."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.calibrate.cluster_file import fit_machine
from megatron_smartmoe.calibrate.measurement import COLLECTIVES, MachineMeasurement, Point, Series
from megatron_smartmoe.calibrate.table import as_table
from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.moe_layer import (
    ALL_TO_ALLS,
    ROWS_MOVED_PER_TOKEN,
    constants_of,
    exchange_bytes_s,
)
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants
from megatron_smartmoe.cost.step.groups import Group, all_reduce_s, ring_s
from megatron_smartmoe.spec.cluster import cluster_as_yaml, load_cluster_spec
from megatron_smartmoe.spec.model import load_model_spec
from megatron_smartmoe.spec.parallel import ParallelSpec

CONFIGS = Path(__file__).parents[3] / "configs"
NOMINAL = load_cluster_spec(CONFIGS / "clusters" / "h100-sxm.yaml")
EXPERT = ExpertShape(hidden=1024, ffn=512)
FLOPS, MEMORY_S, EXPERT_S = 500e12, 2.5e12, 12e-6  # what the machine below does
LATENCY_S = {"intra": 8e-6, "inter": 20e-6}
RATES = {  # bytes a second, by link and operation
    "intra": {"all_to_all": 300e9, "ring": 240e9, "all_reduce": 320e9, "send_recv": 400e9},
    "inter": {"all_to_all": 40e9, "ring": 36e9, "all_reduce": 45e9, "send_recv": 30e9},
}


def line(fixed_s: float, unit_s: float, amounts: Sequence[float]) -> Series:
    return Series(points=tuple(Point(units=x, time_s=fixed_s + x * unit_s) for x in amounts))


def measured(links: tuple[str, ...] = ("intra", "inter"), **changes: Any) -> MachineMeasurement:
    sizes = (1e4, 1e6, 1e8)
    found = MachineMeasurement(
        device="H100-80GB-HBM3",
        memory_bytes=84.9e9,
        nodes=2 if "inter" in links else 1,
        ranks_per_node=8,
        cores_per_node=96,
        expert=EXPERT,
        gemm=line(EXPERT_S, EXPERT.flops_per_token / FLOPS, (16, 256, 4096)),
        copy=line(0.0, 1 / MEMORY_S, (1e9, 2e9)),
        links={(op, link): line(LATENCY_S[link], 1 / RATES[link][op], sizes) for link in links for op in COLLECTIVES},
        members={link: {"intra": 8, "inter": 2}[link] for link in links},
        how="nccl, bfloat16, torch 2.11.0, 2026-11-21",
        repeats=9,
    )
    return replace(found, **changes)


def test_a_level_is_no_wider_than_what_lies_inside_it(tmp_path: Path) -> None:
    """A noisy leaf came out faster than its nodes' links, and the spine is a quarter of them."""
    base, sizes = measured(), (1e4, 1e6, 1e8)
    rates = {"leaf": 60e9, "spine": 10e9}
    more = {(op, link): line(30e-6, 1 / rate, sizes) for link, rate in rates.items() for op in COLLECTIVES}
    fit = fit_machine(
        replace(
            base,
            nodes=16,
            links={**base.links, **more},
            members={**base.members, "leaf": 2, "spine": 2},
            levels={"leaf": 2, "spine": 8},
        )
    )
    widths = [level.link.bandwidth_bytes_s for level in fit.cluster.levels]
    assert widths == [fit.cluster.inter_node.bandwidth_bytes_s, pytest.approx(10e9)]
    source = fit.cluster.sources["levels.leaf.bandwidth_bytes_s"]
    assert source.startswith("as between nodes, which all of it crosses; alone 6e+10: measured: ")
    assert fit.cluster.sources["levels.spine.bandwidth_bytes_s"].startswith("measured: ")
    path = tmp_path / "levels.yaml"
    path.write_text(cluster_as_yaml(fit.cluster))
    assert load_cluster_spec(path) == fit.cluster


def test_the_file_says_what_was_measured(tmp_path: Path) -> None:
    fit = fit_machine(measured(), NOMINAL, "mine")
    path = tmp_path / "mine.yaml"
    path.write_text(cluster_as_yaml(fit.cluster, "a comment"))
    cluster = load_cluster_spec(path)
    assert cluster == fit.cluster
    assert (cluster.name, cluster.nodes, cluster.gpus_per_node, cluster.replica_scope) == ("mine", 2, 8, "auto")
    assert cluster.gpu.peak_flops == pytest.approx(FLOPS, rel=1e-3)
    assert cluster.gpu.memory_bandwidth_bytes_s == pytest.approx(MEMORY_S, rel=1e-3)
    assert cluster.intra_node.bandwidth_bytes_s == pytest.approx(400e9, rel=1e-3)  # the best of four operations
    assert cluster.inter_node.bandwidth_bytes_s == pytest.approx(45e9, rel=1e-3)
    assert cluster.intra_node.latency_s == pytest.approx(8e-6, rel=1e-3)
    assert cluster.intra_node.all_to_all_latency_s == pytest.approx(8e-6 / 7, rel=1e-3)
    assert cluster.intra_node.ring_latency_s == pytest.approx(8e-6 / 14, rel=1e-3)  # there and back in 8 us
    assert cluster.inter_node.ring_latency_s is None  # groups there grow beyond what was measured
    assert cluster.gpu.ranks_per_device == 1
    assert cluster.efficiency == pytest.approx(
        {
            "gemm": 1,
            "memory": 1,
            "all_to_all_intra": 3 / 4,
            "ring_intra": 0.6,
            "all_reduce_intra": 0.8,
            "all_to_all_inter": 8 / 9,
            "ring_inter": 0.8,
            "all_reduce_inter": 1,
        },
        rel=1e-3,
    )
    for key, source in cluster.sources.items():
        assert source.startswith("measured: ") or key in ("efficiency.gemm", "efficiency.memory"), key
    assert "send to the next rank among 8 ranks" in cluster.sources["intra_node.latency_s"]
    assert "among 8 ranks, of each of its 14 steps" in cluster.sources["intra_node.ring_latency_s"]
    assert "line off by 0.0% on average" in cluster.sources["gpu.peak_flops"]
    assert "torch 2.11.0, 2026-11-21" in cluster.sources["gpu.peak_flops"]


def test_the_layer_model_gives_the_measured_times_back() -> None:
    """No efficiency comes on top of a measured number: not of products, memory or links."""
    fit = fit_machine(measured(), NOMINAL)
    constants = constants_of(fit.cluster, EXPERT)
    row_s = EXPERT.token_bytes / MEMORY_S
    assert constants.expert_s == pytest.approx(EXPERT_S, rel=2e-3)
    gemm_s = constants.token_s - ROWS_MOVED_PER_TOKEN * row_s
    assert gemm_s == pytest.approx(EXPERT.flops_per_token / FLOPS, rel=2e-3)
    assert constants.intra_token_s == pytest.approx(ALL_TO_ALLS * EXPERT.token_bytes / 300e9, rel=2e-3)
    assert constants.inter_gpu_token_s == pytest.approx(ALL_TO_ALLS * EXPERT.token_bytes / 40e9, rel=2e-3)
    assert fit.half_rate_tokens == pytest.approx(EXPERT_S / (EXPERT.flops_per_token / FLOPS), rel=1e-3)


def test_the_step_model_does_too() -> None:
    cluster = fit_machine(measured(), NOMINAL).cluster
    shares = StepConstants.of(cluster)
    assert (shares.gemm, shares.memory) == (1.0, 1.0)
    assert shares.attention == pytest.approx(0.4 / 0.6)  # as far from the products as before
    ring = ring_s(8e9, Group(8, 1), cluster, shares)
    assert ring == pytest.approx(8e9 * 7 / 8 / 240e9 + 8e-6 / 2, rel=2e-3)
    reduced = all_reduce_s(8e9, Group(8, 1), cluster, shares)
    assert reduced == pytest.approx(2 * 8e9 * 7 / 8 / 320e9 + 8e-6, rel=2e-3)
    model = load_model_spec(CONFIGS / "models" / "olmoe.yaml")
    spec = ParallelSpec(gpus=16, ep=16, global_batch=64)
    expert = ExpertShape(
        hidden=model.hidden,
        ffn=model.moe.ffn,
        gated=model.gated,
        element_bytes=spec.element_bytes,
        grad_bytes=spec.grad_bytes,
    )
    assert layer_constants(cluster, model, spec, shares).token_s == pytest.approx(constants_of(cluster, expert).token_s)


def test_a_datasheet_keeps_the_priors() -> None:
    assert StepConstants.of(NOMINAL) == StepConstants()
    assert exchange_bytes_s(NOMINAL, between_nodes=False) == 0.8 * 450e9
    assert exchange_bytes_s(NOMINAL, between_nodes=True) == 0.8 * 50e9


def test_a_link_that_was_not_measured_is_the_shipped_files() -> None:
    fit = fit_machine(measured(links=("intra",)), NOMINAL)
    assert fit.cluster.inter_node == NOMINAL.inter_node
    source = fit.cluster.sources["inter_node.bandwidth_bytes_s"]
    assert source.startswith("not measured, one node: NVIDIA DGX H100 datasheet")
    assert not any(share.endswith("_inter") for share in fit.cluster.efficiency)
    assert exchange_bytes_s(fit.cluster, between_nodes=True) == exchange_bytes_s(NOMINAL, between_nodes=True)
    assert any("links between nodes: not measured" in warning for warning in fit.warnings)


def test_without_a_shipped_file_it_is_an_estimate_that_says_so(tmp_path: Path) -> None:
    fit = fit_machine(measured(links=()), None)
    for link in ("intra", "inter"):
        assert "estimate" in fit.cluster.sources[f"{link}_node.latency_s"]
    path = tmp_path / "alone.yaml"
    path.write_text(cluster_as_yaml(fit.cluster))
    assert load_cluster_spec(path) == fit.cluster


def test_no_cost_of_an_expert_leaves_the_prior() -> None:
    fit = fit_machine(measured(gemm=line(0.0, 1e-9, (16, 256, 4096))), NOMINAL)
    assert fit.cluster.gpu.weight_passes == NOMINAL.gpu.weight_passes
    assert "gpu.weight_passes" not in fit.cluster.sources


def test_ranks_that_share_cores_are_faster_alone(tmp_path: Path) -> None:
    found = measured(links=("intra",), device="CPU-thread", ranks_per_node=8, cores_per_node=4, ranks_per_device=1.9)
    fit = fit_machine(found, None)
    path = tmp_path / "cpu.yaml"
    path.write_text(cluster_as_yaml(fit.cluster))
    assert load_cluster_spec(path).gpu.ranks_per_device == 1.9
    source = fit.cluster.sources["gpu.ranks_per_device"]
    assert "4096 tokens per expert, one of 8 ranks of a node alone over all at once on 4 cores" in source
    assert "one rank alone    1.90 times as fast: ranks share cores" in as_table(found, fit, None)


def test_warnings_name_the_series() -> None:
    points = [
        Point(units=x, time_s=1e-5 * factor, spread=0.9) for x, factor in ((1e4, 1), (1e6, 4), (1e7, 1), (1e8, 30))
    ]
    found = measured()
    found = replace(found, links={**found.links, ("all_reduce", "inter"): Series(points=tuple(points))})
    warnings = "\n".join(fit_machine(found, NOMINAL).warnings)
    assert "all_reduce inter: the line is off by" in warnings
    assert "all_reduce inter: repeats differ by more than half" in warnings
    assert "gemm" not in warnings
    slow = measured(gemm=line(1e-3, 1e-9, (16, 256, 4096)))
    assert "gemm: half of the full rate at 1000000 tokens" in "\n".join(fit_machine(slow, NOMINAL).warnings)


def test_the_table_shows_points_lines_and_the_nominal_file() -> None:
    found = measured(extra={"host to device": 50e9})
    fit = fit_machine(found, NOMINAL)
    table = as_table(found, fit, NOMINAL)
    assert table.count("all_to_all intra") == 2  # its points, its line
    for words in (
        "H100-80GB-HBM3, 2 x 8 ranks at once, nccl, bfloat16",
        "500 TFLOP/s, half of it at 636 tokens per expert",
        "300 GB/s after 8 us; line off by 0.0%, worst 0.0%",
        "host to device    50 GB/s (not in the file)",
        "compared with 2x8-h100-sxm",
        "  products                    500 TFLOP/s  593.6 TFLOP/s   0.84x",
        "  exchange between nodes          40 GB/s        40 GB/s   1.00x",
        "  latency inside a node              8 us           5 us   1.60x",
    ):
        assert words in table, table
    assert "compared with" not in as_table(found, fit, None)
