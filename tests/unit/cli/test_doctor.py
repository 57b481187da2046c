"""`smartmoe doctor`: what it makes of what it finds. tests/megatron/test_doctor.py looks at what it finds here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.cli import doctor, doctor_checks, main
from megatron_smartmoe.cli.doctor_checks import Finding, judge_gpu, judge_megatron, judge_ops, judge_package
from megatron_smartmoe.runtime.driver import Driver

BUILD: dict[str, Any] = {"version": "2.11.0", "cuda": "13.0", "available": False, "gpus": [], "why": None}
USED = BUILD | {"available": True, "gpus": [["H200", "sm_90"]] * 2, "archs": ["sm_80", "sm_90", "compute_120"]}
NO_DRIVER = Driver()
DRIVER = Driver(num_gpus=2, version="580.65.06", cuda=(13, 0))


@pytest.mark.parametrize(
    ("torch", "driver", "environ", "state", "text"),
    [
        (BUILD, NO_DRIVER, {}, "not applicable", "no GPU here: training runs on the CPU"),
        (USED, DRIVER, {}, "ok", "2 GPU: H200 (sm_90); driver for CUDA 13.0"),
        (BUILD, DRIVER, {}, "error", "CUDA says: nothing. Compare nvidia-smi, and access to /dev/nvidia*."),
        (BUILD | {"cuda": None}, DRIVER, {}, "error", "Install a build of torch 2.11.0 for CUDA 13.0 or older."),
        (
            BUILD,
            Driver(num_gpus=1, version="550.54.15", cuda=(12, 4)),
            {},
            "error",
            "The driver serves CUDA 12.4: update it to 580 or newer, or install a build of torch for CUDA 12.",
        ),
        (BUILD, DRIVER, {"CUDA_VISIBLE_DEVICES": ""}, "error", "Unset CUDA_VISIBLE_DEVICES, which is ''."),
        (BUILD, Driver(error="NVML says 18 (see nvidia-smi)"), {}, "error", "Restart the host"),
        ({"error": "ImportError: x"}, DRIVER, {}, "error", "Mend torch first."),
        (USED | {"gpus": [["V100", "sm_70"]]}, DRIVER, {}, "error", "Install a build of torch for sm_70"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error(
    torch: dict[str, Any], driver: Driver, environ: Mapping[str, str], state: str, text: str
) -> None:
    finding = judge_gpu(torch, driver, environ)
    assert finding.state == state
    assert (finding.way_out or finding.found).startswith(text)


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"backend": "compiled (cpu)", "wrong": [], "devices": ["cpu"]}, "ok"),
        ({"backend": "compiled (cpu+cuda)", "wrong": [], "devices": ["cpu", "cuda"]}, "ok"),
        ({"backend": "compiled (cpu)", "wrong": [], "devices": ["cpu", "cuda"]}, "warning"),
        ({"backend": "torch reference", "wrong": [], "devices": ["cpu"]}, "warning"),
        ({"backend": "compiled (cpu+cuda)", "wrong": ["cuda: no kernel image"], "devices": ["cpu", "cuda"]}, "error"),
        ({"error": "CompatError: of another version"}, "error"),
    ],
)
def test_kernels(facts: dict[str, Any], state: str) -> None:
    assert judge_ops(facts).state == state


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"version": "0.19.2", "tested": "0.19.2", "missing": None}, "ok"),
        ({"version": "0.19.0", "tested": "0.19.2", "missing": None}, "warning"),
        ({"version": "0.20.0", "tested": "0.19.2", "missing": "megatron.training.x = missing: the project"}, "error"),
        ({"error": "ModuleNotFoundError: No module named 'megatron'"}, "error"),
    ],
)
def test_megatron(facts: dict[str, Any], state: str) -> None:
    assert judge_megatron(facts).state == state


@pytest.mark.parametrize(
    ("name", "facts", "state", "found"),
    [
        ("apex", {"version": "0.1", "is": "NVIDIA's", "missing": []}, "ok", "0.1"),
        ("apex", {"version": "0.1", "is": "NVIDIA's", "missing": ["amp_C"]}, "error", "0.1, without amp_C"),
        ("nvidia_resiliency_ext", {"version": "0.5.0"}, "ok", "0.5.0"),
        ("transformer_engine", {"error": "Python was killed by SIGSEGV"}, "error", "Python was killed by SIGSEGV"),
        ("deep_ep", {"missing": ["deep_ep.Buffer"]}, "warning", "installed, without deep_ep.Buffer"),
    ],
)
def test_packages(name: str, facts: dict[str, Any], state: str, found: str) -> None:
    finding = judge_package(name, facts)
    assert (finding.state, finding.found) == (state, found)
    assert (finding.way_out == "") is (state == "ok")


def test_a_probe_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, text in (("import os; os.kill(os.getpid(), 11)", "SIGSEGV"), ("raise SystemExit('no')", "ended: no")):
        run = subprocess.run
        monkeypatch.setattr(doctor_checks, "subprocess", subprocess)
        monkeypatch.setattr(
            subprocess,
            "run",
            lambda command, _program=program, _run=run, **how: _run([command[0], "-c", _program], **how),
        )
        doctor_checks.probe.cache_clear()
        assert text in doctor_checks.probe("torch")["error"]
        monkeypatch.undo()
    doctor_checks.probe.cache_clear()


def test_slurm_is_not_applicable_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert doctor_checks.check_slurm().state == "not applicable"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert doctor_checks.check_slurm().state == "error"


SINFO = """#!/bin/sh
case "$*" in
  --version) echo "slurm-wlm 22.05.8" ;;
  *) {answer} ;;
esac
"""


@pytest.mark.parametrize(
    ("answer", "state", "found"),
    [
        ("echo 4 nodes in test", "ok", "slurm-wlm 22.05.8; 4 nodes in test"),
        ("echo 'no controller' >&2; exit 1", "warning", "slurm-wlm 22.05.8; no controller"),
    ],
)
def test_slurm_that_answers_and_that_does_not(
    answer: str, state: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"srun": "#!/bin/sh\n", "sinfo": SINFO.format(answer=answer)}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    finding = doctor_checks.check_slurm()
    assert (finding.state, finding.found) == (state, found)


@pytest.mark.parametrize(("backend", "state"), [("compiled (cpu)", "warning"), ("compiled (cpu+cuda)", "ok")])
def test_nobody_needs_nvcc_where_the_kernels_are(monkeypatch: pytest.MonkeyPatch, backend: str, state: str) -> None:
    which = {"c++": "/bin/true", "nvcc": None}
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda name: which.get(name))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor_checks, "find_driver", lambda: DRIVER)
    monkeypatch.setattr(doctor_checks, "probe", lambda name: {"backend": backend})
    assert doctor_checks.check_compiler().state == state


def test_the_machine_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("python", "compiler", "write", "memory", "clock"):
        finding = doctor_checks.examine(name)
        assert finding.state in ("ok", "warning"), finding
        assert finding.check == name


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor_checks.tempfile, "TemporaryFile", refuse)
    finding = doctor_checks.check_write()
    assert (finding.state, finding.found) == ("error", f"{tmp_path} (this folder): Read-only file system")


# --- the table, JSON and the exit status

BAD = Finding(check="apex", state="error", found="0.1, without amp_C", means="no fused Adam", way_out="Build it.")
GOOD = Finding(check="python", state="ok", found="3.12.1")


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {"python": lambda: GOOD, "apex": lambda: BAD}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor_checks, "CHECKS", checks)


def test_the_table(two_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 2
    assert capsys.readouterr().out == (
        "python                 ok              3.12.1\n"
        "apex                   ERROR           0.1, without amp_C\n"
        "                                      no fused Adam\n"
        "                                      -> Build it.\n"
        "Training will not work here: see apex.\n"
    )


def test_json_and_a_choice_of_checks(two_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--json"]) == 2
    content = json.loads(capsys.readouterr().out)
    assert content["works"] is False
    assert content["findings"][1]["way_out"] == "Build it."
    assert main.main(["doctor", "--only", "python"]) == 0
    assert capsys.readouterr().out.endswith("Training will work here.\n")


def test_a_check_that_is_none(two_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--only", "x"]) == 2
    assert capsys.readouterr().err == "smartmoe doctor: --only = 'x': is no check. Known: python, apex.\n"
