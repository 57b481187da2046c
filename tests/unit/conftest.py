"""`tests/unit` starts no ranks: a test that forms a process group, forks a rank or launches a training fails."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

STARTS_RANKS = ("torch.distributed.run", "torchrun", "megatron_smartmoe.adapter.launch.torchrun", "srun", "sbatch")


def refuse(what: str) -> Callable[..., NoReturn]:
    def refused(*_: Any, **__: Any) -> NoReturn:
        pytest.fail(f"tests/unit starts no ranks, and this test {what}: move it to tests/dist")

    return refused


def starts_ranks(command: Any) -> bool:
    """Whether the words of a command start ranks: through torchrun, Slurm, or the launcher without --dry-run."""
    words = command.split() if isinstance(command, str) else [str(word) for word in command]
    programs = {word.rsplit("/", 1)[-1] for word in words}
    launches = not programs.isdisjoint({"megatron_smartmoe.adapter.launch", "pretrain_gpt_moe.sh"})
    trains = {"--dry-run", "--help", "--help-megatron"}.isdisjoint(words)
    return not programs.isdisjoint(STARTS_RANKS) or (launches and trains)


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers, interpreters and this project's commands may be started: `subprocess` is refused by its words only."""
    popen = subprocess.Popen.__init__

    def checked(process: Any, args: Any, *more: Any, **options: Any) -> None:
        if starts_ranks(args):
            refuse(f"runs `{args if isinstance(args, str) else ' '.join(map(str, args))}`"[:200])()
        popen(process, args, *more, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", checked)
    monkeypatch.setattr("multiprocessing.forkserver.ForkServer.ensure_running", refuse("starts a fork server"))
    monkeypatch.setattr("torch.distributed.init_process_group", refuse("forms a process group"))
