"""How much memory and time a conversion takes: a synthetic model of random numbers, against a plain copy of its bytes.

    .venv/bin/python scripts/bench_convert.py --gb 4 --folder /tmp/bench-convert

Memory is what the process has for itself (RssAnon), sampled every 20 ms: pages of files in the page cache are not
counted. The copy is made before and after each conversion, whose speed is compared with the mean of the two.
Three times the size is needed on the disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.convert import hf_files
from megatron_smartmoe.convert.families import table_of
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.convert.hf_tensors import INDEX_FILE
from megatron_smartmoe.convert.output import write_files

# A slice of Qwen3-30B-A3B: its layers, and as many of them as fill the size.
_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LAYER_BYTES, _REST_BYTES = 1.25e9, 1.24e9


def main() -> None:
    """Make the model, convert it there and back, and copy its bytes in between."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the model (default: 4)")
    parser.add_argument("--folder", type=Path, required=True, help="a folder for it, removed afterwards")
    parser.add_argument("--workers", type=int, default=4, help="see smartmoe convert --workers (default: 4)")
    options = parser.parse_args()
    source, folder = options.folder / "hf", options.folder
    shutil.rmtree(folder, ignore_errors=True)
    size = _make(source, max(1, round((options.gb * 1e9 - _REST_BYTES) / _LAYER_BYTES)))
    print(f"model: {size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files")
    before = _copy(source, folder / "copy")
    print(f"plain copy, with fsync: {before:.1f} s, {size / before / 1e9:.2f} GB/s", flush=True)
    for name, read, out, target in (
        ("to megatron", source, folder / "megatron", "megatron"),
        ("to hf", folder / "megatron", folder / "back", "hf"),
    ):
        seconds, peak = _convert([str(read), str(out), "--to", target, "--workers", str(options.workers)])
        if target == "hf":
            shutil.rmtree(out)
        after = _copy(source, folder / "copy")
        share = (before + after) / 2 / seconds
        print(f"{name}: {seconds:.1f} s, {share:.2f} of the copy's speed, peak memory {peak / 1e6:.0f} MB")
        print(f"plain copy, with fsync: {after:.1f} s, {size / after / 1e9:.2f} GB/s", flush=True)
        before = after
    shutil.rmtree(folder)


def _make(folder: Path, layers: int) -> int:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": layers}))
    table = table_of(HFConfig.of(folder))
    block = np.random.default_rng(1).integers(0x3C00, 0x3D00, 2**22, dtype=np.uint16)

    def slices(count: int) -> Iterator[NDArray[Any]]:
        for start in range(0, count, block.size):
            yield block[: min(block.size, count - start)]

    tensors = [
        hf_files.StoredTensorOut(
            name=name, shape=shape, dtype="bfloat16", slices=functools.partial(slices, math.prod(shape))
        )
        for name, shape in table.shapes.items()
    ]
    hf_files.SHARD_BYTES = 10**9
    files, index = hf_files.files_of(tensors)
    (folder / ".convert").mkdir()
    write_files(folder, files, 2)
    shutil.rmtree(folder / ".convert")
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            shutil.copyfileobj(read, write, 2**24)
            write.flush()
            os.fsync(write.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def _convert(arguments: list[str]) -> tuple[float, int]:
    """Seconds, and the largest memory in bytes."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_smartmoe.convert", *arguments], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        except OSError:
            found = None
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - started, peak


if __name__ == "__main__":
    main()
