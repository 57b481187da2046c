"""A model keeps its tokenizer on the way there and back, and the example continues a text with what comes out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.options import ConvertOptions
from megatron_smartmoe.spec.run import load_run_spec
from tests.support import hf_models
from tests.support.tokenizers import VOCAB_SIZE, write_huggingface

EXAMPLE = Path(__file__).parents[3] / "examples" / "generate.py"


def test_text_from_an_exported_model(tmp_path: Path) -> None:
    source = hf_models.make("mixtral", tmp_path / "hf", vocab_size=VOCAB_SIZE)
    write_huggingface(source)
    convert(ConvertOptions(source=source, out=tmp_path / "megatron", target="megatron"))
    run = load_run_spec(tmp_path / "megatron" / "run.yaml")
    assert run.flags["tokenizer-type"] == "HuggingFaceTokenizer"
    assert run.flags["tokenizer-model"] == str(tmp_path / "megatron" / "huggingface")
    assert run.flags["padded-vocab-size"] == "512"
    convert(ConvertOptions(source=tmp_path / "megatron", out=tmp_path / "exported", target="hf"))
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    text = example.generate(tmp_path / "exported", "def f", 8)
    assert text.startswith("def f")
    assert text == example.generate(source, "def f", 8)
    assert len(text) > len("def f")
