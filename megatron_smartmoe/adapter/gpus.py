"""The GPUs of this host, as torch sees them and as the driver does: training on the CPU is never a surprise."""

from __future__ import annotations

import torch

from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.runtime.driver import Driver, TorchBuild, find_driver, why_unusable


def refuse_unusable_gpus(asked: str) -> None:
    """Called where torch sees no GPU: the host must not have one either.

    Args:
        asked: --smartmoe-device.

    Raises:
        CompatError: the driver has GPUs that this torch cannot use.
    """
    driver = find_driver()
    if driver.num_gpus:
        raise CompatError(_text(asked, driver, torch_build()))


def _text(asked: str, driver: Driver, build: TorchBuild) -> str:
    built = f"built for CUDA {build.cuda}" if build.cuda else "built without CUDA"
    number = f"{driver.num_gpus} GPU{'s' * (driver.num_gpus > 1)}"
    return (
        f"--smartmoe-device {asked}: this host has {number} ({driver}), and torch {build.version}, {built}, "
        f"can use none. {why_unusable(build, driver)} scripts/setup.sh takes another torch (SMARTMOE_TORCH); "
        "--smartmoe-device cpu trains without the GPUs."
    )


def torch_build() -> TorchBuild:
    """The installed torch, and what CUDA says when it is asked."""
    return TorchBuild(version=torch.__version__, cuda=torch.version.cuda, why=why_no_cuda())


def why_no_cuda() -> str | None:
    """What CUDA says when it is asked; None where it works."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None


def refuse_unusable_ops(device: torch.device) -> None:
    """Call a compiled op on this rank's GPU before anything is built: later the first MoE layer would end every rank.

    A library that was built elsewhere may be for other GPUs, or for a newer CUDA than the driver serves: it brings its
    own CUDA runtime.

    Raises:
        CompatError: the op cannot run there.
    """
    from megatron_smartmoe import ops
    from megatron_smartmoe.ops.library import BUILD_COMMAND, LIBRARY

    try:
        ids_TK = torch.zeros(1, 1, device=device, dtype=torch.int32)
        ops.dispatch_map(ids_TK, ids_TK[0], 1)[1].cpu()
    except RuntimeError as error:
        driver = find_driver()
        raise CompatError(
            f"the compiled ops cannot run on {device}: {str(error).splitlines()[0]} ({driver}). Build them for this "
            f"machine, with a CUDA toolkit that its driver serves: {BUILD_COMMAND}. Without {LIBRARY} the ops run on "
            "plain torch, slowly."
        ) from error
