"""Data as people have it: compressed, arrays, tables, other encodings, nested keys, chats, links."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_smartmoe.adapter.corpus import prepare, sources, unpack
from megatron_smartmoe.adapter.corpus.documents import scan_group
from megatron_smartmoe.adapter.corpus.records import RecordReader
from megatron_smartmoe.errors import ConfigError
from tests.support.corpus import decode, files, spec_for, texts, write_jsonl
from tests.support.tokenizers import write_huggingface

DOCUMENTS = texts(40)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
RECORDS = [{"text": text} for text in DOCUMENTS]
# Name and content of a file that holds DOCUMENTS.
FILES: dict[str, bytes] = {
    "a.jsonl": LINES.encode(),
    "a.ndjson": LINES.encode(),
    "a.JSONL": LINES.encode(),
    "lines.json": LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "cr.jsonl": LINES.replace("\n", "\r").encode(),
    "array.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "array_of_lines.jsonl": ("[\n" + ",\n".join(LINES.splitlines()) + "\n]\n").encode(),
    "one_after_another.json": "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "two_members.jsonl.gz": gzip.compress(LINES[:5000].encode()) + gzip.compress(LINES[5000:].encode()),
    "A.JSONL.GZ": gzip.compress(LINES.encode()),
    "not_named.jsonl": gzip.compress(LINES.encode()),
    "a.jsonl.zst": zstandard.compress(LINES.encode()),
    "two_frames.jsonl.zst": zstandard.compress(LINES[:5000].encode()) + zstandard.compress(LINES[5000:].encode()),
    "a.ndjson.xz": lzma.compress(LINES.encode()),
    "a.json.bz2": bz2.compress(json.dumps(RECORDS).encode()),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16be.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "utf16_array.json.gz": gzip.compress(json.dumps(RECORDS).encode("utf-16")),
    "marked.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("piece_bytes", [700, 2**20])
def test_every_kind_of_file_gives_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece_bytes: int
) -> None:
    monkeypatch.setattr("megatron_smartmoe.adapter.corpus.formats.PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(sources, "GROUP_BYTES", piece_bytes)
    (tmp_path / name).write_bytes(FILES[name])
    corpus = prepare(spec_for(tmp_path / "out" / "x", tmp_path / name))
    assert decode(corpus) == DOCUMENTS
    assert files(tmp_path / "out") == {"x.bin", "x.idx", "x.json", "x.tokenizer.model"}


@pytest.mark.parametrize(
    ("name", "pack"),
    [("t.txt.gz", gzip.compress), ("t.md.xz", lzma.compress), ("t.zst", zstandard.compress), ("utf16.txt", bytes)],
)
def test_a_text_file_is_one_document_however_it_is_kept(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    text = "".join(DOCUMENTS)
    (tmp_path / name).write_bytes(pack(text.encode("utf-16" if name.startswith("utf16") else "utf-8")))
    assert decode(prepare(spec_for(tmp_path / "x", tmp_path / name))) == [text]


def test_a_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(40)), "data": [{"text": text, "n": 1} for text in DOCUMENTS]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert decode(prepare(spec_for(tmp_path / "x", tmp_path / "a.parquet", json_keys=("data.text",)))) == DOCUMENTS
    with pytest.raises(ConfigError) as caught:
        prepare(spec_for(tmp_path / "y", tmp_path / "a.parquet"))
    assert str(caught.value) == (
        f"--input = '{tmp_path}/a.parquet': 40 rows have no key 'text' (keys there: 'id' (int64), "
        "'data.text', 'data.n' (int64)). Give --json-keys data.text, or the keys that hold the text."
    )


def test_a_table_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow, which is not installed. Install it: pip install pyarrow"):
        prepare(spec_for(tmp_path / "x", tmp_path / "a.parquet"))


WRONG: dict[str, tuple[bytes, str]] = {
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-20], "is gzip data that is damaged or cut off"),
    "cut.jsonl.zst": (zstandard.compress(LINES.encode())[:-20], "is zstd data that is damaged or cut off"),
    "cut.jsonl.xz": (lzma.compress(LINES.encode())[:-20], "is xz data that is damaged or cut off"),
    "cut.jsonl.bz2": (bz2.compress(LINES.encode())[:-20], "is bzip2 data that is damaged or cut off"),
    "bad.jsonl.gz": (gzip.compress(LINES.encode())[:40] + b"\xff" * 200, "is gzip data that is damaged"),
    "plain.jsonl.gz": (LINES.encode(), "is named as gzip and is not compressed so. Rename it"),
    "a.zip": (b"PK\x03\x04" + b"\0" * 50, "is a zip archive, which is not read. Unpack it"),
    "a.parquet": (LINES.encode(), "is named as parquet and is none"),
    "table.parquet": (b"PAR1" + b"\xff" * 100, "is a damaged parquet file"),
    "utf16le.jsonl": (LINES.encode("utf-16-le"), "looks like UTF-16LE without a byte order mark. Convert it: iconv -f"),
    "utf16be.txt": (LINES.encode("utf-16-be"), "looks like UTF-16BE without a byte order mark"),
    "cut_utf16.jsonl": (LINES.encode("utf-16")[:-1], "is not UTF-16 throughout (truncated data)"),
    "broken.json": (json.dumps(RECORDS)[:-900].encode(), "is invalid JSON: Unterminated string"),
    "open.json": (json.dumps(RECORDS)[:-1].encode(), "record 41 is invalid JSON"),
    "comma.jsonl": (
        LINES.replace("\n", ",\n").encode(),
        "40 x a comma follows the JSON object, which JSON lines have not",
    ),
    "strings.json": (json.dumps(DOCUMENTS).encode(), "40 x a JSON object is needed, this is a str (first "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    if name == "table.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        prepare(spec_for(tmp_path / "out" / "x", tmp_path / name))
    assert str(caught.value).startswith(f"--input = '{tmp_path / name}': ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "out") == set()


def test_damaged_files_of_every_kind(tmp_path: Path) -> None:
    """Bytes changed, cut and put in at random: documents or one line, and nothing else."""
    draw = random.Random(1)
    spoiled: list[bytes] = [b"[", b"{", b"]", b'"', b",", b"\0", b"\xff\xfe", b"NaN", b"9" * 5000, b"[" * 3000, b"\r"]
    contents = [*FILES.items(), *((name, content) for name, (content, _) in WRONG.items())]
    said: list[str] = []
    for number in range(300):
        name, content = draw.choice(contents)
        data = bytearray(content[: draw.choice([300, 3000, 10**6])])
        for _ in range(draw.choice([1, 3, 20])):
            place = draw.randrange(len(data) + 1)
            data[place : place + draw.randrange(30)] = draw.choice([*spoiled, bytes([draw.randrange(256)])])
        path = tmp_path / f"{number}{name}"
        path.write_bytes(data)
        try:
            spans = sources.find_spans(sources.find_inputs([str(path)]), tmp_path / "unpacked", ("text",))
            for group in sources.group_spans(spans):
                scan_group(group, RecordReader(json_keys=("text",)))
        except ConfigError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not any("\n" in text for text in said)


def test_a_record_without_end_is_not_read_to_the_end_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "MAX_RECORD_CHARACTERS", 1000)
    (tmp_path / "a.json").write_text('[{"text": "' + "a" * 100_000)
    with pytest.raises(ConfigError, match="record 1 is invalid JSON: no end within 1,000 characters"):
        prepare(spec_for(tmp_path / "x", tmp_path / "a.json"))


def test_records_of_an_array_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([*RECORDS[:3], {"other": 1}]))
    with pytest.raises(
        ConfigError, match=r"1 x key 'text' is missing \(.*a\.json, record 4; keys there: 'other' \(number"
    ):
        prepare(spec_for(tmp_path / "x", tmp_path / "a.json"))


def test_json_lines_of_another_name_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "part-00000").write_text(LINES)
    assert prepare(spec_for(tmp_path / "x", tmp_path / "part-00000")).num_documents == 1
    assert f"begin like JSON lines: {tmp_path}/part-00000. Name them .jsonl to have" in caplog.text


def test_nested_keys(tmp_path: Path) -> None:
    records = [{"data": {"text": text}, "a.b": "x", "turns": [{"content": "y"}]} for text in DOCUMENTS]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    keys = ("data.text", "a.b", "turns.0.content")
    assert decode(prepare(spec_for(tmp_path / "x", path, json_keys=keys))) == [f"{text}\nx\ny" for text in DOCUMENTS]
    with pytest.raises(
        ConfigError, match=r"keys there: 'data.text', 'a.b', 'turns' \(list\)\). Give --json-keys data.text"
    ):
        prepare(spec_for(tmp_path / "y", path))


CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
RENDERED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
SHARED_GPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]


@pytest.mark.parametrize(("key", "chat"), [("messages", CHAT), ("conversations", SHARED_GPT)])
def test_chat_messages_go_through_the_tokenizers_template(tmp_path: Path, key: str, chat: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({key: chat}) + "\n") * 40)
    model = write_huggingface(tmp_path / "model", puts_before="<|endoftext|>")
    options: dict[str, Any] = {"vocab_size": None, "tokenizer_model": model, "json_keys": (key,)}
    corpus = prepare(spec_for(tmp_path / "x", path, **options))
    from tests.support.corpus import read_back

    tokens = read_back(corpus.prefix)[0].tolist()
    assert tokens[0] == 1, "<|im_start|>: nothing is put before what a template wrote"
    assert corpus.text_bytes == 40 * len(RENDERED)
    assert corpus.num_inner_eod == 80, "the template closes each turn with the token that ends documents"


def test_chat_messages_need_a_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 40)
    with pytest.raises(ConfigError, match=r"keys there: 'messages' \(chat messages\)\). Give --json-keys messages"):
        prepare(spec_for(tmp_path / "x", path))
    with pytest.raises(ConfigError, match=r"40 x key 'messages' holds chat messages, and the tokenizer has no chat"):
        prepare(spec_for(tmp_path / "x", path, json_keys=("messages",)))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    template = {"json_keys": ("messages",), "chat_template": str(tmp_path / "t.jinja"), "vocab_size": 290}
    assert decode(prepare(spec_for(tmp_path / "x", path, **template)))[0] == "user: Why?\nassistant: Because.\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "is not a Jinja template"),
        ("absent.jinja", "is no file, and no Jinja template"),
        ("{{ raise_exception('roles must alternate') }}", "40 x the chat template refuses the messages: roles must"),
        ("{{ messages[9].content }}", "the chat template refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses the messages: access to attribute '__class__'"),
    ],
)
def test_wrong_templates(tmp_path: Path, template: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 40)
    with pytest.raises(ConfigError) as caught:
        prepare(spec_for(tmp_path / "x", path, json_keys=("messages",), chat_template=template))
    assert message in str(caught.value)


def test_a_template_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no effect: no record holds chat messages under text. Give their key"):
        prepare(spec_for(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), chat_template="{{ messages }}"))


def test_a_file_is_read_once_by_whatever_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    path = write_jsonl(folder / "a.jsonl", DOCUMENTS)
    os.symlink(path, folder / "b.jsonl")
    os.symlink(folder, folder / "deep" / "loop")
    os.symlink(tmp_path / "absent", folder / "dangling.jsonl")
    corpus = prepare(spec_for(tmp_path / "x", folder, path))
    assert decode(corpus) == DOCUMENTS
    assert "2 files are met again, by a link or another name, and read once" in caplog.text


def test_folders_behind_links_are_read(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write_jsonl(tmp_path / "disk" / "a.jsonl", DOCUMENTS)
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "in" / "data")
    assert decode(prepare(spec_for(tmp_path / "x", tmp_path / "in"))) == DOCUMENTS


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a pipe or a device, and the text is read twice"):
        prepare(spec_for(tmp_path / "x", tmp_path / "pipe"))
