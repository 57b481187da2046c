"""ClusterSpec: machines and links, read from a cluster file (configs/clusters/*.yaml), and the files that are shipped.

```yaml
name: 2x8-a100
nodes: 2
gpus_per_node: 8
replica_scope: auto            # auto: replicas leave the node of their home where that pays; node: never; group: freely
gpu:
  name: A100-SXM4-80GB
  devices: [NVIDIA A100-SXM4-80GB]   # optional: the driver's names of GPUs that the file is for
  capability: '8.0'                  # optional: compute capability, by which a GPU without a file finds the nearest
  peak_flops: {value: 312e12, source: NVIDIA A100 datasheet, bf16 dense}
  memory_bytes: {value: 80e9, source: NVIDIA A100 datasheet}
  memory_bandwidth_bytes_s: {value: 2.039e12, source: NVIDIA A100 datasheet}
intra_node: {bandwidth_bytes_s: {value: 300e9, source: ...}, latency_s: {value: 3e-6, source: ...}}
inter_node: {bandwidth_bytes_s: {value: 25e9, source: ...}, latency_s: {value: 10e-6, source: ...}}
levels:                        # optional: what lies above the nodes, the smallest domains first
  - name: leaf                 # such as rack, leaf, pod, spine, supernode
    nodes: 4                   # consecutive nodes of one domain
    bandwidth_bytes_s: {value: 12.5e9, source: ...}   # out of a domain, one GPU's share of it; narrower outward
    latency_s: {value: 15e-6, source: ...}
efficiency:                    # optional: shares of the peaks above that training reaches
  gemm: {value: 0.62, source: ...}
```

`inter_node` is the way out of a node: one GPU's share of the node's cards. Each level is the way out of a domain of
several nodes, which is narrower where switches are oversubscribed: with two ports down for each one up, half of what
the cards carry. `replica_scope` may also be the name of a level: replicas then stay in their home's domain of it.

Every hardware number has its source beside it: a prediction is as good as its constants. The numbers are plain
attributes (`cluster.gpu.peak_flops`); their sources are in `cluster.sources`, by dotted path.

A datasheet states peaks, of which training reaches a share; a measured rate is reached in full. `efficiency` says
which it is: a share that is named there replaces the cost model's prior (`cost.moe_layer`, `cost.step.constants`), so a
measured number (share 1) is discounted nowhere. A file without the section keeps every prior. The alternative, to
divide measured numbers by the priors, writes peaks that were never observed and that change meaning with the priors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.yaml_io import (
    dump_yaml,
    find_config,
    load_yaml,
    located,
    refuse_unknown_keys,
    shipped_directory,
)

ReplicaScope = str  # auto, node, group, or the name of a level
SCOPES = ("auto", "node", "group")  # those that every cluster has

SHARES = (
    "gemm",
    "attention",
    "memory",
    "ring_intra",
    "ring_inter",
    "all_reduce_intra",
    "all_reduce_inter",
    "all_to_all_intra",
    "all_to_all_inter",
)
WEIGHT_PASSES = 3.0  # of an expert's weights through memory: read forward, read backward, gradient written
RESERVED_BYTES = 3e9  # bytes for the CUDA context, NCCL's buffers and cuBLAS workspaces: an estimate
_OPTIONAL_GPU = ("weight_passes", "reserved_bytes", "ranks_per_device")
_KNOWN = ("name", "nodes", "gpus_per_node", "gpu", "intra_node", "inter_node", "replica_scope", "levels", "efficiency")
_LINK = ("bandwidth_bytes_s", "latency_s")
_LEVEL = ("name", "nodes", *_LINK)
_OF_LEVEL = ("ring", "all_reduce", "all_to_all")  # operations with a share of a level's bandwidth
_OPTIONAL_LINK = ("ring_latency_s", "all_to_all_latency_s")

_MOST_MACHINES = 10**6
_WIDER = 1.1  # a level that is so many times as wide as what lies inside it: a measurement's noise, not an error
_LARGEST = 1e30  # of any number in a file, in the units of its name

TAKEN_NAMES = ("node", "group", "intra", "inter")  # no level has one of these
_LEVELS_EXAMPLE = "For example: levels: [{name: leaf, nodes: 4, bandwidth_bytes_s: {...}, latency_s: {...}}]."
_EXAMPLE = "For example: {value: 312e12, source: NVIDIA A100 datasheet}."


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One accelerator.

    Attributes:
        name: name of the product.
        peak_flops: dense, in the training precision; operations a second.
        memory_bytes: memory that one rank may use.
        memory_bandwidth_bytes_s: read and written bytes together.
        weight_passes: times that an active expert's weights cross memory, forward and backward, which is its fixed
            cost before the first token; optional in a file.
        reserved_bytes: memory that libraries take before training starts; optional in a file.
        ranks_per_device: ranks that share one device. The rates above are those of a rank while all of them work; one
            that works alone is so many times as fast. 1 for a GPU; CPU ranks share cores. Optional in a file.
        devices: names that the driver gives to such GPUs; optional in a file.
        capability: compute capability, such as (9, 0); optional in a file.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth_bytes_s: float
    weight_passes: float = WEIGHT_PASSES
    reserved_bytes: float = RESERVED_BYTES
    ranks_per_device: float = 1.0
    devices: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """One kind of link, one direction of one GPU: time of n bytes = latency_s + n / bandwidth_bytes_s.

    Attributes:
        bandwidth_bytes_s: reached by the fastest operation.
        latency_s: latency of one message.
        ring_latency_s: latency of each of the p - 1 steps of an all-gather or reduce-scatter among p ranks; None: a
            tree, 1 + log2(p) messages deep. Optional in a file.
        all_to_all_latency_s: latency of each of the p - 1 exchanges of an all-to-all; None: all at once, like one
            message. Optional in a file.
    """

    bandwidth_bytes_s: float
    latency_s: float
    ring_latency_s: float | None = None
    all_to_all_latency_s: float | None = None

    def ring_latency_of(self, ranks: int) -> float:
        """Seconds of an all-gather or reduce-scatter of zero bytes among `ranks` ranks."""
        if self.ring_latency_s is None:
            return self.latency_s * (1 + math.log2(ranks))
        return self.ring_latency_s * (ranks - 1)

    def all_to_all_latency_of(self, ranks: int) -> float:
        """Seconds of an all-to-all of zero bytes among `ranks` ranks."""
        return self.latency_s if self.all_to_all_latency_s is None else self.all_to_all_latency_s * (ranks - 1)


@dataclass(frozen=True, kw_only=True)
class LevelSpec:
    """A level of the network above the nodes: the way out of each of its domains.

    Attributes:
        name: such as rack, leaf, pod, spine, supernode.
        nodes: consecutive nodes of one domain.
        link: one GPU's share of the way out, in each direction.
    """

    name: str
    nodes: int
    link: LinkSpec


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Machines and links.

    Attributes:
        nodes: number of machines.
        gpus_per_node: ranks on each of them; consecutive ranks share a node.
        gpu: the accelerator.
        intra_node: link between GPUs of one node.
        inter_node: link between nodes, one GPU's share of it.
        replica_scope: `node`: a replica lies on the node of its expert's home; `group`: anywhere in the group; `auto`:
            on the node, and anywhere in a layer where that is cheaper; the name of a level: in the same domain of it.
        levels: what lies above the nodes, the smallest domains first; none where all nodes are alike to one another.
        sources: dotted path of each hardware number -> where it comes from.
        efficiency: shares of the peaks that training reaches, by the names of `SHARES`, and for levels such as
            `all_to_all_leaf`; for one that is missing the cost model's prior holds.
    """

    name: str
    nodes: int
    gpus_per_node: int
    gpu: GpuSpec
    intra_node: LinkSpec
    inter_node: LinkSpec
    replica_scope: ReplicaScope = "auto"
    levels: tuple[LevelSpec, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    efficiency: Mapping[str, float] = field(default_factory=dict)

    def nodes_of_group(self, num_ranks: int) -> int:
        """Nodes that an expert-parallel group of `num_ranks` consecutive ranks lies on."""
        if num_ranks <= self.gpus_per_node:
            return 1
        if num_ranks % self.gpus_per_node:
            rule = f"ranks of a group that is larger than a node must fill whole nodes of {self.gpus_per_node}"
            raise ConfigError(
                "expert-parallel ranks",
                num_ranks,
                rule,
                f"For example: {max(num_ranks // self.gpus_per_node, 1) * self.gpus_per_node}.",
            )
        return num_ranks // self.gpus_per_node

    def domains(self, num_nodes: int, scope: str) -> int:
        """Domains that replicas are planned in, with `auto` first, of a group on so many consecutive nodes.

        Args:
            num_nodes: nodes of the group.
            scope: as `replica_scope`.

        Raises:
            ConfigError: no such level, or nodes that fill no whole domains of it.
        """
        if scope in SCOPES:
            return 1 if scope == "group" else num_nodes
        nodes = next((level.nodes for level in self.levels if level.name == scope), None)
        if nodes is None:
            known = ", ".join([*SCOPES, *(level.name for level in self.levels)])
            raise ConfigError("replica scope", scope, f"is not a level of cluster {self.name}", f"Known: {known}.")
        if num_nodes > nodes and num_nodes % nodes:
            rule = f"an expert-parallel group on {num_nodes} nodes fills no whole domains of {nodes} nodes"
            raise ConfigError("replica scope", scope, rule, "Choose another expert-parallel size, or scope node.")
        return max(1, num_nodes // nodes)


def load_cluster_spec(path: Path) -> ClusterSpec:
    """Read and check a cluster file, which may be the name of a shipped one (see `find_config`).

    Raises:
        ConfigError: unknown or missing key, wrong type, a share above 1, or a hardware number without a source.
    """
    path = find_config("clusters", path)
    content = load_yaml(path)
    with located(path):
        return _cluster_of(content, path.stem)


def _cluster_of(content: Mapping[str, Any], default_name: str) -> ClusterSpec:
    refuse_unknown_keys("", content, _KNOWN)
    sources: dict[str, str] = {}
    levels = _levels(content.get("levels", []), sources)
    scope, scopes = content.get("replica_scope", "auto"), [*SCOPES, *(level.name for level in levels)]
    if not isinstance(scope, str) or scope not in scopes:
        rule = f"must be {', '.join(scopes[:-1])} or {scopes[-1]}"
        raise ConfigError("replica_scope", scope, rule, "For example: replica_scope: auto.")
    numbers: tuple[str, ...] = ("peak_flops", "memory_bytes", "memory_bandwidth_bytes_s")
    gpu = _section(content, "gpu", ("name", "devices", "capability", *numbers, *_OPTIONAL_GPU))
    numbers = (*numbers, *(name for name in _OPTIONAL_GPU if name in gpu))
    found = {name: _sourced(gpu, f"gpu.{name}", sources) for name in numbers}
    shared = found.get("ranks_per_device", 1.0)
    if shared < 1:
        rule = "must be at least 1: how many times as fast a rank is when the others wait"
        raise ConfigError("gpu.ranks_per_device.value", shared, rule, "Use 1 where every rank has its own device.")
    links = {}
    for key in ("intra_node", "inter_node"):
        section = _section(content, key, (*_LINK, *_OPTIONAL_LINK))
        named = (*_LINK, *(name for name in _OPTIONAL_LINK if name in section))
        links[key] = LinkSpec(**{name: _sourced(section, f"{key}.{name}", sources) for name in named})
    _check_narrowing(levels, links["inter_node"])
    return ClusterSpec(
        name=values.text(content.get("name", default_name), "name", example="name: my-cluster"),
        nodes=_whole(content, "nodes"),
        gpus_per_node=_whole(content, "gpus_per_node"),
        gpu=GpuSpec(
            name=values.text(gpu.get("name", "?"), "gpu.name", example="name: A100-SXM4-80GB"),
            devices=_devices(gpu.get("devices", [])),
            capability=_capability(gpu.get("capability")),
            **found,
        ),
        replica_scope=scope,
        levels=levels,
        efficiency=_efficiency(content, levels, sources),
        sources=sources,
        **links,
    )


def _levels(content: object, sources: dict[str, str]) -> tuple[LevelSpec, ...]:
    """The levels above the nodes, checked."""
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ConfigError("levels", content, "must be a list of levels, the smallest domains first", _LEVELS_EXAMPLE)
    levels: list[LevelSpec] = []
    for place, entry in enumerate(content):
        name = entry.get("name")
        if not isinstance(name, str) or re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
            rule = "must be a name of small letters, digits, _ and -"
            raise ConfigError(f"levels[{place}].name", name, rule, "For example: name: leaf.")
        if name in TAKEN_NAMES or name in {level.name for level in levels}:
            rule = "is taken: every level has its own name, and none is called node, group, intra or inter"
            raise ConfigError(f"levels[{place}].name", name, rule, "For example: name: leaf.")
        refuse_unknown_keys(f"levels.{name}", entry, _LEVEL)
        nodes, inner = _whole(entry, "nodes", f"levels.{name}.nodes"), levels[-1] if levels else None
        least = 2 * inner.nodes if inner else 2
        if nodes < least or (inner is not None and nodes % inner.nodes):
            rule = "must be at least 2, the nodes of one domain"
            if inner is not None:
                rule = f"must be a multiple of the {inner.nodes} nodes of level {inner.name}, and more"
            raise ConfigError(f"levels.{name}.nodes", nodes, rule, f"For example: nodes: {least}.")
        link = LinkSpec(**{key: _sourced(entry, f"levels.{name}.{key}", sources) for key in _LINK})
        levels.append(LevelSpec(name=name, nodes=nodes, link=link))
    return tuple(levels)


def _check_narrowing(levels: Sequence[LevelSpec], inter_node: LinkSpec) -> None:
    """What leaves a domain has left the domains inside it: no level is wider than they are, for one GPU.

    Raises:
        ConfigError: one is, as where a file has the bandwidth of a whole domain.
    """
    inner, most = "inter_node", inter_node.bandwidth_bytes_s
    for level in levels:
        found = level.link.bandwidth_bytes_s
        if found > most * _WIDER:
            rule = f"must be at most the {most:.4g} of {inner}: one GPU's share of the way out, which narrows outward"
            way_out = "Divide the bandwidth of a domain by its GPUs, or remove a level that is never the narrower one."
            raise ConfigError(f"levels.{level.name}.bandwidth_bytes_s.value", found, rule, way_out)
        inner, most = f"level {level.name}", found


def _devices(content: object) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(name, str) and name.strip() for name in content):
        way_out = "For example: devices: [NVIDIA A100-SXM4-80GB], as nvidia-smi prints it."
        raise ConfigError("gpu.devices", content, "must be a list of the driver's names of GPUs", way_out)
    return tuple(content)


def _capability(content: object) -> tuple[int, int] | None:
    if content is None:
        return None
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,2})", content) if isinstance(content, str) else None
    if match is None:
        rule = "must be a compute capability in quotes"
        raise ConfigError("gpu.capability", content, rule, "For example: capability: '9.0'.")
    return int(match[1]), int(match[2])


def cluster_as_yaml(cluster: ClusterSpec, comment: str = "") -> str:
    """The text of a cluster file that `load_cluster_spec` reads, numbers to 4 digits; `comment` becomes its header."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    head: dict[str, object] = {
        "name": cluster.name,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "replica_scope": cluster.replica_scope,
    }
    lines += dump_yaml(head).splitlines()
    gpu, links = cluster.gpu, {"intra_node": cluster.intra_node, "inter_node": cluster.inter_node}
    about: dict[str, object] = {"name": gpu.name}
    about |= {"devices": list(gpu.devices)} if gpu.devices else {}
    about |= {"capability": "{}.{}".format(*gpu.capability)} if gpu.capability else {}
    lines += ["gpu:", *(f"  {line}" for line in dump_yaml(about).splitlines())]
    for name in ("peak_flops", "memory_bytes", "memory_bandwidth_bytes_s", *_OPTIONAL_GPU):
        if name not in _OPTIONAL_GPU or f"gpu.{name}" in cluster.sources:  # without a source it is the default
            lines += _entry(cluster, f"gpu.{name}", getattr(gpu, name))
    for key, link in links.items():
        lines.append(f"{key}:")
        for name in (*_LINK, *_OPTIONAL_LINK):
            value = getattr(link, name)
            lines += [] if value is None else _entry(cluster, f"{key}.{name}", value)
    lines += ["levels:"] if cluster.levels else []
    for level in cluster.levels:
        lines += [f"  - name: {level.name}", f"    nodes: {level.nodes}"]
        for name in _LINK:
            lines += [f"  {line}" for line in _entry(cluster, f"levels.{level.name}.{name}", getattr(level.link, name))]
    if cluster.efficiency:
        lines.append("efficiency:")
    for name, share in cluster.efficiency.items():
        lines += _entry(cluster, f"efficiency.{name}", share)
    return "\n".join(lines) + "\n"


def shipped_clusters() -> list[ClusterSpec]:
    """The shipped cluster files in the order of their names."""
    return [load_cluster_spec(path) for path in sorted(shipped_directory("clusters").glob("*.yaml"))]


def _entry(cluster: ClusterSpec, path: str, value: float) -> list[str]:
    """The lines of one number and its source."""
    source = cluster.sources.get(path, "unknown").replace("'", "''")
    return [f"  {path.rpartition('.')[2]}:", f"    value: {value:.4g}", f"    source: '{source}'"]


def _efficiency(content: Mapping[str, Any], levels: tuple[LevelSpec, ...], sources: dict[str, str]) -> dict[str, float]:
    """The shares that a file names, checked."""
    if "efficiency" not in content:
        return {}
    of_levels = (f"{operation}_{level.name}" for level in levels for operation in _OF_LEVEL)
    section = _section(content, "efficiency", (*SHARES, *of_levels))
    shares = {name: _sourced(section, f"efficiency.{name}", sources) for name in section}
    for name, share in shares.items():
        if share > 1:
            way_out = "Use 1 for a rate that training reaches, or remove the key for the cost model's prior."
            raise ConfigError(f"efficiency.{name}.value", share, "must be a share, above 0 and at most 1", way_out)
    return shares


def _section(content: Mapping[str, Any], key: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    section = content.get(key)
    if not isinstance(section, dict):
        raise ConfigError(key, section, "must be a mapping", f"Its keys: {', '.join(known)}.")
    refuse_unknown_keys(key, section, known)
    return section


def _whole(content: Mapping[str, Any], key: str, path: str = "") -> int:
    value = content.get(key)
    if type(value) is not int or not 1 <= value <= _MOST_MACHINES:
        rule = f"must be a positive whole number, at most {_MOST_MACHINES:,}"
        raise ConfigError(path or key, value, rule, f"For example: {key}: 8.")
    return value


def _sourced(section: Mapping[str, Any], path: str, sources: dict[str, str]) -> float:
    """The number at `path`; adds its source to `sources`."""
    entry = section.get(path.rpartition(".")[2])
    if not isinstance(entry, dict):
        raise ConfigError(path, entry, "must be a mapping of value and source", _EXAMPLE)
    refuse_unknown_keys(path, entry, ("value", "source"))
    value, source = entry.get("value"), entry.get("source")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise ConfigError(f"{path}.value", value, "must be a positive number", _EXAMPLE)
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"{path}.source", source, "must state where the number comes from", _EXAMPLE)
    sources[path] = source
    return float(value)
