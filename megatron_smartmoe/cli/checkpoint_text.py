"""What `smartmoe checkpoint` prints, and writes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_smartmoe.checkpoint.compare import Comparison, Difference
from megatron_smartmoe.checkpoint.contents import WORDS, Contents
from megatron_smartmoe.checkpoint.digest import KINDS
from megatron_smartmoe.checkpoint.inspection import readable_bytes
from megatron_smartmoe.checkpoint.manifest import Manifest
from megatron_smartmoe.checkpoint.verify import Verification
from megatron_smartmoe.errors import SmartMoEError
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.secrets import MASK, is_secret_flag

_WIDTH = 16  # of the first column
_MOST_FINDINGS = 50
# The arguments that say what the model is and how it was trained, in the order in which they are printed.
_MODEL = (
    "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size moe_ffn_hidden_size num_experts "
    "moe_router_topk seq_length padded_vocab_size"
).split()
_LAYOUT = (
    "world_size tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size context_parallel_size"
).split()
_TRAINING = (
    "micro_batch_size global_batch_size train_iters lr bf16 fp16 use_distributed_optimizer "
    "dist_ckpt_optim_fully_reshardable smartmoe smartmoe_experts smartmoe_homes smartmoe_spare_slots"
).split()
_WAY_OUT_OF_MAIN_WEIGHTS = (
    "megatron-core up to 0.19.2 saves optimizer state like that from several gradient buckets "
    "(--dist-ckpt-optim-fully-reshardable with --overlap-grad-reduce), and the weights are right: resume with "
    "--no-load-optim, or from an iteration that was saved without one of these flags"
)


def verification(result: Verification) -> list[str]:
    """What was checked and what is wrong, and a verdict at the end."""
    look, damaged = result.inspection, [f for f in result.findings if f.severity == "damage"]
    manifest = look.manifest
    of_files = f"{_count(look.num_files, 'file')}, {readable_bytes(look.size_bytes)}"
    how = "no manifest: names and sizes as far as the format has them"
    if manifest is not None:
        how = "sizes and checksums compared with the manifest"
    lines = [str(look.folder), _line("files", f"{of_files}; {how}")]
    if result.num_parameters:
        lines.append(_line("parameters", f"{result.num_parameters:,} (of each layer and expert), all numbers read"))
    if result.num_digests:
        lines.append(_line("digests", f"{result.num_digests:,} compared with the ranks' memory at the save"))
    if result.num_main_weights:
        lines.append(_line("main weights", f"of {result.num_main_weights:,} parameters compared with the weights"))
    lines += [_line("not checked", what) for what in result.not_checked]
    shown = result.findings[:_MOST_FINDINGS]
    lines += [_line("DAMAGED" if finding.severity == "damage" else "warning", str(finding)) for finding in shown]
    if len(shown) < len(result.findings):
        lines.append(_line("", f"and {len(result.findings) - len(shown):,} more; --json writes all"))
    if any(finding.kind == "main_weights" for finding in damaged):
        lines.append(_line("way out", _WAY_OUT_OF_MAIN_WEIGHTS))
    verdict = "whole" if not damaged else f"damaged: {_count(len(damaged), 'finding')}"
    return [*lines, _line("result", verdict)]


def verification_json(result: Verification) -> dict[str, Any]:
    """The same as JSON."""
    look = result.inspection
    return {
        "folder": str(look.folder),
        "format": look.format,
        "whole": result.is_whole,
        "manifest": look.manifest is not None,
        "files": look.num_files,
        "size_bytes": look.size_bytes,
        "parameters": result.num_parameters,
        "digests": result.num_digests,
        "main_weights": result.num_main_weights,
        "not_checked": list(result.not_checked),
        "findings": [asdict(finding) for finding in result.findings],
    }


def contents(found: Contents, manifest: Manifest | None, *, all_arguments: bool) -> list[str]:
    """Iteration, sizes, arguments and placement of a checkpoint."""
    sizes = _sizes(found)
    lines = [str(found.folder), _line("iteration", "unknown" if found.iteration is None else f"{found.iteration:,}")]
    samples = _samples(found, manifest)
    if samples is not None:
        lines.append(_line("samples", f"{samples:,} consumed"))
    if manifest is None:
        lines.append(_line("manifest", "none: saved by other software or an earlier version"))
    else:
        software = ", ".join(f"{name} {version}" for name, version in manifest.software.items())
        files = f"{len(manifest.files):,} files, {readable_bytes(manifest.size_bytes)}"
        lines.append(_line("manifest", f"{files}{'; ' + software if software else ''}"))
    for kind, (elements, size_bytes, types) in sizes.items():
        what = f"{elements:,} numbers, {readable_bytes(size_bytes)}, {', '.join(types)}"
        lines.append(_line(f"{WORDS[kind]}s", what))
    if found.buffers:
        what = f"{len(found.buffers)} buffers of the distributed optimizer, {sum(found.buffers.values()):,} numbers"
        lines.append(_line("buffers", what))
    arguments = _arguments(found)
    if all_arguments:
        lines += [_line("argument", f"{name} = {value}") for name, value in sorted(arguments.items())]
    else:
        for name, wanted in (("model", _MODEL), ("layout", _LAYOUT), ("training", _TRAINING)):
            shown = [f"{key} {arguments[key]}" for key in wanted if arguments.get(key) not in (None, False)]
            lines += [_line(name, ", ".join(shown))] if shown else []
    return [*lines, *_placement(found, manifest)]


def contents_json(found: Contents, manifest: Manifest | None) -> dict[str, Any]:
    """The same as JSON, with all arguments."""
    return {
        "folder": str(found.folder),
        "iteration": found.iteration,
        "consumed_samples": _samples(found, manifest),
        "manifest": manifest is not None,
        "files": None if manifest is None else len(manifest.files),
        "size_bytes": None if manifest is None else manifest.size_bytes,
        "software": {} if manifest is None else dict(manifest.software),
        "numbers": {
            kind: {"elements": elements, "size_bytes": size_bytes, "types": types}
            for kind, (elements, size_bytes, types) in _sizes(found).items()
        },
        "buffers": dict(found.buffers),
        "arguments": _arguments(found),
        "placement": _placement_json(found, manifest),
    }


def comparison(result: Comparison, first: Path, second: Path, most: int) -> list[str]:
    """What differs, the largest relative difference first."""
    lines = [_line("A", str(first)), _line("B", str(second))]
    how = f"by the digests of the {result.digests_from}"
    lines.append(_line("equal", f"{result.num_equal:,} parameters of layers and experts, {how}"))
    if result.buffers:
        lines.append(
            _line("not compared", f"optimizer state, saved buffer by buffer in {' and '.join(result.buffers)}")
        )
    for name, keys in (("only in A", result.only_in_first), ("only in B", result.only_in_second)):
        lines += [_line(name, str(key)) for key in keys[:most]]
        if len(keys) > most:
            lines.append(_line("", f"and {len(keys) - most:,} more"))
    ordered = sorted(result.differences, key=lambda found: (found.what is None, -found.relative))
    lines += [_line("differs", _difference(found)) for found in ordered[:most]]
    if len(ordered) > most:
        lines.append(_line("", f"and {len(ordered) - most:,} more; --most and --json show them"))
    verdict = "equal to the bit" if result.is_equal else "different"
    if not result.is_equal:
        experts = {(found.key.name, found.key.expert) for found in result.differences if found.key.expert is not None}
        others = {found.key.name for found in result.differences if found.key.expert is None}
        verdict += f" in {_count(len(others), 'parameter')} and {_count(len(experts), 'matrix', 'matrices')} of experts"
    return [*lines, _line("result", verdict)]


def comparison_json(result: Comparison, first: Path, second: Path) -> dict[str, Any]:
    """The same as JSON, with everything that differs."""
    return {
        "a": str(first),
        "b": str(second),
        "equal": result.is_equal,
        "equal_parameters": result.num_equal,
        "digests_from": result.digests_from,
        "only_in_a": [key._asdict() for key in result.only_in_first],
        "only_in_b": [key._asdict() for key in result.only_in_second],
        "not_compared": list(result.buffers),
        "differences": [
            {
                **found.key._asdict(),
                "elements": found.num_elements,
                "differing": found.num_differing,
                "largest": found.largest,
                "relative": found.relative,
                "what": found.what,
            }
            for found in result.differences
        ],
    }


def _line(name: str, what: str) -> str:
    return f"{name:<{_WIDTH}}{what}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _difference(found: Difference) -> str:
    if found.what is not None:
        return f"{found.key}: {found.what}"
    return (
        f"{found.key}: {found.num_differing:,} of {found.num_elements:,} numbers, by up to {found.largest:.3g} "
        f"(relative {found.relative:.3g})"
    )


def _sizes(found: Contents) -> dict[str, tuple[int, int, list[str]]]:
    """Numbers, bytes and types of each kind of tensor."""
    sizes: dict[str, tuple[int, int, list[str]]] = {}
    for kind in KINDS:
        tensors = [part.tensor for key, parts in found.parameters.items() if key.kind == kind for part in parts]
        if tensors:
            types = sorted({tensor.dtype for tensor in tensors})
            sizes[kind] = sum(t.num_elements for t in tensors), sum(t.size_bytes for t in tensors), types
    return sizes


def _samples(found: Contents, manifest: Manifest | None) -> int | None:
    samples = manifest.consumed_samples if manifest is not None else None
    samples = samples if samples is not None else found.arguments.get("consumed_train_samples")
    return samples if isinstance(samples, int) else None


def _arguments(found: Contents) -> dict[str, Any]:
    """Arguments as JSON; values of other types as their text, and secrets masked."""
    arguments: dict[str, Any] = {}
    for name, value in found.arguments.items():
        if name == "smartmoe_placement":
            continue
        plain = value if isinstance(value, bool | int | float | str | None) else str(value)
        is_secret = isinstance(value, str) and is_secret_flag(name.replace("_", "-"), value)
        arguments[name] = MASK if is_secret else plain
    return arguments


def _placement_of(found: Contents, manifest: Manifest | None) -> Placement | str | None:
    """Where experts lived; a text if it cannot be read, None if there is none."""
    content = manifest.placement if manifest is not None else None
    content = content if content is not None else found.arguments.get("smartmoe_placement")
    if not isinstance(content, Mapping):
        return None
    try:
        return Placement.from_json(content)
    except (SmartMoEError, KeyError, TypeError, ValueError, OverflowError) as error:
        return f"cannot be read: {error!s:.200}"


def _placement(found: Contents, manifest: Manifest | None) -> list[str]:
    placement = _placement_of(found, manifest)
    if placement is None or isinstance(placement, str):
        return [_line("placement", placement or "none: experts are where Megatron puts them")]
    ranks, slots = placement.slots_LRS.shape[1:]
    lines = [_line("placement", f"{placement.num_layers} layers, {ranks} ranks of {slots} slots")]
    for layer, slots_RS in enumerate(placement.slots_LRS):
        homes = " | ".join(" ".join("-" if e < 0 else str(e) for e in slots_S) for slots_S in slots_RS)
        lines.append(_line("", f"layer {layer}: {homes}"))
    return lines


def _placement_json(found: Contents, manifest: Manifest | None) -> dict[str, Any] | str | None:
    placement = _placement_of(found, manifest)
    return placement.to_json() if isinstance(placement, Placement) else placement
