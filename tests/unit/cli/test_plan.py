"""`smartmoe plan` from its command line: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_smartmoe.cli.main import main
from megatron_smartmoe.planner.pool import Pool

CONFIGS = Path(__file__).parents[3] / "configs"
MODEL = str(CONFIGS / "models" / "olmoe.yaml")
CLUSTER = str(CONFIGS / "clusters" / "a100-sxm4-80gb.yaml")
SMALL = ["plan", "--model", MODEL, "--cluster", CLUSTER, "--gpus", "8", "--global-batch-size", "64", "--no-overlap"]


def test_it_prints_the_best_their_terms_and_the_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*SMALL, "--skew", "3", "--json", str(tmp_path / "p.json"), "--pool", str(tmp_path / "pool.json")]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "p.json").read_text())
    best = content["best"][0]
    for words in (best["launch"], "Time of a step:", "Memory of the fullest rank", "Why not another:", "rejected:"):
        assert words in printed
    assert "--expert-model-parallel-size" in printed
    assert sum(best["time_s"].values()) == pytest.approx(best["expected_s"])
    parts = {**best["memory_bytes"]}
    assert parts.pop("sum") == pytest.approx(sum(parts.values()))
    assert len(content["best"]) == 5
    assert len(content["rejected"]) > content["shapes"] / 2
    assert all(one["reason"] for one in content["rejected"])
    assert Pool.from_json(json.loads((tmp_path / "pool.json").read_text())).launch == best["launch"]


def test_it_explains_a_users_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --micro-batch-size 1 --bf16 "
    flags += "--expert-tensor-parallel-size 1 --global-batch-size 64 --use-distributed-optimizer"
    assert main([*SMALL, "--explain", flags]) == 0
    printed = capsys.readouterr().out
    assert "Launch: TP2 PP1 EP4 DP4 mbs1 on 8 x A100" in printed
    assert "expert parallel                    4 ranks, 1 apart, inside a node" in printed
    assert "Compared with TP1" in printed


def test_it_explains_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--explain", "--no-spare-slots"]) == 0
    assert "It satisfies Megatron's constraints." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--skew", "lots"], "--skew = 'lots': must be a number or one of even, mild, uneven, strong"),
        (["--skew", "9"], "--skew = 9.0: must be between 1 and 8"),
        (["--gpus", "12"], "--gpus = 12: must fill whole nodes of 8. Use 8."),
        (["--top", "0"], "--top = 0: must be at least 1"),
        (["--explain", "--expert-model-parallel-size 5 --bf16"], "Megatron refuses it: ETP x EP x PP = 5"),
    ],
)
def test_what_is_wrong_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(CONFIGS / "models" / "mixtral-8x22b.yaml")
    assert main(["plan", "--model", model, "--cluster", CLUSTER, "--gpus", "1", "--no-overlap"]) == 2
    assert "no launch fits: the smallest needs" in capsys.readouterr().err
