"""The names of Megatron that this project hooks or builds on, and whether a Megatron-LM tree has them.

A tree is parsed, never imported: a fork can be examined on a machine where it does not run. What is compared are names
and the arguments that are read, so a change elsewhere in a function does not matter, and a renamed one is found before
a run is.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.errors import CompatError


@dataclass(frozen=True, kw_only=True)
class MegatronName:
    """A function, method, class or variable of Megatron.

    Attributes:
        module: full name of its module.
        name: its name there, `Class.method` for a method.
        arguments: of it, those that are read by name.
        instead: another name that does as well, of other releases.
        is_hooked: whether the project replaces it; otherwise it is called or subclassed.
        is_optional: whether a release may lack it: then what it is for is refused there, or not needed.
        use: what for, for people.
    """

    module: str
    name: str
    arguments: tuple[str, ...] = ()
    instead: str | None = None
    is_hooked: bool = True
    is_optional: bool = False
    use: str

    @property
    def full(self) -> str:
        """Module and name."""
        return f"{self.module}.{self.name}"


def _names() -> Iterator[MegatronName]:
    training, core = "megatron.training", "megatron.core"
    loop, saving = f"{training}.training", f"{core}.dist_checkpointing"

    def hooked(module: str, use: str, *names: str, **options: object) -> Iterator[MegatronName]:
        for name in names:
            yield MegatronName(module=module, name=name, use=use, **options)  # type: ignore[arg-type]

    yield from hooked(f"{training}.arguments", "flags", "add_megatron_arguments", arguments=("parser",))
    yield from hooked(f"{training}.arguments", "start-up checks", "validate_args", arguments=("args",))
    yield from hooked(loop, "start and end of a run", "initialize_megatron", "pretrain")
    yield from hooked(loop, "model FLOP/s", "num_floating_point_operations", is_hooked=False)
    yield from hooked(loop, "callbacks", "setup_model_and_optimizer", "train_step", "evaluate")
    yield from hooked(loop, "callbacks", "save_checkpoint_and_time", "maybe_finalize_async_save")
    yield from hooked(loop, "callbacks", "post_training_step_callbacks", arguments=("iteration",))
    yield from hooked(loop, "callbacks", "evaluate_and_print_results", arguments=("prefix",))
    yield from hooked(loop, "checkpoints", "save_checkpoint", "load_checkpoint")
    specs = f"{core}.models.gpt"
    moe = "get_moe_module_spec_for_backend"
    yield from hooked(f"{specs}.moe_module_specs", "MoE layers", moe)
    yield from hooked(f"{specs}.gpt_layer_specs", "MoE layers", moe)
    local = ("LocalSpecProvider.layer_norm", "LocalSpecProvider.core_attention")
    yield from hooked(f"{core}.models.backends", "norm and attention without TransformerEngine", *local)
    yield from hooked(f"{specs}.gpt_layer_specs", "the final norm without TransformerEngine", "LNImpl")
    buckets = ("register_grad_ready", "start_grad_sync", "finish_grad_sync")
    methods = tuple(f"_ParamAndGradBucketGroup.{name}" for name in buckets)
    yield from hooked(f"{core}.distributed.param_and_grad_buffer", "gradients of replicas", *methods)
    checkpointing = f"{training}.checkpointing"
    yield from hooked(checkpointing, "checkpoints", "maybe_msc", instead="open_file")
    yield from hooked(checkpointing, "checkpoints", "_async_delete_checkpoint_impl", "ensure_directory_exists")
    yield from hooked(f"{saving}.serialization", "checkpoints", "save_config")
    writer, caller = f"{saving}.strategies.filesystem_async", f"{saving}.strategies.async_utils"
    yield from hooked(writer, "checkpoints", "FileSystemWriterAsync.finish", "get_write_results_queue")
    yield from hooked(writer, "checkpoints", "FileSystemWriterAsync.write_preloaded_data")
    yield from hooked(writer, "checkpoints without a GPU", "FileSystemWriterAsync.preload_tensors")
    yield from hooked(caller, "checkpoints without a GPU", "PersistentAsyncCaller._get_process")
    optimizer = f"{core}.optimizer"
    yield from hooked(optimizer, "Adam without TransformerEngine", "Adam", "USING_PYTORCH_OPTIMIZER")
    flags = ("Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER")
    yield from hooked(f"{optimizer}.distrib_optimizer", "Adam without TransformerEngine", *flags)
    state = "sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"
    methods = tuple(f"DistributedOptimizer.{name}" for name in state)
    yield from hooked(f"{optimizer}.distrib_optimizer", "checkpoints of the optimizer", *methods)
    emerging, managed = f"{optimizer}.emerging_optimizers", "is_managed_by_layer_wise_optimizer"
    for name in ("TensorParallelMuon.orthogonalize", "_is_nonlinear_or_embedding"):
        yield from hooked(emerging, "Muon on experts in slots", name, is_optional=True)
    for module in (optimizer, f"{optimizer}.layer_wise_optimizer"):
        yield from hooked(module, "Muon on experts in slots", managed, is_optional=True)
    text = f"{core}.tokenizers.text.libraries"
    names = ("HuggingFaceTokenizer", "MegatronHFTokenizer", "TikTokenTokenizer")
    yield from hooked(text, "tokenizers without transformers", *names)
    yield from hooked(f"{text}.tiktoken_tokenizer", "tiktoken's vocabulary files", "reload_mergeable_ranks")
    yield from hooked(f"{core}.datasets.utils", "the dataset helper of the wheel", "compile_helpers")
    layer = ("route", "preprocess", "dispatch", "routed_experts_compute", "combine")
    steps = tuple(f"MoELayer.{name}" for name in layer)
    routing = ("routing", "apply_z_loss", "get_aux_loss_coeff", "attach_and_log_load_balancing_loss")
    methods = tuple(f"TopKRouter.{name}" for name in routing)
    router = f"{core}.transformer.moe.router"
    yield from hooked(router, "gates", "Router.gating", *methods, is_hooked=False, is_optional=True)
    yield from hooked(f"{saving}.serialization", "checkpoints of other gates", "load", is_optional=True)
    experts = f"{core}.transformer.moe.experts"
    yield from hooked(experts, "TransformerEngine's experts with spare slots", "TEGroupedMLP.forward", is_hooked=False)
    yield from hooked(f"{core}.transformer.moe.moe_layer", "the layer that ours is", *steps, is_hooked=False)
    wait, use = "DistributedDataParallel._make_forward_pre_hook", "replicas with --overlap-param-gather"
    parallel = f"{core}.distributed.distributed_data_parallel"
    yield from hooked(parallel, use, wait, is_hooked=False)
    delayed, arguments = "DistributedDataParallel.__init__", ("config", "ddp_config")
    yield from hooked(parallel, "weight gradients that are computed later", delayed, arguments=arguments)


NAMES = tuple(_names())


@dataclass(frozen=True, kw_only=True)
class Found:
    """One name in a tree.

    Attributes:
        wanted: the name.
        place: file and line; None where it is missing.
        problem: what is wrong with it; empty if nothing is.
        signature: its arguments as written, empty for what is no function of this file.
    """

    wanted: MegatronName
    place: str | None
    problem: str = ""
    signature: str = ""

    @property
    def fingerprint(self) -> str:
        """Digest of the name with the names of its arguments."""
        return hashlib.sha256(f"{self.wanted.name}({self.signature})".encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A Megatron-LM tree, as far as this project needs it.

    Attributes:
        root: its folder.
        version: of megatron-core, as its package says.
        found: every name of NAMES.
    """

    root: Path
    version: str
    found: tuple[Found, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is missing or different, a line each."""
        return tuple(f"{each.wanted.full}: {each.problem}" for each in self.found if each.problem)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint by full name, of the functions that the tree defines itself."""
        return {each.wanted.full: each.fingerprint for each in self.found if each.signature}


def examine(root: Path) -> Tree:
    """Look for every name of NAMES in a tree.

    Raises:
        CompatError: it is no Megatron-LM tree.
    """
    info = root / "megatron" / "core" / "package_info.py"
    if not info.is_file() or not (root / "megatron" / "training").is_dir():
        raise CompatError(
            f"{root} = not a Megatron-LM tree: there is no megatron/core/package_info.py and megatron/training in it. "
            "Pass the folder that holds megatron/ and pretrain_gpt.py."
        )
    parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH) *= *(\d+)", info.read_text(encoding="utf-8"), re.MULTILINE))
    version = ".".join(parts.get(name, "?") for name in ("MAJOR", "MINOR", "PATCH"))
    modules: dict[str, dict[str, ast.AST] | str] = {}
    found = []
    for wanted in NAMES:
        path = _file(root, wanted.module)
        if wanted.module not in modules:
            modules[wanted.module] = _definitions(path)
        found.append(_look(wanted, path.relative_to(root), modules[wanted.module]))
    return Tree(root=root, version=version, found=tuple(found))


def installed_tree() -> Path | None:
    """The folder that holds the installed package `megatron`; None without one. Imports nothing of it."""
    spec = importlib.util.find_spec("megatron")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(place) / "training").is_dir():
            return Path(place).parent
    return None


def _file(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _definitions(path: Path) -> dict[str, ast.AST] | str:
    """The names that a module defines, methods included, or what is wrong with the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "its module is missing"
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"its module cannot be parsed: {error}"
    return dict(_walk(tree.body))


def _walk(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        match node:
            case ast.FunctionDef(name=name):
                yield name, node
            case ast.ClassDef(name=name):
                yield name, node
                yield from ((f"{name}.{inner}", each) for inner, each in _walk(node.body))
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name, node) for alias in node.names)
            case ast.Assign(targets=targets):
                yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.If() | ast.Try() | ast.With():
                for block in ("body", "orelse", "finalbody"):
                    yield from _walk(getattr(node, block, ()))
                for handler in getattr(node, "handlers", ()):
                    yield from _walk(handler.body)


def _look(wanted: MegatronName, path: Path, defined: dict[str, ast.AST] | str) -> Found:
    if isinstance(defined, str):
        return Found(wanted=wanted, place=None, problem="" if wanted.is_optional else defined)
    name = wanted.name if wanted.name in defined else wanted.instead or wanted.name
    node = defined.get(name)
    if node is None:
        if wanted.is_optional:
            return Found(wanted=wanted, place=None)
        near = difflib.get_close_matches(wanted.name, defined, n=2, cutoff=0.7)
        renamed = f", and {' and '.join(near)} {'are' if len(near) > 1 else 'is'} there" if near else ""
        return Found(wanted=wanted, place=None, problem=f"missing in {path}{renamed}")
    place = f"{path}:{getattr(node, 'lineno', 0)}"
    if not isinstance(node, ast.FunctionDef):
        return Found(wanted=wanted, place=place)
    arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    lacks = [each for each in wanted.arguments if each not in arguments]
    problem = f"has no argument {' and no argument '.join(lacks)} in {place}" if lacks else ""
    return Found(wanted=wanted, place=place, problem=problem, signature=", ".join(arguments))


def likeness(tree: Tree, releases: Mapping[str, Mapping[str, str]]) -> tuple[str, tuple[str, ...]]:
    """The known release that a tree is most like, and the functions with other arguments than there.

    Args:
        tree: the tree.
        releases: fingerprints by release.
    """
    have = tree.fingerprints
    differing = {
        release: tuple(name for name in known if have.get(name) != known[name]) for release, known in releases.items()
    }
    nearest = min(differing, key=lambda release: len(differing[release]))
    return nearest, differing[nearest]
