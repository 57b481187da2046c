"""Deliberate bugs in the CUDA kernels: the emulated checks must catch every one, or they would miss honest ones.

Method: all bugs of a mode are compiled into one program, each behind a test of `cuda_emulator::mutant`, and the program
is run once per bug, on the cases of the bug's op alone. Mode `thread` looks for races, `address` for wrong results and
steps out of bounds. With no bug switched on the program must find nothing.
Alternative: a program per bug, whose compilations took most of the time.
"""

from __future__ import annotations

import os
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import emulator
from tests.unit.ops.test_emulated import expect_nothing, has_sanitizer, pytestmark  # noqa: F401

SEEDS = {"thread": 2, "address": 6}  # orders of the threads in which no bug must be found where none is switched on
# the first race ends the program, and looking its source lines up would take longer than finding it
SANITIZER_OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1:symbolize=0", "ASAN_OPTIONS": "symbolize=0"}


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One bug: in `file`, the part of `place` between the @ becomes `new`; `op` are the cases of check.cpp to run.

    The part is one expression, or whole statements, which end in a semicolon and declare nothing that is used later.
    """

    name: str
    file: str
    place: str
    new: str
    op: str
    mode: str


def sort(name: str, place: str, new: str, mode: str = "thread") -> Mutation:
    return Mutation(name=name, file="dispatch_map.cu", place=place, new=new, op="dispatch_map", mode=mode)


def plan(name: str, place: str, new: str, mode: str = "address") -> Mutation:
    return Mutation(name=name, file="exact_split.cu", place=place, new=new, op="exact_split", mode=mode)


def rows(op: str, name: str, place: str, new: str, file: str = "") -> Mutation:
    return Mutation(name=name, file=file or f"{op}.cu", place=place, new=new, op=op, mode="address")


def backward(name: str, place: str, new: str, mode: str = "address") -> Mutation:
    return Mutation(name=name, file="unpermute_backward.cu", place=place, new=new, op="backward", mode=mode)


def routing(op: str, name: str, place: str, new: str, mode: str = "address") -> Mutation:
    file = {"chosen": "chosen_experts.cu", "chunks": "chunk_rows.cu"}[op]
    return Mutation(name=name, file=file, place=place, new=new, op=op, mode=mode)


def groups(name: str, place: str, new: str) -> Mutation:
    return Mutation(name=name, file="zero_empty_groups.cu", place=place, new=new, op="groups", mode="address")


MUTATIONS = [
    sort("sort: no barrier after clearing", "counts[s] = 0;\n  @__syncthreads();@", ""),
    sort("sort: no barrier before writing", "}\n  @__syncthreads();@\n\n  uint32_t* row", ""),
    sort(
        "sort: an addition that is not atomic",
        "@if (leader && slot[i] >= 0) atomicAdd(&counts[slot[i]], static_cast<uint32_t>(__popc(peers)));@",
        "if (slot[i] >= 0) counts[slot[i]] += 1;",
    ),
    sort("scan: no barrier after the warps' sums", "= inclusive;\n  @__syncthreads();@", ""),
    sort("scan: no barrier after the sum of sums", "= sum;\n  }\n  @__syncthreads();@", ""),
    sort("scan: no barrier before reuse", "@__syncthreads();@  // sums may be used again", ""),
    sort(
        "scan: a shuffle under a branch",
        "@const int other = __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(distance));\n"
        "    if (lane_id() >= distance) value += other;@",
        "if (lane_id() >= distance) value += __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(distance));",
        mode="address",
    ),
    sort("rank: no first __syncwarp", "@__syncwarp();@  // all lanes have read", ""),
    sort("rank: no second __syncwarp", "@__syncwarp();@\n    rank[i]", ""),
    sort("rank: wrong mask of lanes", "(@(1u << lane_id())@ - 1u)", "2u << lane_id()", mode="address"),
    sort(
        "rank: match under a branch",
        "const unsigned peers = @__match_any_sync(kFullWarp, slot[i])@;\n    const int before",
        "slot[i] >= 0 ? __match_any_sync(kFullWarp, slot[i]) : 0u",
        mode="address",
    ),
    sort("place: no barrier after clearing", "counts[i] = 0;\n    @__syncthreads();@", ""),
    sort("place: no barrier before the warps are added up", "warp_counts, slot, rank);\n    @__syncthreads();@", ""),
    sort("place: no barrier before rows are given out", "next_row[s] += distance;\n    }\n    @__syncthreads();@", ""),
    sort("place: no barrier before the next step", "@__syncthreads();@  // counts are cleared", ""),
    sort("place: the wrong end of the tile", "@end < num_choices ? end : num_choices@", "num_choices", mode="address"),
    sort("place: tiles counted twice", "@tile < tile_here@ ? count : 0", "tile <= tile_here", mode="address"),
    sort("place: shared memory short by 4 bytes", "(@slots + kWarps@) * sizeof(int)", "slots + kWarps - 1", "address"),
    plan("plan: no barrier after the loads", "plan.load_E[expert] = load;\n  }\n  @__syncthreads();@", "", "thread"),
    plan(
        "plan: a receiver is written before all have read", "= choice;\n    @__syncwarp();@  // all lanes", "", "thread"
    ),
    plan("plan: no barrier behind a replica", "find_largest(receiver);\n    }\n    @__syncwarp();@", "", "thread"),
    plan("plan: no barrier before the rest", "rest -= room;\n  }\n  @__syncwarp();@", "", "thread"),
    plan("plan: no barrier before tokens are written", "tokens_RS[at] = 0;\n  }\n  @__syncwarp();@", "", "thread"),
    plan("plan: half of the warp is searched", "lanes = @kWarpSize / 2@; lanes > 0; lanes /= 2) {\n", "kWarpSize / 4"),
    plan("plan: the wrong receiver of two equal ones", "largest ? Key{-gap, @-rank@}", "rank - 1000"),
    plan("plan: the smallest gap is filled", "receiver(expert, @true@, smaller(", "false"),
    plan(
        "plan: a surplus fills any gap", "receiver(expert, true, @smaller(-donor.value, plan.tokens_RS[at])@)", "kMost"
    ),
    plan("plan: a node above the mean has its bound", "@mean > node_mean ? mean : node_mean@", "mean"),
    plan("plan: the experts in another order", "place += @fewer@ ||", "!fewer && !equal"),
    plan("plan: local tokens of another rank", "counts_RE[int64_t{@plan.rank_C[c]@} *", "0"),
    plan("plan: a host above the bound", "@smaller(rest, bound - found.value)@", "rest"),
    plan("plan: the rest is lost", "@plan.share_C[emptiest] += rest;@", ""),
    plan("plan: overloaded ranks stay", "if (lane_id() == 0) @level(plan, count, bound);@", ""),
    plan("plan: a push comes from nowhere", "@plan.share_C[plan.hop_at_R[rank]] -= amount;@", ""),
    plan("plan: shared memory short by 4 bytes", "8 * wide + 4 * @narrow@;", "(narrow - 1)"),
    rows(
        "permute",
        "permute: one vector too many is stored",
        "if (@begin + i * threads < vectors@) to[",
        "begin + i * threads <= vectors",
    ),
    rows(
        "permute",
        "permute: one vector too many is loaded",
        "if (@begin + i * threads < vectors@) vector[i]",
        "begin + i * threads <= vectors",
    ),
    rows("permute", "permute: the last tokens' group is not stopped", "@if (token >= args.num_tokens) return;@", ""),
    rows("permute", "permute: the second block is never read", "is_first = @token < args.num_first@;", "true"),
    rows(
        "permute",
        "permute: a token's place is not that in its block",
        "@is_first ? token : token - args.num_first@",
        "token",
    ),
    rows(
        "permute",
        "permute: rows without a gap",
        "reinterpret_cast<Vector*>(y + row[j] * @args.y_pitch@)",
        "args.row_bytes",
    ),
    rows("permute", "permute: weights without a gap", "token_rows[j] * @args.weights_N_pitch@", "1"),
    rows(
        "permute",
        "zero rows: weights without a gap",
        "weights, row * @weights_pitch@, weight_bytes",
        "1",
        file="zero_rows.cu",
    ),
    rows(
        "permute", "zero rows: rows without a gap", "- 1) * @y_pitch@)", "vectors * sizeof(Vector)", file="zero_rows.cu"
    ),
    rows("unpermute", "unpermute: rows without a gap", "y + row[j] * @y_vectors@ + c", "vectors"),
    rows("unpermute", "unpermute: values without a gap", "token_rows[j] * @moved_pitch@, moved_TK", "1"),
    rows("permute", "permute: rows that no choice names are left", ".num_rows = @args.num_rows@,", "int64_t{0}"),
    rows(
        "permute",
        "zero rows: garbage is believed",
        "choice < 0 || choice >= num_choices || @rows[choice] != row@",
        "false",
        file="zero_rows.cu",
    ),
    rows(
        "permute",
        "zero rows: garbage is used as an index",
        "@choice < 0 || choice >= num_choices@ || rows[choice] != row",
        "false",
        file="zero_rows.cu",
    ),
    rows(
        "permute",
        "zero rows: a vote under a branch",
        "unsigned left = @__ballot_sync(kFullWarp, unnamed)@;",
        "row < num_rows ? __ballot_sync(kFullWarp, unnamed) : 0u",
        file="zero_rows.cu",
    ),
    rows("unpermute", "unpermute: choices in another order", "j0 + @j@) : 1.0f", "kStep - 1 - j"),
    rows("unpermute", "unpermute: a dropped choice is added", "@if (row[j] < 0) continue;@", ""),
    rows(
        "unpermute",
        "unpermute: a vector behind the row is loaded",
        "@c < vectors@; c += blockDim.x) {\n    float sum",
        "c <= vectors",
    ),
    backward(
        "backward: no barrier before the warps are added up",
        "partial[warp_id()][j] = sum;\n    }\n    @__syncthreads();@",
        "",
        mode="thread",
    ),
    backward(
        "backward: no barrier before partial is reused",
        "@__syncthreads();@  // partial is used again",
        "",
        mode="thread",
    ),
    backward("backward: a step behind the shared memory", "partial[@warp_id()@][j] = sum", "kWarps"),
    backward("backward: half of the warp is added up", "distance = @kWarpSize / 2@;", "kWarpSize / 4"),
    rows("swiglu", "swiglu: half of the warp is added up", "distance = @kWarpSize / 2@;", "kWarpSize / 4"),
    rows(
        "swiglu",
        "swiglu: a row behind the last is activated",
        "@row >= args.num_rows@) return;\n  const Piece* gates",
        "row > args.num_rows",
    ),
    rows(
        "swiglu",
        "swiglu: a gradient behind the last row",
        "@row >= args.num_rows@) return;\n  const Piece* grads",
        "row > args.num_rows",
    ),
    rows(
        "swiglu",
        "swiglu: a vector behind the row is activated",
        "@c < vectors@; c += kWarpSize) {\n    const Piece gate =",
        "c <= vectors",
    ),
    rows(
        "swiglu",
        "swiglu: a gradient behind the row",
        "@c < vectors@; c += kWarpSize) {\n    const Piece grad =",
        "c <= vectors",
    ),
    rows("swiglu", "swiglu: gate and linear part exchanged", "const Piece gate = @gates[c]@,", "gates[vectors + c]"),
    rows("swiglu", "swiglu: the gradient forgets the probability", "scaled = @d * prob@;", "d"),
    rows("swiglu", "swiglu: the gate's slope is that of a sigmoid", "(s * (@1.0f + g * (1.0f - s)@))", "1.0f"),
    rows(
        "swiglu",
        "swiglu: no gradient of the probability without columns",
        "if (@args.num_rows == 0@) return nullptr;  // with",
        "args.num_rows == 0 || args.ffn == 0",
    ),
    rows(
        "swiglu",
        "swiglu: a row that is not a multiple of 16 bytes",
        "if (@aligned && ffn % kWidth == 0@) return f",
        "aligned",
    ),
    groups("groups: the first is compared with nothing", "@group > 0 ? ends_S[group - 1] : 0@", "ends_S[group]"),
    groups("groups: none is cleared", "if (@ends_S[group]@ != (", "-1"),
    groups("groups: the next group is cleared", "grad + @group@ * vectors;", "group + 1"),
    groups("groups: a vector behind the group", "@c < vectors@; c += stride", "c <= vectors"),
    groups("groups: only the first blocks' share", "c += @stride@)\n    to[c]", "vectors"),
    groups("groups: bytes behind the last vector are left", "if (@args.group_bytes % kVectorBytes == 0@ &&", "true"),
    rows(
        "permute",
        "permute: a weight at the place of its choice",
        "weights_N, @token_rows[j]@ * args.weights_N_pitch",
        "j",
    ),
    rows(
        "permute",
        "permute: the weight of another token",
        "move_bits(block.weights_TK, @at * block.weights_pitch + j@,",
        "j",
    ),
    rows(
        "permute",
        "zero rows: weights of rows that no choice names are left",
        "if (@unnamed && weights != nullptr@) move_bits",
        "false",
        file="zero_rows.cu",
    ),
    rows(
        "unpermute",
        "unpermute: a value is moved from where no row is",
        "move_bits(@is_named ? moved_N : nullptr@,",
        "moved_N",
    ),
    routing(
        "chosen",
        "chosen: places are those of the next lane",
        "votes & (@(1u << lane_id()) - 1u@)",
        "(2u << lane_id()) - 1u",
    ),
    routing("chosen", "chosen: more than top_k are kept", "if (@is_chosen && choice < top_k@) {", "is_chosen"),
    routing(
        "chosen",
        "chosen: experts behind the last are looked at",
        "@expert < num_experts && chosen[expert] != 0@;",
        "chosen[expert] != 0",
    ),
    routing("chosen", "chosen: what is missing is left", "choice = @choices + lane_id()@; choice < top_k", "top_k"),
    routing(
        "chosen",
        "chosen: a vote under a branch",
        "votes = @__ballot_sync(kFullWarp, is_chosen)@;",
        "expert < num_experts ? __ballot_sync(kFullWarp, is_chosen) : 0u",
    ),
    routing("chosen", "chosen: no order of zeros and gradients", "@__syncwarp();@  // a gradient", "", mode="thread"),
    routing("chosen", "chosen: a dropped choice has a gradient", "if (@is_row(expert, num_experts)@) row", "true"),
    routing(
        "chunks",
        "chunks: no barrier before the warps are added up",
        "= sorted;\n  @__syncthreads();@",
        "",
        mode="thread",
    ),
    routing("chunks", "chunks: this chunk counts itself", "if (@i < chunk@) arrived", "i <= chunk"),
    routing(
        "chunks", "chunks: sources in another order", "@i / num_slots < source@)) sorted", "i / num_slots > source"
    ),
    routing(
        "chunks", "chunks: rows behind the last", "if (@from + i >= num_rows || to + i >= num_rows@) return;", "false"
    ),
    routing("chunks", "chunks: half of the warp is added up", "distance = @kWarpSize / 2@;", "kWarpSize / 4"),
]


def with_mutants(file: str, mode: str) -> str:
    """The file's text with the bugs of a mode, numbered from 1 in the order of MUTATIONS, each behind its switch."""
    text = (emulator.ROOT / "csrc" / "cuda" / file).read_text()
    switched: list[tuple[int, str, str]] = []  # where a part begins, the part, and what stands for it
    for number, mutation in enumerate(MUTATIONS, start=1):
        if (mutation.file, mutation.mode) != (file, mode):
            continue
        before, old, after = mutation.place.split("@")
        found = text.count(before + old + after)
        assert found == 1, f"{mutation.name}: the place matches {file} {found} times. Bring it up to date"
        switch = f"::cuda_emulator::mutant == {number}"
        if old.endswith(";"):
            new = f"if ({switch}) {{ {mutation.new} }} else {{ {old} }}"
        else:
            new = f"({switch} ? ({mutation.new}) : ({old}))"
        switched.append((text.index(before + old + after) + len(before), old, new))
    for begin, old, new in sorted(switched, reverse=True):
        text = text[:begin] + new + text[begin + len(old) :]
    return text


def programs() -> dict[str, Path]:
    """By mode, the check with all bugs of the mode."""
    files = defaultdict(set)
    for mutation in MUTATIONS:
        files[mutation.mode].add(mutation.file)
    return {
        mode: emulator.check_program(mode, {name: with_mutants(name, mode) for name in sorted(names)})
        for mode, names in files.items()
    }


def finds_nothing(program: Path, op: str, mutant: int) -> bool:
    """Whether the check ends well; a hang is a finding."""
    env = {**os.environ, **SANITIZER_OPTIONS}
    try:
        done = subprocess.run([program, op, "1", str(mutant)], env=env, capture_output=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def test_places_match_the_sources() -> None:
    for mutation in MUTATIONS:
        with_mutants(mutation.file, mutation.mode)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_bug_is_caught(tmp_path: Path) -> None:
    for mode in {mutation.mode for mutation in MUTATIONS}:
        if not has_sanitizer(mode, tmp_path):
            pytest.skip(f"g++ cannot build and run a program with {' '.join(emulator.MODES[mode])}")
    program = programs()
    for mode, seeds in SEEDS.items():
        expect_nothing(program[mode], seeds)
    with ThreadPoolExecutor(2) as pool:
        numbers = range(1, len(MUTATIONS) + 1)
        missed = list(pool.map(lambda n, m: finds_nothing(program[m.mode], m.op, n), numbers, MUTATIONS))
    assert [mutation.name for mutation, escaped in zip(MUTATIONS, missed, strict=True) if escaped] == []
