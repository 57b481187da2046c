"""The wire of the replicas: weights from homes to copies, gradients from copies back, within one group of ranks.

Every rank posts its messages in the same order (that of `copies_of`, then that of the tensors), so that the messages of
a pair match by their order alone. The group is used for nothing else: the token exchange of a layer and its replicas
never wait in one queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_smartmoe.runtime.digest import digest_bounds, is_one_digest
from megatron_smartmoe.runtime.replicas.split import Copy


@dataclass(frozen=True, kw_only=True, eq=False)
class Pending:
    """Messages on their way; what they read and write must be left alone until they are waited for."""

    works: tuple[dist.Work, ...]

    def wait(self) -> None:
        """Wait; on CUDA the current stream does, not the host."""
        for work in self.works:
            work.wait()


class ReplicaWire:
    """Sends replicas and their gradients. All ranks of the group have to make one together.

    Args:
        group: the ranks of one expert-parallel group, in its order, for this alone.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._ranks = group, dist.get_process_group_ranks(group)
        self.rank, self.num_ranks = dist.get_rank(group), len(self._ranks)
        self._device = torch.cuda.current_device() if dist.get_backend(group) == "nccl" else "cpu"
        # NCCL connects a group in its first operation and waits there for all of its ranks. A fetch of replicas is
        # posted by the ranks alone that send or receive something, so it must not be the first.
        dist.all_reduce(torch.zeros(1, device=self._device), group=group)

    @torch.no_grad()
    def start_fetch(
        self, copies: Sequence[Copy], homes: Sequence[torch.Tensor], spares: Sequence[torch.Tensor]
    ) -> Pending:
        """Start to copy weights. A call of the whole group.

        Args:
            copies: equal on all ranks.
            homes: `[S, ...]` each, this rank's home slots.
            spares: `[K, ...]` each, this rank's spare slots.
        """
        operations = []
        for copy in copies:
            for home, spare in zip(homes, spares, strict=True):
                if copy.home_rank == self.rank:
                    operations.append(self._operation(dist.isend, home[copy.home_slot], copy.rank))
                elif copy.rank == self.rank:
                    operations.append(self._operation(dist.irecv, spare[copy.slot], copy.home_rank))
        return self._post(operations)

    @torch.no_grad()
    def return_gradients(
        self, copies: Sequence[Copy], gradients: Sequence[torch.Tensor], totals: Sequence[torch.Tensor]
    ) -> None:
        """Add the copies' gradients to those of their homes, in the order of the copies. A call of the whole group.

        Args:
            copies: equal on all ranks.
            gradients: `[K, ...]` each, of this rank's spare slots; contiguous, of one dtype on all ranks.
            totals: `[S, ...]` each, of this rank's home slots; added to in place, in their own dtype.
        """
        operations, arriving = [], list[tuple[torch.Tensor, torch.Tensor]]()
        for copy in copies:
            for gradient, total in zip(gradients, totals, strict=True):
                if copy.home_rank == self.rank:
                    staged = torch.empty(total.shape[1:], dtype=gradient.dtype, device=gradient.device)
                    arriving.append((total[copy.home_slot], staged))
                    operations.append(self._operation(dist.irecv, staged, copy.rank))
                elif copy.rank == self.rank:
                    operations.append(self._operation(dist.isend, gradient[copy.slot], copy.home_rank))
        self._post(operations).wait()
        for total, staged in arriving:
            total.add_(staged)

    def agrees(self, digest: str) -> bool:
        """Whether all ranks of the group have the same digest (hexadecimal). A collective call; the host waits."""
        bounds = digest_bounds(digest, self._device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        return is_one_digest(bounds.tolist())

    def _operation(self, kind: object, data: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, data.detach(), self._ranks[peer], self._group)

    @staticmethod
    def _post(operations: list[dist.P2POp]) -> Pending:
        return Pending(works=tuple(dist.batch_isend_irecv(operations)) if operations else ())
