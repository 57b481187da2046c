"""Deliberate bugs in the CUDA kernels: the emulated checks must catch every one, or they would miss honest ones.

Each is one edit of one file, built in the mode that has to notice (plain for wrong results, or with a sanitizer), and
run on that op's cases alone. An edit that no longer matches the source exactly once is an error.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import emulator
from tests.unit.ops.test_emulated import has_sanitizer, pytestmark  # noqa: F401


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One bug: in `file`, `old` becomes `new`; `op` are the cases of check.cpp to run and `mode` the build."""

    name: str
    file: str
    old: str
    new: str
    op: str
    mode: str = "thread"
    seeds: int = 1


def histogram(name: str, old: str, new: str, mode: str = "thread") -> Mutation:
    return Mutation(name=name, file="expert_histogram.cu", old=old, new=new, op="histogram", mode=mode)


def sort(name: str, old: str, new: str, mode: str = "thread") -> Mutation:
    return Mutation(name=name, file="dispatch_map.cu", old=old, new=new, op="dispatch_map", mode=mode)


def rows(op: str, name: str, old: str, new: str, mode: str = "thread", file: str = "") -> Mutation:
    return Mutation(name=name, file=file or f"{op}.cu", old=old, new=new, op=op, mode=mode)


def backward(name: str, old: str, new: str, mode: str = "thread") -> Mutation:
    file = "unpermute_backward.cu"
    return Mutation(name=name, file=file, old=old, new=new, op="backward", mode=mode)


MUTATIONS = [
    histogram("histogram: no barrier after clearing", "counts[e] = 0;\n  __syncthreads();", "counts[e] = 0;"),
    histogram(
        "histogram: no barrier before writing", "}\n  __syncthreads();\n\n  uint32_t* row", "}\n\n  uint32_t* row"
    ),
    histogram(
        "histogram: an addition that is not atomic",
        "if (leader && expert[j] >= 0) atomicAdd(&counts[expert[j]], static_cast<uint32_t>(__popc(peers)));",
        "if (expert[j] >= 0) counts[expert[j]] += 1;",
    ),
    histogram(
        "histogram: no barrier before the slices are added",
        "= sum;\n  __syncthreads();\n  if (slice",
        "= sum;\n  if (slice",
    ),
    histogram(
        "histogram: a slice too many",
        "for (int s = 1; s < kSumSlices; ++s)",
        "for (int s = 0; s < kSumSlices; ++s)",
        mode="plain",
    ),
    sort("sort: no barrier after clearing", "counts[s] = 0;\n  __syncthreads();", "counts[s] = 0;"),
    sort("sort: no barrier before writing", "}\n  __syncthreads();\n\n  uint32_t* row", "}\n\n  uint32_t* row"),
    sort(
        "sort: an addition that is not atomic",
        "if (leader && slot[i] >= 0) atomicAdd(&counts[slot[i]], static_cast<uint32_t>(__popc(peers)));",
        "if (slot[i] >= 0) counts[slot[i]] += 1;",
    ),
    sort("scan: no barrier after the warps' sums", "= inclusive;\n  __syncthreads();", "= inclusive;"),
    sort("scan: no barrier after the sum of sums", "= sum;\n  }\n  __syncthreads();", "= sum;\n  }"),
    sort("scan: no barrier before reuse", "__syncthreads();  // sums may be used again", ""),
    sort(
        "scan: a shuffle under a branch",
        "const int other = __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(distance));\n"
        "    if (lane_id() >= distance) value += other;",
        "if (lane_id() >= distance) value += __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(distance));",
        mode="plain",
    ),
    sort("rank: no first __syncwarp", "__syncwarp();  // all lanes have read", "// all lanes have read"),
    sort("rank: no second __syncwarp", "__syncwarp();\n    rank[i]", "rank[i]"),
    sort("rank: wrong mask of lanes", "((1u << lane_id()) - 1u)", "((2u << lane_id()) - 1u)", mode="plain"),
    sort(
        "rank: match under a branch",
        "const unsigned peers = __match_any_sync(kFullWarp, slot[i]);\n    const int before",
        "const unsigned peers = slot[i] >= 0 ? __match_any_sync(kFullWarp, slot[i]) : 0u;\n    const int before",
        mode="plain",
    ),
    sort("place: no barrier after clearing", "counts[i] = 0;\n    __syncthreads();", "counts[i] = 0;"),
    sort(
        "place: no barrier before the warps are added up",
        "warp_counts, slot, rank);\n    __syncthreads();",
        "warp_counts, slot, rank);",
    ),
    sort(
        "place: no barrier before rows are given out",
        "next_row[s] += distance;\n    }\n    __syncthreads();",
        "next_row[s] += distance;\n    }",
    ),
    sort("place: no barrier before the next step", "__syncthreads();  // counts are cleared", "// counts are cleared"),
    sort("place: the wrong end of the tile", "end < num_choices ? end : num_choices", "num_choices", mode="plain"),
    sort("place: tiles counted twice", "tile < tile_here ? count : 0", "tile <= tile_here ? count : 0", mode="plain"),
    sort(
        "place: shared memory short by 4 bytes",
        "(slots + kWarps) * sizeof(int)",
        "(slots + kWarps - 1) * sizeof(int)",
        "address",
    ),
    rows(
        "permute",
        "permute: one vector too many is stored",
        "if (begin + i * threads < vectors) to[",
        "if (begin + i * threads <= vectors) to[",
        "address",
    ),
    rows(
        "permute",
        "permute: one vector too many is loaded",
        "if (begin + i * threads < vectors) vector[i]",
        "if (begin + i * threads <= vectors) vector[i]",
        "address",
    ),
    rows(
        "permute",
        "permute: the last tokens' group is not stopped",
        "if (token >= num_tokens) return;",
        "",
        "address",
    ),
    rows(
        "permute",
        "permute: rows that no choice names are left",
        "choice_of_row, y, num_rows, row_bytes, where);",
        "choice_of_row, y, 0, row_bytes, where);",
        "plain",
    ),
    rows(
        "permute",
        "zero rows: garbage is believed",
        "choice >= num_choices || rows[choice] != row",
        "choice >= num_choices",
        file="zero_rows.cu",
        mode="plain",
    ),
    rows(
        "permute",
        "zero rows: garbage is used as an index",
        "choice < 0 || choice >= num_choices || rows[choice] != row",
        "rows[choice] != row",
        "address",
        file="zero_rows.cu",
    ),
    rows(
        "permute",
        "zero rows: a vote under a branch",
        "unsigned left = __ballot_sync(kFullWarp, unnamed);",
        "unsigned left = row < num_rows ? __ballot_sync(kFullWarp, unnamed) : 0u;",
        file="zero_rows.cu",
        mode="plain",
    ),
    rows(
        "unpermute", "unpermute: choices in another order", "j0 + j) : 1.0f", "j0 + kStep - 1 - j) : 1.0f", mode="plain"
    ),
    rows("unpermute", "unpermute: a dropped choice is added", "if (row[j] < 0) continue;", "", mode="plain"),
    rows(
        "unpermute",
        "unpermute: a vector behind the row is loaded",
        "c < vectors; c += blockDim.x) {\n    float sum",
        "c <= vectors; c += blockDim.x) {\n    float sum",
        "address",
    ),
    backward(
        "backward: no barrier before the warps are added up",
        "partial[warp_id()][j] = sum;\n    }\n    __syncthreads();",
        "partial[warp_id()][j] = sum;\n    }",
    ),
    backward("backward: no barrier before partial is reused", "__syncthreads();  // partial is used again", ""),
    backward(
        "backward: shared memory short by a warp", "partial, [kWarps][kStep]", "partial, [kWarps - 1][kStep]", "address"
    ),
    backward(
        "backward: half of the warp is added up", "distance = kWarpSize / 2;", "distance = kWarpSize / 4;", mode="plain"
    ),
]


def mutated(mutation: Mutation) -> str:
    """The file's text with the bug."""
    text = (emulator.ROOT / "csrc" / "cuda" / mutation.file).read_text()
    found = text.count(mutation.old)
    assert found == 1, f"{mutation.name}: the edit matches {mutation.file} {found} times. Bring it up to date"
    return text.replace(mutation.old, mutation.new)


def escapes(mutation: Mutation) -> bool:
    """Whether the check finds nothing."""
    program = emulator.check_program(mutation.mode, {mutation.file: mutated(mutation)})
    command = [str(program), mutation.op, str(mutation.seeds)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return False
    finally:
        program.unlink(missing_ok=True)
    return done.returncode == 0


def test_edits_match_the_sources() -> None:
    for mutation in MUTATIONS:
        mutated(mutation)


def test_every_bug_is_caught(tmp_path: Path) -> None:
    for mode in {mutation.mode for mutation in MUTATIONS}:
        if not has_sanitizer(mode, tmp_path):
            pytest.skip(f"g++ cannot build and run a program with {' '.join(emulator.MODES[mode])}")
        emulator.check_program(mode)  # the objects that bugs have in common
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(escapes, MUTATIONS))
    escaped = [mutation.name for mutation, missed in zip(MUTATIONS, found, strict=True) if missed]
    assert escaped == []
