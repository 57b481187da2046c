"""ClusterSpec: every hardware number has a source, every wrong key is named by its path."""

import re
from pathlib import Path

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import load_cluster_spec

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


def load(tmp_path: Path, text: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_cluster_spec(path)


def test_numbers_and_their_sources(tmp_path):
    cluster = load(tmp_path, GOOD)
    assert (cluster.name, cluster.nodes, cluster.gpus_per_node, cluster.replica_scope) == ("two-boxes", 2, 8, "node")
    assert cluster.gpu.peak_flops == 312e12
    assert cluster.inter_node.latency_s == 1e-5
    assert cluster.sources["gpu.peak_flops"] == "datasheet"
    assert cluster.sources["intra_node.latency_s"] == "measured"
    assert len(cluster.sources) == 7


def test_nodes_of_a_group(tmp_path):
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
        ("nodes: 2\n", "nodes: 2\nreplica_scope: rack\n", "replica_scope = 'rack': must be node or group"),
        ("name: A100", "nick: A100", "gpu.nick = 'A100': is not a known key"),
        ("{value: 312e12, source: datasheet}", "312e12", "gpu.peak_flops = 312000000000000.0: must be a mapping"),
        ("{value: 312e12, source: datasheet}", "{value: 312e12}", "gpu.peak_flops.source = None: must say where"),
        ("{value: 312e12, ", "{value: -1, ", "gpu.peak_flops.value = -1: must be a positive number"),
        ("{value: 312e12, ", "{value: .inf, ", "gpu.peak_flops.value = inf: must be a positive number"),
        ("{value: 312e12, ", "{value: 1, unit: F, ", "gpu.peak_flops.unit = 'F': is not a known key"),
    ],
)
def test_a_wrong_entry_is_named_by_its_path(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, GOOD.replace(old, new, 1))


def test_a_missing_section_is_named(tmp_path):
    text = GOOD.replace(GOOD[GOOD.index("inter_node") :], "")
    with pytest.raises(ConfigError, match="inter_node = None: must be a mapping"):
        load(tmp_path, text)
