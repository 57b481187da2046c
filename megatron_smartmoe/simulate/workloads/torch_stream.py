"""The random numbers of torch's CPU generator, without torch: MT19937, as numpy has it.

What is made of them is what `torch.randperm` and `torch.rand` make in torch 2.x. torch promises no equal streams across
releases, so this is a definition of its own: a workload has the same tokens whatever torch is installed, or none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.spec.arrays import IntArray

_24_BITS = (1 << 24) - 1


class TorchStream:
    """`torch.Generator().manual_seed(seed)`, from its first number on.

    Args:
        seed: below 2**32.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(seed)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._bits.randint(0, 2**32, size=count, dtype=np.uint32)

    def permutations(self, lengths: Sequence[int], first: int) -> IntArray:
        """The first entries of one `torch.randperm(length)` after another.

        Args:
            lengths: N of them, each at least `first`.
            first: entries that are kept.

        Returns:
            `[N, first]`.
        """
        length_N = np.asarray(lengths)
        # A permutation of n swaps entry i with one of the n - i entries from there on, for i = 0 .. n - 2: its first
        # entries are final after as many steps, but all n - 1 words are taken from the stream.
        begin_N = np.concatenate([[0], np.cumsum(length_N - 1)])
        words = self._words(int(begin_N[-1])).astype(np.int64)
        found_NF = np.empty((len(length_N), first), dtype=np.int64)
        for length in np.unique(length_N):
            of = np.nonzero(length_N == length)[0]
            order_ON = np.tile(np.arange(length), (len(of), 1))
            row = np.arange(len(of))
            for at in range(min(first, int(length) - 1)):
                other = at + words[begin_N[of] + at] % (int(length) - at)
                order_ON[row, at], order_ON[row, other] = order_ON[row, other], order_ON[row, at].copy()
            found_NF[of] = order_ON[:, :first]
        return found_NF

    def uniform(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """`torch.rand(shape)`: float32 in [0, 1)."""
        words = self._words(int(np.prod(shape)))
        return ((words & _24_BITS).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
