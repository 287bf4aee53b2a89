"""From block to block: what the answer took from each patch, along attention-like matrices.

Blocks of the model pass tokens on as x -> x + A x, so what the CLS token holds in the end goes back
to the patches through the product of (I + A) over the blocks. Only its row is wanted: one vector
times one matrix per block, from the last to the first. A distilled model's classifier reads two
tokens; "the CLS row" of a map made here is the mean of both rows then.

CaiT has two kinds of blocks, of patches alone and of CLS reading the patches; each is a part of the
matrix over CLS and patches, the rest of which is the identity.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Float

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

Matrices = Sequence[Float[Array, "b _q _k"]]  # of each block its own


def answer_tokens(module: IARed2) -> int:
    """How many tokens the classifier reads: CLS, and a distilled model's second one."""
    return 2 if getattr(module.backbone, "distilled", False) else 1


def require_attention(module: IARed2, attention: Sequence[Array]) -> None:
    """Refuses a model whose attention is not shown, or whose CLS nobody can find in it.

    Raises:
      UsageError: one sentence.
    """
    name = type(module.backbone).__name__
    module.require_attention_weights("this map")
    if not attention:
        raise UsageError(f"{name} shows no attention weights: its layers must call models.taps.tap")
    if not module.num_prefix and attention[-1].shape[-2] != 1:
        raise UsageError(f"{name} has no CLS token, whose attention this map is made of")


def answer_rows(module: IARed2, weights: Float[Array, "b h q k"]) -> Float[Array, "b h a n"]:
    """The rows of the tokens that the classifier reads, over the patches."""
    prefix = max(1, module.num_prefix)
    return weights[:, :, : answer_tokens(module), prefix:]


def flow(
    module: IARed2, matrices: Matrices, *, start_block: int = 0, normalise: bool = False
) -> Float[Array, "b n"]:
    """The answer's row of the product of (I + A_b) over blocks b, last first, without CLS.

    Args:
      matrices: A_b of every block, first to last.
      start_block: the first block that counts.
      normalise: divide each row of I + A_b by its sum (attention rollout).

    Raises:
      UsageError: there is no such block.
    """
    if not 0 <= start_block < len(matrices):
        raise UsageError(f"start_block must be in 0..{len(matrices) - 1}, got {start_block}")
    prefix, first = max(1, module.num_prefix), matrices[0]
    tokens = prefix + module.input_spec.num_patches
    answers = answer_tokens(module)
    row = jnp.zeros((first.shape[0], tokens)).at[:, :answers].set(1 / answers)
    for matrix in reversed(matrices[start_block:]):
        if normalise:
            row = row / (1 + _row_sums(matrix, tokens))
        row = row + _times(row, matrix)
    return row[:, prefix:]


def _times(row: Float[Array, "b t"], matrix: Float[Array, "b q k"]) -> Float[Array, "b t"]:
    """A row vector over all tokens times a block's matrix, whatever part of it is there."""
    start = _first_query(matrix, row.shape[1])
    queries = row[:, start : start + matrix.shape[1]]
    product = jnp.einsum("bq,bqk->bk", queries, matrix)
    return jnp.pad(product, ((0, 0), (row.shape[1] - matrix.shape[2], 0)))


def _row_sums(matrix: Float[Array, "b q k"], tokens: int) -> Float[Array, "b t"]:
    start = _first_query(matrix, tokens)
    after = tokens - start - matrix.shape[1]
    return jnp.pad(matrix.sum(axis=-1), ((0, 0), (start, after)))


def _first_query(matrix: Float[Array, "b q k"], tokens: int) -> int:
    """Which token a matrix's first row is of: patches alone begin after CLS."""
    return tokens - matrix.shape[1] if matrix.shape[2] < tokens else 0
