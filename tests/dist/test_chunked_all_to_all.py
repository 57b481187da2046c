"""All-to-all in chunks against one process that computes everything, and the order in which chunks are posted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_smartmoe.runtime import chunked_all_to_all
from megatron_smartmoe.runtime.chunked_all_to_all import RowExchange, chunk_peers, join_rows, split_rows
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

RANKS, HIDDEN = 3, 4
SIZES = {  # rows from rank to rank
    "uneven": [[2, 3, 1], [4, 1, 2], [1, 5, 3]],
    "zeros": [[0, 4, 0], [0, 0, 0], [3, 0, 0]],  # rank 1 sends nothing, rank 2 gets nothing
    "nothing at all": [[0] * RANKS] * RANKS,
    "even": [[2] * RANKS] * RANKS,
}
FAULTS = ("chunks in the wrong order", "a chunk of gradients dropped", "no fault")


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_what_one_rank_sends_another_expects(num_ranks: int) -> None:
    for degree in range(1, num_ranks + 1):
        everybody = [chunk_peers(rank, num_ranks, degree) for rank in range(num_ranks)]
        for rank, own in enumerate(everybody):
            assert len(own) == degree
            assert rank in own[0].targets
            assert rank in own[0].sources
            assert sorted(target for chunk in own for target in chunk.targets) == list(range(num_ranks))
            for chunk, peers in enumerate(own):
                assert all(rank in everybody[target][chunk].sources for target in peers.targets)


@pytest.mark.parametrize("degree", range(1, 6))
@pytest.mark.parametrize("rank", range(5))
def test_join_rows_undoes_split_rows(rank: int, degree: int) -> None:
    sizes_R = [2, 0, 3, 1, 2]
    chunks = [peers.targets for peers in chunk_peers(rank, 5, degree)]
    rows = torch.arange(8.0).unsqueeze(1)
    rows_of_chunks = split_rows(rows, sizes_R, chunks)
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes_R))
    for ranks, rows_of_chunk in zip(chunks, rows_of_chunks, strict=True):
        assert torch.equal(rows_of_chunk, rows[torch.isin(owner, torch.tensor(ranks))])
    assert torch.equal(join_rows(rows_of_chunks, sizes_R, chunks), rows)


class Recorded(RowExchange):
    """Records when it is posted and when it is waited for."""

    def __init__(self, events: list[str], name: str, *args: Any) -> None:
        super().__init__(*args)
        self._events, self._name = events, name

    def _post(self, *args: Any) -> tuple[torch.Tensor, ...]:
        self._events.append(f"post {self._name}")
        return super()._post(*args)

    def _wait(self) -> tuple[torch.Tensor, ...]:
        self._events.append(f"wait {self._name}")
        return super()._wait()


class Note(torch.autograd.Function):
    """Writes down when a chunk is computed."""

    @staticmethod
    def forward(ctx: Any, events: list[str], name: str, rows: torch.Tensor) -> torch.Tensor:
        ctx.events, ctx.name = events, name
        events.append(name)
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        ctx.events.append(ctx.name)
        return None, None, gradient


def expert(rows: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.tanh(rows * scale) * weights.unsqueeze(1)


def inputs(sizes_RR: Sequence[Sequence[int]], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights of one rank, in the order of their targets; drawn alike wherever they are asked for."""
    draw = torch.Generator().manual_seed(rank)
    number = sum(sizes_RR[rank])
    rows = torch.randn(number, HIDDEN, generator=draw, dtype=torch.float64)
    return rows.requires_grad_(), torch.rand(number, generator=draw, dtype=torch.float64).requires_grad_()


def scale_of(rank: int) -> torch.Tensor:
    return torch.full((HIDDEN,), 1.0 + rank, dtype=torch.float64).requires_grad_()


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.arange(1.0, output.numel() + 1, dtype=torch.float64).view_as(output)).sum()


def gradients(*leaves: torch.Tensor) -> list[torch.Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def in_chunks(sizes_RR: Sequence[Sequence[int]], degree: int) -> tuple[list[torch.Tensor], list[str], list[str]]:
    """Output and gradients of one rank, and the events of its forward and backward pass."""
    rank, group = dist.get_rank(), dist.group.WORLD
    rows, weights = inputs(sizes_RR, rank)
    scale = scale_of(rank)
    events: list[str] = []
    peers_of_chunks = chunk_peers(rank, RANKS, degree)
    chunks = [peers.targets for peers in peers_of_chunks]
    flights = []
    for index, (peers, *rows_of_chunk) in enumerate(
        zip(
            peers_of_chunks,
            split_rows(rows, sizes_RR[rank], chunks),
            split_rows(weights, sizes_RR[rank], chunks),
            strict=True,
        )
    ):
        sent = [sizes_RR[rank][peer] if peer in peers.targets else 0 for peer in range(RANKS)]
        received = [sizes_RR[peer][rank] if peer in peers.sources else 0 for peer in range(RANKS)]
        there = Recorded(events, f"dispatch {index}", group, sent, received)
        back = Recorded(events, f"combine {index}", group, received, sent)
        flights.append((there.start(*rows_of_chunk), there, back))
    returning = []
    for index, (posted, there, back) in enumerate(flights):
        arrived, arrived_weights = there.finish(*posted)
        output = Note.apply(events, f"compute {index}", expert(arrived, arrived_weights, scale))
        returning.append((back.start(output), back))
    output = join_rows([back.finish(*posted)[0] for posted, back in returning], sizes_RR[rank], chunks)
    forward = events.copy()
    events.clear()
    loss_of(output).backward()
    return [output, *gradients(rows, weights, scale)], forward, events


def in_one_process(sizes_RR: Sequence[Sequence[int]], rank: int) -> list[torch.Tensor]:
    """The same for `rank`, from all ranks' inputs and no exchange."""
    everything = [inputs(sizes_RR, source) for source in range(RANKS)]
    scales = [scale_of(target) for target in range(RANKS)]
    outputs = []
    for sizes_R, (rows, weights) in zip(sizes_RR, everything, strict=True):
        blocks = zip(rows.split(sizes_R), weights.split(sizes_R), scales, strict=True)
        outputs.append(torch.cat([expert(*block) for block in blocks]))
    torch.stack([loss_of(output) for output in outputs]).sum().backward()
    return [outputs[rank], *gradients(*everything[rank], scales[rank])]


def break_it(fault: str, patch: pytest.MonkeyPatch) -> None:
    if fault == "chunks in the wrong order":
        patch.setitem(globals(), "join_rows", lambda rows, *rest: chunked_all_to_all.join_rows(rows[::-1], *rest))
    if fault == "a chunk of gradients dropped":
        whole = chunked_all_to_all._Finish.backward

        def some(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            lost = "dispatch 1" in ctx.exchange._name
            return whole(ctx, *(torch.zeros_like(each) if lost else each for each in gradients))

        patch.setattr(chunked_all_to_all._Finish, "backward", staticmethod(some))


def judge_all() -> dict[str, Any]:
    """Everything that needs ranks, on one rank."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), dict[str, Any]()
    for name, sizes_RR in SIZES.items():
        expected = in_one_process(sizes_RR, rank)
        for degree in range(1, RANKS + 1):
            got, forward, backward = in_chunks(sizes_RR, degree)
            again, *_ = in_chunks(sizes_RR, degree)
            close = all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(got, expected, strict=True))
            equal = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
            found[f"{name}, {degree}"] = close, equal, forward, backward
    for fault in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            break_it(fault, patch)
            got, *_ = in_chunks(SIZES["even"], RANKS)
        expected = in_one_process(SIZES["even"], rank)
        found[fault] = [torch.allclose(a, b) for a, b in zip(got, expected, strict=True)]
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(judge_all, RANKS, log_dir=tmp_path_factory.mktemp("exchange"))


CASES = [f"{name}, {degree}" for name in SIZES for degree in range(1, RANKS + 1)]


@pytest.mark.parametrize("case", CASES)
def test_chunks_give_what_one_process_gives(case: str, judged: list[dict[str, Any]]) -> None:
    for found in judged:
        close, equal, _, _ = found[case]
        assert close
        assert equal, "a repeated run differs"


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_post_in_the_same_order(case: str, judged: list[dict[str, Any]]) -> None:
    """Whatever their counts are: rank 1 of "zeros" has no rows at all."""
    first = judged[0][case]
    for found in judged[1:]:
        assert found[case][2:] == first[2:]


def test_the_backward_pass_is_pipelined_as_the_forward_pass_is(judged: list[dict[str, Any]]) -> None:
    _, _, forward, backward = judged[0]["uneven, 3"]
    assert forward == [
        *("post dispatch 0", "post dispatch 1", "post dispatch 2"),
        *("wait dispatch 0", "compute 0", "post combine 0"),
        *("wait dispatch 1", "compute 1", "post combine 1"),
        *("wait dispatch 2", "compute 2", "post combine 2"),
        *("wait combine 0", "wait combine 1", "wait combine 2"),
    ]
    other = {"post": "wait", "wait": "post", "compute": "compute"}
    mirrored = [f"{other[event.split(' ', 1)[0]]} {event.split(' ', 1)[1]}" for event in reversed(forward)]
    assert backward == mirrored


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_can_fail(fault: str, judged: list[dict[str, Any]]) -> None:
    """Which of output, rows', weights' and scale's gradients are still right."""
    wrong = {"chunks in the wrong order": [0, 1, 2, 3], "a chunk of gradients dropped": [1, 2], "no fault": []}
    for found in judged:
        assert [index for index, right in enumerate(found[fault]) if not right] == wrong[fault]
