"""Whole or not at all: kills, signals, full disks, and several preparers at once."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from megatron_smartmoe.adapter.corpus import CorpusSpec, PreparedCorpus, indexed, prepare
from megatron_smartmoe.adapter.corpus.records import Document, RecordReader
from megatron_smartmoe.adapter.corpus.sources import SpanGroup
from megatron_smartmoe.errors import ConfigError
from tests.support.corpus import decode, files, spec_for, texts, write_jsonl

WHOLE = {"x.bin", "x.idx", "x.json", "x.tokenizer.model"}
SCRIPT = Path(__file__).parents[3] / "scripts" / "prepare_data.py"

# Forked children start in an instant with Megatron imported; it is imported here so that it is.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def _megatron_is_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("warm")
    prepare(spec_for(folder / "x", write_jsonl(folder / "in.jsonl", texts(60))))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", texts(60))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "x"


def kill_at_rename(number: int, spec: CorpusSpec) -> None:
    """Prepare, and die at a rename (counted from 0)."""
    replace = Path.replace
    renames: list[Path] = []

    def replace_or_die(self: Path, target: Path) -> Path:
        if len(renames) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        renames.append(target)
        return replace(self, target)

    pytest.MonkeyPatch().setattr(Path, "replace", replace_or_die)
    prepare(spec)


def stop_in_mid_write(spec: CorpusSpec, ready: Event) -> None:
    """Prepare, and stand still with a part of the tokens written."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
    read_documents = indexed.read_documents

    def read_half(group: SpanGroup, reader: RecordReader) -> Iterator[Document]:
        for index, document in enumerate(read_documents(group, reader)):
            if index == 30:
                ready.set()
                time.sleep(60)
            yield document

    indexed.read_documents = read_half
    prepare(spec)


def run_forked(function: Callable[..., None], *arguments: Any) -> ForkProcess:
    process = fork.Process(target=function, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_while_putting_in_place_shows_no_dataset(jsonl: Path, out: Path, number: int, replacing: bool) -> None:
    if replacing:
        prepare(spec_for(out, jsonl))
    process = run_forked(kill_at_rename, number, spec_for(out, jsonl, vocab_size=300, force=replacing))
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not out.with_suffix(".idx").exists()
    assert not PreparedCorpus.exists(out)
    corpus = prepare(spec_for(out, jsonl, force=replacing))
    assert decode(corpus) == texts(60)
    assert files(out.parent) == WHOLE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_write(jsonl: Path, out: Path, number: signal.Signals) -> None:
    ready = fork.Event()
    process = run_forked(stop_in_mid_write, spec_for(out, jsonl), ready)
    assert ready.wait(30)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 1}[number]
    left = files(out.parent)
    assert not left & WHOLE
    if number != signal.SIGKILL:  # Nobody can clean up after that; the next run does.
        assert left == set()
    assert decode(prepare(spec_for(out, jsonl))) == texts(60)
    assert files(out.parent) == WHOLE


def test_an_existing_dataset_stays_unless_forced(jsonl: Path, out: Path) -> None:
    prepare(spec_for(out, jsonl))
    before = out.with_suffix(".bin").read_bytes()
    with pytest.raises(ConfigError, match=r"exists already\. Give --force to replace it"):
        prepare(spec_for(out, jsonl, vocab_size=300))
    assert out.with_suffix(".bin").read_bytes() == before
    assert prepare(spec_for(out, jsonl, vocab_size=300, force=True)).vocab_size == 300
    assert files(out.parent) == WHOLE


def test_an_error_leaves_an_existing_dataset_alone(jsonl: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = prepare(spec_for(out, jsonl))

    def fail(*_: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[prepare.__module__], "describe", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(spec_for(out, jsonl, vocab_size=300, force=True))
    assert PreparedCorpus.load(out) == corpus
    assert decode(corpus) == texts(60)
    assert files(out.parent) == WHOLE


def prepare_with_little_room(spec: CorpusSpec, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        prepare(spec)
    except OSError as error:
        os._exit(error.errno or 1)


@pytest.mark.parametrize("limit", [100, 2000, 6000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, out: Path, limit: int) -> None:
    """A file size limit stands for the disk: the write itself fails, wherever it is."""
    path = write_jsonl(tmp_path / "many.jsonl", texts(200))
    process = run_forked(prepare_with_little_room, spec_for(out, path, vocab_size=300), limit)
    process.join(30)
    assert process.exitcode == 27  # EFBIG
    assert files(out.parent) == set()


def prepare_and_tell(spec: CorpusSpec, results: Queue[str]) -> None:
    results.put(prepare(spec).input_sha256)


def test_preparers_of_one_prefix_wait_for_each_other(jsonl: Path, out: Path) -> None:
    results: Queue[str] = fork.Queue()
    processes = [run_forked(prepare_and_tell, spec_for(out, jsonl), results) for _ in range(4)]
    # One that comes after the others are through is refused instead; the answers of the rest agree.
    for process in processes:
        process.join(60)
    answers = [results.get(timeout=5) for process in processes if process.exitcode == 0]
    assert answers
    assert len(set(answers)) == 1
    assert files(out.parent) == WHOLE
    assert decode(PreparedCorpus.load(out)) == texts(60)


def test_who_waited_takes_the_same_request_only(jsonl: Path, out: Path) -> None:
    ready = fork.Event()
    process = run_forked(finish_when_awaited, spec_for(out, jsonl), ready)
    assert ready.wait(30)
    with pytest.raises(ConfigError, match="exists already"):
        prepare(spec_for(out, jsonl, seed=1))
    process.join(30)
    out.with_suffix(".idx").unlink()
    ready.clear()
    process = run_forked(finish_when_awaited, spec_for(out, jsonl, force=True), ready)
    assert ready.wait(30)
    inode = out.with_suffix(".bin").stat().st_ino
    assert prepare(spec_for(out, jsonl)).num_documents == 60
    process.join(30)
    assert out.with_suffix(".bin").stat().st_ino != inode, "made by the process that was waited for"


def finish_when_awaited(spec: CorpusSpec, ready: Event) -> None:
    """Prepare, but hold the lock for a while."""
    write = Path.write_text

    def write_late(self: Path, *arguments: Any, **options: Any) -> int:
        ready.set()
        time.sleep(0.5)
        return write(self, *arguments, **options)

    pytest.MonkeyPatch().setattr(Path, "write_text", write_late)
    prepare(spec)


def test_workers_end_with_a_killed_parent() -> None:
    code = (
        "import time; from megatron_smartmoe.workers import ordered_map;"
        "list(ordered_map(time.sleep, [60] * 4, workers=2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    workers: list[psutil.Process] = []
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        workers = [
            child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
    time.sleep(2)  # Until they have imported what they need and watch their parent.
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert len(workers) == 2
    assert not alive


def test_a_killed_worker_is_noticed() -> None:
    from megatron_smartmoe.workers import ordered_map

    with pytest.raises(ConfigError, match="a worker process was killed"):
        list(ordered_map(os._exit, [9] * 4, workers=2))


@pytest.mark.slow
def test_command_line(jsonl: Path, out: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--input", str(jsonl), "--vocab-size", "340", "--output-prefix", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    corpus = PreparedCorpus.load(out)
    assert f"{corpus.num_tokens:,} tokens" in done.stdout
    assert f"--data-path {out} --tokenizer-type SentencePieceTokenizer" in done.stdout
    assert corpus.command == ("prepare_data.py", *command[2:])
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("prepare_data: --output-prefix = ")
