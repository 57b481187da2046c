"""Array types, and the legend of the axes that a name's suffix gives.

L layers, M micro-batches, R expert-parallel ranks, S slots of a rank, H home slots, K spare slots, E experts, T tokens,
N records of a trace, G groups of expert-parallel ranks, I iterations, B batches: `counts_LE`, `load_LRE`. Q is the axis
of rank sets (cuts), C of filled slots, F of experts with several hosts, K in `_KE` of scenarios.
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
