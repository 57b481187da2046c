"""What a converted model carries besides its weights: tokenizer and configuration, and a run that trains it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_smartmoe.convert.families.table import FlagValue, ModelTable
from megatron_smartmoe.convert.hf_config import CONFIG_FILE
from megatron_smartmoe.convert.ranks import Ranks
from megatron_smartmoe.spec.yaml_io import dump_yaml

FOLDER = "huggingface"  # of the source's configuration and tokenizer in a converted checkpoint
RUN_FILE = "run.yaml"
# Files of a Hugging Face folder that say how text becomes tokens and how text is generated.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TIKTOKEN = "*.tiktoken"  # for --tokenizer-type TikTokenizer
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # HuggingFaceTokenizer needs one of them
OTHER_FILES = (CONFIG_FILE, "generation_config.json")
PADDED_TO = 128  # Megatron's --make-vocab-size-divisible-by
_SEQUENCE = 4096  # the longest that run.yaml trains with; its users raise it


def carried_files(folder: Path) -> Iterator[Path]:
    """The files of a Hugging Face folder that are copied."""
    for name in (*OTHER_FILES, *TOKENIZER_FILES):
        if (folder / name).is_file():
            yield folder / name
    yield from sorted(path for path in folder.glob(_TIKTOKEN) if path.is_file())


def copy_carried(folder: Path, out: Path) -> None:
    """Copy these files."""
    out.mkdir(parents=True, exist_ok=True)
    for path in carried_files(folder):
        shutil.copyfile(path, out / path.name)


def padded_vocab(size: int, tensor_ranks: int = 1, divisor: int = PADDED_TO) -> int:
    """The rows that Megatron's embedding has for that many rows of the model (`calculate_padded_vocab_size`)."""
    multiple = divisor * tensor_ranks
    return -(-size // multiple) * multiple


def seq_length_of(flags: Mapping[str, FlagValue]) -> int:
    """The sequence length that run.yaml trains with."""
    return min(int(str(flags["max-position-embeddings"])), _SEQUENCE)


def write_beside(folder: Path, source: Path, table: ModelTable, out: Path, *, dtype: str, ranks: Ranks) -> None:
    """Write what belongs to converted weights: configuration and tokenizer of the source, and a run.

    Args:
        folder: that is written to, and becomes the output.
        source: Hugging Face folder.
        table: of the model.
        out: the output.
        dtype: of the weights.
        ranks: of the run.
    """
    copy_carried(source, folder / FOLDER)
    (folder / FOLDER / CONFIG_FILE).write_text(json.dumps(table.config.content, indent=2) + "\n")
    has_tokenizer = any((source / name).is_file() for name in _TOKENIZERS)
    place = out.absolute()
    head = (
        f"# Trains the {table.family} model of this folder further, on random tokens until you name your own data:\n"
        f"#\n#   scripts/pretrain_gpt_moe.sh --config {place / RUN_FILE}\n#\n"
        "# Learning rate and batch are examples. Own data: --no-mock-data --data-path PREFIX.\n"
    )
    tokenizer = place / FOLDER if has_tokenizer else None
    content = _content(table, name=out.name, checkpoint=place, dtype=dtype, tokenizer=tokenizer, ranks=ranks)
    (folder / RUN_FILE).write_text(head + dump_yaml(content))


def _content(
    table: ModelTable, *, name: str, checkpoint: Path, dtype: str, tokenizer: Path | None, ranks: Ranks
) -> dict[str, Any]:
    model = {flag: value for flag, value in table.flags.items() if "moe" not in flag and flag != "num-experts"}
    moe = {flag: value for flag, value in table.flags.items() if flag not in model}
    vocab = padded_vocab(table.vocab_size, ranks.tensor)
    model |= {"seq-length": seq_length_of(table.flags), "padded-vocab-size": vocab}
    balances = table.num_experts is not None and not table.mtp_layers
    data: dict[str, Any] = {"mock-data": True, "split": "99,1,0", "num-workers": 0}
    if tokenizer is not None:
        data |= {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(tokenizer)}
    else:
        data |= {"tokenizer-type": "NullTokenizer", "vocab-size": table.vocab_size - 1}
    groups: dict[str, dict[str, Any]] = {
        "model": model,
        "moe": moe,
        "parallel": ranks.flags(),
        "training": {
            "micro-batch-size": 1,
            "global-batch-size": math.lcm(8, ranks.expert),
            "train-iters": 100,
            "lr": "1e-5",
            "min-lr": "1e-6",
            "lr-decay-style": "cosine",
            "weight-decay": 0.1,
            "adam-beta2": 0.95,
            "clip-grad": 1.0,
            "seed": 1234,
            **({"bf16": True} if dtype == "bfloat16" else {}),
        },
        "data": data,
        "checkpoints": {
            "pretrained-checkpoint": str(checkpoint),
            "load": "{run_dir}/checkpoints",
            "save": "{run_dir}/checkpoints",
            "save-interval": 100,
            "dist-ckpt-optim-fully-reshardable": True,
        },
        "logging": {"log-interval": 1, "eval-iters": 0, "eval-interval": 1000},
    }
    if balances:
        groups["smartmoe"] = {"smartmoe": True}
    return {
        "name": name,
        "nproc": ranks.count,
        "flags": {
            group: {flag: _text(value) for flag, value in members.items()}
            for group, members in groups.items()
            if members
        },
    }


def _text(value: Any) -> Any:
    """A flag's value as a configuration file has it: a pattern of layers is one text."""
    return str(value).replace(" ", "") if isinstance(value, list) else value
