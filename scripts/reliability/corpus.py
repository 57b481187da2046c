"""A small corpus of real text for the long runs: the documentation of the Python that runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def corpus_flags(directory: Path) -> list[str]:
    """Flags of the corpus in `directory`, which is made there once."""
    prefix = directory / "corpus"
    if not prefix.with_suffix(".json").exists():
        command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--python-stdlib", "--quiet"]
        options = ["--max-bytes", "400000", "--vocab-size", "512", "--output-prefix", str(prefix)]
        done = subprocess.run([*command, *options], check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the corpus could not be prepared:\n{done.stderr}")
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.tokenizer.model"]
    return ["--data-path", str(prefix), *tokenizer]
