"""What SOURCE is: recognised by what lies in it, and said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_smartmoe.checkpoint.directory import RELEASE, TRACKER, folder_of, iteration_of, iterations, read_tracker
from megatron_smartmoe.checkpoint.inspection import inspect
from megatron_smartmoe.checkpoint.rank_files import RANK_FILE
from megatron_smartmoe.checkpoint.resume import choose_resume
from megatron_smartmoe.checkpoint.torch_dist import INDEX_FILE, is_torch_dist
from megatron_smartmoe.convert.hf_config import CONFIG_FILE
from megatron_smartmoe.convert.hf_tensors import INDEX_FILE as HF_INDEX_FILE
from megatron_smartmoe.errors import CheckpointError, ConfigError

type Kind = Literal["hf", "torch_dist", "torch"]
KINDS: tuple[Kind, ...] = ("hf", "torch_dist", "torch")
_PICKLES = ("pytorch_model*.bin", "*.pth", "consolidated*.pt")
_WORDS = {
    "hf": "a Hugging Face model",
    "torch_dist": "a torch_dist checkpoint of Megatron's",
    "torch": "a checkpoint in Megatron's older torch format (mp_rank_*)",
}
_CHECKPOINTS = "checkpoints"  # folder of a run directory


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is converted.

    Attributes:
        kind: its format.
        folder: that holds its files: of the model, or of one iteration.
        said: what it is, for a line.
    """

    kind: Kind
    folder: Path
    said: str


def recognise(path: Path, wanted: Kind | None = None) -> Source:
    """What a path is. A checkpoint is read once for the checksums of its manifest, if it has one.

    Args:
        path: a folder.
        wanted: the format that the user says it is; None to find out.

    Raises:
        ConfigError: it is none of the formats, not the one that is wanted, or not whole.
    """
    if not path.is_dir():
        raise ConfigError("SOURCE", str(path), "is no directory", "Pass the folder of a model, a checkpoint or a run.")
    if wanted == "hf" or (wanted is None and _is_hugging_face(path)):
        _refuse_pickles(path)
        if not (path / CONFIG_FILE).is_file():
            raise ConfigError("SOURCE", str(path), f"has no {CONFIG_FILE}", "Pass the folder of a Hugging Face model.")
        return Source(kind="hf", folder=path, said=f"{path} is {_WORDS['hf']}")
    folder, of_run = _iteration(path)
    kind = _kind_of(folder)
    if kind is None:
        rule = "is neither a Hugging Face model (config.json and safetensors files) nor a checkpoint of Megatron's"
        raise ConfigError("SOURCE", str(path), rule, "Pass a folder with one of these, or a run directory.")
    if wanted is not None and kind != wanted:
        rule = f"{folder} is {_WORDS[kind]}"
        raise ConfigError("--from", wanted, rule, f"Pass --from {kind}, or leave it out.")
    if not of_run:
        found = inspect(folder, "full")
        if found.problems:
            rule = f"is damaged: {found.problems[0]}"
            raise ConfigError("SOURCE", str(folder), rule, "Restore it, or pass another checkpoint.")
    run = f"the run {path}: its newest whole checkpoint {folder.name}" if of_run else str(folder)
    return Source(kind=kind, folder=folder, said=f"{run} is {_WORDS[kind]}")


def _is_hugging_face(path: Path) -> bool:
    has_weights = (path / HF_INDEX_FILE).is_file() or any(path.glob("*.safetensors"))
    return (path / CONFIG_FILE).is_file() and (has_weights or any(any(path.glob(name)) for name in _PICKLES))


def _refuse_pickles(path: Path) -> None:
    if (path / HF_INDEX_FILE).is_file() or any(path.glob("*.safetensors")):
        return
    found = sorted(file.name for name in _PICKLES for file in path.glob(name))
    if found:
        rule = f"has its weights as pickles ({found[0]}), which could run code and are not read"
        way_out = "Save it with transformers: model.save_pretrained(FOLDER) writes safetensors."
        raise ConfigError("SOURCE", str(path), rule, way_out)


def _kind_of(folder: Path) -> Kind | None:
    if is_torch_dist(folder) or (folder / INDEX_FILE).is_file():
        return "torch_dist"
    return "torch" if any(folder.glob(f"mp_rank_*/{RANK_FILE}")) else None


def _iteration(path: Path) -> tuple[Path, bool]:
    """The folder of an iteration that a path stands for, and whether the path is a run directory."""
    if iteration_of(path) is not None or path.name == RELEASE or _kind_of(path) is not None:
        return path, False
    of_run = not (path / TRACKER).is_file() and (path / _CHECKPOINTS).is_dir()
    directory = path / _CHECKPOINTS if of_run else path
    if of_run:
        chosen = choose_resume(directory, level="full")
        if chosen.found is None:
            rule = chosen.problem or f"has no checkpoint in {directory}"
            raise ConfigError("SOURCE", str(path), rule, "Pass a run that has saved one.")
        return chosen.found.folder, True
    try:
        tracked = read_tracker(directory)
    except CheckpointError as error:
        raise ConfigError("SOURCE", str(path), str(error), "Pass the folder of one iteration.") from None
    if tracked is None:
        there = iterations(directory)
        return (folder_of(directory, there[0]) if len(there) == 1 else path), False
    return (directory / RELEASE if isinstance(tracked, str) else folder_of(directory, tracked)), False
