"""Ragged training: what no gradient passes through runs on the tokens that are there, and no more.

An interpreter's reward is a constant to its gradient, so neither the prefix up to the interpreter
nor the rollouts behind it are differentiated. They are most of the work of its phase, and every
rollout keeps its own number of tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from iared2_jax.fast_inference.engine import ragged_onward, ragged_up_to
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.plan import even_plan
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RaggedParts:
    """`IARed2.up_to` and `IARed2.onward` by ragged execution, on each device's own rows.

    Attributes:
      mesh: the axis "data" splits the rows.
    """

    module: IARed2
    mesh: jax.sharding.Mesh

    def up_to(
        self, params: Params, group: int, inputs: Float[Array, "b ..."], thresholds: Thresholds
    ) -> TokenState:
        """The tokens at the entry of `group`: an image's survivors first, zeros behind them."""
        return self._on_each_device(ragged_up_to, params, group, thresholds, inputs)

    def onward(
        self,
        params: Params,
        group: int,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b n"],
        thresholds: Thresholds,
    ) -> Float[Array, "b classes"]:
        """The logits from the entry of `group` on, whose keep mask is given."""
        return self._on_each_device(ragged_onward, params, group, thresholds, x, keep)

    def _on_each_device(
        self,
        part: Callable[..., Any],
        params: Params,
        group: int,
        thresholds: Thresholds,
        *rows: Array,
    ) -> Any:
        """What a part of the engine makes of rows: every device counts and sorts its own."""
        module = self.module
        most = module.num_prefix + module.input_spec.num_patches

        def own(params, thresholds, *rows):
            plan = even_plan(len(thresholds), (most,) * module.num_groups)
            return part(ForwardSpec(module), plan, {"params": params}, group, *rows, thresholds)

        values = module.per_group(thresholds)
        values = jnp.broadcast_to(values, (len(rows[0]), module.num_groups))
        sharded = jax.shard_map(
            own,
            mesh=self.mesh,
            in_specs=(P(), *(P("data") for _ in (values, *rows))),
            out_specs=P("data"),
            check_vma=False,  # the loops start from constants, which vary over no axis
        )
        return sharded(*jax.lax.stop_gradient((params, values, *rows)))
