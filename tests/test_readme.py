"""The README tells the truth: its commands run, its paths exist, its sample output is what the quickstart prints."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.training import metrics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = "scripts/pretrain_gpt_moe.sh --config configs/runs/quickstart.yaml"


def commands() -> list[str]:
    """Every line of every block of shell commands."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def run(command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a line as a reader would, from the checkout."""
    return subprocess.run(
        shlex.split(command), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_the_first_two_commands_are_the_ones_promised() -> None:
    assert commands()[:2] == [QUICKSTART, "scripts/test.sh"]
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec scripts/test.sh")


@pytest.mark.parametrize("command", [line for line in commands() if line.endswith("--dry-run")])
def test_dry_runs(command: str) -> None:
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "megatron_smartmoe.adapter.pretrain" in done.stdout


def test_data_preparation(tmp_path: Path) -> None:
    (command,) = [line for line in commands() if "prepare_data.py" in line]
    done = run(command.replace("data/example", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "corpus.idx").is_file()


def test_every_command_is_covered_here() -> None:
    """A new command in the README needs a test that runs it; sbatch's is tests/slurm/test_launch.py."""
    known = ("--dry-run", "prepare_data.py", "sbatch ")
    assert [line for line in commands()[2:] if not any(part in line for part in known)] == []


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_quickstart(tmp_path: Path) -> None:
    """The first command, whole: 4 CPU ranks, EP 2 x PP 2, a few hundred iterations of real text."""
    run_dir = tmp_path / "quickstart"
    done = run(f"{QUICKSTART} --run-dir {run_dir}", timeout_s=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["iterations"] == 300
    assert summary["valid_loss"] < summary["unigram_entropy"] - 1.0
    assert metrics(run_dir)[0]["lm loss"] > summary["unigram_entropy"]  # it knew nothing when it began
    assert len(summary["layers"]) == 4
    assert all(abs(sum(layer["share_E"]) - 100) < 1e-6 and len(layer["share_E"]) == 8 for layer in summary["layers"])

    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "300"
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    for name in ("config.yaml", "command.sh", "environment.json", "train.log", "arguments.txt"):
        assert (run_dir / name).is_file(), name
    _same_lines_as_the_readme(done.stdout)


def _same_lines_as_the_readme(printed: str) -> None:
    """The README's sample of the summary has the labels and the shape of what was printed, whatever the numbers."""

    def shape(text: str) -> list[str]:
        lines = text[text.index("Finished after") :].splitlines()
        return [re.sub(r"\s+", " ", re.sub(r"[\d.,]+|\S*quickstart\S*", "#", line)).strip() for line in lines]

    sample = re.search(r"```text\n(=+\nFinished.*?)```", README, flags=re.DOTALL)
    assert sample is not None
    assert shape(printed) == shape(sample[1])
