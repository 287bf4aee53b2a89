"""Perturbation: does the answer hang on the pixels that a map calls important?

The protocol of Chefer et al. (2021): pixels are taken away in the order of a map, tenth by tenth,
and the accuracy is read after each step. *Positive*: the most important first, so that a good map
makes the curve fall early (a small area under it). *Negative*: the least important first, so that
it falls late (a large area).

The same images, read otherwise, are RISE's tests (Petsiuk et al. 2018): *deletion* is the positive
order, *insertion* the negative one from its end, both read by the class's probability.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

STEPS = 10  # the share of the pixels that is gone grows from 0 to 1 in so many steps
REPLACEMENTS = ("black", "mean", "blur")
ORDERS = ("positive", "negative")

# Of the published area under the curve, which ends at nine tenths.
_LAST_OF_AREA = 9
_BLUR_SIGMA = 1 / 16  # of the shorter side


class Curves(NamedTuple):
    """What a model answers while pixels are taken away, per image and step.

    correct: whether the answer is the label. agrees: whether it is the unperturbed one.
    probability: of the explained class.
    """

    correct: Float[np.ndarray, "n steps"]
    agrees: Float[np.ndarray, "n steps"]
    probability: Float[np.ndarray, "n steps"]


def replacement_for(
    inputs: Float[Array, "b ..."], spec: InputSpec, kind: str
) -> Float[Array, "b ..."]:
    """What stands in the place of pixels that are gone.

    Args:
      kind: "black" (the published evaluation), "mean" (the data's mean colour, 0 once normalised),
        or "blur" (the image itself without its detail).

    Raises:
      UsageError: no such kind.
    """
    if kind not in REPLACEMENTS:
        raise UsageError(f"there is no replacement {kind!r}{nearest(kind, REPLACEMENTS)}")
    if kind == "mean":
        return jnp.zeros_like(inputs)
    if kind == "black":
        return jnp.broadcast_to(spec.normalize(jnp.zeros(spec.shape[-1])), inputs.shape)
    return _blurred(inputs, _BLUR_SIGMA * min(spec.size))


def _blurred(inputs: Float[Array, "b ..."], sigma: float) -> Float[Array, "b ..."]:
    """Convolved with a Gaussian along height and width; the border is repeated."""
    reach = int(np.ceil(3 * sigma))
    kernel = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (-3, -2):
        widths = [(0, 0)] * inputs.ndim
        widths[axis] = (reach, reach)
        padded = jnp.pad(inputs, widths, mode="edge")
        size = inputs.shape[axis]
        shifted = (
            jax.lax.slice_in_dim(padded, i, i + size, axis=axis % inputs.ndim)
            for i in range(len(kernel))
        )
        inputs = sum(weight * part for weight, part in zip(kernel, shifted, strict=True))
    return inputs


def ranks(heatmaps: Float[np.ndarray, "b ..."]) -> Int[np.ndarray, "b ..."]:
    """Every pixel's place in the order of its map, the greatest 0; ties in the order of pixels."""
    flat = heatmaps.reshape(len(heatmaps), -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    places = np.empty(flat.shape, np.int32)
    np.put_along_axis(places, order, np.arange(flat.shape[1], dtype=np.int32)[None], axis=-1)
    return places.reshape(heatmaps.shape)


@functools.partial(jax.jit, static_argnums=0, static_argnames="replacement")
def perturbed_answers(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    places: Int[Array, "b ..."],
    gone: Int[Array, ""],
    *,
    replacement: str = "black",
) -> Float[Array, "b classes"]:
    """The dense logits where the first `gone` pixels in the order of `places` are replaced."""
    blank = replacement_for(inputs, module.input_spec, replacement)
    changed = jnp.where((places < gone)[..., None], blank, inputs)
    return module.apply(variables, changed, execution="dense")[0]


class Ends(NamedTuple):
    """The probabilities [b, classes] of whole images, and of those without a pixel left."""

    whole: Float[np.ndarray, "b classes"]
    nothing: Float[np.ndarray, "b classes"]


def ends_of(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    replacement: str = "black",
) -> Ends:
    """Where every curve of these images begins and ends, whatever the map and its order."""
    places = np.zeros(inputs.shape[:-1], np.int32)
    first, last = (
        _probabilities(module, variables, inputs, places, gone, replacement) for gone in (0, 1)
    )
    return Ends(first, last)


def _probabilities(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    places: Int[np.ndarray, "b ..."],
    gone: int,
    replacement: str,
) -> Float[np.ndarray, "b classes"]:
    logits = perturbed_answers(
        module, variables, inputs, places, jnp.asarray(gone), replacement=replacement
    )
    return np.asarray(jax.nn.softmax(logits))


def perturb(
    module: IARed2,
    variables: Mapping[str, Any],
    inputs: Float[Array, "b ..."],
    heatmaps: Float[Array, "b ..."],
    labels: Int[np.ndarray, " b"] | None = None,
    *,
    explained: Int[np.ndarray, " b"] | None = None,
    replacement: str = "black",
    ends: Ends | None = None,
) -> dict[str, Curves]:
    """Both orders' curves over the shares 0, 0.1 .. 1 of the pixels that are gone.

    18 forward passes of the dense backbone per image, and the two ends.

    Args:
      heatmaps: [B, H, W], of clips [B, T, H, W].
      labels: the true classes; None: unknown, then "correct" is NaN.
      explained: the class whose probability is read; None: the one that each image is taken for.
      replacement: see `replacement_for`.
      ends: what `ends_of` gives: the same for every map.

    Raises:
      UsageError: no such replacement, or heatmaps that are not as large as the inputs.
    """
    if heatmaps.shape != inputs.shape[:-1]:
        raise UsageError(
            f"heatmaps must be {list(inputs.shape[:-1])}, one value per pixel, "
            f"got {list(heatmaps.shape)}"
        )

    values, pixels = np.asarray(heatmaps), heatmaps[0].size
    orders = {"positive": ranks(values), "negative": ranks(-values)}
    whole, nothing = ends or ends_of(module, variables, inputs, replacement)

    def answer(order: str, step: int) -> np.ndarray:
        """Probabilities where so many tenths of the pixels are gone."""
        gone = round(step * pixels / STEPS)
        return _probabilities(module, variables, inputs, orders[order], gone, replacement)

    taken_for = whole.argmax(axis=-1)
    explained = taken_for if explained is None else np.asarray(explained)
    curves = {}
    for order in ORDERS:
        steps = [whole, *(answer(order, step) for step in range(1, STEPS)), nothing]
        answers = np.stack(steps, axis=1)
        top = answers.argmax(axis=-1)
        correct = np.full(top.shape, np.nan) if labels is None else top == labels[:, None]
        curves[order] = Curves(
            correct.astype(np.float32),
            (top == taken_for[:, None]).astype(np.float32),
            np.take_along_axis(answers, explained[:, None, None], axis=-1)[..., 0],
        )
    return curves


def area(
    curve: Float[np.ndarray, "... steps"], last: int = _LAST_OF_AREA
) -> np.ndarray | np.floating:
    """The area under curves over the share that is gone, from 0 to last / 10, by trapezoids.

    Published areas end at nine tenths, so that 0.9 is the most.
    """
    part = curve[..., : last + 1]
    return (part[..., 1:] + part[..., :-1]).sum(axis=-1) / 2 / STEPS


def summarise_curves(
    curves: Mapping[str, Curves], resample: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Any]:
    """A map's curves and areas, with a 95% interval each.

    Args:
      resample: values per image [n] to means of bootstrap resamples [R].

    Returns:
      positive_auc, negative_auc: areas of the accuracy, 0 .. 0.9 (of the agreement with the
      unperturbed answer where there are no labels). deletion_auc, insertion_auc: areas of the
      probability, 0 .. 1. interval: of these. curves: the accuracy and the probability, step by
      step. read: "accuracy" or "agreement".
    """
    labelled = not np.isnan(curves["positive"].correct).any()

    def read(order: str) -> np.ndarray:
        return curves[order].correct if labelled else curves[order].agrees

    areas = {f"{order}_auc": area(read(order)) for order in ORDERS}
    areas["deletion_auc"] = area(curves["positive"].probability, STEPS)
    areas["insertion_auc"] = area(curves["negative"].probability, STEPS)
    return {
        **{name: float(values.mean()) for name, values in areas.items()},
        "interval": {
            name: np.percentile(resample(values), (2.5, 97.5)).tolist()
            for name, values in areas.items()
        },
        "read": "accuracy" if labelled else "agreement",
        "curves": {
            order: {
                "accuracy": read(order).mean(axis=0).tolist(),
                "probability": curves[order].probability.mean(axis=0).tolist(),
            }
            for order in ORDERS
        },
    }
