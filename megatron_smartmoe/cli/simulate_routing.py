"""How the tokens of a simulation are routed and travel: the router's groups of experts, and the dispatcher.

Both decide what homes do. Under group-limited routing they move between nodes by whole groups, and the dispatcher
decides which traffic they are priced with. A flag counts before the model's file, and that before what the trace says
of the run that recorded it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_smartmoe.cost.dispatchers import ALL_TO_ALL, DISPATCHERS, Dispatcher
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.trace import RoutingTrace

_MOST = 65_536
# Keys of a decision file, which repeats them where they are not as before they existed, and what they were then.
_BEFORE: dict[str, Any] = {"dispatcher": ALL_TO_ALL.name, "top_k": None, "router_num_groups": 1}


def settings(dispatcher: Dispatcher, num_groups: int) -> dict[str, Any]:
    """What a decision file repeats of them."""
    top_k = None if dispatcher == ALL_TO_ALL else dispatcher.top_k
    found = {"dispatcher": dispatcher.name, "top_k": top_k, "router_num_groups": num_groups}
    return {key: value for key, value in found.items() if value != _BEFORE[key]}


def take(saved: Mapping[str, Any], options: argparse.Namespace, field: str) -> None:
    """Give `options` the values of a decision file.

    Args:
        saved: its first line.
        options: with the flags of `add_arguments`.
        field: before the name of a key, in errors.

    Raises:
        ConfigError: a value that no file has.
    """
    found = {key: saved.get(key, before) for key, before in _BEFORE.items()}
    if found["dispatcher"] not in DISPATCHERS:
        rule = f"must be one of {', '.join(DISPATCHERS)}"
        raise ConfigError(f"{field}dispatcher", found["dispatcher"], rule, "Make the file again.")
    for key in ("top_k", "router_num_groups"):
        if found[key] is not None:
            values.whole(found[key], f"{field}{key}", least=1, most=_MOST)
    vars(options).update(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the parser of the tool."""
    text = "--moe-token-dispatcher-type that is priced, or hierarchical for --smartmoe-dispatch hierarchical (default: "
    text += "alltoall, a row for each chosen expert)"
    parser.add_argument("--dispatcher", choices=DISPATCHERS, default=ALL_TO_ALL.name, help=text)
    text = "with another --dispatcher than alltoall: experts of a token (default: of --model, else as the trace says)"
    parser.add_argument("--top-k", type=int, metavar="K", help=text)
    text = "groups of experts of a router with --moe-router-group-topk, which homes keep whole on nodes; 1 for none "
    text += "(default: of --model, else as the trace says)"
    parser.add_argument("--router-num-groups", type=int, metavar="N", help=text)


def dispatcher_of(
    options: argparse.Namespace, trace: RoutingTrace, model: ModelSpec | None, num_nodes: int
) -> Dispatcher:
    """What sends the tokens.

    Args:
        options: with the flags of `add_arguments`.
        trace: what is replayed.
        model: of --model.
        num_nodes: nodes of a group.

    Raises:
        ConfigError: one line for the value that is missing or cannot be.
    """
    if options.dispatcher == ALL_TO_ALL.name:
        if options.top_k is not None:
            rule = "decides nothing for --dispatcher alltoall, which sends a row for each chosen expert"
            raise ConfigError("--top-k", options.top_k, rule, "Remove it, or pass another --dispatcher.")
        return ALL_TO_ALL
    if options.dispatcher == "hierarchical" and num_nodes == 1:
        rule = "needs a group on several nodes: on one, tokens cross no slow link"
        raise ConfigError("--dispatcher", options.dispatcher, rule, "Pass --nodes 2 or more, or alltoall.")
    of_model = None if model is None else model.moe.top_k
    top_k, field = _first(options.top_k, "--top-k", trace, "top_k", of_model)
    if top_k is None:
        rule = f"is required by --dispatcher {options.dispatcher}: the trace does not say how many experts a token has"
        raise ConfigError("--top-k", None, rule, "For example: --top-k 8.")
    top_k = values.whole(top_k, field, least=1, most=trace.num_experts)
    return Dispatcher(name=options.dispatcher, experts=trace.num_experts, top_k=top_k)


def groups_of(options: argparse.Namespace, trace: RoutingTrace, model: ModelSpec | None) -> int:
    """Groups of group-limited routing, 1 for routing without.

    Args:
        options: with the flags of `add_arguments`.
        trace: what is replayed.
        model: of --model.

    Raises:
        ConfigError: a number that the experts cannot be divided into.
    """
    of_model = None if model is None else model.moe.routing_groups
    groups, field = _first(options.router_num_groups, "--router-num-groups", trace, "num_groups", of_model)
    if groups is None:
        return 1
    groups = values.whole(groups, field, least=1, most=_MOST)
    if trace.num_experts % groups:
        rule = f"must divide the trace's {trace.num_experts} experts"
        raise ConfigError(field, groups, rule, "Pass --router-num-groups 1 for routing without groups.")
    return groups


def _first(flag: int | None, name: str, trace: RoutingTrace, key: str, of_model: int | None) -> tuple[Any, str]:
    """The flag's value, the model's or the trace's, and what an error calls it; None where none has it."""
    if flag is not None:
        return flag, name
    if of_model is not None:
        return of_model, name
    return trace.meta.get(key), f"--trace: meta {key}"
