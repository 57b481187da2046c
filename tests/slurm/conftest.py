"""One Slurm for all tests of this folder, and the losses of their runs without it."""

from collections.abc import Iterator

import pytest

from tests.support.training import train

from .cluster import SlurmCluster, missing_requirement
from .jobs import DATA, EP2, EP2_PP2, ITERATIONS, LONG_ITERATIONS


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Four idle nodes, n1 to n4, of two cores each."""
    if reason := missing_requirement():
        pytest.skip(f"no Slurm here: {reason}")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of four ranks, EP 2 x PP 2, without Slurm."""
    return train(tmp_path_factory.mktemp("here"), 4, DATA, *EP2_PP2, iterations=ITERATIONS)


@pytest.fixture(scope="session")
def expected_long(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two ranks, EP 2, without Slurm and without a stop."""
    return train(tmp_path_factory.mktemp("here"), 2, DATA, *EP2, iterations=LONG_ITERATIONS)
