"""The host ops of the placement: the compiled ones must equal their numpy twins to the last token and slot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smartmoe import ops
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.ops import library
from megatron_smartmoe.placement.exact_replicas import exact_replicas
from megatron_smartmoe.placement.exact_search import TRIALS
from megatron_smartmoe.placement.split import min_max_split
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, BoolArray, hosts_of, with_empty_slots
from tests.unit.ops.test_library import copy_checkout
from tests.unit.placement.cases import random_slots

# for CI, where a missing library must not look like success
BUILD_IS_REQUIRED = os.environ.get("SMARTMOE_REQUIRE_BUILD") == "1"
needs_library = pytest.mark.skipif(
    not ops.is_compiled() and not BUILD_IS_REQUIRED,
    reason="the compiled library is not built: python megatron_smartmoe/ops/_build.py",
)


COUNTS, HOSTS = torch.ones(2, 4, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool)


def text_of(function: Callable[..., object], args: tuple[object, ...]) -> str:
    with pytest.raises((RuntimeError, PlanError)) as caught:
        function(*args)
    return str(caught.value)


def random_load(rng: np.random.Generator, num_ranks: int, num_experts: int) -> IntArray:
    """Counts `[R, E]`: even, skewed, all for one expert, few, none, sparse, or up to 2^40 each."""
    shape = (num_ranks, num_experts)
    kind = rng.integers(7)
    if kind == 0:
        return rng.integers(0, 9, shape)
    if kind == 1:
        return np.where(rng.random(shape) < 0.02, rng.integers(1, 2**40, shape), 0)
    if kind == 2:
        return rng.integers(0, 2**40, shape, endpoint=True)
    if kind == 3:
        return np.full(shape, int(rng.integers(0, 3)))
    if kind == 4:
        counts_RE = rng.integers(0, 2, shape)
        counts_RE[:, rng.integers(num_experts)] = rng.integers(1, 2**40)
        return counts_RE
    popularity = rng.lognormal(0, rng.uniform(0, 3), num_experts)
    return rng.multinomial(int(rng.integers(0, 5000)), popularity / popularity.sum(), size=num_ranks)


@st.composite
def layers(draw: st.DrawFn) -> tuple[IntArray, IntArray, int, int]:
    """Counts `[R, E]`, slots `[R, S]` with some replicas, home slots and nodes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = draw(st.one_of(st.integers(1, 8), st.integers(1, 64)))
    home_slots, spare = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    num_nodes = draw(st.sampled_from([n for n in range(1, num_ranks + 1) if num_ranks % n == 0]))
    num_experts = num_ranks * home_slots
    slots_RS = random_slots(rng, num_experts, num_ranks, spare, filled=rng.random())
    return random_load(rng, num_ranks, num_experts).astype(np.int64), slots_RS, home_slots, num_nodes


def compiled_split(counts_RE: IntArray, hosts_ER: BoolArray) -> IntArray:
    return ops.min_max_split(torch.from_numpy(counts_RE), torch.from_numpy(hosts_ER)).numpy()


@needs_library
@given(layers())
@settings(deadline=None, max_examples=400)
def test_the_same_replicas_and_the_same_split(case: tuple[IntArray, IntArray, int, int]) -> None:
    counts_RE, slots_RS, home_slots, num_nodes = case
    load_E = counts_RE.sum(axis=0)
    found = ops.exact_replicas(torch.from_numpy(load_E), torch.from_numpy(slots_RS), home_slots, num_nodes)
    expected_RS = exact_replicas(load_E, slots_RS, home_slots, num_nodes)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), expected_RS)
    for slots in (slots_RS, expected_RS):
        hosts_ER = hosts_of(slots, len(load_E))
        assert np.array_equal(compiled_split(counts_RE, hosts_ER), min_max_split(counts_RE, hosts_ER))


@needs_library
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 40), num_experts=st.integers(0, 60))
@settings(deadline=None, max_examples=300)
def test_the_same_split_for_any_hosts(seed: int, num_ranks: int, num_experts: int) -> None:
    """Experts with any number of copies, also none where they have no tokens; views that are not contiguous."""
    rng = np.random.default_rng(seed)
    counts_RE = random_load(rng, num_ranks, max(num_experts, 1))[:, :num_experts].astype(np.int64)
    hosts_ER = rng.random((num_experts, num_ranks)) < rng.random()
    lost_E = ~hosts_ER.any(axis=1)
    if rng.random() < 0.5:
        counts_RE[:, lost_E] = 0
    else:
        hosts_ER[lost_E, rng.integers(num_ranks)] = True
    expected_ER = min_max_split(counts_RE, hosts_ER)
    assert np.array_equal(compiled_split(counts_RE, hosts_ER), expected_ER)
    turned = ops.min_max_split(
        torch.from_numpy(np.asfortranarray(counts_RE)), torch.from_numpy(np.asfortranarray(hosts_ER))
    )
    assert np.array_equal(turned.numpy(), expected_ER)


@needs_library
def test_inputs_stay_as_they_were() -> None:
    load_E, slots_RS = torch.tensor([9, 0, 1, 0]), torch.tensor([[0, 1, 3], [2, 3, 1]])
    before = slots_RS.clone()
    assert ops.exact_replicas(load_E, slots_RS, 2).tolist() == [[0, 1, -1], [2, 3, 0]]
    assert torch.equal(slots_RS, before)
    assert load_E.tolist() == [9, 0, 1, 0]


@needs_library
@given(seed=st.integers(0, 2**32 - 1), sigma=st.floats(0.3, 1.5), trials=st.integers(0, 20), spare=st.integers(1, 2))
@settings(deadline=None, max_examples=60)
def test_the_same_search(seed: int, sigma: float, trials: int, spare: int) -> None:
    """Loads whose greedy plan is often bad, within one node and over several."""
    rng = np.random.default_rng(seed)
    num_ranks, home_slots = int(rng.choice([4, 8, 16])), int(rng.choice([4, 8, 16]))
    num_experts, num_nodes = num_ranks * home_slots, int(rng.choice([1, 1, 2]))
    slots_RS = random_slots(rng, num_experts, num_ranks, spare, filled=0.0)
    load_E = rng.multinomial(100_000, rng.dirichlet(rng.lognormal(0, sigma, num_experts) * 5)).astype(np.int64)
    args = torch.from_numpy(load_E), torch.from_numpy(slots_RS), home_slots, num_nodes, trials
    assert np.array_equal(ops.exact_replicas(*args).numpy(), exact_replicas(load_E, slots_RS, *args[2:]))


@needs_library
@given(layers())
@settings(deadline=None, max_examples=100)
def test_replicas_and_split_in_one_op(case: tuple[IntArray, IntArray, int, int]) -> None:
    counts_RE, slots_RS, home_slots, num_nodes = case
    num_ranks, num_slots = slots_RS.shape
    homes_RS = with_empty_slots(np.arange(num_ranks * home_slots).reshape(num_ranks, -1), num_slots - home_slots)
    expected_RS = exact_replicas(counts_RE.sum(axis=0), homes_RS, home_slots, num_nodes, trials=0)
    tokens_ER = min_max_split(counts_RE, hosts_of(expected_RS, num_ranks * home_slots))
    found_RS, tokens_RS = ops.exact_split(torch.from_numpy(counts_RE), num_slots - home_slots, num_nodes)
    assert np.array_equal(found_RS.numpy(), expected_RS)
    taken_RS = np.where(expected_RS == EMPTY, 0, tokens_ER[expected_RS, np.arange(num_ranks)[:, None]])
    assert np.array_equal(tokens_RS.numpy(), taken_RS)


@needs_library
@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((torch.ones(2, 4), 1, 1), "counts_RE.dtype = float32: it must be int64. Convert it to int64"),
        (
            (torch.ones(3, 4).long(), 1, 1),
            "counts_RE.shape = [3, 4]: it must be [R, E] with E a multiple of R. Pass the counts of one layer",
        ),
        ((COUNTS, -1, 1), "spare_slots = -1: it must be in 0..2048. Pass the spare slots of a rank"),
        ((COUNTS, 1, 3), "num_nodes = 3: it must divide R = 2. Pass the nodes that the ranks lie on"),
        ((-COUNTS, 1, 1), "counts_RE[0, 0] = -1: a number of tokens is at least 0. Pass counts of tokens"),
    ],
)
def test_errors_of_both_in_one(args: tuple[torch.Tensor, int, int], text: str) -> None:
    assert text_of(ops.exact_split, args) == text


def test_the_defaults_are_the_same() -> None:
    assert ops.TRIALS == TRIALS


LOAD, SLOTS = torch.ones(4, dtype=torch.int64), torch.tensor([[0, 1, -1], [2, 3, -1]])
HOMES = "it must be E / R = 4 / 2, and at most S = 3. Pass the number of homes of a rank"
SPLIT_ERRORS = [
    ((COUNTS.int(), HOSTS), "counts_RE.dtype = int32: it must be int64. Convert it to int64"),
    ((COUNTS, HOSTS.byte()), "hosts_ER.dtype = uint8: it must be bool. Convert it to bool"),
    (
        (COUNTS[0], HOSTS),
        "counts_RE.shape = [4]: it must be [R, E] with at least one rank. "
        "Pass the counts of one layer, a row per source rank",
    ),
    (
        (COUNTS[:0], HOSTS[:, :0]),
        "counts_RE.shape = [0, 4]: it must be [R, E] with at least one rank. "
        "Pass the counts of one layer, a row per source rank",
    ),
    (
        (COUNTS, HOSTS.t()),
        "hosts_ER.shape = [2, 4]: it must be [E, R] = [4, 2], as counts_RE has it. Pass a row per expert",
    ),
    (
        (COUNTS, HOSTS[0]),
        "hosts_ER.shape = [2]: it must be [E, R] = [4, 2], as counts_RE has it. Pass a row per expert",
    ),
]
REPLICA_ERRORS = [
    ((LOAD.float(), SLOTS, 2, 1), "load_E.dtype = float32: it must be int64. Convert it to int64"),
    ((LOAD, SLOTS.int(), 2, 1), "slots_RS.dtype = int32: it must be int64. Convert it to int64"),
    (
        (LOAD[None], SLOTS, 2, 1),
        "load_E.shape = [1, 4]: it must be [E]. Pass the sum of the counts over the source ranks",
    ),
    (
        (LOAD, SLOTS[0], 2, 1),
        "slots_RS.shape = [3]: it must be [R, S] with at least one rank. Pass the slots of one layer, a row per rank",
    ),
    ((LOAD, SLOTS, 1, 1), f"home_slots = 1: {HOMES}"),
    ((LOAD, SLOTS, -2, 1), f"home_slots = -2: {HOMES}"),
    ((LOAD, SLOTS, 4, 1), f"home_slots = 4: {HOMES}"),
    ((LOAD, SLOTS, 2, 3), "num_nodes = 3: it must divide R = 2. Pass the nodes that the ranks lie on"),
    ((LOAD, SLOTS, 2, 0), "num_nodes = 0: it must divide R = 2. Pass the nodes that the ranks lie on"),
    ((LOAD, SLOTS, 2, 1, -1), "trials = -1: it must be at least 0. Pass 0 for no search"),
]


def texts_of_twins(name: str, args: tuple[object, ...]) -> list[str]:
    """The errors of the compiled op and of its numpy twin."""
    twins: dict[str, Callable[..., object]] = {"min_max_split": min_max_split, "exact_replicas": exact_replicas}
    arrays = tuple(arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args)
    return [text_of(getattr(ops, name), args), text_of(twins[name], arrays)]


@needs_library
@pytest.mark.parametrize(("args", "text"), SPLIT_ERRORS)
def test_errors_of_the_split(args: tuple[object, ...], text: str) -> None:
    assert texts_of_twins("min_max_split", args) == [text, text]


@needs_library
@pytest.mark.parametrize(("args", "text"), REPLICA_ERRORS)
def test_errors_of_the_replicas(args: tuple[object, ...], text: str) -> None:
    assert texts_of_twins("exact_replicas", args) == [text, text]


@needs_library
@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((torch.zeros(4), torch.zeros(2).long(), 2, 1), "bits_N.dtype = float32: it must be uint8, int16, int32 or "),
        ((torch.zeros(4).int(), torch.zeros(2), 2, 1), "positions_L.dtype = float32: it must be int64. "),
        ((torch.zeros(4).int(), torch.zeros(2).long(), 3, 1), "bits_N.shape = [4]: it must be [L * width], contiguous"),
        ((torch.zeros(4).int(), torch.zeros(2).long(), 0, 1), "bits_N.shape = [4]: it must be [L * width], contiguous"),
        ((torch.zeros(8).int()[::2], torch.zeros(2).long(), 2, 1), "bits_N.shape = [4]: it must be [L * width], cont"),
        ((torch.zeros(4).int(), torch.zeros(4).long()[::2], 2, 1), "positions_L.shape = [2]: it must be [L], cont"),
    ],
)
def test_errors_of_the_digest(args: tuple[object, ...], text: str) -> None:
    assert text_of(torch.ops.smartmoe.digest_sum, args).startswith(text)


@needs_library
def test_errors_in_the_values() -> None:
    counts_RE, hosts_ER = torch.tensor([[1, 3, 0, 2], [0, 2, 0, 0]]), torch.tensor([[True, True], [False, False]] * 2)
    lost = "expert 1 has 5 tokens and no slot on any rank"
    assert texts_of_twins("min_max_split", (counts_RE, hosts_ER)) == [lost] * 2
    negative = torch.tensor([[0, 0, 0, 0], [0, 0, -7, 0]])
    rule = "a number of tokens is at least 0. Pass counts of tokens"
    assert texts_of_twins("min_max_split", (negative, HOSTS)) == [f"counts_RE[1, 2] = -7: {rule}"] * 2
    assert texts_of_twins("exact_replicas", (negative[1], SLOTS, 2)) == [f"load_E[2] = -7: {rule}"] * 2
    rule = "the homes must be each of the 4 experts once. Pass a valid placement"
    for expert in (-1, 4, 0):
        slots_RS = torch.tensor([[0, 1, -1], [2, expert, -1]])
        assert texts_of_twins("exact_replicas", (LOAD, slots_RS, 2)) == [f"slots_RS[1, 1] = {expert}: {rule}"] * 2


@needs_library
@pytest.mark.parametrize("spread", ["over the ranks", "over the experts", "one too many"])
def test_counts_that_overflow(spread: str) -> None:
    """A sum above 2^63 - 1 would lose tokens in silence; exactly that many are split like any others."""
    most = 2**63 - 1
    counts_RE = torch.zeros(2, 4, dtype=torch.int64)
    counts_RE[0, 0] = most
    (exact,) = {ops.min_max_split(counts_RE, HOSTS).sum().item(), int(min_max_split(*_arrays(counts_RE, HOSTS)).sum())}
    assert exact == most
    counts_RE[{"over the ranks": (1, 0), "over the experts": (0, 3), "one too many": (1, 3)}[spread]] = (
        1 if spread == "one too many" else most
    )
    rule = "= counts that add up to more than 9223372036854775807: the tokens of a layer must fit in int64"
    text = f"counts_RE {rule}. Pass counts of tokens"
    assert texts_of_twins("min_max_split", (counts_RE, HOSTS)) == [text] * 2
    text = f"load_E {rule}. Pass counts of tokens"
    assert texts_of_twins("exact_replicas", (torch.tensor([most, 1, 0, 0]), SLOTS, 2)) == [text] * 2
    negative_too = torch.tensor([most, most, 0, -1])  # the first mistake in the order of the checks, in both
    assert texts_of_twins("exact_replicas", (negative_too, SLOTS, 2))[0].startswith("load_E[3] = -1: ")
    assert len({*texts_of_twins("exact_replicas", (negative_too, SLOTS, 2))}) == 1


def _arrays(*tensors: torch.Tensor) -> list[Any]:
    return [tensor.numpy() for tensor in tensors]


@needs_library
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.smartmoe.min_max_split.default, (COUNTS, HOSTS))
    torch.library.opcheck(torch.ops.smartmoe.exact_split.default, (COUNTS, 1, 1))
    torch.library.opcheck(torch.ops.smartmoe.exact_replicas.default, (LOAD, SLOTS, 2, 1, 16))


def test_meta_tensors_give_the_shapes() -> None:
    tokens_ER = ops.min_max_split(COUNTS.to("meta"), HOSTS.to("meta"))
    assert (tokens_ER.device.type, tokens_ER.shape, tokens_ER.dtype) == ("meta", (4, 2), torch.int64)
    assert ops.exact_replicas(LOAD.to("meta"), SLOTS.to("meta"), 2).shape == (2, 3)


@pytest.mark.parametrize("name", sorted(library.HOST_OPS))
def test_tensors_of_a_gpu_are_refused(name: str) -> None:
    """By the registration for CUDA, called here without one."""
    assert library._has_kernel(name, "CUDA")
    with pytest.raises(RuntimeError, match=f"smartmoe::{name} runs on the host: its tensors must be on the CPU"):
        library._refuse(library.host_text(name))(None)


@pytest.mark.slow
def test_without_the_library_they_say_how_to_build_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkout = copy_checkout(tmp_path_factory.mktemp("bare"))
    program = """
import torch
from megatron_smartmoe import ops
for call in (lambda: ops.min_max_split(torch.ones(2, 4).long(), torch.ones(4, 2).bool()),
             lambda: ops.exact_replicas(torch.ones(4).long(), torch.tensor([[0, 1], [2, 3]]), 2)):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=checkout, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"_smartmoe.so is not built: smartmoe::{name} has no torch reference to serve it. "
        "Build it: python megatron_smartmoe/ops/_build.py"
        for name in ("min_max_split", "exact_replicas")
    ], done.stderr
