"""Command lines and the errors of the start-up checks for them, found through Megatron's own parser.

The facade changes torch for the whole process, so one rank of `run_ranks` checks all command lines of a test file and
returns their errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from megatron_smartmoe.adapter.flags import megatron_checks, smartmoe_checks
from megatron_smartmoe.errors import SmartMoEError
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING

GOOD = [*TINY_MODEL, *TINY_TRAINING, "--train-iters", "10"]
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 128".split()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, where it is checked, and the error it gets (None: it passes)."""

    flags: str = ""  # behind GOOD and DATA, so they win; {data} becomes a folder with the test's files
    says: str | None = None
    without: tuple[str, ...] = ()  # flags of GOOD and DATA that are left out, with their values
    ranks: int = 1
    per_node: int = 1  # of the ranks
    cpu: bool = True
    data_exists: bool = True
    te: bool = False  # TransformerEngine is installed
    verdict: bool = False  # ask Megatron too


def said_of(cases: Mapping[str, Case], data: Path) -> dict[str, str | None]:
    """The error of each case by its name, None where it passes; the folder reads {data}, as in `Case.says`."""
    said: dict[str, str | None] = run_ranks(judge_all, 1, cases, data, log_dir=data / "log")[0]
    return said


def judge_all(cases: Mapping[str, Case], data: Path) -> dict[str, str | None]:
    """Do the work of `said_of` in a rank."""
    said = {name: judge(case, data) for name, case in cases.items()}
    return {name: text and text.replace(str(data), "{data}") for name, text in said.items()}


def judge(case: Case, data: Path) -> str | None:
    """The error of a case's command line; called in a rank, where the facade is installed."""
    from megatron_smartmoe.adapter import pretrain

    os.environ |= {"WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.per_node)}
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # check_flags sets it
    user = [*_without(case.without, [*GOOD, *DATA]), *case.flags.replace("{data}", str(data)).split()]
    te, apex = mock.Mock(return_value=case.te), mock.Mock(return_value=False)
    with mock.patch.multiple(pretrain, has_transformer_engine=te, has_apex=apex):
        argv = pretrain.with_defaults(user, cpu=case.cpu, say=False)
    with (
        mock.patch.object(megatron_checks, "has_transformer_engine", te),
        mock.patch.object(smartmoe_checks, "has_transformer_engine", te),
    ):
        return _said_by(lambda: _check(argv, case))


def _check(argv: list[str], case: Case) -> None:
    from megatron_smartmoe.adapter.pretrain import check_flags

    args = check_flags(argv, cpu=case.cpu, data_exists=case.data_exists)
    if case.verdict:
        megatron_checks.megatron_verdict(args)


def _said_by(check: Callable[[], object]) -> str | None:
    try:
        check()
    except SmartMoEError as error:
        return str(error)
    except Exception as error:
        return f"a traceback: {error!r}"
    return None


def _without(flags: Iterable[str], tokens: Iterable[str]) -> list[str]:
    """`tokens` without those flags and their values."""
    kept, keep = [], True
    for token in tokens:
        keep = token not in flags if token.startswith("--") else keep
        kept += [token] if keep else []
    return kept
