"""The rehearsal passes whatever trains, sees what a rank would build, and hands its word to the other ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_smartmoe.spec.trace import load_trace
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING

pytestmark = pytest.mark.dist

MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --train-iters 4".split()
BASE = [*TINY_MODEL, *TINY_TRAINING, *MOCK]
# (ranks, flags) of runs that train, a line for each kind of model, parallelism and loop
TRAINS = {
    "virtual stages": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "tensors": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tensors, experts whole": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 2",
    ),
    "contexts": (2, "--context-parallel-size 2"),
    "experts": (4, "--expert-model-parallel-size 4 --use-distributed-optimizer --bf16"),
    "homes": (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --smartmoe"),
    "replicas": (2, "--expert-model-parallel-size 2 --smartmoe --smartmoe-spare-slots 1"),
    "chunks of the planner": (
        4,
        "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --smartmoe --smartmoe-overlap-degree auto",
    ),
    "pool": (2, "--expert-model-parallel-size 2 --smartmoe --smartmoe-spare-slots 1 --smartmoe-pool auto"),
    "fp16": (2, "--expert-model-parallel-size 2 --fp16 --initial-loss-scale 256"),
    "allgather": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "padding": (
        2,
        "--expert-model-parallel-size 2 --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity --smartmoe",
    ),
    "shared experts": (2, "--expert-model-parallel-size 2 --moe-shared-expert-intermediate-size 64 --smartmoe"),
    "full recomputation": (
        2,
        "--expert-model-parallel-size 2 --smartmoe --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 2",
    ),
    "selective recomputation": (1, "--recompute-granularity selective --recompute-modules core_attn moe"),
    "expert bias": (
        2,
        "--expert-model-parallel-size 2 --smartmoe --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-num-groups 4 --moe-router-group-topk 2",
    ),
    "noise": (
        2,
        "--expert-model-parallel-size 2 --smartmoe --smartmoe-gate noisy-top-k --moe-router-load-balancing-type "
        "aux_loss --moe-aux-loss-coeff 0.1",
    ),
    "an assignment": (1, "--smartmoe-gate base --moe-router-topk 1 --moe-router-score-function sigmoid"),
    "ranks with room": (2, "--expert-model-parallel-size 2 --smartmoe-gate swipe"),
    "latent attention": (
        2,
        "--pipeline-model-parallel-size 2 --multi-latent-attention --q-lora-rank 32 --kv-lora-rank 16 "
        "--qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16",
    ),
    "prediction layers": (2, "--pipeline-model-parallel-size 2 --mtp-num-layers 1"),
    "dense layers first": (2, "--pipeline-model-parallel-size 2 --moe-layer-freq ([0]*2+[1]*2) --smartmoe"),
    "uneven stages": (2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"),
    "batch sizes in steps": (1, "--step-batch-size-schedule 0:4,1024:8 --no-batch"),
}


def _flags(line: str, folder: Path) -> list[str]:
    flags = [*BASE, *line.replace("{folder}", str(folder)).split()]
    if "--no-batch" in flags:
        at = flags.index("--global-batch-size")
        del flags[at : at + 2]
        flags.remove("--no-batch")
    return flags


def _rehearse_all(folder: Path) -> dict[str, str]:
    """What each run's rehearsal said; empty where it passed without a note."""
    from megatron_smartmoe.adapter.pretrain import check_flags, with_defaults
    from megatron_smartmoe.adapter.rehearsal.judge import judge
    from megatron_smartmoe.adapter.rehearsal.request import Request

    found = {}
    defaults = with_defaults([], cpu=True, say=False)
    for name, (ranks, line) in TRAINS.items():
        os.environ["WORLD_SIZE"] = str(ranks)
        tokens = _flags(line, folder)
        check_flags([*defaults, *tokens], cpu=True)
        verdict = judge(Request(defaults=tuple(defaults), tokens=tuple(tokens), world_size=ranks, ranks_per_node=ranks))
        said = [str(verdict.error or ""), *verdict.report.notes, verdict.details[-2000:]]
        stages = sum(len(stage.stages) for stage in verdict.report.stages)
        said += [] if stages == max(1, tokens.count("--pipeline-model-parallel-size") * 2) else [f"{stages} stages"]
        found[name] = "\n".join(filter(None, said))
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rehearsal")
    found: dict[str, str] = run_ranks(_rehearse_all, 1, folder, log_dir=folder / "log")[0]
    return found


@pytest.mark.parametrize("name", TRAINS)
def test_what_trains_passes(name: str, said: dict[str, str]) -> None:
    assert said[name] == ""


UNUSABLE = "--moe-router-num-groups 4 --moe-router-group-topk 1 --moe-router-topk 4".split()


def _main(argv: list[str]) -> int:
    """The entry of a rank; its exit status."""
    from megatron_smartmoe.adapter.pretrain import main

    try:
        main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _ranks(folder: Path, *flags: str) -> tuple[list[int], list[str]]:
    """Two ranks without the launcher: exit status and output of each."""
    argv = [*BASE, "--expert-model-parallel-size", "2", *flags, "--smartmoe-rehearsal", "on"]
    statuses = run_ranks(_main, 2, argv, log_dir=folder)
    return statuses, [(folder / f"rank{rank}.log").read_text() for rank in range(2)]


def test_without_the_launcher_rank_0_says_what_is_wrong_and_all_stop(tmp_path: Path) -> None:
    statuses, logs = _ranks(tmp_path, *UNUSABLE)
    assert statuses == [2, 2]
    errors = [line for line in logs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "(command line): model: selected index k out of range (RuntimeError" in errors[0]
    assert logs[1] == ""
    assert "Traceback" not in logs[0]


def test_without_the_launcher_ranks_train_after_the_rehearsal(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    statuses, logs = _ranks(tmp_path, "--train-iters", "1", "--moe-routing-trace-path", str(trace))
    assert statuses == [0, 0]
    assert load_trace(trace).num_experts == 8
    assert "smartmoe: pipeline stage 0: 4 MoE layers, " in logs[0]


def test_a_machine_with_gpus_rehearses_in_a_process_that_sees_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerEngine is not there, so Megatron's own modules are asked for; everything else is as on a GPU."""
    from megatron_smartmoe.adapter.flags.parser import machine_defaults
    from megatron_smartmoe.adapter.rehearsal.rehearse import rehearse
    from megatron_smartmoe.adapter.rehearsal.request import Request

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = machine_defaults(cpu=False, transformer_engine=False, apex=False)
    defaults = [flag for each in found for flag in each.flags]
    tokens = (*BASE, "--expert-model-parallel-size", "2", "--smartmoe")
    request = Request(defaults=tuple(defaults), tokens=tokens, world_size=2, cpu=False, capability=(9, 0))
    report = rehearse(request)
    assert [stage.moe_layers for stage in report.stages] == [4]
    assert report.notes == ("The memory of a rank is predicted when --smartmoe-cluster names the machine.",)
    assert rehearse(request) == report  # remembered: no second process
