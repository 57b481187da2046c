"""ModelSpec: a GPT-MoE and its batch, read from a model file (configs/models/*.yaml).

```yaml
name: mixtral-8x7b
shape:
  source: config.json of mistralai/Mixtral-8x7B-v0.1
  layers: 32
  hidden: 4096
  seq_length: {value: 4096, source: what the plan is for; the model's limit is 32768}
moe:
  source: config.json of mistralai/Mixtral-8x7B-v0.1
  experts: 8
training:
  source: chosen here
  global_batch: {value: 1024, source: not published, uncertain: true}
```

Every number has a source: its section's, or its own when it is written as `{value, source}`; `uncertain: true` marks
what is not published. The numbers are plain attributes (`model.moe.experts`); sources and uncertain ones lie beside
them by dotted path. Names and defaults follow Megatron's flags, because that is what will be trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.yaml_io import find_config, load_yaml, located, refuse_unknown_keys

Norm = Literal["RMSNorm", "LayerNorm"]
Position = Literal["rope", "learned_absolute", "none"]

_CHOICES = {
    "norm": ("RMSNorm", "LayerNorm"),
    "position": ("rope", "learned_absolute", "none"),
    "score_function": ("softmax", "sigmoid"),
    "balancing": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
}


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434); sizes in elements.

    Attributes:
        q_rank: size of the compressed query; 0 projects the query directly.
        kv_rank: size of the compressed key and value.
        qk_head_dim: size of a head's query and key without position.
        qk_rope_dim: size of their part with rotary position.
        v_head_dim: size of a head's value.
    """

    q_rank: int = 0
    kv_rank: int
    qk_head_dim: int
    qk_rope_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """The experts of every MoE layer.

    Attributes:
        experts: E.
        top_k: experts per token.
        ffn: F, inner size of one expert.
        shared_ffn: inner size of the shared expert; 0 for none.
        first_dense: leading layers with a dense MLP instead of experts.
        every: each n-th layer after those has experts, beginning with the first.
        score_function: `softmax` or `sigmoid`.
        pre_softmax: softmax before the choice of experts, not after it.
        expert_bias: the bias-only balancing of DeepSeek-V3, without a loss.
        groups: groups of experts, of which a token chooses `group_top_k` first; 0 for no groups.
        group_top_k: groups per token.
        balancing: kind of auxiliary loss.
        aux_loss_coeff: weight of the auxiliary loss.
        scaling_factor: factor on the routed experts' output; 0 for none.
        capacity_factor: tokens of an expert over the mean at which more are dropped; 0 drops none.
    """

    experts: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    first_dense: int = 0
    every: int = 1
    score_function: str = "softmax"
    pre_softmax: bool = False
    expert_bias: bool = False
    groups: int = 0
    group_top_k: int = 0
    balancing: str = "aux_loss"
    aux_loss_coeff: float = 0.0
    scaling_factor: float = 0.0
    capacity_factor: float = 0.0

    @property
    def routing_groups(self) -> int:
        """Groups of experts that limit where a token goes; 1 for routing without."""
        return self.groups if self.groups and self.group_top_k else 1


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A GPT-MoE and the batch that it is trained with.

    Attributes:
        name: name of the model.
        layers: L, transformer layers without prediction blocks.
        hidden: H.
        heads: attention heads.
        query_groups: key and value heads (grouped-query attention).
        head_dim: elements of one head.
        ffn: inner size of a dense MLP.
        vocab: entries of the vocabulary, before padding.
        seq_length: tokens of one sample.
        moe: the experts.
        global_batch: samples of one step.
        latent: sizes of multi-head latent attention, None for ordinary attention.
        norm: `RMSNorm` or `LayerNorm`.
        gated: MLPs have a gate (SwiGLU): three matrices instead of two.
        bias: linear layers have biases.
        qk_norm: queries and keys are normed.
        qkv_bias: query, key and value have biases although `bias` is off.
        tied: the output layer shares the embedding's weights.
        position: kind of position embedding.
        rope_base: base of rotary embeddings.
        mtp_layers: multi-token-prediction blocks after the last layer.
        dropout: probability in attention and residuals.
        sources: dotted path -> where the number comes from.
        uncertain: dotted paths of numbers that are not published.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    query_groups: int
    head_dim: int
    ffn: int
    vocab: int
    seq_length: int
    moe: MoESpec
    global_batch: int
    latent: LatentAttention | None = None
    norm: Norm = "RMSNorm"
    gated: bool = True
    bias: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False
    position: Position = "rope"
    rope_base: int = 10000
    mtp_layers: int = 0
    dropout: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    uncertain: tuple[str, ...] = ()

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts; a prediction block (layer >= L) is like the last layer."""
        layer = min(layer, self.layers - 1)
        return layer >= self.moe.first_dense and (layer - self.moe.first_dense) % self.moe.every == 0

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, prediction blocks included."""
        return sum(self.has_experts(layer) for layer in range(self.layers + self.mtp_layers))

    @property
    def query_size(self) -> int:
        """Elements of all heads' queries."""
        if self.latent:
            return self.heads * (self.latent.qk_head_dim + self.latent.qk_rope_dim)
        return self.heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Elements of all heads' attention outputs."""
        return self.heads * (self.latent.v_head_dim if self.latent else self.head_dim)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.seq_length

    def padded_vocab(self, tensor_parallel: int, divisible_by: int = 128) -> int:
        """Vocabulary as Megatron pads it: a multiple of `divisible_by` per tensor-parallel rank."""
        multiple = divisible_by * tensor_parallel
        return -(-self.vocab // multiple) * multiple


_SHAPE = (
    "layers hidden heads query_groups head_dim ffn vocab seq_length norm gated bias qk_norm qkv_bias tied position "
    "rope_base mtp_layers dropout"
).split()
_MOST = {"layers": 10_000, "mtp_layers": 100, "experts": 65_536, "first_dense": 10_000}  # a typing error beyond these
_MOST_OF_ANY = 10**9
_SECTIONS = ("shape", "moe", "latent", "training")


def load_model_spec(path: Path) -> ModelSpec:
    """Read and check a model file, which may be the name of a shipped one (see `find_config`).

    Raises:
        ConfigError: unknown or missing key, wrong type, a number without a source, or sizes that contradict.
    """
    path = find_config("models", path)
    content = load_yaml(path)
    with located(path):
        return _model_of(content, path.stem)


def _model_of(content: Mapping[str, Any], default_name: str) -> ModelSpec:
    refuse_unknown_keys("", content, ("name", *_SECTIONS))
    sources: dict[str, str] = {}
    uncertain: list[str] = []
    read = {name: _section(content, name, sources, uncertain) for name in _SECTIONS if name in content}
    for name in ("shape", "moe", "training"):
        if name not in read:
            raise ConfigError(name, None, "is missing", "See configs/models/mixtral-8x7b.yaml.")
    name = content.get("name", default_name)
    if not isinstance(name, str) or not name.isprintable():
        raise ConfigError("name", name, "must be a text on one line", f"For example: name: {default_name}.")
    shape = read["shape"]
    refuse_unknown_keys("shape", shape, tuple(_SHAPE))
    refuse_unknown_keys("training", read["training"], ("global_batch",))
    model_fields = {**shape, **read["training"]}
    if "latent" not in read:
        model_fields.setdefault("query_groups", model_fields.get("heads"))
        for size in ("hidden", "heads"):
            if size in model_fields:
                _check_type(f"shape.{size}", size, "int", model_fields[size])
        if "head_dim" not in model_fields and {"hidden", "heads"} <= set(model_fields):
            model_fields["head_dim"] = model_fields["hidden"] // model_fields["heads"]
    else:
        latent = read["latent"]
        model_fields["latent"] = sizes = _build(LatentAttention, "latent", latent)
        model_fields.setdefault("query_groups", model_fields.get("heads"))
        model_fields.setdefault("head_dim", sizes.qk_head_dim + sizes.qk_rope_dim)
    model_fields.setdefault("ffn", read["moe"].get("ffn"))
    model: ModelSpec = _build(
        ModelSpec,
        "shape",
        {
            "name": name,
            "moe": _build(MoESpec, "moe", read["moe"]),
            "sources": sources,
            "uncertain": tuple(uncertain),
            **model_fields,
        },
    )
    _check(model)
    return model


def _section(content: Mapping[str, Any], where: str, sources: dict[str, str], uncertain: list[str]) -> dict[str, Any]:
    """The plain values of one section; adds their sources to `sources` and `uncertain`."""
    section = content[where]
    if not isinstance(section, dict):
        raise ConfigError(where, section, "must be a mapping", "See configs/models/mixtral-8x7b.yaml.")
    values: dict[str, Any] = {}
    for key, entry in section.items():
        if key == "source":
            continue
        path, source, value = f"{where}.{key}", section.get("source"), entry
        if isinstance(entry, dict):
            refuse_unknown_keys(path, entry, ("value", "source", "uncertain"))
            value, source = entry.get("value"), entry.get("source", source)
            if entry.get("uncertain"):
                uncertain.append(path)
        if not isinstance(source, str) or not source.strip():
            rule = "must state where the number comes from"
            raise ConfigError(f"{path}.source", source, rule, f"Give {where}.source, or {{value, source}} here.")
        sources[path] = source
        values[str(key)] = value
    return values


def _build(kind: type[Any], where: str, values: dict[str, Any]) -> Any:
    """An instance of dataclass `kind`, each value of the type that its field declares."""
    declared = {f.name: f for f in fields(kind)}
    refuse_unknown_keys(where, values, tuple(declared))
    for name, one in declared.items():
        if name not in values:
            if one.default is MISSING and one.default_factory is MISSING:
                raise ConfigError(f"{where}.{name}", None, "is missing", "See configs/models/mixtral-8x7b.yaml.")
            continue
        _check_type(f"{where}.{name}", name, str(one.type), values[name])
    return kind(**values)


def _check_type(path: str, name: str, declared: str, value: Any) -> None:
    if name in _CHOICES:
        if not isinstance(value, str) or value not in _CHOICES[name]:
            raise ConfigError(
                path, value, f"must be one of {', '.join(_CHOICES[name])}", f"For example: {_CHOICES[name][0]}."
            )
    elif declared == "int":
        least = 0 if name in ("q_rank", "shared_ffn", "first_dense", "groups", "group_top_k", "mtp_layers") else 1
        most = _MOST.get(name, _MOST_OF_ANY)
        if type(value) is not int or not least <= value <= most:
            rule = f"must be a whole number of at least {least} and at most {most:,}"
            raise ConfigError(path, value, rule, "For example: 4.")
    elif declared == "bool":
        if not isinstance(value, bool):
            raise ConfigError(path, value, "must be true or false", "For example: true.")
    elif declared == "float":
        values.number(value, path, example=0.01)


def _check(model: ModelSpec) -> None:
    """Check sizes against each other."""
    moe = model.moe
    if moe.top_k > moe.experts:
        raise ConfigError(
            "moe.top_k", moe.top_k, f"must not exceed moe.experts = {moe.experts}", "For example: top_k: 1."
        )
    if model.heads % model.query_groups:
        rule = f"must divide shape.heads = {model.heads}"
        way_out = f"For example: query_groups: {math.gcd(model.heads, model.query_groups)}."
        raise ConfigError("shape.query_groups", model.query_groups, rule, way_out)
    if moe.first_dense >= model.layers:
        rule = f"leaves none of shape.layers = {model.layers} with experts"
        raise ConfigError("moe.first_dense", moe.first_dense, rule, f"Use at most {model.layers - 1}.")
    if moe.groups and (moe.experts % moe.groups or not 1 <= moe.group_top_k <= moe.groups):
        rule = f"must divide moe.experts = {moe.experts}, with group_top_k between 1 and it"
        way_out = f"For example: groups: {math.gcd(moe.experts, moe.groups)} and group_top_k: 1."
        raise ConfigError("moe.groups", moe.groups, rule, way_out)
