"""Attribution methods: what each patch did for the answer, by name; one function in one file each.

docs/add_an_attribution_method.md shows how to add one.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iared2_jax.attribution.methods.center import center
from iared2_jax.attribution.methods.grad_rollout import grad_rollout
from iared2_jax.attribution.methods.gradcam import gradcam
from iared2_jax.attribution.methods.gradcam_tokens import gradcam_tokens
from iared2_jax.attribution.methods.interpreter import interpreter
from iared2_jax.attribution.methods.lime import lime
from iared2_jax.attribution.methods.lrp import lrp
from iared2_jax.attribution.methods.memorability import memorability
from iared2_jax.attribution.methods.occlusion import occlusion
from iared2_jax.attribution.methods.partial_lrp import partial_lrp
from iared2_jax.attribution.methods.random import random
from iared2_jax.attribution.methods.raw_attention import raw_attention
from iared2_jax.attribution.methods.rollout import rollout
from iared2_jax.attribution.methods.transformer_attribution import transformer_attribution
from iared2_jax.attribution.targets import checked_target
from iared2_jax.errors import UsageError, nearest
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

# (module, variables, inputs, **its own options) -> a value per patch [B, N], or per pixel [B, H, W]
# (of clips [B, T, H, W]). One with an option `target` explains a class.
Method = Callable[..., Array]

METHODS: dict[str, Method] = {
    method.__name__: method
    for method in (
        interpreter,
        raw_attention,
        rollout,
        gradcam,
        gradcam_tokens,
        grad_rollout,
        partial_lrp,
        lrp,
        transformer_attribution,
        lime,
        occlusion,
        memorability,
        random,
        center,
    )
}


def attribute(
    method: str | Method,
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    *,
    target: Any = None,
    **options: Any,
) -> Float[Array, "b ..."]:
    """The values that a method gives the patches, or the pixels, of normalised inputs.

    Args:
      method: a name of `METHODS`, or a function of your own.
      target: the class that is explained: one, or one for each image; None: the predicted one.
      **options: the method's.

    Raises:
      UsageError: no such method, option or class; a target for a method that explains none; values
        that are neither one per patch nor one per pixel.
    """
    check_options(method, [*options, "target"] if target is not None else options)
    if target is not None:
        options["target"] = checked_target(target, module.backbone.num_classes, len(inputs))
    function = METHODS[method] if isinstance(method, str) else method
    values = function(module, variables, inputs, **options)
    pixels, patches = tuple(inputs.shape[:-1]), (len(inputs), module.input_spec.num_patches)
    shape = np.shape(values)
    if shape not in (pixels, patches):
        raise UsageError(
            f"{_name(method)} must give a value per patch {list(patches)} or per pixel "
            f"{list(pixels)}, got {list(shape)}"
        )
    return jnp.asarray(values, jnp.float32)


def check_options(method: str | Method, options: Iterable[str]) -> None:
    """Refuses what is no method, and options that it does not have.

    Raises:
      UsageError: one sentence.
    """
    if isinstance(method, str) and method not in METHODS:
        raise UsageError(f"there is no attribution method {method!r}{nearest(method, METHODS)}")
    known = options_of(METHODS[method] if isinstance(method, str) else method)
    for option in options:
        if option == "target" and option not in known:
            raise UsageError(f"{_name(method)} explains no class: leave target out")
        if option not in known:
            raise UsageError(f"{_name(method)} has no option {option!r}{nearest(option, known)}")


def _name(method: str | Method) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", "the method")


def options_of(method: Method) -> list[str]:
    """The names of a method's own options."""
    return [parameter.name for parameter in inspect.signature(method).parameters.values()][3:]


__all__ = [
    "METHODS",
    "Method",
    "attribute",
    "check_options",
    "interpreter",
    "options_of",
    "raw_attention",
]
