"""Messages of the replicas: weights from homes to replicas, gradients back, within one group of ranks.

Every rank posts its messages in the same order (that of `replicas_of`, then that of the tensors), so that the messages
of a pair match by their order alone. The group is used for nothing else, so that the token exchange of a layer and its
replicas do not wait for each other in one queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_smartmoe.runtime.digest import digest_bounds, is_one_digest
from megatron_smartmoe.runtime.replicas.per_slot import SlotWeight
from megatron_smartmoe.runtime.replicas.split import Replica


@dataclass(frozen=True, kw_only=True, eq=False)
class Pending:
    """Messages that were posted; their tensors must not be touched before `wait`."""

    works: tuple[dist.Work, ...]

    def wait(self) -> None:
        """Wait for the messages; on CUDA the current stream waits and the host does not."""
        for work in self.works:
            work.wait()


class ReplicaWire:
    """Sends replicas and their gradients. All ranks of the group construct it together.

    Args:
        group: The ranks of one expert-parallel group, in its order; used for nothing else.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._ranks = group, dist.get_process_group_ranks(group)
        self.rank, self.num_ranks = dist.get_rank(group), len(self._ranks)
        self._device = torch.cuda.current_device() if dist.get_backend(group) == "nccl" else "cpu"
        # NCCL connects a group in its first operation and waits there for all of its ranks. Only the ranks that send or
        # receive something post a fetch, so a fetch must not be that first operation.
        dist.all_reduce(torch.zeros(1, device=self._device), group=group)

    @torch.no_grad()
    def start_fetch(
        self, replicas: Sequence[Replica], homes: Sequence[SlotWeight], spares: Sequence[torch.Tensor]
    ) -> Pending:
        """Start to copy weights to the replicas. A call of the whole group.

        Args:
            replicas: Those of this rank, in one order on all ranks; others are passed over.
            homes: Weights of this rank's home slots, `[S, ...]` each.
            spares: Weights of this rank's spare slots, `[K, ...]` each.
        """
        operations = []
        for replica in replicas:
            for home, spare in zip(homes, spares, strict=True):
                if replica.home_rank == self.rank:
                    operations.append(self._operation(dist.isend, home[replica.home_slot], replica.rank))
                elif replica.rank == self.rank:
                    operations.append(self._operation(dist.irecv, spare[replica.slot], replica.home_rank))
        return self._post(operations)

    @torch.no_grad()
    def return_gradients(
        self, replicas: Sequence[Replica], gradients: Sequence[torch.Tensor], totals: Sequence[SlotWeight]
    ) -> None:
        """Add the replicas' gradients to those of their homes, in the order of the replicas. A call of the whole group.

        Args:
            replicas: Those of this rank, in one order on all ranks; others are passed over.
            gradients: Gradients of this rank's spare slots, `[K, ...]` each; contiguous, of one dtype on all ranks.
            totals: Gradients of this rank's home slots, `[S, ...]` each; added to in place, in their own dtype.
        """
        operations, arriving = [], list[tuple[torch.Tensor, torch.Tensor]]()
        for replica in replicas:
            for gradient, total in zip(gradients, totals, strict=True):
                if replica.home_rank == self.rank:
                    staged = torch.empty(total.shape[1:], dtype=gradient.dtype, device=gradient.device)
                    arriving.append((total[replica.home_slot], staged))
                    operations.append(self._operation(dist.irecv, staged, replica.rank))
                elif replica.rank == self.rank:
                    operations.append(self._operation(dist.isend, gradient[replica.slot], replica.home_rank))
        self._post(operations).wait()
        for total, staged in arriving:
            total.add_(staged)

    def is_equal_on_all_ranks(self, digest: str) -> bool:
        """Whether all ranks of the group pass the same hexadecimal digest. A collective call; the host waits."""
        bounds = digest_bounds(digest, self._device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        return is_one_digest(bounds.tolist())

    def _operation(self, kind: Callable[..., Any], data: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, data.detach(), self._ranks[peer], self._group)

    @staticmethod
    def _post(operations: list[dist.P2POp]) -> Pending:
        return Pending(works=tuple(dist.batch_isend_irecv(operations)) if operations else ())
