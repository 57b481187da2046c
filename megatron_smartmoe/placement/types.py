"""Array types shared by the placement modules."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
