"""The array types that kernels, stores and networks share."""

import numpy as np
from numpy.typing import NDArray

# uint8 (N, H, W, C), 0-255, C order, grey or RGB.
Images = NDArray[np.uint8]
# uint8 (N,), class numbers 0-9.
Labels = NDArray[np.uint8]
