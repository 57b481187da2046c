"""What verify says of a checkpoint that is whole, and of every kind of damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_smartmoe.checkpoint.contents import Contents
from megatron_smartmoe.checkpoint.digest import KINDS
from megatron_smartmoe.checkpoint.manifest import Manifest, ParameterDigest, file_entries, write_manifest
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.verify import verify
from tests.support.torch_dist_files import EXPERT_KEY, EXPERTS, LAYERS, STATE, model, write

NORM, EMBEDDING = "decoder.final_layernorm.weight", "embedding.word_embeddings.weight"
NUM_PARAMETERS = 2 + LAYERS + LAYERS * EXPERTS


def digests_of(contents: Contents) -> tuple[ParameterDigest, ...]:
    """What the ranks would have written, here from the files."""
    grouped: dict[tuple[str, str], list[int]] = {}
    for key in sorted(contents.parameters, key=lambda key: (key.name, key.kind, key.expert or 0)):
        grouped.setdefault((key.name, key.kind), []).append(contents.digest(key))
    entries = []
    for key in contents.parameters:
        digests = grouped.pop((key.name, key.kind), None)
        if digests is not None:
            shape, dtype = contents.shape(key), contents.dtype(key)
            entry = ParameterDigest(name=key.name, kind=key.kind, dtype=dtype, shape=shape, digests=tuple(digests))
            entries.append(entry)
    return tuple(entries)


def with_manifest(folder: Path, digests: tuple[ParameterDigest, ...] | None = None) -> Path:
    digests = digests_of(read_contents(folder)) if digests is None else digests
    manifest = Manifest(iteration=7, format="torch_dist", files=file_entries(folder), digests=digests)
    write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_whole_one(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = with_manifest(write(tmp_path / "iter_0000007", model(dtype=dtype)))
    result = verify(folder)
    assert result.findings == ()
    assert result.is_whole
    assert (result.num_parameters, result.num_main_weights) == (NUM_PARAMETERS, NUM_PARAMETERS)
    assert result.num_digests == NUM_PARAMETERS * len(KINDS)
    assert result.not_checked == ()


def test_without_a_manifest_that_is_said(tmp_path: Path) -> None:
    result = verify(write(tmp_path / "iter_0000007", model()))
    assert result.is_whole
    assert result.not_checked == ("checksums and digests: there is no manifest",)


def test_numbers_that_were_not_in_memory(tmp_path: Path) -> None:
    """The files are as they were written; what was written was wrong."""
    digests = digests_of(read_contents(write(tmp_path / "right", model())))
    tensors = model()
    tensors[f"{STATE}exp_avg.{EXPERT_KEY}"][1, 3, 2, 1] += 1
    folder = with_manifest(write(tmp_path / "iter_0000007", tensors), digests)
    (finding,) = verify(folder).findings
    assert str(finding) == (
        "decoder.layers.1.mlp.experts.linear_fc1.weight, expert 3, first moment has other numbers than were in the "
        "ranks' memory when it was saved (its digest differs)"
    )


def test_a_parameter_that_was_lost(tmp_path: Path) -> None:
    digests = digests_of(read_contents(write(tmp_path / "right", model())))
    tensors = model()
    del tensors[f"{STATE}exp_avg_sq.{NORM}"]
    (finding,) = verify(with_manifest(write(tmp_path / "iter_0000007", tensors), digests)).findings
    assert str(finding) == f"{NORM}, second moment is not there, and was in the ranks' memory when it was saved"


def test_another_type_than_in_memory(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter_0000007", model())
    digests = digests_of(read_contents(folder))
    digests = tuple(replace(entry, dtype="float16") if entry.name == NORM else entry for entry in digests)
    found = [str(finding) for finding in verify(with_manifest(folder, digests)).findings]
    assert f"{NORM}, weight is bfloat16, and was float16 in the ranks' memory when it was saved" in found


def test_state_from_wrong_places_that_ends_in_zeros(tmp_path: Path) -> None:
    """As megatron-core up to 0.19.2 saves it from several gradient buckets."""
    tensors = model()
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        tensors[f"{STATE}{kind}.{NORM}"][:] = torch.tensor([9.0, 8, 7, 0, 0, 0])
    folder = with_manifest(write(tmp_path / "iter_0000007", tensors))
    (finding,) = verify(folder).findings
    assert str(finding) == (
        f"{NORM}, main weight does not round to the weights: 6 of 6 elements differ, and ends in zeros (main weights "
        "3, first moments 3, second moments 3)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_single_wrong_main_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = model(dtype=dtype)
    tensors[f"{STATE}param.{EXPERT_KEY}"][0, 2, 15, 5] *= 1.1
    (finding,) = verify(write(tmp_path / "iter_0000007", tensors)).findings
    assert str(finding) == (
        "decoder.layers.0.mlp.experts.linear_fc1.weight, expert 2, main weight does not round to the weights: 1 of 96 "
        "elements differ"
    )


def test_moments_that_end_in_zeros_within_a_row_are_a_warning(tmp_path: Path) -> None:
    tensors = model()
    for kind in ("exp_avg", "exp_avg_sq"):
        tensors[f"{STATE}{kind}.{NORM}"][4:] = 0
        tensors[f"{STATE}{kind}.{EMBEDDING}"][15:] = 0  # tokens that no text had: as it should be
    result = verify(write(tmp_path / "iter_0000007", tensors))
    (finding,) = result.findings
    assert str(finding) == f"{NORM}, second moment ends in 2 zeros of 6 elements, as does the first moment"
    assert finding.severity == "warning"
    assert result.is_whole


def test_not_a_number_is_a_warning_and_a_negative_square_is_damage(tmp_path: Path) -> None:
    tensors = model()
    tensors[f"{STATE}exp_avg.{NORM}"][1] = torch.nan
    tensors[f"{STATE}exp_avg_sq.{EMBEDDING}"][3, 1] = -1
    assert [str(finding) for finding in verify(write(tmp_path / "iter_0000007", tensors)).findings] == [
        f"{EMBEDDING}, second moment has 1 negative elements, and is a mean of squares",
        f"{NORM}, first moment has 1 elements of 6 that are infinite or not a number",
    ]


def test_nan_weights_round_to_nan(tmp_path: Path) -> None:
    tensors = model()
    for key in (NORM, f"{STATE}param.{NORM}"):
        tensors[key][0] = torch.nan
    assert verify(write(tmp_path / "iter_0000007", tensors)).is_whole


def test_a_missing_chunk(tmp_path: Path) -> None:
    whole = model()
    cut = {EMBEDDING: (2, 1)}
    folder = write(tmp_path / "iter_0000007", whole, cut)
    contents = read_contents(folder)
    assert not any(contents.missing_elements(key) for key in contents.parameters)
    (folder / "__0_0.distcp").write_bytes(b"")
    findings = verify(folder).findings
    assert [finding.subject for finding in findings] == ["__0_0.distcp"]
    assert "has 0 of at least" in findings[0].what


def test_flipped_bits_are_found_and_the_file_is_named(tmp_path: Path) -> None:
    folder = with_manifest(write(tmp_path / "iter_0000007", model()))
    path = folder / "__1_0.distcp"
    whole = path.read_bytes()
    for place in range(20):
        data = bytearray(whole)
        data[len(data) * place // 20] ^= 1 << (place % 8)
        path.write_bytes(data)
        result = verify(folder, files_only=True)
        assert [str(finding) for finding in result.findings] == [
            "__1_0.distcp has other bytes than were saved (its checksum differs)"
        ]


@pytest.mark.parametrize(
    ("flag", "says"),
    [("qk_clip", "--qk-clip"), ("use_precision_aware_optimizer", "--use-precision-aware-optimizer")],
)
def test_options_under_which_main_weights_differ(flag: str, says: str, tmp_path: Path) -> None:
    import argparse

    tensors = model()
    tensors[f"{STATE}param.{NORM}"] *= 2
    args = argparse.Namespace(bf16=True, **{flag: True})
    result = verify(with_manifest(write(tmp_path / "iter_0000007", tensors, args=args)))
    assert result.is_whole
    assert result.not_checked == (f"main weights: with {says} they do not round to the weights",)


def test_state_in_buffers(tmp_path: Path) -> None:
    weights = {key: tensor for key, tensor in model().items() if not key.startswith(STATE)}
    buffers = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param": torch.zeros(128)}
    result = verify(with_manifest(write(tmp_path / "iter_0000007", {**weights, **buffers})))
    assert result.is_whole
    assert result.not_checked == (
        "optimizer state by parameter: it was saved buffer by buffer (1 buffers), in an order that only the run knows; "
        "--dist-ckpt-optim-fully-reshardable saves it by parameter",
    )
