"""Comparing checkpoints of different layouts: what is equal has equal digests, what differs is measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_smartmoe.checkpoint.compare import Comparison, compare
from megatron_smartmoe.checkpoint.contents import Contents
from megatron_smartmoe.checkpoint.reader import read_contents
from tests.support.torch_dist_files import EXPERT_KEY, STATE, model, write
from tests.unit.checkpoint.test_verify import NORM, NUM_PARAMETERS, digests_of

# Expert, tensor and pipeline parallelism as they cut the tensors of a checkpoint.
LAYOUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "whole": {},
    "EP4": {EXPERT_KEY: (1, 4, 1, 1)},
    "PP2 x EP2 x ETP2": {EXPERT_KEY: (2, 2, 4, 1), "decoder.layers.mlp.router.weight": (2, 1, 1)},
    "TP2": {"embedding.word_embeddings.weight": (2, 1), EXPERT_KEY: (1, 1, 1, 2)},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contents]:
    root = tmp_path_factory.mktemp("layouts")
    found = {}
    for name, cuts in LAYOUTS.items():
        states = {
            f"{STATE}{kind}.{key}": cut for key, cut in cuts.items() for kind in ("param", "exp_avg", "exp_avg_sq")
        }
        found[name] = read_contents(write(root / name, model(), {**cuts, **states}))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_same_digests(layout: str, saved: dict[str, Contents]) -> None:
    result = compare(saved["whole"], saved[layout])
    assert result.is_equal
    assert (result.num_equal, result.digests_from) == (4 * NUM_PARAMETERS, "files")


def different(tmp_path: Path, tensors: dict[str, torch.Tensor], saved: dict[str, Contents]) -> Comparison:
    cuts = LAYOUTS["EP4"]
    return compare(saved["PP2 x EP2 x ETP2"], read_contents(write(tmp_path / "other", tensors, cuts)))


def test_how_far_an_expert_is(saved: dict[str, Contents], tmp_path: Path) -> None:
    tensors = model()
    state = tensors[f"{STATE}exp_avg.{EXPERT_KEY}"]
    norm = float(state[1, 2].double().norm())
    state[1, 2, 3:5, 1] += 0.5
    (found,) = different(tmp_path, tensors, saved).differences
    assert str(found.key) == "decoder.layers.1.mlp.experts.linear_fc1.weight, expert 2, first moment"
    assert (found.num_differing, found.num_elements) == (2, 96)
    assert found.largest == pytest.approx(0.5, rel=1e-6)
    assert found.relative == pytest.approx(math.sqrt(2 * 0.5**2) / norm, rel=1e-6)


def test_types_that_hold_the_same_numbers_are_equal(saved: dict[str, Contents], tmp_path: Path) -> None:
    tensors = model()
    tensors[NORM] = tensors[NORM].float()
    assert different(tmp_path, tensors, saved).is_equal


def test_signs_of_zeros_and_nan(saved: dict[str, Contents], tmp_path: Path) -> None:
    first, second = model(), model()
    for tensors, zero in ((first, 0.0), (second, -0.0)):
        tensors[NORM][0], tensors[NORM][1] = zero, torch.nan
    (found,) = compare(
        read_contents(write(tmp_path / "first", first)), read_contents(write(tmp_path / "second", second))
    ).differences
    assert found.what == "the same numbers with other bits (signs of zeros, or kinds of nan)"


def test_shapes_and_missing_parameters(saved: dict[str, Contents], tmp_path: Path) -> None:
    tensors = model()
    tensors[NORM] = torch.zeros(12, dtype=torch.bfloat16)
    del tensors[f"{STATE}exp_avg.{NORM}"]
    tensors["decoder.final_layernorm.bias"] = torch.zeros(6)
    result = different(tmp_path, tensors, saved)
    assert [found.what for found in result.differences] == ["shape (6,) and (12,)"]
    assert [str(key) for key in result.only_in_first] == [f"{NORM}, first moment"]
    assert [str(key) for key in result.only_in_second] == ["decoder.final_layernorm.bias, weight"]


def test_fp32_weights_are_main_weights(saved: dict[str, Contents], tmp_path: Path) -> None:
    """A run without distributed optimizer in float32 saves them once."""
    tensors = model(dtype=torch.float32)
    alone = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{STATE}param.")}
    one, other = (read_contents(write(tmp_path / str(n), found)) for n, found in enumerate((tensors, alone)))
    assert compare(one, other).is_equal


def test_manifests_are_enough_where_they_agree(
    saved: dict[str, Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_smartmoe.checkpoint.manifest import Manifest

    tensors = model()
    tensors[NORM] += 1
    other = read_contents(write(tmp_path / "other", tensors))
    manifests = [
        Manifest(iteration=7, format="torch_dist", files=(), digests=digests_of(contents))
        for contents in (saved["EP4"], other)
    ]
    read = []
    monkeypatch.setattr(Contents, "digest", lambda *args: read.append(args))
    result = compare(saved["EP4"], other, (manifests[0], manifests[1]))
    assert read == []
    assert result.digests_from == "manifests"
    assert [str(found.key) for found in result.differences] == [f"{NORM}, weight"]


def test_state_in_buffers_is_compared_by_the_manifests(saved: dict[str, Contents], tmp_path: Path) -> None:
    from megatron_smartmoe.checkpoint.manifest import Manifest, ParameterDigest

    weights = {key: tensor for key, tensor in model().items() if not key.startswith(STATE)}
    buffers = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param": torch.zeros(128)}
    first, second = (read_contents(write(tmp_path / name, {**weights, **buffers})) for name in ("first", "second"))
    assert compare(first, second).buffers == (str(tmp_path / "first"), str(tmp_path / "second"))

    def manifest(moment: int) -> Manifest:
        common = {"name": NORM, "dtype": "float32", "shape": (6,)}
        state = [("exp_avg", moment), ("exp_avg_sq", 3)]
        digests = [ParameterDigest(kind=kind, digests=(value,), **common) for kind, value in state]  # type: ignore[arg-type]
        return Manifest(iteration=7, format="torch_dist", files=(), digests=(*digests_of(first), *digests))

    result = compare(first, second, (manifest(1), manifest(2)))
    assert result.buffers == ()
    assert result.num_equal == NUM_PARAMETERS + 1
    (found,) = result.differences
    assert str(found.key) == f"{NORM}, first moment"
    assert found.what == ("its digest differs; how far it is apart is not known, because it was saved buffer by buffer")
