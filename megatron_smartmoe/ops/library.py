"""Gives every op its implementation under torch.ops.smartmoe, once, when megatron_smartmoe.ops is imported.

Method: load the compiled library where there is one; where there is none, define the ops in torch and let the twins of
reference.py serve them. A caller sees the same torch.ops names either way, and the fallback warns.
Alternative: build at the first import, which hides the compiling and its failure inside a job, on every node at once.
Reason: a job must start at once and the same way everywhere, and a slow op must be found by reading the log.

An op is one name in five places: SCHEMAS here, csrc/ops.cpp, reference.py, fake.py and its kernels; one with a
gradient is in autograd.py too. The host ops have no twin in torch: theirs are the numpy functions of
megatron_smartmoe.placement, which this package may not import (the two are siblings). Without the compiled library they
raise a RuntimeError with the command that builds it.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_smartmoe.errors import CompatError
from megatron_smartmoe.ops import autograd, fake, reference

LIBRARY = Path(__file__).with_name("_smartmoe.so")
NAMESPACE = "smartmoe"
_REFERENCE = "torch reference"
SCHEMAS = {
    "digest_sum": "(Tensor bits_N, Tensor positions_L, int width, int value_factor) -> int",
    "min_max_split": "(Tensor counts_RE, Tensor hosts_ER) -> Tensor",
    "exact_replicas": "(Tensor load_E, Tensor slots_RS, int home_slots, int num_nodes, int trials) -> Tensor",
    "exact_split": "(Tensor counts_RE, int spare_slots, int num_nodes) -> (Tensor, Tensor)",
    "history_replicas": "(Tensor slots_RS, Tensor loads_KE, int home_slots, int num_nodes, bool many, int max_steps, "
    "int max_experts, int max_slots, int trials, float good_enough, float worst_weight, float replica_price, "
    "float change_price, float min_gain, float enough) -> (Tensor, Tensor, Tensor)",
    "swap_homes": "(Tensor slots_RS, Tensor loads_KE, int home_slots, int num_nodes, int max_steps, int max_experts, "
    "int max_slots, int trials, float worst_weight, float replica_price, float change_price, float home_price, "
    "float min_gain, float enough) -> (Tensor, Tensor, Tensor)",
    "paying_replicas": "(Tensor loads_KE, Tensor slots_RS, int home_slots, Tensor price_23, int num_nodes) -> Tensor",
    "exact_plan": "(Tensor load_E, Tensor slots_RS, int home_slots, int scope_nodes, bool or_group, float limit, "
    "Tensor price_23, int num_nodes) -> (Tensor, int)",
    "relay_tree": "(Tensor slots_RS, int home_slots, int num_nodes) -> Tensor",
    "relayed_flow": "(Tensor counts_RE, Tensor slots_RS, int home_slots, int num_nodes, Tensor? kept_RS) -> "
    "(Tensor, Tensor, Tensor)",
    "plan_dispatch": "(Tensor counts_RPE, Tensor(a!) slots_RS, int home_slots, int num_nodes, int rank, int tp_rank, "
    "int? used_slots, int scope_nodes, bool or_group, float limit, Tensor price_23, Tensor(b!) plan) -> ()",
    "dispatch_map": "(Tensor ids_TK, Tensor slot_of_E, int num_slots) -> (Tensor, Tensor)",
    "permute": "(Tensor x_TH, Tensor rows_TK, int num_rows) -> Tensor",
    "permute_joined": "(Tensor x_TH, Tensor more_TH, Tensor rows_TK, int num_rows) -> Tensor",
    "permute_packed": "(Tensor x_TH, Tensor weights_TK, Tensor? more_TH, Tensor? more_weights_TK, Tensor rows_TK, "
    "int num_rows) -> Tensor",
    "unpermute": "(Tensor y_NH, Tensor rows_TK, Tensor? weights_TK) -> Tensor",
    "unpermute_backward": "(Tensor grad_TH, Tensor y_NH, Tensor rows_TK, Tensor weights_TK) -> (Tensor, Tensor)",
    "swiglu": "(Tensor inner_NG, Tensor probs_N) -> Tensor",
    "swiglu_backward": "(Tensor grad_NF, Tensor inner_NG, Tensor probs_N) -> (Tensor, Tensor)",
    "permute_weighted": "(Tensor x_TH, Tensor weights_TK, Tensor rows_TK, int num_rows) -> (Tensor, Tensor)",
    "permute_weighted_backward": "(Tensor grad_NH, Tensor grad_N, Tensor rows_TK) -> (Tensor, Tensor)",
    "chosen_experts": "(Tensor routing_map_TE, Tensor probs_TE, int top_k) -> (Tensor, Tensor)",
    "chosen_experts_backward": "(Tensor grad_TK, Tensor ids_TK, int num_experts) -> Tensor",
    "chunk_rows": "(Tensor counts_QS, int num_rows) -> (Tensor, Tensor)",
    "zero_empty_groups": "(Tensor(a!) grad_SMK, Tensor ends_S) -> ()",
}
# compiled only, and on CPU tensors only but for exact_split
HOST_OPS = frozenset(
    {
        "digest_sum",
        "min_max_split",
        "exact_plan",
        "exact_replicas",
        "exact_split",
        "history_replicas",
        "paying_replicas",
        "plan_dispatch",
        "relay_tree",
        "relayed_flow",
        "swap_homes",
    }
)
# how users build it, relative to a checkout
BUILD_COMMAND = "python megatron_smartmoe/ops/_build.py"


class SlowOpsWarning(UserWarning):
    """An op is served by plain torch although a kernel for it exists."""


_torch: Any = torch  # torch.ops is dynamic, and torch.library has no annotations


def _warn(text: str) -> None:
    # once per node, not per rank: a library may be missing on one node only
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(text, SlowOpsWarning, stacklevel=2)


def warn_on_first_call(name: str, twin: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `twin` with a warning at its first call that it stands in for the CUDA kernel `name`."""

    @functools.cache
    def warn_once() -> None:
        _warn(
            f"{LIBRARY.name} has no CUDA kernels: smartmoe::{name} on a GPU is served by the torch reference. "
            f"Build it where nvcc is: SMARTMOE_CUDA=1 {BUILD_COMMAND}"
        )

    @functools.wraps(twin)
    def serve(*args: Any) -> Any:
        warn_once()
        return twin(*args)

    return serve


def _refuse(text: str) -> Callable[..., Any]:
    """Returns an implementation that raises a RuntimeError with this text."""

    def serve(*args: Any) -> Any:
        raise RuntimeError(text)

    return serve


def host_text(name: str) -> str:
    """The error of a host op that is called with CUDA tensors."""
    return f"smartmoe::{name} runs on the host: its tensors must be on the CPU. Convert them with .cpu()"


def _register_host_op(owner: Any, name: str, compiled: bool) -> None:
    """Registers errors where a host op cannot run: without the compiled library, and on CUDA tensors."""
    if not compiled:
        owner.define(name + SCHEMAS[name])
        owner.impl(
            name,
            _refuse(
                f"{LIBRARY.name} is not built: smartmoe::{name} has no torch reference to serve it. "
                f"Build it: {BUILD_COMMAND}"
            ),
            "CPU",
        )
    if not _has_kernel(name, "CUDA"):
        owner.impl(name, _refuse(host_text(name)), "CUDA")


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))


def _load(library: Path) -> None:
    """Loads the compiled library and checks that it has the ops that this package expects.

    Raises:
        CompatError: the file cannot be loaded, or was built from other sources.
    """
    way_out = f"Rebuild it: {BUILD_COMMAND} (or delete it to use the torch reference)"
    try:
        _torch.ops.load_library(str(library))
    except OSError as error:
        raise CompatError(f"{library} cannot be loaded: {error}. {way_out}") from error
    for name, schema in SCHEMAS.items():
        packet = getattr(_torch.ops.smartmoe, name, None)
        found = str(packet.default._schema) if packet else "nothing"
        if found != f"{NAMESPACE}::{name}{schema}":
            raise CompatError(
                f"{library} has {found} for smartmoe::{name}{schema}: it is of another version. {way_out}"
            )


def _register() -> tuple[Any, str]:
    """Registers what the library does not bring; returns the owner of the registrations and what serves the ops."""
    compiled = LIBRARY.exists()
    if compiled:
        _load(LIBRARY)
    else:
        _warn(
            f"{LIBRARY.name} is not built: the ops are served by the torch reference, slowly. Build it: {BUILD_COMMAND}"
        )
    owner = _torch.library.Library(NAMESPACE, "FRAGMENT")
    backend = "compiled (cpu)" if compiled else _REFERENCE
    for name, schema in SCHEMAS.items():
        if name in HOST_OPS:
            _register_host_op(owner, name, compiled)
        elif not compiled:
            owner.define(name + schema)
            owner.impl(name, getattr(reference, name), "CPU")
            owner.impl(name, getattr(reference, name), "CUDA")
        elif _has_kernel(name, "CUDA"):
            backend = "compiled (cpu+cuda)"
        else:
            owner.impl(name, warn_on_first_call(name, getattr(reference, name)), "CUDA")
        _torch.library.register_fake(f"{NAMESPACE}::{name}", getattr(fake, name), lib=owner)
    for name, (backward, save) in autograd.FORMULAS.items():
        _torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=save, lib=owner)
    return owner, backend


_OWNER, _BACKEND = _register()  # the registrations live as long as their owner


def backend() -> str:
    """Returns "compiled (cpu+cuda)", "compiled (cpu)" (torch serves GPU tensors) or "torch reference"."""
    return _BACKEND


def is_compiled() -> bool:
    """Returns whether the compiled library serves the host ops, which have no twin in torch."""
    return _BACKEND != _REFERENCE
