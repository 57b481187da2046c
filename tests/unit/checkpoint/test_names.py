"""Keys of checkpoints become one parameter of one layer and expert."""

from __future__ import annotations

import pytest

from megatron_smartmoe.checkpoint.names import logical_pieces

FC1 = "decoder.layers.{}mlp.experts.linear_fc1.weight"


def names(
    key: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> list[tuple[object, ...]]:
    return [
        (found.name, found.kind, found.expert, found.piece.shape, found.piece.offsets, found.piece.sizes, found.index)
        for found in logical_pieces(key, shape, offsets, sizes)
    ]


def test_layers_and_experts_of_a_stacked_tensor() -> None:
    key = "optimizer.state.exp_avg.decoder.layers.mlp.experts.experts.linear_fc1.weight"
    found = names(key, (4, 8, 192, 64), (2, 6, 96, 0), (1, 2, 48, 64))
    assert found == [
        (FC1.format("2."), "exp_avg", 6, (192, 64), (96, 0), (48, 64), (0, 0)),
        (FC1.format("2."), "exp_avg", 7, (192, 64), (96, 0), (48, 64), (0, 1)),
    ]


def test_layers_with_keys_of_their_own() -> None:
    found = names("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", (8, 192, 64), (5, 0, 0), (1, 192, 64))
    assert found == [(FC1.format("3."), "weight", 5, (192, 64), (0, 0), (192, 64), (0,))]


@pytest.mark.parametrize(("half", "first"), [("w", 0), ("v", 96)])
def test_experts_with_keys_of_their_own(half: str, first: int) -> None:
    """Their gate and linear rows have keys of their own too."""
    found = names(
        f"decoder.layers.mlp.experts.experts.5.linear_fc1.weight_{half}", (4, 96, 64), (1, 48, 0), (1, 48, 64)
    )
    assert found == [(FC1.format("1."), "weight", 5, (192, 64), (first + 48, 0), (48, 64), (0,))]


def test_what_is_no_experts() -> None:
    key = "decoder.layers.mlp.shared_experts.linear_fc1.weight"
    assert names(key, (2, 8, 6), (1, 0, 0), (1, 8, 6)) == [
        ("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", "weight", None, (8, 6), (0, 0), (8, 6), (0,))
    ]
    assert names("output_layer.weight", (20, 6), (10, 0), (10, 6)) == [
        ("output_layer.weight", "weight", None, (20, 6), (10, 0), (10, 6), ())
    ]


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        ("optimizer.state.param.", "main_weight"),
        ("optimizer.state.fp32_param.", "main_weight"),
        ("chained_1.optimizer.state.exp_avg_sq.", "exp_avg_sq"),
    ],
)
def test_kinds(prefix: str, kind: str) -> None:
    ((_, found, *_),) = names(f"{prefix}output_layer.weight", (20, 6), (0, 0), (20, 6))
    assert found == kind


@pytest.mark.parametrize(
    "key",
    [
        "chained_0.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param",
        "optimizer.state.step.output_layer.weight",
    ],
)
def test_what_is_no_parameters(key: str) -> None:
    assert names(key, (128,), (0,), (128,)) == []
