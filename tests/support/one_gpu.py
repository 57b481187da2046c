"""Several ranks on one GPU: torch.distributed with NCCL's semantics, carried by gloo through pinned host memory.

NCCL refuses two ranks on one device, and gloo has no messages between CUDA tensors. This stands between the two, so
that everything with more than one rank can run on a machine with one GPU: `install()` before the process groups are
made. Processes that have no GPU run the same code on CPU tensors; that is how it is tested where there is none.

What is kept of NCCL, because the product depends on it:

- An operation is posted behind the current stream and runs on a stream of its group's; the host does not wait. What it
  writes holds nothing before `work.wait()`, which makes the current stream wait (on the CPU: the host).
- A group runs its operations one after the other, in the order of posting; groups run beside each other.
- A group's first operation must be one of all its ranks (`ready_groups`).
- Reads and writes are late on purpose: each waits `DELAY_S` first. So a missing wait, and memory that was freed or
  overwritten too early, show as wrong numbers.
- A batch of sends and receives has one handle. A send outside a batch has a queue for its pair of ranks.

What it cannot show: NCCL's own hangs (connections, kernels that wait for each other's SMs), and speed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from tests.support import ready_groups

DELAY_S = float(os.environ.get("ONE_GPU_DELAY_S", "0.001"))  # before an operation reads, and before it writes
_DELAY_CYCLES = (
    500_000  # of the GPU, before the copies that write: a host that is late leaves the device waiting anyway
)

Tensors = list[torch.Tensor]
Call = Callable[[Tensors, Tensors], object]  # what to do with the tensors that are read and with those that are written


class Work:
    """The handle of a posted operation."""

    def __init__(self) -> None:
        self._issued = threading.Event()
        self._error: Exception | None = None
        self._written: torch.cuda.Event | None = None
        self._keep: object = None  # as NCCL: the tensors, until somebody waits

    def wait(self, timeout: object = None) -> bool:
        """Make the current stream wait until the operation has written; raise its error if it has failed."""
        self._issued.wait()  # for the host's part; on a GPU the device's part is still to come
        if self._error is not None:
            raise self._error
        if self._written is not None:
            torch.cuda.current_stream().wait_event(self._written)
        self._keep = None
        return True

    def is_completed(self) -> bool:
        """Whether the operation has written."""
        return self._issued.is_set() and (self._written is None or self._written.query())


class _Lane:
    """A queue of operations, a thread that runs them, and on a GPU the stream that they run on."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group  # also keeps its id from being used again
        self._jobs: queue.Queue[tuple[Work, Any, Tensors, Tensors, Call]] = queue.Queue()
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        threading.Thread(target=self._run, daemon=True).start()

    def post(self, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], call: Call) -> Work:
        """Queue an operation."""
        work, behind = Work(), None
        if any(tensor.is_cuda for tensor in (*reads, *writes)):
            behind = torch.cuda.Event()
            behind.record(torch.cuda.current_stream())
        read, written = [t.detach() for t in reads], [t.detach() for t in writes]
        work._keep = (read, written)
        self._jobs.put((work, behind, read, written, call))
        return work

    def _run(self) -> None:
        while True:
            work, behind, reads, writes, call = self._jobs.get()
            try:
                if behind is None:
                    _on_host(reads, writes, call)
                else:
                    self._on_device(work, behind, reads, writes, call)
            except Exception as error:  # raised where the operation is waited for, as NCCL's are
                work._error = error
            del reads, writes, call  # nothing but the work holds them, as in NCCL
            work._issued.set()

    def _on_device(self, work: Work, behind: Any, reads: Tensors, writes: Tensors, call: Call) -> None:
        stream = self._stream
        assert stream is not None
        with torch.cuda.stream(stream):
            stream.wait_event(behind)
            time.sleep(DELAY_S)
            # Step 1: what is read goes to the host
            ins, outs = [_pinned(tensor) for tensor in reads], [_pinned(tensor) for tensor in writes]
            for host, tensor in zip(ins, reads, strict=True):
                host.copy_(tensor, non_blocking=True)
            stream.synchronize()
            # Step 2: the operation itself
            call(ins, outs)
            # Step 3: what is written comes back, late
            torch.cuda._sleep(_DELAY_CYCLES)
            for host, tensor in zip(outs, writes, strict=True):
                tensor.copy_(host, non_blocking=True)
            work._written = torch.cuda.Event()
            work._written.record(stream)


def _on_host(reads: Tensors, writes: Tensors, call: Call) -> None:
    """As on a device: results stay in other memory until they are written, late."""
    time.sleep(DELAY_S)
    outs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in writes]
    call([tensor.contiguous() for tensor in reads], outs)
    time.sleep(DELAY_S)
    for tensor, out in zip(writes, outs, strict=True):
        tensor.copy_(out)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


_lanes: dict[tuple[int, int | None], _Lane] = {}
_ready: set[int] = set()  # groups in which a collective was posted
_lock = threading.Lock()  # autograd posts from threads of its own
_coalescing: list[Work] | None = None  # works of the coalescing manager that is open


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group or dist.group.WORLD
    assert group is not None, "init_process_group was not called"
    return group


def _lane(group: dist.ProcessGroup, peer: int | None = None) -> _Lane:
    """The group's lane; with a peer, that of the messages to and from it that are in no batch."""
    with _lock:
        if (id(group), peer) not in _lanes:
            _lanes[id(group), peer] = _Lane(group)
        if peer is None:
            _ready.add(id(group))
        return _lanes[id(group), peer]


def _collective(
    group: dist.ProcessGroup | None,
    reads: Sequence[torch.Tensor],
    writes: Sequence[torch.Tensor],
    call: Callable[[dist.ProcessGroup, Tensors, Tensors], object],
    *,
    async_op: bool,
) -> Work | None:
    own = _group(group)
    work = _lane(own).post(reads, writes, lambda ins, outs: call(own, ins, outs))
    if _coalescing is not None:
        _coalescing.append(work)
        return work
    if async_op:
        return work
    work.wait()
    return None


def _sizes(sizes: Any) -> list[int]:
    return [] if sizes is None else [int(size) for size in sizes]


def _root(group: dist.ProcessGroup, rank: int | None, group_rank: int | None) -> int:
    return group_rank if group_rank is not None else dist.get_group_rank(group, 0 if rank is None else rank)


def _reduce(group: dist.ProcessGroup, tensor: torch.Tensor, op: Any) -> torch.Tensor:
    options = c10d.AllreduceOptions()
    options.reduceOp = op
    group.allreduce([tensor], options).wait()
    return tensor


def _broadcast(group: dist.ProcessGroup, tensor: torch.Tensor, root: int) -> None:
    options = c10d.BroadcastOptions()
    options.rootRank, options.rootTensor = root, 0
    group.broadcast([tensor], options).wait()


def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Work | None:
    """See torch.distributed."""

    def call(own: dist.ProcessGroup, ins: Tensors, outs: Tensors) -> None:
        outs[0].copy_(_reduce(own, ins[0].clone(), op))

    return _collective(group, [tensor], [tensor], call, async_op=async_op)


def broadcast(
    tensor: Any, src: int | None = None, group: Any = None, async_op: bool = False, group_src: int | None = None
) -> Work | None:
    """See torch.distributed."""
    root = _root(_group(group), src, group_src)

    def call(own: dist.ProcessGroup, ins: Tensors, outs: Tensors) -> None:
        outs[0].copy_(ins[0])
        _broadcast(own, outs[0], root)

    return _collective(group, [tensor], [tensor], call, async_op=async_op)


def all_gather(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Work | None:
    """See torch.distributed; the shapes may differ, as on NCCL."""

    def call(own: dist.ProcessGroup, ins: Tensors, outs: Tensors) -> None:
        outs[own.rank()].copy_(ins[0])
        for rank, out in enumerate(outs):
            _broadcast(own, out, rank)

    return _collective(group, [tensor], list(tensor_list), call, async_op=async_op)


def all_gather_into_tensor(
    output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False
) -> Work | None:
    """See torch.distributed."""

    def call(own: dist.ProcessGroup, ins: Tensors, outs: Tensors) -> None:
        parts = list(outs[0].view(own.size(), -1).unbind())
        own.allgather([parts], [ins[0].reshape(-1)]).wait()

    return _collective(group, [input_tensor], [output_tensor], call, async_op=async_op)


def reduce_scatter_tensor(
    output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Work | None:
    """See torch.distributed."""

    def call(own: dist.ProcessGroup, ins: Tensors, outs: Tensors) -> None:
        total = _reduce(own, ins[0].clone(), op)
        outs[0].view(-1).copy_(total.view(own.size(), -1)[own.rank()])

    return _collective(group, [input], [output], call, async_op=async_op)


def all_to_all_single(
    output: Any,
    input: Any,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Work | None:
    """See torch.distributed."""
    received, sent = _sizes(output_split_sizes), _sizes(input_split_sizes)

    def call(own: dist.ProcessGroup, ins: Tensors, outs: Tensors) -> None:
        own.alltoall_base(outs[0], ins[0], received, sent, c10d.AllToAllOptions()).wait()

    return _collective(group, [input], [output], call, async_op=async_op)


def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Work | None:
    """See torch.distributed; as on NCCL, what was launched before it has ended after it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _collective(group, [], [], lambda own, ins, outs: own.barrier().wait(), async_op=async_op)


def batch_isend_irecv(p2p_op_list: list[dist.P2POp]) -> list[Work]:
    """See torch.distributed; one handle for the whole batch."""
    group = ready_groups.group_of(p2p_op_list)
    ready_groups.check(p2p_op_list, is_first=id(group) not in _ready)
    sends = [one for one in p2p_op_list if "isend" in one.op.__name__]
    receives = [one for one in p2p_op_list if "irecv" in one.op.__name__]
    assert len(sends) + len(receives) == len(p2p_op_list)

    def call(ins: Tensors, outs: Tensors) -> None:
        works = [group.recv([t], one.group_peer, one.tag) for t, one in zip(outs, receives, strict=True)]
        works += [group.send([t], one.group_peer, one.tag) for t, one in zip(ins, sends, strict=True)]
        for work in works:
            work.wait()

    return [_lane(group).post([one.tensor for one in sends], [one.tensor for one in receives], call)]


def isend(
    tensor: Any, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: int | None = None
) -> Work | None:
    """See torch.distributed."""
    own = _group(group)
    peer = _root(own, dst, group_dst)
    return _lane(own, peer).post([tensor], [], lambda ins, outs: own.send(ins, peer, tag).wait())


def irecv(
    tensor: Any, src: int | None = None, group: Any = None, tag: int = 0, group_src: int | None = None
) -> Work | None:
    """See torch.distributed."""
    own = _group(group)
    peer = _root(own, src, group_src)
    return _lane(own, peer).post([], [tensor], lambda ins, outs: own.recv(outs, peer, tag).wait())


def send(tensor: Any, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: int | None = None) -> None:
    """See torch.distributed."""
    cast(Work, isend(tensor, dst, group, tag, group_dst)).wait()


def recv(
    tensor: Any, src: int | None = None, group: Any = None, tag: int = 0, group_src: int | None = None
) -> int | None:
    """See torch.distributed."""
    cast(Work, irecv(tensor, src, group, tag, group_src)).wait()
    return src


@contextlib.contextmanager
def coalescing_manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
    """torch's `_coalescing_manager`: one handle for the collectives that are posted inside."""
    global _coalescing
    manager: Any = c10d._CoalescingManager()
    assert _coalescing is None, "one coalescing manager inside another"
    works: list[Work] = []
    _coalescing = works
    try:
        yield manager
    finally:
        _coalescing = None
    if async_ops:
        manager.works.extend(works)
    else:
        for work in works:
            work.wait()


def _drained(name: str) -> Callable[..., Any]:
    """One that nothing of the product uses on the device: gloo does it, when the group's queue is empty."""
    real = getattr(c10d, name)

    def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        _lane(_group(group)).post([], [], lambda ins, outs: None).wait()
        return real(*args, group=group, **kwargs)

    call.__name__ = name
    return call


def _as_gloo(real: Callable[..., Any]) -> Callable[..., Any]:
    """`init_process_group` and `new_group`, whose backend is gloo whatever was asked for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for name in ("pg_options", "device_id"):
            kwargs.pop(name, None)
        if real.__name__ == "init_process_group":
            return real("gloo", *args[1:], **{k: v for k, v in kwargs.items() if k != "backend"})
        return real(*args, **(kwargs | {"backend": "gloo"}))

    call.__name__ = real.__name__
    return call


def install() -> None:
    """Replace torch's functions, in torch and in the modules of Megatron that have imported them by name."""
    new: list[Callable[..., Any]] = [
        all_reduce, broadcast, all_gather, all_gather_into_tensor, reduce_scatter_tensor, all_to_all_single, barrier,
        batch_isend_irecv, isend, irecv, send, recv,
    ]  # fmt: skip
    new += [_drained(name) for name in ("gather", "scatter", "reduce", "reduce_scatter", "all_to_all")]
    new += [_as_gloo(c10d.init_process_group), _as_gloo(c10d.new_group)]
    replacements: dict[str, Any] = {function.__name__: function for function in new}
    replacements["_coalescing_manager"] = coalescing_manager
    replacements["_all_gather_base"] = all_gather_into_tensor
    replacements["_reduce_scatter_base"] = reduce_scatter_tensor
    replace_everywhere(replacements)
    if torch.cuda.is_available():
        set_device = torch.cuda.set_device
        torch.cuda.set_device = lambda device: set_device(0)  # a rank's device is the one that there is


def replace_everywhere(replacements: dict[str, Any]) -> None:
    """Replace functions of torch.distributed, by name, also where they were imported by name."""
    real = {id(getattr(owner, name)): name for owner in (dist, c10d) for name in replacements if hasattr(owner, name)}
    modules = [
        module for name, module in list(sys.modules.items()) if name.startswith(("megatron.", "megatron_smartmoe."))
    ]
    for module in (dist, c10d, *modules):
        for name, value in list(vars(module).items()):
            if id(value) in real:
                setattr(module, name, replacements[real[id(value)]])
