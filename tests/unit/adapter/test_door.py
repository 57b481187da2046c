"""The package's top: what importing it loads, and when `enable()` does nothing or refuses."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_smartmoe
from megatron_smartmoe.adapter.flags import script_flags
from megatron_smartmoe.errors import CompatError


def python(code: str) -> str:
    """What code prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = "[name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'megatron')]"
    own = "[name for name in sys.modules if name.startswith('megatron_smartmoe.')]"
    assert python(f"import sys, megatron_smartmoe\nprint({loaded}, {own})") == "[] []\n"


def test_its_names() -> None:
    names = ["__version__", "add_arguments", "enable", "moe_spec", "selftest", "session"]
    assert sorted(dir(megatron_smartmoe)) == names
    assert all(getattr(megatron_smartmoe, name) for name in names)
    with pytest.raises(AttributeError, match="module 'megatron_smartmoe' has no attribute 'enabel'"):
        megatron_smartmoe.enabel  # noqa: B018


def test_a_script_that_a_worker_imports_again_loads_nothing(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import megatron_smartmoe\n\nmegatron_smartmoe.enable()\n")
    run = f"import runpy, sys\nrunpy.run_path({str(script)!r}, run_name='__mp_main__')\n"
    assert python(run + "print('torch' in sys.modules, 'megatron' in sys.modules)") == "False False\n"


def test_enable_comes_before_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.training", ModuleType("megatron.training"))
    with pytest.raises(CompatError) as caught:
        megatron_smartmoe.enable()
    assert str(caught.value) == (
        "megatron_smartmoe.enable() = called late: megatron.training has been imported, and what was imported from it "
        "by name would not be hooked. Move the call to the top of the script."
    )


def test_a_session_needs_enable() -> None:
    with (
        pytest.raises(CompatError, match=r"session\(\): megatron_smartmoe\.enable\(\) was not called"),
        megatron_smartmoe.session([], None),
    ):
        pass


def test_flags_are_added_once() -> None:
    parser = argparse.ArgumentParser()
    assert megatron_smartmoe.add_arguments(megatron_smartmoe.add_arguments(parser)) is parser
    assert parser.parse_args(["--smartmoe"]).smartmoe


def test_what_a_machine_needs_becomes_a_default_that_flags_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_flags, "has_transformer_engine", lambda: False)
    monkeypatch.setattr(script_flags, "has_apex", lambda: False)
    parser = argparse.ArgumentParser()
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--no-rope-fusion", action="store_false", dest="rope_fusion")
    parser.add_argument("--moe-token-dispatcher-type", default="allgather")
    lines = script_flags.set_machine_defaults(parser, cpu=False)
    assert lines == ["default --transformer-impl local --no-rope-fusion   (TransformerEngine is not installed)"]
    args = parser.parse_args([])
    assert (args.transformer_impl, args.rope_fusion, args.moe_token_dispatcher_type) == ("local", False, "allgather")
    assert parser.parse_args(["--transformer-impl", "x"]).transformer_impl == "x"


def test_what_a_gate_is_made_of_becomes_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_flags, "has_transformer_engine", lambda: True)
    monkeypatch.setattr("sys.argv", ["train.py", "--smartmoe-gate", "switch"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--moe-router-topk", type=int, default=2)
    parser.add_argument("--moe-router-pre-softmax", action="store_true")
    parser.add_argument("--moe-aux-loss-coeff", type=float, nargs="+", default=0.0)
    lines = script_flags.set_machine_defaults(parser, cpu=False)
    assert lines == [
        "default --moe-aux-loss-coeff 0.01 --moe-router-topk 1 --moe-router-pre-softmax   "
        "(--smartmoe-gate switch: Switch Transformer (arXiv 2101.03961))"
    ]
    args = parser.parse_args(["--moe-aux-loss-coeff", "0.5"])
    assert (args.moe_router_topk, args.moe_router_pre_softmax, args.moe_aux_loss_coeff) == (1, True, [0.5])
    assert parser.parse_args([]).moe_aux_loss_coeff == 0.01


def test_flags_that_a_release_lacks_are_not_given() -> None:
    given = script_flags.Given(a=1)
    assert (given.a, given.b) == (1, None)
    assert not hasattr(given, "__deepcopy__")
