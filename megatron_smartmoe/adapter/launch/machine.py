"""What `--parallel auto` needs beside the flags: the cluster file, a rank's memory, the size of the vocabulary."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.adapter.tokenizers.load import facts_of
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.run import RunSpec

_SAME_MEMORY = 0.9  # share of the file's memory; a device with less is another product
_EXTRA_TOKENS = {"NullTokenizer": 1}  # tokens that a tokenizer adds to --vocab-size


def find_machine(args: Namespace, topology: Topology, *, cpu: bool) -> tuple[ClusterSpec, str]:
    """The cluster file of this machine with the job's nodes and ranks, and the source of a rank's memory.

    Raises:
        ConfigError: there are several nodes, and a GPU has less memory than in the file.
    """
    from megatron_smartmoe.adapter.cost_inputs import machine

    cluster = machine(args)
    cluster = replace(cluster, nodes=topology.num_nodes, gpus_per_node=topology.ranks_per_node)
    file = f"cluster file {cluster.name}"
    if cpu:
        return cluster, file
    device_bytes, file_bytes = device_memory_bytes(topology.ranks_per_node), cluster.gpu.memory_bytes
    if topology.num_nodes > 1:  # each node plans by itself, and must plan with the same memory as the others
        if device_bytes < _SAME_MEMORY * file_bytes:
            rule = f"the GPUs here have {device_bytes / 1e9:.1f} GB, and in {file} they have {file_bytes / 1e9:.1f} GB"
            way_out = "Pass --smartmoe-cluster FILE with this memory_bytes, the same on every node; "
            way_out += "smartmoe calibrate writes one."
            raise ConfigError("--smartmoe-cluster", args.smartmoe_cluster, rule, way_out)
        return cluster, file
    if args.smartmoe_cluster is not None and file_bytes <= device_bytes:  # a user may leave room for others
        return cluster, file
    return replace(cluster, gpu=replace(cluster.gpu, memory_bytes=float(device_bytes))), "the device's own"


def device_memory_bytes(ranks: int) -> int:
    """The smallest memory among the devices of this node's ranks."""
    import torch

    return min(int(torch.cuda.get_device_properties(at).total_memory) for at in range(ranks))


def vocabulary(spec: RunSpec, args: Namespace) -> int:
    """Entries of the vocabulary: those of the flags, of the corpus to prepare, else of the tokenizer's file.

    In this order, so that a node that starts while another one prepares the corpus plans for the same size.

    Raises:
        ConfigError: none of them has it.
    """
    if getattr(args, "padded_vocab_size", None):
        return int(args.padded_vocab_size)
    if args.vocab_size:
        return int(args.vocab_size) + _EXTRA_TOKENS.get(args.tokenizer_type, 0)
    if spec.data is not None and spec.data.get("vocab-size"):
        return int(spec.data["vocab-size"])
    facts = facts_of(args) if args.tokenizer_model else None
    if facts is not None:
        return facts.vocab_size
    rule = "is required by --parallel auto, which cannot read the size of this kind of tokenizer"
    raise ConfigError("--vocab-size", None, rule, "Pass the tokenizer's number of entries, for example 32000.")
