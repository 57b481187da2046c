"""A dense model as a model with experts: every expert begins as the dense block, or as a part of it.

Sparse upcycling (arXiv 2212.05055) gives each of N experts a copy of the dense block and draws the router at random.
Where the weights of a token's experts sum to 1, as in Mixtral, the first loss is the dense model's.

Finer experts (arXiv 2410.07524, "virtual groups"): granularity G cuts the block into G parts along its inner size,
each expert is a copy of one part, and all parts of a copy have the same router row: a token that takes one takes
all of them. Each part then has weight 1/G of its copy's; the output matrices are multiplied by G, which is exact for
the powers of 2 that are accepted. Expert e is part e mod G of copy e // G.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.convert import numbers
from megatron_smartmoe.convert.families import table_of
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.convert.hf_tensors import HFTensors
from megatron_smartmoe.errors import ConfigError

EXPERTS, TOPK, GRANULARITY = "--experts", "--topk", "--granularity"
_EXPERT = re.compile(r"(model\.layers\.\d+\.)\w+\.experts\.(\d+)\.(\w+)\.weight")
_ROUTER = re.compile(r"model\.layers\.\d+\.\w+\.gate\.weight")
# Names of gate, linear and output matrix of an expert, and their names in the dense block.
_DENSE_NAMES = {
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
    "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How experts are made.

    Attributes:
        experts: of a layer.
        topk: experts of a token.
        granularity: parts that the dense block is cut into.
        noise: standard deviation of what is added to the experts' weights, relative to that of each matrix's row.
        router_std: standard deviation of the routers' weights.
        seed: of noise and routers.
    """

    experts: int
    topk: int
    granularity: int = 1
    noise: float = 0.0
    router_std: float = 0.02
    seed: int = 1234

    def check(self, ffn: int) -> None:
        """The numbers fit each other and the dense block.

        Raises:
            ConfigError: they do not.
        """
        parts = self.granularity
        if parts < 1 or parts & (parts - 1):
            raise ConfigError(GRANULARITY, parts, "must be a power of 2", f"For example: {GRANULARITY} 2.")
        if self.experts < 2 or self.experts % parts:
            rule = f"must be at least 2 and a multiple of {GRANULARITY} = {parts}"
            raise ConfigError(EXPERTS, self.experts, rule, f"For example: {EXPERTS} {8 * parts}.")
        if not 1 <= self.topk <= self.experts or self.topk % parts:
            rule = f"must be at most {EXPERTS} = {self.experts} and a multiple of {GRANULARITY} = {parts}, so that a "
            rule += "token takes all parts of a copy"
            raise ConfigError(TOPK, self.topk, rule, f"For example: {TOPK} {2 * parts}.")
        if ffn % parts:
            raise ConfigError(GRANULARITY, parts, f"must divide the block's inner size {ffn}", "Pass a divisor.")
        if self.noise < 0 or self.router_std < 0:
            rule = "must be at least 0"
            raise ConfigError("--expert-noise, --router-std", [self.noise, self.router_std], rule, "Leave them out.")


def upcycled_config(dense: HFConfig, recipe: Recipe) -> HFConfig:
    """The config.json of the model with experts: Mixtral's for a Llama, Qwen3-MoE's for a Qwen3.

    Raises:
        ConfigError: the family has no such counterpart.
    """
    family, ffn = dense.model_type, dense.size("intermediate_size")
    recipe.check(ffn)
    content = {key: value for key, value in dense.content.items() if key not in ("architectures", "auto_map")}
    content |= {"num_experts_per_tok": recipe.topk, "router_aux_loss_coef": 0.001}
    part = ffn // recipe.granularity
    if family == "llama":
        content |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": part}
        content |= {"num_local_experts": recipe.experts, "sliding_window": None}
        for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
            content.pop(key, None)
    elif family == "qwen3":
        content |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
        content |= {"num_experts": recipe.experts, "moe_intermediate_size": part, "decoder_sparse_step": 1}
        content |= {"mlp_only_layers": []}
        content.pop("layer_types", None)
    else:
        rule = "cannot be upcycled: only llama (to mixtral) and qwen3 (to qwen3_moe) have a counterpart with experts"
        raise dense.refused("model_type", rule)
    return HFConfig(content, dense.path)


def upcycled_table(dense: HFConfig, recipe: Recipe) -> ModelTable:
    """The table of the model with experts.

    Raises:
        ConfigError: see `upcycled_config`.
    """
    config = upcycled_config(dense, recipe)
    return table_of(config, config.content)


@dataclass(frozen=True, kw_only=True)
class UpcycledTensors(HFTensors):
    """The tensors of the model with experts, made from those of the dense one as they are read.

    Attributes:
        recipe: how.
        shapes: of the tensors of the model with experts.
    """

    recipe: Recipe
    shapes: Mapping[str, tuple[int, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        """The type of the numbers that `rows` gives."""
        expert = _EXPERT.fullmatch(name)
        if _ROUTER.fullmatch(name):
            return "float32"
        return super().dtype(name) if expert is None else "float32"

    def rows(self, name: str, first: int, end: int) -> NDArray[Any]:
        """Some rows of a tensor, flat."""
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            return self._expert_rows(name, expert, first, end)
        if _ROUTER.fullmatch(name):
            return self._router_rows(name, first, end)
        return super().rows(name, first, end)

    def _expert_rows(self, name: str, expert: re.Match[str], first: int, end: int) -> NDArray[np.float32]:
        parts, part = self.recipe.granularity, int(expert[2]) % self.recipe.granularity
        dense = f"{expert[1]}mlp.{_DENSE_NAMES[expert[3]]}.weight"
        num_rows, width = self.shapes[name]
        if _DENSE_NAMES[expert[3]] == "down_proj":
            found = numbers.as_float32(super().rows(dense, first, end), super().dtype(dense))
            columns = found.reshape(end - first, -1)[:, part * width : (part + 1) * width]
            values = np.ascontiguousarray(columns) * np.float32(parts)
        else:
            at = part * num_rows
            found = numbers.as_float32(super().rows(dense, at + first, at + end), super().dtype(dense))
            values = found.reshape(end - first, width)
        if self.recipe.noise:
            values = values + self._noise(name, values, first)
        return values.reshape(-1)

    def _noise(self, name: str, values: NDArray[np.float32], first: int) -> NDArray[np.float32]:
        """Noise for rows, the same whichever slice they are read in."""
        noise = np.stack([self._normal(name, first + row, values.shape[1]) for row in range(len(values))])
        scale = np.float32(self.recipe.noise) * values.std(axis=1, keepdims=True)
        scaled: NDArray[np.float32] = noise * scale
        return scaled

    def _router_rows(self, name: str, first: int, end: int) -> NDArray[np.float32]:
        """One random row for each copy of the block, which all parts of the copy have."""
        parts, width = self.recipe.granularity, self.shapes[name][1]
        rows = [self._normal(name, expert // parts, width) for expert in range(first, end)]
        values: NDArray[np.float32] = np.concatenate(rows) * np.float32(self.recipe.router_std)
        return values

    def _normal(self, name: str, row: int, width: int) -> NDArray[np.float32]:
        generator = np.random.default_rng([self.recipe.seed, zlib.crc32(name.encode()), row])
        return generator.standard_normal(width, dtype=np.float32)
