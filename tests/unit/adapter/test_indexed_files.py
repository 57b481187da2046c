"""A dataset that is cut off or damaged is found from sizes and headers, with and without metadata beside it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.adapter.corpus import PreparedCorpus, indexed_files, prepare
from megatron_smartmoe.adapter.corpus.indexed_files import DamagedDatasetError, check_files, largest_token
from megatron_smartmoe.adapter.flags.data_checks import check_data, data_prefixes
from megatron_smartmoe.errors import ConfigError
from tests.support.corpus import read_back, spec_for, texts, write_indexed_files, write_jsonl
from tests.unit.adapter.test_tokenizers import flags

DATA_FLAGS: dict[str, Any] = {
    "data_path": None,
    "train_data_path": None,
    "valid_data_path": None,
    "test_data_path": None,
    "data_args_path": None,
    "per_split_data_args_path": None,
    "mock_data": False,
    "rank": 0,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 10_000,
}


def args(**values: Any) -> Namespace:
    return flags(**{**DATA_FLAGS, **values})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(spec_for(folder / "x", write_jsonl(folder / "in.jsonl", texts(40))))


def copied(corpus: PreparedCorpus, folder: Path, *suffixes: str) -> str:
    for suffix in suffixes:
        (folder / f"x{suffix}").write_bytes(Path(f"{corpus.prefix}{suffix}").read_bytes())
    return str(folder / "x")


def test_a_whole_dataset(prepared: PreparedCorpus, tmp_path: Path) -> None:
    index = check_files(str(prepared.prefix))
    assert (index.num_sequences, index.bin_bytes) == (40, prepared.num_tokens * 2)
    assert (prepared.bin_bytes, prepared.idx_bytes) == (index.bin_bytes, Path(f"{prepared.prefix}.idx").stat().st_size)
    alone = copied(prepared, tmp_path, ".bin", ".idx")
    assert check_files(alone) == index
    assert largest_token(alone, index) == largest_token(str(prepared.prefix), index) == prepared.max_token_id
    assert prepared.max_token_id == max(int(tokens.max()) for tokens in read_back(prepared.prefix))


def test_the_tests_own_writer_writes_what_megatron_reads(tmp_path: Path) -> None:
    write_indexed_files(tmp_path / "x", [[1, 2, 3], [4]])
    assert [tokens.tolist() for tokens in read_back(tmp_path / "x")] == [[1, 2, 3], [4]]
    assert check_files(str(tmp_path / "x")).bin_bytes == 8


def edit(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + value + data[offset + len(value) :]


@pytest.mark.parametrize(
    ("suffix", "damage", "with_metadata", "without"),
    [
        (".bin", lambda data: data[:-2], "bytes, and .*x.json says", "bytes, and .*x.idx says"),
        (".bin", lambda data: data + b"\0", "bytes, and .*x.json says", "bytes, and .*x.idx says"),
        (".bin", lambda data: b"", "has 0 bytes, and .*x.json says", "has 0 bytes, and .*x.idx says"),
        (".idx", lambda data: data[:-8], "bytes, and .*x.json says", "bytes, and needs .* for 40 sequences"),
        (".idx", lambda data: data[:20], "has 20 bytes, and", "is not the index of a Megatron dataset, or is cut off"),
        (".idx", edit(0, b"X"), "is not the index", "is not the index of a Megatron dataset, or is cut off"),
        (".idx", edit(9, b"\x02"), "has version 2", "has version 2 and type 8, which Megatron does not have"),
        (".idx", edit(17, b"\x63"), "and type 99", "has version 1 and type 99"),
        (".idx", edit(18, b"\xff" * 8), "and needs", "bytes, and needs .* for 18,446,744,073,709,551,615 sequences"),
        (
            ".idx",
            edit(34 + 4 * 39, b"\xff" * 4),
            "places its last",
            "places its last sequence at byte .*, with -1 tokens",
        ),
    ],
)
def test_damage_is_found(
    prepared: PreparedCorpus,
    tmp_path: Path,
    suffix: str,
    damage: Callable[[bytes], bytes],
    with_metadata: str,
    without: str,
) -> None:
    prefix = copied(prepared, tmp_path, ".bin", ".idx", ".json")
    path = Path(prefix + suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedDatasetError, match=with_metadata):
        check_files(prefix)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(DamagedDatasetError, match=without) as caught:
        check_files(prefix)
    assert caught.value.path == path
    with pytest.raises(ConfigError) as said:
        check_data(args(data_path=[prefix]))
    assert str(said.value).startswith(f"--data-path = '{prefix}': {path} ")
    assert str(said.value).endswith("Copy it again, or make the dataset with scripts/prepare_data.py --force.")


def test_metadata_of_earlier_commits_lack_the_sizes(prepared: PreparedCorpus, tmp_path: Path) -> None:
    prefix = copied(prepared, tmp_path, ".bin", ".idx", ".json")
    meta = json.loads(Path(f"{prefix}.json").read_text())
    for name in ("bin_bytes", "idx_bytes", "max_token_id", "bos_id", "pad_id", "tokenizer_flags", "num_inner_eod"):
        del meta[name]
    Path(f"{prefix}.json").write_text(json.dumps(meta))
    index = check_files(prefix)
    assert largest_token(prefix, index) == prepared.max_token_id, "looked up in the tokens"
    assert PreparedCorpus.load(prefix).bin_bytes is None


def test_damaged_metadata_are_named(prepared: PreparedCorpus, tmp_path: Path) -> None:
    prefix = copied(prepared, tmp_path, ".bin", ".idx", ".json")
    meta = json.loads(Path(f"{prefix}.json").read_text())
    del meta["vocab_size"]
    Path(f"{prefix}.json").write_text(json.dumps({**meta, "bin_bytes": "many", "bad_lines": 3}))
    with pytest.raises(ConfigError) as caught:
        check_data(args(data_path=[prefix]))
    assert str(caught.value) == (
        f"{prefix}.json: vocab_size = None: is missing. Restore the file, or prepare the corpus with --force."
    )


def test_of_a_large_dataset_a_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [list(range(10)) for _ in range(1000)]
    documents[999][9] = 500  # the last token is in the sample
    write_indexed_files(tmp_path / "x", documents)
    monkeypatch.setattr(indexed_files, "SAMPLE_BYTES", 64 * 20)
    assert largest_token(str(tmp_path / "x"), check_files(str(tmp_path / "x"))) == 500
    write_indexed_files(tmp_path / "none", [])
    assert largest_token(str(tmp_path / "none"), check_files(str(tmp_path / "none"))) is None


def test_ids_against_the_tokenizer(prepared: PreparedCorpus, tmp_path: Path) -> None:
    prefix = str(prepared.prefix)
    check_data(args(data_path=[prefix]))
    with pytest.raises(ConfigError) as caught:
        check_data(args(data_path=[prefix], vocab_size=100))
    assert str(caught.value) == (
        f"--data-path = '{prefix}': has token ids up to {prepared.max_token_id}, and the tokenizer (NullTokenizer) has "
        f"100 entries. Pass the tokenizer that made it: --tokenizer-type SentencePieceTokenizer --tokenizer-model "
        f"{prepared.tokenizer_model}."
    )
    alone = copied(prepared, tmp_path, ".bin", ".idx")
    with pytest.raises(ConfigError, match=rf"Pass --vocab-size {prepared.max_token_id + 1} or more"):  # type: ignore[operator]
        check_data(args(data_path=["0.5", alone, "0.5", alone], vocab_size=100))


def test_another_end_of_document(prepared: PreparedCorpus, tmp_path: Path) -> None:
    from tests.support.tokenizers import CONFIG, write_huggingface

    other = write_huggingface(tmp_path / "m", {**CONFIG, "eos_token": "<|im_start|>"})
    with pytest.raises(
        ConfigError, match=r"was prepared with end of document 2, and this tokenizer's is <\|im_start\|> 1"
    ):
        check_data(
            args(data_path=[str(prepared.prefix)], tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(other))
        )


def test_lists_of_datasets_are_checked_too(prepared: PreparedCorpus, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"0.5 {prepared.prefix}\n0.5 absent\n")
    splits = {"train": ["0.5", str(prepared.prefix)], "valid": None, "test": ["absent"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    listed = args(data_args_path=str(tmp_path / "list"))
    assert [prefix for _, prefix in data_prefixes(listed)] == [str(prepared.prefix), "absent"]
    for given in (listed, args(per_split_data_args_path=str(tmp_path / "splits.json"))):
        with pytest.raises(ConfigError, match=r"args-path = 'absent': there is no file absent.bin"):
            check_data(given)
    for text in ("[", "[1]", '{"train": 3}'):
        (tmp_path / "splits.json").write_text(text)
        with pytest.raises(ConfigError, match=r"--per-split-data-args-path = .*: must be JSON, such as"):
            check_data(args(per_split_data_args_path=str(tmp_path / "splits.json")))
    with pytest.raises(ConfigError, match="--data-args-path = 'absent': cannot be read"):
        check_data(args(data_args_path="absent"))


def test_every_dtype_of_megatron_is_known() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert {one.value: np.dtype(DType.dtype_from_code(one.value)) for one in DType} == {
        code: np.dtype(dtype) for code, dtype in indexed_files._TYPES.items()
    }
