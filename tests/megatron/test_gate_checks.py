"""`--smartmoe-gate`: the flags that it sets, and what is refused, with its whole text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.flags.parser import gate_defaults
from megatron_smartmoe.adapter.gates.table import GATES
from megatron_smartmoe.adapter.launch.flags import merge
from megatron_smartmoe.spec.run import FlagValue
from tests.support.checks import Case, said_of

LOSS = ("--moe-router-load-balancing-type", "--moe-aux-loss-coeff")
TOP_K = "--moe-router-topk"
EP8 = "--expert-model-parallel-size 8"
CASES = {
    **{
        f"{gate}, its own flags": Case(
            flags=f"--smartmoe-gate {gate}" + " --smartmoe" * GATES[gate].needs_layer,
            without=(*LOSS, TOP_K),
            verdict=True,
        )
        for gate in GATES
    },
    "with balancing": Case(flags="--smartmoe --smartmoe-gate noisy-top-k", without=LOSS, verdict=True),
    "another loss": Case(
        flags="--smartmoe-gate gshard --moe-router-load-balancing-type seq_aux_loss",
        says="--moe-router-load-balancing-type = 'seq_aux_loss': must be aux_loss with --smartmoe-gate gshard, "
        "which is made of it. Remove it: --smartmoe-gate gshard sets --moe-router-load-balancing-type "
        "aux_loss.",
    ),
    "two losses": Case(
        flags="--smartmoe-gate gshard --moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1 1",
        says="--moe-router-load-balancing-type = ['aux_loss', 'seq_aux_loss']: must be aux_loss with "
        "--smartmoe-gate gshard, which is made of it. Remove it: --smartmoe-gate gshard sets "
        "--moe-router-load-balancing-type aux_loss.",
    ),
    "another number of experts": Case(
        flags="--smartmoe-gate base --moe-router-topk 2",
        says="--moe-router-topk = 2: must be 1 with --smartmoe-gate base, which is made of it. Remove it: "
        "--smartmoe-gate base sets --moe-router-topk 1.",
    ),
    "softmax before the choice": Case(
        flags="--smartmoe-gate swipe --moe-router-pre-softmax",
        says="--moe-router-pre-softmax = True: must not be given with --smartmoe-gate swipe, which is made of it. "
        "Remove --moe-router-pre-softmax, or use another gate.",
    ),
    "sigmoid scores": Case(
        flags="--smartmoe-gate noisy-top-k --moe-router-score-function sigmoid",
        without=LOSS,
        says="--moe-router-score-function = 'sigmoid': must be softmax with --smartmoe-gate noisy-top-k, which is "
        "made of it. Remove it: --smartmoe-gate noisy-top-k sets --moe-router-score-function softmax.",
    ),
    "a bias": Case(
        flags="--smartmoe-gate swipe --moe-router-enable-expert-bias",
        says="--moe-router-enable-expert-bias = True: is not defined for --smartmoe-gate swipe: it adds a bias to "
        "the scores that are compared. Remove it, or --smartmoe-gate.",
    ),
    "groups": Case(
        flags="--smartmoe-gate naive --moe-router-num-groups 4 --moe-router-group-topk 2",
        says="--moe-router-num-groups = 4: is not defined for --smartmoe-gate naive: it limits the experts of a "
        "token to groups. Remove it, or --smartmoe-gate.",
    ),
    "a fused router": Case(
        flags="--smartmoe-gate swipe --moe-router-fusion",
        says="--moe-router-fusion = True: is not supported with --smartmoe-gate swipe: its kernels compute "
        "Megatron's top-k. Remove it, or --smartmoe-gate.",
    ),
    "one expert of noisy top-k": Case(
        flags="--smartmoe-gate noisy-top-k --moe-router-topk 1",
        without=LOSS,
        says="--moe-router-topk = 1: must be at least 2 with --smartmoe-gate noisy-top-k. Pass 2.",
    ),
    "all experts": Case(
        flags="--smartmoe-gate swipe --moe-router-topk 8",
        says="--moe-router-topk = 8: must be less than --num-experts = 8 with --smartmoe-gate swipe: there is "
        "nothing to choose. Pass a smaller number, for example 2.",
    ),
    "no capacity": Case(
        flags="--smartmoe-gate gshard --moe-expert-capacity-factor -1",
        without=LOSS,
        says="--moe-expert-capacity-factor = -1.0: must be a number above 0 with --smartmoe-gate gshard, which "
        "leaves choices out. Remove it for the paper's, or pass --moe-expert-capacity-factor 8, which drops "
        "nothing for capacity.",
    ),
    "a capacity of what drops nothing": Case(
        flags="--smartmoe-gate swipe --moe-expert-capacity-factor 1",
        says="--moe-expert-capacity-factor = 1.0: is not defined for --smartmoe-gate swipe, which drops nothing. "
        "Remove it, or --smartmoe-gate.",
    ),
    "a rank with too few experts": Case(
        flags=f"--smartmoe-gate swipe {EP8} --global-batch-size 8",
        ranks=8,
        says="--moe-router-topk = 2: must be at most 1, the experts of a rank, with --smartmoe-gate swipe: a "
        "token that is given to a rank needs different experts there. Use fewer expert-parallel ranks.",
    ),
    "unequal shares": Case(
        flags="--smartmoe-gate base --moe-router-topk 1 --seq-length 60",
        says="--micro-batch-size = 1: gives a rank 60 tokens, which --num-experts = 8 must divide with "
        "--smartmoe-gate base. Pass 8, for example.",
    ),
    "a share without its gate": Case(
        flags="--smartmoe-gate-outgoing 0.3",
        says="--smartmoe-gate-outgoing = 0.3: needs --smartmoe-gate topology. Add --smartmoe-gate topology, or "
        "remove it.",
    ),
    "a share above 1": Case(
        flags="--smartmoe-gate topology --smartmoe-gate-outgoing 14",
        without=LOSS,
        says="--smartmoe-gate-outgoing = 14.0: must be a share from 0 to 1. Pass 0.14, for example.",
    ),
    "experts of an unknown kind": Case(
        flags="--smartmoe --smartmoe-gate moe++ --smartmoe-zero-experts zero=1,skip=2",
        without=LOSS,
        says="--smartmoe-zero-experts = 'zero=1,skip=2': must name how many experts there are of each kind: zero, "
        "copy, constant; and at least one. Pass zero=1,copy=1,constant=2, for example.",
    ),
    "no weight of experts that cost nothing": Case(
        flags="--smartmoe --smartmoe-gate moe++ --smartmoe-zero-experts-tau 0",
        without=LOSS,
        says="--smartmoe-zero-experts-tau = 0.0: must be a number above 0. Pass 0.75, for example.",
    ),
    "experts that cost nothing in Megatron's layer": Case(
        flags="--smartmoe-gate moe++",
        without=LOSS,
        says="--smartmoe-gate = 'moe++': needs --smartmoe: its layer computes them. Add --smartmoe.",
    ),
    "residuals without their gate": Case(
        flags="--smartmoe-gate-residuals off",
        says="--smartmoe-gate-residuals = 'off': needs --smartmoe-gate moe++. Add --smartmoe-gate moe++, or remove it.",
    ),
    "no residuals": Case(
        flags="--smartmoe --smartmoe-gate moe++ --smartmoe-gate-residuals off", without=LOSS, verdict=True
    ),
    "without experts": Case(
        flags="--smartmoe-gate naive",
        without=("--num-experts",),
        says="--smartmoe-gate = 'naive': needs a model with experts. Pass --num-experts 8, for example, or remove it.",
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return said_of(CASES, tmp_path_factory.mktemp("checks"))


@pytest.mark.dist
@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_each_rule_says_field_value_rule_and_way_out(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says


def test_a_preset_says_what_it_sets() -> None:
    (default,) = gate_defaults(["--seed", "1", "--smartmoe-gate", "switch"])
    assert default.reason == "--smartmoe-gate switch: Switch Transformer (arXiv 2101.03961)"
    assert " ".join(default.flags) == (
        "--moe-aux-loss-coeff 0.01 --moe-expert-capacity-factor 1.25 --moe-token-drop-policy position "
        "--moe-input-jitter-eps 0.01 --moe-router-topk 1 --moe-router-pre-softmax --moe-router-score-function softmax "
        "--moe-router-load-balancing-type aux_loss"
    )
    assert gate_defaults(["--smartmoe-gate", "top-k"]) == gate_defaults([]) == []


def test_a_gate_of_the_command_line_replaces_the_configurations_flags() -> None:
    config: dict[str, FlagValue] = {
        "moe-router-topk": "2",
        "moe-aux-loss-coeff": "1e-3",
        "moe-router-pre-softmax": True,
        "lr": "1",
    }
    assert merge(config, ["--smartmoe-gate", "switch"], known=()) == ["--lr", "1", "--smartmoe-gate", "switch"]
    assert merge(config, ["--smartmoe-gate", "top-k"], known=())[:2] == ["--moe-router-topk", "2"]


def test_the_page_has_every_gate() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gates.md").read_text(encoding="utf-8")
    table = text[: text.index("Megatron has these itself")]
    for name, gate in GATES.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(number in line for number in re.findall(r"\d{4}\.\d{5}", gate.paper))
        assert (line.split("|")[-2].strip() != "") == bool(gate.depends)
