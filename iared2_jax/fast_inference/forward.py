"""A forward pass, described: what is computed, however it is run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float

from iared2_jax.models.input_spec import InputSpec
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import ByInterpreter, Selector
from iared2_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class ForwardSpec:
    """A forward pass: what is to be computed, however it is run.

    Attributes:
      module: the model.
      keep_ratios, selector: as `IARed2.__call__` has them.
      attention: whether `out` has the CLS attention of every block.
    """

    module: IARed2
    keep_ratios: tuple[float, ...] | None = None
    selector: Selector = dataclasses.field(default_factory=ByInterpreter)
    attention: bool = False

    @property
    def equal_counts(self) -> bool:
        """Whether every image keeps the same number of tokens: then rows have no padding."""
        return self.keep_ratios is not None

    @property
    def runs_whole(self) -> bool:
        """Whether groups cannot be run one by one on lists of tokens, so not ragged."""
        return self.selector.after_attention or not self.module.shows_attention

    def with_kernel(self, kernel: str) -> "ForwardSpec":
        """This forward pass with another attention kernel."""
        backbone = self.module.backbone.clone(attention_kernel=kernel)
        return dataclasses.replace(self, module=self.module.clone(backbone=backbone))


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """A module with its variables: the methods of `IARed2` that selectors call, as functions."""

    module: IARed2
    variables: Mapping[str, Any]

    @property
    def num_prefix(self) -> int:
        return self.module.num_prefix

    @property
    def input_spec(self) -> InputSpec:
        return self.module.input_spec

    def interpret(
        self, group: int, x: Float[Array, "s t d"], alive: Bool[Array, "s n"] | None = None
    ) -> Float[Array, "s n h"]:
        """The group's interpreter logits."""
        return self.module.apply(self.variables, group, x, alive, method="interpret")

    def embed(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b t d"]:
        """The tokens that enter the first block."""
        return self.module.apply(self.variables, inputs, method="embed")

    def cls_attention(self, x: Float[Array, "b t d"], block: int) -> Float[Array, "b h n"]:
        """The CLS query's weights in a block of the dense backbone."""
        return self.module.apply(self.variables, x, block, method="cls_attention")
