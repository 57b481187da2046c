"""The tables of options that do nothing are complete for the installed Megatron, which is walked, not remembered."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checks import Case, said_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
# Read by name of the field of a configuration class (`getattr(args, field.name)`), which no search for `.name` finds.
READ_AS_FIELDS = {
    "muon_momentum",
    "muon_split_qkv",
    "muon_nesterov",
    "muon_fp32_matmul_prec",
    "muon_coefficient_type",
    "muon_num_ns_steps",
    "muon_tp_mode",
    "muon_extra_scale_factor",
    "muon_scale_mode",
    "moe_deepep_num_sms",
    "moe_hybridep_num_sms",
}
# Fields of the configuration that Megatron's experts read and ours do not, with the reason why that is no difference.
NO_DIFFERENCE = {
    "add_bias_linear": "refused",
    "fp8": "refused",
    "fp4": "refused",
    "fp8_param": "refused with fp8",
    "fp8_recipe": "refused with fp8",
    "fp4_recipe": "refused with fp4",
    "overlap_dispatch_backward_with_experts_wgrad": "refused",
    "moe_mlp_glu_interleave_size": "refused",
    "moe_paged_stash": "refused",
    "moe_expert_rank_capacity_factor": "refused",
    "use_te_activation_func": "refused",
    "use_transformer_engine_op_fuser": "refused",
    "use_fused_weighted_squared_relu": "refused",
    "fine_grained_activation_offloading": "refused with the experts' modules",
    "offload_modules": "refused with the experts' modules",
    "delay_offload_until_cuda_graph": "part of offloading, and CUDA graphs are refused",
    "ffn_hidden_size": "that of dense layers",
    "moe_router_topk": "read for a size that grouped GEMMs do not need",
    "bias_dropout_fusion": "of layers, not of experts",
    "use_kitchen": "no option sets it",
    "cpu_offloading": "no option sets it but --cpu-offloading-num-layers, which needs TransformerEngine",
    "cpu_offloading_activations": "as cpu_offloading",
    "gtp_weight_remat_size": "no option sets it",
    "cuda_graph_impl": "CUDA graphs are refused",
}


def _sources() -> str:
    import megatron.core
    import megatron.training

    roots = [Path(megatron.core.__path__[0]), Path(megatron.training.__path__[0]), ROOT / "megatron_smartmoe"]
    paths = [path for root in roots for path in sorted(root.rglob("*.py")) if path.name != "ignored_options.py"]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def _fields_read(path: Path, classes: Iterable[str]) -> set[str]:
    """Names X of `config.X` and `self.config.X` in these classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    return {
        node.attr
        for body in bodies
        for node in ast.walk(body)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config")
    }


def _walk() -> dict[str, Any]:
    """Arguments that nothing reads, those of the tables, and fields that only Megatron's experts read."""
    import megatron.core.transformer.mlp as mlp
    import megatron.core.transformer.moe.experts as experts

    from megatron_smartmoe.adapter.flags import ignored_options
    from megatron_smartmoe.adapter.flags.parser import build_parser
    from megatron_smartmoe.adapter.moe import experts as own

    text = _sources()
    read = set(re.findall(r"\.([A-Za-z_]\w*)", text)) | set(re.findall(r"""getattr\([^)]*['"](\w+)['"]""", text))
    read |= set(re.findall(r"\b[a-z_]+\b", _own_text()))
    actions = [action for action in build_parser()._actions if action.dest != "help"]
    harmless = {*ignored_options.HARMLESS, *ignored_options.RENAMED}
    unread = {
        action.dest for action in actions if action.dest not in read and not harmless & set(action.option_strings)
    }
    theirs = _fields_read(Path(str(experts.__file__)), ("TEGroupedMLP", "SequentialMLP"))
    theirs |= _fields_read(Path(str(mlp.__file__)), ("MLP",))
    ours = _fields_read(Path(str(own.__file__)), ("SlottedExperts",))
    tables = {name for names in ignored_options.NEVER_READ.values() for name in names.split()}
    known = {action.dest for action in actions}
    flags = {flag for action in actions for flag in action.option_strings}
    return {
        "arguments": len(actions),
        "unread": unread,
        "tables": tables & known,
        "gone": harmless - flags,
        "only theirs": theirs - ours,
    }


def _own_text() -> str:
    """The project's own files that read arguments by a name in a table."""
    return (ROOT / "megatron_smartmoe" / "adapter" / "datasets.py").read_text()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(_walk, 1, log_dir=tmp_path_factory.mktemp("walk"))[0]
    return found


def test_all_arguments_were_walked(walked: dict[str, Any]) -> None:
    assert walked["arguments"] > 800


def test_every_argument_that_nothing_reads_is_refused(walked: dict[str, Any]) -> None:
    assert walked["unread"] - READ_AS_FIELDS - walked["tables"] == set()


def test_no_argument_that_something_reads_is_refused(walked: dict[str, Any]) -> None:
    assert walked["tables"] - walked["unread"] == set()


def test_harmless_and_renamed_options_exist(walked: dict[str, Any]) -> None:
    assert walked["gone"] == set()


def test_our_experts_read_or_refuse_what_megatrons_read(walked: dict[str, Any]) -> None:
    assert walked["only theirs"] - set(NO_DIFFERENCE) == set()


EXPERTS = "--smartmoe --expert-model-parallel-size 2"
CASES = {
    "a profiler": Case(
        flags="--profile",
        says="--profile = True: is not possible on CPU ranks: it starts the CUDA profiler. Add "
        "--use-pytorch-profiler, or remove it.",
    ),
    "a GPU's temperature": Case(
        flags="--log-straggler",
        says="--log-straggler = True: is not possible on CPU ranks: it reads temperature, power and clock of a GPU. "
        "Remove it.",
    ),
    "no validation data": Case(
        without=("--split", "--mock-data"),
        flags="--train-data-path a --eval-iters 2",
        data_exists=False,
        says="--eval-iters = 2: has no data: --train-data-path comes without --valid-data-path. Pass "
        "--valid-data-path, or --eval-iters 0.",
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return said_of(CASES, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says
