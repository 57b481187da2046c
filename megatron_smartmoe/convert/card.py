"""The model card of an export: where the weights are from, and the figures of the run that trained them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_smartmoe import __version__
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import CUT, read_json_lines

METRICS_FILE = "metrics.jsonl"
_LOSS = "lm loss"


def model_card(table: ModelTable, folder: Path, iteration: int | None, arguments: dict[str, Any]) -> str:
    """The text of the card.

    Args:
        table: of the model.
        folder: of the checkpoint's iteration.
        iteration: of the training; None if the checkpoint does not say.
        arguments: of the run that saved it.
    """
    tokens = int(arguments.get("consumed_train_samples") or 0) * int(arguments.get("seq_length") or 0)
    rows = [
        ("family", table.family),
        ("layers", str(table.num_layers)),
        ("experts of a layer", str(table.num_experts) if table.num_experts else "none (dense)"),
        ("experts of a token", str(table.flags.get("moe-router-topk", "-"))),
        ("iterations", str(iteration) if iteration else "none: converted, not trained further"),
        ("tokens", f"{tokens:,}" if tokens else "-"),
        *_losses(folder),
        ("written by", f"megatron_smartmoe {__version__}"),
    ]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {_name(folder)}"]
    lines += ["", f"Converted from the Megatron checkpoint `{folder.name}` with `smartmoe convert`.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def _name(folder: Path) -> str:
    """The name of the run whose checkpoint it is, or of the folder of checkpoints."""
    directory = folder.absolute().parent
    return directory.parent.name if (directory.parent / METRICS_FILE).is_file() else directory.name


def _losses(folder: Path) -> list[tuple[str, str]]:
    """First and last loss of the run in whose directory a checkpoint lies, if it lies in one."""
    path = folder.parent.parent / METRICS_FILE
    if not path.is_file():
        return []
    try:
        lines = [
            value
            for _, value, _ in read_json_lines(Named(path=path, field="SOURCE", way_out="Restore the file."))
            if value is not CUT and isinstance(value, dict) and isinstance(value.get(_LOSS), int | float)
        ]
    except ConfigError as error:
        return [("loss", f"not known: {error}")]
    if not lines:
        return []
    return [("first logged loss", f"{lines[0][_LOSS]:.4f}"), ("last logged loss", f"{lines[-1][_LOSS]:.4f}")]
