"""A rule of NCCL that gloo does not have, checked in every gloo rank that tests start.

NCCL makes the communicator of a group inside the group's first operation, and every rank of the group has to take part
in that operation. A batch of sends and receives is such an operation too: torch says of `batch_isend_irecv` that, if it
is the first call in its group, "all ranks of the group must participate"; otherwise the ranks that did post something
wait for the others for ever. Which ranks post something depends on the data, so a batch as the first operation of a
group of three ranks or more is a hang that waits for its day. gloo connects pairs and never notices; here such a batch
fails by name.

A send or a receive that is not in a batch is no concern: torch gives it a communicator of its two ranks. A group of two
ranks is none either, because a message has two ends. Megatron's pipeline groups are left out: the first operation of
each stage is a batch, but every stage posts one, whatever the data.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

_ALL_RANKS_TAKE_PART = ("PIPELINE_MODEL_PARALLEL_GROUP",)  # names that Megatron gives its groups


class UnreadyGroup(AssertionError):
    """A batch of sends and receives is the first operation of a group: NCCL may wait for the other ranks for ever."""


def group_of(operations: list[dist.P2POp]) -> dist.ProcessGroup:
    """The group of a batch."""
    group = (operations[0].group if operations else None) or dist.group.WORLD
    assert group is not None, "init_process_group was not called"
    return group


def check(operations: list[dist.P2POp], *, is_first: bool) -> None:
    """Check a batch that is about to be posted.

    Args:
        operations: The batch.
        is_first: Whether nothing was posted in its group before.

    Raises:
        UnreadyGroup: NCCL may hang in this batch.
    """
    group = group_of(operations)
    if is_first and group.size() > 2 and group.group_desc not in _ALL_RANKS_TAKE_PART:
        raise UnreadyGroup(
            f"rank {dist.get_rank()}: batch_isend_irecv of {len(operations)} is the first operation of a group of "
            f"{group.size()} ranks: NCCL waits for the others for ever. Run a collective of the whole group first, "
            "for example an all_reduce of one element."
        )


def install() -> None:
    """Check each batch from now on, in this process and in those forked from it."""
    post = c10d.batch_isend_irecv

    def checked(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        # gloo numbers a group's operations, collectives and messages alike, from 0; torch's stubs leave the getter out
        number: int = group_of(p2p_op_list)._get_sequence_number_for_group()  # type: ignore[attr-defined]
        check(p2p_op_list, is_first=number == 0)
        return post(p2p_op_list)

    dist.batch_isend_irecv = c10d.batch_isend_irecv = checked
