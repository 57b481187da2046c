from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.convert.packing import Parameter, by_query_group, by_tensor, runs_of, stacked


def parameter(heads: int, groups: int, head_size: int) -> Parameter:
    segments = by_query_group("q", "k", "v", heads=heads, groups=groups, head_size=head_size)
    return Parameter(name="qkv", expert=None, shape=((heads + 2 * groups) * head_size, 3), segments=segments)


@given(groups=st.integers(1, 4), per_group=st.integers(1, 3), head_size=st.integers(1, 4), data=st.data())
def test_any_rows_are_those_of_megatrons_arrangement(
    groups: int, per_group: int, head_size: int, data: st.DataObject
) -> None:
    heads = groups * per_group
    tensors = {
        name: np.random.rand(count * head_size, 3) for name, count in (("q", heads), ("k", groups), ("v", groups))
    }
    # Megatron's arrangement, written with axes: group, heads of the group, rows of a head.
    parts = [tensor.reshape(groups, -1, head_size, 3) for tensor in tensors.values()]
    wanted = np.concatenate(parts, axis=1).reshape(-1, 3)
    made = parameter(heads, groups, head_size)
    first = data.draw(st.integers(0, made.num_rows))
    end = data.draw(st.integers(first, made.num_rows))
    found = [tensors[run.tensor][run.first : run.first + run.count] for run in runs_of(made, first, end)]
    assert np.array_equal(np.concatenate([*found, wanted[:0]]), wanted[first:end])


def test_rows_come_back_in_the_order_of_the_tensors() -> None:
    made = [parameter(4, 2, 2), Parameter(name="fc1", expert=0, shape=(6, 3), segments=stacked(("gate", "up"), 3))]
    for name, runs in by_tensor(made).items():
        rows = [row for run in runs for row in range(run.first, run.first + run.count)]
        assert rows == list(range(len(rows))), name
    assert sorted(by_tensor(made)) == ["gate", "k", "q", "up", "v"]
