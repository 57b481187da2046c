#!/usr/bin/env python3
"""`smartmoe doctor` in environments that are really broken: `python -m scripts.validation.broken_environments`.

Each is a scratch environment on top of this one, in which one package is installed without what it needs, as users meet
them; two stand for packages that the registry does not have (NVIDIA's apex, DeepEP), and say so. Prints a table, as in
docs/reliability.md; exits 1 where the doctor does not name the package, or calls an environment whole that is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Broken:
    """One environment.

    Attributes:
        name: in the table.
        check: the doctor's check that has to find it.
        requirements: installed without what they depend on.
        files: written instead, where the registry has no such package.
        stops: whether training cannot run.
    """

    name: str
    check: str
    requirements: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    stops: bool = True


CASES = (
    Broken(
        name="TransformerEngine without its torch extension",
        check="transformer_engine",
        requirements=("transformer-engine==2.20.2", "transformer-engine-cu13==2.20.2"),
    ),
    Broken(name="the registry's apex, which is not NVIDIA's", check="apex", requirements=("apex==0.9.10.dev0",)),
    Broken(
        name="apex without its extensions (a stand-in)",
        check="apex",
        files={"apex/__init__.py": "__version__ = '0.1'\n", "apex/optimizers/__init__.py": "class FusedAdam: pass\n"},
    ),
    Broken(
        name="nvidia-resiliency-ext 0.4.1",
        check="nvidia_resiliency_ext",
        requirements=("nvidia-resiliency-ext==0.4.1",),
    ),
    Broken(
        name="a DeepEP of another interface (a stand-in)",
        check="deep_ep",
        files={"deep_ep/__init__.py": "class Buffer:\n    def dispatch(self, x, topk_idx): ...\n"},
        stops=False,
    ),
)


def examine(case: Broken, folder: Path) -> tuple[str, bool]:
    """What the doctor says in this environment, and whether that is right."""
    # Step 1: an environment of its own, which finds this one's packages behind its own.
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(asked, text=True).strip())
    (site / "below.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    # Step 2: the package, without what it needs.
    if case.requirements:
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*command, *case.requirements], check=True)
    for name, text in case.files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    # Step 3: the doctor's word.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-m", "megatron_smartmoe.cli.main", "doctor", "--json", "--only", case.check],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    found = findings[case.check]
    is_right = found["state"] not in ("ok", "not applicable") and bool(found["way_out"])
    is_right = is_right and (done.returncode != 0) == case.stops and "Traceback" not in done.stderr
    return f"{found['state']}: {found['found'].rstrip('.')}. {found['way_out']}", is_right


def main() -> int:
    """Examine all of them."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| environment | the doctor says | right |", "|---|---|---|", sep="\n")
    bad = 0
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            said, is_right = examine(case, Path(folder) / "environment")
        bad += not is_right
        print(f"| {case.name} | {said.replace('|', '/')} | {'yes' if is_right else 'NO'} |", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
