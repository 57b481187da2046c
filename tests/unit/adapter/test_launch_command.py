"""What will be run: ranks, device, merged flags, the command's frame. Megatron's judgement is a stand-in here.

tests/megatron/test_configs.py plans every shipped configuration with the real one.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter import device, pretrain
from megatron_smartmoe.adapter.allocator import keep_pages_variables
from megatron_smartmoe.adapter.flags import megatron_checks, parser
from megatron_smartmoe.adapter.launch import command, corpus, merged
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import RunSpec, load_run_spec

PYTHON_M = [sys.executable, "-m"]
CPU = ["--smartmoe-device", "cpu"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def number(count: int) -> None:
        monkeypatch.setattr(command, "count_gpus", lambda: count)

    return number


@pytest.mark.parametrize(
    ("asked", "configured", "num_gpus", "expected"),
    [(None, None, 0, 1), (None, None, 8, 8), (None, 4, 0, 4), (None, 4, 8, 4), (2, 4, 8, 2), (2, None, 0, 2)],
)
def test_ranks_per_node(gpus: Any, asked: int | None, configured: int | None, num_gpus: int, expected: int) -> None:
    gpus(num_gpus)
    assert command.ranks_per_node(asked, RunSpec(name="a", nproc=configured), []) == expected


def test_ranks_on_the_cpu_of_a_machine_with_gpus(gpus: Any) -> None:
    gpus(2)
    assert command.ranks_per_node(4, RunSpec(name="a"), CPU) == 4
    assert command.ranks_per_node(None, RunSpec(name="a"), CPU) == 1


def test_the_device_of_the_configuration_counts_too(gpus: Any) -> None:
    gpus(2)
    assert command.ranks_per_node(None, RunSpec(name="a", nproc=4, flags={"smartmoe-device": "cpu"}), []) == 4


@pytest.mark.parametrize(
    ("asked", "num_gpus", "device", "expected"),
    [
        (None, 0, [], (4, "2", None)),
        (None, 8, CPU, (4, "2", None)),
        (None, 8, [], (8, "4", True)),
        (None, 6, [], (4, "2", True)),
        (None, 1, [], (1, "1", True)),
        (2, 8, [], (2, "2", True)),
    ],
)
def test_the_quickstart_trains_in_bf16_on_all_gpus_of_a_node(
    gpus: Any, asked: int | None, num_gpus: int, device: list[str], expected: tuple[Any, ...]
) -> None:
    gpus(num_gpus)
    spec = command.fit_to_gpus(asked, load_run_spec(Path("quickstart")), device)
    found = (spec.nproc, spec.flags["expert-model-parallel-size"], spec.flags.get("bf16"))
    assert found == expected
    assert command.ranks_per_node(asked, spec, device) == expected[0]


def test_gpus_that_stay_idle_are_named(gpus: Any, megatron: Megatron) -> None:
    gpus(3)
    assert command.make_command(RunSpec(name="a"), [], TWO, Path("a")).lines == (
        "2 of the 3 GPUs of this node are used: --nproc, else gpus or nproc of the configuration, decides",
    )
    assert command.make_command(RunSpec(name="a"), CPU, TWO, Path("a")).lines == ()
    gpus(2)
    assert command.make_command(RunSpec(name="a"), [], TWO, Path("a")).lines == ()


@pytest.mark.parametrize("nproc", [0, -1])
def test_no_ranks_are_refused(nproc: int) -> None:
    with pytest.raises(ConfigError) as caught:
        command.ranks_per_node(nproc, RunSpec(name="a"), [])
    assert str(caught.value) == f"--nproc = {nproc}: must be at least 1. For example --nproc 8, the ranks per node."


@pytest.mark.parametrize(("asked", "configured"), [(4, None), (None, 4)])
def test_more_ranks_than_gpus_are_refused(gpus: Any, asked: int | None, configured: int | None) -> None:
    gpus(2)
    with pytest.raises(ConfigError) as caught:
        command.ranks_per_node(asked, RunSpec(name="a", nproc=configured), [])
    assert str(caught.value) == (
        "--nproc = 4: there are 2 GPUs here, and each rank needs one. "
        "Pass --nproc 2 and a parallelism that fits, or --smartmoe-device cpu."
    )


@pytest.mark.parametrize(
    ("configured", "command_line", "device"),
    [
        (None, [], "auto"),
        (None, ["--lr", "1", *CPU], "cpu"),
        ("cpu", ["--lr", "1"], "cpu"),
        ("cpu", ["--smartmoe-device=cuda"], "cuda"),
        ("cpu", ["--smartmoe-device", "auto"], "auto"),
        pytest.param(
            "cpu",
            ["--no-smartmoe-device"],
            "auto",
        ),
    ],
)
def test_the_device_that_is_asked_for(configured: str | None, command_line: list[str], device: str) -> None:
    spec = RunSpec(name="a", flags={"smartmoe-device": configured} if configured else {})
    assert merged.asked_device(spec, command_line) == device


@pytest.mark.parametrize(
    ("configured", "says"),
    [
        ("tpu", "'tpu': must be one of auto, cpu, cuda. Remove it for auto."),
        (True, "None: expected one argument. See --help-megatron for the meaning of the flags."),
    ],
)
def test_a_wrong_device_of_the_configuration_is_refused(configured: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merged.asked_device(RunSpec(name="a", flags={"smartmoe-device": configured}), ["--lr", "1"])
    assert str(caught.value) == f"--smartmoe-device = {says}"


# --- the plan itself


class Megatron:
    """Stands in for what judges the flags; notes what it was asked."""

    def __init__(self) -> None:
        self.judged: dict[str, Any] = {}
        self.args = Namespace(
            use_checkpoint_args=False, load=None, smartmoe_rehearsal="off", smartmoe=False, smartmoe_cluster=None
        )

    def parser(self) -> ArgumentParser:
        parser = ArgumentParser()
        for flag in ("--lr", "--save", "--swiglu", "--no-load-optim"):
            parser.add_argument(flag)
        return parser

    def choose_device(self, asked: str) -> bool:
        self.judged["device"] = asked
        return asked == "cpu"

    def parse(self, argv: list[str]) -> Namespace:
        self.judged |= {"argv": argv, "world size": os.environ["WORLD_SIZE"]}
        return self.args

    def check_args(self, args: Namespace, **how: Any) -> None:
        assert args is self.args
        self.judged |= how

    def verdict(self, args: Namespace) -> None:
        assert args is self.args
        self.judged["verdict"] = True


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Megatron:
    megatron = Megatron()
    monkeypatch.setenv("WORLD_SIZE", "unknown")  # the plan sets it; this puts it back
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(parser, "build_parser", megatron.parser)
    monkeypatch.setattr(megatron_checks, "megatron_verdict", megatron.verdict)
    monkeypatch.setattr(device, "choose_device", megatron.choose_device)
    monkeypatch.setattr(device, "refuse_old_megatron", lambda: None)
    monkeypatch.setattr(parser, "parse", megatron.parse)
    monkeypatch.setattr(megatron_checks, "check_args", megatron.check_args)
    monkeypatch.setattr(pretrain, "with_defaults", lambda argv, *, cpu, say: ["--default", str(cpu), str(say), *argv])
    return megatron


TWO = Topology(ranks_per_node=2)
PAGES = keep_pages_variables({})  # what CPU ranks get of malloc's variables
TORCHRUN = [*PYTHON_M, "megatron_smartmoe.adapter.launch.torchrun", "--nproc-per-node", "4"]
MODULE = ["--module", "megatron_smartmoe.adapter.pretrain"]
NODES = {"num_nodes": 2, "node": 1, "master_addr": "n1", "master_port": 20049}


def flags_of(made: command.LaunchCommand) -> list[str]:
    """What the ranks get."""
    return made.command[made.command.index(MODULE[1]) + 1 :]


def test_the_whole_plan(megatron: Megatron) -> None:
    spec = RunSpec(
        name="quick",
        nproc=4,
        flags={"lr": "1", "swiglu": True, "save": "{run_dir}/checkpoints", "paths": ["0.5", "{run_dir}/x"]},
    )
    made = command.make_command(spec, ["--lr", "2", "--no-swiglu", "--load={run_dir}/old"], TWO, Path("runs/a"))
    flags = ["--save", "runs/a/checkpoints", "--paths", "0.5", "runs/a/x", "--lr", "2", "--load=runs/a/old"]
    torchrun = [
        *PYTHON_M,
        "megatron_smartmoe.adapter.launch.torchrun",
        "--nproc-per-node",
        "2",
        "--standalone",
        *MODULE,
    ]
    assert made.command == [*torchrun, *flags, "--smartmoe-run-dir", "runs/a"]
    assert made.environment == {"OMP_NUM_THREADS": "1"}
    assert made.spec == RunSpec(
        name="quick",
        nproc=2,
        flags={
            "save": "{run_dir}/checkpoints",
            "paths": ["0.5", "{run_dir}/x"],
            "lr": "2",
            "load": "{run_dir}/old",
        },
    )
    assert megatron.judged == {
        "device": "auto",
        "argv": ["--default", "False", "False", *flags],
        "cpu": False,
        "data_exists": True,
        "world size": "2",
        "verdict": True,
    }


@pytest.mark.parametrize(
    ("directory", "value"),
    [(".", "0.001"), ("a", "cosine-a"), ("runs/a", "runs/ab/checkpoints"), ("runs/a", "runs/a/checkpoints")],
)
def test_only_what_was_open_is_left_open(megatron: Megatron, directory: str, value: str) -> None:
    """What only looks like the directory was written by the user, and stays."""
    made = command.make_command(RunSpec(name="a", flags={"x": value}), ["--y", "{run_dir}"], TWO, Path(directory))
    assert made.spec.flags == {"x": value, "y": "{run_dir}"}
    assert flags_of(made) == ["--x", value, "--y", directory, "--smartmoe-run-dir", directory]


def test_all_ranks_of_the_job_are_counted(megatron: Megatron) -> None:
    command.make_command(RunSpec(name="a"), CPU, Topology(ranks_per_node=4, **NODES), Path("a"))  # type: ignore[arg-type]
    assert (megatron.judged["world size"], megatron.judged["device"], megatron.judged["cpu"]) == ("8", "cpu", True)


def test_the_device_of_the_configuration_is_chosen(megatron: Megatron) -> None:
    command.make_command(RunSpec(name="a", flags={"smartmoe-device": "cpu"}), [], TWO, Path("a"))
    assert (megatron.judged["device"], megatron.judged["cpu"]) == ("cpu", True)


def test_a_model_from_a_checkpoint_is_not_judged_before_it_is_read(megatron: Megatron) -> None:
    megatron.args.use_checkpoint_args = True
    command.make_command(RunSpec(name="a"), [], TWO, Path("a"))
    assert "verdict" not in megatron.judged


def test_data_that_is_still_to_be_prepared_is_not_looked_at(megatron: Megatron, tmp_path: Path) -> None:
    prefix = str(tmp_path / "corpus")
    made = command.make_command(RunSpec(name="a", data={"prefix": prefix}, flags={"lr": "1"}), [], TWO, Path("a"))
    assert megatron.judged["data_exists"] is False
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.tokenizer.model"]
    assert flags_of(made)[:-2] == ["--data-path", prefix, *tokenizer, "--lr", "1"]
    assert made.spec == RunSpec(name="a", nproc=2, data={"prefix": prefix}, flags={"lr": "1"})


MOCK = ["--mock-data", "--tokenizer-type", "NullTokenizer"]


def test_other_data_on_the_command_line_drops_the_configurations(megatron: Megatron) -> None:
    spec = corpus.only_if_read(RunSpec(name="a", data={"prefix": "absent/corpus"}), MOCK)
    made = command.make_command(spec, MOCK, TWO, Path("a"))
    assert flags_of(made)[:-2] == MOCK
    assert made.spec == RunSpec(name="a", nproc=2, flags={"mock-data": True, "tokenizer-type": "NullTokenizer"})
    assert megatron.judged["data_exists"] is True


def test_other_data_on_the_command_line_drops_the_run_directorys_too(megatron: Megatron) -> None:
    """Megatron refuses two sources of data."""
    before = command.make_command(RunSpec(name="a", data={"prefix": "absent/corpus"}), [], TWO, Path("a")).spec
    made = command.make_command(corpus.only_if_read(before, MOCK), MOCK, TWO, Path("a"))
    assert flags_of(made)[:-2] == MOCK


def test_a_run_directory_says_the_same_again(megatron: Megatron) -> None:
    """Its configuration is the merged one; planned once more, nothing changes."""
    spec = RunSpec(name="a", data={"prefix": "absent/corpus"}, flags={"lr": "1", "save": "{run_dir}/x"})
    first = command.make_command(spec, ["--lr", "2"], TWO, Path("a"))
    assert command.make_command(first.spec, [], TWO, Path("a")) == first


# --- one merge, for the launcher and for --parallel auto


def test_the_merge_is_what_is_launched(megatron: Megatron) -> None:
    spec, command_line = RunSpec(name="a", flags={"lr": "1", "save": "{run_dir}/x"}), ["--lr", "2", *CPU]
    found = merged.merge(spec, command_line, TWO, Path("a"))
    made = command.make_command(spec, command_line, TWO, Path("a"))
    assert found.args is megatron.args
    assert found.tokens == flags_of(made)[:-2] == ["--save", "a/x", "--lr", "2", *CPU]
    assert found.spec == made.spec
    assert found.cpu is True


def test_what_a_plan_decides_is_left_out_of_the_configuration(megatron: Megatron) -> None:
    config: dict[str, Any] = {
        "pipeline-model-parallel-size": "2",
        "overlap-grad-reduce": True,
        "lr": "1",
        "swiglu": True,
    }
    command_line = ["--tensor-model-parallel-size", "2", "--no-use-distributed-optimizer", "--no-swiglu"]
    found = merged.merge(RunSpec(name="a", flags=config), command_line, TWO, Path("a"), to_plan=True)
    assert found.tokens == ["--lr", "1", "--tensor-model-parallel-size", "2"]
    assert found.command_line == ["--tensor-model-parallel-size", "2", "--no-swiglu"]
    assert "--lr" in found.known


# --- what starts the ranks


def test_one_node_needs_no_rendezvous() -> None:
    assert command.program(Topology(ranks_per_node=4)) == [*TORCHRUN, "--standalone", *MODULE]


def test_several_nodes_meet_at_the_first() -> None:
    found = command.program(Topology(ranks_per_node=4, **NODES))  # type: ignore[arg-type]
    where = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "n1", "--master-port", "20049"]
    assert found == [*TORCHRUN, *where, *MODULE]


def test_a_task_per_rank_needs_no_torchrun() -> None:
    topology = Topology(ranks_per_node=4, rank=5, **NODES)  # type: ignore[arg-type]
    assert command.program(topology) == [*PYTHON_M, "megatron_smartmoe.adapter.pretrain"]


def test_a_task_per_rank_hears_what_torchrun_would_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    topology = Topology(ranks_per_node=4, rank=5, **NODES)  # type: ignore[arg-type]
    environment = command.rank_environment(topology, cpu=False)
    assert environment == {
        "OMP_NUM_THREADS": "1",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "20049",
    }


@pytest.mark.parametrize(
    ("cpu", "ranks", "threads"), [(False, 4, "1"), (True, 4, "4"), (True, 3, "5"), (True, 16, "1"), (True, 40, "1")]
)
def test_cpu_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, cpu: bool, ranks: int, threads: str) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = command.rank_environment(Topology(ranks_per_node=ranks), cpu=cpu)
    assert environment == {"OMP_NUM_THREADS": threads, **(PAGES if cpu else {})}


def test_threads_that_the_user_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert command.rank_environment(Topology(ranks_per_node=2), cpu=True)["OMP_NUM_THREADS"] == "7"


def test_malloc_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    environment = command.rank_environment(Topology(ranks_per_node=2), cpu=True)
    assert "MALLOC_TRIM_THRESHOLD_" not in environment
    assert environment["MALLOC_MMAP_THRESHOLD_"] == PAGES["MALLOC_MMAP_THRESHOLD_"]


def test_threads_that_the_user_set_stay_in_a_task_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert command.rank_environment(Topology(ranks_per_node=2, rank=0), cpu=True)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("run", "{run_dir}"),
        ("run/checkpoints", "{run_dir}/checkpoints"),
        ("--save=run/checkpoints", "--save={run_dir}/checkpoints"),
        ("--rerun-mode", "--rerun-mode"),
        ("runs/other", "runs/other"),
    ],
)
def test_the_run_directory_is_left_open_where_a_path_begins_with_it(token: str, expected: str) -> None:
    assert command._with_run_dir(token, Path("run"), "{run_dir}") == expected
