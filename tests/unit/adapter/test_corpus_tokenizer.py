"""The tokenizer that is trained here: exact, the same every time, and what Megatron expects."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.adapter.corpus import PreparedCorpus, prepare, tokenizer
from megatron_smartmoe.adapter.tokenizers.sentencepiece import load_sentencepiece
from megatron_smartmoe.errors import ConfigError
from tests.support.corpus import decode, spec_for, texts, write_jsonl

LINES = [line for text in texts(60) for line in text.split("\n")]
MODEL = tokenizer.train(iter(LINES), 340)
PROCESSOR = load_sentencepiece(MODEL, Path("test")).processor

CASES = [
    "",
    " ",
    "\n",
    "  two  leading\n\n\n\tand\ttrailing  ",
    "\r\n\x0b\x0c\u2028\u00a0",
    "e\u0301 \ufb01 \u00bd",
    "x</s>y<s><unk><pad><0x41>",
    "\x00",
    "\U0001f600\U0001f469\u200d\U0001f467",
    "def f(x):\n    return {\n        1: 'a  b',\n    }\n",
]


@pytest.mark.parametrize("text", CASES)
def test_round_trip(text: str) -> None:
    assert PROCESSOR.decode(PROCESSOR.encode(text)) == text


@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text: str) -> None:
    ids = PROCESSOR.encode(text)
    assert PROCESSOR.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids), "text never makes a special token"


def test_the_one_character_that_does_not_come_back() -> None:
    assert PROCESSOR.decode(PROCESSOR.encode("a\u2581b")) == "a b"


def test_newline_and_tab_are_pieces_of_their_own() -> None:
    assert PROCESSOR.encode("n\n\tn", out_type=str) == ["n", "\n", "\t", "n"]


def test_training_is_deterministic() -> None:
    assert tokenizer.train(iter(LINES), 340) == MODEL


def test_long_lines_are_cut_and_not_dropped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["zebra " * 20_000])
    corpus = prepare(spec_for(tmp_path / "out", path, vocab_size=272))
    assert corpus.num_tokens <= 2 * 20_000 + 2, (
        "the few merges that fit were learned from the line: 6 characters a word"
    )


def test_a_sample_of_a_large_corpus_is_drawn_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_smartmoe.adapter.corpus.sources.GROUP_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", texts(300))
    models = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(spec_for(tmp_path / name, path, seed=seed, tokenizer_sample_bytes=6000, vocab_size=300))
        models.append((tmp_path / f"{name}.tokenizer.model").read_bytes())
    assert models[0] == models[1] != models[2]


def test_megatron_loads_it_and_agrees_on_eod_and_ids(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    corpus = prepare(spec_for(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", texts(60))))
    megatron = build_tokenizer(
        Namespace(
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=str(corpus.tokenizer_model),
            metadata_path=None,
            chat_template=None,
            special_tokens=None,
            tokenizer_sentencepiece_legacy=False,
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
            pad_vocab_size=False,
        )
    )
    assert (megatron.vocab_size, megatron.eod, megatron.pad) == (corpus.vocab_size, corpus.eod_id, 3)
    dataset = IndexedDataset(str(corpus.prefix))
    for index, text in enumerate(texts(60)):
        assert dataset[index].tolist() == [*megatron.tokenize(text), megatron.eod]
        assert megatron.detokenize(dataset[index][:-1].tolist()) == text


def test_a_given_tokenizer_is_used_and_its_path_kept(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").mkdir()
    model = tmp_path / "tokenizers" / "given.model"
    model.write_bytes(MODEL)
    path = write_jsonl(tmp_path / "in.jsonl", texts(40, first=100))
    corpus = prepare(spec_for(tmp_path / "data" / "out", path, vocab_size=None, tokenizer_model=model))
    assert decode(corpus) == texts(40, first=100)
    assert not (tmp_path / "data" / "out.tokenizer.model").exists()
    assert '"../tokenizers/given.model"' in (tmp_path / "data" / "out.json").read_text()
    assert PreparedCorpus.load(tmp_path / "data" / "out").tokenizer_model.read_bytes() == MODEL


def test_a_model_without_eos_is_refused() -> None:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=200, eos_id=-1, minloglevel=2, model_type="bpe"
    )
    with pytest.raises(ConfigError, match="has no end-of-sentence id"):
        load_sentencepiece(model.getvalue(), Path("x.model"))


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 10])
def test_something_that_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="is not a sentencepiece model"):
        load_sentencepiece(content, Path("x.model"))


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        (["hello world"] * 10, 5000, r"--vocab-size = 5000: this corpus fills at most \d+ entries. Give \d+ or less"),
        (["hello world"] * 10, 100, r"--vocab-size = 100: 256 byte entries, .* need \d+. Give \d+ or more"),
        ([""], 300, r"--vocab-size = 300: sentencepiece cannot train"),
    ],
)
def test_wrong_vocabulary_sizes_are_explained(lines: list[str], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenizer.train(iter(lines), size)
