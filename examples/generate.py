"""Text from an exported model, on the CPU, with transformers.

smartmoe convert runs/X exported --to hf
.venv/bin/python examples/generate.py exported "Once upon a time"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate(folder: Path, prompt: str, num_tokens: int) -> str:
    """The prompt and what the model adds to it, the likeliest token at each step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**tokens, max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(found[0], skip_special_tokens=True))


def main() -> None:
    """Print the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an exported model with its tokenizer")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=50, help="tokens to add (default: 50)")
    options = parser.parse_args()
    print(generate(options.folder, options.prompt, options.tokens))


if __name__ == "__main__":
    main()
