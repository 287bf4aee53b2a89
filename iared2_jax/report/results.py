"""The evaluation of a finished run: results.json, tables, figures and an HTML report."""

import dataclasses
import importlib.metadata
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from iared2_jax.config import dataset_of, flatten, weights_of
from iared2_jax.data.image_files import EvalImages
from iared2_jax.evaluation import evaluators
from iared2_jax.files import write_json
from iared2_jax.report import figures, tables
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import random_like
from iared2_jax.training import loop as train
from iared2_jax.weights.load import save_weights

log = logging.getLogger(__name__)

RANDOM_MASK_SEED = 0
SPEED_SAMPLE = 128  # images that the ragged plan is made with


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what.

    Attributes:
      trained: variables of the finished model.
      original: variables of the dense baseline: the backbone as `config.weights` has it. A backbone
        that was trained from scratch is its own baseline.
      reduces: whether it drops tokens at all (a supervised run does not).
      pixels, labels, truth: the evaluation set; truth, the segmentation masks, may be None.
      class_names: of the labels.
    """

    config: ml_collections.ConfigDict
    module: IARed2
    trained: dict[str, Any]
    original: dict[str, Any]
    reduces: bool
    pixels: np.ndarray | EvalImages
    labels: np.ndarray
    truth: np.ndarray | None
    class_names: tuple[str, ...]
    stop: Stop | None

    def compiled(self, fn: Callable[..., dict[str, jax.Array]]) -> Callable[..., Any]:
        """`fn(variables, images, batch)`, jitted, with the images normalised on the device."""
        return jax.jit(
            lambda v, batch: fn(v, self.module.input_spec.normalize(batch["pixels"]), batch)
        )

    def collect(self, fn, variables, **more: np.ndarray) -> dict[str, np.ndarray]:
        """A compiled `fn` over the whole evaluation set."""
        arrays = {"pixels": self.pixels, **more}
        return evaluators.collect(
            lambda batch: fn(variables, batch), arrays, self.config.eval.batch_size, self.stop
        )


def evaluate_run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    params: dict[str, Any],
    stop: Stop | None = None,
    write_weights: bool = True,
) -> dict[str, Any] | None:
    """Evaluates trained parameters against the dense backbone that `config.weights` has.

    Writes into the workdir: results.json, report.html, figures/*.png, and weights.safetensors if
    asked; prints the tables.

    Returns:
      The results as written; None if `stop` was requested on the way (nothing is written then).
    """
    subject = _subject(config, params, stop)
    try:
        results = _measure(subject)
    except evaluators.Interrupted:
        return None
    if write_weights:
        _write_weights(subject, results, workdir)
    _write(subject, results, workdir)
    return results


def _subject(config, params, stop) -> Subject:
    module, initial = train.build_model(config)
    trained = {"params": params}
    reduces = config.curriculum != "supervised"
    source = dataset_of(config)
    data = config.data
    pixels, labels, truth = source.load(data.eval_split, data.eval_size, data.seed)
    return Subject(
        config=config,
        module=module,
        trained=trained,
        original=initial if weights_of(config) and reduces else trained,
        reduces=reduces,
        pixels=pixels,
        labels=labels,
        truth=truth,
        class_names=source.class_names,
        stop=stop,
    )


def _measure(subject: Subject) -> dict[str, Any]:
    results: dict[str, Any] = {"run": subject.config.name, "examples": len(subject.labels)}
    results["dense"], maps = _dense(subject)
    if subject.reduces:
        results["iared2"], keep, scores = _reduced(subject)
        results["random"] = _random(subject, keep)
        maps = {**scores, **maps}
        if subject.config.eval.speed_batch:
            results["images_per_second"] = _speed(subject)
    if subject.truth is not None:
        results["foreground_share"] = float(subject.truth.mean())
        results["segmentation"] = dict(
            evaluators.segmentation(maps, subject.truth, subject.module.input_spec)
        )
    results["config"] = flatten(subject.config)
    results["versions"] = _versions()
    return results


def _dense(subject: Subject) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The baseline's accuracy and cost; the raw attention of its blocks, if it will be judged."""
    wanted = subject.truth is not None

    def dense_pass(variables, images, batch):
        logits, out = subject.module.apply(variables, images, execution="dense")
        found = {"logits": logits}
        if wanted and out.attention:
            found["attention"] = jnp.stack([maps.mean(1) for maps in out.attention], axis=1)
        return found

    seen = subject.collect(subject.compiled(dense_pass), subject.original)
    figures = {
        **dict(evaluators.accuracy(seen["logits"], subject.labels)),
        **dict(evaluators.cost(subject.module, None)),
        "confusions": evaluators.confusions(seen["logits"], subject.labels, subject.class_names),
    }
    if "attention" not in seen:
        return figures, {}
    # Without CLS in its groups (CaiT), the blocks are the class-attention blocks.
    blocks = range(seen["attention"].shape[1])
    return figures, {f"raw_attention_block_{b}": seen["attention"][:, b] for b in blocks}


def _reduced(subject: Subject) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """Our accuracy and cost; the keep masks [images, groups, N]; each group's scores."""

    def masked_pass(variables, images, batch):
        logits, out = subject.module.apply(variables, images, subject.config.reduction.threshold)
        return {
            "logits": logits,
            "keep": jnp.stack(out.keep, axis=1),
            "scores": jnp.stack(out.scores, axis=1),
        }

    seen = subject.collect(subject.compiled(masked_pass), subject.trained)
    figures = {
        **dict(evaluators.accuracy(seen["logits"], subject.labels)),
        **dict(evaluators.kept_tokens(seen["keep"])),
        **dict(evaluators.cost(subject.module, seen["keep"])),
        "confusions": evaluators.confusions(seen["logits"], subject.labels, subject.class_names),
    }
    groups = range(subject.module.num_groups)
    return figures, seen["keep"], {f"group_{g + 1}": seen["scores"][:, g] for g in groups}


def _random(subject: Subject, keep: np.ndarray) -> dict[str, float]:
    """Random masks with the same counts per image and group; nothing is retrained for them.

    On the trained model, and for comparison on the backbone it started from.
    """
    counts = [jnp.asarray(count) for count in keep.sum(-1).T]
    masks = random_like(jax.random.key(RANDOM_MASK_SEED), counts, keep.shape[-1])
    masks = np.stack([np.asarray(mask) for mask in masks], axis=1)

    def random_pass(variables, images, batch):
        forced = [batch["keep"][:, group] for group in range(subject.module.num_groups)]
        return {"logits": subject.module.apply(variables, images, keep=forced)[0]}

    fn = subject.compiled(random_pass)

    def accuracy(variables):
        answers = subject.collect(fn, variables, keep=masks)
        return dict(evaluators.accuracy(answers["logits"], subject.labels))

    before = {f"original_backbone_{k}": v for k, v in accuracy(subject.original).items()}
    return {**accuracy(subject.trained), **before}


def _speed(subject: Subject) -> dict[str, Any]:
    """Images per second of one batch; the ragged plan is made with other images than the timed."""
    config, n = subject.config, subject.config.eval.speed_batch
    pixels = subject.pixels[: n + SPEED_SAMPLE]
    images = np.asarray(subject.module.input_spec.normalize(jnp.asarray(pixels)))
    figures = evaluators.throughput(
        subject.module,
        subject.original,
        subject.trained,
        jnp.asarray(images[:n]),
        images[n:] if len(images) > n else images,
        thresholds=config.reduction.threshold,
        rounds=config.eval.speed_rounds,
    )
    return {
        "batch": len(images[:n]),
        "dtype": config.model.dtype,
        "device": f"{jax.devices()[0].device_kind} x 1",
        **dict(figures),
    }


def _write_weights(subject: Subject, results: dict[str, Any], workdir: Path) -> None:
    config = subject.config
    best = results.get("iared2", results["dense"])
    metadata = {
        "create_model": train.model_options(config),
        "top1": best["top1"],
        "examples": results["examples"],
        "config": results["config"],
        "versions": results["versions"],
    }
    save_weights(
        subject.trained, workdir / "weights.safetensors", metadata, interpreters=subject.reduces
    )


def _write(subject: Subject, results: dict[str, Any], workdir: Path) -> None:
    config = subject.config
    drawn = _draw(subject, workdir) if subject.reduces and config.eval.figures else {}
    made = tables.tables(results)
    footer = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    tables.write_html(workdir / "report.html", f"IA-RED²: {config.name}", made, drawn, footer)
    # Last, so that results.json says that everything else is there.
    write_json(workdir / "results.json", results)
    print("\n\n".join(tables.as_text(table) for table in made), flush=True)
    log.info("results.json, report.html and figures are in %s", workdir)


def _draw(subject: Subject, workdir: Path) -> dict[str, Path]:
    config, module = subject.config, subject.module
    shown = subject.pixels[: config.eval.figures]
    comparison = figures.draw_comparison(
        module,
        subject.trained,
        shown,
        workdir / "figures" / "heatmaps.png",
        group=min(2, module.num_groups),
        block=1 if module.backbone.num_prefix else -1,  # CaiT: its last class attention
        thresholds=config.reduction.threshold,
        attention_variables=subject.original,
    )
    hierarchy = figures.draw_hierarchy(
        module,
        subject.trained,
        shown,
        workdir / "figures" / "hierarchy.png",
        thresholds=config.reduction.threshold,
    )
    return {
        "What the model looked at (Figure 3)": comparison,
        "What each group still sees (Figure 4)": hierarchy,
    }


def _versions() -> dict[str, str]:
    packages = ("iared2_jax", "jax", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions}
