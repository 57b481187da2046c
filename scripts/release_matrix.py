"""Train with `--smartmoe` in releases of Megatron that are not the installed one, and print a row for each.

    scripts/release_matrix.py --checkout ~/Megatron-LM ~/our-fork     checkouts: their own pretrain_gpt.py, patched
    scripts/release_matrix.py --wheel 0.17.1 0.18.2 0.19.0 0.19.2     wheels from the registry, each in a scratch folder

Two CPU ranks, EP 2, 20 steps: with `--smartmoe` off, with homes that move at random every 3 steps (every loss must have
the same bits), and in releases that our own entry supports with our entry; then with replicas, saved in the middle and
resumed from there (the losses of the run that went on). A checkout is copied first and is not changed. About 2 minutes
a release on 2 free cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.spec.megatron_names import installed_tree

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    flag for line in (ROOT / "examples" / "flags.txt").read_text(encoding="utf-8").splitlines() for flag in line.split()
]
STEPS, SAVED = 20, 10
HOMES = ["--smartmoe", "--smartmoe-homes", "shuffle", "--smartmoe-homes-interval", "3"]
REPLICAS = ["--smartmoe-spare-slots", "1", "--smartmoe-replicas-scope", "group", "--smartmoe-replicas-margin", "0"]
SHARDED = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
OWN_ENTRY_SINCE = (0, 19)
LIMIT_S = 900


class Failed(Exception):
    """A step of the matrix; the message is its row's."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A Megatron to train with.

    Attributes:
        name: of the row.
        folder: that holds `megatron`.
        script: the training script.
        work: where runs are written.
    """

    name: str
    folder: Path
    script: Path
    work: Path

    @property
    def version(self) -> str:
        """Of megatron-core, as its package says."""
        text = (self.folder / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8")
        return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) *= *(\d+)", text, re.MULTILINE))

    def train(self, name: str, *flags: str, script: Sequence[str] | None = None) -> list[float]:
        """Train on two ranks and return the loss of every iteration.

        Raises:
            Failed: it did not end well.
        """
        log, run_dir = self.work / f"{name}.log", self.work / name
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _port()]
        command += [*(script or [str(self.script)]), *FLAGS, "--train-iters", str(STEPS), "--rerun-mode", "disabled"]
        paths = [str(self.folder), str(ROOT / "examples"), str(ROOT)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                [*command, *flags, "--smartmoe-run-dir", str(run_dir)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                env=environment,
                timeout=LIMIT_S,
                check=False,
            )
        if done.returncode != 0:
            raise Failed(f"{name}: exit status {done.returncode}, see {log}")
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["lm loss"] for line in map(json.loads, lines) if "lm loss" in line]

    def moves(self, name: str) -> int:
        """Migrations of a run."""
        return (self.work / f"{name}.log").read_text(encoding="utf-8").count("experts moved")


def checkout(path: Path, work: Path) -> Release:
    """A copy of a checkout, patched."""
    tree = work / "tree"
    tree.mkdir(parents=True)
    for each in (*path.glob("*.py"), path / "megatron"):
        if each.is_dir():
            shutil.copytree(each, tree / each.name)
        else:
            shutil.copy2(each, tree / each.name)
    _complete(tree)
    patch(tree)
    return Release(name=path.name, folder=tree, script=tree / "pretrain_gpt.py", work=work)


def wheel(version: str, work: Path) -> Release:
    """A release from the registry, in a folder of its own, with the packages of this environment."""
    folder = work / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, f"megatron-core=={version}"], check=True)
    script = ROOT / "examples" / "own_provider.py"
    return Release(name=f"megatron-core {version}", folder=folder, script=script, work=work)


def _complete(tree: Path) -> None:
    """Megatron's compiled dataset helper, where nobody has built it: the wheel's, if the sources are equal."""
    root = installed_tree()
    if root is None:
        return
    installed, here = (each / "megatron" / "core" / "datasets" for each in (root, tree))
    same = (installed / "helpers.cpp").read_bytes() == (here / "helpers.cpp").read_bytes()
    if same and not list(here.glob("helpers_cpp*.so")):
        for library in installed.glob("helpers_cpp*.so"):
            shutil.copyfile(library, here / library.name)  # newer than its source, so that `make` does nothing


def patch(tree: Path, *options: str) -> None:
    """Run scripts/apply_patches.sh.

    Raises:
        Failed: it refused the tree.
    """
    command = [str(ROOT / "scripts" / "apply_patches.sh"), str(tree), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(done.stderr.strip())


def _port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def check_homes(release: Release) -> str:
    """Homes that move, against `--smartmoe` off.

    Raises:
        Failed: a loss differs, or nothing moved.
    """
    off, on = release.train("off"), release.train("on", *HOMES)
    if len(off) != STEPS or off != on:
        raise Failed(f"homes: losses differ from --smartmoe off: {off} and {on}")
    if not release.moves("on"):
        raise Failed("homes: nothing moved")
    return f"{len(on)} losses equal to off, {release.moves('on')} migrations, last loss {on[-1]:.6f}"


def check_own_entry(release: Release) -> str:
    """The same losses from our own entry, with the attention of the script.

    Raises:
        Failed: a loss differs.
    """
    if tuple(int(part) for part in release.version.split(".")[:2]) < OWN_ENTRY_SINCE:
        return "needs 0.19"
    entry = ["-m", "megatron_smartmoe.adapter.pretrain"]
    own = release.train("entry", *HOMES, "--attention-backend", "unfused", script=entry)
    lines = (release.work / "on" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    script = [line["lm loss"] for line in map(json.loads, lines) if "lm loss" in line]
    if own != script:
        raise Failed(f"our own entry: losses differ: {own} and {script}")
    return f"{len(own)} losses equal"


def check_resume(release: Release) -> str:
    """Replicas and homes, saved in the middle, and resumed from there.

    Raises:
        Failed: a loss differs from that of the run that went on.
    """
    checkpoints = release.work / "checkpoints"
    flags = [*HOMES, *REPLICAS, *SHARDED]
    whole = release.train("whole", *flags, "--save", str(checkpoints), "--save-interval", str(SAVED))
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(SAVED), encoding="utf-8")
    rest = release.train("rest", *flags, "--load", str(checkpoints))
    if len(rest) != STEPS - SAVED or rest != whole[SAVED:]:
        raise Failed(f"resume: losses differ: {rest} and {whole[SAVED:]}")
    return f"{len(rest)} losses equal after iteration {SAVED}"


def row(release: Release) -> list[str]:
    """A row of the table; what failed is in it."""
    cells = [release.name, release.version]
    for check in (check_homes, check_own_entry, check_resume):
        try:
            cells.append(check(release))
        except Failed as error:
            cells.append(f"FAILED: {error}")
    return cells


def main() -> int:
    """Print the table; returns 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, nargs="*", default=[], metavar="PATH")
    parser.add_argument("--wheel", nargs="*", default=[], metavar="VERSION")
    options = parser.parse_args()
    rows = []
    print("| Megatron | version | homes on EP 2 against off | our own entry | replicas, save, resume |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="smartmoe-releases-") as folder:
        makers = [(checkout, path) for path in options.checkout] + [(wheel, version) for version in options.wheel]
        for number, (make, what) in enumerate(makers):
            work = Path(folder) / str(number)
            work.mkdir()
            try:
                cells = row(make(what, work))
            except (Failed, subprocess.CalledProcessError) as error:
                cells = [str(what), "?", f"FAILED: {error}", "", ""]
            rows.append(cells)
            print(f"| {' | '.join(cells)} |", flush=True)
    return int(any("FAILED" in cell for cells in rows for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
