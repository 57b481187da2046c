"""What a run loads is what was saved: files are compared before Megatron reads them, numbers after it has.

Before: every file that the manifest lists is read once, by one of the ranks, and its size and checksum are compared.
After: digests of the model and the optimizer as they lie in memory are compared with those of the save. That also finds
a load that went wrong, at any parallelism, for the digests do not depend on it.
"""

from __future__ import annotations

import functools
import heapq
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_smartmoe.adapter.checkpoint.digests import DigestPart, LocalDigests, combined
from megatron_smartmoe.adapter.checkpoint.folders import NON_PERSISTENT
from megatron_smartmoe.adapter.checkpoint.held import held_tensors
from megatron_smartmoe.adapter.flags.checkpoint_check import check_state
from megatron_smartmoe.adapter.flags.resume import checkpoint_to_load, take_up_whole_checkpoint, what_is_there
from megatron_smartmoe.checkpoint.contents import WORDS
from megatron_smartmoe.checkpoint.digest import KINDS, WEIGHT
from megatron_smartmoe.checkpoint.directory import folder_of, iteration_of, iterations, listed, read_tracker
from megatron_smartmoe.checkpoint.inspection import inspect, readable_bytes
from megatron_smartmoe.checkpoint.manifest import (
    FileEntry,
    Level,
    Manifest,
    ParameterDigest,
    check_files,
)
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, CheckpointError, ConfigError, SmartMoEError


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """The checkpoint that will be loaded.

    Attributes:
        folder: of its iteration.
        manifest: its manifest; None without one.
        said: what was checked so far, for the line that reports it.
    """

    folder: Path
    manifest: Manifest | None
    said: str


class CheckpointLoads:
    """Megatron's load, with what is compared before and after it; `hooks.attach_checkpoints` puts it around that."""

    def around_load_checkpoint(self, load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Around the training loop's `load_checkpoint`."""

        @functools.wraps(load_checkpoint)
        def checked_load(ddp_model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            load_arg = args[1] if len(args) > 1 else kwargs.get("load_arg", "load")
            if load_arg != "load":
                return load_checkpoint(ddp_model, optimizer, *args, **kwargs)
            checked = _on_all_ranks(functools.partial(check_before, get_args()))
            result = load_checkpoint(ddp_model, optimizer, *args, **kwargs)
            if checked is not None:
                _on_all_ranks(functools.partial(check_after, get_args(), checked, ddp_model, optimizer))
            return result

        return checked_load


def _on_all_ranks(check: Callable[[], Any]) -> Any:
    """What `check` returns. An error, which it raises on all ranks alike, is printed once and ends them.

    Raises:
        SystemExit: the check failed.
    """
    try:
        return check()
    except SmartMoEError as error:
        if dist.get_rank() == 0:
            print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CONFIG_ERROR) from None


def check_before(args: Namespace) -> _Checked | None:
    """Compare the files of the checkpoint that Megatron is about to load. A collective call of all ranks.

    With `--smartmoe-resume newest-whole` a damaged checkpoint is left out, and `args.ckpt_step` set to the one before.
    The folder that is loaded is noted in `args.smartmoe_loaded_folder`.

    Returns:
        The checkpoint; None where there is nothing to load.

    Raises:
        ConfigError: it is damaged; on all ranks alike.
    """
    args.smartmoe_loaded_folder = None
    if args.load is None or "://" in args.load or args.non_persistent_ckpt_type == "local":
        return None
    asked, damaged = args.ckpt_step, dict[int, str]()
    while True:
        # Step 1: the checkpoint, chosen by one rank.
        folder, line, args.ckpt_step = from_rank_0(functools.partial(_choose, args, asked, damaged))
        if folder is None:
            if line and dist.get_rank() == 0:
                print(f" smartmoe: {line}", flush=True)
            return None
        # Step 2: its files, compared by all ranks.
        problem, checked = _check(folder, args.smartmoe_checkpoint_check)
        iteration = iteration_of(folder)
        if problem is None:
            break
        if folder.parent != Path(args.load):
            rule = f"the non-persistent checkpoint {folder} is damaged: {problem}"
            way_out = "Remove the flag to resume from the checkpoints that stay."
            raise ConfigError("--non-persistent-ckpt-type", args.non_persistent_ckpt_type, rule, way_out)
        if args.smartmoe_resume != "newest-whole" or iteration is None:
            rule = f"{folder.name} is damaged: {problem}"
            way_out = from_rank_0(functools.partial(what_is_there, folder.parent, damaged=folder))
            raise ConfigError("--load", args.load, rule, way_out)
        damaged[iteration] = problem
    for text in (line, _newer(folder)) if dist.get_rank() == 0 else ():
        if text:
            print(f" smartmoe: {text}", flush=True)
    # Step 3: whether its state fits this run, for ranks that no launcher has started.
    from_rank_0(functools.partial(check_state, args))
    args.smartmoe_loaded_folder = str(folder)
    return checked


def check_after(args: Namespace, checked: _Checked, ddp_model: Any, optimizer: Any) -> None:
    """Compare what was loaded with what was saved, by digests, and say what has been checked. A collective call.

    Raises:
        ConfigError: something differs; on all ranks alike.
    """
    said, manifest = checked.said, checked.manifest
    if manifest is not None and args.smartmoe_checkpoint_check == "full":
        said += f"; {_compared_numbers(args, manifest, checked.folder, ddp_model, optimizer)}"
    if dist.get_rank() == 0:
        print(f" smartmoe: checkpoint {checked.folder.name}: {said}", flush=True)


def _compared_numbers(args: Namespace, manifest: Manifest, folder: Path, ddp_model: Any, optimizer: Any) -> str:
    """Compare digests, and say how many; see `check_after`."""
    if not manifest.digests:
        return "it has no digests to compare what was loaded with"
    started, saved = time.perf_counter(), {(entry.name, entry.kind): entry for entry in manifest.digests}
    with_optimizer = _loads_optimizer(args, saved)
    # Step 1: what this rank holds; no model is an error here that Megatron could load.
    own: DigestPart | str
    try:
        held, _ = held_tensors(unwrap_model(list(ddp_model)), optimizer if with_optimizer else None)
        local = LocalDigests(held, args.num_experts or 0)
        local.compute()
        own = local.part()
    except Exception as error:
        own = f"{type(error).__name__}: {error}"
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, parts if dist.get_rank() == 0 else None, dst=0)
    # Step 2: the digests over all ranks, compared by one of them.
    problem, wrong, compared, num_loaded = from_rank_0(functools.partial(_compare_parts, parts, saved))
    if problem:
        return f"what was loaded could not be compared: {problem}"
    if wrong:
        rule = f"what was loaded from {folder} is not what was saved: {wrong} differs"
        way_out = "Pass --ckpt-step N for another iteration, or --smartmoe-checkpoint-check sizes to train with it all "
        raise ConfigError("--load", args.load, rule, way_out + "the same.")
    seconds = time.perf_counter() - started
    others = f" ({num_loaded - compared} have other shapes or types here)" if compared < num_loaded else ""
    kinds = "weights, main weights and moments" if with_optimizer else "weights"
    return f"{kinds} as loaded have the digests of the save: {compared} tensors{others}, {seconds:.2f} s"


def _compare_parts(
    parts: Sequence[DigestPart | str], saved: Mapping[tuple[str, str], ParameterDigest]
) -> tuple[str, str, int, int]:
    """On rank 0: why a rank has nothing to compare, what differs, how many parameters were compared, of how many."""
    problems = [part for part in parts if isinstance(part, str)]
    if problems:
        return problems[0], "", 0, 0
    loaded = combined(part for part in parts if isinstance(part, DigestPart))
    return "", *_compare(loaded, saved), len(loaded)


def from_rank_0(decide: Callable[[], Any]) -> Any:
    """What `decide` returns or raises on rank 0, on all ranks: files may change between two looks at them."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [decide()]
        except SmartMoEError as error:
            result = [error]
        except OSError as error:
            result = [CheckpointError(str(error.filename), "cannot be read or written", error.strerror or "")]
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], SmartMoEError):
        raise result[0]
    return result[0]


def _choose(
    args: Namespace, asked: int | None, damaged: Mapping[int, str]
) -> tuple[Path | None, str | None, int | None]:
    """On rank 0: the checkpoint to load, what is done instead of what the tracker says, and `ckpt_step` for that.

    Raises:
        ConfigError: there is none that could be loaded.
    """
    args.ckpt_step, line = asked, None
    if args.smartmoe_resume == "newest-whole":
        folder, line = take_up_whole_checkpoint(args, damaged)
    else:
        folder = checkpoint_to_load(args)
    newer = _non_persistent(args, -1 if folder is None else iteration_of(folder) or 0)
    return newer or folder, line, args.ckpt_step


def _non_persistent(args: Namespace, iteration: int) -> Path | None:
    """On rank 0: the checkpoint that Megatron loads instead of one that stays and is not newer, if there is one."""
    if args.non_persistent_ckpt_type != "global":
        return None
    directory = Path(args.non_persistent_global_ckpt_dir or Path(args.load) / NON_PERSISTENT)
    found = read_tracker(directory)
    return folder_of(directory, found) if isinstance(found, int) and found >= iteration else None


def _newer(folder: Path) -> str:
    """On rank 0: what is beside a checkpoint and newer, such as a save that was interrupted; nothing if nothing is."""
    iteration = iteration_of(folder)
    newer = [step for step in iterations(folder.parent) if iteration is not None and step > iteration]
    if not newer:
        return ""
    half = [step for step in newer if inspect(folder_of(folder.parent, step)).manifest is None]
    states = [f"half-written: {listed(half)}"] if half else []
    states += [f"later: {listed(others)}"] if (others := [step for step in newer if step not in half]) else []
    unused = f"{folder.parent} has checkpoints newer than iteration {iteration} that are not used ({'; '.join(states)})"
    return f"{unused}; training replaces those whose iterations it saves"


def _check(folder: Path, level: Level) -> tuple[str | None, _Checked | None]:
    """Compare a checkpoint's files with its manifest: what is wrong, or what was checked. A collective call."""
    if level == "off":
        return None, _Checked(folder=folder, manifest=None, said="not checked (--smartmoe-checkpoint-check off)")
    started = time.perf_counter()
    manifest: Manifest | str | None = from_rank_0(lambda: _manifest_or_problem(folder))
    if isinstance(manifest, str):
        return manifest, None
    if manifest is None:
        said = (
            "it has no manifest (it was saved by other software or an earlier version): changed bytes cannot be found"
        )
        return None, _Checked(folder=folder, manifest=None, said=said)
    names = _shares(manifest.files, dist.get_world_size())[dist.get_rank()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, check_files(folder, manifest, level, names=names))
    damages = {damage.name: damage for of_rank in found for damage in of_rank}
    if damages:
        first = next(damages[entry.name] for entry in manifest.files if entry.name in damages)
        others = len(damages) - 1
        more = f" ({others} more file{'s' * (others > 1)} damaged)" if others else ""
        return f"{first}{more}", None
    seconds, what = time.perf_counter() - started, "sizes and checksums" if level == "full" else "sizes"
    files = f"{len(manifest.files)} file{'s' * (len(manifest.files) != 1)} ({readable_bytes(manifest.size_bytes)})"
    have = "has" if len(manifest.files) == 1 else "have"
    said = f"{files} {have} the {what} of the save, {seconds:.2f} s"
    return None, _Checked(folder=folder, manifest=manifest, said=said)


def _manifest_or_problem(folder: Path) -> Manifest | str | None:
    """On rank 0: what is to be compared; a text if something is wrong already."""
    found = inspect(folder)
    return found.manifest if found.is_whole else found.problem


def _shares(files: Sequence[FileEntry], num_ranks: int) -> list[set[str]]:
    """The names of the files that each rank reads: each file once, and about as many bytes for every rank."""
    shares: list[set[str]] = [set() for _ in range(num_ranks)]
    heap = [(0, rank) for rank in range(num_ranks)]
    for entry in sorted(files, key=lambda entry: (-entry.size_bytes, entry.name)):
        size_bytes, rank = heapq.heappop(heap)
        shares[rank].add(entry.name)
        heapq.heappush(heap, (size_bytes + entry.size_bytes, rank))
    return shares


def _loads_optimizer(args: Namespace, saved: Mapping[tuple[str, str], ParameterDigest]) -> bool:
    has_state = any(kind != WEIGHT for _, kind in saved)
    return has_state and not (args.no_load_optim or args.finetune)


def _compare(loaded: Sequence[ParameterDigest], saved: Mapping[tuple[str, str], ParameterDigest]) -> tuple[str, int]:
    """What differs, in words, and how many parameters could be compared."""
    wrong, compared = [], 0
    for entry in sorted(loaded, key=lambda entry: (KINDS.index(entry.kind), entry.name)):
        there = saved.get((entry.name, entry.kind))
        if there is None or (there.dtype, there.shape, len(there.digests)) != (
            entry.dtype,
            entry.shape,
            len(entry.digests),
        ):
            continue
        compared += 1
        experts = [e for e, (a, b) in enumerate(zip(entry.digests, there.digests, strict=True)) if a != b]
        if experts:
            which = f", expert {experts[0]}" if len(entry.digests) > 1 else ""
            wrong.append(f"{entry.name}{which}, {WORDS[entry.kind]}")
    others = len(wrong) - 1
    more = f" (and {others} more tensor{'s' * (others > 1)})" if others > 0 else ""
    return (wrong[0] + more if wrong else ""), compared
