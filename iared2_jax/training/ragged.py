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
from iared2_jax.fast_inference.plan import Plan, even_plan
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

        def part(params, inputs, thresholds):
            plan = self._plan(inputs.shape[0])
            variables = {"params": params}
            return ragged_up_to(self._forward, plan, variables, group, inputs, thresholds)

        return self._on_each_device(part, params, inputs, self._per_row(thresholds, inputs))

    def onward(
        self,
        params: Params,
        group: int,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b n"],
        thresholds: Thresholds,
    ) -> Float[Array, "b classes"]:
        """The logits from the entry of `group` on, whose keep mask is given."""

        def part(params, x, keep, thresholds):
            plan = self._plan(x.shape[0])
            variables = {"params": params}
            return ragged_onward(self._forward, plan, variables, group, x, keep, thresholds)

        return self._on_each_device(part, params, x, keep, self._per_row(thresholds, x))

    @property
    def _forward(self) -> ForwardSpec:
        return ForwardSpec(self.module)

    def _plan(self, rows: int) -> Plan:
        module = self.module
        most = module.num_prefix + module.input_spec.num_patches
        return even_plan(rows, (most,) * module.num_groups)

    def _per_row(self, thresholds: Thresholds, rows: Array) -> Float[Array, "b D"]:
        values = self.module.per_group(thresholds)
        return jnp.broadcast_to(values, (rows.shape[0], self.module.num_groups))

    def _on_each_device(self, part: Callable[..., Any], params: Params, *rows: Array) -> Any:
        """What `part` makes of `params` and `rows`: every device counts and sorts its own."""
        sharded = jax.shard_map(
            part,
            mesh=self.mesh,
            in_specs=(P(), *(P("data") for _ in rows)),
            out_specs=P("data"),
            check_vma=False,  # the loops start from constants, which vary over no axis
        )
        return sharded(params, *rows)
