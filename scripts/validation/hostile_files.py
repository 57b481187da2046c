"""Cases for `fuzz_readers`: for every reader, a good file that is damaged, or one of the known traps."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gzip
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from numpy.lib import format as npy

from megatron_smartmoe.adapter.corpus import documents, sources
from megatron_smartmoe.adapter.corpus.records import RecordReader
from megatron_smartmoe.adapter.corpus.spec import META_FORMAT, PreparedCorpus
from megatron_smartmoe.adapter.launch import corpus as corpus_flags
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.cli import simulate
from megatron_smartmoe.planner.auto import PlanRequest, reuse_saved_plan
from megatron_smartmoe.planner.constraints import Constraints
from megatron_smartmoe.planner.pool import Pool, PoolEntry, PoolSetting
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.model import load_model_spec
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_json
from megatron_smartmoe.spec.run import load_run_spec
from megatron_smartmoe.spec.trace import load_trace
from megatron_smartmoe.spec.yaml_io import shipped_directory
from scripts.validation import validate_planner
from scripts.validation.measured import COLUMNS

CANARY = str(Path(tempfile.gettempdir()) / f"smartmoe-fuzz-canary-{os.getpid()}")  # what a planted command creates

ODD: list[Any] = [
    *(0, 1, -1, 2, 7, 8, 64, 2**31, 2**31 - 1, 2**63, 2**63 - 1, -(2**63), 2**64, 10**30, 10**400, 1e308, -0.0),
    *(float("nan"), float("inf"), -float("inf"), 0.5, 1.5, True, False, None, "", " ", "x", "0", "1", "nan", "é"),
    *("\0", "a" * 300, "a\nb", "\ud800", "../../etc/passwd", f"$(touch {CANARY})", "1e400", "-", "_", "9" * 400),
    *([], {}, [0], [1, 2], [[1]], {"a": 1}, [None], ["x"], [[[[[[]]]]]], {"": {"": {}}}),
]
DEEP = ("[" * 100_000, '{"a":' * 5000, "1" * 5000, "[" * 3000 + "]" * 3000)
JSON_TRAPS = (
    *("", "null", "[]", "3", '"x"', "{}", "NaN", "\ufeff{}", '{"a": 1, "a": 2}', '{"a": 1e999}', "[1,]", "{'a': 1}"),
    *DEEP,
)
YAML_TRAPS = (
    *("!!python/object/apply:os.system ['touch {canary}']", "!!int ''", "!!int _", "!!bool maybe", "!!float ''"),
    *("!!float x", "!!timestamp 2020-99-99", "!!binary '####'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]"),
    *("!!null x", "!!str 3", "&a [*a]", "&a {x: *a}", "*nope", "1" * 5000, "-0x1F", "0o17", "1:30:00", "{", "[", "'"),
    *("? [a]\n: b", "<<: 3", "!!merge x", "2020-01-01", ".nan", "-.inf", ".inf", "1e999", "1_000", "__", "|\n  a\n"),
    *("\t x", "\x07", "\ufeff", "!<tag:yaml.org,2002:int> []", "!!map [1]", "!!seq {a: 1}", "!foo bar", "!!int 0b2"),
    *("!!int 1:2:x", "!!float 1:2:x", "[" * 3000, "{a: " * 2000, "- " * 2000, "? " * 2000, "[&a x, *a, *b]"),
)
YAML_WHOLE = (
    *("", "[]", "null", "3", "a", "- a", "{}", "%YAML 9.9\n---\na: 1", "--- a\n--- b\n", "? ? ?", "a: b: c", "\0"),
    *("&a a: *a", "a: 1\na: 2", "1: 2", "true: 1", "? {a: 1}\n: 2", "<<: [{a: 1}, {b: 2}]", "x" * 200_000),
)


@dataclass(frozen=True)
class Case:
    """One input: what was written, and how it is read."""

    path: Path
    read: Callable[[], object]


class Maker:
    """Draws cases, and writes them into a folder.

    Args:
        random: the source of every choice.
        folder: for the files of one case at a time.
    """

    def __init__(self, random: Random, folder: Path) -> None:
        self.random, self._folder = random, folder

    def clear(self) -> None:
        """Remove the files of the case before."""
        for path in self._folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def folder(self, name: str) -> Path:
        """A new folder for the files of a case."""
        path = self._folder / name
        path.mkdir()
        return path

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of a case."""
        path = self._folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.random.random() < share

    def any[One](self, choices: Sequence[One]) -> One:
        """One of them; a list or an object as a copy."""
        return copy.deepcopy(self.random.choice(choices))

    def changed_bytes(self, data: bytes) -> bytes:
        """One to sixteen edits: a byte replaced, a part removed, inserted, doubled, or the end cut off."""
        result = bytearray(data)
        for _ in range(self.any([1, 1, 2, 4, 16])):
            if not result:
                break
            at, what = self.random.randrange(len(result)), self.random.random()
            if what < 0.5:
                result[at] = self.random.randrange(256)
            elif what < 0.65:
                del result[at : at + self.random.randrange(1, 40)]
            elif what < 0.8:
                result[at:at] = self.random.randbytes(self.random.randrange(1, 9))
            elif what < 0.9:
                del result[at:]
            else:
                result[at:at] = result[: self.random.randrange(1, min(len(result), 64) + 1)]
        return bytes(result)

    def changed_value(self, value: Any) -> Any:
        """One to three edits of a JSON value: an entry replaced, removed, added, or its number changed."""
        value = copy.deepcopy(value)
        for _ in range(self.any([1, 1, 1, 2, 3])):
            path = self.random.choice(list(_paths(value)))
            if not path:
                if self.chance(0.08):
                    return self.any(ODD)
                continue
            inside = value
            for key in path[:-1]:
                inside = inside[key]
            self._change(inside, path[-1])
        return value

    def _change(self, inside: Any, key: Any) -> None:
        what, entry = self.random.random(), inside[key]
        if what < 0.55:
            inside[key] = self.any(ODD)
        elif what < 0.7:
            inside.pop(key)
        elif what < 0.8 and isinstance(inside, dict):
            inside[self.any(["extra", "", "x y", "__proto__", "nan", "1"])] = self.any(ODD)
        elif what < 0.9 and isinstance(entry, int | float) and not isinstance(entry, bool):
            inside[key] = self.any([-entry, entry + 1, str(entry), [entry], min(entry, 10**9) + 0.5])
        elif isinstance(inside, list):
            inside.insert(self.random.randrange(len(inside) + 1), self.any(ODD))

    def json_text(self, good: Any) -> str | bytes:
        """JSON with a changed value, changed bytes, or a trap."""
        what = self.random.random()
        if what < 0.7:
            return json.dumps(self.changed_value(good))
        return self.changed_bytes(json.dumps(good).encode()) if what < 0.9 else self.any(JSON_TRAPS)

    def yaml_text(self, good: Mapping[str, Any]) -> str:
        """YAML with a changed value, a trap under some key, changed bytes, or aliases of aliases."""
        what, text = self.random.random(), _dumped(good)
        if what < 0.5:
            value = self.changed_value(good)
            with contextlib.suppress(Exception):  # what YAML cannot write is written as JSON
                return _dumped(value)
            return json.dumps(value)
        lines = text.splitlines()
        at = self.random.randrange(len(lines))
        key = lines[at].partition(":")[0]
        if what < 0.8:
            lines[at] = f"{key}: {self.any(YAML_TRAPS).replace('{canary}', CANARY)}"
            return "\n".join(lines)
        if what < 0.9:
            return self.changed_bytes(text.encode()).decode("latin-1")
        if what < 0.95:
            depth = self.any([5, 8])
            bomb = ["z0: &z0 [x, x, x, x, x, x, x, x, x]"]
            bomb += [f"z{n}: &z{n} [{', '.join([f'*z{n - 1}'] * 9)}]" for n in range(1, depth)]
            return "\n".join([*bomb, f"{key.strip() or 'name'}: *z{depth - 1}\n"])
        return self.any(YAML_WHOLE)


def _dumped(value: Any) -> str:
    """YAML, by libyaml where PyYAML has it: ten times as fast."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """The path of every entry; of a list the first eight."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for at in range(min(len(value), 8)):
            yield from _paths(value[at], (*path, at))


def trace_npz(make: Maker) -> Case:
    """Our traces: damaged archives, arrays of other types, headers that declare other sizes."""
    path = make.write("t.npz", _npz_bytes(make))
    ranks = make.any([1, 2, 4])
    return Case(path, lambda: load_trace(path).groups(ranks))


def trace_megatron(make: Maker) -> Case:
    """A trace directory of Megatron."""
    folder, lines = make.folder("trace"), []
    good = {"step": 1, "block": "decoder", "layer": 0, "rank": 0, "topk": 2, "top_indices": [[0, 1], [2, 3]]}
    for step in range(make.any([1, 2])):
        for layer in range(make.any([1, 2])):
            record: Any = {**good, "step": step, "layer": layer}
            lines.append(json.dumps(make.changed_value(record) if make.chance(0.6) else record))
    if make.chance(0.1):
        values: list[Any] = [10**9, 10**15, 1.5, True, []]
        more = [json.dumps({**good, "top_indices": [value]}) for value in values]
        lines.append(make.any([*JSON_TRAPS, *more, '"step block layer rank topk top_indices"']))
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    name = make.any(["0", "0", "X", "9" * 20])
    (folder / f"router_trace_rank{name}.jsonl").write_bytes(make.changed_bytes(data) if make.chance(0.25) else data)
    if make.chance(0.2):
        (folder / "router_trace_rank1.jsonl").write_text(json.dumps({**good, "rank": 1, "step": make.any([0, 1])}))
    experts, stages = make.any([None, None, 8, 1, 10**9]), make.any([None, None, None, 1, 2, 0])
    return Case(folder, lambda: load_trace(folder, num_experts=experts, stages=stages).groups(1))


def trace_loads(make: Maker) -> Case:
    """Loads that others have recorded: matrices, records of SGLang and vLLM."""
    load = [[3, 0, 5, 8], [1, 2, 4, 9]]
    record = {"step": 1, "record_type": "eplb_load_stats", "expert_load": load, "p2l_map": [[0, 1, 2, 0], [0, 1, 2, 1]]}
    passes = [{"forward_pass_id": 4, "rank": 0, "global_physical_count": load}]
    dumps = {"records": passes, "last_physical_to_logical_map": record["p2l_map"]}
    good = make.any([load, [load, load], {"logical_count": [load]}, record, dumps, {"3": load[0], "4": load[1]}])
    what = make.random.random()
    if what < 0.5:
        path = make.write(make.any(["w.json", "w.jsonl", "w.txt"]), make.json_text(good))
    elif what < 0.7:
        path = make.write(make.any(["w.npy", "w.npz"]), _odd_array(make))
    elif what < 0.8:
        path = make.write("w.csv", make.changed_bytes(b"layer_id,expert_id,count\n3,0,24990\n3,1,39249\n4,1,1\n"))
    else:
        path = make.write("w.pt", _torch_bytes(make))
    return Case(path, lambda: load_trace(path).groups(1))


def run_file(make: Maker) -> Case:
    """A run's configuration, as the launcher reads it."""
    good = {
        "name": "q",
        "nproc": 4,
        "data": {"prefix": "data/x", "python-stdlib": True, "vocab-size": 300},
        "flags": {"model": {"num-layers": 4, "swiglu": True, "blend": ["a", "b"]}, "t": {"lr": 0.001}},
    }
    path = make.write("run.yaml", make.yaml_text(good))

    def read() -> None:
        spec = load_run_spec(path)
        if spec.data:
            corpus_flags.preparation(spec)
        for name, value in spec.flags.items():
            flag_lists.tokens_of(name, value)

    return Case(path, read)


def model_file(make: Maker) -> Case:
    """A model file."""
    path = make.write("model.yaml", make.yaml_text(make.any(_shipped("models", "mixtral-8x7b", "deepseek-v3"))))
    return Case(path, lambda: load_model_spec(path))


def cluster_file(make: Maker) -> Case:
    """A cluster file."""
    path = make.write("cluster.yaml", make.yaml_text(make.any(_shipped("clusters", "cpu", "h100-sxm"))))
    return Case(path, lambda: load_cluster_spec(path))


@cache
def _shipped(kind: Any, *names: str) -> list[Any]:
    return [yaml.safe_load((shipped_directory(kind) / f"{name}.yaml").read_text(encoding="utf-8")) for name in names]


def placement(make: Maker) -> Case:
    """The placement in a checkpoint's arguments."""
    good = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2, spare_slots=1).to_json()
    content = make.changed_value(good)
    path = make.write("placement.json", json.dumps(content))
    return Case(path, lambda: Placement.from_json(content))


def pool_file(make: Maker) -> Case:
    """A pool, alone or in a plan."""
    setting = PoolSetting(homes_interval=0, spare_slots=1, replicas="exact", overlap_degree=1)
    good = Pool(launch="x", entries=(PoolEntry(setting=setting, scenario_s={"a": 1.0}, expected_s=1.0),)).to_json()
    traps: list[str | bytes] = ['{"pool": null}', '{"pool": 3}', '{"pool": []}', b"\xff\xfe{}"]
    path = make.write("pool.json", make.any(traps) if make.chance(0.05) else make.json_text(good))
    return Case(path, lambda: [setting.key for setting in Pool.load(path, "--smartmoe-pool").settings])


def plan_file(make: Maker) -> Case:
    """The plan in a run directory, which `--parallel auto` reuses."""
    spec = ParallelSpec(gpus=4, ep=2, pp=2, micro_batch=1, global_batch=8, precision="fp32", implementation="local")
    good = {"version": 1, "best": [{"launch": spec.label(), "spec": spec.to_json()}], "pool": None}
    path = make.write("plan.json", make.json_text(good))
    named = Named(path=path, field="--run-dir", way_out="Remove it to plan again.")
    return Case(path, lambda: reuse_saved_plan(read_json(named), _plan_request()))


@cache
def _plan_request() -> PlanRequest:
    model, cluster = load_model_spec(Path("quickstart")), load_cluster_spec(Path("cpu"))
    return PlanRequest(model=model, cluster=cluster, constraints=Constraints(options=SpaceOptions()))


def corpus_metadata(make: Maker) -> Case:
    """`PREFIX.json` of a prepared corpus."""
    good = {
        **{"format": META_FORMAT, "version": 1, "tokenizer_type": "SentencePieceTokenizer"},
        **{"tokenizer_model": "c.tokenizer.model", "vocab_size": 300, "eod_id": 2, "append_eod": True},
        **{"num_documents": 3, "num_tokens": 500, "text_bytes": 2000, "unigram_entropy_nats": 4.5},
        **{"num_empty_documents": 0, "num_bad_lines": 1, "bad_lines": ["a:1: x"], "input_sha256": "00ff"},
        **{"request": {"seed": 0}, "command": ["prepare_data.py"]},
    }
    make.write("c.idx", b"")
    path = make.write("c.json", make.json_text(good))
    return Case(path, lambda: PreparedCorpus.load(path.with_suffix("")).to_json())


def measured_csv(make: Maker) -> Case:
    """The CSV file of measured runs."""
    numbers = dict(
        zip(COLUMNS, "inky 16 smartmoe 4 1024 16 1024 2 16 naive inf 1 1 16 128 4 1000".split(), strict=True)
    )
    rows = [dict(numbers) for _ in range(make.any([1, 2, 3]))]
    for row in rows:
        for _ in range(make.any([0, 1, 2])):
            row[make.random.choice(COLUMNS)] = str(
                make.any([one for one in ODD if not isinstance(one, int) or one < 10**31])
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode("utf-8", "surrogatepass")
    traps = [b"", b"\xff\xfe", b"a,b\n1", data.replace(b"\n", b"\r"), b'"' * 5 + data, data + b"x" * 200_000]
    data = make.changed_bytes(data) if make.chance(0.3) else make.any(traps) if make.chance(0.05) else data
    path = make.write("m.csv", data)
    return Case(path, lambda: validate_planner.read_runs(path))


def decisions(make: Maker) -> Case:
    """The decisions that `smartmoe simulate --replay` compares with, on a good trace."""
    settings = {"ep": 2, "spare_slots": 1, "nodes": 1, "homes_interval": 1, "replicas": "history", "warmup": 0}
    head = {"kind": "simulation", "trace": "x", **settings, "hidden": 64, "ffn": 64, "cluster": None}
    good = [head, {"iteration": 1, "kind": "homes", "group": 0, "changes": []}]
    lines = [json.dumps(make.changed_value(line) if make.chance(0.8) else line) for line in good]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = make.write("decisions.jsonl", make.changed_bytes(data) if make.chance(0.2) else data)
    trace = make.write("t.npz", _good_trace())

    def read() -> None:
        options = _simulate().parse_args(["simulate", "--trace", str(trace), "--replay", str(path)])
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            simulate.run(options)

    return Case(path, read)


@cache
def _simulate() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    simulate.add_parser(parser.add_subparsers())
    return parser


def corpus_inputs(make: Maker) -> Case:
    """What `prepare_data.py` scans: names, links, pipes, text, JSON lines, packed files."""
    folder, unpacked, reader = make.folder("in"), make.folder("unpacked"), RecordReader(json_keys=("text",))
    names = [
        "a.jsonl",
        "b.txt",
        "c.json",
        ".h",
        "a\nb.txt",
        "*.txt",
        "[x].jsonl",
        "é.txt",
        "-x.txt",
        "d e.txt",
        "a.JSONL.gz",
    ]
    for _ in range(make.any([1, 1, 2, 3])):
        name = make.any([*names, f"$(touch {Path(CANARY).name}).jsonl", "x" * 200, "bad\udcff.txt"])
        with contextlib.suppress(OSError, UnicodeError):
            (folder / name).write_bytes(_corpus_bytes(make))
    if make.chance(0.15):
        (folder / "loop").symlink_to(".")
    if make.chance(0.1):
        (folder / "dangling.txt").symlink_to("/nonexistent")
    if make.chance(0.05):
        os.mkfifo(folder / "fifo.txt")
    item = str(folder) + make.any(["", "", "/**", "/*", "/[", "/nope"])

    def read() -> None:
        spans = sources.find_spans(sources.find_inputs([item]), unpacked, reader.json_keys)
        for group in sources.group_spans(spans):
            documents.scan_group(group, reader)
            list(documents.read_documents(group, reader))

    return Case(folder, read)


def _corpus_bytes(make: Maker) -> bytes:
    what, random = make.random.random(), make.random
    if what < 0.5:
        good = {"text": "hello world " * random.randrange(1, 5), "n": 1}
        traps = ['{"text": "\\ud800"}', "\0", '{"text": NaN}', '{"text": ""}', '{"text":"' + "y" * 5000 + '"}', *DEEP]
        lines = [
            make.any(traps) if make.chance(0.4) else json.dumps(make.changed_value(good))
            for _ in range(random.randrange(1, 6))
        ]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    elif what < 0.7:
        data = random.randbytes(random.randrange(3000))
    elif what < 0.8:
        data = b"\xef\xbb\xbf" * random.randrange(3) + "héllo\r\n\r".encode() * 20
    else:
        data = b"plain text\n" * random.randrange(300)
    data = gzip.compress(data) if make.chance(0.1) else data
    return make.changed_bytes(data) if make.chance(0.2) else data


def _good_arrays() -> dict[str, Any]:
    meta = {"version": 1, "experts": 8, "top_k": 2, "source_ranks": 2, "source": "x"}
    counts = np.arange(2 * 2 * 2 * 8, dtype=np.uint32).reshape(2, 2, 2, 8)
    return {
        "counts": counts,
        "iteration": np.array([1, 2]),
        "layer": np.array([0, 1]),
        "meta": np.array(json.dumps(meta)),
    }


@cache
def _good_trace() -> bytes:
    arrays = _good_arrays()
    return _npz(**{**arrays, "counts": arrays["counts"][:, :1], "layer": arrays["layer"][:1]})


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    npy.write_array(file, np.asanyarray(array), allow_pickle=True)
    return file.getvalue()


def _header(descr: object, shape: object, data: bytes = b"") -> bytes:
    """An .npy file with any header."""
    text = (
        shape if isinstance(shape, bytes) else repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    )
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def _zip(members: Mapping[str, bytes], method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def _npz_bytes(make: Maker) -> bytes:
    what, arrays = make.random.random(), _good_arrays()
    if what < 0.35:
        return make.changed_bytes(_npz(**arrays))
    if what < 0.6:
        name = make.random.choice(list(arrays))
        arrays[name] = make.any(_odd_arrays())
        if make.chance(0.2):
            del arrays[name]
        return _npz(**arrays)
    if what < 0.85:
        members = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
        name = make.random.choice(list(members))
        members[name] = make.changed_bytes(members[name]) if make.chance(0.1) else make.any(_odd_headers())
        methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
        data = _zip(members, make.any(methods))
        return make.changed_bytes(data) if make.chance(0.3) else data
    if what < 0.9:
        others = [b"", b"PK", b"\x93NUMPY", _npy(np.zeros(3)), b"{}", pickle.dumps({"a": 1}), gzip.compress(b"x" * 100)]
        return make.any(others)
    archive = bytearray(_npz(**arrays))  # fields of the zip's directory: versions, flags, methods, sizes, offsets
    for signature, offsets in ((b"PK\x01\x02", [8, 10, 20, 24, 28, 42]), (b"PK\x03\x04", [6, 8, 18, 22, 26])):
        at, offset = archive.find(signature), make.any(offsets)
        archive[at + offset : at + offset + 2] = make.any(
            [b"\1\0", b"c\0", b"\x0c\0", b"\xff\xff", b"\0\0", b"\x08\x08"]
        )
    return bytes(archive)


def _odd_arrays() -> list[Any]:
    shape = (2, 2, 2, 8)
    return [
        *(np.array([1, "x", None], dtype=object), np.array("x"), np.zeros(shape), np.zeros(shape, np.complex64)),
        *(np.zeros(shape, np.int8) - 1, np.zeros(0), np.array(5), np.array([2, 1]), np.array([1.5, 2.5])),
        *(
            np.array([np.nan, 2.0]),
            np.array(["a", "b"]),
            np.array([1, 2], dtype="M8[s]"),
            np.zeros((2, 2, 2, 2, 8), "u1"),
        ),
        *(np.zeros(2, dtype=[("a", "i4")]), np.array([2**63, 2**64 - 1], dtype=np.uint64), np.array("[" * 3000)),
        *(np.array("{}x"), np.array(b"{}"), np.full(shape, 2**64 - 1, np.uint64), np.zeros((2, 2, 2, 0), np.uint32)),
        *(np.zeros((1, 1, 1, 1, 1, 1)), np.array([True, False]), np.zeros(shape, "S3"), np.zeros(shape, "V4")),
        *(np.zeros(shape, np.bool_), np.zeros((2, 300_000), "u1"), np.full((3, 4), np.inf), np.full((2, 4), 0.25)),
        *(np.zeros((1, 1, 1, 2**22), "u1"), np.arange(24).reshape(2, 3, 4), np.arange(8.0).reshape(2, 4) * 1e12),
    ]


def _odd_headers() -> list[bytes]:
    return [
        *(_header("<u4", (10**power, 1000, 2, 8)) for power in range(1, 12)),
        *(_header("<u4", (2, 2, 2, 8), bytes(size)) for size in (0, 1, 255, 257)),
        *(_header("|O", (3,), pickle.dumps([1, 2, 3])), _header("<u4", (-1, 2, 2, 8), bytes(256))),
        *(_header("<f99", (2,)), _header("<u4", b"{'descr': '<u4', 'fortran_order': False, 'shape': (" + b"(" * 2000)),
        *(_header("<u4", f"__import__('os').system('touch {CANARY}')".encode()), b"", b"\x93NUMPY\x09\x00"),
        *(_header("<u4", (2**62, 2**62)), _header("<u4", (2.5,)), _header("<U1000000000", ())),
        *(_header([("a", "<i4"), ("a", "<i4")], (2,)), _header("<u4", (2**40, 0, 2, 8)), _header("<U4", (2**40,))),
    ]


def _odd_array(make: Maker) -> bytes:
    """An .npy file, or an .npz file with one array."""
    data = make.any([_npy(array) for array in _odd_arrays() if array.dtype != object] + _odd_headers())
    data = _zip({"logical_count.npy": data}, zipfile.ZIP_DEFLATED) if make.chance(0.4) else data
    return make.changed_bytes(data) if make.chance(0.3) else data


class _Planted:
    """Unpickling it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def _torch_bytes(make: Maker) -> bytes:
    """A file of torch.save, written without torch: a dictionary with one tensor of a storage of 8 numbers."""
    kind, numbers = make.any(["LongStorage", "FloatStorage", "IntStorage", "BoolStorage", "x"]), 8
    shape, stride = (
        make.any([(2, 4), (2, 2, 2), (8,), (10**12,), (10**6, 10**6)]),
        make.any([None, None, (0, 0), (7, 9)]),
    )
    steps = stride or tuple(np.cumprod([1, *shape[:0:-1]]).tolist()[::-1])
    parts = [b"\x80\x02}", _unicode("logical_count"), b"ctorch._utils\n_rebuild_tensor_v2\n((", _unicode("storage")]
    parts += [f"ctorch\n{kind}\n".encode(), _unicode("0"), _unicode("cuda:0")]
    parts += [_number(make.any([numbers, numbers, 10**9])), b"tQ", _number(make.any([0, 0, 3]))]
    parts += [b"(", *map(_number, shape), b"t(", *map(_number, steps), b"t\x89}tRs."]
    pickled = b"".join(parts)
    twice = b"".join(b"q" + bytes([at]) + b"h" + bytes([at]) + b"\x86" for at in range(45))
    traps = [
        pickle.dumps(_Planted()),
        pickle.dumps({"logical_count": _Planted()}),
        b"\x80\x02})" + twice + b"K\x01s.",
        b"",
    ]
    pickled = make.any(traps) if make.chance(0.2) else make.changed_bytes(pickled) if make.chance(0.3) else pickled
    width = {"LongStorage": 8, "FloatStorage": 4, "IntStorage": 4}.get(kind, 1)
    data = _zip({"w/data.pkl": pickled, "w/data/0": bytes(range(numbers)) * width}, zipfile.ZIP_STORED)
    return make.changed_bytes(data) if make.chance(0.2) else data


def _unicode(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _number(value: int) -> bytes:
    return b"I" + str(value).encode() + b"\n"


READERS: dict[str, Callable[[Maker], Case]] = {
    "trace-npz": trace_npz,
    "trace-megatron": trace_megatron,
    "trace-loads": trace_loads,
    "run": run_file,
    "model": model_file,
    "cluster": cluster_file,
    "placement": placement,
    "pool": pool_file,
    "plan": plan_file,
    "corpus-metadata": corpus_metadata,
    "measured-csv": measured_csv,
    "decisions": decisions,
    "corpus-inputs": corpus_inputs,
}
