"""Secrets: what is one, what is written in its place, and how a resumed run reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smartmoe.adapter.launch.secrets import (
    masked_command,
    masked_flags,
    masked_variables,
    masked_words,
    revealed_flags,
    secrets_among,
)
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.run import FlagValue

TOKEN = "hf_" + "x" * 30
ENVIRON = {"WANDB_API_KEY": "0123456789abcdef", "HOME": "/home/u/01234567"}


@pytest.mark.parametrize(
    ("flag", "value", "variable"),
    [
        ("--wandb-entity", "0123456789abcdef", "WANDB_API_KEY"),  # the value of a variable that is named like a secret
        ("--x-api-key", "short", "SMARTMOE_SECRET_X_API_KEY"),
        ("--db-password", "p", "SMARTMOE_SECRET_DB_PASSWORD"),
        ("--load", TOKEN, "SMARTMOE_SECRET_LOAD"),
        ("--load", "s3://user:pass@host/checkpoints", "SMARTMOE_SECRET_LOAD"),
        ("--save", "/home/u/01234567", None),
        ("--fim-prefix-token", "<fim_prefix>", None),
        ("--num-query-groups", "8", None),
        ("--load", "https://host:8080/x", None),
    ],
)
def test_what_a_secret_is(flag: str, value: str, variable: str | None) -> None:
    there = [flag, value if variable is None else f"${{{variable}}}"]
    assert masked_words([flag, value], ENVIRON) == there
    assert masked_flags({flag[2:]: value}, ENVIRON) == {flag[2:]: there[1]}
    assert secrets_among([flag, value], ENVIRON) == ([] if variable is None else [value])


def test_a_value_after_an_equals_sign_and_one_of_several() -> None:
    assert masked_words([f"--load={TOKEN}", "--a", "1", TOKEN, "--b=2"], {}) == [
        "--load",
        "${SMARTMOE_SECRET_LOAD}",
        "--a",
        "1",
        "${SMARTMOE_SECRET_A_2}",
        "--b=2",
    ]
    flags: dict[str, FlagValue] = {"a": ["1", TOKEN], "swiglu": True}
    assert masked_flags(flags, {}) == {"a": ["1", "${SMARTMOE_SECRET_A_2}"], "swiglu": True}


def test_variables() -> None:
    found = masked_variables({"SLURM_JWT": "eyJ", "SLURM_JOB_ID": "7", "SLURM_X": TOKEN})
    assert found == {"SLURM_JWT": "***", "SLURM_JOB_ID": "7", "SLURM_X": "***"}


def test_a_command_without_secrets_is_the_plain_one() -> None:
    assert masked_command(["python", "--x", "a b"], {"A": "1"}, {}) == "A=1 python \\\n  --x 'a b'"


@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.one_of(st.just(True), st.just(TOKEN), st.text()))
)
def test_masked_flags_come_back(flags: dict[str, FlagValue]) -> None:
    flags = {name: value for name, value in flags.items() if isinstance(value, bool) or not str(value).startswith("$")}
    environ = {f"SMARTMOE_SECRET_{name.upper()}": TOKEN for name in flags}
    assert revealed_flags(masked_flags(flags, {}), environ) == flags


def test_a_variable_that_is_not_set_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        revealed_flags({"wandb-entity": "${WANDB_API_KEY}"}, {})
    assert str(caught.value) == (
        "--wandb-entity = '${WANDB_API_KEY}': is read from the environment, which has no variable WANDB_API_KEY. "
        "Run export WANDB_API_KEY=... first, or pass --wandb-entity."
    )
