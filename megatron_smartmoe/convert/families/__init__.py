"""A table for each family of models, found by `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from megatron_smartmoe.convert.families import deepseek, dense, mixtral, olmoe, qwen
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig

FAMILIES: Mapping[str, Callable[[HFConfig], ModelTable]] = {
    "mixtral": mixtral.table,
    "qwen2_moe": qwen.qwen2_moe,
    "qwen3_moe": qwen.qwen3_moe,
    "olmoe": olmoe.table,
    "deepseek_v2": deepseek.deepseek_v2,
    "deepseek_v3": deepseek.deepseek_v3,
    "llama": dense.llama,
    "qwen2": dense.qwen2,
    "qwen3": dense.qwen3,
}

# Families that were looked at and cannot be built here, with what is missing.
_MISSING = {
    "gpt_oss": "its experts' rows and biases have no table here, and its released files are MXFP4, which is not "
    "dequantised; its attention, with sinks and windows in every second layer, needs --attention-backend unfused",
}


def with_prediction(table: ModelTable, names: Collection[str]) -> bool:
    """Add the layers that predict further tokens (MTP) where the tensors of these names have them; whether they do."""
    if not table.mtp_layers or f"model.layers.{table.num_layers}.eh_proj.weight" not in names:
        return False
    deepseek.add_prediction(table)
    return True


def table_of(config: HFConfig, ignored_keys: Collection[str] = ()) -> ModelTable:
    """The model's table.

    Args:
        config: its config.json.
        ignored_keys: keys of it that the user says have no effect.

    Raises:
        ConfigError: the family is not known, or the model has something that Megatron has not.
    """
    kind = config.model_type
    if kind in _MISSING:
        raise config.refused("model_type", f"is not supported: {_MISSING[kind]}", f"Supported: {', '.join(FAMILIES)}.")
    if kind not in FAMILIES:
        raise config.refused("model_type", "is not a family that is known here", f"Supported: {', '.join(FAMILIES)}.")
    made = FAMILIES[kind](config)
    config.check_all_read(ignored_keys)
    return made
