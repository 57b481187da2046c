"""The launcher's story: which configuration, in which order, what a dry run leaves out, who reports errors."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.launch import auto, launcher
from megatron_smartmoe.adapter.launch.command import LaunchCommand
from megatron_smartmoe.adapter.launch.run_lock import RunLock
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import RunSpec, load_run_spec

PYTHON_M = [sys.executable, "-m"]


def options(*argv: str) -> Any:
    return launcher.build_parser().parse_known_args(argv)[0]


def test_flags_of_megatron_are_not_taken_for_the_launchers() -> None:
    argv = ["--nproc", "2", "--num-layers", "4", "--run", "x", "--dry-run"]
    own, rest = launcher.build_parser().parse_known_args(argv)
    assert (own.nproc, own.dry_run, own.run_dir) == (2, True, None)
    assert rest == ["--num-layers", "4", "--run", "x"]


def test_a_run_directory_is_its_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: before\n")
    other = tmp_path / "other.yaml"
    other.write_text("name: other\n")
    assert launcher.read_spec(options("--run-dir", str(tmp_path))).name == "before"
    assert launcher.read_spec(options("--run-dir", str(tmp_path), "--config", str(other))).name == "other"
    assert launcher.read_spec(options("--run-dir", str(tmp_path / "new"))) == RunSpec(name="run")
    assert launcher.read_spec(options()) == RunSpec(name="run")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run; each "succeeds"."""
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return started


class Story:
    """Stands in for planning, preparing and running; notes what happens, in order."""

    def __init__(self) -> None:
        self.topology = Topology(ranks_per_node=2)
        self.events: list[str] = []
        self.ran: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def make_command(self, spec: RunSpec, command_line: list[str], topology: Topology, run_dir: Path) -> LaunchCommand:
        self.events.append(f"plan {' '.join(command_line)} in {run_dir}")
        return LaunchCommand(command=["python", "--x", "1"], environment={"A": "1"}, spec=replace(spec, nproc=2))

    def prepare(self, spec: RunSpec) -> None:
        assert spec.data is not None
        assert not Path("here/config.yaml").exists()
        self.events.append(f"prepare {spec.data['prefix']}")

    def run(self, *args: Any, **options: Any) -> int:
        assert args[2] is None or args[2].parent.is_dir()
        self.events.append("run")
        self.ran, self.options = args, options
        return 7


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    story = Story()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "ranks_per_node", lambda nproc, spec, command_line: 2)
    monkeypatch.setattr(launcher, "find_topology", lambda ranks_per_node, **_: story.topology)
    monkeypatch.setattr(launcher, "make_command", story.make_command)
    monkeypatch.setattr(launcher.corpus, "prepare", story.prepare)
    monkeypatch.setattr(launcher.process, "run", story.run)
    monkeypatch.setattr(launcher.run_dir, "_environment", dict)
    (tmp_path / "a.yaml").write_text("name: mine\ndata: {prefix: data/corpus, seed: 3}\n")
    return story


ARGV = ["--config", "a.yaml", "--run-dir", "here", "--lr", "1"]


def test_flags_are_checked_then_data_is_prepared_then_the_ranks_run(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main(ARGV) == 7
    assert story.events == ["plan --lr 1 in here", "prepare data/corpus", "run"]
    assert story.ran == (["python", "--x", "1"], {"A": "1", "SMARTMOE_RUN_LOCKED": "1"}, Path("here/train.log"))
    spec = RunSpec(name="mine", nproc=2, data={"prefix": "data/corpus", "seed": 3})
    assert load_run_spec(Path("here/config.yaml")) == spec
    assert Path("here/command.sh").read_text().endswith("\nA=1 python \\\n  --x 1\n")
    assert capsys.readouterr() == ("smartmoe: 2 ranks on 1 node, run directory here\n", "")


@pytest.fixture
def planner(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the planner."""

    def plan_parallel(
        spec: RunSpec, command_line: list[str], topology: Topology, run_dir: Path, load: auto.Load
    ) -> auto.AutoPlan:
        story.events.append(f"choose for {topology.world_size} ranks")
        story.events += [f"under a skew of {load.skew}"] if load.skew else []
        planned = replace(spec, flags={"tensor-model-parallel-size": "2"})
        return auto.AutoPlan(spec=planned, command_line=["--lr", "2"], lines=["TP 2", " why"], content={"version": 1})

    monkeypatch.setattr(auto, "plan_parallel", plan_parallel)


AUTO = [*ARGV, "--parallel", "auto"]


def test_a_plan_comes_first_and_stays_beside_the_run(
    story: Story, planner: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main(AUTO) == 7
    assert story.events == ["choose for 2 ranks", "plan --lr 2 in here", "prepare data/corpus", "run"]
    assert load_run_spec(Path("here/config.yaml")).flags == {"tensor-model-parallel-size": "2"}
    assert json.loads(Path("here/plan.json").read_text()) == {"version": 1}
    assert capsys.readouterr().out.splitlines()[:2] == ["smartmoe: TP 2", "smartmoe:  why"]


def test_the_load_to_plan_for_is_the_planners(story: Story, planner: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main([*AUTO, "--parallel-skew", "3"]) == 7
    assert story.events[:3] == ["choose for 2 ranks", "under a skew of 3", "plan --lr 2 in here"]
    assert launcher.main([*ARGV, "--parallel-trace", "t.npz"]) == 2
    rule = "has no effect without --parallel auto. Add --parallel auto, or remove it."
    assert capsys.readouterr().err == f"error: --parallel-trace = 't.npz': {rule}\n"


def test_a_dry_run_shows_the_plan_as_comments(story: Story, planner: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main([*AUTO, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("# TP 2\n#  why\n# first, once:\n")
    assert [path.name for path in Path().iterdir()] == ["a.yaml"]


def test_another_node_plans_too_and_says_nothing(
    story: Story, planner: None, capsys: pytest.CaptureFixture[str]
) -> None:
    story.topology = Topology(num_nodes=2, node=1, ranks_per_node=2)
    assert launcher.main(AUTO) == 7
    assert story.events[:2] == ["choose for 4 ranks", "plan --lr 2 in here"]
    assert list(Path("here").iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_data_that_exists_is_not_prepared(story: Story) -> None:
    Path("data").mkdir()
    for suffix in ("json", "idx"):
        Path(f"data/corpus.{suffix}").touch()
    assert launcher.main(ARGV) == 7
    assert story.events == ["plan --lr 1 in here", "run"]


def test_data_that_nobody_reads_is_not_prepared(story: Story) -> None:
    assert launcher.main([*ARGV, "--mock-data"]) == 7
    assert story.events == ["plan --lr 1 --mock-data in here", "run"]
    assert load_run_spec(Path("here/config.yaml")).data is None


def test_a_dry_run_checks_and_shows_and_does_nothing(
    story: Story, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main([*ARGV, "--dry-run"]) == 0
    assert story.events == ["plan --lr 1 in here"]
    assert commands == []
    assert [path.name for path in Path().iterdir()] == ["a.yaml"]
    prepare = " ".join([*PYTHON_M, "megatron_smartmoe.adapter.corpus"])
    assert capsys.readouterr().out == (
        f"# first, once:\n{prepare} \\\n  --output-prefix data/corpus \\\n  --seed 3\n\nA=1 python \\\n  --x 1\n"
    )


def test_flags_that_are_wrong_prepare_nothing(
    story: Story, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("--lr", "x", "is wrong", "Mend it.")

    monkeypatch.setattr(launcher, "make_command", refuse)
    assert launcher.main(ARGV) == 2
    assert (story.events, commands) == ([], [])
    assert not Path("here").exists()


def test_another_node_says_nothing_and_has_its_own_log(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    story.topology = Topology(num_nodes=2, node=1, ranks_per_node=2)
    assert launcher.main([*ARGV, "--dry-run"]) == 0
    assert launcher.main(ARGV) == 7
    assert story.ran[2] == Path("here/node1.log")
    assert list(Path("here").iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("node", "events"),
    [("n1", ["plan --lr 1 in here", "srun 1"]), (None, ["srun 1"])],
    ids=["batch script", "salloc's shell"],
)
def test_a_launcher_per_node_is_started_after_the_check(
    story: Story, monkeypatch: pytest.MonkeyPatch, node: str | None, events: list[str]
) -> None:
    """Where this is a node of the allocation; of the nodes' GPUs a login node knows nothing."""

    def srun(topology: Topology, argv: list[str], *_: Any, **__: Any) -> int:
        assert argv == ARGV
        story.events.append(f"srun {topology.num_nodes}")
        return 9

    story.topology = Topology(ranks_per_node=2, needs_srun=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(launcher.slurm, "srun", srun)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    if node:
        monkeypatch.setenv("SLURMD_NODENAME", node)
    assert launcher.main(ARGV) == 9
    assert story.events == events
    assert not Path("here").exists()


def test_a_task_per_rank_is_the_parent_of_its_rank(story: Story) -> None:
    """So that somebody can say by what it died. Its output is Slurm's to collect."""
    story.topology = Topology(num_nodes=2, node=1, ranks_per_node=2, rank=3)
    assert launcher.main(ARGV) == 7
    assert story.ran == (["python", "--x", "1"], {"A": "1", "SMARTMOE_RUN_LOCKED": "1"}, None)
    assert story.options["rank"] == 3
    assert story.options["ending"].shared.name == "rank3"


def test_the_last_line_knows_how_to_continue(story: Story) -> None:
    assert launcher.main(ARGV) == 7
    assert story.options["ending"].resume == "scripts/pretrain_gpt_moe.sh --run-dir here"
    assert story.options["ending"].shared is None


def test_a_run_directory_has_one_run_at_a_time(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").mkdir()
    with RunLock.acquire(Path("here")):
        assert launcher.main(ARGV) == 2
    assert story.events == ["plan --lr 1 in here"]  # nothing is prepared
    assert capsys.readouterr().err.startswith("error: --run-dir = 'here': is in use by another run (host ")
    assert launcher.main(ARGV) == 7
    assert Path("here/run.lock").read_text() == ""


def test_a_dry_run_may_look_at_a_run_that_is_going_on(story: Story) -> None:
    Path("here").mkdir()
    with RunLock.acquire(Path("here")):
        assert launcher.main([*ARGV, "--dry-run"]) == 0


def test_a_linked_run_directory_is_followed_and_named(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there").mkdir()
    Path("here").symlink_to("there")
    assert launcher.main(ARGV) == 7
    there = Path("there").resolve()
    assert capsys.readouterr().out == f"smartmoe: 2 ranks on 1 node, run directory here (a link to {there})\n"
    assert Path("there/config.yaml").is_file()


def test_a_default_directory_that_nothing_came_of_is_removed(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def refuse(*_: Any, **__: Any) -> None:
        assert len(list(Path("runs").iterdir())) == 1  # it is this launch's own from the start
        raise ConfigError("--lr", "x", "is wrong", "Mend it.")

    monkeypatch.setattr(launcher, "make_command", refuse)
    assert launcher.main(["--config", "a.yaml"]) == 2
    assert not Path("runs").exists()


WRONG = "error: a.yaml:1 = 'flags: [1, 2': is not YAML: expected ',' or ']', but got '<stream end>'. Correct line 1.\n"


@pytest.mark.parametrize(
    ("slurm", "says"),
    [
        ({}, WRONG),
        ({"SLURM_PROCID": "0"}, WRONG),  # a batch script
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, WRONG),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, ""),
    ],
    ids=["no Slurm", "batch", "task 0", "task 1"],
)
def test_an_error_is_one_line_from_one_task(
    slurm: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("flags: [1, 2\n")
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert launcher.main(["--config", "a.yaml"]) == 2
    assert capsys.readouterr() == ("", says)
    assert slept == ([] if says else [launcher._REPORT_GRACE_S])  # task 0 has the time to say it
