"""How the tokens of a simulation are routed and travel: the router's groups of experts, and the dispatcher.

Both decide what homes do. Under group-limited routing they move between nodes by whole groups, and with two hops the
traffic that they are priced with is that of a token once per node. A flag counts before the model's file, and that
before what the trace says of the run that recorded it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_smartmoe.cost.dispatch import FLAT_DISPATCH, TokenDispatch
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import DISPATCHES, FLAT
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.trace import RoutingTrace

_MOST = 65_536
# Keys of a decision file, which repeats them where they are not as before they existed, and what they were then.
BEFORE: dict[str, Any] = {"dispatch": FLAT, "router_topk": None, "router_num_groups": 1}


def settings(dispatch: TokenDispatch, num_groups: int) -> dict[str, Any]:
    """What a decision file repeats of them."""
    top_k = None if dispatch.name == FLAT else dispatch.top_k
    found = {"dispatch": dispatch.name, "router_topk": top_k, "router_num_groups": num_groups}
    return {key: value for key, value in found.items() if value != BEFORE[key]}


def take(saved: Mapping[str, Any], options: argparse.Namespace, field: str) -> None:
    """Give `options` the values of a decision file.

    Args:
        saved: its first line.
        options: with the flags of `add_arguments`.
        field: before the name of a key, in errors.

    Raises:
        ConfigError: a value that no file has.
    """
    found = {key: saved.get(key, before) for key, before in BEFORE.items()}
    if found["dispatch"] not in DISPATCHES:
        rule = f"must be {' or '.join(DISPATCHES)}"
        raise ConfigError(f"{field}dispatch", found["dispatch"], rule, "Make the file again.")
    for key in ("router_topk", "router_num_groups"):
        if found[key] is not None:
            values.whole(found[key], f"{field}{key}", least=1, most=_MOST)
    vars(options).update(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the parser of the tool."""
    text = "flat: a token is sent once for each of its experts; hierarchical: between nodes once for each node "
    parser.add_argument("--dispatch", choices=DISPATCHES, default=FLAT, help=text + "(default: flat)")
    text = "experts of a token, for --dispatch hierarchical (default: of --model, else of the trace)"
    parser.add_argument("--router-topk", type=int, metavar="K", help=text)
    text = "groups of experts of a router with --moe-router-group-topk, which homes keep whole on nodes; 1 for none "
    text += "(default: of --model, else of the trace)"
    parser.add_argument("--router-num-groups", type=int, metavar="N", help=text)


def routing_of(
    options: argparse.Namespace, trace: RoutingTrace, model: ModelSpec | None, num_nodes: int
) -> tuple[TokenDispatch, int]:
    """How tokens travel, and the groups of group-limited routing, 1 for routing without.

    Args:
        options: with the flags of `add_arguments`.
        trace: what is replayed.
        model: of --model.
        num_nodes: nodes of a group.

    Raises:
        ConfigError: one line for the value that is missing or cannot be.
    """
    of_model = None if model is None else model.moe.routing_groups
    groups, field = _first(options.router_num_groups, "--router-num-groups", trace, "num_groups", of_model)
    if groups is not None:
        groups = values.whole(groups, field, least=1, most=_MOST)
        if trace.num_experts % groups:
            rule = f"must divide the trace's {trace.num_experts} experts"
            raise ConfigError(field, groups, rule, "Pass --router-num-groups 1 for routing without groups.")
    if options.dispatch == FLAT:
        if options.router_topk is not None:
            rule = "is for --dispatch hierarchical: a flat dispatch sends every choice"
            raise ConfigError("--router-topk", options.router_topk, rule, "Remove it.")
        return FLAT_DISPATCH, groups or 1
    if num_nodes == 1:
        rule = "needs a group on several nodes: tokens cross no slow link"
        raise ConfigError("--dispatch", options.dispatch, rule, "Pass --nodes 2 or more, or --dispatch flat.")
    of_model = None if model is None else model.moe.top_k
    top_k, field = _first(options.router_topk, "--router-topk", trace, "top_k", of_model)
    if top_k is None:
        rule = "is required with --dispatch hierarchical: the trace does not say how many experts a token has"
        raise ConfigError("--router-topk", None, rule, "For example: --router-topk 8.")
    top_k = values.whole(top_k, field, least=1, most=trace.num_experts)
    return TokenDispatch(name=options.dispatch, experts=trace.num_experts, top_k=top_k), groups or 1


def _first(flag: int | None, name: str, trace: RoutingTrace, key: str, of_model: int | None) -> tuple[Any, str]:
    """The flag's value, the model's or the trace's, and what an error calls it; None where none has it."""
    if flag is not None:
        return flag, name
    if of_model is not None:
        return of_model, name
    return trace.meta.get(key), f"--trace: meta {key}"
