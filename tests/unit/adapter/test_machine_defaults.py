"""Which defaults a machine gets, and what counts as installed: what Megatron itself can import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_smartmoe.adapter.flags import parser
from megatron_smartmoe.errors import CompatError

TE, APEX = "transformer_engine", "apex"


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python searches first, where nothing of these names is imported yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    parser.import_fault.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (TE, APEX, "amp_C", "fused_weight_gradient_mlp_cuda"):
            del sys.modules[name]
    parser.import_fault.cache_clear()


def install(packages: Path, name: str, text: str = "") -> None:
    """A package with these modules, of which the last has this text."""
    *folders, module = name.split(".")
    folder = packages
    for part in folders:
        folder /= part
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{module}.py").write_text(text)


def flags_of(*, cpu: bool, te: bool, apex: bool = False) -> dict[str, str]:
    defaults = parser.machine_defaults(cpu=cpu, transformer_engine=te, apex=apex)
    return {flag: default.reason for default in defaults for flag in default.flags}


@pytest.mark.parametrize("te", [False, True])
def test_cpu_ranks_have_megatrons_local_layers_whatever_is_installed(te: bool) -> None:
    flags = flags_of(cpu=True, te=te, apex=te)
    assert {"local", "--no-rope-fusion", "--no-gradient-accumulation-fusion", "gloo"} <= set(flags)


def test_a_gpu_with_transformer_engine_has_its_layers() -> None:
    assert not {"--transformer-impl", "--no-gradient-accumulation-fusion", "gloo"} & set(flags_of(cpu=False, te=True))


def test_nothing_is_installed() -> None:
    if parser.has_transformer_engine() or parser.has_apex():
        pytest.skip("TransformerEngine or apex is installed here")
    assert flags_of(cpu=False, te=False)["local"] == "TransformerEngine is not installed"


def test_transformer_engine_that_works(packages: Path) -> None:
    install(packages, f"{TE}.pytorch.fp8")
    assert parser.has_transformer_engine()


def test_a_transformer_engine_for_another_torch_is_like_none_and_said_to_be_there(packages: Path) -> None:
    install(packages, f"{TE}.pytorch.fp8", "raise ImportError('undefined symbol: _ZN3c10')")
    assert not parser.has_transformer_engine()
    assert flags_of(cpu=False, te=False)["local"] == (
        "TransformerEngine is installed, and importing it fails: undefined symbol: _ZN3c10"
    )


def test_a_package_at_which_megatron_would_stop_is_an_error(packages: Path) -> None:
    install(packages, f"{TE}.pytorch.fp8", "raise OSError('libcudart.so.12: cannot open')")
    with pytest.raises(CompatError) as caught:
        parser.has_transformer_engine()
    assert str(caught.value) == (
        "transformer_engine is installed and broken: importing transformer_engine.pytorch.fp8 fails with OSError: "
        "libcudart.so.12: cannot open. Megatron stops there too: reinstall it for this torch, or remove it "
        "(pip uninstall transformer_engine); smartmoe doctor says more."
    )


def test_apex_is_nvidias_with_its_kernels(packages: Path) -> None:
    install(packages, "apex.models")  # PyPI's
    assert not parser.has_apex()
    parser.import_fault.cache_clear()
    install(packages, "apex.optimizers", "FusedAdam = None")
    assert not parser.has_apex()
    parser.import_fault.cache_clear()
    for name in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        install(packages, name)
    assert parser.has_apex()
