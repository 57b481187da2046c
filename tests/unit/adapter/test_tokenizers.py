"""Hugging Face and tiktoken tokenizers: ids, special tokens, and what Megatron builds from the same files."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter import hooks
from megatron_smartmoe.adapter.corpus import PreparedCorpus, prepare
from megatron_smartmoe.adapter.tokenizers import huggingface
from megatron_smartmoe.adapter.tokenizers.base import TextTokenizer
from megatron_smartmoe.adapter.tokenizers.detect import detect
from megatron_smartmoe.adapter.tokenizers.load import TokenizerOptions, facts_of, load_tokenizer
from megatron_smartmoe.adapter.tokenizers.tiktoken import TikTokenOptions
from megatron_smartmoe.errors import ConfigError
from tests.support.corpus import read_back, spec_for, texts, write_jsonl
from tests.support.tokenizers import (
    CONFIG,
    VOCAB_SIZE,
    byte_level_bpe,
    tiktoken_ranks,
    write_huggingface,
    write_tiktoken,
)

FLAGS = Namespace(
    tokenizer_type="HuggingFaceTokenizer",
    tokenizer_model=None,
    metadata_path=None,
    chat_template=None,
    special_tokens=None,
    vocab_file=None,
    merge_file=None,
    vocab_size=None,
    tokenizer_hf_no_use_fast=False,
    tokenizer_hf_no_include_special_tokens=False,
    trust_remote_code=False,
    tiktoken_pattern=None,
    tiktoken_num_special_tokens=1000,
    tokenizer_sentencepiece_legacy=False,
    tokenizer_sentencepiece_ignore_extra_whitespaces=True,
    pad_vocab_size=False,
)
TEXT = texts(1)[0]


def flags(**values: Any) -> Namespace:
    return Namespace(**{**vars(FLAGS), **{name: str(v) if isinstance(v, Path) else v for name, v in values.items()}})


def megatrons(args: Namespace) -> Any:
    """The tokenizer that Megatron builds from its flags, with the project's hooks."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    hooks.complete_tokenizers()
    return build_tokenizer(args)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("model"))


def with_config(model: Path, folder: Path, **changes: Any) -> Path:
    """The model's folder with another configuration; None removes a key."""
    shutil.copytree(model, folder)
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(path: Path, **options: Any) -> TextTokenizer:
    return load_tokenizer(path, TokenizerOptions(**options))


# --- Hugging Face


def test_ids_are_those_of_the_file_and_nothing_is_cut_off(model: Path) -> None:
    tokenizer = load(model)
    ids = tokenizer.encode(TEXT)
    assert ids == byte_level_bpe().encode(TEXT).ids
    assert len(ids) > 8, "the file's own limit is that of a model's input"
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("a<|im_end|>")[-1] == 2, "special tokens in a text count as themselves"


def test_special_tokens_come_from_the_files_beside_it(model: Path) -> None:
    facts = load(model).facts
    assert facts.line() == (
        f"HuggingFaceTokenizer {model}: 400 entries, bos none, eod <|im_end|> 2, pad <|endoftext|> 0"
    )
    assert load(model / "tokenizer.json").facts.eod == facts.eod


def test_a_pad_that_is_the_eod_is_said(model: Path, tmp_path: Path) -> None:
    folder = with_config(model, tmp_path / "m", pad_token="<|im_end|>")
    assert load(folder).facts.line().endswith("pad <|im_end|> 2 (the same, so padding is not left out of the loss)")


@pytest.mark.parametrize(
    ("config", "puts_before", "before", "note"),
    [
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, "<|im_start|>", [1], ""),
        ({"bos_token": "<|im_start|>"}, "<|im_start|>", [1], ""),
        ({"bos_token": "<|im_start|>"}, None, [], ""),
        (
            {"bos_token": "<|im_start|>", "add_bos_token": True},
            None,
            [],
            "add_bos_token is true, but tokenizer.json decides and puts none before a text",
        ),
        (
            {"bos_token": "<|im_start|>", "add_bos_token": False},
            "<|im_start|>",
            [1],
            "add_bos_token is false, but tokenizer.json decides and puts it before a text",
        ),
        (
            {"add_eos_token": True},
            None,
            [],
            "add_eos_token is true, but tokenizer.json decides and puts none after a text",
        ),
    ],
)
def test_what_is_put_around_a_text(
    tmp_path: Path, config: dict[str, Any], puts_before: str | None, before: list[int], note: str
) -> None:
    folder = write_huggingface(tmp_path / "m", {**CONFIG, **config}, puts_before=puts_before)
    plain = byte_level_bpe().encode(TEXT).ids
    assert load(folder).encode(TEXT) == [*before, *plain]
    assert load(folder).facts.note == note
    assert load(folder, include_special_tokens=False).encode(TEXT) == plain
    assert load(folder).encode(TEXT, is_chat=True) == plain
    assert megatrons(flags(tokenizer_model=folder)).tokenize(TEXT) == [*before, *plain]


def test_tokens_that_only_the_configuration_names_are_added(model: Path, tmp_path: Path) -> None:
    decoder = {str(VOCAB_SIZE): {"content": "<tool>", "special": True}}
    folder = with_config(model, tmp_path / "m", pad_token="<pad>", added_tokens_decoder=decoder)
    facts = load(folder, special_tokens=("<extra>",)).facts
    assert (facts.vocab_size, str(facts.pad)) == (VOCAB_SIZE + 3, f"<pad> {VOCAB_SIZE + 1}")
    with_config(model, tmp_path / "n", added_tokens_decoder={"7000": {"content": "<tool>"}})
    with pytest.raises(ConfigError, match=r"gives '<tool>' the id 7000, and the next one of tokenizer.json is 400"):
        load(tmp_path / "n")


def test_without_a_configuration_the_usual_token_ends_a_text(tmp_path: Path) -> None:
    facts = load(write_huggingface(tmp_path / "m", {})).facts
    assert facts.line().endswith("; eod by its usual name: no file beside tokenizer.json says which token ends a text")
    assert facts.eod is not None
    assert facts.eod.id == 0


def test_a_tokenizer_that_ends_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"--tokenizer-model = '{tmp_path}': says nowhere which token ends a text (eos_token; its special tokens: "
        '<|other|>, <|im_start|>, <|im_end|>). Put a tokenizer_config.json beside it, such as {"eos_token": "</s>"}.'
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "is not a Hugging Face tokenizer ("),
        ("tokenizer.json", '{"model": 3}', "is not a Hugging Face tokenizer ("),
        ("tokenizer_config.json", "{", "is invalid JSON: "),
        ("tokenizer_config.json", "[1]", "is not a JSON object"),
        ("special_tokens_map.json", "nothing", "is invalid JSON: "),
    ],
)
def test_damaged_files_are_named(model: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "m")
    assert str(caught.value).startswith(f"--tokenizer-model = '{tmp_path / 'm' / name}': {message}")


def test_megatron_builds_it_without_transformers(model: Path) -> None:
    built, own = megatrons(flags(tokenizer_model=model)), load(model)
    assert (built.vocab_size, built.eod, built.eos, built.pad, built.bos) == (VOCAB_SIZE, 2, 2, 0, None)
    ids = built.tokenize(TEXT)
    assert ids == own.encode(TEXT)
    assert built.detokenize(ids) == TEXT
    assert built.detokenize([*ids, 2], skip_special_tokens=True) == TEXT
    chat = [{"role": "user", "content": "a"}]
    assert built.detokenize(built.apply_chat_template(chat)) == "<|im_start|>user\na<|im_end|>\n"
    assert built.inv_vocab[2] == "<|im_end|>"
    assert json.dumps(built.unique_identifiers), "datasets are cached under it"
    assert facts_of(flags(tokenizer_model=model)) == own.facts


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    """With transformers installed, Megatron's own class gives the same ids."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    changes: list[dict[str, Any]] = [{}, {"bos_token": "<|im_start|>", "add_bos_token": True}, {"pad_token": "<pad>"}]
    for number, change in enumerate(changes):
        for puts_before in (None, "<|im_start|>"):
            folder = write_huggingface(
                tmp_path / f"{number}{puts_before}", {**CONFIG, **change}, puts_before=puts_before
            )
            theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
            ours = load(folder)
            assert ours.facts.vocab_size == len(theirs)
            assert ours.facts.eod is not None
            assert ours.facts.eod.id == theirs.eos_token_id
            assert all(ours.encode(text) == theirs(text).input_ids for text in texts(20))
            chat = [{"role": "user", "content": "a"}]
            assert isinstance(ours, huggingface.HuggingFaceTextTokenizer)
            assert ours.chat is not None
            assert ours.chat.render(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_gpt2s_two_files_are_enough(tmp_path: Path) -> None:
    byte_level_bpe().model.save(str(tmp_path))
    args = flags(
        tokenizer_type="GPT2BPETokenizer", vocab_file=tmp_path / "vocab.json", merge_file=tmp_path / "merges.txt"
    )
    built, facts = megatrons(args), facts_of(args)
    assert facts is not None
    assert built.tokenize(f"{TEXT}<|endoftext|>") == [*byte_level_bpe().encode(TEXT).ids, 0]
    assert built.detokenize(built.tokenize(TEXT)) == TEXT
    assert (built.vocab_size, built.eod, facts.eod and facts.eod.id) == (facts.vocab_size, 0, 0)
    assert facts.line().startswith(f"GPT2BPETokenizer {tmp_path}/vocab.json: 400 entries, bos <|endoftext|> 0")
    (tmp_path / "merges.txt").write_text("a b c d")
    with pytest.raises(ConfigError, match=r"is not the vocabulary of a BPE tokenizer, with .*merges.txt"):
        facts_of(args)


def test_gpt2_and_bert_by_name_need_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_smartmoe.adapter.tokenizers.load.transformers_is_installed", lambda: False)
    with pytest.raises(ConfigError) as caught:
        facts_of(flags(tokenizer_type="GPT2BPETokenizer"))
    assert str(caught.value) == (
        "--tokenizer-type = 'GPT2BPETokenizer': needs --vocab-file and --merge-file, or the package transformers, "
        "which is not installed. Pass --vocab-file vocab.json --merge-file merges.txt, or install it: pip install "
        "transformers (the extra megatron-smartmoe[transformers])."
    )
    with pytest.raises(
        ConfigError, match="'BertWordPieceCase': needs the package transformers, which is not installed"
    ):
        facts_of(flags(tokenizer_type="BertWordPieceCase"))


def test_transformers_reads_what_has_no_tokenizer_json(tmp_path: Path) -> None:
    """Prepared as Megatron's own class tokenizes."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    byte_level_bpe().model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    built, own = megatrons(flags(tokenizer_model=tmp_path)), load(tmp_path)
    assert own.facts.eod is not None
    assert (built.vocab_size, built.eod) == (own.facts.vocab_size, own.facts.eod.id)
    assert all(built.tokenize(text) == own.encode(text) for text in texts(20))


def test_others_need_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "transformers_is_installed", lambda: False)
    monkeypatch.setattr("megatron_smartmoe.adapter.tokenizers.load.transformers_is_installed", lambda: False)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").touch()
    message = "has no tokenizer.json, and the package transformers, which reads other tokenizers, is not installed. "
    message += "Give a folder with tokenizer.json, or install it: pip install transformers."
    for refuse in (lambda: load(tmp_path), lambda: facts_of(flags(tokenizer_model=tmp_path))):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert str(caught.value) == f"--tokenizer-model = '{tmp_path}': {message}"
    for refuse in (lambda: load(Path("owner/name")), lambda: facts_of(flags(tokenizer_model="owner/name"))):
        with pytest.raises(ConfigError, match="which reads other tokenizers, is not installed"):
            refuse()


# --- tiktoken


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "small.tiktoken")


def test_tiktoken_ids_are_megatrons(ranks: Path, tmp_path: Path) -> None:
    """Special tokens first, then the file's entries; a `.tiktoken` file and Megatron's JSON list give the same."""
    import base64

    tokens = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": repr(token)}
        for rank, token in enumerate(tiktoken_ranks())
    ]
    (tmp_path / "list.json").write_text(json.dumps(tokens))
    own = load(ranks)
    ids = own.encode(f"{TEXT}</s>")
    assert own.facts.line() == (
        f"TikTokenizer {ranks}: {len(tokens) + 1000:,} entries, bos <s> 1, eod </s> 2, pad <pad> 4; special tokens "
        "have the ids below 1000, the file's entries follow"
    )
    assert min(ids[:-1]) >= 1000
    assert ids[-1] == 2
    assert own.decode(ids) == f"{TEXT}</s>"
    for path in (ranks, tmp_path / "list.json"):
        built = megatrons(flags(tokenizer_type="TikTokenizer", tokenizer_model=path))
        assert (built.vocab_size, built.eod, built.pad, built.tokenize(f"{TEXT}</s>")) == (
            len(tokens) + 1000,
            2,
            4,
            ids,
        )
        assert load(path).encode(f"{TEXT}</s>") == ids


def test_flags_of_tiktoken(ranks: Path) -> None:
    options = TikTokenOptions(vocab_size=300, num_special=40, pattern="v1")
    own = load(ranks, tiktoken=options)
    args = flags(tokenizer_type="TikTokenizer", tokenizer_model=ranks, vocab_size=300)
    args.tiktoken_num_special_tokens, args.tiktoken_pattern = 40, "v1"
    assert own.facts == facts_of(args)
    assert own.encode(TEXT) == megatrons(args).tokenize(TEXT)
    assert own.facts.vocab_size == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 5000}, "--vocab-size = 5000: is more than the 264 entries of"),
        ({"vocab_size": 1100}, "--vocab-size = 1100: leaves no room for the 256 bytes"),
        ({"num_special": 3}, "--tiktoken-num-special-tokens = 3: is less than the 7 special tokens"),
        ({"special": ("<s>",)}, "--tokenizer-special-tokens = '<s>': lacks <unk> </s>"),
    ],
)
def test_wrong_flags_of_tiktoken(ranks: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ranks, tiktoken=TikTokenOptions(**options))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("YQ== 0\nYg== one\n", "is not a tiktoken vocabulary"),
        ("YQ== 0\nYg== 2\n", "has ranks that are not 0 to the number of entries"),
        ("YQ== 0\nYg== 1\n", "lacks the byte 0x00"),
        ('[{"rank": 0}]', "is not a tiktoken vocabulary"),
        ("[", "is not a tiktoken vocabulary"),
    ],
)
def test_damaged_tiktoken_files(tmp_path: Path, content: str, message: str) -> None:
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    (tmp_path / "a.tiktoken").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "a.tiktoken", kind="TikTokenizer")


def test_tiktoken_is_an_extra(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the package tiktoken, which is not installed. Install it: pip install"
    ):
        load(ranks)


# --- which is which


def test_a_path_is_told_by_its_content(model: Path, tmp_path: Path) -> None:
    lines = "\n".join(["IQ== 0", "Ig== 1"])
    (tmp_path / "llama3").mkdir()
    (tmp_path / "llama3" / "tokenizer.model").write_text(lines)  # Meta's name for a tiktoken file
    (tmp_path / "llama2").mkdir()
    (tmp_path / "llama2" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert detect(model) == ("HuggingFaceTokenizer", model)
    assert detect(model / "tokenizer.json")[0] == "HuggingFaceTokenizer"
    assert detect(tmp_path / "llama3") == ("TikTokenizer", tmp_path / "llama3" / "tokenizer.model")
    assert detect(tmp_path / "llama2") == ("SentencePieceTokenizer", tmp_path / "llama2" / "tokenizer.model")
    for path, message in ((tmp_path, "is a folder without a tokenizer"), (tmp_path / "x.model", "no such file")):
        with pytest.raises(ConfigError, match=message):
            detect(path)


def test_another_type_than_asked_for(model: Path) -> None:
    with pytest.raises(
        ConfigError, match="is a tokenizer of --tokenizer-type HuggingFaceTokenizer, not of SentencePie"
    ):
        facts_of(flags(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model / "tokenizer.json"))


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    for text, message in (("name: tiny\n", "is not a sentencepiece model"), ("{}", "is not a Hugging Face tokenizer")):
        (tmp_path / "tiny.yaml").write_text(text)
        for kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"):
            with pytest.raises(ConfigError, match=f"tiny.yaml': {message}"):
                facts_of(flags(tokenizer_type=kind, tokenizer_model=tmp_path / "tiny.yaml"))


# --- in data preparation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"special_tokens": ("<x>",)}, "--tokenizer-special-tokens = '<x>': has no effect on a SentencePieceTokenizer"),
        (
            {"include_special_tokens": False},
            "--tokenizer-hf-no-include-special-tokens = True: has no effect on a Sente",
        ),
        ({"tiktoken_pattern": "v1"}, "--tiktoken-pattern = 'v1': has no effect on a SentencePieceTokenizer"),
        ({"tokenizer_type": "TikTokenizer"}, "--tokenizer-type = 'TikTokenizer': is not trained here"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(spec_for(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl", texts(3)), **changes))
    assert str(caught.value).startswith(message)


def test_prepared_data_know_their_tokenizer(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", texts(60))
    options: dict[str, Any] = {"vocab_size": None, "special_tokens": ("<extra>",), "include_special_tokens": False}
    prepare(spec_for(tmp_path / "out", path, tokenizer_model=model, **options))
    corpus = PreparedCorpus.load(tmp_path / "out")
    assert corpus.tokenizer_model.resolve() == model
    assert (corpus.tokenizer_type, corpus.vocab_size) == ("HuggingFaceTokenizer", VOCAB_SIZE + 1)
    assert (corpus.eod_id, corpus.pad_id, corpus.bos_id) == (2, 0, None)
    extra = ("--tokenizer-special-tokens", "<extra>", "--tokenizer-hf-no-include-special-tokens")
    assert corpus.tokenizer_flags == extra
    documents = read_back(corpus.prefix)
    assert corpus.max_token_id == max(int(tokens.max()) for tokens in documents)
    assert [tokens.tolist() for tokens in documents] == [[*byte_level_bpe().encode(text).ids, 2] for text in texts(60)]


def test_workers_give_the_same_bytes(model: Path, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_smartmoe.adapter.corpus.sources.GROUP_BYTES", 1000)
    path = write_jsonl(tmp_path / "in.jsonl", texts(60))
    for kind in (model, ranks):
        for workers in (1, 2):
            options: dict[str, Any] = {"vocab_size": None, "tokenizer_model": kind, "workers": workers}
            prepare(spec_for(tmp_path / f"{kind.name}{workers}", path, **options))
        assert (tmp_path / f"{kind.name}1.bin").read_bytes() == (tmp_path / f"{kind.name}2.bin").read_bytes()


def test_tokens_that_texts_spell_are_warned_of(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ["one <|im_end|> two <|endoftext|> three", *texts(40), "ended<|im_end|>"])
    corpus = prepare(spec_for(tmp_path / "out", path, vocab_size=None, tokenizer_model=model))
    assert corpus.num_inner_eod == 1
    assert "the end-of-document token 2 is 1 times inside a document" in caplog.text
    assert "the padding token 0 is 1 times in the data" in caplog.text
    assert read_back(corpus.prefix)[-1][-2:].tolist().count(2) == 1, "a document that is ended is not ended again"
