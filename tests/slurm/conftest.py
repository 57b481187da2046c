"""One Slurm for all tests of this folder."""

from collections.abc import Iterator

import pytest

from .cluster import SlurmCluster, missing_requirement


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four idle nodes, n1 to n4, of two cores each."""
    if reason := missing_requirement():
        pytest.skip(f"no Slurm here: {reason}")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
