"""Wrong `--smartmoe-*` command lines: each rule of `smartmoe_checks.py` with its whole text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_smartmoe.cost.fitted import Count, Part
from megatron_smartmoe.spec.trace import RoutingTrace
from tests.support.checks import Case, said_of

pytestmark = [pytest.mark.dist, pytest.mark.fast]

ONE_OUT = "Remove one of the two."
TE = "--transformer-impl transformer_engine"
GRAPHED_PARTS = "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router moe_preprocess"
WHOLE_GRAPH = "--cuda-graph-impl full_iteration --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity "
WHOLE_GRAPH += "--no-check-for-nan-in-loss-and-grad --te-rng-tracker"
TE_EXPERTS = f"{TE} --moe-grouped-gemm --smartmoe-experts transformer_engine"
FUSER = "--use-transformer-engine-op-fuser"
PRECISION_AWARE = "--bf16 --use-distributed-optimizer --use-precision-aware-optimizer"
TE_REPLICAS = f"{TE_EXPERTS} --smartmoe-spare-slots 1"
ON_GPUS = "--smartmoe --expert-model-parallel-size 2 --distributed-backend nccl"
CASES = {
    "all well": Case(flags="--smartmoe", verdict=True),
    "a watchdog without patience": Case(
        flags="--smartmoe-watchdog-floor-s 0.5",
        says="--smartmoe-watchdog-floor-s = 0.5: must be a number of seconds, at least 1: every longer hiccup of a "
        "short step would be reported. Remove it for its default, or pass --smartmoe-watchdog off.",
    ),
    "a watchdog with patience": Case(flags="--smartmoe-watchdog-floor-s 60", verdict=True),
    "without experts": Case(
        flags="--smartmoe",
        without=("--num-experts",),
        says="--smartmoe = True: needs a model with experts. Pass --num-experts 8, for example, or remove it.",
    ),
    "a whole checkpoint of no directory": Case(
        flags="--smartmoe-resume newest-whole",
        says="--smartmoe-resume = 'newest-whole': needs --load. Add --load DIR, or remove it.",
    ),
    "a whole checkpoint without looking": Case(
        flags="--load x --smartmoe-resume newest-whole --smartmoe-checkpoint-check off",
        says="--smartmoe-resume = 'newest-whole': needs a check that finds damage, and --smartmoe-checkpoint-check is "
        "off. Pass --smartmoe-checkpoint-check full or sizes.",
    ),
    "wide norms": Case(flags="--smartmoe --qk-layernorm --smartmoe-wide-qk-norm", verdict=True),
    "wide norms of nothing": Case(
        flags="--smartmoe-wide-qk-norm",
        says="--smartmoe-wide-qk-norm = True: needs --qk-layernorm and --normalization RMSNorm, without "
        "--multi-latent-attention. Add them, or remove it.",
    ),
    "wide norms of heads on several ranks": Case(
        flags="--qk-layernorm --smartmoe-wide-qk-norm --tensor-model-parallel-size 2 --sequence-parallel",
        ranks=2,
        says="--smartmoe-wide-qk-norm = True: is not supported with tensor parallelism, which spreads the heads of a "
        "token over ranks. Pass --tensor-model-parallel-size 1; experts can use more expert ranks.",
    ),
    "wide norms of TransformerEngine": Case(
        flags=f"--qk-layernorm --smartmoe-wide-qk-norm {TE}",
        te=True,
        says="--smartmoe-wide-qk-norm = True: needs --transformer-impl local: TransformerEngine's norms are per head. "
        "Add --transformer-impl local, or remove it.",
    ),
    "FSDP": Case(
        flags="--smartmoe --use-megatron-fsdp",
        says="--use-megatron-fsdp = True: is not supported with --smartmoe: it shards parameters in a layout of its "
        f"own. {ONE_OUT}",
    ),
    "scaled moments": Case(
        flags=f"{ON_GPUS} {PRECISION_AWARE} --exp-avg-dtype fp8",
        ranks=2,
        te=True,
        cpu=False,
        says="--exp-avg-dtype = 'fp8': is not supported with --smartmoe-homes on: a scale is kept for a whole shard, "
        "and experts that move would be rounded by one another's. Pass fp32, or --smartmoe-homes off.",
    ),
    "moments in bf16": Case(flags=f"{ON_GPUS} {PRECISION_AWARE} --exp-avg-dtype bf16", ranks=2, te=True, cpu=False),
    "scaled moments, replicas": Case(
        flags=f"{ON_GPUS} {PRECISION_AWARE} --exp-avg-dtype fp8 --smartmoe-homes off --smartmoe-spare-slots 1",
        ranks=2,
        te=True,
        cpu=False,
    ),
    "a precision-aware optimizer without TransformerEngine": Case(
        flags=PRECISION_AWARE,
        says="--use-precision-aware-optimizer = True: needs TransformerEngine's Adam, which CPU ranks do not use. "
        "Remove it, or add --optimizer-cpu-offload.",
    ),
    "optimizer on the CPU": Case(
        flags=f"{ON_GPUS} {PRECISION_AWARE} --optimizer-cpu-offload --exp-avg-dtype fp8", ranks=2, cpu=False
    ),
    "TransformerEngine's experts with replicas": Case(
        flags=f"{ON_GPUS} {TE_REPLICAS} --bf16 --fp8-format e4m3 --fp8-recipe blockwise", ranks=2, te=True, cpu=False
    ),
    "TransformerEngine's experts with replicas and late weight gradients": Case(
        flags=f"{ON_GPUS} {TE_REPLICAS} --delay-wgrad-compute", ranks=2, te=True, cpu=False
    ),
    "replicas of TransformerEngine, biases and late weight gradients": Case(
        flags=f"{ON_GPUS} {TE_REPLICAS} --delay-wgrad-compute",
        without=("--disable-bias-linear",),
        ranks=2,
        te=True,
        cpu=False,
    ),
    "replicas and biases of experts": Case(
        flags=f"{ON_GPUS} {TE_REPLICAS}",
        without=("--disable-bias-linear",),
        ranks=2,
        te=True,
        cpu=False,
    ),
    "replicas and a history of scales": Case(
        flags=f"{ON_GPUS} {TE_REPLICAS} --smartmoe-homes off --bf16 --fp8-format hybrid --fp8-recipe delayed",
        ranks=2,
        te=True,
        cpu=False,
        says="--fp8-recipe = 'delayed': is not supported with --smartmoe-spare-slots: its scales come from the history "
        "of a slot, in which experts follow one another. Pass --fp8-recipe tensorwise, blockwise or mxfp8, or remove "
        "--smartmoe-spare-slots.",
    ),
    "an optimizer that takes no slots": Case(
        flags="--smartmoe --optimizer soap",
        says="--optimizer = 'soap': is not supported with --smartmoe-experts grouped_mm: it would leave the experts to "
        "Adam, because a parameter holds several of them. Pass adam, sgd, muon or lion.",
    ),
    "a layer-wise optimizer in fp32": Case(
        flags="--optimizer muon --use-distributed-optimizer",
        says="--optimizer = 'muon': needs --bf16 with --use-distributed-optimizer: Megatron's layer-wise optimizer has "
        "no other precision. Add --bf16, or remove --use-distributed-optimizer.",
    ),
    "inference": Case(
        flags="--smartmoe --transformer-impl inference_optimized",
        te=True,
        says="--transformer-impl = 'inference_optimized': is not supported with --smartmoe: it is for inference only. "
        "Pass local or transformer_engine.",
    ),
    "staging memory for less than an expert": Case(
        flags="--smartmoe --expert-model-parallel-size 2 --moe-ffn-hidden-size 2048 --smartmoe-migration-staging-mib 1",
        ranks=2,
        says="--smartmoe-migration-staging-mib = 1: must be at least 6: no expert of this model would fit. Pass 6 or "
        "more, or --smartmoe-homes off.",
    ),
    "CUDA graphs of experts with any number of rows": Case(
        flags="--smartmoe --cuda-graph-impl local",
        says="--cuda-graph-impl = 'local': holds the experts, whose numbers of rows follow from the routing: a CUDA "
        "graph has fixed ones. Add --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity, with the "
        f"alltoall dispatcher, or pass {GRAPHED_PARTS}.",
    ),
    "a CUDA graph of the iteration": Case(flags=f"--smartmoe {WHOLE_GRAPH}"),
    "a CUDA graph of the iteration, by its former name": Case(
        flags="--smartmoe --cuda-graph-impl local --cuda-graph-scope full_iteration",
        says="--cuda-graph-impl = 'local': holds the experts, whose numbers of rows follow from the routing: a CUDA "
        "graph has fixed ones. Add --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity, with the "
        f"alltoall dispatcher, or pass {GRAPHED_PARTS}.",
    ),
    "a CUDA graph of the iteration and replicas": Case(
        flags=f"--smartmoe --expert-model-parallel-size 2 --smartmoe-spare-slots 1 {WHOLE_GRAPH}",
        ranks=2,
        says="--smartmoe-spare-slots = 1: is not supported with CUDA graphs that hold the experts (--cuda-graph-impl "
        "full_iteration): the host plans replicas, and sends and receives their weights, in every layer. Remove it, or "
        f"pass {GRAPHED_PARTS}.",
    ),
    "a CUDA graph of the iteration and a pool": Case(
        flags=f"--smartmoe --expert-model-parallel-size 2 --smartmoe-pool auto {WHOLE_GRAPH}",
        ranks=2,
        says="--smartmoe-pool = 'auto': is not supported with CUDA graphs that hold the experts (--cuda-graph-impl "
        "full_iteration): settings are switched while training, and a graph keeps those of its capture. Remove it, or "
        f"pass {GRAPHED_PARTS}.",
    ),
    "a CUDA graph of the iteration and micro-batches": Case(
        flags=f"--smartmoe --smartmoe-record-trace x.npz --smartmoe-record-micro-batches {WHOLE_GRAPH}",
        says="--smartmoe-record-micro-batches = True: is not supported with CUDA graphs that hold the experts "
        "(--cuda-graph-impl full_iteration): the host tells micro-batches apart, and takes no part in a replay. Remove "
        f"it, or pass {GRAPHED_PARTS}.",
    ),
    "Megatron's CUDA graphs of parts": Case(
        flags="--smartmoe --cuda-graph-impl local --cuda-graph-modules moe_router",
        says="--cuda-graph-impl = 'local': captures nothing of a GPT model with --cuda-graph-modules moe_router: "
        "Megatron's own graphs of parts of a MoE layer are those of hybrid models. "
        f"Pass {GRAPHED_PARTS}.",
    ),
    "CUDA graphs of attention": Case(
        flags=f"--smartmoe {TE} --cuda-graph-impl transformer_engine --cuda-graph-modules attn", te=True
    ),
    "CUDA graphs of attention and router": Case(
        flags=f"--smartmoe {TE} --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router",
        te=True,
    ),
    "CUDA graphs of the preprocessing": Case(flags=f"--smartmoe {TE} {GRAPHED_PARTS}", te=True),
    "CUDA graphs of the preprocessing and replicas": Case(
        flags=f"--smartmoe {TE} {GRAPHED_PARTS} --expert-model-parallel-size 2 --smartmoe-spare-slots 1",
        ranks=2,
        te=True,
    ),
    "CUDA graphs of the preprocessing and two hops": Case(
        flags=f"--smartmoe {TE} {GRAPHED_PARTS} --expert-model-parallel-size 2 --smartmoe-dispatch auto",
        ranks=2,
        te=True,
        says="--smartmoe-dispatch = 'auto': is not supported with --cuda-graph-modules moe_preprocess: how many rows "
        "cross a node once follows from the routing, and a CUDA graph has a fixed number. Pass --cuda-graph-modules "
        "attn moe_router, or remove it.",
    ),
    "CUDA graphs of the preprocessing and dropping": Case(
        flags=f"--smartmoe {TE} {GRAPHED_PARTS} --expert-model-parallel-size 2 --moe-expert-capacity-factor 1.0",
        ranks=2,
        te=True,
        says="--moe-expert-capacity-factor = 1.0: is not supported with --cuda-graph-modules moe_preprocess and the "
        "alltoall dispatcher: how many rows a rank sends follows from the routing, and a CUDA graph has a fixed "
        "number. Pass --cuda-graph-modules attn moe_router, or remove it.",
    ),
    "CUDA graphs of the preprocessing and shared experts beside the exchange": Case(
        flags=f"--smartmoe {TE} {GRAPHED_PARTS} --expert-model-parallel-size 2 --moe-shared-expert-overlap "
        "--moe-shared-expert-intermediate-size 64",
        ranks=2,
        te=True,
        says="--moe-shared-expert-overlap = True: is not supported with --cuda-graph-modules moe_preprocess: "
        "Megatron's shared experts begin in the preprocessing then, and refuse to continue behind a replay. Pass "
        "--cuda-graph-modules attn moe_router, or remove it.",
    ),
    "CUDA graphs of the router and a replayed trace": Case(
        flags=f"--smartmoe {TE} --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router "
        "--smartmoe-replay-trace {data}/eight.npz",
        te=True,
        says="--smartmoe-replay-trace = '{data}/eight.npz': is not supported with CUDA graphs that hold the router: a "
        "graph would replay one micro-batch. Pass --cuda-graph-impl transformer_engine --cuda-graph-modules attn.",
    ),
    "CUDA graphs of the router and two micro-batches at a time": Case(
        flags=f"--smartmoe {TE} --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router --bf16 "
        "--overlap-moe-expert-parallel-comm --expert-model-parallel-size 2",
        ranks=2,
        te=True,
        says="--overlap-moe-expert-parallel-comm = True: is not supported with --cuda-graph-modules moe_router: its "
        "schedule calls no layer whose tokens could be counted. Pass --cuda-graph-modules attn.",
    ),
    "biases": Case(flags="--smartmoe", without=("--disable-bias-linear",)),
    "interleaved gate and linear rows": Case(flags="--smartmoe --moe-mlp-glu-interleave-size 8"),
    "blocks of gate and linear rows that are not whole": Case(
        flags="--smartmoe --moe-mlp-glu-interleave-size 36",
        says="--moe-mlp-glu-interleave-size = 36: must divide 96, the inner size of an expert on a rank. Pass 16 or "
        "32, for example, or remove it.",
    ),
    "interleaved rows without a gate": Case(
        flags="--smartmoe --moe-mlp-glu-interleave-size 8",
        without=("--swiglu",),
        says="--moe-mlp-glu-interleave-size = 8: needs a gated activation. Add --swiglu or --quick-geglu, or remove "
        "it.",
    ),
    "fp8": Case(
        flags=f"--smartmoe {TE} --fp8-format hybrid",
        te=True,
        says="--fp8-format = 'hybrid': is not supported with --smartmoe-experts grouped_mm, which computes in bf16, "
        "fp16 and fp32. Remove it, or pass --smartmoe-experts transformer_engine.",
    ),
    "fp8 with scales from a history": Case(
        flags=f"--smartmoe {TE_EXPERTS} --fp8-format hybrid --bf16 --expert-model-parallel-size 2",
        te=True,
        ranks=2,
        says="--fp8-recipe = 'delayed': is not supported with --smartmoe-homes on: its scales come from the history "
        "of a slot, which is another expert's after a move. Pass --fp8-recipe tensorwise, blockwise or mxfp8, or "
        "--smartmoe-homes off.",
    ),
    **{
        f"fp8 with scales from the values: {recipe}": Case(
            flags=f"--smartmoe {TE_EXPERTS} --fp8-format hybrid --fp8-recipe {recipe} --bf16 "
            "--expert-model-parallel-size 2",
            te=True,
            ranks=2,
        )
        for recipe in ("tensorwise", "blockwise", "mxfp8")
    },
    "fp8 with scales from a history, without moves": Case(
        flags=f"--smartmoe {TE_EXPERTS} --fp8-format hybrid --bf16 --expert-model-parallel-size 2 --smartmoe-homes off",
        te=True,
        ranks=2,
    ),
    "weight gradients beside the dispatch": Case(
        flags=f"--smartmoe {TE} --overlap-dispatch-backward-with-experts-wgrad", te=True
    ),
    "weight gradients beside the dispatch, activations recomputed": Case(
        flags=f"--smartmoe {TE} --overlap-dispatch-backward-with-experts-wgrad --recompute-granularity selective "
        "--recompute-modules moe_act",
        te=True,
        says="--recompute-modules = 'moe_act': has moe_act, which would drop what the delayed weight gradients of "
        f"--overlap-dispatch-backward-with-experts-wgrad are made of. {ONE_OUT}",
    ),
    "fused operations": Case(
        flags=f"{ON_GPUS} {TE_EXPERTS} {FUSER} --moe-single-grouped-weight --bf16", te=True, ranks=2, cpu=False
    ),
    "one tensor of biases without fused operations": Case(
        flags=f"--smartmoe {TE_EXPERTS} --moe-single-grouped-bias",
        te=True,
        without=("--disable-bias-linear",),
        says=f"--moe-single-grouped-bias = True: needs {FUSER}: without it TransformerEngine's grouped linear takes a "
        "tensor of biases per expert. Add it, or remove the flag.",
    ),
    "rows that are not aligned": Case(
        flags="--smartmoe --hidden-size 60 --distributed-backend nccl",
        cpu=False,
        says="--hidden-size = 60: must be a multiple of 8 on every rank (expert tensor parallelism: 1). For example "
        "--hidden-size 64.",
    ),
    "TransformerEngine's experts without it": Case(
        flags="--smartmoe --smartmoe-experts transformer_engine",
        says="--smartmoe-experts = 'transformer_engine': needs TransformerEngine, --transformer-impl "
        "transformer_engine and --moe-grouped-gemm. Add them, or remove --smartmoe-experts.",
    ),
    "experts without --smartmoe": Case(
        flags="--smartmoe-experts transformer_engine",
        says="--smartmoe-experts = 'transformer_engine': needs --smartmoe. Add --smartmoe.",
    ),
    "a trace of no kind": Case(
        flags="--smartmoe-record-trace trace.json",
        says="--smartmoe-record-trace = 'trace.json': must end in .npz. Pass trace.json.npz.",
    ),
    "micro-batches of no trace": Case(
        flags="--smartmoe-record-micro-batches",
        says="--smartmoe-record-micro-batches = True: says how --smartmoe-record-trace records, which is not given. "
        "Add --smartmoe-record-trace FILE, or remove it.",
    ),
    "an ideal run that measured nothing": Case(
        flags="--smartmoe-ideal-run {data}",
        says="--smartmoe-ideal-run = '{data}': has no account.jsonl with measured steps. Name the directory of a run "
        "with --moe-router-force-load-balancing, or remove the flag.",
    ),
    "an ideal run of another launch": Case(
        flags="--smartmoe-ideal-run {data}/ideal",
        says="--smartmoe-ideal-run = '{data}/ideal': has 2 ranks, and this run 1. Name the force-balanced run of this "
        "launch, or remove the flag.",
    ),
    "an ideal run without an account of this one": Case(
        flags="--smartmoe-ideal-run {data}/ideal --smartmoe-account off",
        says="--smartmoe-ideal-run = '{data}/ideal': needs --smartmoe-account on, which measures this run. Pass "
        "--smartmoe-account on.",
    ),
    "an ideal run of this launch": Case(
        flags="--smartmoe-ideal-run {data}/ideal --expert-model-parallel-size 2", ranks=2, verdict=True
    ),
    "no trace": Case(
        flags="--smartmoe-replay-trace nowhere.npz",
        says="--smartmoe-replay-trace = 'nowhere.npz': does not exist. Give an .npz trace, Megatron's trace "
        "directory, or a load of EPLB, SGLang or vLLM (docs/traces.md).",
    ),
    "a trace of other experts": Case(
        flags="--smartmoe-replay-trace {data}/six.npz",
        says="--smartmoe-replay-trace = '{data}/six.npz': has 6 experts, and --num-experts is 8. Pass a trace with 8 "
        "experts.",
    ),
    "a trace of other ranks": Case(
        flags="--smartmoe-replay-trace {data}/eight.npz --expert-model-parallel-size 2",
        ranks=2,
        says="--expert-model-parallel-size = 2: must divide, or be a multiple of, the trace's 3 source ranks. "
        "For example: 1.",
    ),
    "a trace and a capacity": Case(
        flags="--smartmoe-replay-trace {data}/eight.npz --moe-expert-capacity-factor 1.0",
        says="--moe-expert-capacity-factor = 1.0: is not supported with --smartmoe-replay-trace, which replays "
        f"assignments before any are dropped. {ONE_OUT}",
    ),
    "micro-batches and recomputation": Case(
        flags="--smartmoe-replay-trace {data}/micro.npz --recompute-granularity full",
        says="--smartmoe-replay-trace = '{data}/micro.npz': has counts per micro-batch, and full recomputation routes "
        "each micro-batch twice. Remove --recompute-granularity full.",
    ),
}


def write_account(run: Path, *, ranks: int, micro_batches: int) -> None:
    """A run directory with one measured step."""
    header = {"version": 1, "basis": "cpu", "stages": [0] * ranks, "micro_batches": micro_batches, "virtual": 1}
    zeros = {"seconds": [[0.0] * len(Part)] * ranks, "counts": [[0.0] * len(Count)] * ranks}
    run.mkdir()
    lines = [header, {"iteration": 1, "iterations": 1, **zeros}]
    (run / "account.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    data = tmp_path_factory.mktemp("checks")
    for name, shape in (("six", (1, 1, 3, 6)), ("eight", (1, 1, 3, 8)), ("micro", (1, 1, 1, 2, 8))):
        counts = np.ones(shape, dtype=np.uint32)
        RoutingTrace(counts=counts, iteration=np.zeros(1, np.int64), layer=np.zeros(1, np.int64)).save(
            data / f"{name}.npz"
        )
    write_account(data / "ideal", ranks=2, micro_batches=2)
    return said_of(CASES, data)


@pytest.mark.parametrize("name", CASES)
def test_each_rule_says_field_value_rule_and_way_out(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says
