"""The maps of a model by the names they have in tables, and how each is computed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iared2_jax.attribution.methods import METHODS, attribute, check_options, options_of
from iared2_jax.attribution.methods.raw_attention import attention_of_blocks
from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.create import init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class MapSource:
    """A map by its name in tables, e.g. "group_2": how it is computed, and of which model.

    Attributes:
      compute: (variables, inputs, target) -> values.
      of: "trained" or "original": whose variables.
      explains_class: whether a target means anything to it.
      many_passes: whether each image costs it hundreds of forward passes.
    """

    compute: Callable[[Variables, Array, Any], Array]
    of: str = "original"
    explains_class: bool = False
    many_passes: bool = False

    def __call__(self, variables: Variables, inputs: Array, classes: Array) -> np.ndarray:
        """The map's values, for these classes if it explains any."""
        return np.asarray(self.compute(variables, inputs, classes if self.explains_class else None))


def map_sources(
    module: IARed2,
    methods: Sequence[str] = ("all",),
    *,
    applied: Mapping[str, Any] | None = None,
    scores: str = "group",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, MapSource]:
    """The maps that methods make, by name.

    "interpreter" makes one for each group, "raw_attention" one for each block.

    Args:
      methods: names of `attribution.METHODS`; "all": all of them that need nothing more.
      applied: how the model that scores is applied, thresholds or another selector: a group scores
        what the ones before have kept.
      scores: what these maps are called, before the number of the group.
      options: of the other methods, by name.

    Raises:
      UsageError: there is no such method, or it has no such option.
    """
    options = dict(options or {})
    made: dict[str, MapSource] = {}
    for method in _named(module, methods, options):
        given = dict(options.get(method, {}))
        check_options(method, given)
        if method in ("interpreter", "raw_attention") and given:
            raise UsageError(f"{method} is shown of every group or block: leave its options out")
        if method == "interpreter":
            made |= _scores(module, dict(applied or {}), scores)
        elif method == "raw_attention":
            # Where there is none, the method itself says so.
            made |= _attention(module) or {method: _by_name(method, module, given)}
        else:
            made[method] = _by_name(method, module, given)
    return made


def _named(module: IARed2, methods: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The methods that are meant; memorability is somebody else's: only where it is given."""
    if "all" not in methods:
        return list(methods)
    given = module.input_spec.map_channel or "memorability" in options
    return [name for name in METHODS if name != "memorability" or given]


def _scores(module: IARed2, applied: dict[str, Any], name: str) -> dict[str, MapSource]:
    """The scores of every group, from one compiled pass."""

    @_remembered
    @jax.jit
    def all_scores(variables, inputs):
        """What every group scores its patches by."""
        return module.apply(variables, inputs, **applied)[1].scores

    def of_group(group: int) -> MapSource:
        return MapSource(
            lambda variables, inputs, _: all_scores(variables, inputs)[group], "trained"
        )

    return {f"{name}_{group + 1}": of_group(group) for group in range(module.num_groups)}


def _attention(module: IARed2) -> dict[str, MapSource]:
    """The CLS query's attention of every block; CaiT's are its class-attention blocks."""
    shape = jax.ShapeDtypeStruct((1, *module.input_spec.shape), jnp.float32)
    variables = jax.eval_shape(lambda: init_variables(module, 0))
    blocks = len(jax.eval_shape(functools.partial(attention_of_blocks, module), variables, shape))

    all_attention = _remembered(functools.partial(attention_of_blocks, module))

    def of_block(block: int) -> MapSource:
        return MapSource(lambda variables, inputs, _: all_attention(variables, inputs)[block])

    return {f"raw_attention_block_{block}": of_block(block) for block in range(blocks)}


def _remembered(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, which is not called again with the very arguments of its last call."""
    last: list[Any] = [(), None]

    def computed(*args: Any) -> Any:
        if len(last[0]) != len(args) or any(x is not y for x, y in zip(last[0], args, strict=True)):
            last[:] = args, compute(*args)
        return last[1]

    return computed


def _by_name(method: str, module: IARed2, options: Mapping[str, Any]) -> MapSource:
    known = options_of(METHODS[method])

    def compute(variables: Variables, inputs: Array, target: Any) -> Array:
        """The method's values."""
        return attribute(method, module, variables, inputs, target=target, **options)

    # A batch size is that of the changed copies which a method runs.
    return MapSource(compute, explains_class="target" in known, many_passes="batch_size" in known)
