"""Sanity checks of maps (Adebayo et al. 2018): does a map depend on what it claims to explain?"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jaxtyping import Float, Int

from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array


def rank_correlation(
    one: Float[np.ndarray, "b ..."], other: Float[np.ndarray, "b ..."]
) -> Float[np.ndarray, " b"]:
    """Spearman's, of each image's two maps: 1 where they order the places alike, 0 by chance.

    A map that is constant, or not finite, orders nothing: its correlation with any other is 0.
    """
    flat = (np.asarray(maps).reshape(len(maps), -1) for maps in (one, other))
    told = (np.where(np.isfinite(maps).all(axis=1, keepdims=True), maps, 0) for maps in flat)
    ranks = [scipy.stats.rankdata(maps, axis=1) for maps in told]
    first, second = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    norms = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return (first * second).sum(axis=1) / np.where(norms > 0, norms, 1)


def fit_random_labels(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    labels: Int[np.ndarray, " b"],
    *,
    learning_rate: float = 1e-3,
    most_steps: int = 200,
    enough: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, Any], float]:
    """The model with a backbone that has learned the images' labels after these were shuffled.

    All of the batch at each step of Adam, until it knows them by heart. The interpreters stay.

    Args:
      variables: what the backbone starts from; fresh ones, for Adebayo's test.
      enough: the accuracy on the shuffled labels to stop at.

    Returns:
      The variables, and the accuracy that was reached (if not enough, before the last step).
    """
    shuffled = jnp.asarray(np.random.default_rng(seed).permutation(labels))
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(params, state):
        """The parameters after a step of Adam, and the accuracy before it."""

        def loss(backbone):
            everything = {"params": {**variables["params"], "backbone": backbone}}
            logits = module.apply(everything, inputs, execution="dense")[0]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, shuffled)
            return losses.mean(), (logits.argmax(axis=-1) == shuffled).mean()

        (_, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, accuracy

    params, accuracy = variables["params"]["backbone"], 0.0
    state = optimizer.init(params)
    for _ in range(most_steps):
        moved, state, reached = step(params, state)
        accuracy = float(reached)
        if accuracy >= enough:
            break
        params = moved
    return {"params": {**variables["params"], "backbone": params}}, accuracy
