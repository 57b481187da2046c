"""The parameters of a checkpoint of Megatron's, of any format and layout, by the names of a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_smartmoe.checkpoint.contents import Contents, ParameterKey
from megatron_smartmoe.checkpoint.digest import WEIGHT
from megatron_smartmoe.checkpoint.reader import read_contents
from megatron_smartmoe.convert.families.blocks import EMBEDDING, OUTPUT
from megatron_smartmoe.convert.layout import without_spec
from megatron_smartmoe.convert.packing import Parameter
from megatron_smartmoe.errors import CheckpointError

_SHOWN = 3  # names that a message lists
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads")  # arguments
_PADDED = (EMBEDDING, OUTPUT)  # Megatron's have more rows than the vocabulary
_NO_WEIGHT = (".router.local_tokens_per_expert", ".router.global_tokens_per_expert", ".router.ga_steps")


@dataclass(frozen=True, kw_only=True)
class MegatronTensors:
    """The parameters of a checkpoint.

    Attributes:
        contents: of the checkpoint.
        keys: where each parameter is, by name and expert.
    """

    contents: Contents
    keys: Mapping[tuple[str, int | None], ParameterKey]

    @classmethod
    def of(cls, folder: Path) -> MegatronTensors:
        """Read the index of a checkpoint.

        Raises:
            CheckpointError: it is damaged, or does not say what run saved it.
        """
        contents = read_contents(folder)
        if not contents.arguments:
            reason = "it does not hold the arguments of the run that saved it"
            raise CheckpointError(str(folder), "cannot be converted", reason)
        for name in _NEEDED:
            value = contents.arguments.get(name)
            if type(value) is not int or value < 1:
                reason = f"the arguments of the run that saved it have {name} = {value!r:.100}"
                raise CheckpointError(str(folder), "cannot be converted", reason)
        keys = {(without_spec(key.name), key.expert): key for key in contents.parameters if key.kind == WEIGHT}
        return cls(contents=contents, keys=keys)

    def dtype(self, parameter: Parameter) -> str:
        """The type of the numbers that `rows` gives."""
        return self.contents.dtype(self.keys[parameter.name, parameter.expert])

    def rows(self, parameter: Parameter, first: int, end: int) -> NDArray[Any]:
        """Some rows of a parameter, flat."""
        return self.contents.rows(self.keys[parameter.name, parameter.expert], first, end)

    def check(self, parameters: Iterable[Parameter]) -> None:
        """The checkpoint has these parameters, whole and of their shapes, and no other.

        Raises:
            CheckpointError: the first thing that is wrong.
        """
        folder, wanted = str(self.contents.folder), list(parameters)
        missing = [parameter for parameter in wanted if (parameter.name, parameter.expert) not in self.keys]
        if missing:
            raise CheckpointError(folder, "is incomplete", f"it has no parameter {_listed(missing)}")
        known = {(parameter.name, parameter.expert) for parameter in wanted}
        extra = sorted(
            str(key) for where, key in self.keys.items() if where not in known and not key.name.endswith(_NO_WEIGHT)
        )
        if extra:
            rule = f"the model of its arguments has no parameter {', '.join(extra[:_SHOWN])}"
            raise CheckpointError(folder, "does not match its arguments", rule)
        for parameter in wanted:
            key = self.keys[parameter.name, parameter.expert]
            found = self.contents.shape(key)
            is_padded = parameter.name in _PADDED and found[1:] == parameter.shape[1:] and found[0] > parameter.shape[0]
            if found != parameter.shape and not is_padded:
                rule = f"{key} has shape {list(found)}, and by its arguments {list(parameter.shape)}"
                raise CheckpointError(folder, "does not match its arguments", rule)
            left = self.contents.missing_elements(key)
            if left:
                what = f"{left:,} of {math.prod(found):,} elements" if left > 0 else "two values for some elements"
                reason = f"of {key} it lacks {what}" if left > 0 else f"of {key} it has {what}"
                raise CheckpointError(folder, "is incomplete", reason)

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary: those that the run's tokenizer has if it says so, else all of the embedding's."""
        key = self.keys.get((EMBEDDING, None))
        rows = self.contents.shape(key)[0] if key is not None else 0
        said = self.contents.arguments.get("vocab_size")
        return min(rows, said) if isinstance(said, int) and said > 0 else rows

    @property
    def num_prediction_layers(self) -> int:
        """Layers that predict further tokens (MTP)."""
        names = {key.name.split(".")[2] for key in self.keys.values() if key.name.startswith("mtp.layers.")}
        return len(names)


def _listed(parameters: list[Parameter]) -> str:
    names = [p.name if p.expert is None else f"{p.name}, expert {p.expert}" for p in parameters]
    more = len(names) - _SHOWN
    return "; ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
