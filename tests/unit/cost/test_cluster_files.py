"""Every shipped cluster file loads, names the source of every number, and makes sensible constants."""

from pathlib import Path

import pytest

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.moe_layer import constants_of
from megatron_smartmoe.spec.cluster import load_cluster_spec

FILES = sorted((Path(__file__).parents[3] / "configs" / "clusters").glob("*.yaml"))


def test_the_files_are_there() -> None:
    assert {"a100-sxm4-80gb", "h100-sxm", "h200-sxm", "b200-sxm"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_cluster_file(file: Path) -> None:
    cluster = load_cluster_spec(file)
    assert len(cluster.sources) == (8 if file.stem == "cpu" else 7)
    assert cluster.intra_node.bandwidth_bytes_s > cluster.inter_node.bandwidth_bytes_s
    constants = constants_of(cluster, ExpertShape(hidden=4096, ffn=1536))
    least = 1 if file.stem == "cpu" else 20  # a GPU needs many tokens to reach half its rate
    assert least < constants.half_rate_tokens < 2000
    assert constants.inter_gpu_token_s > constants.intra_token_s
