"""The array type of public signatures: what a user hands in may live on the host or a device."""

import jax
import numpy as np

Array = jax.Array | np.ndarray
