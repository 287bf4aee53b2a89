"""The evaluation of a finished model: results.json, tables, figures and an HTML report."""

import dataclasses
import importlib.metadata
import logging
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from einops import rearrange

from iared2_jax.config import flatten
from iared2_jax.config.loading import reduction_of, weights_of
from iared2_jax.data.datasets import Dataset
from iared2_jax.data.image_files import EvalInputs
from iared2_jax.evaluation import evaluators
from iared2_jax.files import writing
from iared2_jax.report import figures, tables
from iared2_jax.report.page import FIGURES, PAGE, write_page, write_results
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import random_like
from iared2_jax.training.curriculum import reduces
from iared2_jax.weights.save import save_weights

log = logging.getLogger(__name__)

RANDOM_MASK_SEED = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A trained model beside the dense baseline, on one evaluation set.

    Attributes:
      trained: variables of the finished model.
      original: variables of the dense baseline: the backbone as `config.weights` has it. A backbone
        that was trained from scratch is its own baseline.
      reduces: whether it drops tokens at all (a supervised run does not).
      pixels, labels, masks: the evaluation set; masks, the segmentation truth, may be None.
      class_names: of the labels.
      crops: of clips: several crops of each, whose logits make a video's answer; else None.
      reduction: what a model is applied with to drop tokens (`config.loading.reduction_of`).
    """

    config: ml_collections.ConfigDict
    module: IARed2
    trained: dict[str, Any]
    original: dict[str, Any]
    reduces: bool
    pixels: np.ndarray | EvalInputs
    labels: np.ndarray
    masks: np.ndarray | None
    class_names: tuple[str, ...]
    stop: Stop | None
    crops: np.ndarray | EvalInputs | None
    reduction: dict[str, Any]

    @property
    def selector(self) -> str:
        return self.reduction["selector"]

    @property
    def applied(self) -> dict[str, Any]:
        """What the reduced model is applied with: masked, or gathered where counts are fixed."""
        slots = self.module.keep_counts(self.reduction["keep_ratios"])
        how = {"execution": "gathered", "capacities": slots} if slots else {}
        return {**self.reduction, **how}

    def compiled(self, fn: Callable[..., dict[str, jax.Array]]) -> Callable[..., Any]:
        """`fn(variables, inputs, batch)`, jitted, with the inputs normalised on the device."""
        spec = self.module.input_spec
        return jax.jit(lambda v, batch: fn(v, spec.normalize(batch["pixels"]), batch))

    def collect(
        self, fn: Callable[..., Any], variables: dict[str, Any], **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The results of a compiled `fn` over the whole evaluation set."""
        arrays = {"pixels": self.pixels, **more}
        return evaluators.collect(
            lambda batch: fn(variables, batch), arrays, self.config.eval.batch_size, self.stop
        )

    def video_answers(self, variables: dict[str, Any], **how: Any) -> dict[str, Any]:
        """{"video": top-1 and top-5 of the summed logits of every video's crops}; {} for images.

        Args:
          how: what the model is applied with.
        """
        if self.crops is None:
            return {}
        spec, module = self.module.input_spec, self.module

        @jax.jit
        def summed(variables, batch):
            crops = batch["crops"]
            flat = spec.normalize(rearrange(crops, "b v ... -> (b v) ..."))
            logits = module.apply(variables, flat, **how)[0]
            return {"top": evaluators.top_classes(logits.reshape(*crops.shape[:2], -1).sum(axis=1))}

        seen = evaluators.collect(
            lambda batch: summed(variables, batch),
            {"crops": self.crops},
            max(1, self.config.eval.batch_size // 3),
            self.stop,
        )
        return {"video": dict(evaluators.accuracy(seen["top"], self.labels))}


def evaluate_run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    params: dict[str, Any],
    original: dict[str, Any],
    dataset: Dataset,
    stop: Stop | None = None,
    model_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates trained parameters against the dense backbone that a run started from.

    Writes into the workdir: results.json, report.html, figures/*.png, and weights.safetensors if
    asked; prints the tables. All of it appears when all of it is made.

    Args:
      original: variables that the run started from.
      model_options: what `create_model` made the module with, to write weights.safetensors; None
        writes none.

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
    trained = {"params": params}
    comparison = Comparison(
        config=config,
        module=module,
        trained=trained,
        original=original if weights_of(config) and drops else trained,
        reduces=drops,
        pixels=pixels,
        labels=labels,
        masks=masks,
        class_names=dataset.class_names,
        stop=stop,
        crops=crops,
        reduction=reduction_of(config),
    )
    results = _measure(comparison, dataset)
    if model_options is not None:
        _write_weights(comparison, results, workdir, model_options)
    _write(comparison, results, workdir)
    return results


def _measure(comparison: Comparison, dataset: Dataset) -> dict[str, Any]:
    results: dict[str, Any] = {"run": comparison.config.name, "examples": len(comparison.labels)}
    results["dense"], maps = _dense(comparison)
    if comparison.reduces:
        # Another selector's figures are not ours.
        ours = comparison.selector == "interpreter"
        results["selector"] = comparison.selector
        results["iared2" if ours else "reduced"], counts, scores = _reduced(comparison)
        if ours:
            results["random"] = _random(comparison, counts)
        maps = {**scores, **maps}
        # A comparison times all its methods in turn.
        if comparison.config.eval.speed_batch and not comparison.config.compare.selectors:
            results["images_per_second"] = _speed(comparison)
    if comparison.masks is not None:
        results["foreground_share"] = float(comparison.masks.mean())
        results["segmentation"] = dict(
            evaluators.segmentation(maps, comparison.masks, comparison.module.input_spec)
        )
    if unusable := dataset.unusable():
        results["unusable_training_examples"] = unusable
    results["config"] = flatten(comparison.config)
    results["versions"] = _versions()
    return results


def _dense(comparison: Comparison) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The baseline's accuracy and cost; the raw attention of its blocks, if it will be judged."""
    judged = comparison.masks is not None

    def dense_pass(variables, inputs, batch):
        logits, out = comparison.module.apply(variables, inputs, execution="dense")
        found = {"top": evaluators.top_classes(logits)}
        if judged and out.attention:
            found["attention"] = jnp.stack([maps.mean(1) for maps in out.attention], axis=1)
        return found

    seen = comparison.collect(comparison.compiled(dense_pass), comparison.original)
    figures = {
        **_answers(comparison, seen["top"]),
        **comparison.video_answers(comparison.original, execution="dense"),
        **dict(evaluators.cost(comparison.module, None)),
    }
    if "attention" not in seen:
        return figures, {}
    # Without CLS in its groups (CaiT), the blocks are the class-attention blocks.
    blocks = range(seen["attention"].shape[1])
    return figures, {f"raw_attention_block_{b}": seen["attention"][:, b] for b in blocks}


def _answers(comparison: Comparison, top: np.ndarray) -> dict[str, Any]:
    """The accuracy of a model's likeliest classes, and what it takes for what."""
    labels, names = comparison.labels, comparison.class_names
    return {
        **dict(evaluators.accuracy(top, labels)),
        "confusions": evaluators.confusions(top[:, 0], labels, names),
    }


def _reduced(
    comparison: Comparison,
) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """Our accuracy and cost; the tokens kept [images, groups]; the groups' scores, if judged."""
    judged, module = comparison.masks is not None, comparison.module

    def reduced_pass(variables, inputs, batch):
        logits, out = module.apply(variables, inputs, **comparison.applied)
        found = {
            "top": evaluators.top_classes(logits),
            "counts": jnp.stack([keep.sum(axis=-1) for keep in out.keep], axis=1),
        }
        return {**found, "scores": jnp.stack(out.scores, axis=1)} if judged else found

    seen = comparison.collect(comparison.compiled(reduced_pass), comparison.trained)
    counts = seen["counts"]
    figures = {
        **_answers(comparison, seen["top"]),
        **comparison.video_answers(comparison.trained, **comparison.applied),
        **dict(evaluators.kept_tokens(counts, module.input_spec.num_patches)),
        **dict(evaluators.cost(module, counts, comparison.selector)),
    }
    groups = range(module.num_groups) if judged else ()
    name = "group" if comparison.selector == "interpreter" else f"{comparison.selector}_group"
    return figures, counts, {f"{name}_{g + 1}": seen["scores"][:, g] for g in groups}


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

    before = {f"original_backbone_{k}": v for k, v in accuracy(comparison.original).items()}
    return {**accuracy(comparison.trained), **before}


def _speed(comparison: Comparison) -> dict[str, Any]:
    """Images per second of one batch; the ragged plan is made with other images than the timed."""
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


def _write(comparison: Comparison, results: dict[str, Any], workdir: Path) -> None:
    # Made aside first: until all is there, what an evaluation before has written stays.
    with writing(workdir / PAGE) as draft, tempfile.TemporaryDirectory(dir=workdir) as aside:
        drawn = []
        # The pictures are of interpreters' scores and thresholds.
        ours = comparison.selector == "interpreter" and not comparison.reduction["keep_ratios"]
        if comparison.reduces and ours and comparison.config.eval.figures:
            drawn = _draw(comparison, Path(aside))
        write_page(draft, results, [path.name for path in drawn])
        for path in (workdir / "figures").glob("*.*"):
            path.unlink()
        for path in drawn:
            (workdir / "figures").mkdir(exist_ok=True)
            path.replace(workdir / "figures" / path.name)
    # Last, so that results.json says that everything else is there.
    write_results(results, workdir)
    log.info("results.json, report.html and figures are in %s", workdir)


def _draw(comparison: Comparison, folder: Path) -> list[Path]:
    return figures.draw_all(
        comparison.module,
        comparison.trained,
        comparison.pixels[: comparison.config.eval.figures],
        [folder / name for name in FIGURES],
        thresholds=comparison.config.reduction.threshold,
        attention_variables=comparison.original,
    )


def _versions() -> dict[str, str]:
    packages = ("iared2_jax", "jax", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions}
