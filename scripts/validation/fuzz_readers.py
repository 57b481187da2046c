#!/usr/bin/env python3
"""Feed damaged and hostile files to every reader; each must be read, or refused with the project's own error.

    python scripts/validation/fuzz_readers.py                                    # 10,000 cases of every reader
    python scripts/validation/fuzz_readers.py --reader trace-npz run --cases 300 --seed 7

A case is a good file with some bytes, values, keys or headers changed, or one of the known traps: deep nesting, aliases
that stand for a billion entries, sizes in headers, cut lines, numbers that are not finite, links, pipes. It is a
failure when something else than the project's error is raised, when it takes more than 5 s of CPU or more than 1 GiB
beyond what the process had, when a message is longer than 2,000 characters, or when a planted command runs. The
smallest failing input of each kind is kept in the folder of `--keep`. Same seed, same cases.
"""

from __future__ import annotations

import argparse
import logging
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from megatron_smartmoe.errors import SmartMoEError
from scripts.validation.hostile_files import CANARY, READERS, Case, Maker

_ROOT = Path(__file__).resolve().parents[2]
MOST_CPU_S = 5.0
MOST_BYTES = 2**30
MOST_CHARACTERS = 2000
_KEPT_BYTES = 2_000_000


class TooSlow(BaseException):
    """A case ran out of time; no `except Exception` of a reader may swallow it."""


@dataclass
class Outcome:
    """What happened to the cases of one reader.

    Attributes:
        reader: its name.
        counts: cases by kind of outcome: accepted, refused, or the failure.
        smallest: kind of failure -> its smallest input.
        seconds: wall time of all cases.
        slowest_s: CPU seconds of the slowest case.
    """

    reader: str
    counts: Counter[str] = field(default_factory=Counter)
    smallest: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_s: float = 0.0

    @property
    def failures(self) -> dict[str, int]:
        """Number of cases of each kind of failure."""
        return {kind: count for kind, count in self.counts.items() if kind not in ("accepted", "refused")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 when a case failed."""
    args = parse(argv)
    logging.getLogger("megatron_smartmoe").setLevel(logging.ERROR)  # what is said of a file that is read
    failed = False
    for name in args.reader or READERS:
        outcome = fuzz(name, args.cases, args.seed, args.keep)
        failed |= bool(outcome.failures)
        numbers = f"{outcome.counts['refused']:6} refused {outcome.counts['accepted']:6} accepted"
        wrong = "; ".join(
            f"{count} x {kind} {outcome.smallest.get(kind, '')}" for kind, count in outcome.failures.items()
        )
        times = f"{outcome.seconds:6.1f} s, slowest {outcome.slowest_s:.2f} s of CPU"
        print(f"{name:18} {args.cases:6} cases: {numbers}  {times}  {wrong or '0 failures'}", flush=True)
    return int(failed)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reader", nargs="+", choices=list(READERS), help="readers to feed (default: all)")
    parser.add_argument("--cases", type=int, default=10_000, help="cases of each reader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the cases (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for the smallest failing inputs (default: keep none)")
    return parser.parse_args(argv)


def fuzz(name: str, cases: int, seed: int, keep: Path | None = None) -> Outcome:
    """Feed one reader; the cases are written to a temporary folder, one after the other."""
    outcome, make = Outcome(reader=name), READERS[name]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, bounded():
        maker = Maker(Random(f"{name} {seed}"), Path(folder))
        for _ in range(cases):
            maker.clear()
            case = make(maker)
            cpu_s = time.process_time()
            kind = outcome_of(case)
            outcome.slowest_s = max(outcome.slowest_s, time.process_time() - cpu_s)
            outcome.counts[kind] += 1
            if kind not in ("accepted", "refused") and keep is not None:
                _keep(outcome, kind, case.path, keep)
    outcome.seconds = time.monotonic() - begin
    return outcome


def outcome_of(case: Case) -> str:
    """Read a case, and say what happened."""
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)
    try:
        case.read()
    except SmartMoEError as error:
        kind = "refused" if len(str(error)) <= MOST_CHARACTERS else f"a message of {len(str(error)):,} characters"
    except TooSlow:
        kind = f"more than {MOST_CPU_S:g} s"
    except MemoryError:
        kind = "more than 1 GiB"
    except (Exception, SystemExit) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(_ROOT) in frame.filename]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        kind = f"{type(error).__name__} at {at}"
    else:
        kind = "accepted"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "ran what the file says" if Path(CANARY).exists() else kind


@contextmanager
def bounded() -> Iterator[None]:
    """Bounds on time and memory, while the cases of a reader run."""

    def too_slow(_signal: int, _frame: FrameType | None) -> None:
        raise TooSlow

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


def _keep(outcome: Outcome, kind: str, path: Path, folder: Path) -> None:
    """Copy a failing input, if it is the smallest of its kind."""

    def size_of(path: Path) -> int:
        return sum(one.stat().st_size for one in [path, *path.rglob("*")] if one.is_file())

    before = outcome.smallest.get(kind)
    if size_of(path) > _KEPT_BYTES or (before is not None and size_of(before) <= size_of(path)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    target = before or folder / f"{outcome.reader}-{len(outcome.smallest)}{path.suffix}"
    if target.is_dir():
        shutil.rmtree(target)
    copy: Callable[[Path, Path], object] = shutil.copytree if path.is_dir() else shutil.copy
    copy(path, target)
    outcome.smallest[kind] = target


if __name__ == "__main__":
    sys.exit(main())
