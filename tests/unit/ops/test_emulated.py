"""The CUDA kernels, their launchers and torch's glue, executed on the CPU by tests/support/cuda_emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe.ops import reference
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.split import min_max_split
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, hosts_of, with_empty_slots
from tests.support import emulator
from tests.unit.ops.activation_cases import Gated, assert_equal_to_rounding, gated_rows
from tests.unit.ops.dispatch_cases import Routing, Rows, assert_near, permuted_rows, routings
from tests.unit.ops.routing_cases import Routed, check_packed, chunk_counts, routed_tokens
from tests.unit.ops.test_placement import random_load

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SEEDS = st.integers(0, 5)  # of the order of the threads


@pytest.fixture(scope="module")
def kernels() -> Any:
    torch.ops.load_library(str(emulator.ops_library()))
    return torch.ops.smartmoe_emulated


@given(case=routings(), seed=SEEDS)
@settings(deadline=None, max_examples=60)
def test_the_map_is_that_of_the_twin(kernels: Any, case: Routing, seed: int) -> None:
    kernels.set_seed(seed)
    args = (case.ids_TK, case.slot_of_E, case.num_slots)
    for found, expected in zip(kernels.dispatch_map(*args), reference.dispatch_map(*args), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_the_map_of_many_choices(kernels: Any) -> None:
    """64 tiles, most of them with two steps."""
    kernels.set_seed(1)
    generator = torch.Generator().manual_seed(0)
    args = torch.randint(-1, 70, (20_000, 12), generator=generator), torch.randperm(64, generator=generator), 64
    for found, expected in zip(kernels.dispatch_map(*args), reference.dispatch_map(*args), strict=True):
        assert torch.equal(found, expected)


def steps_of_the_host(counts_RE: IntArray, spare: int, num_nodes: int) -> tuple[IntArray, IntArray]:
    """Slots and tokens of each, from the numpy functions that define them."""
    num_ranks, num_experts = counts_RE.shape
    homes_RS = with_empty_slots(np.arange(num_experts, dtype=np.int64).reshape(num_ranks, -1), spare)
    slots_RS = exact_replicas(counts_RE.sum(axis=0), homes_RS, num_experts // num_ranks, num_nodes, trials=0)
    tokens_ER = min_max_split(counts_RE, hosts_of(slots_RS, num_experts))
    tokens_RS = np.where(slots_RS == EMPTY, 0, tokens_ER[slots_RS, np.arange(num_ranks)[:, None]])
    return slots_RS, tokens_RS


@given(draw=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 40), spare=st.integers(0, 3), seed=SEEDS)
@settings(deadline=None, max_examples=120)
def test_the_plan_is_that_of_the_host(kernels: Any, draw: int, num_ranks: int, spare: int, seed: int) -> None:
    kernels.set_seed(seed)
    rng = np.random.default_rng(draw)
    counts_RE = random_load(rng, num_ranks, num_ranks * int(rng.integers(1, 5))).astype(np.int64)
    num_nodes = int(rng.choice([n for n in range(1, num_ranks + 1) if num_ranks % n == 0]))
    slots_RS, tokens_RS = kernels.exact_split(torch.from_numpy(counts_RE), spare, num_nodes)
    expected = steps_of_the_host(counts_RE, spare, num_nodes)
    assert slots_RS.tolist() == expected[0].tolist()
    assert tokens_RS.tolist() == expected[1].tolist()


@pytest.mark.parametrize("spare", [1, 2])
def test_the_plan_of_a_large_group(kernels: Any, spare: int) -> None:
    """256 experts on 64 ranks; with the loads as they are, and up to the largest number of tokens."""
    rng = np.random.default_rng(spare)
    for sigma, tokens in ((1.0, 8192), (0.4, 8192), (2.0, 2**56)):
        share_E = rng.dirichlet(rng.lognormal(0, sigma, 256))
        counts_RE = np.stack([(share_E * rng.uniform(0.5, 1.0, 256) * tokens).astype(np.int64) for _ in range(64)])
        found = kernels.exact_split(torch.from_numpy(counts_RE), spare, 8)
        for tensor, expected in zip(found, steps_of_the_host(counts_RE, spare, 8), strict=True):
            assert np.array_equal(tensor.numpy(), expected)


def test_a_plan_that_does_not_fit_is_refused(kernels: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"^counts_RE\.shape = \[256, 1024\]: with 4 spare slots a plan does not fit"
    ):
        kernels.exact_split(torch.zeros(256, 1024, dtype=torch.int64), 4, 1)
    assert kernels.exact_split(torch.zeros(64, 512, dtype=torch.int64), 4, 1)[1].sum() == 0


@given(case=permuted_rows(CUDA_DTYPES), seed=SEEDS)
@settings(deadline=None, max_examples=80)
def test_rows_have_the_bits_of_the_twins(kernels: Any, case: Rows, seed: int) -> None:
    """Also of the sums: the order of the choices is that of the CPU kernels. A GPU may fuse and round once less."""
    kernels.set_seed(seed)
    y_NH = kernels.permute(case.x_TH, case.rows_TK, case.num_rows)
    assert torch.equal(y_NH, reference.permute(case.x_TH, case.rows_TK, case.num_rows))
    for weights_TK in (None, case.weights_TK):
        x_TH = kernels.unpermute(case.y_NH, case.rows_TK, weights_TK)
        assert torch.equal(x_TH, reference.unpermute(case.y_NH, case.rows_TK, weights_TK))
    args = (case.x_TH, case.y_NH, case.rows_TK, case.weights_TK)
    (grad_y, grad_weights), expected = kernels.unpermute_backward(*args), reference.unpermute_backward(*args)
    assert torch.equal(grad_y, expected[0])
    assert_near(grad_weights, expected[1], case)


@given(case=gated_rows(CUDA_DTYPES), seed=SEEDS)
@settings(deadline=None, max_examples=60)
def test_swiglu_is_that_of_the_twin(kernels: Any, case: Gated, seed: int) -> None:
    kernels.set_seed(seed)
    found, expected = (
        (each.swiglu(case.inner_NG, case.probs_N), *each.swiglu_backward(case.grad_NF, case.inner_NG, case.probs_N))
        for each in (kernels, reference)
    )
    assert_equal_to_rounding(found, expected, case)


@given(case=permuted_rows(CUDA_DTYPES), seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_weights_move_with_the_rows(kernels: Any, case: Rows, seed: int) -> None:
    kernels.set_seed(seed)
    args = case.x_TH, case.weights_TK, case.rows_TK, case.num_rows
    found = kernels.permute_weighted(*args)
    for one, other in zip(found, reference.permute_weighted(*args), strict=True):
        assert torch.equal(one, other)
    grads = case.y_NH, found[1], case.rows_TK
    expected = reference.permute_weighted_backward(*grads)
    for one, other in zip(kernels.permute_weighted_backward(*grads), expected, strict=True):
        assert torch.equal(one, other)


@given(case=permuted_rows(CUDA_DTYPES), share=st.floats(0, 1), seed=SEEDS)
@settings(deadline=None, max_examples=60)
def test_rows_are_packed_and_joined_as_by_the_twins(kernels: Any, case: Rows, share: float, seed: int) -> None:
    """From one block of tokens and from two, and back from the packed rows, which lie apart."""
    kernels.set_seed(seed)
    check_packed(kernels, case, share)


@given(case=routed_tokens(), seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_chosen_experts_are_those_of_the_twin(kernels: Any, case: Routed, seed: int) -> None:
    kernels.set_seed(seed)
    args = case.routing_map_TE, case.probs_TE, case.top_k
    found = kernels.chosen_experts(*args)
    for one, other in zip(found, reference.chosen_experts(*args), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    ids_TK, weights_TK = found
    grads = weights_TK, ids_TK, case.routing_map_TE.shape[1]
    assert torch.equal(kernels.chosen_experts_backward(*grads), reference.chosen_experts_backward(*grads))


@given(counts=chunk_counts(), seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_chunk_rows_are_those_of_the_twin(kernels: Any, counts: torch.Tensor, seed: int) -> None:
    kernels.set_seed(seed)
    args = counts, int(counts.sum())
    for one, other in zip(kernels.chunk_rows(*args), reference.chunk_rows(*args), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float64])
def test_permute_moves_any_bytes(kernels: Any, dtype: torch.dtype) -> None:
    rows_TK = torch.tensor([[4, 0], [-1, 2], [3, 7]], dtype=torch.int32)
    for hidden in (1, 3, 16, 70):
        x_TH = torch.arange(3 * hidden).reshape(3, hidden).to(dtype)
        assert torch.equal(kernels.permute(x_TH, rows_TK, 6), reference.permute(x_TH, rows_TK, 6))


def test_float64_is_refused(kernels: Any) -> None:
    y_NH, rows_TK = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int32)
    rule = "it must be float16, bfloat16 or float32. Convert it with"
    text = rf"^y_NH\.dtype = float64: on a GPU {rule} y_NH\.float\(\)$"
    with pytest.raises(RuntimeError, match=text):
        kernels.unpermute(y_NH, rows_TK, None)


def has_sanitizer(mode: str, folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = ["g++", str(source), *emulator.MODES[mode], "-o", str(folder / mode)]
    built = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return built and subprocess.run([str(folder / mode)], capture_output=True, check=False).returncode == 0


def test_without_sanitizers_the_check_finds_nothing(tmp_path: Path) -> None:
    """With them `test_mutations` runs it, in both modes: what is checked here, and races and bounds besides."""
    if all(has_sanitizer(mode, tmp_path) for mode in ("thread", "address")):
        pytest.skip("g++ has sanitizers: test_mutations runs the check with them")
    expect_nothing(emulator.check_program("plain"), 6)


def expect_nothing(program: Path, seeds: int) -> None:
    """The check of all ops, in as many orders of the threads, finds nothing."""
    done = subprocess.run([str(program), "all", str(seeds)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout == f"ok, {seeds} seeds\n"
    assert done.stderr == ""
