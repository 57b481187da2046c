"""Where the project enters Megatron's training loop: a handful of names, rebound once at start-up.

Megatron has no callback registry, but `pretrain` and `train` look their helpers up as globals of
`megatron.training.training` at call time. Rebinding one of those names is therefore a hook that survives releases as
long as the name exists; a missing name is an error at start-up, never a silent skip. The other ways, a copy of the
loop or a patched tree, have to be redone for every release.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from megatron_smartmoe.errors import CompatError

_MARK = "__smartmoe__"  # on a wrapper: the keys of all hooks that it and the wrappers below it stand for


def rebind(
    module: ModuleType, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], key: object = None
) -> None:
    """Replace `module.name` by `wrap(module.name)`; a second call with the same key does nothing.

    Args:
        module: where the name is looked up at call time.
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


def replace_names(module: ModuleType, values: Mapping[str, object]) -> None:
    """Replace names of a module that are not functions to wrap.

    Args:
        module: where the names are looked up at call time.
        values: the new value of each name.

    Raises:
        CompatError: the module lacks one of them; this Megatron is not one that the project knows.
    """
    for name, value in values.items():
        if not hasattr(module, name):
            raise CompatError(
                f"{module.__name__}.{name} does not exist in this Megatron, and the project replaces it. "
                "Use megatron-core 0.19.2 (pip install megatron-core==0.19.2)."
            )
        setattr(module, name, value)


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

    use_torch_adam()
    _skip_compiled_helpers()
    if cpu:  # Megatron has this switch (`initialize_megatron`), and `pretrain` does not pass it on
        rebind(training, "initialize_megatron", lambda call: functools.partial(call, allow_no_cuda=True))


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


def use_torch_prediction_blocks() -> None:
    """Give layers of multi-token prediction this project's torch modules; see `layer_spec.wrap_mtp_block_spec`."""
    import megatron.training.models.gpt as gpt

    from megatron_smartmoe.adapter.moe.layer_spec import wrap_mtp_block_spec

    rebind(gpt, "mtp_block_spec", wrap_mtp_block_spec)


def _skip_compiled_helpers() -> None:
    """Megatron runs `make` for its dataset helper at every start; the wheel carries it compiled, and no Makefile."""
    import megatron.core.datasets.utils as utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return  # a source checkout: `make` has work to do
    rebind(utils, "compile_helpers", lambda call: lambda: None)
