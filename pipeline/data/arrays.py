"""The array types that kernels, stores and networks share."""

import numpy as np
from numpy.typing import NDArray

# uint8 (N, H, W, C), 0-255, C order, grey or RGB.
Images = NDArray[np.uint8]
# uint8 (N,), class numbers; uint16 where there are more than 256 classes.
Labels = NDArray[np.uint8] | NDArray[np.uint16]
