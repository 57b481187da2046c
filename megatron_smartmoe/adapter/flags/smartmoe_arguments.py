"""The project's own flags, `--smartmoe-*`, in the order of --help, and what their values stand for."""

from __future__ import annotations

import argparse

from megatron_smartmoe.adapter.gates.table import (
    GATE,
    GATES,
    OUTGOING,
    OUTGOING_DEFAULT,
    RESIDUALS,
    TAU_DEFAULT,
    TOP_K,
    ZERO_EXPERTS,
    ZERO_EXPERTS_DEFAULT,
    ZERO_EXPERTS_TAU,
)
from megatron_smartmoe.checkpoint.manifest import LEVELS
from megatron_smartmoe.planner.flags import DISPATCH, HOMES_INTERVAL, OVERLAP_DEGREE, SPARE_SLOTS
from megatron_smartmoe.spec.parallel import DISPATCHES

DEVICES = ("auto", "cpu", "cuda")
EXPERTS = ("grouped_mm", "transformer_engine")
HOMES = ("on", "off", "dry", "shuffle")
REPLICAS = ("off", "history", "exact", "auto")
SWITCH = ("on", "off")

REHEARSAL = "--smartmoe-rehearsal"
ACCOUNT = "--smartmoe-account"
IDEAL_RUN = "--smartmoe-ideal-run"
WATCHDOG = "--smartmoe-watchdog"
WATCHDOG_FLOOR = "--smartmoe-watchdog-floor-s"
WATCHDOG_FLOOR_S = 8.0  # with the median step: twice what busy machines were seen to need
RESUME = "--smartmoe-resume"
RESUMES = ("newest", "newest-whole")

RECORD_MICRO_BATCHES = "--smartmoe-record-micro-batches"
PLAN_ON = "--smartmoe-plan-on"
POOL = "--smartmoe-pool"
POOL_INTERVAL = "--smartmoe-pool-interval"
AUTO = "auto"  # of the overlap degree, the dispatch and the pool
MOST_CHUNKS = 8  # that `auto` tries: a ninth would hide another 1/72 of the all-to-alls at best


def add_smartmoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the project's flags to a parser that Megatron's are added to, once; a second call does nothing.

    Returns:
        The parser, as Megatron's `extra_args_provider` does.
    """
    if "--smartmoe" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group("smartmoe", "load balancing for MoE training")
    group.add_argument(
        "--smartmoe-device",
        choices=DEVICES,
        default="auto",
        help="cuda: NCCL and GPU kernels. cpu: gloo, through the CPU facade. auto: cuda where there is a GPU. Default: "
        "auto.",
    )
    group.add_argument(
        "--smartmoe-run-dir",
        metavar="DIR",
        default=None,
        help="Write metrics.jsonl, smartmoe.jsonl, arguments.txt and summary.json to this directory. Default: write "
        "none of them.",
    )
    group.add_argument(
        REHEARSAL,
        choices=("on", "off"),
        default="on",
        help="on: before any rank starts, build what a rank will build once, without memory: configuration, tokenizer, "
        "schedules, datasets, and the model of every kind of pipeline stage with one micro-batch. off: only check the "
        "flags. Default: on.",
    )
    group.add_argument(
        "--smartmoe",
        action="store_true",
        help="Build the model with this project's MoE layer, whose experts can move between ranks while training.",
    )
    group.add_argument(
        "--smartmoe-experts",
        choices=EXPERTS,
        default="grouped_mm",
        help="With --smartmoe: what computes the experts. grouped_mm: torch's grouped GEMM. transformer_engine: "
        "TransformerEngine's grouped linear layers. Default: grouped_mm.",
    )
    group.add_argument(
        "--smartmoe-wide-qk-norm",
        action="store_true",
        help="With --qk-layernorm and --transformer-impl local: normalise queries, and keys, over all heads of a token "
        "together, as OLMoE does, and not each head by itself.",
    )
    group.add_argument(
        GATE,
        choices=(TOP_K, *GATES),
        default=TOP_K,
        help="How tokens choose experts (docs/gates.md). top-k: as Megatron's own flags say. "
        + " ".join(f"{name}: {gate.what}." for name, gate in GATES.items())
        + " Works without --smartmoe too. Default: top-k.",
    )
    group.add_argument(
        OUTGOING,
        type=float,
        metavar="SHARE",
        default=OUTGOING_DEFAULT,
        help=f"With {GATE} topology: the share of a rank's tokens whose best expert may be on another node, from 0 to "
        f"1. Default: {OUTGOING_DEFAULT}, FasterMoE's.",
    )
    group.add_argument(
        ZERO_EXPERTS,
        metavar="COUNTS",
        default=ZERO_EXPERTS_DEFAULT,
        help=f"With {GATE} moe++: how many experts cost nothing, besides --num-experts: zero=N return nothing, copy=N "
        f"their input, constant=N a mixture of it and a trained vector. Default: {ZERO_EXPERTS_DEFAULT}.",
    )
    group.add_argument(
        ZERO_EXPERTS_TAU,
        type=float,
        metavar="TAU",
        default=TAU_DEFAULT,
        help=f"With {GATE} moe++: weight of the experts that cost nothing in the loss; the lower, the more tokens take "
        f"them. Above 0. Default: {TAU_DEFAULT}.",
    )
    group.add_argument(
        RESIDUALS,
        choices=("on", "off"),
        default="on",
        help=f"With {GATE} moe++: whether a router adds the scores of the MoE layer before, times a trained matrix, to "
        "its own. Each pipeline stage begins anew. Default: on, as in the paper.",
    )
    group.add_argument(
        OVERLAP_DEGREE,
        metavar="D",
        default="1",
        help="With --smartmoe and expert parallelism: split dispatch and combine into D chunks and overlap the "
        "all-to-all of one chunk with the experts' computation of another. 1: no overlap. At most the number of "
        "expert-parallel ranks. auto: the degree with the shortest predicted time. Default: 1.",
    )
    group.add_argument(
        DISPATCH,
        choices=(*DISPATCHES, AUTO),
        default=DISPATCHES[0],
        help="With --smartmoe and expert-parallel groups on several nodes: flat: a token is sent once for each of its "
        "experts. hierarchical: between nodes it is sent once for each node that has any of its experts, and copied "
        "there; results come back one by one, and losses are those of flat, to the bit. auto: hierarchical where it "
        "saves at least 1%% of a MoE layer's predicted time. Default: flat.",
    )
    group.add_argument(
        "--smartmoe-record-trace",
        metavar="FILE",
        default=None,
        help="Write the tokens per expert of every iteration, layer and source rank to this .npz file, for `smartmoe "
        "simulate`, --parallel-trace and --smartmoe-replay-trace. Works without --smartmoe too. A run that resumes "
        "continues its file. Default: no trace.",
    )
    group.add_argument(
        RECORD_MICRO_BATCHES,
        action="store_true",
        help="With --smartmoe-record-trace: keep the micro-batches of an iteration apart, which makes the file that "
        "many times as large. With it and --smartmoe-run-dir, `smartmoe simulate --replay DIR` makes every decision "
        "of the run again; without it, those of runs with one micro-batch, or with homes alone.",
    )
    group.add_argument(
        "--smartmoe-replay-trace",
        metavar="FILE",
        default=None,
        help="BENCHMARKS ONLY: route tokens as this trace did, whatever the routers choose. The trained model is "
        "meaningless.",
    )
    group.add_argument(
        ACCOUNT,
        choices=SWITCH,
        default="on",
        help="With --num-experts. on: time the parts of every step and count what every rank computes; every "
        "--log-interval iterations print one line with where the step's time goes, tokens per second, MFU and peak "
        "memory, write the same to TensorBoard and W&B, and keep the measurements in account.jsonl for smartmoe "
        "report. It changes nothing that is trained, and works without --smartmoe too. off: measure nothing. "
        "Default: on.",
    )
    group.add_argument(
        IDEAL_RUN,
        metavar="RUN",
        default=None,
        help="Run directory of a run of this launch with --moe-router-force-load-balancing, --smartmoe-homes off and "
        "no spare slots: the summary at the end then has the share of its speed that was reached, and what is not "
        "explained. smartmoe report --ideal RUN does the same afterwards. Default: none.",
    )
    _add_watchdog(group)
    _add_checkpoints(group)
    _add_homes(group)
    _add_replicas(group)
    _add_pool(group)
    return parser


def _add_watchdog(group: argparse._ArgumentGroup) -> None:
    """Flags of the watchdog, which names the rank that holds training up."""
    group.add_argument(
        WATCHDOG,
        choices=SWITCH,
        default="on",
        help="on: when a step takes much longer than the median step, print one line that names the slowest rank, its "
        "iteration, layer and collective, and write that rank's stacks to stacks-rank<N>.txt in the run directory. It "
        "ends nothing, and works without --smartmoe too. off: watch nothing. Default: on.",
    )
    group.add_argument(
        WATCHDOG_FLOOR,
        type=float,
        metavar="SECONDS",
        default=WATCHDOG_FLOOR_S,
        help="With --smartmoe-watchdog on: report a step that takes longer than 3 times the median step plus SECONDS. "
        "Raise it where steps vary, for example because ranks share cores. Before there are 3 timed steps, and while a "
        "rank saves, evaluates or compiles, the limit is 300 seconds without any progress. Default: 8.",
    )


def _add_checkpoints(group: argparse._ArgumentGroup) -> None:
    """Flags of what is done about damaged checkpoints."""
    group.add_argument(
        "--smartmoe-checkpoint-check",
        choices=LEVELS,
        default="full",
        help="Check the checkpoint of --load before the first iteration, with the manifest that was saved beside it. "
        "full: sizes of its files before the ranks start, and in each rank the checksums of the files that it reads. "
        "sizes: sizes only. off: neither. Default: full.",
    )
    group.add_argument(
        RESUME,
        choices=RESUMES,
        default="newest",
        help="newest: resume from the checkpoint that Megatron's tracker (or --ckpt-step) names, and stop if it is "
        "damaged. newest-whole: if it is damaged, resume from the newest one that is whole, and print what is lost. "
        "Default: newest.",
    )


def _add_homes(group: argparse._ArgumentGroup) -> None:
    """Flags of the slow loop, which moves experts between ranks for good."""
    group.add_argument(
        "--smartmoe-homes",
        choices=HOMES,
        default="on",
        help="With --smartmoe and expert parallelism. on: move experts to other ranks when the predicted gain is worth "
        "the cost. off: never. dry: decide and log, but move nothing. shuffle: move experts to random ranks at every "
        "interval, to test that moving them changes nothing in the training. Default: on.",
    )
    group.add_argument(
        "--smartmoe-homes-interval",
        type=int,
        metavar="N",
        default=HOMES_INTERVAL,
        help="Re-evaluate expert placement every N iterations. Default: 100.",
    )
    group.add_argument(
        "--smartmoe-homes-start",
        type=int,
        metavar="ITERATION",
        default=0,
        help="Do not move experts before this iteration (routing is unstable early in training). Default: 0.",
    )
    group.add_argument(
        "--smartmoe-homes-stop",
        type=int,
        metavar="ITERATION",
        default=None,
        help="Do not move experts after this iteration. Default: no limit.",
    )
    group.add_argument(
        "--smartmoe-homes-margin",
        type=float,
        metavar="FACTOR",
        default=2.0,
        help="Move experts when the gain predicted over the horizon is more than FACTOR times the cost of moving them. "
        "After moves that lost time, a gain of more than FACTOR times what those promised too much need not wait for "
        "the cooldown. Default: 2.",
    )
    group.add_argument(
        "--smartmoe-homes-horizon",
        type=int,
        metavar="N",
        default=500,
        help="Count the predicted gain of a move over N iterations. Default: 500.",
    )
    group.add_argument(
        "--smartmoe-migration-staging-mib",
        type=int,
        metavar="MIB",
        default=1024,
        help="Memory per rank for experts in transit, in MiB, allocated when training starts; less where a layer's "
        "experts of a rank need less. Larger migrations take several steps. Default: 1024.",
    )
    group.add_argument(
        "--smartmoe-migration-timeout-s",
        type=float,
        metavar="SECONDS",
        default=600.0,
        help="Abort a migration when a rank does not respond for this long; training continues without further moves. "
        "Default: 600.",
    )
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        default=argparse.SUPPRESS,
        help="Save the distributed optimizer's state as raw buffers, as Megatron does by default. With --smartmoe, "
        "moving experts and --save the default is --dist-ckpt-optim-fully-reshardable: raw buffers are in the order of "
        "the slots, so experts move home for every save and back.",
    )
    group.add_argument(
        "--smartmoe-cluster",
        metavar="FILE",
        default=None,
        help="Cluster file of this machine, from which times are predicted, or the name of a shipped one, such as "
        "h100-sxm (configs/clusters/); `smartmoe calibrate` writes one. Default: the shipped file for this GPU (for "
        "one that has none, the nearest by architecture and memory, which a line at the start names), or for the CPU.",
    )


def _add_replicas(group: argparse._ArgumentGroup) -> None:
    """Flags of the medium loop, which copies hot experts into spare slots."""
    group.add_argument(
        SPARE_SLOTS,
        type=int,
        metavar="K",
        default=0,
        help="With --smartmoe and expert parallelism: slots per rank and layer for replicas of other ranks' experts. A "
        "slot takes the memory of one expert's weights and fp32 gradients, and no optimizer state. Default: 0.",
    )
    group.add_argument(
        "--smartmoe-replicas",
        choices=REPLICAS,
        default=None,
        help="How replicas are planned. history: from earlier iterations, fetched once per iteration. exact: from each "
        "micro-batch's own token counts. auto: from history; a layer that this leaves unbalanced in a micro-batch is "
        "planned anew from its counts where that saves more time than it costs. off: no replicas. Default: auto with "
        "spare slots, else off.",
    )
    group.add_argument(
        "--smartmoe-replicas-scope",
        metavar="SCOPE",
        default="auto",
        help="node: a replica is placed on the node of its expert's home. group: anywhere in the expert-parallel "
        "group. auto: on the node, but anywhere in a layer whose nodes are uneven where that is predicted to be "
        "faster. LEVEL: in the same domain of a level that the file of --smartmoe-cluster names, such as leaf. "
        "Default: auto.",
    )
    group.add_argument(
        "--smartmoe-replicas-margin",
        type=float,
        metavar="FACTOR",
        default=1.0,
        help="Make replicas in a layer when the time that they save its busiest rank is more than FACTOR times the "
        "time to send their weights and gradients, both predicted from --smartmoe-cluster. 0: whenever they improve "
        "the balance. Default: 1.",
    )
    group.add_argument(
        PLAN_ON,
        choices=("auto", "host", "device"),
        default="auto",
        help="Where --smartmoe-replicas exact plans replicas. host: one call of the compiled library. device: where "
        "the counts are, on the GPU; on one node, without expert tensor parallelism and with "
        "--smartmoe-replicas-margin 0. auto: the host on CPU ranks, else where a plan is predicted to take less time. "
        "Default: auto.",
    )


def _add_pool(group: argparse._ArgumentGroup) -> None:
    """Flags of the pool: settings that training may switch between without a restart."""
    group.add_argument(
        POOL,
        metavar="FILE|auto",
        default=None,
        help="With --smartmoe and expert parallelism: while training, switch among settings that need no restart, by "
        "predicted and measured step time. FILE: the settings that `smartmoe plan --pool` or a plan.json lists. auto: "
        "all that the other flags allow: 0 to --smartmoe-spare-slots slots, replicas off or in each way, experts "
        "that move or stay, and 1, 2, 4 or 8 chunks unless --smartmoe-overlap-degree is 1. The run starts with the "
        "setting of its other flags. Default: no switching.",
    )
    group.add_argument(
        POOL_INTERVAL,
        type=int,
        metavar="N",
        default=100,
        help="Re-evaluate the settings of --smartmoe-pool every N iterations. Default: 100.",
    )


def replicas_mode(args: argparse.Namespace) -> str:
    """How replicas are planned: one of REPLICAS."""
    if args.smartmoe_spare_slots == 0:
        return "off"
    return args.smartmoe_replicas or "auto"
