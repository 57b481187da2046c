"""The CPU facade: loaded only where it must be, and exact where it stands in for CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_a_gpu_run_loads_nothing_of_it() -> None:
    """Where torch sees a GPU, the choice is CUDA and no module of the facade is imported."""
    done = python(
        "import sys, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "before = torch.empty, torch.Tensor.to, torch.distributed.barrier, torch.compile\n"
        "from megatron_smartmoe.adapter.pretrain import choose_device\n"
        "assert choose_device('auto') is False\n"
        "assert not [name for name in sys.modules if name.startswith('megatron_smartmoe.adapter.cpu')]\n"
        "assert before == (torch.empty, torch.Tensor.to, torch.distributed.barrier, torch.compile)\n"
    )
    assert done.returncode == 0, done.stderr


def test_it_refuses_a_process_that_sees_a_gpu() -> None:
    done = python(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from megatron_smartmoe.adapter import cpu\n"
        "cpu.install()\n"
    )
    assert "CompatError: The CPU facade is for machines without a GPU, and this process sees one." in done.stderr


def test_it_refuses_to_come_after_megatron() -> None:
    done = python(
        "import sys, types\n"
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "from megatron_smartmoe.adapter import cpu\n"
        "cpu.install()\n"
    )
    assert "CompatError: The CPU facade must be installed before megatron is imported" in done.stderr


def test_asking_for_a_gpu_that_is_not_there_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = python("from megatron_smartmoe.adapter.pretrain import choose_device\nchoose_device('cuda')\n")
    assert "CompatError: --smartmoe-device cuda: torch sees no CUDA device here." in done.stderr


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_gpus_that_torch_cannot_use_are_an_error_and_no_cpu_run(asked: str) -> None:
    """The CUDA 13 build of torch with a driver for CUDA 12.4: NVML sees eight GPUs, CUDA none."""
    done = python(
        "import torch\n"
        "from megatron_smartmoe.adapter import gpus\n"
        "from megatron_smartmoe.runtime.driver import Driver\n"
        "torch.cuda.is_available = lambda: False\n"
        "torch.version.cuda, torch.__version__ = '13.0', '2.11.0+cu130'\n"
        "gpus.find_driver = lambda: Driver(num_gpus=8, version='550.54.15', cuda=(12, 4))\n"
        "import os; os.environ.pop('CUDA_VISIBLE_DEVICES', None)\n"
        "from megatron_smartmoe.adapter.pretrain import choose_device\n"
        f"choose_device({asked!r})\n"
    )
    assert (
        f"CompatError: --smartmoe-device {asked}: this host has 8 GPUs (driver 550.54.15, for CUDA 12.4), and torch "
        "2.11.0+cu130, built for CUDA 13.0, can use none. The driver serves CUDA 12.4: update it to 580 or newer, or "
        "install a build of torch for CUDA 12. scripts/setup.sh takes another torch (SMARTMOE_TORCH); "
        "--smartmoe-device cpu trains without the GPUs.\n"
    ) in done.stderr


def test_an_older_megatron_is_refused_by_this_projects_own_entry() -> None:
    """What 0.18 lacks is taken away here; its own scripts train with it all the same (tests/releases)."""
    done = python(
        "import sys\n"
        "from megatron_smartmoe.adapter.pretrain import choose_device, main\n"
        "choose_device('cpu')\n"
        "import megatron.core\n"
        "from megatron.training import argument_utils\n"
        "del argument_utils.gpt_config_from_args\n"
        "megatron.core.__version__ = '0.18.2'\n"
        "main(['--num-layers', '2'])\n"
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: this project's own entry needs megatron-core 0.19 or later, and 0.18.2 is what is imported. Train with "
        "Megatron's own script and --smartmoe (docs/integrate.md), or install a later release: "
        "pip install 'megatron-core>=0.19'"
    )


def test_packages_for_gpus_are_not_used_on_cpu_ranks(tmp_path: Path) -> None:
    """In NVIDIA's containers both are installed, and Megatron takes what it finds."""
    for name in ("transformer_engine", "transformer_engine/pytorch", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "transformer_engine" / "pytorch" / "fp8.py").write_text(
        "FP8GlobalStateManager = fp8_autocast = fp8_model_init = None\n"
    )
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from megatron_smartmoe.adapter.pretrain import choose_device, with_defaults\n"
        "choose_device('cpu')\n"
        "flags = with_defaults([], cpu=True, say=True)\n"
        "assert flags[flags.index('--transformer-impl') + 1] == 'local'\n"
        "assert '--no-gradient-accumulation-fusion' in flags\n"
        "import megatron.core.extensions.transformer_engine as te, megatron.core.optimizer as optimizer\n"
        "assert not te.HAVE_TE and optimizer.USING_PYTORCH_OPTIMIZER\n"
    )
    assert done.returncode == 0, done.stderr


def _tensors() -> None:
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=0).device.type == "cpu"
    assert torch.ones(2, pin_memory=True).tolist() == [1.0, 1.0]
    x = torch.arange(3)
    assert x.cuda() is x
    assert x.to("cuda") is x
    assert x.to("cuda", torch.float32).dtype == torch.float32
    assert x.to(device="cuda:0") is x
    assert x.to(torch.float64).dtype == torch.float64
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert torch.empty(2).type() == "torch.FloatTensor"  # the disguise is for callers inside Megatron


def _what_megatron_sees() -> None:
    from megatron.core.jit import jit_fuser

    namespace = {"__name__": "megatron.core.made_for_this_test"}
    exec("def type_of(tensor):\n    return tensor.type()", namespace)
    assert namespace["type_of"](torch.empty(2)) == "torch.cuda.FloatTensor"  # type: ignore[operator]
    assert torch.cuda.is_available() is False
    current: object = torch.cuda.current_device()
    assert current == torch.device("cpu")

    def double(x: int) -> int:
        return 2 * x

    exec("import torch\ndef compiled(f):\n    return torch.compile(f)", namespace)
    assert namespace["compiled"](double) is double  # type: ignore[operator]
    assert jit_fuser(double)(2) == 4
    assert torch.compile(double) is not double  # everybody else compiles


def _streams_and_events() -> None:
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        first.record()
        total = sum(range(200_000))
        second.record()
    side.wait_stream(torch.cuda.current_stream())
    assert total
    assert second.query()
    assert 0 < first.elapsed_time(second) < 10_000  # milliseconds


def _random_state() -> None:
    """Megatron's tracker draws from its own stream inside a fork and leaves the other as it was."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(7)
    expected = torch.rand(4)
    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 11)
    torch.manual_seed(7)
    with tracker.fork("experts"):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    torch.cuda.manual_seed(11)
    assert torch.equal(torch.rand(4), inside)


def _groups() -> None:
    for check in (_tensors, _what_megatron_sees, _streams_and_events, _random_state):
        check()


@pytest.mark.fast
def test_each_group_answers_exactly(tmp_path: Path) -> None:
    run_ranks(_groups, 1, log_dir=tmp_path)


def _collectives() -> dict[str, object]:
    import torch.distributed as dist

    dist.init_process_group("nccl", device_id=torch.device("cuda:0"))  # as Megatron would
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size)), backend="nccl")
    dist.barrier(group=group, device_ids=[rank])
    mine = torch.arange(rank + 2.0) + 10 * rank
    gathered = [torch.empty(r + 2) for r in range(size)]
    dist.all_gather(gathered, mine, group=group)
    pieces = [torch.full((r + 1,), float(rank + 1)) for r in range(size)]
    reduced = torch.empty(rank + 1)
    dist.reduce_scatter(reduced, pieces, group=group)
    received = torch.empty(3 * size)
    splits = torch.tensor([3] * size)
    dist.all_to_all_single(received, torch.arange(3.0 * size) + 100 * rank, splits, splits, group=group)
    backend = dist.get_backend()
    dist.destroy_process_group()
    lists = {"reduced": reduced.tolist(), "received": received.tolist()}  # the pytest process has no facade
    return {"backend": backend, "gathered": [piece.tolist() for piece in gathered], **lists}


def test_collectives_keep_their_meaning_on_gloo(tmp_path: Path) -> None:
    """NCCL's name, device ids, unequal shapes and split sizes as tensors."""
    results = run_ranks(_collectives, 3, log_dir=tmp_path)
    for rank, result in enumerate(results):
        assert result["backend"] == "gloo"
        assert result["gathered"] == [[0, 1], [10, 11, 12], [20, 21, 22, 23]]
        assert result["reduced"] == [1 + 2 + 3] * (rank + 1)
        assert result["received"] == [100 * source + 3 * rank + i for source in range(3) for i in range(3)]


def _fail_on_rank_1() -> None:
    import os

    if os.environ["RANK"] == "1":
        raise ValueError("deliberate")
    import time

    time.sleep(60)


def test_a_failing_rank_fails_the_test_at_once(tmp_path: Path) -> None:
    """The helper itself: a failure on one rank is reported with its log, and the others are ended."""
    with pytest.raises(AssertionError, match="rank1 failed") as failure:
        run_ranks(_fail_on_rank_1, 2, log_dir=tmp_path, timeout_s=30)
    assert "ValueError: deliberate" in str(failure.value)
