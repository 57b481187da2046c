"""The run directory: where it is, what is in it, and that it can be run again."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.adapter.launch import run_dir, secrets
from megatron_smartmoe.adapter.launch.flags import as_mapping, render
from megatron_smartmoe.errors import ConfigError, shown
from megatron_smartmoe.spec.run import RunSpec, load_run_spec

SPEC = RunSpec(
    name="quick",
    nproc=4,
    data={"prefix": "data/corpus", "max-bytes": 8_000_000, "python-stdlib": True},
    flags={"lr": "3e-05", "swiglu": True, "betas": ["0.9", "0.95"], "save": "{run_dir}/checkpoints", "split": "9,1,0"},
)


def test_the_directory_that_is_asked_for() -> None:
    assert run_dir.choose(Path("here"), "quick", {"SLURM_JOB_ID": "7"}) == Path("here")


def test_a_slurm_job_has_one_directory_on_every_node() -> None:
    assert run_dir.choose(None, "quick", {"SLURM_JOB_ID": "7"}) == Path("runs/quick-job7")


def test_another_run_has_a_new_directory_with_its_time() -> None:
    assert re.fullmatch(r"runs/quick-\d{8}-\d{6}", str(run_dir.choose(None, "quick", {})))


def test_two_launches_in_one_second_have_a_directory_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20260102-030405")
    found = [run_dir.reserve(None, "quick", {}) for _ in range(3)]
    assert [str(path) for path in found] == [f"runs/quick-20260102-030405{suffix}" for suffix in ("", "-2", "-3")]
    assert all(path.is_dir() for path in found)
    assert run_dir.choose(None, "quick", {}) == Path("runs/quick-20260102-030405-4")


def test_two_processes_never_share_a_default_directory(tmp_path: Path) -> None:
    """Both look at the same instant; making the directory decides."""
    program = (
        "import sys; from megatron_smartmoe.adapter.launch import run_dir\n"
        "run_dir.time.strftime = lambda form: 'now'\ninput()\n"
        "print(*(run_dir.reserve(None, 'quick', {}) for _ in range(20)))"
    )
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdin=pipe, stdout=pipe, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [path for process in both for path in process.communicate(timeout=60)[0].split()]
    assert len(set(found)) == 40


def test_an_unused_directory_is_removed_and_a_used_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    used, unused = run_dir.reserve(None, "a", {}), run_dir.reserve(None, "b", {})
    (used / "train.log").touch()
    run_dir.release(used)
    run_dir.release(unused)
    assert list(Path("runs").iterdir()) == [used]


@pytest.mark.parametrize("name", ["../../escape", "/abs", "a/b", "..", ".hidden", "x\0y", "n" * 300, "", "a\nb"])
def test_a_name_cannot_leave_runs(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_dir.choose(None, name, {})
    assert str(caught.value) == (
        f"name = {shown(name)}: must be the name of a folder in runs/: at most 200 bytes, no slash, no control "
        "character, no dot in front. For example name: my-run; --run-dir DIR puts a run anywhere."
    )
    assert run_dir.choose(Path("here"), name, {}) == Path("here")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    path = Path("runs/a")
    run_dir.create(path, SPEC, render(["echo", "it's", "--x", "a b"], {"A": "1"}))
    return path


def test_it_holds_what_is_needed_to_run_it_again(made: Path) -> None:
    assert sorted(os.listdir(made)) == ["command.sh", "config.yaml", "environment.json"]
    assert load_run_spec(made / "config.yaml") == SPEC


def test_the_command_runs_from_where_it_was_given(made: Path, tmp_path: Path) -> None:
    script = made / "command.sh"
    assert script.read_text().startswith(f"#!/usr/bin/env bash\ncd {tmp_path}\nA=1 echo")
    done = subprocess.run([script.resolve()], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == "it's --x a b\n"


def test_the_command_runs_from_a_directory_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    run_dir.create(Path("a"), SPEC, "pwd")
    done = subprocess.run([Path("a/command.sh").resolve()], cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout == f"{tmp_path}/my runs\n"


def test_the_environment_is_noted(made: Path) -> None:
    noted = json.loads((made / "environment.json").read_text())
    assert list(noted) == ["time", "git", "git_changes", "python", "versions", "host", "argv", "slurm", "settings"]
    assert noted["versions"]["megatron-core"] == metadata.version("megatron-core")
    assert noted["slurm"]["SLURM_JOB_ID"] == "7"
    assert noted["settings"]["NCCL_IB_HCA"] == "mlx5"
    assert "PATH" not in noted["settings"]


def test_no_git_is_no_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    run_dir.create(made, SPEC, "true")
    assert json.loads((made / "environment.json").read_text())["git"] is None


def test_a_package_outside_a_checkout_has_no_revision(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when it lies in another project's checkout, as in that project's .venv."""
    subprocess.run(["git", "init", "--quiet"], cwd=made.parent, check=True)
    monkeypatch.setattr(run_dir, "_CHECKOUT", made.resolve())
    run_dir.create(made, SPEC, "true")
    assert json.loads((made / "environment.json").read_text())["git"] is None
    assert run_dir.launcher_command() == "python -m megatron_smartmoe.adapter.launch"


def test_an_existing_directory_is_reused(made: Path) -> None:
    (made / "metrics.jsonl").write_text("{}\n")
    run_dir.create(made, RunSpec(name="quick", nproc=2), "true")
    assert load_run_spec(made / "config.yaml").nproc == 2
    assert (made / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(("path", "why"), [("file", "File exists"), ("file/below", "Not a directory")])
def test_a_path_that_cannot_be_a_directory(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        run_dir.create(tmp_path / path, SPEC, "true")
    assert str(caught.value) == f"--run-dir = '{tmp_path / path}': {why}. Pass another directory."


def test_a_read_only_directory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(run_dir.tempfile, "TemporaryFile", refuse)  # root ignores permissions
    with pytest.raises(ConfigError) as caught:
        run_dir.create(tmp_path, SPEC, "true")
    assert str(caught.value) == f"--run-dir = '{tmp_path}': Read-only file system. Pass another directory."


def test_a_link_that_leads_nowhere_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(ConfigError, match=r"is a link to gone, which is not a directory. Pass another directory."):
        run_dir.make(tmp_path / "link")


def test_a_link_is_replaced_and_not_written_through(made: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o644)
    for name in ("config.yaml", "command.sh", "environment.json"):
        (made / name).unlink()
        (made / name).symlink_to(victim)
    run_dir.create(made, SPEC, "true")
    assert victim.read_text() == "precious"
    assert victim.stat().st_mode & 0o777 == 0o644
    assert not any((made / name).is_symlink() for name in ("config.yaml", "command.sh", "environment.json"))


def test_secrets_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in one file of the directory; command.sh and the resumed run read them from the environment."""
    secret, token = "s3cr3t-value", "hf_" + "a" * 30
    for name, value in {"MY_API_KEY": secret, "SLURM_JWT": "eyJh", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    argv = ["--wandb-entity", secret, "--load", token, "--lr", "1"]
    monkeypatch.setattr(sys, "argv", ["launcher", *argv])
    spec = RunSpec(name="a", flags=as_mapping(argv))
    run_dir.create(tmp_path / "run", spec, secrets.masked_command(["printf", "%s|", *argv], {}))
    for path in (tmp_path / "run").iterdir():
        text = path.read_text()
        assert not any(value in text for value in (secret, token, "eyJh")), path
    assert load_run_spec(tmp_path / "run" / "config.yaml").flags["wandb-entity"] == "${MY_API_KEY}"
    script = tmp_path / "run" / "command.sh"
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert "SMARTMOE_SECRET_LOAD: holds a secret that is not written down: export it first" in done.stderr
    environ = {**os.environ, "SMARTMOE_SECRET_LOAD": token}
    assert subprocess.run([script], env=environ, capture_output=True, text=True, check=True).stdout == "|".join(
        [*argv, ""]
    )


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z-]{0,6}", fullmatch=True),
        st.one_of(st.just(True), st.sampled_from(["no", "true", "null", "~", "", "1_0", "0x1f", "2026-01-02", "a: b"])),
    )
)
def test_texts_that_yaml_could_take_for_something_else_come_back(flags: dict[str, str | bool]) -> None:
    assert _there_and_back(RunSpec(name="a", flags=dict(flags))).flags == flags


def test_a_text_that_looks_like_a_number_with_an_exponent_comes_back() -> None:
    spec = RunSpec(name="7e3", flags={"wandb-exp-name": "12e4"})
    assert _there_and_back(spec) == spec


def _there_and_back(spec: RunSpec) -> RunSpec:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_dir, "_environment", dict)  # git, many times over
        run_dir.create(Path(folder), spec, "true")
        return load_run_spec(Path(folder) / "config.yaml")
