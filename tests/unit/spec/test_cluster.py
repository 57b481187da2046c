"""ClusterSpec: every hardware number has a source, every wrong key is named by its path."""

import re
from pathlib import Path

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import (
    RESERVED_BYTES,
    WEIGHT_PASSES,
    ClusterSpec,
    cluster_as_yaml,
    load_cluster_spec,
)

GOOD = """
name: two-boxes
nodes: 2
gpus_per_node: 8
gpu:
  name: A100
  peak_flops: {value: 312e12, source: datasheet}
  memory_bytes: {value: 80e9, source: datasheet}
  memory_bandwidth_bytes_s: {value: 2.039e12, source: datasheet}
intra_node: {bandwidth_bytes_s: {value: 300e9, source: datasheet}, latency_s: {value: 3e-6, source: measured}}
inter_node: {bandwidth_bytes_s: {value: 25e9, source: datasheet}, latency_s: {value: 1e-5, source: measured}}
"""


def load(tmp_path: Path, text: str) -> ClusterSpec:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_cluster_spec(path)


def test_numbers_and_their_sources(tmp_path: Path) -> None:
    cluster = load(tmp_path, GOOD)
    assert (cluster.name, cluster.nodes, cluster.gpus_per_node, cluster.replica_scope) == ("two-boxes", 2, 8, "auto")
    assert cluster.gpu.peak_flops == 312e12
    assert cluster.inter_node.latency_s == 1e-5
    assert cluster.sources["gpu.peak_flops"] == "datasheet"
    assert cluster.sources["intra_node.latency_s"] == "measured"
    assert len(cluster.sources) == 7


def test_nodes_of_a_group(tmp_path: Path) -> None:
    cluster = load(tmp_path, GOOD)
    assert [cluster.nodes_of_group(ranks) for ranks in (1, 4, 8, 16, 64)] == [1, 1, 1, 2, 8]
    with pytest.raises(ConfigError, match="must fill whole nodes of 8"):
        cluster.nodes_of_group(12)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes: 2\n", "nodes: two\n", "nodes = 'two': must be a positive whole number"),
        ("nodes: 2\n", "nodes: true\n", "nodes = True: must be a positive whole number"),
        ("nodes: 2\n", "nodes: 2\nracks: 1\n", "racks = 1: is not a known key"),
        ("nodes: 2\n", "nodes: 2\nreplica_scope: rack\n", "replica_scope = 'rack': must be auto, node or group"),
        ("name: A100", "nick: A100", "gpu.nick = 'A100': is not a known key"),
        ("{value: 312e12, source: datasheet}", "312e12", "gpu.peak_flops = 312000000000000.0: must be a mapping"),
        ("{value: 312e12, source: datasheet}", "{value: 312e12}", "gpu.peak_flops.source = None: must state where"),
        ("{value: 312e12, ", "{value: -1, ", "gpu.peak_flops.value = -1: must be a positive number"),
        ("{value: 312e12, ", "{value: .inf, ", "gpu.peak_flops.value = inf: must be a positive number"),
        ("{value: 312e12, ", "{value: 1, unit: F, ", "gpu.peak_flops.unit = 'F': is not a known key"),
        (
            "nodes: 2\n",
            "nodes: 2\nefficiency: 0.5\n",
            "efficiency = 0.5: must be a mapping. Its keys: gemm, attention,",
        ),
        ("nodes: 2\n", "nodes: 2\nefficiency: {gem: 1}\n", "efficiency.gem = 1: is not a known key"),
        ("nodes: 2\n", "nodes: 2\nefficiency: {gemm: 1}\n", "efficiency.gemm = 1: must be a mapping of value and"),
        (
            "nodes: 2\n",
            "nodes: 2\nefficiency: {gemm: {value: 1.2, source: s}}\n",
            "efficiency.gemm.value = 1.2: must be a share, above 0 and at most 1. Use 1 for a rate",
        ),
        (
            "  memory_bytes:",
            "  ranks_per_device: {value: 0.5, source: s}\n  memory_bytes:",
            "gpu.ranks_per_device.value = 0.5: must be at least 1: how many times as fast a rank is when the others",
        ),
    ],
)
def test_a_wrong_entry_is_named_by_its_path(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, GOOD.replace(old, new, 1))


MEASURED = (
    GOOD.replace(
        "  memory_bytes:",
        '  weight_passes: {value: 4.5, source: "measured: it\'s so"}\n'
        "  ranks_per_device: {value: 2, source: measured}\n  memory_bytes:",
    ).replace("intra_node: {", "intra_node: {ring_latency_s: {value: 1e-6, source: measured}, ")
    + "efficiency: {gemm: {value: 1, source: measured}, ring_inter: {value: 0.25, source: measured}}\n"
)


def test_an_old_file_leaves_everything_to_the_priors(tmp_path: Path) -> None:
    cluster = load(tmp_path, GOOD)
    assert cluster.efficiency == {}
    assert cluster.gpu.weight_passes == WEIGHT_PASSES
    assert cluster.gpu.reserved_bytes == RESERVED_BYTES
    assert cluster.gpu.ranks_per_device == 1
    assert cluster.intra_node.ring_latency_of(8) == pytest.approx(4 * 3e-6)  # a tree of messages
    assert cluster.intra_node.all_to_all_latency_of(8) == 3e-6


def test_a_measured_file_says_what_is_reached(tmp_path: Path) -> None:
    cluster = load(tmp_path, MEASURED)
    assert cluster.efficiency == {"gemm": 1.0, "ring_inter": 0.25}
    assert (cluster.gpu.weight_passes, cluster.gpu.ranks_per_device) == (4.5, 2)
    assert cluster.intra_node.ring_latency_of(8) == pytest.approx(7e-6)
    assert cluster.sources["efficiency.gemm"] == "measured"


@pytest.mark.parametrize("text", [GOOD, MEASURED], ids=["datasheets", "measured"])
def test_what_is_written_is_read_back(tmp_path: Path, text: str) -> None:
    cluster = load(tmp_path, text)
    written = cluster_as_yaml(cluster, "a comment\nof two lines")
    assert written.startswith("# a comment\n# of two lines\nname: ")
    assert load(tmp_path, written) == cluster


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("  devices: NVIDIA L4", "gpu.devices = 'NVIDIA L4': must be a list of the driver's names of GPUs"),
        ("  capability: 9.0", "gpu.capability = 9.0: must be a compute capability in quotes"),
    ],
)
def test_the_devices_of_a_file(tmp_path: Path, line: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(rule)):
        load(tmp_path, GOOD.replace("gpu:\n", f"gpu:\n{line}\n"))
    named = GOOD.replace("gpu:\n", "gpu:\n  devices: [NVIDIA L4, NVIDIA L40]\n  capability: '8.9'\n")
    cluster = load(tmp_path, named)
    assert (cluster.gpu.devices, cluster.gpu.capability) == (("NVIDIA L4", "NVIDIA L40"), (8, 9))
    assert load(tmp_path, cluster_as_yaml(cluster)) == cluster


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    text = GOOD.replace(GOOD[GOOD.index("inter_node") :], "")
    with pytest.raises(ConfigError, match="inter_node = None: must be a mapping"):
        load(tmp_path, text)


LEVELS = """
levels:
  - name: leaf
    nodes: 2
    bandwidth_bytes_s: {value: 12.5e9, source: "assumed: two ports down for one up"}
    latency_s: {value: 15e-6, source: estimate}
  - name: spine
    nodes: 8
    bandwidth_bytes_s: {value: 5e9, source: assumed}
    latency_s: {value: 20e-6, source: estimate}
"""


def test_levels_above_the_nodes(tmp_path: Path) -> None:
    cluster = load(tmp_path, GOOD.replace("nodes: 2\n", "nodes: 16\nreplica_scope: leaf\n") + LEVELS)
    assert [(level.name, level.nodes, level.link.bandwidth_bytes_s) for level in cluster.levels] == [
        ("leaf", 2, 12.5e9),
        ("spine", 8, 5e9),
    ]
    assert cluster.sources["levels.spine.bandwidth_bytes_s"] == "assumed"
    again = load(tmp_path, cluster_as_yaml(cluster))
    assert (again.levels, again.replica_scope, again.sources) == (cluster.levels, "leaf", cluster.sources)
    # Parts of a group that keep their replicas.
    assert [cluster.domains(nodes, "leaf") for nodes in (1, 2, 4, 16)] == [1, 1, 2, 8]
    assert [cluster.domains(4, scope) for scope in ("auto", "node", "group", "spine")] == [4, 4, 1, 1]
    with pytest.raises(ConfigError, match="replica scope = 'leaf': an expert-parallel group on 3 nodes fills no whole"):
        cluster.domains(3, "leaf")
    with pytest.raises(ConfigError, match=r"is not a level of cluster .* Known: auto, node, group, leaf, spine"):
        cluster.domains(3, "rack")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes: 8", "nodes: 3", "levels.spine.nodes = 3: must be a multiple of the 2 nodes of level leaf, and more"),
        ("nodes: 2", "nodes: 1", "levels.leaf.nodes = 1: must be at least 2, the nodes of one domain. For example"),
        ("nodes: 2", "nodes: some", "levels.leaf.nodes = 'some': must be a positive whole number"),
        ("name: spine", "name: leaf", "levels[1].name = 'leaf': is taken: every level has its own name, and none is"),
        ("name: leaf", "name: group", "levels[0].name = 'group': is taken"),
        ("name: leaf", "name: 7", "levels[0].name = 7: must be a name of small letters, digits, _ and -"),
        ("{value: 5e9, source: assumed}", "5e9", "levels.spine.bandwidth_bytes_s = 5000000000.0: must be a mapping"),
        ("    nodes: 8\n", "    nodes: 8\n    ports: 2\n", "levels.spine.ports = 2: is not a known key"),
        (
            "{value: 5e9",
            "{value: 40e9",
            "levels.spine.bandwidth_bytes_s.value = 40000000000.0: must be at most the 1.25e+10 of level leaf: one "
            "GPU's share of the way out, which narrows outward. Divide the bandwidth of a domain by its GPUs, or",
        ),
        (
            "{value: 12.5e9",
            "{value: 28e9",
            "levels.leaf.bandwidth_bytes_s.value = 28000000000.0: must be at most the 2.5e",
        ),
    ],
)
def test_a_wrong_level_is_named_by_its_path(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in LEVELS
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, GOOD + LEVELS.replace(old, new, 1))


def test_a_level_may_be_as_wide_as_what_is_inside(tmp_path: Path) -> None:
    """Up to a measurement's noise."""
    cluster = load(tmp_path, GOOD + LEVELS.replace("value: 12.5e9", "value: 25.5e9"))
    assert cluster.levels[0].link.bandwidth_bytes_s == 25.5e9


def test_levels_are_a_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="levels = 'leaf': must be a list of levels, the smallest domains first"):
        load(tmp_path, GOOD + "levels: leaf\n")


def test_the_file_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "topology.md").read_text()
    cluster = load(tmp_path, page.split("```yaml\n", 1)[1].split("```", 1)[0])
    assert (cluster.replica_scope, [level.name for level in cluster.levels]) == ("leaf", ["leaf", "pod"])
