"""The loss of a model on a text, in float32: of a folder with transformers, of a checkpoint with Megatron."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_smartmoe.convert.carried import TOKENIZER_FILES
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.launches import launch_of
from megatron_smartmoe.convert.verify import of_megatron, of_transformers
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers.files import Named, read_text

_LENGTH, _SEQUENCES = 128, 16  # tokens of a sequence, and sequences at most
_CHARACTERS = 2**16  # of the text that are tokenised: more than enough for these


def tokens_of(text: Path, model: Path, table: ModelTable, field: str) -> torch.Tensor:
    """Sequences of a text's first tokens, `[sequences, tokens]`.

    Args:
        text: a file in UTF-8.
        model: folder with a tokenizer.
        table: of the model.
        field: the flag that named the text, for errors.

    Raises:
        ConfigError: it cannot be read, is too short, or there is no tokenizer.
    """
    way_out = "Pass a file with text in UTF-8."
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(field, str(text), f"needs a tokenizer, and {model} has none", "Leave it out.")
    from transformers import AutoTokenizer

    content = read_text(Named(path=text, field=field, way_out=way_out))[:_CHARACTERS]
    found = AutoTokenizer.from_pretrained(model)(content)["input_ids"][: _LENGTH * _SEQUENCES]
    length = min(_LENGTH, len(found), int(str(table.flags["max-position-embeddings"])))
    if length < 2:
        raise ConfigError(field, str(text), f"has {len(found)} tokens, and a loss needs 2", way_out)
    count = len(found) // length
    tokens = torch.tensor(found[: count * length]).reshape(count, length)
    if int(tokens.max()) >= table.vocab_size:
        rule = f"has token {int(tokens.max())} by the tokenizer of {model}, and the model has {table.vocab_size}"
        raise ConfigError(field, str(text), rule, "Put the model's own tokenizer there.")
    return tokens


def losses(model: Path, checkpoint: Path, table: ModelTable, tokens: torch.Tensor) -> tuple[float, float]:
    """Nats per token of a Hugging Face model and of a checkpoint.

    Raises:
        CheckpointError: Megatron could not load the checkpoint.
    """
    before = of_transformers(model, tokens, table.num_layers).logits
    after = of_megatron(checkpoint, table, tokens, launch_of("1")).logits
    return _loss(before, tokens), _loss(after[..., : table.vocab_size], tokens)


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean over the tokens of the loss of each from those before it."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
