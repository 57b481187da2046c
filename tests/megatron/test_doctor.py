"""`smartmoe doctor` on this machine, and with packages that are half there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.dist  # the collectives' probe has two gloo ranks

ROOT = Path(__file__).parents[2]
# What stands for each package is a folder that is found before site-packages, and fails as the real one does.
BROKEN = {
    "transformer_engine": {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch.py": "raise FileNotFoundError('Could not find shared object file for "
        "Transformer Engine torch lib.')",
    },
    "apex": {"apex/__init__.py": "import a_framework_that_is_not_there"},
    "apex without extensions": {
        "apex/__init__.py": "__version__ = '0.1'",
        "apex/optimizers/__init__.py": "class FusedAdam: pass",
    },
    "nvidia_resiliency_ext": {
        "nvidia_resiliency_ext/__init__.py": "",
    },
    "deep_ep": {
        "deep_ep/__init__.py": "class Buffer:\n    def dispatch(self, x, topk_idx): ...",
        "deep_ep/utils.py": "class EventHandle: ...",
    },
    "deep_ep that kills": {"deep_ep/__init__.py": "import os; os.kill(os.getpid(), 11)"},
}


def doctor(*argv: str, path: Path | None = None, without_slurm: bool = False) -> tuple[int, dict[str, Any]]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ["PYTHONPATH"] = os.pathsep.join([*([str(path)] if path else []), str(ROOT)])
    if without_slurm:
        environ["PATH"] = os.pathsep.join(
            folder for folder in environ["PATH"].split(os.pathsep) if not (Path(folder) / "srun").exists()
        )
    command = [sys.executable, "-m", "megatron_smartmoe.cli.main", "doctor", "--json", *argv]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_this_machine_is_found_to_work() -> None:
    status, found = doctor("--only", "torch,gpu,ops,megatron,collectives,slurm", without_slurm=True)
    assert status == 0
    gpu = "ok" if torch.cuda.is_available() else "not applicable"
    states = {name: finding["state"] for name, finding in found.items()}
    assert states == {
        "torch": "ok",
        "gpu": gpu,
        "ops": "ok",
        "megatron": "ok",
        "collectives": "ok",
        "slurm": "not applicable",
    }


@pytest.mark.parametrize(
    ("case", "status", "found"),
    [
        (
            "transformer_engine",
            2,
            "FileNotFoundError: Could not find shared object file for Transformer Engine torch lib.",
        ),
        ("apex", 2, "ModuleNotFoundError: No module named 'a_framework_that_is_not_there'"),
        ("apex without extensions", 2, "0.1, without amp_C, fused_layer_norm_cuda"),
        ("nvidia_resiliency_ext", 2, "installed, without __version__"),
        ("deep_ep", 0, "installed, without deep_ep.utils.EventOverlap, deep_ep.Buffer.get_dispatch_config"),
        ("deep_ep that kills", 0, "Python was killed by SIGSEGV"),
    ],
)
def test_a_package_that_is_half_there(case: str, status: int, found: str, tmp_path: Path) -> None:
    for name, text in BROKEN[case].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    name = case.split()[0]
    exit_status, findings = doctor("--only", name, path=tmp_path)
    assert findings[name]["found"].startswith(found)
    assert findings[name]["way_out"]
    assert exit_status == status
