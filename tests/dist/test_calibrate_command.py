"""`smartmoe calibrate` from its ranks to the file, and the file's way into the planner and into training."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_smartmoe.adapter import cost_inputs as training
from megatron_smartmoe.adapter.launch import calibrate, process
from megatron_smartmoe.adapter.launch import machine as launcher
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.calibrate.measure import bench_of_job
from megatron_smartmoe.calibrate.options import CalibrateOptions
from megatron_smartmoe.cli.main import main as smartmoe
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from tests.support.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = [
    "--device",
    "cpu",
    "--hidden",
    "32",
    "--ffn",
    "32",
    "--tokens",
    "4,64,512",
    "--sizes",
    "1024,1e5,1e6",
    "--repeats",
    "3",
]
MODULE = "megatron_smartmoe.adapter.launch.calibrate"


def as_rank(argv: list[str], ranks_per_node: int) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    return calibrate.main(argv)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file that two ranks of one machine wrote, and what rank 0 printed."""
    folder = tmp_path_factory.mktemp("calibrate")
    path = folder / "new" / "mine.yaml"
    assert run_ranks(as_rank, 2, [*QUICK, "--output", str(path)], 2, log_dir=folder / "logs") == [0, 0]
    assert "warning" not in (folder / "logs" / "rank1.log").read_text()  # one rank speaks
    return path, (folder / "logs" / "rank0.log").read_text()


@pytest.mark.dist
def test_the_ranks_write_a_cluster_file(written: tuple[Path, str]) -> None:
    path, printed = written
    cluster = load_cluster_spec(path)
    assert (cluster.name, cluster.nodes, cluster.gpus_per_node, cluster.replica_scope) == ("mine", 1, 2, "group")
    assert cluster.gpu.name == "CPU-thread"
    assert {"gemm", "memory", "all_to_all_intra", "ring_intra", "all_reduce_intra"} == set(cluster.efficiency)
    assert 1 <= cluster.gpu.ranks_per_device < 3
    assert "2 ranks at once on 1 x" in cluster.sources["gpu.peak_flops"]
    assert cluster.sources["inter_node.latency_s"].startswith("not measured, one node: estimate: TCP")
    assert "measuring all_to_all, intra ..." in printed
    assert "compared with cpu: rates that the cost model uses" in printed
    assert f"wrote {path}" in printed
    assert not path.with_name("mine.yaml.partial").exists()


@pytest.mark.dist
def test_ranks_of_four_nodes_measure_what_is_between_them(tmp_path: Path) -> None:
    """Each rank poses as a node, two of them as the nodes of a leaf, all four as those of one spine."""
    path, levels = tmp_path / "nodes.yaml", ["--levels", "leaf:2,spine:4"]
    argv = [*QUICK, "--repeats", "1", "--sizes", "1024,1e5", "--tokens", "4,64", *levels, "--output", str(path)]
    assert run_ranks(as_rank, 4, argv, 1, log_dir=tmp_path / "logs") == [0] * 4
    cluster = load_cluster_spec(path)
    assert (cluster.nodes, cluster.gpus_per_node) == (4, 1)
    assert cluster.sources["inter_node.bandwidth_bytes_s"].startswith("measured: ")
    assert "among 2 ranks" in cluster.sources["efficiency.all_to_all_inter"]
    assert cluster.sources["intra_node.bandwidth_bytes_s"].startswith("not measured, one rank per node: ")
    assert [(level.name, level.nodes) for level in cluster.levels] == [("leaf", 2)]
    assert "measured: " in cluster.sources["levels.leaf.bandwidth_bytes_s"]
    assert 0 < cluster.efficiency["all_to_all_leaf"] <= 1
    printed = (tmp_path / "logs" / "rank0.log").read_text()
    assert "measuring all_to_all, leaf ..." in printed
    assert "warning: level spine: not measured, the job's 4 nodes are in one domain of 4; without numbers" in printed


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("leaf", "--levels = 'leaf': must be a multiple of 1, and more: the nodes of the domains inside it"),
        ("leaf:4,spine:6", "--levels = 'spine:6': must be a multiple of 4, and more"),
        ("node:4", "--levels = 'node:4': must be a name of small letters and the nodes of a domain"),
        ("leaf:2,leaf:4", "--levels = 'leaf:4': must be a name of small letters and the nodes of a domain"),
    ],
)
def test_wrong_levels(levels: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main([*QUICK, "--levels", levels]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.dist
def test_plan_takes_the_file(written: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    model = str(CONFIGS / "models" / "quickstart.yaml")
    assert smartmoe(["plan", "--model", model, "--cluster", str(written[0]), "--no-overlap"]) == 0
    printed = capsys.readouterr().out
    assert "on 2 x CPU-thread" in printed
    assert "times are predicted from the measurements in the cluster file mine" in printed


@pytest.mark.dist
def test_training_and_parallel_auto_take_the_file(written: tuple[Path, str]) -> None:
    options = Namespace(smartmoe_cluster=str(written[0]))
    cluster = training.machine(options)
    assert cluster == load_cluster_spec(written[0])
    found, who = launcher.find_machine(options, Topology(ranks_per_node=4), cpu=True)
    assert (found.gpus_per_node, found.efficiency, who) == (4, cluster.efficiency, "cluster file mine")


# --- starting the ranks


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    commands: list[list[str]] = []

    def run(command: list[str], environment: Any, log: Any, **_: Any) -> int:
        commands.append(list(command))
        return 0

    monkeypatch.setattr(process, "run", run)
    return commands


def test_it_starts_a_rank_per_core(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "usable_cores", lambda: 5)
    assert calibrate.start_ranks(CalibrateOptions(device="cpu", tokens=(1, 2))) == 0
    torchrun = [
        sys.executable,
        "-m",
        "megatron_smartmoe.adapter.launch.torchrun",
        "--nproc-per-node",
        "5",
        "--standalone",
    ]
    assert started == [[*torchrun, "--module", MODULE, "--device", "cpu", "--tokens", "1,2"]]


def test_nproc_is_for_torchrun_alone(started: list[list[str]]) -> None:
    calibrate.start_ranks(CalibrateOptions(device="cpu", nproc=3))
    assert started[0][4:] == ["3", "--standalone", "--module", MODULE, "--device", "cpu"]


def test_more_ranks_than_gpus(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    calibrate.start_ranks(CalibrateOptions())
    assert started[0][4] == "2"
    with pytest.raises(ConfigError) as caught:
        calibrate.start_ranks(CalibrateOptions(nproc=4))
    rule = "there are 2 GPUs here, and each rank needs one. Pass --nproc 2, or --device cpu."
    assert str(caught.value) == f"--nproc = 4: {rule}"


def test_a_wrong_file_to_compare_with_fails_before_ranks_start(
    started: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--compare", str(tmp_path / "absent.yaml"), "--output", str(tmp_path / "o.yaml")]
    assert calibrate.main(argv) == 2
    assert "does not exist" in capsys.readouterr().err
    assert started == []


def test_unequal_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE = 2: must divide the 3 ranks"):
        bench_of_job(torch.device("cpu"), torch.float32, 2, 1)


# --- who is sent here


class Gpu(NamedTuple):
    """What torch says of a GPU."""

    name: str
    major: int
    minor: int
    total_memory: int


def prices_of(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> tuple[ClusterSpec, str | None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    args = Namespace(smartmoe_cluster=None, smartmoe=True)
    return training.machine(args), training.machine_line(args)


def test_an_unknown_gpu_gets_the_nearest_prices_and_is_sent_to_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, line = prices_of(Gpu("NVIDIA Unheard Of", 9, 0, 90_000_000_000), monkeypatch)
    assert cluster.name == "2x8-h100-pcie"
    assert line == (
        "no cluster file is shipped for NVIDIA Unheard Of (sm_90, 90 GB): prices come from the nearest, 2x8-h100-pcie "
        "(H100-PCIE-80GB, PCIe), until training measures its own at its start. To have the same in every run: smartmoe "
        "calibrate --output FILE, then --smartmoe-cluster FILE"
    )


def test_a_known_gpu_has_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, line = prices_of(Gpu("NVIDIA H200", 9, 0, 150_000_000_000), monkeypatch)
    assert cluster.gpu.name == "H200-SXM5-141GB"
    assert line == "prices of NVIDIA H200 come from cluster file 2x8-h200-sxm"
