"""The probes of `smartmoe doctor` that import torch or Megatron. Each runs in a process of its own.

`python -m megatron_smartmoe.adapter.doctor PROBE FILE` tries what training will use and writes what it saw to FILE, as
JSON. An import that fails, hangs or kills the process is then a finding and not the end of the examination. What it
means is judged by the command line (`cli/doctor_checks.py`), which imports none of this.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


def torch_facts() -> Facts:
    """The build of torch, and the GPUs that it can use."""
    import torch

    facts: Facts = {"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    facts["gpus"] = []
    if facts["available"]:
        properties = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
        facts["gpus"] = [[found.name, f"sm_{found.major}{found.minor}"] for found in properties]
        facts["archs"] = torch.cuda.get_arch_list()
    else:
        facts["why"] = _why_no_cuda()
    return facts


def _why_no_cuda() -> str | None:
    """What CUDA says when it is asked; None where torch has none."""
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None


def ops() -> Facts:
    """Call the project's kernels on the CPU and on the first GPU, each against its twin."""
    import torch

    from megatron_smartmoe import ops as smartmoe_ops
    from megatron_smartmoe.ops import reference

    facts: Facts = {"backend": smartmoe_ops.backend(), "wrong": [], "devices": ["cpu"]}
    if torch.cuda.is_available():
        facts["devices"].append("cuda")
    for device in facts["devices"]:
        ids_TK = torch.tensor([[0, 2], [1, 2], [0, 1]], device=device, dtype=torch.int32)
        slot_of_E = torch.tensor([2, 0, 1], device=device, dtype=torch.int32)
        try:
            found, expected = (
                smartmoe_ops.dispatch_map(ids_TK, slot_of_E, 3),
                reference.dispatch_map(ids_TK, slot_of_E, 3),
            )
            if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
                facts["wrong"].append(f"{device}: another result than the torch reference")
        except RuntimeError as error:  # no kernel for this architecture
            facts["wrong"].append(f"{device}: {str(error).splitlines()[0]}")
    return facts


def megatron() -> Facts:
    """Import Megatron as training does and find every name that the project hooks."""
    from importlib import metadata

    import torch

    from megatron_smartmoe.adapter import hooks
    from megatron_smartmoe.adapter.pretrain import choose_device
    from megatron_smartmoe.errors import CompatError

    facts: Facts = {"version": metadata.version("megatron-core"), "tested": hooks.TESTED_RELEASE, "missing": None}
    cpu = choose_device("auto" if torch.cuda.is_available() else "cpu")
    try:
        hooks.prepare_megatron(cpu=cpu)
        hooks.attach([])
    except CompatError as error:
        facts["missing"] = str(error)
    return facts


def collectives() -> Facts:
    """Add up a number over two gloo ranks, and over the GPUs with NCCL."""
    import torch
    import torch.multiprocessing as multiprocessing

    facts: Facts = {"gloo": 2}
    with tempfile.TemporaryDirectory(prefix="smartmoe-") as folder:
        multiprocessing.spawn(_add_up, args=(2, "gloo", folder), nprocs=2)  # type: ignore[no-untyped-call]
        if torch.cuda.is_available():
            facts["nccl"] = min(2, torch.cuda.device_count())
            multiprocessing.spawn(_add_up, args=(facts["nccl"], "nccl", folder), nprocs=facts["nccl"])  # type: ignore[no-untyped-call]
            facts["nccl version"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return facts


def _add_up(rank: int, world_size: int, backend: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group(backend, init_method=f"file://{folder}/{backend}", rank=rank, world_size=world_size)
    number = torch.full((1,), rank + 1.0, device=torch.device("cuda", rank) if backend == "nccl" else "cpu")
    dist.all_reduce(number)
    assert number.item() == world_size * (world_size + 1) / 2, f"{backend} adds up to {number.item()}"
    dist.destroy_process_group()


def transformer_engine() -> Facts:
    """Its torch layers, which Megatron uses where the package is installed."""
    module = importlib.import_module("transformer_engine.pytorch")
    return {"version": _version("transformer_engine"), "has": hasattr(module, "TELinear") or hasattr(module, "Linear")}


def apex() -> Facts:
    """NVIDIA's optimizers and their compiled extension, as Megatron imports them."""
    if importlib.util.find_spec("apex.optimizers") is None:
        return {"version": None, "is": "another project"}
    importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    missing = [name for name in ("amp_C", "fused_layer_norm_cuda") if importlib.util.find_spec(name) is None]
    return {"version": _version("apex"), "is": "NVIDIA's", "missing": missing}


def nvidia_resiliency_ext() -> Facts:
    """Megatron's checkpoints import it where it is there, and read its version."""
    version = getattr(importlib.import_module("nvidia_resiliency_ext"), "__version__", None)
    importlib.import_module("megatron.core.dist_checkpointing")
    return {"version": version}


def deep_ep() -> Facts:
    """The interface that Megatron's flex dispatcher calls."""
    module, utils = importlib.import_module("deep_ep"), importlib.import_module("deep_ep.utils")
    missing = [f"deep_ep.utils.{name}" for name in ("EventHandle", "EventOverlap") if not hasattr(utils, name)]
    buffer = getattr(module, "Buffer", None)
    if buffer is None:
        return {"missing": ["deep_ep.Buffer", *missing]}
    used = {"dispatch": ("topk_idx", "topk_weights", "num_tokens_per_expert"), "combine": ("topk_weights",)}
    for name in ("get_dispatch_config", "get_combine_config", "get_dispatch_layout", *used):
        method = getattr(buffer, name, None)
        if method is None:
            missing.append(f"deep_ep.Buffer.{name}")
        else:
            known = inspect.signature(method).parameters
            missing += [f"{word} of deep_ep.Buffer.{name}" for word in used.get(name, ()) if word not in known]
    return {"missing": missing, "version": _version("deep_ep")}


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(importlib.import_module(package), "__version__", None)


PROBES: dict[str, Callable[[], Facts]] = {
    "torch": torch_facts,
    "ops": ops,
    "megatron": megatron,
    "collectives": collectives,
    "transformer_engine": transformer_engine,
    "apex": apex,
    "nvidia_resiliency_ext": nvidia_resiliency_ext,
    "deep_ep": deep_ep,
}


def main(argv: list[str]) -> None:
    """Run one probe; an exception is a fact too."""
    name, file = argv
    try:
        facts = PROBES[name]()
    except Exception as error:
        text = " ".join(str(error).split())
        facts = {"error": f"{type(error).__name__}: {text[:300]}"}
    Path(file).write_text(json.dumps(facts), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the ordinary end may hang in a package that is broken


if __name__ == "__main__":
    main(sys.argv[1:])
