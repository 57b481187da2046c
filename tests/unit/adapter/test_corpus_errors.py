"""Wrong requests and bad inputs: said clearly, and nothing is left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.corpus import bad_lines, prepare, sources, tokenizer
from megatron_smartmoe.errors import ConfigError
from tests.support.corpus import decode, files, spec_for, texts, write_jsonl

BAD_LINES = [
    (b'{"text": "a"', "invalid JSON: "),
    (b'{"other": "a"}', "key 'text' is missing"),
    (b'{"text": 3}', "key 'text' holds a int, a string is needed"),
    (b'{"text": null}', "key 'text' holds a NoneType, a string is needed"),
    (b'{"text": "\xff"}', "invalid UTF-8: invalid start byte (byte 0xff)"),
    (b"[1, 2]", "a JSON object is needed, this is a list"),
    (rb'{"text": "\ud800"}', "holds half of a surrogate pair"),
    (b"[" * 100_000, "invalid JSON: "),
]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good documents with a bad line behind each of the first few."""
    lines = [item for text, (bad, _) in zip(texts(8), BAD_LINES, strict=True) for item in (text, bad)]
    return write_jsonl(tmp_path / "mixed.jsonl", lines + texts(40, first=8))


@pytest.mark.parametrize("group_bytes", [50, 10**6])
def test_bad_lines_are_listed_and_nothing_is_written(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(sources, "GROUP_BYTES", group_bytes)
    with pytest.raises(ConfigError) as caught:
        prepare(spec_for(tmp_path / "out" / "x", mixed))
    message = str(caught.value)
    assert message.startswith(f"--input = '{mixed}': {len(BAD_LINES)} lines cannot be used: 2 x invalid JSON: ")
    assert f"(first {mixed}:2); 1 x key 'text' is missing ({mixed}:4; keys there: 'other'); " in message
    assert message.endswith(
        "Give --json-keys other, or the keys that hold the text. --on-bad-line skip leaves bad lines out."
    )
    assert "\n" not in message
    assert files(tmp_path / "out") == set()


def test_bad_lines_are_skipped_and_counted(mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = prepare(spec_for(tmp_path / "x", mixed, on_bad_line="skip", vocab_size=300))
    assert decode(corpus) == texts(48)
    assert (corpus.num_bad_lines, corpus.num_documents) == (len(BAD_LINES), 48)
    assert corpus.bad_lines[1] == f"{mixed}:4: key 'text' is missing"
    assert f"left out {len(BAD_LINES)} bad lines: 2 x invalid JSON" in caplog.text


def test_what_is_wrong_is_said_once_with_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [b'{"text": }'] * 1000)
    with pytest.raises(ConfigError, match="1,000 lines cannot be used: 1,000 x invalid JSON") as caught:
        prepare(spec_for(tmp_path / "x", path))
    assert str(caught.value).count("invalid JSON") == 1
    monkeypatch.setattr(bad_lines, "MAX_COUNTED", 1000)
    with pytest.raises(ConfigError, match="1,000 or more lines cannot be used"):
        prepare(spec_for(tmp_path / "x", path))


def test_a_wrong_key_lists_the_keys_that_are_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts(40), key="content")
    with pytest.raises(ConfigError) as caught:
        prepare(spec_for(tmp_path / "x", path))
    assert str(caught.value) == (
        f"--input = '{path}': 40 lines cannot be used: 40 x key 'text' is missing (first {path}:1; keys there: "
        "'content'). Give --json-keys content, or the keys that hold the text. --on-bad-line skip leaves bad lines out."
    )


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(ConfigError, match=rf"1 x invalid UTF-8: .*byte 0xe9\) \({tmp_path}/bad.txt:3\)"):
        prepare(spec_for(tmp_path / "x", tmp_path / "bad.txt", tmp_path / "bad.txt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ()}, "there is no text to prepare. Give --input FILE... or --python-stdlib"),
        ({"inputs": ("missing.txt",)}, "--input = 'missing.txt': no such file or directory"),
        ({"inputs": ("*.missing",)}, "no glob that matches"),
        ({"inputs": ("empty.jsonl",)}, "holds no text (0 empty documents, 0 bad lines)"),
        ({"inputs": ("blank.txt",)}, "holds no text (1 empty documents, 0 bad lines)"),
        ({"inputs": ("folder",)}, "the directory holds no files"),
        ({"tokenizer_model": "x.model"}, "--tokenizer-model, --vocab-size = 'both': exactly one"),
        ({"vocab_size": None}, "--tokenizer-model, --vocab-size = 'neither': exactly one"),
        ({"vocab_size": None, "tokenizer_model": "x.model"}, "--tokenizer-model = 'x.model': no such file"),
        ({"vocab_size": None, "tokenizer_model": "blank.txt"}, "is not a sentencepiece model"),
        ({"vocab_size": 10**6}, "this corpus fills at most"),
        ({"vocab_size": 0}, "--vocab-size = 0: has to be at least 1"),
        ({"workers": 0}, "--workers = 0: has to be at least 1"),
        ({"max_bytes": 3}, "--max-bytes = 3: the first document is larger than this"),
        ({"output_prefix": "folder"}, "--output-prefix = 'folder': is a directory"),
        ({"output_prefix": "blank.txt/x"}, "cannot write here"),
        ({"output_prefix": "/proc/x"}, "cannot write here"),
    ],
)
def test_wrong_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", texts(10))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    before = files(tmp_path)
    for name in ("tokenizer_model", "output_prefix"):
        if name in changes:
            changes = changes | {name: type(tmp_path)(changes[name])}
    options: dict[str, Any] = {"prefix": tmp_path / "x"} | changes
    prefix, inputs = options.pop("output_prefix", options.pop("prefix")), options.pop("inputs", ("in.jsonl",))
    options.pop("prefix", None)
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(spec_for(prefix, *inputs, **options))
    assert files(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"cannot write here \(Permission denied\)"):
        prepare(spec_for(tmp_path / "locked" / "x", write_jsonl(tmp_path / "in.jsonl", texts(10))))


def test_an_output_never_falls_on_an_input(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "corpus.json", texts(10))
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="an input would be overwritten"):
        prepare(spec_for(tmp_path / "corpus", path, force=True))
    assert path.read_bytes() == content


def test_a_file_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", texts(60))
    (tmp_path / "out.json").write_text('{"precious": 1}')
    with pytest.raises(ConfigError, match="is not the metadata of a prepared corpus"):
        prepare(spec_for(tmp_path / "out", path, force=True))
    assert (tmp_path / "out.json").read_text() == '{"precious": 1}'


def test_an_input_that_changes_between_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", texts(60))
    train = tokenizer.train

    def train_and_spoil(*arguments: Any) -> bytes:
        write_jsonl(path, [*texts(30), b"{", *texts(29, first=30)])
        return train(*arguments)

    monkeypatch.setattr(tokenizer, "train", train_and_spoil)
    with pytest.raises(ConfigError, match="an input is being written to"):
        prepare(spec_for(tmp_path / "out" / "x", path))
    assert files(tmp_path / "out") == set()
