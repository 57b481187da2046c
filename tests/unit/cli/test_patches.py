"""`scripts/apply_patches.sh`: in and out of a tree, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.cli import main as tools
from megatron_smartmoe.cli import patches
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.megatron_names import NAMES
from megatron_smartmoe.spec.yaml_io import dump_yaml
from tests.support.trees import fork_of_installed

SCRIPT = '''"""Train."""
import time

START = time.time()

import os  # for the rank

# The framework.
# Two lines of comment.
import torch
from megatron.training import pretrain

print(os, torch, pretrain)
'''
BLOCK = """# >>> smartmoe >>> (scripts/apply_patches.sh --reverse takes these lines out)
import megatron_smartmoe

megatron_smartmoe.enable()
# <<< smartmoe <<<

"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = fork_of_installed(tmp_path)
    (root / "pretrain_gpt.py").write_bytes(SCRIPT.encode())
    return root


def content(tree: Path) -> str:
    return (tree / "pretrain_gpt.py").read_bytes().decode()


def test_in_and_out_again(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert patches.main([str(tree), "--check"]) == 1
    assert content(tree) == SCRIPT
    assert patches.main([str(tree)]) == 0
    patched = SCRIPT.replace("# The framework.", BLOCK + "# The framework.")
    assert content(tree) == patched
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == f"megatron-core 0.19.2 in {tree}: all names are there, as in core_v0.19.0"
    assert "\n+import megatron_smartmoe\n" in shown
    assert shown.endswith("the block was put into pretrain_gpt.py\n")
    assert patches.main([str(tree)]) == 0
    assert content(tree) == patched
    assert capsys.readouterr().out.endswith("patched already: nothing to do\n")
    assert patches.main([str(tree), "--reverse", "--check"]) == 1
    assert patches.main([str(tree), "--reverse"]) == 0
    assert content(tree) == SCRIPT
    assert patches.main([str(tree), "--reverse"]) == 0
    assert capsys.readouterr().out.endswith("not patched: there is nothing to take out\n")


def test_edits_elsewhere_stay(tree: Path) -> None:
    patches.main([str(tree)])
    (tree / "pretrain_gpt.py").write_text(content(tree).replace("print(", "log(") + "\n# more\n")
    patches.main([str(tree), "--reverse"])
    assert content(tree) == SCRIPT.replace("print(", "log(") + "\n# more\n"


def test_line_ends_stay(tree: Path) -> None:
    (tree / "pretrain_gpt.py").write_bytes(SCRIPT.replace("\n", "\r\n").encode())
    patches.main([str(tree)])
    assert content(tree).count("\r\n") == content(tree).count("\n") == SCRIPT.count("\n") + 6
    patches.main([str(tree), "--reverse"])
    assert content(tree) == SCRIPT.replace("\n", "\r\n")


def test_another_script(tree: Path) -> None:
    (tree / "lab").mkdir()
    (tree / "lab" / "train.py").write_text("import torch\n")
    assert patches.main([str(tree), "--script", "lab/train.py"]) == 0
    assert (tree / "lab" / "train.py").read_text() == BLOCK + "import torch\n"
    assert content(tree) == SCRIPT
    assert patches.main([str(tree), "--script", "lab/train.py", "--reverse"]) == 0
    assert (tree / "lab" / "train.py").read_text() == "import torch\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            BLOCK.replace("enable()", "enable(x)") + SCRIPT,
            "has another smartmoe block: take it out with --reverse, or by hand, and try again.",
        ),
        ("import os\n", "imports nothing but the standard library at module level: not a training script."),
        ("import\n", "cannot be parsed: "),
        (None, "not there. Name the training script of this tree with --script, relative to the tree."),
    ],
)
def test_a_script_that_is_refused(tree: Path, text: str | None, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = tree / "pretrain_gpt.py"
    script.unlink() if text is None else script.write_text(text)
    assert patches.main([str(tree)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {script} = {says}")
    assert not script.exists() if text is None else script.read_text() == text


def test_half_a_block_is_not_taken_out(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "pretrain_gpt.py").write_text(patches.BEGIN + "\n" + SCRIPT)
    assert patches.main([str(tree), "--reverse"]) == 2
    assert "one mark of the smartmoe block without the other" in capsys.readouterr().err


def test_an_unknown_revision_is_refused_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = fork_of_installed(tmp_path, "megatron/training/training.py", ("def train_step(", "def training_step("))
    (fork / "pretrain_gpt.py").write_text(SCRIPT)
    assert patches.main([str(fork)]) == 2
    said = capsys.readouterr().err
    assert (
        f"error: {fork} = megatron-core 0.19.2, nearest to core_v0.19.0: megatron.training.training.train_step" in said
    )
    assert "Nothing was changed." in said
    assert content(fork) == SCRIPT
    assert tools.main(["doctor", "--megatron", str(fork)]) == 2
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("ERROR")] == [
        "megatron.training.training.train_step"
    ]


def test_the_doctor_of_a_tree(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(["doctor", "--megatron", str(tree)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == (
        f"megatron-core 0.19.2 in {tree}: all {len(NAMES)} names are as the project needs them; "
        f"scripts/apply_patches.sh {tree} puts the project in."
    )


def test_descriptions_are_short_and_hold_no_line_of_megatron() -> None:
    described = patches.load_patches()
    assert set(described) >= {"core_v0.17.1", "core_v0.18.2", "core_v0.19.0"}
    for patch in described.values():
        lines = [line for insertion in patch.insertions for line in insertion.lines if line]
        assert all("megatron_smartmoe" in line for line in lines)
        assert len(patch.fingerprints) > 20


def test_a_long_patch_is_refused(tmp_path: Path) -> None:
    insertion = {"file": "a.py", "lines": ["x"] * 38}
    path = tmp_path / "long.yaml"
    path.write_text(dump_yaml({"release": "x", "insert": [insertion], "fingerprints": {}}))
    with pytest.raises(ConfigError, match="adds more than 40 lines"):
        patches.load_patch(path)
