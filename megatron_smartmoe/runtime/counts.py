"""Tokens per logical expert and layer, counted where they are routed and reduced on request.

Each MoE layer adds one `[E]` vector per micro-batch on its own device: no host round trip, no communication. The sum
over ranks is one all-reduce, on request or, for the decisions, once per interval and asynchronous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_smartmoe.errors import PlanError


class ExpertCounts:
    """Accumulates this rank's assignments (tokens x top-k, less those that capacity drops).

    Args:
        num_layers: L, the layers of the whole model; those on other pipeline stages stay zero here.
        num_experts: E, the logical experts.
        device: The device that the routers run on.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str | int) -> None:
        self.local_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, counts_E: torch.Tensor) -> None:
        """Add the tokens of each expert in one micro-batch of one layer; `layer` counts from 0."""
        self.local_LE[layer] += counts_E

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.local_LE.zero_()

    def reduced(self, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Counts `[L, E]` summed over all ranks of `group` (default: everyone), on the CPU. A collective call."""
        total_LE = self.local_LE.clone()
        dist.all_reduce(total_LE, group=group)
        return total_LE.cpu()


class PassCounts:
    """This rank's assignments in an iteration, every pass through a layer apart.

    Args:
        layers: numbers of the layers that are counted.
        passes: P, the most passes of a layer in an iteration; what further ones route is lost, see `is_complete`.
        num_experts: E, the logical experts.
        device: The device that the routers run on.
    """

    def __init__(self, layers: Sequence[int], passes: int, num_experts: int, device: torch.device | str | int) -> None:
        self._row = {number: row for row, number in enumerate(layers)}
        self._seen_L = [0] * len(layers)
        self.local_LPE = torch.zeros(len(layers), passes, num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, counts_E: torch.Tensor) -> None:
        """Keep the tokens of each expert in the next pass through a layer."""
        row = self._row[layer]
        if self._seen_L[row] < self.local_LPE.shape[1]:
            self.local_LPE[row, self._seen_L[row]] = counts_E
        self._seen_L[row] += 1

    @property
    def is_complete(self) -> bool:
        """Whether no layer had more passes than there is room for: Megatron may run an iteration again."""
        return max(self._seen_L, default=0) <= self.local_LPE.shape[1]

    def reset(self) -> None:
        """Forget the iteration."""
        self._seen_L = [0] * len(self._seen_L)
        self.local_LPE.zero_()


@dataclass(frozen=True, kw_only=True)
class CountsShape:
    """Axes of the counts that decisions are made from.

    Attributes:
        rows: Rows of `ExpertCounts` that belong to the model's MoE layers, in order; the same on every rank.
        num_ranks: R, the ranks of an expert-parallel group.
        ep_rank: This rank's place in its expert-parallel group.
        windows: W, the windows of iterations whose counts are kept apart, so that the load's drift can be seen.
    """

    rows: tuple[int, ...]
    num_ranks: int
    ep_rank: int
    windows: int


class IntervalCounts:
    """Counts of one decision interval in windows of iterations, and their reduction over all ranks.

    The reduction starts at the end of an interval and is waited for one iteration later: it has that long to run beside
    the training step. NCCL runs it on its own stream, gloo in its own thread.

    Args:
        counts: The routers add to it; it is emptied here after each iteration.
        shape: The axes of the reduced counts.
    """

    def __init__(self, counts: ExpertCounts, shape: CountsShape) -> None:
        self._counts, self._shape = counts, shape
        device, num_experts = counts.local_LE.device, counts.local_LE.shape[1]
        self._rows = torch.tensor(shape.rows, device=device)
        sizes = (shape.windows, len(shape.rows), shape.num_ranks, num_experts)
        self._sums_WLRE = torch.zeros(sizes, dtype=torch.int64, device=device)
        self._iterations_W = [0] * shape.windows
        # (reduction, or None when it is done; its result; iterations of each window)
        self._pending: tuple[dist.Work | None, torch.Tensor, list[int]] | None = None

    @property
    def device(self) -> torch.device:
        """The device that holds the counts."""
        return self._sums_WLRE.device

    def end_iteration(self, window: int) -> None:
        """Add this iteration's counts to a window of the interval, on the device."""
        self._sums_WLRE[window, :, self._shape.ep_rank] += self._counts.local_LE.index_select(0, self._rows)
        self._iterations_W[window] += 1
        self._counts.reset()

    def start_reduction(self) -> None:
        """End the interval and start to sum its counts over all ranks. A collective call."""
        total_WLRE = self._sums_WLRE.clone()
        work = dist.all_reduce(total_WLRE, async_op=True)
        assert work is not None
        self._pending = (work, total_WLRE, self._iterations_W)
        self._sums_WLRE.zero_()
        self._iterations_W = [0] * self._shape.windows

    def state(self) -> dict[str, NDArray[np.int64]]:
        """The counts of the interval so far, and those whose reduction is under way, over all ranks. A collective call.

        Neither is changed: the reduction is waited for, and its result stays to be fetched.
        """
        sums_WLRE = self._sums_WLRE.clone()
        dist.all_reduce(sums_WLRE)
        state = {"sums_WLRE": sums_WLRE.cpu().numpy(), "iterations_W": np.array(self._iterations_W)}
        if self._pending is not None:
            work, total_WLRE, iterations_W = self._pending
            if work is not None:
                work.wait()
            self._pending = (None, total_WLRE, iterations_W)
            state |= {"pending_WLRE": total_WLRE.cpu().numpy(), "pending_iterations_W": np.array(iterations_W)}
        return state

    def restore(self, state: Mapping[str, NDArray[np.int64]], *, adds_sums: bool) -> None:
        """Continue from what `state` gave.

        Args:
            state: as `state` gave it.
            adds_sums: whether this rank adds the counts of the interval so far; one rank does.

        Raises:
            PlanError: it is of another shape.
        """
        pending = "pending_WLRE" in state
        for name in ("sums", *(["pending"] if pending else [])):
            shape, windows = state.get(f"{name}_WLRE", np.zeros(0)).shape, (self._shape.windows,)
            iterations = state.get("iterations_W" if name == "sums" else "pending_iterations_W", np.zeros(0)).shape
            if shape != self._sums_WLRE.shape or iterations != windows:
                raise PlanError(f"the saved counts have shape {shape}: must be {tuple(self._sums_WLRE.shape)}")
        self._sums_WLRE.copy_(torch.from_numpy(state["sums_WLRE"] * adds_sums))
        self._iterations_W = state["iterations_W"].tolist()
        if pending:
            total_WLRE = torch.from_numpy(state["pending_WLRE"].astype(np.int64)).to(self.device)
            self._pending = (None, total_WLRE, state["pending_iterations_W"].tolist())

    def reduced(self) -> list[NDArray[np.float64]] | None:
        """Wait for the reduction that was started; None if there is none.

        Returns:
            For each window, its mean counts per iteration `[L, R, E]`, summed over all expert-parallel groups.
        """
        if self._pending is None:
            return None
        (work, total_WLRE, iterations_W), self._pending = self._pending, None
        if work is not None:
            work.wait()
        sums_WLRE = total_WLRE.cpu().numpy().astype(np.float64)
        return [sums_LRE / n for sums_LRE, n in zip(sums_WLRE, iterations_W, strict=True) if n]
