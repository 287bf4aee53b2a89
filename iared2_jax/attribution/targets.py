"""Which class is explained: the predicted one, or one that is asked for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from iared2_jax.errors import UsageError
from iared2_jax.typing import Array

Target = Int[Array, " b"] | None


def checked_target(target: Any, num_classes: int, images: int) -> Target:
    """The class of every image; None: whatever each is taken for.

    Args:
      target: one class, one for each image, or None.

    Raises:
      UsageError: no such class, or not one for each image.
    """
    if target is None:
        return None
    traced = isinstance(target, jax.core.Tracer)  # its values are not there yet
    classes = target if traced else np.asarray(target)
    if classes.dtype.kind not in "iu" or classes.shape not in ((), (1,), (images,)):
        raise UsageError(
            f"target must be a class, or one for each of the {images} images, got {target!r}"
        )
    wrong = [] if traced else classes[(classes < 0) | (classes >= num_classes)].ravel()
    if len(wrong):
        raise UsageError(f"target={wrong[0]}, but the model has classes 0..{num_classes - 1}")
    return jnp.broadcast_to(jnp.asarray(classes, jnp.int32), (images,))


def class_logit(target: Target) -> Callable[[Float[Array, "b classes"]], Float[Array, " b"]]:
    """The objective of an explanation, from logits: the target class's logit, or the greatest."""

    def logit(logits: Float[Array, "b classes"]) -> Float[Array, " b"]:
        """One logit per image."""
        classes = logits.argmax(axis=-1) if target is None else target
        return jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]

    return logit


def class_probability(
    logits: Float[Array, "b classes"], target: Int[Array, " b"]
) -> Float[Array, " b"]:
    """The target's probability."""
    return jnp.take_along_axis(jax.nn.softmax(logits), target[:, None], axis=-1)[:, 0]
