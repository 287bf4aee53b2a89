"""Attribution methods: what each patch did for the answer, by name; one function in one file each.

docs/add_an_attribution_method.md shows how to add one.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float

from iared2_jax.attribution.methods.interpreter import interpreter
from iared2_jax.attribution.methods.raw_attention import raw_attention
from iared2_jax.errors import UsageError, nearest
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

# (module, variables, inputs, **its own options) -> a value per patch [B, N].
Method = Callable[..., Array]

METHODS: dict[str, Method] = {
    "interpreter": interpreter,
    "raw_attention": raw_attention,
}


def attribute(
    method: str | Method,
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    **options: Any,
) -> Float[Array, "b n"]:
    """The values that a method gives the patches of normalised inputs.

    Args:
      method: a name of `METHODS`, or a function of your own.
      **options: the method's.

    Raises:
      UsageError: there is no such method, or it has no such option.
    """
    if isinstance(method, str) and method not in METHODS:
        raise UsageError(f"there is no attribution method {method!r}{nearest(method, METHODS)}")
    function = METHODS[method] if isinstance(method, str) else method
    known = [p.name for p in inspect.signature(function).parameters.values()][3:]
    for option in options:
        if option not in known:
            name = method if isinstance(method, str) else function.__name__
            raise UsageError(f"{name} has no option {option!r}{nearest(option, known)}")
    return function(module, variables, inputs, **options)


__all__ = ["METHODS", "Method", "attribute", "interpreter", "raw_attention"]
