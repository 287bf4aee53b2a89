"""The contract of a selector."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.token_reduction.state import TokenState
from iared2_jax.typing import Array

if TYPE_CHECKING:
    from iared2_jax.token_reduction.model import IARed2


class Evidence(NamedTuple):
    """What a selector says of tokens.

    scores [s, n]: the higher, the more a token matters. interpreter_logits [s, n, heads]: what the
    scores were made of, if an interpreter made them.
    """

    scores: Array
    interpreter_logits: Array | None = None


class Selector:
    """What scores the tokens that enter a group; a subclass overrides one of the three methods.

    Selectors are compared and hashed (a compiled program belongs to one), so they are frozen
    dataclasses. `model` is something with the methods of `IARed2`: the module, or its stand-in in
    compiled execution.

    Attributes:
      probabilities: whether scores lie in [0, 1] and mean how sure it is that a token is needed. If
        not, no threshold makes sense, and a budget (`keep_ratios`) must say how many tokens stay.
      reducer: what becomes of the tokens that do not stay, where the caller names nothing else.
    """

    probabilities: bool = False
    reducer: str = "drop"

    @property
    def scores_inputs(self) -> bool:
        """Whether this selector has `input_scores`."""
        return type(self).input_scores is not Selector.input_scores

    @property
    def after_attention(self) -> bool:
        """Whether it has `scores_after_attention`: then tokens go before the first block's MLP."""
        return type(self).scores_after_attention is not Selector.scores_after_attention

    def input_scores(
        self, inputs: Float[Array, "b ..."], tokens: Float[Array, "b t d"], model: Any
    ) -> Float[Array, "b n"] | None:
        """Scores that are known before the first block, for all groups; None: `token_scores`.

        Args:
          inputs: normalised. tokens: what the backbone embeds them as, prefix first.
        """
        return None

    def token_scores(
        self,
        group: int,
        x: Float[Array, "s t d"],
        attention: Float[Array, "s h n"] | None,
        alive: Bool[Array, "s n"] | None,
        model: Any,
    ) -> Evidence:
        """Scores of the patch tokens of `x`, at the entry of `group` (from 1).

        Args:
          x: tokens, prefix first; rows may hold fewer than N patches, and padding.
          attention: the CLS query's weights in the block before; None before the first.
          alive: which patch tokens are there; None: all of them. What is said of others is not
            heard.
        """
        raise TypeError(
            f"{type(self).__name__} has none of input_scores, token_scores, scores_after_attention"
        )

    def scores_after_attention(self, state: TokenState, num_prefix: int) -> Evidence:
        """Scores of the patch tokens between attention and MLP of the group's first block.

        What they do not keep has been through that attention, and goes before that MLP.

        Args:
          state: the tokens there, with that attention's CLS weights and keys.
        """
        raise TypeError(f"{type(self).__name__} has no scores_after_attention")

    def flops(
        self, backbone: Backbone, entering: Sequence[ArrayLike]
    ) -> tuple[ArrayLike, ArrayLike]:
        """Multiply-accumulates that scoring costs an input, (linear, full); by default none.

        Args:
          entering: patch tokens that are handed to each group.
        """
        return 0.0, 0.0

    def check(self, module: "IARed2", keep_ratios: Sequence[float] | None) -> None:
        """Refuses a model or budget that this selector makes no sense for.

        Raises:
          ValueError: one sentence.
        """
        if self.after_attention and not hasattr(module.backbone, "run_attention_half"):
            raise ValueError(
                f"the selector {type(self).__name__} looks between attention and MLP, where the "
                f"blocks of {type(module.backbone).__name__} cannot be stopped"
            )
        if self.after_attention:
            module.require_attention_weights(f"the selector {type(self).__name__}")
        if not self.probabilities and keep_ratios is None:
            raise ValueError(
                f"the selector {type(self).__name__} needs keep_ratios: its scores are no "
                "probabilities that a threshold could cut"
            )
