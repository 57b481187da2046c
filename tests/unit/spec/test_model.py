"""Model files: every number has a source, unknown keys have a path, sizes fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.model import load_model_spec

MODELS = sorted((Path(__file__).parents[3] / "configs" / "models").glob("*.yaml"))
TEXT = """
shape: {source: here, layers: 4, hidden: 64, heads: 4, ffn: 128, vocab: 500, seq_length: 32}
moe: {source: there, experts: 8, top_k: 2, ffn: {value: 96, source: elsewhere, uncertain: true}}
training: {source: here, global_batch: 8}
"""
# Weights of all parts together, in billions, as their authors publish them.
PUBLISHED = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "deepseek-v3": 671.0 + 11.5,  # with the prediction block, whose embedding and output are shared
    "olmoe-1b-7b": 6.9,
    "smartmoe-gpt": 7.27,
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    return path


def test_numbers_sources_and_doubts(tmp_path: Path) -> None:
    model = load_model_spec(write(tmp_path, TEXT))
    assert (model.name, model.hidden, model.moe.ffn, model.query_groups, model.head_dim) == ("model", 64, 96, 4, 16)
    assert model.sources["moe.experts"] == "there"
    assert model.sources["moe.ffn"] == "elsewhere"
    assert model.uncertain == ("moe.ffn",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers: 4", "layer: 4", "shape.layer = 4: is not a known key"),
        ("layers: 4", "layers: 4.5", "shape.layers = 4.5: must be a whole number"),
        ("layers: 4, ", "", "shape.layers = None: is missing"),
        ("top_k: 2", "top_k: 9", "moe.top_k = 9: must not exceed moe.experts = 8"),
        ("source: there, ", "", "moe.experts.source = None: must state where the number comes from"),
        ("source: elsewhere, uncertain", "sauce: elsewhere, uncertain", "moe.ffn.sauce = 'elsewhere': is not a known"),
        ("ffn: 128", "ffn: 128, norm: BatchNorm", "shape.norm = 'BatchNorm': must be one of RMSNorm, LayerNorm"),
        ("ffn: 128", "ffn: 128, query_groups: 3", "shape.query_groups = 3: must divide shape.heads = 4"),
        ("top_k: 2", "top_k: 2, first_dense: 4", "moe.first_dense = 4: leaves none"),
        ("top_k: 2", "top_k: 2, groups: 3", "moe.groups = 3: must divide moe.experts = 8"),
        ("training:", "trainings:", "trainings = "),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        load_model_spec(write(tmp_path, TEXT.replace(old, new, 1)))
    assert message in str(caught.value)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_shipped_files_load_with_a_source_for_everything(path: Path) -> None:
    model = load_model_spec(path)
    assert model.sources
    assert all(source.strip() for source in model.sources.values())


def test_layers_with_experts() -> None:
    model = load_model_spec(next(path for path in MODELS if path.stem == "deepseek-v3"))
    assert [model.has_experts(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert model.num_moe_layers == 59


def test_published_sizes_are_named() -> None:
    """Here beside the files; tests/unit/cost/test_memory_parameters.py counts them."""
    assert set(PUBLISHED) | {"quickstart"} == {load_model_spec(path).name for path in MODELS}
