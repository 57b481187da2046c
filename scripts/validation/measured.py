"""Measured runs of other MoE systems as launches of this planner: what each row of a CSV file trained, and how.

The systems are those of the SmartMoE paper (Zhai et al., USENIX ATC 2023): FastMoE, FasterMoE, SmartMoE and an
Alpa-like choice on one code base, DeepSpeed and Tutel beside them. All train in fp16 with unfused attention, without
sharded optimizer and without overlap. A GPT-MoE is one row of layers of one width; a Swin transformer has four widths,
which the row gives (`2,2,18,2 (10 MoE)` layers of `128..1024`), and is predicted as four models one after another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.model import ModelSpec, MoESpec
from megatron_smartmoe.spec.parallel import ParallelSpec, violation
from megatron_smartmoe.spec.readers.csv_rows import Row

VOCAB = 50304  # GPT-2's, padded, as the runs' FLOP count says
# A Swin transformer as its paper trains the base size (Liu et al. 2021): 224 x 224 images in patches of 4, attention in
# windows of 7 x 7, heads of 32; the files do not say otherwise.
SWIN_PATCHES, SWIN_WINDOW, SWIN_HEAD = 56, 7, 32
SWIN_LAYERS = re.compile(r"(\d+(?:,\d+)*) \((\d+) MoE\)")
SWIN_HIDDEN = re.compile(r"(\d+)\.\.(\d+)")
COLUMNS = (
    "cluster gpus system layers hidden heads seq topk experts gate capacity tp pp ep gbs mbs median_ms_skip10"
).split()
# Off where the file has no such column or the row leaves it empty: FasterMoE's shadowing, SmartMoE's online
# placement.
SHADOW, DYNAMIC = "shadow", "dynamic"


@dataclass(frozen=True)
class Part:
    """Layers of one width and their launch; a GPT is one part, a Swin transformer one for each of its stages."""

    model: ModelSpec
    spec: ParallelSpec


@dataclass(frozen=True)
class MeasuredRun:
    """One row.

    Attributes:
        key: the setting whose runs compete: model, cluster, GPUs, capacity.
        label: system and parallel sizes.
        system: the code base.
        gate: name of the gate.
        capacity: factor above which tokens are dropped; infinity for none.
        cluster: name of the machines.
        shadow: FasterMoE's shadowing was on.
        dynamic: SmartMoE's online placement was on.
        samples: sequences or images of a step.
        parts: what was trained, first layers first.
        time_s: median step after warm-up.
    """

    key: str
    label: str
    system: str
    gate: str
    capacity: float
    cluster: str
    shadow: bool
    dynamic: bool
    samples: int
    parts: tuple[Part, ...]
    time_s: float

    @property
    def gpus(self) -> int:
        """GPUs of the job."""
        return self.parts[0].spec.gpus

    @property
    def vision(self) -> bool:
        """Whether it is an image model."""
        return len(self.parts) > 1


def run_of(row: Row) -> MeasuredRun:
    """Read one row of the CSV.

    Raises:
        ConfigError: a cell is not what its column needs.
    """
    models = [_gpt(row)] if row.is_whole("hidden") or not SWIN_HIDDEN.fullmatch(row.text("hidden")) else _swin(row)
    parts = tuple(Part(model, _spec(row, model)) for model in models)
    for part in parts:
        reason = violation(part.model, part.spec)
        if reason:
            rule = f"is a launch that cannot be: {reason}"
            raise ConfigError(f"{row.where}: gpus", row.text("gpus"), rule, "Correct the row.")
    first = parts[0]
    shape = f"L{first.model.layers} H{first.model.hidden}" if len(parts) == 1 else f"Swin H{row.text('hidden')}"
    return MeasuredRun(
        key=f"{row.text('cluster')} {first.spec.gpus} {shape} E{first.model.moe.experts} "
        f"capacity {row.text('capacity')}",
        label=f"{row.text('system')} {first.spec.label()}",
        system=row.text("system"),
        gate=row.text("gate"),
        capacity=row.number("capacity", finite=False),
        cluster=row.text("cluster"),
        shadow=_is_on(row, SHADOW),
        dynamic=_is_on(row, DYNAMIC),
        samples=row.whole("gbs", least=1),
        parts=parts,
        time_s=row.number("median_ms_skip10") * 1e-3,
    )


def _is_on(row: Row, column: str) -> bool:
    text = row.text(column).upper() if column in row.cells else ""
    if text not in ("ON", "OFF", ""):
        raise ConfigError(f"{row.where}: {column}", text, "must be ON, OFF or empty", "Correct the cell.")
    return text == "ON"


def _gpt(row: Row) -> ModelSpec:
    """The model of a row with one width."""
    hidden, heads = row.whole("hidden", least=1), row.whole("heads", least=1)
    experts, top_k = _experts(row, 4 * hidden)
    if heads > hidden:
        raise ConfigError(f"{row.where}: heads", heads, f"must be at most {hidden}", "Correct the cell.")
    return ModelSpec(
        name="gpt-moe",
        layers=row.whole("layers", least=1, most=10_000),
        hidden=hidden,
        heads=heads,
        query_groups=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        vocab=VOCAB,
        seq_length=row.whole("seq", least=1),
        global_batch=row.whole("gbs", least=1),
        norm="LayerNorm",
        gated=False,
        bias=True,
        tied=True,
        position="learned_absolute",
        moe=MoESpec(experts=experts, top_k=top_k, ffn=4 * hidden // top_k),
    )


def _swin(row: Row) -> list[ModelSpec]:
    """The stages of a row with several widths; a window is a sample of `SWIN_WINDOW` squared tokens."""
    depths, first_hidden, moe_layers = _swin_sizes(row)
    experts, top_k = _experts(row, 4 * first_hidden)
    images = row.whole("gbs", least=1)
    models: list[ModelSpec] = []
    for stage in reversed(range(len(depths))):  # MoE layers are every other one, from the end
        hidden, layers = first_hidden << stage, depths[stage]
        here = min(moe_layers, layers // 2)
        moe_layers -= here
        model = ModelSpec(
            name=f"swin-stage-{stage + 1}",
            layers=layers,
            hidden=hidden,
            heads=max(1, hidden // SWIN_HEAD),
            query_groups=max(1, hidden // SWIN_HEAD),
            head_dim=min(hidden, SWIN_HEAD),
            ffn=4 * hidden,
            vocab=1,
            seq_length=SWIN_WINDOW**2,
            global_batch=images * (SWIN_PATCHES // SWIN_WINDOW >> stage) ** 2,
            norm="LayerNorm",
            gated=False,
            bias=True,
            position="none",
            moe=MoESpec(experts=experts, top_k=top_k, ffn=4 * hidden, every=2, first_dense=layers - 2 * here),
        )
        models.insert(0, model)
    return models


def _swin_sizes(row: Row) -> tuple[list[int], int, int]:
    """(layers of each stage, width of the first, layers with experts)."""
    layers, hidden = SWIN_LAYERS.fullmatch(row.text("layers")), SWIN_HIDDEN.fullmatch(row.text("hidden"))
    most = len(bin(SWIN_PATCHES // SWIN_WINDOW)) - 2  # stages until one window is left
    depths = [int(depth) for depth in layers[1].split(",")] if layers else []
    first, last = (int(hidden[1]), int(hidden[2])) if hidden else (0, 0)
    if not layers or not 1 < len(depths) <= most or not all(0 < depth < 1000 for depth in depths):
        rule = f"must be the layers of up to {most} stages and of those with experts"
        raise ConfigError(f"{row.where}: layers", row.text("layers"), rule, "For example: 2,2,18,2 (10 MoE).")
    if not 0 < first < 10**6 or last != first << len(depths) - 1:
        rule = f"must be the first and the last of {len(depths)} widths that double"
        raise ConfigError(f"{row.where}: hidden", row.text("hidden"), rule, "For example: 128..1024.")
    if int(layers[2]) > sum(depth // 2 for depth in depths):
        rule = "has more layers with experts than every other one"
        raise ConfigError(f"{row.where}: layers", row.text("layers"), rule, "For example: 2,2,18,2 (10 MoE).")
    return depths, first, int(layers[2])


def _experts(row: Row, most_top_k: int) -> tuple[int, int]:
    experts, top_k = row.whole("experts", least=1, most=65_536), row.whole("topk", least=1)
    most = min(experts, most_top_k)
    if top_k > most:
        raise ConfigError(f"{row.where}: topk", top_k, f"must be at most {most}", "Correct the cell.")
    return experts, top_k


def _spec(row: Row, model: ModelSpec) -> ParallelSpec:
    """How the row launched a model whose samples may be windows of its own."""
    samples = model.global_batch // row.whole("gbs", least=1)
    return ParallelSpec(
        gpus=row.whole("gpus", least=1),
        tp=row.whole("tp", least=1),
        pp=row.whole("pp", least=1),
        ep=row.whole("ep", least=1),
        micro_batch=row.whole("mbs", least=1) * samples,
        global_batch=model.global_batch,
        distributed_optimizer=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        grad_reduce_in_fp32=False,
        implementation="local",
    )
