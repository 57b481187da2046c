"""Where the project enters Megatron's training loop: a handful of names, rebound once at start-up.

Megatron has no callback registry, but `pretrain` and `train` look their helpers up as globals of
`megatron.training.training` at call time. Rebinding one of those names is therefore a hook that survives releases as
long as the name exists; a missing name is an error at start-up, never a silent skip. The other ways, a copy of the
loop or a patched tree, have to be redone for every release.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_smartmoe.errors import CompatError

_MARK = "__smartmoe__"  # on a wrapper: the keys of all hooks that it and the wrappers below it stand for


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
        CompatError: the module has no such function; this Megatron is not one that the project knows.
    """
    original = getattr(module, name, None)
    if original is None:
        raise CompatError(
            f"{module.__name__}.{name} does not exist in this Megatron, and the project hooks it. "
            "Use megatron-core 0.19.0 (pip install megatron-core==0.19.0)."
        )
    hooks = getattr(original, _MARK, ())
    if key not in hooks:
        wrapper = functools.wraps(original)(wrap(original))
        setattr(wrapper, _MARK, (*hooks, key))
        setattr(module, name, wrapper)


def after(module: ModuleType, name: str, callback: Callable[..., None]) -> None:
    """Call `callback(result, *args, **kwargs)` after each call of `module.name`; its result is passed on."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            callback(result, *args, **kwargs)
            return result

        return wrapper

    rebind(module, name, wrap, ("after", callback))


def before(module: ModuleType, name: str, callback: Callable[..., None]) -> None:
    """Call `callback(*args, **kwargs)` before each call of `module.name`."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            callback(*args, **kwargs)
            return original(*args, **kwargs)

        return wrapper

    rebind(module, name, wrap, ("before", callback))


def prepare_megatron(*, cpu: bool) -> None:
    """Mend what stops the wheel's `megatron.training` from running outside NVIDIA's containers."""
    import megatron.training.training as training

    from megatron_smartmoe.adapter.local import adam

    adam.install()
    _repair_optimizer_checkpoints(training)
    _skip_compiled_helpers()
    if cpu:  # Megatron has this switch (`initialize_megatron`), and `pretrain` does not pass it on
        rebind(training, "initialize_megatron", lambda call: functools.partial(call, allow_no_cuda=True))


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


def _skip_compiled_helpers() -> None:
    """Megatron runs `make` for its dataset helper at every start; the wheel carries it compiled, and no Makefile."""
    import megatron.core.datasets.utils as utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return  # a source checkout: `make` has work to do
    rebind(utils, "compile_helpers", lambda call: lambda: None)
