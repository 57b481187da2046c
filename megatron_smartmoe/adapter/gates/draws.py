"""Random numbers that depend on what is routed and on nothing else: not on who routes it, nor on how often.

The number of a token and an expert is a hash of (seed, iteration, layer, sample in the global batch, position in the
sequence, expert). So recomputation draws what the forward pass drew, a resumed run what the uninterrupted one did, and
every mix of parallelism what one process does; a generator's state would be another on each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_smartmoe.adapter.gates.passes import Passes
from megatron_smartmoe.adapter.local.attention import zigzag_positions

# splitmix64: the increment, and the two factors of its finaliser
_STEP, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = 1 << 64
_FRACTION_BITS = 23  # with a half behind them, what a float32 between 0 and 1 can hold


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which tokens of a global batch a rank routes.

    Attributes:
        dp_rank, dp_size: data parallelism: which samples of each step.
        cp_rank, cp_size: context parallelism: which stripes of a sequence.
        sp_rank, sp_size: sequence parallelism: which part of these.
    """

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1

    def positions(self, num_rows: int) -> torch.Tensor:
        """Positions in the sequence of this rank's rows, `[num_rows]`."""
        first = self.sp_rank * num_rows
        of_stripes = zigzag_positions(self.cp_rank, self.cp_size, num_rows * self.sp_size)
        return of_stripes[first : first + num_rows]


class Draws:
    """The random numbers of one router.

    Args:
        seed: of the run.
        layer: number of the layer, counted over the whole model.
        part: which tokens this rank routes.
    """

    def __init__(self, seed: int, layer: int, part: Part) -> None:
        self._seed, self._layer, self._part = seed, layer, part
        self._iteration = 0
        self._passes = Passes()

    def begin(self, iteration: int, num_micro_batches: int) -> None:
        """Start an iteration."""
        self._iteration = iteration
        self._passes.begin(num_micro_batches)

    def uniform(self, num_rows: int, num_samples: int, num_experts: int, device: torch.device) -> torch.Tensor:
        """Numbers between 0 and 1, both left out, for the tokens of the next micro-batch.

        Call it once in each pass: which micro-batch it is follows from the number of passes before.

        Args:
            num_rows: rows per sample on this rank.
            num_samples: samples of the micro-batch.
            num_experts: numbers per token.
            device: where they are needed.

        Returns:
            float32 `[num_rows * num_samples, num_experts]`, tokens in Megatron's order (position first).

        Raises:
            CompatError: no iteration was started.
        """
        micro_batch = self._passes.next()
        key = 0
        for part in (self._seed, self._iteration, self._layer):
            key = _mixed(key, part)
        first = (micro_batch * self._part.dp_size + self._part.dp_rank) * num_samples
        samples_B = torch.arange(first, first + num_samples, device=device)
        positions_S = self._part.positions(num_rows).to(device)
        keys_B = _mixed_tensors(torch.tensor(_signed(key), device=device), samples_B)
        keys_T = _mixed_tensors(keys_B.unsqueeze(0), positions_S.unsqueeze(1)).reshape(-1, 1)
        bits_TE = _mixed_tensors(keys_T, torch.arange(num_experts, device=device))
        return (_shifted(bits_TE, 64 - _FRACTION_BITS).to(torch.float32) + 0.5) / (1 << _FRACTION_BITS)


def _mixed(key: int, part: int) -> int:
    """One step of the hash, on numbers of the host."""
    mixed = (key + _STEP * (part + 1)) % _WORD
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed = ((mixed ^ (mixed >> shift)) * factor) % _WORD
    return mixed ^ (mixed >> 31)


def _mixed_tensors(key: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The same step on int64 tensors, whose sums and products wrap around."""
    mixed = key + _signed(_STEP) * (part + 1)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return mixed ^ _shifted(mixed, 31)


def _shifted(word: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right: torch's copies the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
