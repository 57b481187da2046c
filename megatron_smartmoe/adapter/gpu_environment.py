"""Environment variables of a GPU run that follow from its flags. What the user has set is never changed.

CUDA reads them when it makes its context, so they are set when the flags are checked: in the launcher, whose ranks
inherit them, or in a rank that torchrun or srun started.
"""

from __future__ import annotations

import ctypes
import os
from argparse import Namespace

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10  # the first major compute capability that needs no launch order
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h


def gpu_environment(args: Namespace, capability: tuple[int, int]) -> dict[str, str]:
    """The variables that a run should have.

    Args:
        args: Megatron's arguments, as parsed.
        capability: compute capability of the GPUs; (0, 0) if it is not known.
    """
    wanted = {}
    parallel = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    fsdp = args.use_megatron_fsdp or args.use_torch_fsdp2
    if args.overlap_moe_expert_parallel_comm:
        wanted[CONNECTIONS] = "32"  # its two streams of kernels need queues of their own
    elif parallel and not fsdp and capability[0] < _BLACKWELL:
        # Megatron asserts it before Blackwell: communication has to start in the order in which it was issued, ahead of
        # the GEMM that it overlaps with. With FSDP it asserts the opposite.
        wanted[CONNECTIONS] = "1"
    if args.smartmoe:
        # Operations of two communicators, of replicas and of tokens, start in the order in which the host issued them:
        # otherwise each could hold the multiprocessors that the other waits for. NCCL has it since 2.26.
        wanted["NCCL_LAUNCH_ORDER_IMPLICIT"] = "1"
    return wanted


def set_gpu_environment(args: Namespace, *, cpu: bool) -> None:
    """Set the variables that the user has not set. On CPU ranks they mean nothing, but Megatron asserts the first."""
    capability = (0, 0) if cpu else capability_without_context()
    for name, value in gpu_environment(args, capability).items():
        os.environ.setdefault(name, value)


def capability_without_context() -> tuple[int, int]:
    """Compute capability of the first visible GPU, asked of the driver; (0, 0) if it does not answer.

    torch would make the CUDA context for it, in which the variables above are read.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, 0
    device, values = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return 0, 0
    for value, attribute in zip(values, (_MAJOR, _MINOR), strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return 0, 0
    return values[0].value, values[1].value
