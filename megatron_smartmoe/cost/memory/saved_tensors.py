"""A tensor that waits for the backward pass, and lists of them: of a layer, and of what lies around the layers.

What a module keeps depends on who wrote it: `saved_te` lists TransformerEngine's, `saved_torch` Megatron's plain torch
modules and this project's. `activations` adds the lists up. To count another implementation is to write another list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec

FP32, INT64, INT32, BOOL = 4, 8, 4, 1  # bytes of an element


class SavedTensor(NamedTuple):
    """One tensor on one rank.

    Attributes:
        name: what it is.
        rows: number of rows, such as tokens.
        width: elements of a row.
        element: bytes of an element.
        recomputed: whether recomputation of norms and activations (`act`) computes it again instead of keeping it.
    """

    name: str
    rows: float
    width: float
    element: int
    recomputed: bool = False

    @property
    def nbytes(self) -> float:
        """Bytes of the tensor."""
        return self.rows * self.width * self.element


Tensors = tuple[SavedTensor, ...]


def total(tensors: Iterable[SavedTensor]) -> float:
    """Bytes of all of them."""
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Rank:
    """One micro-batch on the busiest rank.

    Attributes:
        model: what is trained.
        spec: how it is spread.
        imbalance: tokens of the busiest rank's experts over the mean.
    """

    model: ModelSpec
    spec: ParallelSpec
    imbalance: float

    @property
    def sequence(self) -> float:
        """Positions of one sample that a rank has."""
        return self.model.seq_length / self.spec.cp

    @property
    def tokens(self) -> float:
        """Tokens of all samples between the projections of attention or of a dense MLP."""
        return self.spec.micro_batch * self.sequence

    @property
    def tokens_local(self) -> float:
        """Tokens outside those projections, where sequence parallelism shards the sequence."""
        return self.tokens / self.spec.tp

    @property
    def expert_rows(self) -> float:
        """Rows that the busiest rank's experts compute; the ranks of an ETP group gather each other's."""
        return self.tokens_local * self.model.moe.top_k * self.imbalance * self.spec.etp

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return self.spec.element_bytes


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """What one transformer layer keeps of one micro-batch.

    Attributes:
        attention: the norm before it, projections, the core.
        norm: the norm before the MLP, or before router and experts, its output, and dropout's noise behind them: what
            recomputation of MoE layers keeps.
        mlp: a dense MLP, or router, dispatch and shared expert.
        experts: what grows with the rows that this rank's experts compute.
    """

    attention: Tensors
    norm: Tensors
    mlp: Tensors
    experts: Tensors = ()


@dataclass(frozen=True, kw_only=True)
class EndTensors:
    """What a model chunk keeps of one micro-batch around its layers.

    Attributes:
        embedding: what the first chunk keeps before its layers.
        head: final norm, logits and loss of the last chunk, which holds one micro-batch of them at a time.
        checkpoint: what recomputation of whole layers keeps once for all of them.
    """

    embedding: Tensors = ()
    head: Tensors = ()
    checkpoint: Tensors = ()
