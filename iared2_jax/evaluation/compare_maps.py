"""Every map of the same images, by every protocol: segmentation, perturbation, sanity checks."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from iared2_jax.attribution import segmentation
from iared2_jax.attribution.batched_forward import dense_logits
from iared2_jax.attribution.maps import to_heatmaps
from iared2_jax.attribution.methods import METHODS, attribute, check_options, options_of
from iared2_jax.attribution.methods.interpreter import masked_pass
from iared2_jax.attribution.methods.raw_attention import attention_of_blocks
from iared2_jax.errors import Interrupted, UsageError
from iared2_jax.evaluation.perturbation import Curves, perturb, summarise_curves
from iared2_jax.evaluation.sanity import fit_random_labels, rank_correlation
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.create import init_variables
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.typing import Array

log = logging.getLogger(__name__)

BOOTSTRAP = 1000  # resamples
EXPLAINED = ("predicted", "label")
_FEW = 4  # images for the sanity checks of maps that cost hundreds of passes

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
    thresholds: Thresholds = 0.5,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, MapSource]:
    """The maps that methods make, by name.

    "interpreter" makes one for each group, "raw_attention" one for each block.

    Args:
      methods: names of `attribution.METHODS`; "all": all of them that need nothing more.
      thresholds: of the interpreters, whose later groups score what earlier ones kept.
      options: more options, by method.

    Raises:
      UsageError: there is no such method, or it has no such option.
    """
    options = dict(options or {})
    # Memorability is somebody else's scorer: only where one is given.
    everything = [name for name in METHODS if name != "memorability" or name in options]
    made: dict[str, MapSource] = {}
    for method in everything if "all" in methods else methods:
        check_options(method, options.get(method, {}))
        if method == "interpreter":
            for group in range(module.num_groups):
                made[f"group_{group + 1}"] = MapSource(
                    functools.partial(_scores_of, module, group, thresholds), "trained"
                )
        elif method == "raw_attention":
            for block in range(_attention_blocks(module)):
                made[f"raw_attention_block_{block}"] = MapSource(
                    functools.partial(_attention_of, module, block)
                )
        else:
            compute = functools.partial(_by_method, method, module, options.get(method, {}))
            has_target = "target" in options_of(METHODS[method])
            made[method] = MapSource(
                compute, explains_class=has_target, many_passes=method in ("lime", "occlusion")
            )
    return made


def _scores_of(module: IARed2, group: int, thresholds: Thresholds, variables, inputs, _) -> Array:
    return masked_pass(module, variables, inputs, thresholds).scores[group]


def _attention_of(module: IARed2, block: int, variables, inputs, _) -> Array:
    return attention_of_blocks(module, variables, inputs)[block]


def _by_method(method: str, module: IARed2, options, variables, inputs, target) -> Array:
    return attribute(method, module, variables, inputs, target=target, **options)


def _attention_blocks(module: IARed2) -> int:
    """How many blocks show a CLS query's attention; CaiT's are its class-attention blocks."""
    shape = jax.ShapeDtypeStruct((1, *module.input_spec.shape), jnp.float32)
    variables = jax.eval_shape(lambda: init_variables(module, 0))
    out = jax.eval_shape(lambda v, x: module.apply(v, x, execution="dense")[1], variables, shape)
    return len(out.attention)


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
    sources, left_out = _usable(sources, variables, module, batch_size)
    arrays = {"pixels": pixels}
    if labels is not None:
        arrays["labels"] = np.asarray(labels)
    if masks is not None:
        arrays["masks"] = masks
    records = {name: _Record() for name in sources}
    results: dict[str, Any] = {"left_out": left_out}
    seen = 0
    for batch in eval_batches(arrays, batch_size):
        if stop is not None and stop.requested:
            raise Interrupted("the evaluation was stopped by a signal: nothing was written")
        there, truth = batch["counted"], batch.get("labels")
        inputs = module.input_spec.normalize(jnp.asarray(batch["pixels"]))
        # Given as a target, so that the same compiled program does for another class.
        classes = dense_logits(module, variables["original"], inputs).argmax(axis=-1)
        if explained == "label":
            classes = jnp.asarray(truth, classes.dtype)
        for name, source in sources.items():
            values = source(variables[source.of], inputs, classes)
            heatmaps = to_heatmaps(values, module.input_spec)
            _refuse_nan(name, heatmaps)
            records[name].values.append(values[there][: max(0, keep - seen)])
            if masks is not None:
                found = segmentation.measure(np.asarray(heatmaps)[there], batch["masks"][there])
                records[name].counts.append(found)
            if perturbation:
                how = {"replacement": replacement, "explained": np.asarray(classes)}
                curves = perturb(module, variables["original"], inputs, heatmaps, truth, **how)
                records[name].curves.append(_rows(curves, there))
        seen += there.sum()
        if sanity and "sanity" not in results:  # these compare whole maps: one batch tells
            results["sanity"] = check_sanity(
                module, variables, inputs, classes, sources, there, truth
            )
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


def _rows(curves: Mapping[str, Curves], there: np.ndarray) -> dict[str, Curves]:
    return {order: Curves(*(x[there] for x in part)) for order, part in curves.items()}


def _usable(
    sources: dict[str, MapSource],
    variables: Mapping[str, Variables],
    module: IARed2,
    batch_size: int,
) -> tuple[dict[str, MapSource], dict[str, str]]:
    """The maps that the model can have, and why it cannot have the others; nothing is computed."""
    left_out = {}
    for name, source in sources.items():
        # As many images as later, so that what is traced here is not traced again.
        count = 1 if source.many_passes else batch_size
        inputs = jax.ShapeDtypeStruct((count, *module.input_spec.shape), jnp.float32)
        classes = jax.ShapeDtypeStruct((count,), jnp.int32) if source.explains_class else None
        try:
            jax.eval_shape(source.compute, variables[source.of], inputs, classes)
        except UsageError as error:
            left_out[name] = str(error)
            log.warning("no map %s: %s", name, error)
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
            pass  # it is not computed by jax alone, and will say itself what is wrong
    return {name: s for name, s in sources.items() if name not in left_out}, left_out


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
    counted: Bool[np.ndarray, " b"],
    labels: Int[np.ndarray, " b"] | None,
) -> dict[str, dict[str, float]]:
    """How much each map stays the same where it must not: mean rank correlations, 1 is "the same".

    Args:
      classes: those that are explained. counted: which inputs are no padding.
      labels: the true classes, or None.

    Returns:
      By map: "random_weights", with the map after all weights were drawn anew; "random_labels",
      with that of a fresh backbone that has learned shuffled labels by heart (`fit_random_labels`;
      where labels are known); "other_class", with that of the next class, where it explains one.
    """
    models = {"random_weights": init_variables(module, seed=1)}
    if labels is not None:
        fresh = models["random_weights"]["params"]["backbone"]
        start = {"params": {**variables["trained"]["params"], "backbone": fresh}}
        models["random_labels"], reached = fit_random_labels(
            module, start, inputs, np.asarray(labels)
        )
        log.info("sanity check: shuffled labels learned to an accuracy of %.2f", reached)
    other = (classes + 1) % module.backbone.num_classes
    found = {}
    for name, source in sources.items():
        few = slice(_FEW if source.many_passes else None)
        images, shown = inputs[few], counted[few]
        own = source(variables[source.of], images, classes[few])
        rivals = {check: source(model, images, classes[few]) for check, model in models.items()}
        if source.explains_class:
            rivals["other_class"] = source(variables[source.of], images, other[few])
        found[name] = {
            check: float(rank_correlation(own, rival)[shown].mean())
            for check, rival in rivals.items()
        }
    return found
