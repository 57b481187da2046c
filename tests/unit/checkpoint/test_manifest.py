"""The manifest: what is written is read, damage of files and of the manifest itself is named."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.checkpoint import manifest as module
from megatron_smartmoe.checkpoint.checksum import checksum_of_bytes, checksum_of_file
from megatron_smartmoe.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    ParameterDigest,
    check_files,
    file_entries,
    read_manifest,
    write_manifest,
)
from megatron_smartmoe.errors import CheckpointError

DIGEST = ParameterDigest(
    name="decoder.layers.0.mlp.experts.linear_fc1.weight",
    kind="exp_avg",
    dtype="float32",
    shape=(192, 64),
    digests=(0, 1, 2**64 - 1),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(256)) * 20_000)  # several blocks
    (tmp_path / "mp_rank_00").mkdir()
    (tmp_path / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"weights")
    (tmp_path / "empty").touch()
    return tmp_path


def manifest_of(folder: Path) -> Manifest:
    return Manifest(
        iteration=7,
        format="torch_dist",
        files=file_entries(folder),
        digests=(DIGEST,),
        consumed_samples=56,
        arguments={"lr": 1e-3, "name": "\u00fc", "none": None, "infinite": math.inf},
        placement={"version": 1},
        software={"torch": "2.11.0"},
    )


def test_what_is_written_is_read(folder: Path) -> None:
    written = manifest_of(folder)
    assert write_manifest(folder, written) == folder / MANIFEST_FILE
    assert read_manifest(folder) == written
    assert [file.name for file in written.files] == ["__0_0.distcp", "empty", "mp_rank_00/model_optim_rng.pt"]
    assert check_files(folder, written) == ()
    assert file_entries(folder) == written.files  # the manifest is none of them


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def flip(folder: Path, at: int) -> None:
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_found_by_the_checksum_alone(folder: Path) -> None:
    written = manifest_of(folder)
    for at in (0, 1, 2**20 - 1, 2**20, 3_000_000, 256 * 20_000 - 1):
        flip(folder, at)
        (damage,) = check_files(folder, written)
        assert (damage.name, damage.kind) == ("__0_0.distcp", "checksum")
        assert str(damage) == "__0_0.distcp has other bytes than were saved (its checksum differs)"
        assert check_files(folder, written, "sizes") == ()
        flip(folder, at)
    assert check_files(folder, written) == ()


def test_sizes_and_missing_files(folder: Path) -> None:
    written = manifest_of(folder)
    os.truncate(folder / "__0_0.distcp", 1_000_000)
    (folder / "mp_rank_00" / "model_optim_rng.pt").unlink()
    for level in ("sizes", "full"):
        assert [str(damage) for damage in check_files(folder, written, level)] == [
            "__0_0.distcp has 1,000,000 of 5,120,000 bytes",
            "mp_rank_00/model_optim_rng.pt is missing",
        ]
    assert check_files(folder, written, "off") == ()
    assert check_files(folder, written, names={"empty"}) == ()
    assert len(check_files(folder, written, names={"__0_0.distcp"})) == 1


def test_a_directory_in_the_place_of_a_file(folder: Path) -> None:
    written = manifest_of(folder)
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    assert [damage.name for damage in check_files(folder, written)] == ["empty"]


def test_every_flipped_byte_of_the_manifest_is_noticed(folder: Path) -> None:
    path = write_manifest(folder, manifest_of(folder))
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        found = None
        with contextlib.suppress(CheckpointError):
            found = read_manifest(folder)
        assert found is None or found == manifest_of(folder)  # white space may change


def rewritten(folder: Path, **changes: Any) -> None:
    """A manifest with other content, and the right checksum of it."""
    path = write_manifest(folder, manifest_of(folder))
    body = {**json.loads(path.read_text()), **changes}
    body.pop("checksum")
    body["checksum"] = checksum_of_bytes(module._canonical(body))
    path.write_text(json.dumps(body))


CHECKSUM = "0" * 32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "cannot be used: its format has version 2, and this program reads version 1"),
        ({"files": [["../x", 1, CHECKSUM]]}, r"is damaged: ValueError: it names the file '\.\./x', outside its folder"),
        ({"files": [["/etc/passwd", 1, CHECKSUM]]}, "outside its folder"),
        ({"files": [["x", -1, CHECKSUM]]}, "is damaged: ValueError: -1 is no number of anything"),
        ({"files": [["x", True, CHECKSUM]]}, "is damaged"),
        ({"files": [["x", 1, "abc"]]}, "is damaged"),
        ({"files": [["x", 1]]}, "is damaged: TypeError"),
        ({"files": 5}, "is damaged: TypeError"),
        ({"iteration": "7"}, "is damaged"),
        ({"format": "zip"}, "is damaged: ValueError: format 'zip'"),
        ({"checksums": "md5"}, "is damaged: ValueError: checksums of kind 'md5'"),
        ({"arguments": []}, "is damaged: ValueError: arguments is a list"),
        ({"digests": [["a", "weight", "float32", [1], "xyz"]]}, "is damaged: ValueError: digests of 'a'"),
        ({"digests": [["a", "other", "float32", [1], "0" * 16]]}, "is damaged"),
    ],
)
def test_content_that_nobody_wrote(changes: dict[str, Any], says: str, folder: Path) -> None:
    rewritten(folder, **changes)
    with pytest.raises(CheckpointError, match=says):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b'{"a":' * 50_000, b"null"])
def test_a_file_that_is_no_manifest(content: bytes, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"smartmoe_manifest\.json is damaged"):
        read_manifest(folder)


def test_a_write_that_fails_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = manifest_of(folder)
    write_manifest(folder, old)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder, Manifest(iteration=8, format="torch", files=()))
    assert read_manifest(folder) == old
    assert file_entries(folder) == old.files  # no temporary file is left


def test_checksum_of_a_file_is_that_of_its_bytes(folder: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    assert checksum_of_file(folder / "__0_0.distcp") == (len(data), checksum_of_bytes(data))
    assert checksum_of_bytes(b"") == "99aa06d3014798d86001c324468d497f"  # published for XXH3-128 of nothing
    entry = next(file for file in file_entries(folder) if file.name == "empty")
    assert entry == FileEntry(name="empty", size_bytes=0, checksum=checksum_of_bytes(b""))
