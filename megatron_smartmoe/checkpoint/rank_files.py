"""The parameters in a checkpoint of Megatron's older `torch` format: a file for each model-parallel rank.

A file `mp_rank_<tensor>[_<pipeline>][_<expert>]/model_optim_rng.pt` holds a rank's parameters under its own numbers of
layers and experts. Here they get the model's: layers are counted through the stages, experts through the ranks, and
what tensor parallelism cuts is put together by the axis that Megatron cuts each kind of layer along.

Optimizer state is numbered: each group of the optimizer has the parameters with or without weight decay, of experts or
not, in the order of the model. Where that does not give every number a parameter of its shape, as for the distributed
optimizer's buffers, the state is counted and not named.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_smartmoe.checkpoint.contents import Contents, ParameterKey, Part, arguments_in, iteration_in
from megatron_smartmoe.checkpoint.digest import EXP_AVG, EXP_AVG_SQ, MAIN_WEIGHT, WEIGHT, Piece
from megatron_smartmoe.checkpoint.names import canonical
from megatron_smartmoe.errors import CheckpointError
from megatron_smartmoe.spec.readers.torch_save import StoredTensor, read_saved

RANK_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
_MOST_RANKS = 10_000
_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_LAYER_NUMBER = re.compile(r"^(?:decoder|encoder)\.layers\.(\d+)\.")
_EXPERT_MODULE = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_EXPERT_WEIGHT = re.compile(r"(\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$")
_SLOTS = re.compile(r"\.experts\.(?:weight|linear_fc)([12])(?:\.weight)?$")  # [slots, rows, columns]
# The axis that tensor parallelism cuts, by the end of a parameter's name; all others are whole on every rank, but those
# of `_down_proj_rows`.
_CUT_AXIS = {
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_q_proj.weight": 0,
    "linear_q_up_proj.weight": 0,
    "linear_kv_up_proj.weight": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}


@dataclass(frozen=True, kw_only=True)
class _RankFile:
    """One rank's file, read."""

    path: Path
    tensor_rank: int
    stage: int
    expert_rank: int
    content: Mapping[str, Any]

    def chunks(self) -> list[Mapping[str, StoredTensor]]:
        """Parameters of each virtual stage, by the rank's names."""
        names = sorted((key for key in self.content if re.fullmatch(r"model\d*", key)), key=lambda key: (len(key), key))
        return [
            {name: tensor for name, tensor in self.content[key].items() if isinstance(tensor, StoredTensor)}
            for key in names
            if isinstance(self.content[key], Mapping)
        ]


def read_rank_files(folder: Path) -> Contents:
    """Where the weights are in a checkpoint of the `torch` format.

    Raises:
        CheckpointError: there are no such files, one is damaged, or the parallelism is one that is not read here.
    """
    files = [_read(path) for path in sorted(folder.glob(f"mp_rank_*/{RANK_FILE}"))]
    if not files:
        what = "is neither a torch_dist nor a torch checkpoint"
        raise CheckpointError(str(folder), what, f"it has no readable metadata.json and no mp_rank_*/{RANK_FILE}")
    contents = Contents(folder=folder, iteration=iteration_in(files[0].content))
    contents.arguments = arguments_in(files[0].content)
    missing = next(missing_ranks(folder, contents.arguments), None)
    if missing is not None:
        raise CheckpointError(str(folder), "is incomplete", f"{missing} is missing")
    layout = _Layout(files, contents)
    for file in files:
        for number, chunk in enumerate(file.chunks()):
            for name, tensor in chunk.items():
                layout.add(file, number, name, tensor, WEIGHT)
        state = optimizer_state(file.chunks(), file.content.get("optimizer"))
        for entry in state or ():
            layout.add(file, entry.chunk, entry.name, entry.tensor, entry.kind)
        if state is None:
            for where, tensor in _tensors(file.content.get("optimizer"), "optimizer"):
                contents.buffers[f"{file.path.parent.name}, {where}"] = tensor.num_elements
    for path in sorted(folder.glob(f"mp_rank_*/{OPTIMIZER_FILE}")):
        for where, tensor in _tensors(read_saved(path, str(path)), OPTIMIZER_FILE):
            contents.buffers[f"{path.parent.name}, {where}"] = tensor.num_elements
    return contents


def missing_ranks(folder: Path, args: Mapping[str, Any]) -> Iterator[str]:
    """Files of model-parallel ranks that the arguments of a checkpoint ask for and that are not there."""
    tp, pp, ep = (args.get(f"{name}_model_parallel_size", 1) for name in ("tensor", "pipeline", "expert"))
    if not all(isinstance(size, int) and 0 < size < _MOST_RANKS for size in (tp, pp, ep)):
        return
    for rank, stage, expert_rank in itertools.product(range(tp), range(pp), range(ep)):
        name = f"mp_rank_{rank:02d}" + f"_{stage:03d}" * (pp > 1) + f"_{expert_rank:03d}" * (ep > 1)
        if not (folder / name / RANK_FILE).is_file():
            yield f"{name}/{RANK_FILE}"


class _Layout:
    """Translates the ranks' names, layers and experts."""

    def __init__(self, files: Sequence[_RankFile], contents: Contents) -> None:
        self._contents, self._args = contents, contents.arguments
        self._tensor_ranks = 1 + max(file.tensor_rank for file in files)
        self._expert_ranks = 1 + max(file.expert_rank for file in files)
        expert_tensor_ranks = self._args.get("expert_tensor_parallel_size") or self._tensor_ranks
        self._first_layers = _first_layers(files)
        self._is_gated = any(self._args.get(name) for name in ("swiglu", "quick_geglu"))
        if self._args.get("num_experts") and expert_tensor_ranks != self._tensor_ranks:
            what = "cannot be read by parameter"
            reason = f"its experts are cut by {expert_tensor_ranks} and its other layers by {self._tensor_ranks}"
            raise CheckpointError(str(contents.folder), what, reason)

    def add(self, file: _RankFile, chunk: int, name: str, tensor: StoredTensor, kind: str) -> None:
        """Add a rank's tensor, under the model's name."""
        first_layer = self._first_layers[chunk, file.stage]
        match = _LAYER_NUMBER.match(name)
        if match is not None:
            name = f"{name[: match.start(1)]}{int(match[1]) + first_layer}{name[match.end(1) :]}"
        if name == "output_layer.weight" and not self._args.get("untie_embeddings_and_output_weights", True):
            name = "embedding.word_embeddings.weight"  # the last stage has a copy
        name, local = _without_expert(canonical(name))
        slots = _SLOTS.search(name) if local is None and len(tensor.shape) == 3 else None
        if slots is not None:  # experts are brought home for a save in this format
            name = f"{name[: slots.start()]}.experts.linear_fc{slots[1]}.weight"
            for slot in range(tensor.shape[0]):
                expert = file.expert_rank * tensor.shape[0] + slot
                self._add(file, ParameterKey(name, expert, kind), tensor.at((slot,)))
        elif local is None:
            self._add(file, ParameterKey(name, None, kind), tensor)
        else:
            num_local = int(self._args.get("num_experts") or 0) // self._expert_ranks
            self._add(file, ParameterKey(name, file.expert_rank * num_local + local, kind), tensor)

    def _add(self, file: _RankFile, key: ParameterKey, tensor: StoredTensor) -> None:
        axis = cut_axis(key.name)
        rows = _down_proj_rows(key.name, self._args)
        if rows is not None and tensor.shape[0] * self._tensor_ranks == rows:
            axis = 0
        is_cut = axis is not None and self._tensor_ranks > 1
        is_copy = (key.expert is None and file.expert_rank > 0) or (not is_cut and file.tensor_rank > 0)
        if is_copy or _is_there(self._contents, key, tensor, file.tensor_rank):
            return
        parts = self._tensor_ranks if is_cut else 1
        halves = 2 if axis == 0 and parts > 1 and ".linear_fc1." in key.name and self._is_gated else 1
        for half in range(halves):
            self._contents.parameters.setdefault(key, []).append(
                _part(tensor, axis or 0, file.tensor_rank if is_cut else 0, parts, half, halves)
            )


def cut_axis(name: str) -> int | None:
    """The axis that tensor parallelism cuts a parameter along; None if it is whole on every rank."""
    return next((axis for end, axis in _CUT_AXIS.items() if name.endswith(end)), None)


def _down_proj_rows(name: str, args: Mapping[str, Any]) -> int | None:
    """Rows of a whole down projection of multi-latent attention, which only Megatron's local layers cut.

    None for any other parameter.
    """
    latent = args.get("kv_lora_rank"), args.get("qk_pos_emb_head_dim")
    if name.endswith("linear_q_down_proj.weight"):
        return int(args.get("q_lora_rank") or 0)
    if name.endswith("linear_kv_down_proj.weight"):
        return sum(int(size or 0) for size in latent)
    return None


def _is_there(contents: Contents, key: ParameterKey, tensor: StoredTensor, tensor_rank: int) -> bool:
    """Whether another stage has the same part, as of embeddings that first and last stage share."""
    return any(
        part.tensor.path != tensor.path and part.tensor.path.parent.name.startswith(f"mp_rank_{tensor_rank:02d}")
        for part in contents.parameters.get(key, ())
    )


def _part(tensor: StoredTensor, axis: int, rank: int, parts: int, half: int, halves: int) -> Part:
    """A rank's part of a parameter; of a gated layer its gate or its linear rows, each of which is cut by itself."""
    shape, offsets, sizes = list(tensor.shape), [0] * len(tensor.shape), list(tensor.shape)
    if shape:
        sizes[axis] //= halves
        shape[axis] *= parts
        offsets[axis] = (half * parts + rank) * sizes[axis]
    if halves > 1:
        tensor = tensor.rows(half * sizes[0], sizes[0])
    return Part(piece=Piece(shape=tuple(shape), offsets=tuple(offsets), sizes=tuple(sizes)), tensor=tensor)


@dataclass(frozen=True, kw_only=True)
class _State:
    """A tensor of the optimizer, and the parameter that it belongs to, by the rank's names."""

    chunk: int
    name: str
    kind: str
    tensor: StoredTensor


class _Parameter(NamedTuple):
    """A parameter of a rank: virtual stage, name and shape."""

    chunk: int
    name: str
    shape: tuple[int, ...]


def optimizer_state(chunks: Sequence[Mapping[str, StoredTensor]], optimizer: Any) -> list[_State] | None:
    """Main weights and moments with the names of their parameters; None where they cannot be told."""
    parameters = [_Parameter(number, name, chunk[name].shape) for number, chunk in enumerate(chunks) for name in chunk]
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    groups = [group for one in optimizers for group in _inner(one).get("param_groups", ())]
    experts_apart = any(group.get("is_expert_parallel") for group in groups)  # not at EP 1
    for order in (parameters, _with_slots(parameters)):
        found = [_state_of_one(order, one, experts_apart) for one in optimizers]
        if None not in found:
            return [state for states in found for state in states or ()]
    return None


def _with_slots(parameters: Sequence[_Parameter]) -> list[_Parameter]:
    """Parameters as an optimizer has them whose experts are in slots: one for all experts of a layer."""
    found: dict[tuple[int, str], _Parameter] = {}
    for parameter in parameters:
        name, expert = _without_expert(parameter.name)
        shape = parameter.shape if expert is None else (expert + 1, *parameter.shape)
        found[parameter.chunk, name] = _Parameter(parameter.chunk, name, shape)
    return list(found.values())


def _inner(optimizer: Any) -> Mapping[str, Any]:
    """The state of torch's optimizer in that of Megatron's."""
    content = optimizer.get("optimizer", optimizer) if isinstance(optimizer, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _state_of_one(parameters: Sequence[_Parameter], optimizer: Any, experts_apart: bool) -> list[_State] | None:
    groups, states = (_inner(optimizer).get(name) for name in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(states, Mapping):
        return None
    mains = optimizer.get("fp32_from_fp16_params", [])
    found: list[_State] = []
    for number, group in enumerate(groups):
        members = [parameter for parameter in parameters if _is_member(parameter, group, experts_apart)]
        main = mains[number] if number < len(mains) else [None] * len(members)  # none where weights are float32
        if not len(members) == len(group.get("params", ())) == len(main):
            return None
        for place, (index, member) in enumerate(zip(group["params"], members, strict=True)):
            tensors = {MAIN_WEIGHT: main[place], **states.get(index, {})}
            for kind in (MAIN_WEIGHT, EXP_AVG, EXP_AVG_SQ):
                tensor = tensors.get(kind)
                if isinstance(tensor, StoredTensor):
                    if tensor.shape != member.shape:
                        return None
                    found.append(_State(chunk=member.chunk, name=member.name, kind=kind, tensor=tensor))
    return found


def _is_member(parameter: _Parameter, group: Mapping[str, Any], experts_apart: bool) -> bool:
    """Whether a parameter belongs to a group of Megatron's optimizers: biases and norms have no weight decay."""
    has_decay = len(parameter.shape) > 1 and not parameter.name.endswith(".bias")
    is_expert = experts_apart and ".experts." in parameter.name
    return bool(group.get("wd_mult", 1.0)) == has_decay and bool(group.get("is_expert_parallel")) == is_expert


def _read(path: Path) -> _RankFile:
    match = _FOLDER.fullmatch(path.parent.name)
    content = read_saved(path, str(path))
    if match is None or not isinstance(content, Mapping):
        raise CheckpointError(str(path), "is damaged", f"it holds a {type(content).__name__}, no mapping")
    args = arguments_in(content)
    second, third = (int(part) if part is not None else 0 for part in match.groups()[1:])
    has_stages = int(args.get("pipeline_model_parallel_size") or 1) > 1
    stage, expert_rank = (second, third) if has_stages else (0, second)
    return _RankFile(path=path, tensor_rank=int(match[1]), stage=stage, expert_rank=expert_rank, content=content)


def _first_layers(files: Sequence[_RankFile]) -> dict[tuple[int, int], int]:
    """The number of the first layer of each chunk and stage: chunks come one after the other, through all stages."""
    counts: dict[tuple[int, int], int] = {}
    for file in files:
        for number, chunk in enumerate(file.chunks()):
            layers = {int(match[1]) for name in chunk if (match := _LAYER_NUMBER.match(name))}
            counts[number, file.stage] = len(layers)
    firsts, first = {}, 0
    for where in sorted(counts):
        firsts[where] = first
        first += counts[where]
    return firsts


def _without_expert(name: str) -> tuple[str, int | None]:
    """A parameter's name without the number of the rank's expert, and that number."""
    match = _EXPERT_MODULE.search(name)
    if match is not None:
        return f"{name[: match.start()]}.experts.{name[match.end() :]}", int(match[1])
    match = _EXPERT_WEIGHT.search(name)
    if match is not None:
        return name[: match.end(1)], int(match[2])
    return name, None


def _tensors(content: Any, where: str) -> Iterator[tuple[str, StoredTensor]]:
    """All tensors in nested mappings and lists."""
    if isinstance(content, StoredTensor):
        yield where, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{where}.{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _tensors(value, f"{where}.{number}")
