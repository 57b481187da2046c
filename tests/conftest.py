"""Settings for every test: one thread per rank, no time limit on a generated example; skipped tests are counted."""

import gc
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # two cores, several ranks; read when torch and numpy are imported
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
os.environ.setdefault("MALLOC_PERTURB_", "165")  # ranks fill what they free: a use after that shows (scripts/soak.sh)
settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")


gc.disable()  # until all tests are collected: modules and tests make millions of objects, and hardly any garbage


def pytest_collection_finish() -> None:
    """What is there now stays there; no later collection has to walk it."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker of pytest-xdist has one left when the other is done."""
    long = {item.location[0] for item in items if item.get_closest_marker("slow") or item.get_closest_marker("slurm")}
    items.sort(key=lambda item: (item.location[0] not in long, "/dist/" not in item.location[0]))


@pytest.hookimpl(optionalhook=True)  # called with -n alone
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Tests of one file share started runs and stay in one worker; so do all Slurm tests, which share one cluster."""

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return FileScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line with the number of skipped tests for each reason, whatever stands behind its colon left out."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    kinds: Counter[str] = Counter()
    for reason, count in reasons.items():
        kinds[reason.removeprefix("Skipped: ").split(":")[0]] += count
    if kinds:
        terminalreporter.write_line("skipped: " + "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common()))
