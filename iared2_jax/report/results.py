"""The evaluation of a finished model: results.json, tables, figures and an HTML report."""

import logging
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from iared2_jax.config import flatten
from iared2_jax.config.loading import reduction_of, weights_of
from iared2_jax.data.datasets import Dataset
from iared2_jax.evaluation import evaluators
from iared2_jax.evaluation.agreement import answers_when_shown
from iared2_jax.evaluation.pruning import SHARES, measure_fn, pruning_curves, thresholds_of
from iared2_jax.files import writing
from iared2_jax.report import figures, tables
from iared2_jax.report.comparison import Comparison
from iared2_jax.report.page import PAGE, write_page, write_results
from iared2_jax.report.run_maps import draw_figures, explored, measure_maps
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import random_like
from iared2_jax.training.curriculum import reduces, trains_dense_first
from iared2_jax.versions import version
from iared2_jax.weights.save import save_weights

log = logging.getLogger(__name__)

RANDOM_MASK_SEED = 0


def evaluate_run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    params: dict[str, Any],
    original: dict[str, Any],
    dataset: Dataset,
    stop: Stop | None = None,
    model_options: dict[str, Any] | None = None,
    scored: bool = True,
    dense: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates trained parameters against the dense backbone that a run started from.

    Writes into the workdir: results.json, report.html, figures/*.png, and weights.safetensors if
    asked; prints the tables. All of it appears when all of it is made.

    Args:
      original: variables that the run started from.
      model_options: what `create_model` made the module with, to write weights.safetensors; None
        writes none.
      scored: False where the interpreters are fresh: their scores are not among the maps then.
      dense: the figures of the dense backbone, where another run from it has them; None: measured.

    Returns:
      The results as written.

    Raises:
      Interrupted: `stop` was requested on the way; nothing is written then.
      CheckpointError: the disk is full, or refuses.
    """
    data, drops = config.data, reduces(config)
    pixels, labels, masks = dataset.load(data.eval_split, data.eval_size, data.seed)
    crops = None
    if dataset.load_crops is not None and config.eval.video:
        crops = dataset.load_crops(data.eval_split, data.eval_size, data.seed)
    # Off the training's mesh: as the loaded ones lie, so that both models share compiled programs.
    trained = {"params": jax.tree.map(jnp.asarray, jax.device_get(params))}
    comparison = Comparison(
        config=config,
        module=module,
        trained=trained,
        original=original if drops and _has_dense(config) else trained,
        reduces=drops,
        scored=scored,
        pixels=pixels,
        labels=labels,
        masks=masks,
        class_names=dataset.class_names,
        stop=stop,
        crops=crops,
        reduction=reduction_of(config),
    )
    results, values = _measure(comparison, dataset, dense)
    if model_options is not None:
        _write_weights(comparison, results, workdir, model_options)
    _write(comparison, results, values, workdir)
    return results


def _has_dense(config: ml_collections.ConfigDict) -> bool:
    """Whether the dense backbone, from before tokens were dropped, is a trained one."""
    return bool(weights_of(config)) or trains_dense_first(config)


def _measure(
    comparison: Comparison, dataset: Dataset, dense: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The results, and the maps of the images that the page will show."""
    results: dict[str, Any] = {"run": comparison.config.name, "examples": len(comparison.pixels)}
    results["dense"] = dense or _dense(comparison)
    if comparison.reduces:
        # Another selector's figures are not ours.
        ours = comparison.selector == "interpreter"
        results["selector"] = comparison.selector
        results["iared2" if ours else "reduced"], counts = _reduced(comparison)
        if ours and comparison.labels is not None:
            results["random"] = _random(comparison, counts)
            if comparison.config.eval.agreement:
                results["agreement"] = _agreement(comparison)
            if comparison.config.eval.pruning:
                results["pruning"] = _pruning(comparison)
        # A comparison times all its methods in turn.
        if comparison.config.eval.speed_batch and not comparison.config.compare.selectors:
            results["images_per_second"] = _speed(comparison)
    measured, values = measure_maps(comparison)
    results.update(measured)
    if unusable := dataset.unusable():
        results["unusable_training_examples"] = unusable
    results["config"] = flatten(comparison.config)
    results["versions"] = versions()
    return results, values


def _dense(comparison: Comparison) -> dict[str, Any]:
    """The baseline's accuracy and cost."""

    def dense_pass(variables, inputs, batch):
        logits, _ = comparison.module.apply(variables, inputs, execution="dense")
        return {"top": evaluators.top_classes(logits)}

    seen = comparison.collect(comparison.compiled(dense_pass), comparison.original)
    return {
        **_answers(comparison, seen["top"]),
        **comparison.video_answers(comparison.original, execution="dense"),
        **dict(evaluators.cost(comparison.module, None)),
    }


def _answers(comparison: Comparison, top: np.ndarray) -> dict[str, Any]:
    """A model's accuracy, and what it takes for what; {} without labels."""
    if comparison.labels is None:
        return {}
    labels, names = comparison.labels, comparison.class_names
    return {
        **dict(evaluators.accuracy(top, labels)),
        "confusions": evaluators.confusions(top[:, 0], labels, names),
    }


def _reduced(comparison: Comparison) -> tuple[dict[str, Any], np.ndarray]:
    """Our accuracy and cost; the tokens kept [images, groups]."""
    module = comparison.module

    def reduced_pass(variables, inputs, batch):
        logits, out = module.apply(variables, inputs, **comparison.applied)
        return {
            "top": evaluators.top_classes(logits),
            "counts": jnp.stack([keep.sum(axis=-1) for keep in out.keep], axis=1),
        }

    seen = comparison.collect(comparison.compiled(reduced_pass), comparison.trained)
    counts = seen["counts"]
    figures = {
        **_answers(comparison, seen["top"]),
        **comparison.video_answers(comparison.trained, **comparison.applied),
        **dict(evaluators.kept_tokens(counts, module.input_spec.num_patches)),
        **dict(evaluators.cost(module, counts, comparison.selector)),
    }
    return figures, counts


def _random(comparison: Comparison, counts: np.ndarray) -> dict[str, float]:
    """Random masks with the same counts per image and group; nothing is retrained for them.

    On the trained model, and for comparison on the backbone it started from.
    """
    module = comparison.module
    masks = random_like(
        jax.random.key(RANDOM_MASK_SEED),
        [jnp.asarray(count) for count in counts.T],
        module.input_spec.num_patches,
    )
    masks = np.stack([np.asarray(mask) for mask in masks], axis=1)

    def random_pass(variables, inputs, batch):
        forced = [batch["keep"][:, group] for group in range(module.num_groups)]
        logits = module.apply(variables, inputs, keep=forced)[0]
        return {"top": evaluators.top_classes(logits)}

    fn = comparison.compiled(random_pass)

    def accuracy(variables):
        top = comparison.collect(fn, variables, keep=masks)["top"]
        return dict(evaluators.accuracy(top, comparison.labels))

    after = accuracy(comparison.trained)
    # Masks are given, so interpreters do not count: an untouched backbone answers the same.
    untouched = _same_backbone(comparison.original, comparison.trained)
    before = after if untouched else accuracy(comparison.original)
    return {**after, **{f"original_backbone_{key}": value for key, value in before.items()}}


def _same_backbone(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two models' blocks, embedding and head have the very same values."""
    pair = (variables["params"]["backbone"] for variables in (one, other))
    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), *pair))


def _agreement(comparison: Comparison) -> dict[str, Any]:
    """The accuracy by what the network is shown, and how often that answer is the dense one."""
    module = comparison.module
    how = {key: comparison.reduction[key] for key in ("thresholds", "keep_ratios")}

    def passes(variables, inputs, batch):
        key = jax.random.key(RANDOM_MASK_SEED)
        shown = answers_when_shown(module, variables, inputs, key, **how)
        dense = module.apply(variables, inputs, execution="dense")[0]
        return {name: logits.argmax(axis=-1) for name, logits in {**shown, "dense": dense}.items()}

    seen = comparison.collect(comparison.compiled(passes), comparison.trained)
    dense = seen.pop("dense")
    return {
        name: {
            "top1": float((answers == comparison.labels).mean()),
            "same_as_dense": float((answers == dense).mean()),
        }
        for name, answers in seen.items()
    }


def _pruning(comparison: Comparison) -> dict[str, list[dict[str, float]]]:
    """Curves of accuracy over linear FLOPs: tokens dropped, weights pruned, and both, greedily."""
    module, labels = comparison.module, comparison.labels

    def forward(variables, inputs, batch):
        logits, out = module.apply(variables, inputs, batch["thresholds"])
        return {
            "answer": logits.argmax(axis=-1),
            "kept": jnp.stack(out.keep, axis=1).sum(axis=-1),
            "scores": jnp.stack(out.scores, axis=1),
        }

    fn = comparison.compiled(forward)

    def answers(variables, threshold):
        shape = (len(comparison.pixels), module.num_groups)
        thresholds = np.full(shape, threshold, np.float32)
        return comparison.collect(fn, variables, thresholds=thresholds)

    measure, scores = measure_fn(module, comparison.trained, answers, labels)
    curves = pruning_curves(measure, thresholds_of(scores, comparison.config.eval.pruning), SHARES)
    return {kind: [point._asdict() for point in points] for kind, points in curves.items()}


def _speed(comparison: Comparison) -> dict[str, Any]:
    """Images, or clips, per second of one batch; the ragged plan is made with others."""
    config = comparison.config
    spec, size = comparison.module.input_spec, config.eval.speed_batch
    timed, sample = evaluators.speed_sample(spec, comparison.pixels, size)
    figures = evaluators.throughput(
        comparison.module,
        comparison.original,
        comparison.trained,
        timed,
        sample,
        reduction=comparison.reduction,
        rounds=config.eval.speed_rounds,
    )
    return {
        "batch": len(timed),
        "inputs": "clips" if spec.is_clip else "images",
        "dtype": config.model.dtype,
        "device": f"{jax.devices()[0].device_kind} x 1",
        **dict(figures),
    }


def _write_weights(
    comparison: Comparison, results: dict[str, Any], workdir: Path, options: dict[str, Any]
) -> None:
    best = tables.reduced_of(results) or results["dense"]
    metadata = {
        "create_model": options,
        "top1": best["top1"],
        "examples": results["examples"],
        "config": results["config"],
        "versions": results["versions"],
    }
    save_weights(
        comparison.trained,
        workdir / "weights.safetensors",
        metadata,
        interpreters=comparison.reduces,
        spec=comparison.module.input_spec,
    )


def _write(
    comparison: Comparison,
    results: dict[str, Any],
    values: dict[str, np.ndarray],
    workdir: Path,
) -> None:
    """Writes page, figures and results.

    Args:
      values: of the first images, by name.
    """
    # Made aside first: until all is there, what an evaluation before has written stays.
    with writing(workdir / PAGE) as draft, tempfile.TemporaryDirectory(dir=workdir) as aside:
        drawn, explorer = [], None
        # The pictures are of interpreters' scores and thresholds.
        ours = comparison.selector == "interpreter" and not comparison.reduction["keep_ratios"]
        if comparison.reduces and ours:
            explorer = explored(comparison, values)
            if comparison.config.eval.figures:
                drawn = draw_figures(comparison, values, Path(aside))
        if "perturbation" in results:
            drawn.append(figures.draw_curves(results, Path(aside) / "perturbation.png"))
        write_page(draft, results, drawn, explorer)
        for path in (workdir / "figures").glob("*.*"):
            path.unlink()
        for path in drawn:
            (workdir / "figures").mkdir(exist_ok=True)
            path.replace(workdir / "figures" / path.name)
    # Last, so that results.json says that everything else is there.
    write_results(results, workdir)
    log.info("results.json, report.html and figures are in %s", workdir)


def versions() -> dict[str, str]:
    """The versions that made a result."""
    packages = ("iared2_jax", "jax", "flax", "optax", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
