"""The one way into Megatron: every name of Megatron that this project replaces is replaced here.

Megatron has no callback registry, but `pretrain` and `train` look their helpers up as globals of
`megatron.training.training` at call time. Rebinding one of those names is therefore a hook that survives releases as
long as the name exists; a missing name is an error at start-up, never a silent skip. The alternatives, a copy of the
loop or a patched tree, have to be redone for every release.

What the project does at those points is a list of `Callback`s. The order in which they are called is declared
(`Order`), not the order in which somebody happened to register them. A Megatron upgrade changes this file; the
callbacks know a `Run`, iterations and losses, and none of Megatron's signatures.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_smartmoe.errors import CompatError

if TYPE_CHECKING:
    import torch

    from megatron_smartmoe.adapter.checkpoint.loading import CheckpointLoads
    from megatron_smartmoe.adapter.checkpoint.saving import CheckpointSaves
    from megatron_smartmoe.adapter.door import Door
    from megatron_smartmoe.adapter.moe.late_gradients import LateGradients
    from megatron_smartmoe.adapter.moe.modules import Modules
    from megatron_smartmoe.adapter.run import Run

TESTED_RELEASE = "0.19.2"
TESTED_CHECKOUTS = ("core_v0.17.1", "core_v0.18.2", "core_v0.19.0")
_replaced: set[str] = set()
_MARK = "__smartmoe__"  # attribute of a wrapper: the keys of all hooks that it and the wrappers below it stand for


class Order(IntEnum):
    """Which callback is called first at each moment: the one with the smaller number."""

    PROGRESS = 3  # what the others do is part of what is watched
    ACCOUNT = 4  # the clock of a step runs before the others begin, and around what they do between steps
    CHECKPOINT = 5  # what was loaded is known before anything is built on it
    REPLAY = 10  # forces what the routers choose, so everything after it counts the forced choice
    METRICS = 20
    HOMES = 30
    REPLICAS = 40
    POOL = 50  # after the two loops whose settings it changes
    TRACE = 60
    LAST = 100
    DIGESTS = 110  # the innermost context of a save: everything is where it is saved from


class Callback:
    """Something that happens at given moments of a training run. Subclasses override the moments that they need."""

    order: ClassVar[Order] = Order.LAST

    def on_start(self, run: Run) -> None:
        """Once: model and optimizer exist, and a checkpoint, if there is one, has been loaded."""

    def before_step(self, iteration: int) -> None:
        """Before the first forward pass of an iteration.

        Args:
            iteration: its number, counted from 1 over the whole training.
        """

    def after_step(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
        """After the optimizer's step, before Megatron logs, evaluates or saves.

        Args:
            iteration: its number.
            losses: scalars by name, reduced over data-parallel ranks; empty but on the last pipeline stage.
        """

    def between_steps(self, iteration: int) -> None:
        """After Megatron has logged and evaluated, before it saves: the moment to change what the next step uses."""

    def around_changes(self, iteration: int) -> AbstractContextManager[None]:
        """A context around what all callbacks do between steps, which may be much: experts move then."""
        return contextlib.nullcontext()

    def around_save(self, iteration: int) -> AbstractContextManager[None]:
        """A context that is entered before a checkpoint is written and left when Megatron's call returns."""
        return contextlib.nullcontext()

    def around_saving(self) -> AbstractContextManager[None]:
        """A context around all that belongs to a save: what comes before and after it, and the wait for one that is
        still being written (`--async-save`).
        """
        return contextlib.nullcontext()

    def around_evaluation(self, split: str) -> AbstractContextManager[None]:
        """A context around an evaluation.

        Args:
            split: `validation` or `test`.
        """
        return contextlib.nullcontext()

    def after_save(self, iteration: int, folder: Path) -> None:
        """Megatron's files of a checkpoint are written, or are being written in the background; it is not in force yet.

        Args:
            iteration: that was saved.
            folder: of the checkpoint, to add files to.
        """

    def after_evaluation(self, split: str, losses: Mapping[str, torch.Tensor]) -> None:
        """After an evaluation.

        Args:
            split: `validation` or `test`.
            losses: mean losses by name; empty but on the last pipeline stage.
        """

    def on_end(self) -> None:
        """Once: training and the last evaluation are over. Process groups still exist."""


class _Loop:
    """Megatron's loop as it stands now: the callbacks, and the run once there is one."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self._running = False
        self._split = "validation"

    def setup_model_and_optimizer(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Callbacks start when it has built the model and loaded the checkpoint."""
        from megatron_smartmoe.adapter.run import Run

        result = call()
        self.start(Run.of(result[0], result[1]))
        return result

    def start(self, run: Run) -> None:
        """Model and optimizer exist.

        Raises:
            CompatError: the model has MoE layers that --smartmoe cannot balance.
        """
        from megatron_smartmoe.adapter.moe.modules import check_layers

        if run.args.smartmoe:
            check_layers(run.layers, run.layer_numbers)
        for callback in self.callbacks:
            callback.on_start(run)
        self._running = True

    def train_step(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """One iteration: forward and backward passes of all micro-batches, and the optimizer."""
        from megatron.training import get_args

        iteration = get_args().curr_iteration + 1  # Megatron counts the iterations that are done
        self.before_step(iteration)
        result = call()
        self.after_step(iteration, result[0])
        return result

    def before_step(self, iteration: int) -> None:
        """Before the first forward pass of an iteration."""
        for callback in self.callbacks:
            callback.before_step(iteration)

    def after_step(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
        """After the optimizer's step."""
        for callback in self.callbacks:
            callback.after_step(iteration, losses)

    def post_training_step_callbacks(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """What Megatron does at the end of an iteration before it may save."""
        result = call()
        self.between_steps(bound.arguments["iteration"])
        return result

    def between_steps(self, iteration: int) -> None:
        """At the end of an iteration: experts may move."""
        with self._contexts(lambda callback: callback.around_changes(iteration)):
            for callback in self.callbacks:
                callback.between_steps(iteration)

    def save_checkpoint(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Megatron also saves before there is a run, when it converts a checkpoint: then no callback is called."""
        with self.around_save(bound.arguments["iteration"]):
            result = call()
            self._after_save(bound)
        return result

    def around_save(self, iteration: int) -> ExitStack:
        """The callbacks' contexts around a save."""
        return self._contexts(lambda callback: callback.around_save(iteration))

    def _after_save(self, bound: inspect.BoundArguments) -> None:
        from megatron.training import get_args

        from megatron_smartmoe.adapter.checkpoint.folders import save_directory
        from megatron_smartmoe.checkpoint.directory import folder_of

        iteration, non_persistent = bound.arguments["iteration"], bound.arguments.get("non_persistent_ckpt", False)
        directory = save_directory(get_args(), non_persistent=non_persistent) if self._running else None
        if directory is not None:
            self.after_save(iteration, folder_of(directory, iteration))

    def after_save(self, iteration: int, folder: Path) -> None:
        """The files of a checkpoint are written, or are being written."""
        for callback in self.callbacks:
            callback.after_save(iteration, folder)

    def maybe_finalize_async_save(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Megatron asks in every iteration whether a save has ended, and waits for it only where it must."""
        if not bound.arguments.get("blocking"):
            return call()
        with self._contexts(lambda callback: callback.around_saving()):
            return call()

    def save_checkpoint_and_time(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Calls `save_checkpoint`, whatever this project has put around it."""
        with self._contexts(lambda callback: callback.around_saving()):
            return call()

    def evaluate_and_print_results(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Its prefix is the only thing that distinguishes the test set from the validation set."""
        self._split = "test" if "test set" in bound.arguments["prefix"] else "validation"
        return call()

    def evaluate(self, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Returns (losses, other results, whether time is up)."""
        with self._contexts(lambda callback: callback.around_evaluation(self._split)):
            result = call()
        for callback in self.callbacks:
            callback.after_evaluation(self._split, result[0] or {})
        return result

    def _contexts(self, of: Callable[[Callback], AbstractContextManager[None]]) -> ExitStack:
        """The callbacks' contexts, entered in their order; none before there is a run."""
        with ExitStack() as contexts:
            for callback in self.callbacks if self._running else ():
                contexts.enter_context(of(callback))
            return contexts.pop_all()


_LOOP_MODULE = "megatron.training.training"
_LOOP_NAMES = (
    "setup_model_and_optimizer",
    "train_step",
    "post_training_step_callbacks",
    "save_checkpoint",
    "maybe_finalize_async_save",
    "save_checkpoint_and_time",
    "evaluate_and_print_results",
    "evaluate",
)
_attached: _Loop | None = None  # Megatron's loop is one per process, and so is what listens to it
_modules: Modules | None = None  # what layers are built from; None until the flags are known
_reductions: LateGradients | None = None  # what data-parallel reductions go through


def attach(callbacks: Iterable[Callback]) -> None:
    """Have Megatron's loop call `callbacks`, in the order that each of them declares, in place of earlier ones.

    Raises:
        CompatError: this Megatron lacks a function that has to be hooked.
    """
    global _attached
    training = importlib.import_module(_LOOP_MODULE)
    missing = [name for name in _LOOP_NAMES if not hasattr(training, name)]
    if missing:
        raise CompatError(_is_missing(training, missing))
    for name in _LOOP_NAMES:
        rebind(training, name, functools.partial(_dispatching, name), key="loop")
    _attached = _Loop(callbacks)


def attach_checkpoints(saves: CheckpointSaves, loads: CheckpointLoads) -> None:
    """Put this project's saves and loads around Megatron's; after `attach`, so that they are around its callbacks too.

    Raises:
        CompatError: this Megatron lacks a function that has to be hooked.
    """
    from megatron_smartmoe.adapter.checkpoint.writer import hashing
    from megatron_smartmoe.adapter.gates import loading as gate_loading

    training = importlib.import_module(_LOOP_MODULE)
    checkpointing = importlib.import_module("megatron.training.checkpointing")
    strategies = "megatron.core.dist_checkpointing.strategies"
    serialization = importlib.import_module("megatron.core.dist_checkpointing.serialization")
    writer = importlib.import_module(f"{strategies}.filesystem_async").FileSystemWriterAsync
    key = "checkpoint"
    if hasattr(checkpointing, "maybe_msc"):
        replace_names(checkpointing, {"maybe_msc": saves.around_files(checkpointing.maybe_msc)})
    else:  # up to 0.18, which opens files through a function
        rebind(checkpointing, "open_file", functools.partial(_opening_through, saves), key=key)
    rebind(training, "save_checkpoint", saves.around_save_checkpoint, key=key)
    rebind(training, "maybe_finalize_async_save", saves.around_finalize, key=key)
    rebind(training, "load_checkpoint", loads.around_load_checkpoint, key=key)
    rebind(checkpointing.dist_checkpointing, "save", saves.around_dist_save, key=key)
    rebind(checkpointing.dist_checkpointing, "load", gate_loading.around_load, key=key)
    rebind(checkpointing, "_async_delete_checkpoint_impl", saves.around_delete, key=key)
    rebind(checkpointing, "ensure_directory_exists", saves.recorded, key=key)
    rebind(serialization, "save_config", saves.recorded, key=key)
    rebind(writer, "finish", saves.recorded, key=key)
    rebind(writer, "write_preloaded_data", hashing, key="checksum")
    rebind(writer, "write_preloaded_data", saves.noted, key=key)
    rebind(checkpointing.torch, "save", saves.recorded_if_legacy, key=key)


def _opening_through(saves: CheckpointSaves, open_file: Callable[..., Any]) -> Callable[..., Any]:
    """A function that opens files as `CheckpointSaves.around_files` has them opened."""
    files = saves.around_files(SimpleNamespace(open=open_file))
    return lambda *args, **kwargs: files.open(*args, **kwargs)


def end() -> None:
    """Call `on_end` of the attached callbacks. A collective call of all ranks."""
    for callback in _attached.callbacks if _attached is not None else ():
        callback.on_end()


def _dispatching(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Megatron's loop that goes through the method of the same name of the attached loop."""
    signature = inspect.signature(original)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original, *args, **kwargs)
        return call() if _attached is None else getattr(_attached, name)(call, signature.bind(*args, **kwargs))

    return wrapper


def rebind(
    module: ModuleType | type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], key: object = None
) -> None:
    """Replace `module.name` by `wrap(module.name)`; a second call with the same key does nothing.

    Args:
        module: where the name is looked up at call time; a class for a method.
        name: of a function.
        wrap: makes the replacement from the original.
        key: identifies the hook; hooks with different keys on one name are stacked.

    Raises:
        CompatError: the module has no such function; this Megatron is not supported.
    """
    original = getattr(module, name, None)
    if original is None:
        raise CompatError(_is_missing(module, [name]))
    hooks = getattr(original, _MARK, ())
    if key not in hooks:
        wrapper = functools.wraps(original)(wrap(original))
        setattr(wrapper, _MARK, (*hooks, key))
        setattr(module, name, wrapper)
        _note(module, name)


def replace_names(module: ModuleType | type, values: Mapping[str, object]) -> None:
    """Replace names of a module that are not functions to wrap.

    Args:
        module: where the names are looked up at call time; a class for its attributes.
        values: the new value of each name.

    Raises:
        CompatError: the module lacks some of them; this Megatron is not supported.
    """
    if missing := [name for name in values if not hasattr(module, name)]:
        raise CompatError(_is_missing(module, missing))
    for name, value in values.items():
        setattr(module, name, value)
        _note(module, name)


def replaced_names() -> tuple[str, ...]:
    """The full names of Megatron that this process has replaced so far, sorted."""
    return tuple(sorted(_replaced))


def _note(module: ModuleType | type, name: str) -> None:
    holder = f"{module.__module__}.{module.__qualname__}" if isinstance(module, type) else module.__name__
    _replaced.add(f"{holder}.{name}")


def _is_missing(module: ModuleType | type, names: Iterable[str]) -> str:
    full = ", ".join(f"{module.__name__}.{name}" for name in names)
    return (
        f"{full} = missing: the project hooks it, and this Megatron does not have it. "
        f"Use megatron-core {TESTED_RELEASE} (pip install megatron-core=={TESTED_RELEASE}), or a checkout of "
        f"{', '.join(TESTED_CHECKOUTS)}."
    )


def open_door(door: Door) -> None:
    """Put the door at the places of Megatron where a training script comes by, whoever wrote it.

    Raises:
        CompatError: this Megatron lacks one of them.
    """
    arguments = importlib.import_module("megatron.training.arguments")
    initialize = importlib.import_module("megatron.training.initialize")
    training = importlib.import_module(_LOOP_MODULE)
    key = "door"
    rebind(arguments, "add_megatron_arguments", door.around_add_arguments, key=key)
    rebind(arguments, "validate_args", door.around_validate, key=key)
    if hasattr(initialize, "validate_args"):  # up to 0.17, which imports it by name
        rebind(initialize, "validate_args", door.around_validate, key=key)
    rebind(training, "initialize_megatron", door.around_initialize, key=key)
    rebind(training, "pretrain", door.around_pretrain, key=key)
    package = importlib.import_module("megatron.training")
    if package.pretrain is not training.pretrain:  # which scripts import it from
        replace_names(package, {"pretrain": training.pretrain})
    if door.cpu:
        _run_on_cpu(training)
    _skip_compiled_helpers()


def use_modules(modules: Modules) -> None:
    """Have Megatron build layers from this project's modules where `modules` says so, until the next call.

    Raises:
        CompatError: this Megatron lacks a function that has to be hooked.
    """
    global _modules
    _modules = modules
    reduce_through(None)
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    maker = importlib.import_module("megatron.core.models.gpt.moe_module_specs")
    provider = importlib.import_module("megatron.core.models.backends").LocalSpecProvider
    for module in (maker, specs):  # the second has imported it from the first by name
        rebind(module, "get_moe_module_spec_for_backend", _through("moe_spec"), key="modules")
    rebind(provider, "layer_norm", _through("local_norm"), key="modules")
    rebind(provider, "core_attention", _through("local_attention"), key="modules")
    replace_names(specs, {"LNImpl": modules.local_norm(specs.LNImpl)})  # of the final norm
    buckets = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")._ParamAndGradBucketGroup
    for name in ("register_grad_ready", "start_grad_sync", "finish_grad_sync"):
        rebind(buckets, name, functools.partial(_reducing, name), key="modules")


def reduce_through(reductions: LateGradients | None) -> None:
    """Have the data-parallel reductions of gradients go through `reductions` from now on; None: as Megatron has them.

    Args:
        reductions: made for the layers that `use_modules` has put into the model.
    """
    global _reductions
    _reductions = reductions


def _reducing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a bucket group that goes through the method of the same name of the reductions in use."""

    def method(group: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original, group, *args, **kwargs)
        return call() if _reductions is None else getattr(_reductions, name)(call, group)

    return method


def modules_in_use() -> Modules | None:
    """What layers are built from; None until the flags are known."""
    return _modules


def _through(method: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper whose result goes through a method of the modules in use."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            return result if _modules is None else getattr(_modules, method)(result)

        return call

    return wrap


def listen(callbacks: Iterable[Callback]) -> _Loop:
    """Call `callbacks` for a loop that is not Megatron's, which says itself where it is."""
    global _attached
    _attached = _Loop(callbacks)
    return _attached


def prepare_megatron(*, cpu: bool) -> None:
    """Mend what stops the wheel's `megatron.training` from running outside NVIDIA's containers."""
    import megatron.training.training as training

    use_torch_adam()
    if not cpu:
        use_multi_tensor_clipping()
    complete_tokenizers()
    _repair_optimizer_checkpoints(training)
    _skip_compiled_helpers()
    _train_slots_with_muon()
    _take_delayed_gradients()
    _collect_write_results(cpu=cpu)
    if cpu:
        _run_on_cpu(training)
        _copy_before_background_writes()


def _run_on_cpu(training: ModuleType) -> None:
    """Megatron has a switch for it (`initialize_megatron`), and `pretrain` does not pass it on."""
    initialize, package = (importlib.import_module(f"megatron.training{part}") for part in (".initialize", ""))
    for module in (training, initialize, package):  # a loop of one's own may import it from any of them
        rebind(module, "initialize_megatron", lambda call: functools.partial(call, allow_no_cuda=True))


def _collect_write_results(*, cpu: bool) -> None:
    """Have a synchronous save collect its writers' results in the rank, where they are."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_smartmoe.adapter.checkpoint.writer import results_queue

    rebind(filesystem_async, "get_write_results_queue", functools.partial(results_queue, cpu=cpu))


def _copy_before_background_writes() -> None:
    """On CPU ranks: fork the writer in the background, which needs the facade, and have it copy tensors first.

    It would share their memory with the training. Megatron starts another one for a save after the last step.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_smartmoe.adapter.checkpoint.writer import copying_in_background

    preload = copying_in_background(FileSystemWriterAsync.preload_tensors)
    replace_names(FileSystemWriterAsync, {"preload_tensors": staticmethod(preload)})
    start = PersistentAsyncCaller._get_process.__func__

    def forked(cls: type, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return start(cls, rank, "fork", *args, **kwargs)

    replace_names(PersistentAsyncCaller, {"_get_process": classmethod(forked)})


def _repair_optimizer_checkpoints(training: ModuleType) -> None:
    """Save optimizer state of several buckets right, and refuse what was saved wrong."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_smartmoe.adapter.repairs import bucket_padding, main_weights

    if bucket_padding.verdict(getattr(DistributedOptimizer, bucket_padding.METHOD, None)) is (
        bucket_padding.Verdict.FAULTY
    ):
        rebind(DistributedOptimizer, bucket_padding.METHOD, bucket_padding.repair, key="bucket padding")
    check = main_weights.MainWeightsCheck()
    rebind(DistributedOptimizer, main_weights.LOAD_METHOD, check.around_load_state, key="main weights")
    rebind(training, "load_checkpoint", check.around_load_checkpoint, key="main weights")


def use_torch_adam() -> None:
    """Give Megatron `TorchAdam` where it would fall back to torch's AdamW; does nothing where FusedAdam is installed.

    These names of `megatron.core.optimizer` hold which Adam was found; all are read when the optimizer is built.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    from megatron_smartmoe.adapter.local.adam import TorchAdam

    if optimizer.USING_PYTORCH_OPTIMIZER:
        replace_names(optimizer, {"Adam": TorchAdam, "USING_PYTORCH_OPTIMIZER": False})
        replace_names(distrib_optimizer, {"Adam": TorchAdam, "HAVE_APEX_OR_TE": True, "USING_APEX_OPTIMIZER": True})


def use_multi_tensor_clipping() -> None:
    """Give Megatron norm and scale without host waits where it would fall back to its own, which wait for each tensor.

    These names hold what was found; all are read when they are called.
    """
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer

    from megatron_smartmoe.adapter.local import multi_tensor

    if clip_grads.l2_norm_impl.__module__ == "megatron.core.utils":
        replace_names(clip_grads, {"l2_norm_impl": multi_tensor.l2_norm, "multi_tensor_scale_impl": multi_tensor.scale})
        replace_names(optimizer, {"multi_tensor_scale_impl": multi_tensor.scale})


def _train_slots_with_muon() -> None:
    """Let Muon and its like take experts in slots for matrices; does nothing without emerging-optimizers."""
    import megatron.core.optimizer as optimizer

    from megatron_smartmoe.adapter.local import muon

    if importlib.util.find_spec(muon.MEGATRONS_REGISTRY) is None:
        return  # an older release, with which --optimizer muon is refused
    from megatron.core.optimizer import emerging_optimizers, layer_wise_optimizer

    if not emerging_optimizers.HAVE_EMERGING_OPTIMIZERS:
        return
    key = "slots"
    rebind(emerging_optimizers.TensorParallelMuon, "orthogonalize", muon.orthogonalize_slots, key=key)
    for module in (optimizer, layer_wise_optimizer):
        rebind(module, "is_managed_by_layer_wise_optimizer", muon.with_matrices, key=key)
    rebind(emerging_optimizers, "_is_nonlinear_or_embedding", muon.without_matrices, key=key)
    is_for_adam = emerging_optimizers._is_nonlinear_or_embedding
    for entry in emerging_optimizers._EMERGING_OPTIMIZERS.values():  # their rules hold the function itself
        entry.default_param_overrides = {
            replace(param, predicate=replace(param.predicate, fn=is_for_adam)): override
            for param, override in entry.default_param_overrides.items()
        }


def _take_delayed_gradients() -> None:
    """Have Megatron's data parallelism take weight gradients that are computed later when they are there."""
    from megatron.core.distributed import DistributedDataParallel

    from megatron_smartmoe.adapter.moe.delayed_gradients import taken_when_there

    rebind(DistributedDataParallel, "__init__", taken_when_there)


def complete_tokenizers() -> None:
    """Let Hugging Face's and GPT-2's tokenizers work without transformers, and TikTokenizer read others' files."""
    import megatron.core.tokenizers.text.libraries as libraries
    import megatron.core.tokenizers.text.libraries.tiktoken_tokenizer as tiktoken_tokenizer

    from megatron_smartmoe.adapter.local import huggingface, tiktoken

    rebind(libraries, "HuggingFaceTokenizer", huggingface.choose_class)
    rebind(libraries, "MegatronHFTokenizer", huggingface.choose_gpt2_class)
    replace_names(libraries, {"TikTokenTokenizer": tiktoken.CompleteTikTokenizer})
    rebind(tiktoken_tokenizer, "reload_mergeable_ranks", tiktoken.around_reload)


def loop_module() -> Any:
    """Megatron's module of the loop, for a process that calls what the loop calls, and trains nothing."""
    return importlib.import_module(_LOOP_MODULE)


def keep_views() -> None:
    """Leave views as they are, in a process that rehearses: Megatron gives them a storage, and these have none."""
    import megatron.core.utils as utils

    rebind(utils, "_kernel_make_viewless_tensor", lambda call: lambda view, requires_grad: view, key="views")


def _skip_compiled_helpers() -> None:
    """Megatron runs `make` for its dataset helper at every start; the wheel carries it compiled, and no Makefile."""
    import megatron.core.datasets.utils as utils

    folder = Path(utils.__file__).parent
    compiled = [path.stat().st_mtime for path in folder.glob("helpers_cpp*.so")]
    is_checkout = (folder / "Makefile").exists()
    if is_checkout and (not compiled or max(compiled) < (folder / "helpers.cpp").stat().st_mtime):
        return  # `make` has work to do
    rebind(utils, "compile_helpers", lambda call: lambda: None)
