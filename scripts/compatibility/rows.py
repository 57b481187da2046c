"""Megatron's options that the parts of this project could get in the way of, and the tests that train the pairs.

Whether a pair is refused, and why, is not written here: the start-up checks say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# part -> the flags that switch it on
PARTS = {
    "homes": "--smartmoe",
    "replicas": "--smartmoe --smartmoe-homes off --smartmoe-spare-slots 1",
    "chunks": "--smartmoe --smartmoe-homes off --smartmoe-overlap-degree 2",
    "pool": "--smartmoe --smartmoe-overlap-degree 2 --smartmoe-pool auto",
    "two hops": "--smartmoe --smartmoe-homes off --smartmoe-dispatch hierarchical",
}
HOMES, REPLICAS, CHUNKS, POOL, HOPS = PARTS

LAYER = "tests/dist/test_smartmoe_layer.py::test_losses_do_not_depend_on_where_experts_live"
STOCK = "tests/dist/test_smartmoe_layer.py::test_losses_are_those_of_stock_megatron"
MOVES = "tests/dist/test_homes.py::test_random_migrations_change_nothing"
COPIES = "tests/dist/test_replicas.py::test_copies_change_no_loss"
PIECES = "tests/dist/test_overlap.py::test_losses_are_those_without_overlap"
SWITCHES = "tests/dist/test_pool.py::test_switching_changes_no_loss"
TWO_HOPS = "tests/dist/test_hierarchical_dispatch.py::test_a_training_has_the_losses_of_a_flat_dispatch"
BLOCKS = "tests/dist/test_prediction_blocks.py"
SLOTS = "tests/dist/test_physical_slots.py::test_losses_and_balance"
HALVES = "tests/dist/test_physical_slots.py::test_expert_tensor_parallelism"
GPT_OSS = "tests/dist/test_gpt_oss.py"
BATCHES = "tests/dist/test_batch_overlap.py"
OPTIMIZERS = "tests/dist/test_optimizers.py"

NO_TEST = "no test trains this pair"
GPU = "needs a GPU"
STANDS_IN = f"{GPU}; trained on CPU ranks with a package that stands for it"
TRANSFORMER_ENGINE = "needs TransformerEngine, which needs a GPU to compute"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One or more options that are given together.

    Attributes:
        flags: the command line; its options are the row's.
        tests: part -> test that trains the pair, with its parameters in brackets.
        otherwise: why a pair that is accepted is trained by no test.
        needs: further flags that Megatron wants with them.
    """

    flags: str
    tests: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = NO_TEST
    needs: str = ""


def _moves(mix: str) -> str:
    return f"{MOVES}[{mix}]"


def _copies(mix: str) -> str:
    return f"{COPIES}[{mix}]"


def _pieces(mix: str) -> str:
    return f"{PIECES}[{mix}]"


def _two_hops(part: str) -> str:
    return f"{TWO_HOPS}[{_TWO_HOPS[part]}]"


def _emerging(optimizer: str) -> dict[str, str]:
    test = f"{OPTIMIZERS}::test_migrations_and_replicas_train_what_stock_megatron_trains[{optimizer}]"
    return {HOMES: test, REPLICAS: test}


_TWO_HOPS = {
    "ETP2": "ETP2, bf16, full recompute, overlapped shared experts, exact replicas",
    "VPP2": "PP2xVPP2, prediction blocks, auto replicas",
    "batches": "overlapped micro-batches, dropping, groups, history replicas",
}
_VPP = {
    HOMES: _moves("PP2xVPP2xEP2, prediction blocks"),
    REPLICAS: _copies("PP2xVPP2xEP2, overlapped, exact"),
    CHUNKS: _pieces("PP2xVPP2xEP2"),
    HOPS: _two_hops("VPP2"),
}
_OVERLAPPED = {
    HOMES: _moves("EP2xEDP2, overlapped"),
    REPLICAS: _copies("EP2xEDP2, overlapped, homes move"),
    CHUNKS: _pieces("TP2xEP2xEDP2, overlapped optimizer, shared experts"),
}
_TWO_BATCHES = {HOMES: "test_homes_move_bit_for_bit", REPLICAS: "test_replicas_change_no_loss[exact]"}
_TE = "--transformer-impl transformer_engine"
_TE_EXPERTS = f"{_TE} --moe-grouped-gemm --smartmoe-experts transformer_engine"
_FIXED_ROWS = "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity --no-check-for-nan-in-loss-and-grad"
_GRAPHED = "needs a GPU; a layer that pads runs on meta tensors in `tests/megatron/test_meta_layer.py`"
_SIGMOID = "--moe-router-score-function sigmoid"

SECTIONS: dict[str, list[Row]] = {
    "Parallelism": [
        Row(
            flags="--expert-model-parallel-size 2",
            tests={
                HOMES: _moves("EP2"),
                REPLICAS: _copies("EP4"),
                CHUNKS: _pieces("EP2"),
                POOL: SWITCHES,
                HOPS: _two_hops("batches"),
            },
        ),
        Row(
            flags="--tensor-model-parallel-size 2 --sequence-parallel",
            tests={
                HOMES: f"{LAYER}[TP2xEP2]",
                REPLICAS: _copies("TP2xEP2xETP2"),
                CHUNKS: _pieces("TP2xEP2xEDP2, overlapped optimizer, shared experts"),
                HOPS: _two_hops("ETP2"),
            },
        ),
        Row(
            flags="--expert-tensor-parallel-size 2",
            tests={
                HOMES: HALVES,
                REPLICAS: HALVES,
                CHUNKS: _pieces("ETP2xEP2, interleaved gates"),
                HOPS: _two_hops("ETP2"),
            },
            otherwise=f"{NO_TEST}; without it experts are split as --tensor-model-parallel-size says, which is trained",
            needs="--tensor-model-parallel-size 2 --sequence-parallel",
        ),
        Row(flags="--pipeline-model-parallel-size 2", tests=_VPP),
        Row(
            flags="--num-layers-per-virtual-pipeline-stage 1",
            tests=_VPP,
            needs="--pipeline-model-parallel-size 2",
        ),
        Row(flags="--num-virtual-stages-per-pipeline-rank 2", needs="--pipeline-model-parallel-size 2"),
        Row(
            flags="--pipeline-model-parallel-layout Etttt|mmL",
            tests={
                HOMES: f"{BLOCKS}::test_40_steps_with_a_migration_every_5[PP2xEP2, a stage of prediction blocks alone]"
            },
            needs="--pipeline-model-parallel-size 2 --mtp-num-layers 2",
        ),
        Row(
            flags="--context-parallel-size 2",
            tests={
                HOMES: f"{STOCK}[CP2xEP2]",
                REPLICAS: _copies("CP2xEP2, full recompute, shared experts, dense first layer"),
            },
        ),
        Row(flags="--use-megatron-fsdp", otherwise=GPU),
        Row(flags="--use-torch-fsdp2", otherwise=GPU),
        Row(
            flags="--overlap-moe-expert-parallel-comm",
            tests={part: f"{BATCHES}::{test}" for part, test in _TWO_BATCHES.items()} | {HOPS: _two_hops("batches")},
            needs="--bf16",
        ),
        Row(
            flags="--delay-wgrad-compute",
            tests={part: f"{BATCHES}::test_delayed_weight_gradients[{part}]" for part in (HOMES, REPLICAS)},
            needs=f"--bf16 {_TE} --overlap-moe-expert-parallel-comm",
        ),
        Row(
            flags="--overlap-dispatch-backward-with-experts-wgrad",
            tests={part: f"{BATCHES}::test_weight_gradients_beside_the_dispatch[{part}]" for part in (HOMES, REPLICAS)},
            needs=f"--bf16 {_TE}",
        ),
        Row(flags="--ep-overlap-early-attn-memory-release", needs="--bf16 --overlap-moe-expert-parallel-comm"),
    ],
    "Model": [
        Row(flags="--moe-layer-freq ([0]*1+[1]*3)", tests={HOMES: f"{STOCK}[EP2, shared experts, dense first layer]"}),
        Row(
            flags="--mtp-num-layers 1",
            tests={
                HOMES: f"{BLOCKS}::test_migrations_keep_stock_losses_and_parameters",
                REPLICAS: f"{BLOCKS}::test_replicas_change_no_loss",
                POOL: f"{BLOCKS}::test_replicas_change_no_loss",
                HOPS: _two_hops("VPP2"),
            },
        ),
        Row(
            flags="--mtp-use-repeated-layer",
            tests={REPLICAS: f"{BLOCKS}::test_a_repeated_layer"},
            needs="--mtp-num-layers 2",
        ),
        Row(flags="--mtp-detach-heads", needs="--mtp-num-layers 2"),
        Row(
            flags="--moe-shared-expert-intermediate-size 64",
            tests={
                HOMES: f"{STOCK}[EP2, shared experts, dense first layer]",
                REPLICAS: _copies("CP2xEP2, full recompute, shared experts, dense first layer"),
                CHUNKS: _pieces("TP2xEP2xEDP2, overlapped optimizer, shared experts"),
                HOPS: _two_hops("ETP2"),
            },
        ),
        Row(
            flags="--moe-shared-expert-overlap",
            tests={
                REPLICAS: f"{SLOTS}[this project's all-to-all]",
                CHUNKS: _pieces("TP2xEP2xEDP2, overlapped optimizer, overlapped shared experts"),
                HOPS: _two_hops("ETP2"),
            },
            needs="--moe-shared-expert-intermediate-size 64",
        ),
        Row(flags="--moe-shared-expert-gate", needs="--moe-shared-expert-intermediate-size 64"),
        Row(flags="--moe-latent-size 32"),
        Row(
            flags="--quick-geglu",  # with biases, clamped and with an offset: gpt-oss's experts
            tests={
                HOMES: f"{GPT_OSS}::test_homes_move_bit_for_bit",
                REPLICAS: f"{GPT_OSS}::test_replicas_change_no_loss",
            },
        ),
        Row(
            flags="--moe-mlp-glu-interleave-size 16",
            tests={
                HOMES: _moves("EP2, full recompute, interleaved gates"),
                REPLICAS: _copies("TP2xEP2xETP2, exact, experts recomputed, interleaved gates"),
                CHUNKS: _pieces("ETP2xEP2, interleaved gates"),
            },
        ),
        Row(flags="--moe-use-upcycling"),
    ],
    "Router": [
        Row(flags="--moe-router-topk 4", tests={HOMES: f"{LAYER}[EP2, top-4]", HOPS: _two_hops("batches")}),
        Row(
            flags="--moe-router-num-groups 4 --moe-router-group-topk 2",
            tests={HOMES: f"{STOCK}[EP2, group-limited]", HOPS: _two_hops("batches")},
        ),
        Row(
            flags="--moe-router-enable-expert-bias --moe-router-score-function sigmoid",
            tests={HOMES: f"{LAYER}[EP2, aux loss, expert bias]"},
        ),
        Row(
            flags="--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001",
            tests={HOMES: f"{LAYER}[EP2, aux loss, expert bias]"},
        ),
        Row(
            flags="--moe-router-load-balancing-type sinkhorn",
            tests={HOMES: f"{STOCK}[EP2, sinkhorn]"},
            needs="--moe-router-topk 1",
        ),
        Row(flags="--moe-router-quantile-balancing-ema 0.9"),
        Row(flags="--moe-router-pre-softmax"),
        Row(flags="--moe-router-topk-scaling-factor 2.5", needs=_SIGMOID),
        Row(flags="--moe-input-jitter-eps 0.01"),
        Row(flags="--moe-router-fusion", otherwise=TRANSFORMER_ENGINE, needs=_TE),
        Row(flags="--moe-router-force-load-balancing"),
        Row(flags="--moe-router-force-biased 0.1"),
        Row(flags="--moe-router-padding-for-quantization", otherwise=TRANSFORMER_ENGINE),
        Row(flags="--moe-enable-routing-replay"),
    ],
    "Dispatch": [
        Row(
            flags="--moe-token-dispatcher-type allgather",
            tests={HOMES: f"{LAYER}[EP2, allgather]", REPLICAS: f"{SLOTS}[allgather]"},
        ),
        Row(
            flags="--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
            otherwise=f"{STANDS_IN} (`{SLOTS.rpartition(':')[2]}[DeepEP, homes move]`)",
        ),
        Row(
            flags="--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
            otherwise=f"{STANDS_IN} (`{SLOTS.rpartition(':')[2]}[HybridEP, padded]`)",
            needs="--num-experts 6",  # and a spare slot: HybridEP wants a multiple of 4 on 2 ranks
        ),
        Row(flags="--moe-enable-deepep", otherwise=GPU, needs="--moe-token-dispatcher-type flex"),
        Row(
            flags="--moe-expert-capacity-factor 0.8",
            tests={
                HOMES: f"{LAYER}[EP2, dropping]",
                REPLICAS: f"{SLOTS}[this project's all-to-all, dropping]",
                HOPS: _two_hops("batches"),
            },
        ),
        Row(flags="--moe-token-drop-policy position", needs="--moe-expert-capacity-factor 0.8"),
        Row(
            flags="--moe-pad-expert-input-to-capacity",
            tests={HOMES: f"{STOCK}[EP2, padded to capacity]", REPLICAS: f"{SLOTS}[all-to-all, padded]"},
            needs="--moe-expert-capacity-factor 1.0",
        ),
        Row(
            flags="--moe-ncclep-static-shape",
            otherwise=GPU,
            needs="--bf16 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
        ),
        Row(flags="--moe-permute-fusion", otherwise=TRANSFORMER_ENGINE, needs=_TE),
        Row(flags="--moe-apply-probs-on-input", needs="--moe-router-topk 1"),
        Row(flags="--moe-expert-rank-capacity-factor 1.5", otherwise=TRANSFORMER_ENGINE),
    ],
    "Experts": [
        Row(
            flags="--transformer-impl transformer_engine",
            otherwise=TRANSFORMER_ENGINE,
        ),
        Row(
            flags="--smartmoe-experts transformer_engine --moe-grouped-gemm",
            otherwise=TRANSFORMER_ENGINE,
            needs=_TE,
        ),
        Row(
            flags="--moe-single-grouped-weight",
            otherwise=TRANSFORMER_ENGINE,
            needs=f"--bf16 {_TE_EXPERTS} --use-transformer-engine-op-fuser",
        ),
        Row(
            flags="--moe-single-grouped-bias",
            otherwise=TRANSFORMER_ENGINE,
            needs=f"--bf16 {_TE_EXPERTS} --use-transformer-engine-op-fuser --moe-single-grouped-weight",
        ),
        Row(flags="--use-te-activation-func", otherwise=TRANSFORMER_ENGINE, needs=_TE),
        Row(
            flags="--use-transformer-engine-op-fuser",
            otherwise=TRANSFORMER_ENGINE,
            needs=f"--bf16 {_TE_EXPERTS}",
        ),
        Row(flags="--use-fused-weighted-squared-relu", otherwise=GPU),
        Row(flags="--disable-bias-linear", tests={HOMES: _moves("EP2"), REPLICAS: _copies("EP4")}),
    ],
    "Precision": [
        Row(
            flags="--bf16",
            tests={HOMES: _moves("EP2, bf16"), HOPS: _two_hops("ETP2")},
        ),
        Row(flags="--fp16 --initial-loss-scale 256"),
        Row(flags="--fp8-format hybrid", otherwise=TRANSFORMER_ENGINE, needs=f"--bf16 {_TE_EXPERTS}"),
        Row(
            flags="--fp8-recipe tensorwise",
            otherwise=TRANSFORMER_ENGINE,
            needs=f"--bf16 --fp8-format hybrid {_TE_EXPERTS}",
        ),
        Row(
            flags="--fp8-recipe blockwise",
            otherwise=TRANSFORMER_ENGINE,
            needs=f"--bf16 --fp8-format e4m3 {_TE_EXPERTS}",
        ),
        Row(
            flags="--fp8-param-gather", otherwise=TRANSFORMER_ENGINE, needs=f"--bf16 --fp8-format hybrid {_TE_EXPERTS}"
        ),
        Row(flags="--fp4-format e2m1", otherwise=TRANSFORMER_ENGINE, needs=f"--bf16 {_TE_EXPERTS}"),
    ],
    "Optimizer": [
        Row(flags="--use-distributed-optimizer", tests=_OVERLAPPED),
        Row(flags="--overlap-grad-reduce", tests=_OVERLAPPED, needs="--use-distributed-optimizer"),
        Row(
            flags="--overlap-param-gather",
            tests=_OVERLAPPED,
            needs="--use-distributed-optimizer --overlap-grad-reduce",
        ),
        Row(flags="--num-distributed-optimizer-instances 2", needs="--use-distributed-optimizer"),
        Row(flags="--optimizer sgd"),
        Row(flags="--optimizer muon", tests=_emerging("muon")),
        Row(flags="--optimizer lion", tests=_emerging("lion")),
        Row(
            flags="--optimizer muon --use-distributed-optimizer",
            tests=dict.fromkeys((HOMES, REPLICAS), f"{OPTIMIZERS}::test_the_layer_wise_optimizer"),
            needs="--bf16",
        ),
        Row(flags="--optimizer adaptive_muon"),
        Row(flags="--optimizer soap"),
        Row(
            flags="--use-precision-aware-optimizer",
            otherwise=TRANSFORMER_ENGINE,
            needs="--bf16 --use-distributed-optimizer",
        ),
        Row(
            flags="--optimizer-cpu-offload",
            tests={HOMES: f"{OPTIMIZERS}::test_state_on_the_cpu"},
            needs="--bf16 --use-distributed-optimizer --use-precision-aware-optimizer",
        ),
    ],
    "Memory": [
        Row(
            flags="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            tests={
                HOMES: _moves("EP2, full recompute, interleaved gates"),
                REPLICAS: _copies("CP2xEP2, full recompute, shared experts, dense first layer"),
                CHUNKS: _pieces("EP2, full recompute"),
                HOPS: _two_hops("ETP2"),
            },
        ),
        Row(
            flags="--recompute-modules moe",
            tests={
                HOMES: f"{STOCK}[EP2, MoE recompute]",
                REPLICAS: _copies("TP2xEP2xETP2, exact, experts recomputed, interleaved gates"),
            },
            needs="--recompute-granularity selective",
        ),
        Row(flags="--recompute-modules moe_act", needs="--recompute-granularity selective"),
        Row(
            flags="--fine-grained-activation-offloading --offload-modules expert_fc1",
            otherwise=GPU,
            needs=_TE,
        ),
        Row(flags="--moe-paged-stash", otherwise=TRANSFORMER_ENGINE),
        Row(flags="--cuda-graph-impl transformer_engine --cuda-graph-modules attn", otherwise=GPU, needs=_TE),
        Row(
            flags="--cuda-graph-modules attn moe_router",
            otherwise=f"{GPU}; a replay's tokens are counted in `tests/megatron/test_graphed_router.py`",
            needs=f"{_TE} --cuda-graph-impl transformer_engine",
        ),
        Row(
            flags="--cuda-graph-modules attn moe_router moe_preprocess",
            otherwise=f"{GPU}; captured and replayed with a stand-in for the graph in "
            "`tests/dist/test_graphed_preprocessing.py`",
            needs=f"{_TE} --cuda-graph-impl transformer_engine",
        ),
        Row(flags="--cuda-graph-impl full_iteration", otherwise=_GRAPHED, needs=_FIXED_ROWS),
        Row(flags="--cuda-graph-impl local", otherwise=_GRAPHED, needs=_FIXED_ROWS),
    ],
    "Checkpoints": [
        Row(
            flags="--dist-ckpt-optim-fully-reshardable",
            tests={part: _OVERLAPPED[part] for part in (HOMES, REPLICAS)},
            needs="--use-distributed-optimizer",
        ),
        Row(
            flags="--async-save",
            tests={HOMES: "tests/dist/test_homes.py::test_an_asynchronous_save_while_a_migration_is_due"},
            needs="--save x --save-interval 10 --use-persistent-ckpt-worker",
        ),
        Row(flags="--ckpt-format torch", needs="--save x --save-interval 10"),
        Row(flags="--ckpt-assume-constant-structure", needs="--save x --save-interval 10"),
    ],
}
