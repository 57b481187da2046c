"""Models that come from Hugging Face compute in Megatron what they compute in transformers, at any parallelism."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_smartmoe.checkpoint.digest import WEIGHT
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.checkpoint.torch_dist import read_common
from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.families import table_of
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.flags import as_flags
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.convert.launches import launch_of
from megatron_smartmoe.convert.options import ConvertOptions
from megatron_smartmoe.convert.reduce import ReduceRecipe
from megatron_smartmoe.convert.upcycle import Recipe, upcycled_table
from megatron_smartmoe.convert.verify import verify
from megatron_smartmoe.spec.routing_trace import RoutingTrace
from tests.support import hf_models
from tests.support.ranks import run_ranks
from tests.support.tokenizers import write_huggingface
from tests.support.training import TINY_TRAINING, losses, train

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5  # of the largest logit: float32, sums in another order
TOKENS = torch.randint(0, 250, (2, 48), generator=torch.Generator().manual_seed(1))
EP2_PP2 = "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2".split()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The folders of a family's model, Hugging Face's and Megatron's, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source = hf_models.make(family, folder / "hf")
            convert(ConvertOptions(source=source, out=folder / "megatron", target="megatron"))
            made[family] = source, folder / "megatron"
        return made[family]

    return of


def probed(source: Path, checkpoint: Path, num_ranks: int, folder: Path, *flags: str) -> dict[str, Any]:
    """What the model computes on that many ranks: logits, and by layer its outputs and its routers' choices."""
    return probed_table(table_of(HFConfig.of(source)), checkpoint, num_ranks, folder, *flags)


def probed_table(table: ModelTable, checkpoint: Path, num_ranks: int, folder: Path, *flags: str) -> dict[str, Any]:
    """The same for a table."""
    argv = [*as_flags(table.flags), "--padded-vocab-size", "256", "--vocab-size", "249"]
    folder.mkdir(parents=True)
    run_ranks(_probe, num_ranks, [*argv, "--load", str(checkpoint), *flags], folder, log_dir=folder / "ranks")
    found: dict[str, Any] = {"layers": {}, "routers": {}}
    for path in folder.glob("rank*.pt"):
        part = torch.load(path)
        found |= {key: value for key, value in part.items() if key == "logits"}
        for key in ("layers", "routers"):
            found[key] |= part[key]
    return found


def _probe(argv: list[str], folder: Path) -> None:
    from megatron_smartmoe.adapter.probe import probe

    probe(argv, TOKENS.tolist(), folder)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of logits, relative to the largest logit."""
    return float((found[..., : wanted.shape[-1]] - wanted).abs().max() / wanted.abs().max())


# The others take another way in what every run of the suite does.
SELDOM = ("deepseek_v3", "llama", "qwen2", "qwen3")


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[pytest.mark.slow] if family in SELDOM else []) for family in hf_models.MODELS],
)
def test_logits_on_one_rank(family: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    source, checkpoint = models(family)
    found = probed(source, checkpoint, 1, tmp_path / "probe")
    assert difference(found["logits"], hf_models.logits(source, TOKENS)) < TOLERANCE


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_logits_through_expert_and_pipeline_parallelism(
    family: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, checkpoint = models(family)
    smartmoe = ["--smartmoe"] if family == "mixtral" else []
    found = probed(source, checkpoint, 4, tmp_path / "probe", *EP2_PP2, *smartmoe)
    assert difference(found["logits"], hf_models.logits(source, TOKENS)) < TOLERANCE
    assert sorted(found["layers"]) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "num_ranks", "flags"),
    [
        ("qwen3_moe", 4, "--expert-model-parallel-size 4"),
        ("qwen2_moe", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("mixtral", 2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
        ("olmoe", 4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        ("deepseek_v2", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_logits_at_other_parallelism(
    family: str, num_ranks: int, flags: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, checkpoint = models(family)
    found = probed(source, checkpoint, num_ranks, tmp_path / "probe", *flags.split())
    assert difference(found["logits"], hf_models.logits(source, TOKENS)) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "num_ranks", "sizes", "flags"),
    [
        ("qwen2_moe", 2, {"tensor_ranks": 2}, "--tensor-model-parallel-size 2 --sequence-parallel"),
        pytest.param("deepseek_v3", 4, {"stages": 2, "expert_ranks": 2}, " ".join(EP2_PP2), marks=pytest.mark.slow),
        pytest.param(
            "deepseek_v2",
            2,
            {"tensor_ranks": 2},
            "--tensor-model-parallel-size 2 --sequence-parallel",
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", 2, {"stages": 2}, "--pipeline-model-parallel-size 2", marks=pytest.mark.slow),
    ],
)
def test_logits_of_the_older_format(
    family: str, num_ranks: int, sizes: dict[str, Any], flags: str, tmp_path: Path
) -> None:
    """Megatron loads every name of its modules: what is missing would be left as it was initialised."""
    source = hf_models.make(family, tmp_path / "hf")
    convert(ConvertOptions(source=source, out=tmp_path / "ranks", target="torch", **sizes))
    found = probed(source, tmp_path / "ranks", num_ranks, tmp_path / "probe", *flags.split())
    assert difference(found["logits"], hf_models.logits(source, TOKENS)) < TOLERANCE
    assert not any("load_return" in path.read_text() for path in (tmp_path / "probe" / "ranks").glob("*.log"))


def test_the_wrong_order_of_softmax_and_top_k_shows(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """What tells a right conversion from a wrong one: the flag that another bridge sets for Mixtral."""
    source, checkpoint = models("mixtral")
    found = probed(source, checkpoint, 1, tmp_path / "probe", "--moe-router-pre-softmax")
    assert difference(found["logits"], hf_models.logits(source, TOKENS)) > 0.05


def test_a_converted_model_trains_and_is_exported(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Five steps from the arguments in the checkpoint, a save in the middle of a balanced run, and back."""
    source, checkpoint = models("qwen3_moe")
    run = tmp_path / "run"
    argv = [*TINY_TRAINING, *as_flags(table_of(HFConfig.of(source)).flags), "--mock-data", "--tokenizer-type"]
    argv += ["NullTokenizer", "--vocab-size", "249", "--padded-vocab-size", "256", "--seq-length", "64"]
    argv += ["--pretrained-checkpoint", str(checkpoint), "--load", f"{run}/checkpoints", "--save", f"{run}/checkpoints"]
    argv += ["--save-interval", "5", "--train-iters", "5", "--expert-model-parallel-size", "2", "--smartmoe"]
    argv += ["--smartmoe-homes", "shuffle", "--smartmoe-homes-interval", "2", "--smartmoe-run-dir", str(run)]
    run_ranks(_train, 2, argv, log_dir=run / "ranks")
    assert len(losses(run)) == 5
    convert(ConvertOptions(source=run, out=tmp_path / "hf", target="hf"))
    exported = hf_models.logits(tmp_path / "hf", TOKENS)
    flags = ["--expert-model-parallel-size", "1"]
    found = probed(source, run / "checkpoints", 1, tmp_path / "probe", *flags)
    assert difference(found["logits"], exported) < TOLERANCE
    assert difference(exported, hf_models.logits(source, TOKENS)) > TOLERANCE  # it has learned something


@pytest.mark.parametrize(
    ("experts", "topk", "granularity"), [pytest.param(8, 2, 1, marks=pytest.mark.slow), pytest.param(8, 4, 2)]
)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    experts: int, topk: int, granularity: int, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = models("llama")
    recipe = Recipe(experts=experts, topk=topk, granularity=granularity)
    convert(ConvertOptions(source=source, out=tmp_path / "moe", target="megatron", recipe=recipe))
    table = upcycled_table(HFConfig.of(source), recipe)
    found = probed_table(table, tmp_path / "moe", 1, tmp_path / "probe")
    chosen = torch.cat(found["routers"][0])
    assert chosen.shape == (TOKENS.numel(), experts)
    assert (chosen.sum(1) == topk).all()
    assert len({tuple(row) for row in chosen.tolist()}) > 1  # routers choose, and not always the same experts
    assert difference(found["logits"], hf_models.logits(source, TOKENS)) < TOLERANCE


@pytest.mark.long
def test_the_loss_on_a_text_of_a_model_without_its_unused_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Biases keep tokens from the last four experts, so that nothing is lost without them."""
    sizes: dict[str, Any] = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "vocab_size": 512}
    source = hf_models.make("deepseek_v3", tmp_path / "hf", **sizes)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                tensor[4:] = -100.0
        save_file(tensors, path, {"format": "pt"})
    write_huggingface(source)
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    counts = np.tile(np.array([5, 6, 7, 8, 0, 0, 0, 0], np.uint32), (1, 3, 1, 1))
    trace = RoutingTrace(counts=counts, iteration=np.array([1]), layer=np.array([2, 3, 4]))
    trace.save(tmp_path / "trace.npz")
    recipe = ReduceRecipe(keep=4, method="prune", trace=tmp_path / "trace.npz", text=text)
    convert(ConvertOptions(source=source, out=tmp_path / "megatron", target="megatron", reduce=recipe))
    said = capsys.readouterr().out
    found = re.search(r"loss on ([\d,]+) tokens of the text: ([\d.]+) before, ([\d.]+) after", said)
    assert found is not None, said
    assert found[1] == "2,048"
    assert float(found[3]) == pytest.approx(float(found[2]), abs=2e-4)
    assert "layer 1: 0.00% of the trace's assignments lost" in said


def test_verify_says_which_layer_is_wrong(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """One expert of layer 2 is another one in the checkpoint."""
    source, _ = models("mixtral")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    name = "model.layers.2.block_sparse_moe.experts.{}.w2.weight"
    for path in other.glob("*.safetensors"):
        tensors = load_file(path)
        if name.format(1) in tensors:
            tensors[name.format(1)] = -tensors[name.format(1)]
            save_file(tensors, path)
    convert(ConvertOptions(source=other, out=tmp_path / "megatron", target="megatron"))
    (verdict,) = verify(source, tmp_path / "megatron", table_of(HFConfig.of(source)), [launch_of("1")])
    assert not verdict.is_equal
    assert verdict.first_layer == 2
    assert verdict.routed > 0
    assert "first layer that differs: 2 (by " in verdict.line()


def test_optimizer_state_between_expert_parallelism_1_and_4(tmp_path: Path) -> None:
    """Training goes on as if nothing had happened, in both directions."""
    data = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "249"]
    saves = ["--save", str(tmp_path / "one"), "--save-interval", "3"]  # 3 iterations, then 4 more
    whole = train(tmp_path / "whole", 1, data, *saves, iterations=7)
    saved = tmp_path / "one" / "iter_0000003"
    convert(ConvertOptions(source=saved, out=tmp_path / "four", target="megatron", expert_ranks=4))
    flags = ["--load", str(tmp_path / "four"), "--expert-model-parallel-size", "4"]
    flags += ["--save", str(tmp_path / "saved"), "--save-interval", "20"]
    rest = train(tmp_path / "rest", 4, data, *flags, iterations=7)
    assert rest == pytest.approx(whole[3:], abs=1e-6)
    convert(ConvertOptions(source=tmp_path / "saved", out=tmp_path / "back", target="megatron", expert_ranks=1))
    common = [read_common(folder / "iter_0000007") for folder in (tmp_path / "one", tmp_path / "back")]
    assert common[0]["optimizer"] == common[1]["optimizer"]


@pytest.mark.slow
def test_legacy_folders_of_several_ranks(tmp_path: Path) -> None:
    data = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "249"]
    flags = ["--save", str(tmp_path / "old"), "--save-interval", "2", "--ckpt-format", "torch", *EP2_PP2]
    train(tmp_path / "run", 4, data, *flags, iterations=2)
    options = ConvertOptions(source=tmp_path / "old", out=tmp_path / "new", target="megatron", optimizer=False)
    convert(options)
    old, new = (read_contents(tmp_path / name / "iter_0000002") for name in ("old", "new"))
    weights = [key for key in old.parameters if key.kind == WEIGHT]
    assert len(weights) == len(new.parameters) > 0
    assert all(old.digest(key) == new.digest(key) for key in weights)
    again = train(tmp_path / "more", 1, data, "--load", str(tmp_path / "new"), "--finetune", iterations=1)
    assert len(again) == 1


def _train(argv: list[str]) -> None:
    from megatron_smartmoe.adapter.pretrain import main

    main(argv)
