"""Optimizer state of several padded gradient buckets: saved right, resumed exactly, and refused where it is damaged."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_smartmoe.checkpoint.verify import verify
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR
from tests.dist.test_parallel_equality import largest_difference
from tests.support.ranks import run_ranks
from tests.support.training import TINY_MODEL, TINY_TRAINING, losses

pytestmark = pytest.mark.dist

# One layer, and buckets of about one parameter each: those of norms (80 or 96 elements) are padded to 128 x DP.
SIZES = (
    "--num-layers 1 --num-experts 4 --seq-length 32 --max-position-embeddings 32 "
    "--global-batch-size 6 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce "
    "--ddp-bucket-size 1000"
).split()
SAVED_AT, ITERATIONS = 3, 5
UNTIED = "--untie-embeddings-and-output-weights"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of `ITERATIONS` that saved at `SAVED_AT`, as if killed later."""

    losses: list[float]
    checkpoint: Path


class Trainer:
    """Trains with the flags above, on a number of ranks, with the repair of Megatron's fault or without."""

    def __init__(self, root: Path, data_flags: list[str]) -> None:
        self._root, self._data_flags, self._started = root, data_flags, 0

    def start(self, dp: int, *flags: str, repaired: bool = True) -> tuple[Path, list[_Ended]]:
        """Run to the end; returns the run directory and how each rank ended."""
        self._started += 1
        run_dir = self._root / str(self._started)
        model = [flag for flag in TINY_MODEL if flag != UNTIED]
        argv = [*model, *TINY_TRAINING, *SIZES, *self._data_flags, "--train-iters", str(ITERATIONS), *flags]
        argv += ["--smartmoe-run-dir", str(run_dir)]
        return run_dir, run_ranks(_train, dp, argv, repaired, log_dir=run_dir / "ranks")

    def save(self, dp: int, *flags: str, repaired: bool = True) -> Run:
        """A whole run, and its checkpoint of the middle."""
        checkpoint = self._root / f"checkpoint {self._started}"
        save = ["--save", str(checkpoint), "--save-interval", str(SAVED_AT)]
        run_dir, ended = self.start(dp, *flags, *save, repaired=repaired)
        assert [rank.status for rank in ended] == [0] * dp
        assert not repaired or min(rank.padding for rank in ended) > 0, "no padding: there would be nothing to repair"
        (checkpoint / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
        return Run(losses=losses(run_dir), checkpoint=checkpoint)

    def resume(self, run: Run, dp: int, *flags: str) -> list[float]:
        """The losses after loading."""
        run_dir, ended = self.start(dp, *flags, "--load", str(run.checkpoint))
        assert [rank.status for rank in ended] == [0] * dp
        return losses(run_dir)


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """How a rank ended: its exit status, and the most elements of padding in front of a parameter that it saved."""

    status: int
    padding: int


def _train(argv: list[str], repaired: bool) -> _Ended:
    """In a rank."""
    from megatron_smartmoe.adapter.pretrain import main
    from megatron_smartmoe.adapter.repairs import bucket_padding

    shifts, without_padding = [0], bucket_padding._without_padding

    def spy(buffer: Any) -> Any:
        positions = without_padding(buffer)
        shifts.extend(buffer.param_index_map[parameter][0] - positions[parameter][0] for parameter in positions)
        return positions

    verdict = bucket_padding.verdict if repaired else mock.Mock(return_value=bucket_padding.Verdict.RIGHT)
    status = 0
    with mock.patch.multiple(bucket_padding, verdict=verdict, _without_padding=spy):
        try:
            main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return _Ended(status=status, padding=max(shifts))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("buckets"), data_flags)


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Run:
    return trainer.save(1, "--bf16", "--hidden-size", "80")


@pytest.fixture(scope="module")
def damaged(trainer: Trainer) -> Run:
    return trainer.save(1, "--bf16", "--hidden-size", "80", repaired=False)


def test_resumed_on_one_rank_is_bit_equal(trainer: Trainer, whole: Run) -> None:
    """Tied embeddings, weights in bf16, main weights in fp32."""
    assert trainer.resume(whole, 1, "--bf16", "--hidden-size", "80") == whole.losses[SAVED_AT:]


def test_resumed_on_three_ranks_is_bit_equal(trainer: Trainer) -> None:
    flags = ("--bf16", "--hidden-size", "80", "--overlap-param-gather", UNTIED)
    run = trainer.save(3, *flags)
    assert trainer.resume(run, 3, *flags) == run.losses[SAVED_AT:]


def test_resumed_on_two_ranks_is_bit_equal_and_on_three_the_same_to_rounding(trainer: Trainer) -> None:
    """The parameters are fp32, so that ranks that add up gradients in another order make no larger difference."""
    flags = ("--hidden-size", "96", UNTIED)
    run = trainer.save(2, *flags)
    assert trainer.resume(run, 2, *flags) == run.losses[SAVED_AT:]
    assert largest_difference(trainer.resume(run, 3, *flags), run.losses[SAVED_AT:]) < 1e-6


def test_a_whole_checkpoint_is_accepted_in_another_form(trainer: Trainer, whole: Run) -> None:
    """In fp32, where bf16 weights are the rounded main weights, and with a vocabulary that is padded further."""
    flags = ("--hidden-size", "80", "--make-vocab-size-divisible-by", "192")
    assert len(trainer.resume(whole, 1, *flags)) == ITERATIONS - SAVED_AT


def test_the_fault_is_there_without_the_repair(whole: Run, damaged: Run) -> None:
    """Training is the same, and so are the weights on disk."""
    assert damaged.losses == whole.losses


@pytest.mark.parametrize(("dp", "precision"), [(1, ["--bf16"]), (2, [])], ids=["bf16", "fp32"])
def test_a_damaged_checkpoint_is_refused(trainer: Trainer, damaged: Run, dp: int, precision: list[str]) -> None:
    """By all ranks alike. In fp32 the parameters are their own main weights, and loading would overwrite them."""
    run_dir, ended = trainer.start(dp, "--hidden-size", "80", *precision, "--load", str(damaged.checkpoint))
    assert [rank.status for rank in ended] == [EXIT_CONFIG_ERROR] * dp
    assert not (run_dir / "metrics.jsonl").exists()
    error = (
        f"error: --load = '{damaged.checkpoint}': the optimizer state of iteration {SAVED_AT} is damaged: the main "
        "weights of decoder.layers.0.self_attention.linear_proj.weight on rank 0 do not round to its saved weights. "
        "megatron-core up to 0.19.2 saves it like that from several gradient buckets "
        "(--dist-ckpt-optim-fully-reshardable with --overlap-grad-reduce); the saved weights themselves are right. "
        "Pass --no-load-optim to resume from the weights with new main weights and moments, or --ckpt-step N for an "
        "iteration that was saved without one of these flags."
    )
    logs = [(run_dir / "ranks" / f"rank{rank}.log").read_text().splitlines() for rank in range(dp)]
    assert [log.count(error) for log in logs] == [1] + [0] * (dp - 1)


def test_a_damaged_checkpoint_is_found_without_loading_it(whole: Run, damaged: Run) -> None:
    """By `smartmoe checkpoint verify`: parameters behind a padded bucket, and the zeros at the end of the last one.

    Digests of what was in memory at the save find them, and without a manifest the numbers themselves do.
    """
    assert verify(whole.checkpoint / f"iter_{SAVED_AT:07d}").findings == ()
    findings = [str(found) for found in verify(damaged.checkpoint / f"iter_{SAVED_AT:07d}").findings]
    other = [found for found in findings if "has other numbers than were in the ranks' memory" in found]
    assert len(other) == 9  # main weights and both moments of three parameters
    findings = [found for found in findings if ", main weight does not round to the weights: " in found]
    assert len(findings) == 3
    assert findings[0].startswith("decoder.layers.0.self_attention.linear_proj.weight")
    assert findings[-1].startswith("embedding.word_embeddings.weight")
    assert findings[-1].endswith("and ends in zeros (main weights 64, first moments 64, second moments 64)")


def test_a_damaged_checkpoint_has_the_right_weights(trainer: Trainer, damaged: Run) -> None:
    weights_only = trainer.resume(damaged, 1, "--bf16", "--hidden-size", "80", "--no-load-optim", "--no-load-rng")
    assert weights_only[0] == damaged.losses[SAVED_AT]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a rank finds out without training."""
    facts: dict[str, Any] = run_ranks(_facts, 1, log_dir=tmp_path_factory.mktemp("facts"))[0]
    return facts


def test_the_repair_is_for_what_it_knows(facts: dict[str, Any]) -> None:
    assert facts["installed"] in {"FAULTY", "RIGHT"}
    assert facts["repaired"] == facts["always right"] == "RIGHT"
    assert facts["missing"] == facts["raises"] == facts["other values"] == "UNKNOWN"
    assert facts["refused"] == (
        "--dist-ckpt-optim-fully-reshardable = True: with --use-distributed-optimizer, this Megatron may save wrong "
        "main weights and moments of all parameters behind the first gradient bucket, in a way that is not known here. "
        "Remove the flag, or use megatron-core 0.19.2 (pip install megatron-core==0.19.2)."
    )
    assert facts["without the flag"] is None


def test_parameters_follow_each_other_without_the_padding(facts: dict[str, Any]) -> None:
    assert facts["positions"] == {(width, dp): True for width in (80, 96) for dp in (1, 2, 3)}


def test_what_rounds_to_the_weights(facts: dict[str, Any]) -> None:
    """Also when the run was saved in another type than it is resumed in; nan, as after an overflow, is no damage."""
    types = ("float32", "bfloat16", "float16")
    assert facts["equal"] == {(saved, here): True for saved in types for here in types}
    assert facts["shifted"] == dict.fromkeys(types, False)
    assert facts["nan"]


def test_what_cannot_be_compared_is_said(facts: dict[str, Any]) -> None:
    assert facts["comparable"] == {
        "plain": True,
        "fp8": False,
        "qk-clip": False,
        "precision-aware": True,
        "precision-aware, 16-bit main weights": False,
        "precision-aware, remainders": False,
    }
    note = (
        "smartmoe: checkpoint of iteration 7: main weights and moments of 3 parameter shards were not compared with "
        "the weights, which fp8 weights, --use-precision-aware-optimizer and --qk-clip do not allow. If megatron-core "
        "up to 0.19.2 saved them without smartmoe, pass --no-load-optim to be safe.\n"
    )
    assert facts["note"] == {"several buckets": note, "tied embeddings": note, "one bucket": ""}


def _facts() -> dict[str, Any]:
    """In a rank."""
    from megatron_smartmoe.adapter import cpu

    cpu.install()
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_smartmoe.adapter.repairs import bucket_padding

    installed = getattr(DistributedOptimizer, bucket_padding.METHOD)

    def saving(*values: list[float]) -> Callable[..., Any]:
        return lambda optimizer, model, **_: {i: {"param": _tensor(value)} for i, value in enumerate(values)}

    facts: dict[str, Any] = {
        "installed": bucket_padding.verdict(installed).name,
        "repaired": bucket_padding.verdict(bucket_padding.repair(installed)).name,
        "always right": bucket_padding.verdict(saving([0, 1, 2], [3, 4])).name,
        "missing": bucket_padding.verdict(None).name,
        "raises": bucket_padding.verdict(lambda optimizer, model: {}).name,
        "other values": bucket_padding.verdict(saving([0, 1, 2], [4, 0])).name,  # as faulty, and the repair is no help
        "positions": {(width, dp): _positions_follow(width, dp) for width in (80, 96) for dp in (1, 2, 3)},
    }
    with mock.patch.object(DistributedOptimizer, bucket_padding.METHOD, saving([0, 0, 0], [0, 0])):
        facts["refused"], facts["without the flag"] = _said(reshardable=True), _said(reshardable=False)
    return facts | _comparisons() | _notes()


def _comparisons() -> dict[str, Any]:
    import torch

    from megatron_smartmoe.adapter.repairs.main_weights import ROUNDINGS, _differ, _is_comparable

    main = torch.randn(100, generator=torch.Generator().manual_seed(1))
    nan = torch.where(main > 0, torch.nan, main)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in ROUNDINGS}
    plain = {"bf16": True, "use_precision_aware_optimizer": False, "main_params_dtype": torch.float32}
    aware = plain | {"use_precision_aware_optimizer": True, "store_param_remainders": False}

    def comparable(weight: torch.Tensor, config: dict[str, Any], **model: bool) -> bool:
        chunk = SimpleNamespace(config=SimpleNamespace(**model))
        optimizer = SimpleNamespace(config=SimpleNamespace(**config), model_chunks=[chunk])
        return _is_comparable(optimizer, torch.nn.Parameter(weight, requires_grad=weight.is_floating_point()))

    return {
        "equal": {
            (names[saved], names[here]): not _differ(main, main.to(saved).to(here))
            for saved in ROUNDINGS
            for here in ROUNDINGS
        },
        "shifted": {names[here]: not _differ(main.roll(1), main.to(here)) for here in ROUNDINGS},
        "nan": not _differ(nan, nan.to(torch.bfloat16)),
        "comparable": {
            "plain": comparable(main.bfloat16(), plain),
            "fp8": comparable(main.to(torch.uint8), plain),
            "qk-clip": comparable(main.bfloat16(), plain, qk_clip=True),
            "precision-aware": comparable(main.bfloat16(), aware),
            "precision-aware, 16-bit main weights": comparable(
                main.bfloat16(), aware | {"main_params_dtype": torch.float16}
            ),
            "precision-aware, remainders": comparable(main.bfloat16(), aware | {"store_param_remainders": True}),
        },
    }


def _notes() -> dict[str, Any]:
    """What is printed after a load in which shards were skipped, by how the checkpoint was saved."""
    import torch

    from megatron_smartmoe.adapter.flags import checkpoint_check
    from megatron_smartmoe.adapter.repairs.main_weights import MainWeightsCheck

    torch.distributed.init_process_group("gloo")
    check, notes = MainWeightsCheck(), {}

    def load() -> tuple[int, int]:
        check.skipped = 3
        return 7, 0

    for name, overlap, untied in (
        ("several buckets", True, True),
        ("tied embeddings", False, False),
        ("one bucket", False, True),
    ):
        saved = argparse.Namespace(
            overlap_grad_reduce=overlap, untie_embeddings_and_output_weights=untied, pipeline_model_parallel_size=2
        )
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            mock.patch("megatron.training.get_args", return_value=argparse.Namespace(load="x", ckpt_step=None)),
            mock.patch.multiple(
                checkpoint_check,
                latest_checkpoint=mock.Mock(return_value=Path("x")),
                saved_arguments=mock.Mock(return_value=saved),
            ),
        ):
            assert check.around_load_checkpoint(load)() == (7, 0)
        notes[name] = printed.getvalue()
    torch.distributed.destroy_process_group()
    return {"note": notes}


def _tensor(values: list[float]) -> Any:
    import torch

    return SimpleNamespace(data=torch.tensor(values))


def _said(*, reshardable: bool) -> str | None:
    from megatron_smartmoe.adapter.repairs.bucket_padding import check_bucket_padding
    from megatron_smartmoe.errors import ConfigError

    args = argparse.Namespace(
        ckpt_format="torch_dist",
        no_save_optim=False,
        use_distributed_optimizer=True,
        dist_ckpt_optim_fully_reshardable=reshardable,
    )
    try:
        check_bucket_padding(args)
    except ConfigError as error:
        return str(error)
    return None


def _positions_follow(width: int, dp: int) -> bool:
    """Lay out parameters as Megatron does: is each where it is in its bucket, behind the buckets before it?"""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_smartmoe.adapter.repairs.bucket_padding import _without_padding

    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (width, 3 * width, width, width * 8, 7, width)]
    config = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    layout = DistributedOptimizer._compute_per_buffer_param_layout(parameters, 2 * width, dp, config)
    buckets = [
        SimpleNamespace(grad_data=torch.zeros(stop - start), numel_unpadded=unpadded)
        for (start, stop), unpadded in zip(layout.bucket_indices, layout.per_bucket_numel_unpadded, strict=True)
    ]
    positions = _without_padding(SimpleNamespace(param_index_map=layout.param_index_map, buckets=buckets))
    moved = []
    for parameter, (start, stop, bucket) in layout.param_index_map.items():
        front = sum(layout.per_bucket_numel_unpadded[:bucket])
        in_bucket = start - layout.bucket_indices[bucket][0]
        if positions[parameter] != (front + in_bucket, front + in_bucket + stop - start, bucket):
            return False
        moved.append(start - positions[parameter][0])
    return max(moved) > 0 and len(buckets) > 2
