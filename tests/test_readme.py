"""The documents are true: commands run, paths and packages exist, sample output is what the quickstart prints."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.training import metrics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGE = ROOT / "megatron_smartmoe"
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


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands() if line.endswith("--dry-run")])
def test_dry_runs(command: str) -> None:
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "megatron_smartmoe.adapter.pretrain" in done.stdout


@pytest.mark.slow
def test_data_preparation(tmp_path: Path) -> None:
    (command,) = [line for line in commands() if "prepare_data.py" in line]
    done = run(command.replace("data/example", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "corpus.idx").is_file()


def test_every_command_is_covered_here() -> None:
    """A new command in the README needs a test that runs it; sbatch's is tests/slurm/test_launch.py."""
    known = ("--dry-run", "prepare_data.py", "sbatch ")
    assert [line for line in commands()[2:] if not any(part in line for part in known)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = document.parent / target if target else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """`adapter/moe/layer.py`, from the package or the checkout, and `scripts/X` or `configs/X`."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|slurm|yaml|cpp))`", text):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", ROOT / "docs" / "architecture.md"], ids=lambda path: path.name
)
def test_the_package_table_is_complete(document: Path) -> None:
    """Every package has a line, no line names a package that does not exist, and the import chain is the contract's."""
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(?:megatron_smartmoe/)?(\w+)`", text, flags=re.MULTILINE)) - {"configs"}
    assert named == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["name"] for contract in contracts if contract["type"] == "layers"]
    assert layers.removeprefix("layers: ") in text


def test_tools_that_are_named_exist() -> None:
    tools = set(re.findall(r"\w+", run(f"{ROOT}/.venv/bin/smartmoe --help").stdout))
    for document in DOCUMENTS:
        named = re.findall(
            r"smartmoe (plan|simulate|calibrate|whatif|explain|report|convert|doctor)\b", document.read_text()
        )
        assert set(named) <= tools


def test_the_planner_page_and_the_readme_plan_alike() -> None:
    """`smartmoe plan` is the same in both, and names shipped files."""
    (command,) = re.findall(r"```bash\n(smartmoe plan .*)\n```", (ROOT / "docs" / "planner.md").read_text())
    assert command in README
    for kind, name in re.findall(r"--(model|cluster) (\S+)", command):
        assert (ROOT / "configs" / f"{kind}s" / f"{name}.yaml").is_file()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("flags", "learnt"),
    [
        pytest.param("--train-iters 50 --eval-interval 25 --eval-iters 2", 0.4, id="50"),
        pytest.param("", 1.0, marks=pytest.mark.long, id="whole"),
    ],
)
def test_quickstart(flags: str, learnt: float, tmp_path: Path) -> None:
    """The first command: 4 CPU ranks, EP 2 x PP 2, real text, and a loss below that of guessing by frequency."""
    run_dir = tmp_path / "quickstart"
    iterations = int(flags.split()[1]) if flags else 300
    done = run(f"{QUICKSTART} --run-dir {run_dir} {flags}", timeout_s=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["iterations"] == iterations
    assert summary["valid_loss"] < summary["unigram_entropy"] - learnt
    assert metrics(run_dir)[0]["lm loss"] > summary["unigram_entropy"]  # it knew nothing when it began
    steps = [line["seconds_per_step"] for line in metrics(run_dir) if "seconds_per_step" in line]
    assert min(steps) > max(steps) / 50  # one of them is logged after an evaluation, which neither adds nor takes time
    assert len(summary["layers"]) == 4
    assert all(abs(sum(layer["share_E"]) - 100) < 1e-6 and len(layer["share_E"]) == 8 for layer in summary["layers"])

    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(iterations)
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    for name in ("config.yaml", "command.sh", "environment.json", "train.log", "arguments.txt"):
        assert (run_dir / name).is_file(), name
    _same_lines_as_the_readme(done.stdout)


def _same_lines_as_the_readme(printed: str) -> None:
    """The README's sample of the summary has the labels and the shape of what was printed, whatever the numbers."""

    def shape(text: str) -> list[str]:
        lines = text[text.index("Finished after") :].splitlines()
        lines = [re.sub(r" losses: .*", " losses:", line) for line in lines]  # the two that are largest in this run
        return [re.sub(r"\s+", " ", re.sub(r"\".*\"|[\d.,]+|\S*quickstart\S*", "#", line)).strip() for line in lines]

    sample = re.search(r"```text\n(=+\nFinished.*?)```", README, flags=re.DOTALL)
    assert sample is not None
    assert shape(printed) == shape(sample[1])
