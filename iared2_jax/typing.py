"""Types of public signatures. An array that a user hands in may live on the host or a device."""

import jax
import numpy as np

Array = jax.Array | np.ndarray

# Mean and standard deviation per channel, of pixels in [0, 1].
Norm = tuple[tuple[float, ...], tuple[float, ...]]
