"""What a forward pass returns beside the logits: the same fields in every execution."""

import warnings
from typing import Any

import flax.struct

from iared2_jax.typing import Array

_RENAMED = {"head_logits": "interpreter_logits"}


@flax.struct.dataclass
class Output:
    """What led to the logits; arrays on the original patch grid, N patches of an input each.

    The fields are `Any`: JAX fills the same structure with shapes and shardings, too.

    Attributes:
      scores: per group [B, N], what its tokens were judged by; 0 where a token was already dropped.
      keep: per group [B, N], which tokens its blocks see. (Of "evit" and "tome" from its first MLP
        on; a fused token is where the best of those that made it was, a merged one where its
        target was.)
      interpreter_logits: per group [B, N, heads], before Eq. 1's sigmoid; () for other selectors.
        Of dropped tokens they are those of no meaning, or 0.
      overflow: per group [B], kept tokens that found no slot; 0 unless execution is "gathered".
      attention: per block that has a CLS query [B, heads, N], its weights (of CaiT, the
        class-attention blocks); () where nobody asked a compiled run for them.
      features: [B, f], what the classifier reads: CLS first, with some heads more.
    """

    scores: Any = ()
    keep: Any = ()
    interpreter_logits: Any = ()
    overflow: Any = ()
    attention: Any = ()
    features: Any = None

    def __getitem__(self, name: str) -> Array | tuple[Array, ...]:
        """The field of that name: how it was read when this was a dict."""
        field = _RENAMED.get(name, name)
        if field not in self:
            raise KeyError(name)
        warnings.warn(
            f'out["{name}"] goes with the next release: read out.{field}',
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(self, field)

    def __contains__(self, name: str) -> bool:
        return _RENAMED.get(name, name) in self.__dataclass_fields__

    def keys(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(self.__dataclass_fields__)
