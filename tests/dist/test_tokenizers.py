"""A Hugging Face tokenizer from text to a resumed run: prepared, trained with, resumed, and decoded in the summary."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.corpus import PreparedCorpus
from tests.support.corpus import texts, write_jsonl
from tests.support.tokenizers import VOCAB_SIZE, write_huggingface
from tests.support.training import losses, train

pytestmark = pytest.mark.dist

EP2 = ("--expert-model-parallel-size", "2")
ITERATIONS, MORE = 20, 22


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the preparation printed, and the folder of a run of 20 iterations that was then resumed for two more."""

    printed: str
    corpus: PreparedCorpus
    run: Path
    resumed: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("huggingface")
    prefix = folder / "corpus"
    command = ["scripts/prepare_data.py", "--input", str(write_jsonl(folder / "text.jsonl", texts(400)))]
    command += ["--tokenizer-model", str(write_huggingface(folder / "model")), "--output-prefix", str(prefix)]
    prepared = subprocess.run(
        [sys.executable, *command, "--quiet"], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    flags = prepared.stdout.splitlines()[-1].split()  # the preparation's own advice
    saved = folder / "checkpoints"
    keep = ("--save", str(saved), "--save-interval", str(ITERATIONS), *EP2)
    train(folder / "run", 2, flags, *keep, iterations=ITERATIONS)
    more = ("--load", str(saved), "--override-opt-param-scheduler", *EP2)
    train(folder / "resumed", 2, flags, *more, iterations=MORE)
    return Trained(
        printed=prepared.stdout,
        corpus=PreparedCorpus.load(prefix),
        run=folder / "run",
        resumed=folder / "resumed",
    )


def test_the_preparation_says_tokenizer_and_special_tokens(trained: Trained) -> None:
    assert f"vocabulary {VOCAB_SIZE}, end of document 2, begin of text none, padding 0," in trained.printed
    assert "--tokenizer-type HuggingFaceTokenizer --tokenizer-model " in trained.printed
    assert trained.corpus.tokenizer_type == "HuggingFaceTokenizer"


def test_it_trains_and_resumes(trained: Trained) -> None:
    curve = losses(trained.run)
    assert len(curve) == ITERATIONS
    assert curve[-1] < curve[0] - 0.5
    assert len(losses(trained.resumed)) == MORE - ITERATIONS
    assert losses(trained.resumed)[0] < curve[0] - 0.5


@pytest.mark.parametrize("name", ["run", "resumed"])
def test_start_and_summary_show_the_data_as_text(trained: Trained, name: str) -> None:
    folder = getattr(trained, name)
    log = (folder / "ranks" / "rank0.log").read_text()
    model = trained.corpus.tokenizer_model.resolve()
    assert f"smartmoe: tokenizer HuggingFaceTokenizer {model}: {VOCAB_SIZE} entries, bos none, eod <|im_end|> 2" in log
    assert "pad <|endoftext|> 0\n" in log
    begin = texts(1)[0][:20]
    assert json.loads((folder / "summary.json").read_text())["data_begins"].startswith(begin)
    assert f"  the data begin   {json.dumps(begin)[:-1]}" in log


def test_stock_tokens_come_back(trained: Trained) -> None:
    """The ids in the dataset are those of the file's own tokenizer, and none is cut off by its limit."""
    from tokenizers import Tokenizer

    from tests.support.corpus import read_back

    tokenizer = Tokenizer.from_file(str(trained.corpus.tokenizer_model / "tokenizer.json"))
    tokenizer.no_truncation()
    documents = [tokens.tolist() for tokens in read_back(trained.corpus.prefix)]
    assert documents == [[*tokenizer.encode(text).ids, 2] for text in texts(400)]
