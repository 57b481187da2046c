"""Which names a Megatron-LM tree has: the installed one, and one with changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.spec.megatron_names import NAMES, examine, installed_tree, likeness
from tests.support.trees import fork_of_installed

TRAINING = "megatron/training/training.py"


def test_the_installed_one_has_all() -> None:
    root = installed_tree()
    assert root is not None
    tree = examine(root)
    assert tree.problems == ()
    assert len(tree.found) == len(NAMES)
    assert all(each.place for each in tree.found)


def test_a_renamed_function_is_found_with_its_new_name(tmp_path: Path) -> None:
    fork = fork_of_installed(tmp_path, TRAINING, ("def train_step(", "def training_step("))
    (problem,) = examine(fork).problems
    assert problem.startswith(
        f"megatron.training.training.train_step: missing in {TRAINING}, and training_step and dummy_train_step are "
    )


def test_an_argument_that_is_read_is_missed(tmp_path: Path) -> None:
    fork = fork_of_installed(tmp_path, TRAINING, ("    iteration,\n    prof,\n", "    step,\n    prof,\n"))
    (problem,) = examine(fork).problems
    assert problem.startswith("megatron.training.training.post_training_step_callbacks: has no argument iteration in ")


def test_a_module_that_cannot_be_parsed_or_is_not_there(tmp_path: Path) -> None:
    fork = fork_of_installed(tmp_path, "megatron/core/models/backends.py", ("class LocalSpecProvider", "class class"))
    (fork / "megatron" / "training" / "checkpointing.py").unlink()
    problems = examine(fork).problems
    assert sum("LocalSpecProvider" in text and "cannot be parsed" in text for text in problems) == 2
    assert sum("training.checkpointing" in text and "its module is missing" in text for text in problems) == 3


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompatError) as caught:
        examine(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} = not a Megatron-LM tree: there is no megatron/core/package_info.py and megatron/training in it. "
        "Pass the folder that holds megatron/ and pretrain_gpt.py."
    )


def test_the_nearest_release_and_what_differs() -> None:
    root = installed_tree()
    assert root is not None
    tree = examine(root)
    name = "megatron.training.training.train_step"
    releases = {"far": dict.fromkeys(tree.fingerprints, "0"), "near": tree.fingerprints | {name: "0"}}
    assert likeness(tree, releases) == ("near", (name,))
