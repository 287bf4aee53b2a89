"""Every map of the same images, by every protocol: segmentation, perturbation, sanity checks."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from iared2_jax.attribution import segmentation
from iared2_jax.attribution.maps import to_heatmaps
from iared2_jax.errors import Interrupted, UsageError
from iared2_jax.evaluation.map_sources import MapSource, Variables, map_sources
from iared2_jax.evaluation.perturbation import Curves, Ends, ends_of, perturb, summarise_curves
from iared2_jax.evaluation.sanity import fit_random_labels, rank_correlation
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.create import init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.typing import Array

log = logging.getLogger(__name__)

BOOTSTRAP = 1000  # resamples
EXPLAINED = ("predicted", "label")
_FEW = 4  # images for the sanity checks of maps that cost hundreds of passes
_LEARNED = 32  # images whose shuffled labels are learned


def compare_maps(
    module: IARed2,
    trained: Variables,
    pixels: Any,
    *,
    original: Variables | None = None,
    labels: Int[np.ndarray, " n"] | None = None,
    masks: Bool[np.ndarray, "n ..."] | None = None,
    sources: Mapping[str, MapSource] | None = None,
    perturbation: bool = True,
    replacement: str = "black",
    explained: str = "predicted",
    sanity: bool = True,
    keep: int = 0,
    batch_size: int = 50,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Every map of the same images, measured by the published protocols.

    All maps but the interpreters' explain the dense backbone of `original`, and that one is also
    asked when pixels are taken away: one judge for all.

    Args:
      trained: variables whose interpreters score. original: those of the dense backbone before; by
        default the same.
      pixels: uint8 [n, H, W, C] (of clips [n, T, H, W, C]), or what gives such when indexed.
      labels: the true classes, for the accuracy under perturbation; None: the agreement with the
        unperturbed answer is read.
      masks: where the object is [n, H, W], for the segmentation protocol.
      sources: which maps; by default `map_sources(module)`.
      perturbation, sanity: whether to run these.
      replacement: of pixels taken away, see `evaluation.perturbation.replacement_for`.
      explained: which class the maps explain and probabilities are read of, one of `EXPLAINED`: the
        one that each image is taken for, or its label.
      keep: of so many images the maps themselves are returned, too.

    Returns:
      segmentation (if there are masks): figures by map, as `segmentation.summarise` makes them, and
      of "all_background". perturbation: figures by map, as `summarise_curves` makes them.
      sanity: see `check_sanity`; of the first batch. left_out: why a map is missing, by name.
      values: the maps of the first `keep` images, a value per patch or per pixel.

    Raises:
      Interrupted: if `stop` was requested.
      UsageError: maps that are NaN everywhere, or masks without foreground.
    """
    # Grain sets logging up when it is imported: not before a command of ours has.
    from iared2_jax.data.pipeline import eval_batches

    if explained not in EXPLAINED or (explained == "label" and labels is None):
        raise UsageError(
            f"explained={explained!r} must be predicted, or label where there are labels"
        )
    sources = dict(map_sources(module) if sources is None else sources)
    variables = {"trained": trained, "original": trained if original is None else original}
    if masks is not None and not np.asarray(masks).any():
        raise UsageError("none of the masks has any foreground: there is nothing to find")
    arrays = {"pixels": pixels, "labels": labels, "masks": masks}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    records = {name: _Record() for name in sources}
    left_out: dict[str, str] = {}
    results: dict[str, Any] = {"left_out": left_out}
    seen = 0
    for loaded in eval_batches(arrays, min(batch_size, len(pixels))):
        if stop is not None and stop.requested:
            raise Interrupted("the evaluation was stopped by a signal: nothing was written")
        batch = _prepared(
            loaded, module, variables["original"], explained, replacement if perturbation else None
        )
        values, refused = _computed(sources, variables, batch.inputs, batch.classes)
        for name, reason in refused.items():
            if seen:  # had the model not this map, the first batch would have shown it
                raise UsageError(f"the map {name!r} of a later batch: {reason}")
            log.warning("no map %s: %s", name, reason)
            left_out[name] = reason
            del sources[name], records[name]
        for name, record in records.items():
            record.values.append(values[name][batch.counted][: max(0, keep - seen)])
            heatmaps = to_heatmaps(values[name], module.input_spec)
            _refuse_nan(name, heatmaps)
            if masks is not None:
                record.counts.append(_segmented(heatmaps, batch))
            if perturbation:
                curves = _perturbed(heatmaps, batch, module, variables["original"], replacement)
                record.curves.append(curves)
        seen += batch.counted.sum()
        if sanity and "sanity" not in results:  # these compare whole maps: one batch tells
            results["sanity"] = check_sanity(
                module, variables, batch.inputs, batch.classes, sources, values,
                batch.counted, batch.labels,
            )  # fmt: skip
    if masks is not None:
        results["segmentation"] = _segmentation_results(records, np.asarray(masks))
    if perturbation:
        results["perturbation"] = {
            name: _perturbation_results(record.curves) for name, record in records.items()
        }
    if keep:
        results["values"] = {
            name: np.concatenate(record.values) for name, record in records.items()
        }
    return results


@dataclasses.dataclass
class _Record:
    """What is found of one map, batch by batch."""

    values: list[np.ndarray] = dataclasses.field(default_factory=list)
    counts: list[segmentation.MapCounts] = dataclasses.field(default_factory=list)
    curves: list[dict[str, Curves]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Images whose maps are compared.

    inputs: normalised. counted: which are no padding. labels, masks: None where there are none.
    ends: what the original model answers to whole images, and to those without a pixel left; None
      where nothing is taken away.
    classes: those that are explained.
    """

    inputs: Float[Array, "b ..."]
    counted: Bool[np.ndarray, " b"]
    labels: Int[np.ndarray, " b"] | None
    masks: Bool[np.ndarray, "b ..."] | None
    ends: Ends | None
    classes: Int[Array, " b"]


def _prepared(
    loaded: Mapping[str, np.ndarray],
    module: IARed2,
    original: Variables,
    explained: str,
    replacement: str | None,
) -> _Batch:
    """The batch of what `eval_batches` gives; replacement: None where nothing is taken away."""
    inputs = module.input_spec.normalize(jnp.asarray(loaded["pixels"]))
    labels = loaded.get("labels")
    ends = ends_of(module, original, inputs, replacement) if replacement else None
    if explained == "label":
        classes = labels
    elif ends is not None:
        classes = ends.whole.argmax(axis=-1)
    else:
        classes = _dense_logits(module, original, inputs).argmax(axis=-1)
    # Given as a target, so that the same compiled program does for another class.
    classes = jnp.asarray(classes, int)
    return _Batch(inputs, loaded["counted"], labels, loaded.get("masks"), ends, classes)


@functools.partial(jax.jit, static_argnums=0)
def _dense_logits(module: IARed2, variables: Variables, inputs: Array) -> Array:
    """Compiled once for all batches."""
    return module.apply(variables, inputs, execution="dense")[0]


def _computed(
    sources: Mapping[str, MapSource],
    variables: Mapping[str, Variables],
    inputs: Array,
    classes: Int[Array, " b"],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The maps of a batch by name, and why the model has not the others."""
    values, refused = {}, {}
    for name, source in sources.items():
        try:
            values[name] = source(variables[source.of], inputs, classes)
        except UsageError as error:
            refused[name] = str(error)
    return values, refused


def _segmented(heatmaps: Array, batch: _Batch) -> segmentation.MapCounts:
    """How one map's foreground agrees with the masks, without the padding."""
    counted = batch.counted
    return segmentation.measure(np.asarray(heatmaps)[counted], batch.masks[counted])


def _perturbed(
    heatmaps: Array, batch: _Batch, module: IARed2, original: Variables, replacement: str
) -> dict[str, Curves]:
    """The curves of one map by order, without the padding."""
    curves = perturb(
        module, original, batch.inputs, heatmaps, batch.labels,
        explained=np.asarray(batch.classes), replacement=replacement, ends=batch.ends,
    )  # fmt: skip
    return {order: Curves(*(x[batch.counted] for x in part)) for order, part in curves.items()}


def _refuse_nan(name: str, heatmaps: Array) -> None:
    pixels = tuple(range(1, heatmaps.ndim))
    if bool(jnp.isnan(heatmaps).all(axis=pixels).any()):
        raise UsageError(f"the map {name!r} is NaN everywhere on an image: are the weights finite?")


def _segmentation_results(records: Mapping[str, _Record], masks: np.ndarray) -> dict[str, Any]:
    found = {
        name: segmentation.summarise(segmentation.concatenate(record.counts), bootstrap=BOOTSTRAP)
        for name, record in records.items()
    }
    nothing = segmentation.measure(np.zeros(masks.shape, np.float32), masks)
    found["all_background"] = segmentation.summarise(nothing, bootstrap=BOOTSTRAP)
    return found


def _perturbation_results(parts: Sequence[Mapping[str, Curves]]) -> dict[str, Any]:
    curves = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    n = len(curves["positive"].correct)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP) / n
    return summarise_curves(curves, lambda values: weights @ values)


def check_sanity(
    module: IARed2,
    variables: Mapping[str, Variables],
    inputs: Array,
    classes: Int[Array, " b"],
    sources: Mapping[str, MapSource],
    values: Mapping[str, np.ndarray],
    counted: Bool[np.ndarray, " b"],
    labels: Int[np.ndarray, " b"] | None,
) -> dict[str, dict[str, float]]:
    """How much each map stays the same where it must not: mean rank correlations, 1 is "the same".

    Args:
      classes: those that are explained. values: the maps themselves, by name.
      counted: which inputs are no padding.
      labels: the true classes, or None.

    Returns:
      By map: "random_weights", with the map after all weights were drawn anew; "random_labels",
      with that of a fresh backbone that has learned the shuffled labels of the first 32 by heart
      (`fit_random_labels`; where labels are known; the mean is over these); "other_class", with
      that of the next class, where it explains one.
    """
    models = {"random_weights": init_variables(module, seed=1)}
    if labels is not None:
        fresh = models["random_weights"]["params"]["backbone"]
        start = {"params": {**variables["trained"]["params"], "backbone": fresh}}
        models["random_labels"], reached = fit_random_labels(
            module, start, inputs[:_LEARNED], np.asarray(labels)[:_LEARNED]
        )
        log.info("sanity check: shuffled labels learned to an accuracy of %.2f", reached)
    other = (classes + 1) % module.backbone.num_classes
    found = {}
    for name, source in sources.items():
        few = slice(_FEW if source.many_passes else None)
        images, shown = inputs[few], counted[few]
        own = values[name][few]
        rivals = {check: source(model, images, classes[few]) for check, model in models.items()}
        if source.explains_class:
            rivals["other_class"] = source(variables[source.of], images, other[few])
        same = {check: rank_correlation(own, rival)[shown] for check, rival in rivals.items()}
        if "random_labels" in same:  # of all images, as no map is compiled for fewer
            same["random_labels"] = same["random_labels"][:_LEARNED]
        found[name] = {check: float(values.mean()) for check, values in same.items()}
    return found
