"""`smartmoe checkpoint` on what Megatron writes: one training in both formats and other layouts, number by number."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.checkpoint.compare import compare
from megatron_smartmoe.checkpoint.digest import MAIN_WEIGHT
from megatron_smartmoe.checkpoint.manifest import read_manifest
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.verify import verify
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, train

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


def test_digests_are_of_experts_that_stay_where_they_are(tmp_path: Path, data_flags: list[str]) -> None:
    """A format that saves slots has experts move home and back: not while a thread reads them, however slow it is."""
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "2", "--ckpt-format", "torch"]
    argv = [*TINY_MODEL, *TINY_TRAINING, *data_flags, *MIXES["EP2, experts that moved"].split(), *save]
    argv += ["--train-iters", "2", "--smartmoe-run-dir", str(tmp_path / "run")]
    order = run_ranks(_order_of_a_save, 2, argv, log_dir=tmp_path / "ranks")
    assert order == [["home", "digests", "digested", "back"]] * 2


def _order_of_a_save(argv: list[str]) -> list[str]:
    """What happens in a save whose digests take long."""
    from megatron_smartmoe.adapter.checkpoint.digests import LocalDigests
    from megatron_smartmoe.adapter.pretrain import main
    from megatron_smartmoe.runtime.controller import AtHome

    order: list[str] = []
    compute, enter, leave = LocalDigests._compute_on_host, AtHome.__enter__, AtHome.__exit__

    def slow(self: LocalDigests) -> None:
        order.append("digests")
        time.sleep(0.5)
        compute(self)
        order.append("digested")

    def there(self: AtHome) -> AtHome:
        result = enter(self)
        order.append("home")
        return result

    def back(self: AtHome, *args: Any) -> Any:
        order.append("back")
        return leave(self, *args)

    for owner, name, function in (
        (LocalDigests, "_compute_on_host", slow),
        (AtHome, "__enter__", there),
        (AtHome, "__exit__", back),
    ):
        setattr(owner, name, function)
    main(argv)
    return order
