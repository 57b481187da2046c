"""What `prepare` makes of text: documents, tokens, metadata."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.adapter.corpus import CorpusSpec, PreparedCorpus, prepare, sources
from megatron_smartmoe.errors import ConfigError
from tests.support.corpus import VOCAB_SIZE, decode, files, read_back, spec_for, texts, write_jsonl


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", texts(60))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "corpus"


def test_tokens_decode_to_the_text(jsonl: Path, out: Path) -> None:
    corpus = prepare(spec_for(out, jsonl))
    assert decode(corpus) == texts(60)
    assert files(out.parent) == {"corpus.bin", "corpus.idx", "corpus.json", "corpus.tokenizer.model"}


def test_metadata_is_true_and_loads(jsonl: Path, out: Path) -> None:
    corpus = prepare(spec_for(out, jsonl, command=("prepare_data.py", "--input", "x")))
    documents = read_back(out)
    counts = Counter(np.concatenate(documents).tolist())
    total = sum(counts.values())
    assert (corpus.num_documents, corpus.num_tokens, corpus.vocab_size) == (60, total, VOCAB_SIZE)
    assert corpus.text_bytes == sum(len(text.encode()) for text in texts(60))
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert corpus.unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)
    assert documents[0].dtype == np.uint16
    assert PreparedCorpus.load(out) == corpus
    meta = json.loads((out.parent / "corpus.json").read_text())
    assert (meta["version"], meta["tokenizer_model"]) == (1, "corpus.tokenizer.model")
    assert meta["command"] == ["prepare_data.py", "--input", "x"]


def test_metadata_follows_a_moved_directory(jsonl: Path, out: Path, tmp_path: Path) -> None:
    prepare(spec_for(out, jsonl))
    out.parent.rename(tmp_path / "moved")
    corpus = PreparedCorpus.load(tmp_path / "moved" / "corpus")
    assert corpus.tokenizer_model.is_file()
    assert decode(corpus) == texts(60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_model": 3}, "tokenizer_model = 3: must be the path of a file"),
        ({"num_tokens": 1.5}, "num_tokens = 1.5: must be a whole number"),
        ({"append_eod": 1}, "append_eod = 1: must be true or false"),
        ({"bad_lines": "x"}, "bad_lines = 'x': must be a list"),
        ({"unigram_entropy_nats": "4"}, "unigram_entropy_nats = '4': must be a number"),
        ({"version": True}, "is not the metadata of a prepared corpus"),
    ],
)
def test_damaged_metadata_name_the_key(jsonl: Path, out: Path, changes: dict[str, object], message: str) -> None:
    prepare(spec_for(out, jsonl))
    path = out.with_name(f"{out.name}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError) as caught:
        PreparedCorpus.load(out)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_load_without_a_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no prepared corpus is here.*prepare_data.py --output-prefix"):
        PreparedCorpus.load(tmp_path / "none")


def test_no_append_eod(jsonl: Path, out: Path) -> None:
    corpus = prepare(spec_for(out, jsonl, append_eod=False))
    assert decode(corpus) == texts(60)


def test_result_does_not_depend_on_the_run_or_the_workers(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "GROUP_BYTES", 1000)  # Enough groups for two workers.
    for name, workers in (("one", 1), ("again", 1), ("two", 2)):
        prepare(spec_for(tmp_path / name, jsonl, workers=workers))
    for suffix in ("bin", "idx", "tokenizer.model"):
        contents = {(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "again", "two")}
        assert len(contents) == 1, suffix
    assert len({PreparedCorpus.load(tmp_path / name).input_sha256 for name in ("one", "again", "two")}) == 1
    assert decode(PreparedCorpus.load(tmp_path / "two")) == texts(60)


@pytest.mark.parametrize("group_bytes", [1, 97, 1000, 10**6])
def test_cutting_json_lines_loses_nothing(
    jsonl: Path, out: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(sources, "GROUP_BYTES", group_bytes)
    jsonl.write_bytes(jsonl.read_bytes().removesuffix(b"\n"))  # The last line may come without its end.
    assert decode(prepare(spec_for(out, jsonl))) == texts(60)


def test_files_directories_and_globs_in_order(tmp_path: Path, out: Path) -> None:
    names = ["b/2.txt", "b/deep/1.py", "a.txt", "c1.jsonl", "c2.jsonl"]
    documents = texts(5)
    for name, text in zip(names, documents, strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            write_jsonl(path, [text])
        else:
            path.write_bytes(text.encode())
    (tmp_path / "b" / ".hidden").write_bytes(b"\xff")
    corpus = prepare(spec_for(out, tmp_path / "b", tmp_path / "a.txt", tmp_path / "c*.jsonl", vocab_size=300))
    assert decode(corpus) == documents


def test_a_byte_order_mark_is_no_text(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + texts(1)[0].encode())
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": texts(2)[1]}).encode())
    assert decode(prepare(spec_for(out, tmp_path / "a.txt", tmp_path / "b.jsonl", vocab_size=294))) == texts(2)


def test_json_keys_are_joined(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"title": f"t{n}", "body": text}) + "\n" for n, text in enumerate(texts(40))))
    corpus = prepare(spec_for(out, path, json_keys=("title", "body"), vocab_size=300))
    assert decode(corpus) == [f"t{n}\n{text}" for n, text in enumerate(texts(40))]


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, out: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [*texts(20), "", " \n", *texts(20, first=20), b""])
    corpus = prepare(spec_for(out, path, vocab_size=300))
    assert (corpus.num_documents, corpus.num_empty_documents) == (40, 3)
    assert decode(corpus) == texts(40)


@pytest.mark.parametrize("group_bytes", [100, 10**6])
def test_max_bytes_keeps_the_first_documents(
    jsonl: Path, out: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(sources, "GROUP_BYTES", group_bytes)
    sizes = [len(text.encode()) for text in texts(60)]
    corpus = prepare(spec_for(out, jsonl, max_bytes=sum(sizes[:31]) - 1, vocab_size=300))
    assert decode(corpus) == texts(30)


def test_a_long_document_is_tokenized_in_parts_without_a_trace(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_bytes("".join(texts(200)).encode())
    whole = prepare(spec_for(out, tmp_path / "long.txt"))
    monkeypatch.setattr("megatron_smartmoe.adapter.corpus.indexed.LONG_DOCUMENT_CHARACTERS", 10)
    monkeypatch.setattr("megatron_smartmoe.adapter.corpus.indexed.PART_CHARACTERS", 50)
    parts = prepare(spec_for(tmp_path / "parts", tmp_path / "long.txt"))
    assert whole.num_documents == parts.num_documents == 1
    assert (tmp_path / "parts.bin").read_bytes() == (out.parent / "corpus.bin").read_bytes()


def test_few_documents_warn_of_the_split(tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "long.txt").write_bytes("".join(texts(200)).encode())
    prepare(spec_for(out, tmp_path / "long.txt"))
    assert "holds 1 documents, and Megatron's --split cuts between documents" in caplog.text


def test_python_stdlib(tmp_path: Path) -> None:
    options: dict[str, Any] = {"python_stdlib": True, "max_bytes": 600_000, "vocab_size": 1000}
    corpus = prepare(spec_for(tmp_path / "a", **options))
    assert corpus.num_documents > 20
    assert 300_000 < corpus.text_bytes <= 600_000
    assert 3 < corpus.unigram_entropy_nats < math.log(1000)
    assert prepare(spec_for(tmp_path / "b", **options)).input_sha256 == corpus.input_sha256
    assert prepare(spec_for(tmp_path / "c", **options, seed=1)).input_sha256 != corpus.input_sha256


def test_python_stdlib_leaves_out_tests_packages_and_build_settings() -> None:
    spans = sources.stdlib_spans(0)
    paths = {span.path for span in spans}
    assert sum(span.num_bytes for span in spans) > 5_000_000
    assert any(path.endswith("argparse.py") for path in paths)
    assert any(span.kind == "topic" and "statement" in sources.topic_text(span.start) for span in spans)
    assert not any("/test/" in path or "-packages/" in path or "_sysconfigdata" in path for path in paths)


def test_request_is_about_the_result_only(tmp_path: Path) -> None:
    base: dict[str, Any] = {"output_prefix": tmp_path / "x", "inputs": ("a",), "vocab_size": 300}
    assert CorpusSpec(**base).request() == CorpusSpec(**base, workers=7, quiet=True, force=True).request()
    assert CorpusSpec(**base).request() != CorpusSpec(**base, seed=1).request()
