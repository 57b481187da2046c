"""`smartmoe checkpoint` on what Megatron writes: one training in both formats and other layouts, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.checkpoint.compare import compare
from megatron_smartmoe.checkpoint.digest import MAIN_WEIGHT
from megatron_smartmoe.checkpoint.manifest import read_manifest
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.verify import verify
from tests.support.training import train

pytestmark = pytest.mark.dist

MIXES = {
    "TP2, bf16": "--tensor-model-parallel-size 2 --sequence-parallel --bf16",
    "EP2, experts that moved": "--expert-model-parallel-size 2 --smartmoe --smartmoe-homes shuffle "
    "--smartmoe-homes-interval 1",
}


def saved(root: Path, data_flags: list[str], mix: str, *flags: str) -> Path:
    """The folder of iteration 2."""
    name = flags[-1] if flags else "torch_dist"
    checkpoint = root / name
    save = ["--save", str(checkpoint), "--save-interval", "2"]
    train(root / f"{name} run", 2, data_flags, *MIXES[mix].split(), *save, *flags, iterations=2)
    return checkpoint / "iter_0000002"


@pytest.mark.parametrize("mix", MIXES)
def test_both_formats_hold_the_same_numbers(mix: str, tmp_path: Path, data_flags: list[str]) -> None:
    folders = [saved(tmp_path, data_flags, mix), saved(tmp_path, data_flags, mix, "--ckpt-format", "torch")]
    for folder in folders:
        result = verify(folder)
        assert result.findings == ()
        assert result.not_checked == ()
        manifest = read_manifest(folder)
        assert manifest is not None
        digests = [len(entry.digests) for entry in manifest.digests if entry.kind != MAIN_WEIGHT]
        assert result.num_digests >= sum(digests) > 0  # float32 weights are saved once, as their own main weights
    one, other = (read_contents(folder) for folder in folders)
    compared = compare(one, other)
    assert compared.is_equal
    assert compared.num_equal == len(one.parameters)
    assert {key.kind for key in other.parameters} >= {"weight", "exp_avg", "exp_avg_sq"}
