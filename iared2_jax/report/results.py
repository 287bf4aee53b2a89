"""The evaluation of a finished run: results.json, tables, figures and an HTML report."""

import importlib.metadata
import json
import logging
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from iared2_jax import evaluate, train
from iared2_jax.checkpoints.weights import save_weights
from iared2_jax.config import flatten
from iared2_jax.data.pipeline import normalize, resized
from iared2_jax.data.sources import SOURCES
from iared2_jax.models.registry import get_variant
from iared2_jax.reduction.selectors import random_like
from iared2_jax.report import figures, tables
from iared2_jax.signals import Stop

log = logging.getLogger(__name__)

RANDOM_MASK_SEED = 0


def evaluate_run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    params: dict[str, Any],
    stop: Stop | None = None,
) -> dict[str, Any] | None:
    """Evaluates trained parameters against the dense backbone they started from.

    Writes into the workdir: results.json, report.html, figures/*.png, weights.safetensors; prints
    the tables. The dense model is the backbone as `config.weights` has it; where a run starts from
    scratch, it is the trained backbone itself.

    Returns:
      The results as written; None if `stop` was requested on the way (nothing is written then).
    """
    try:
        return _evaluate_run(config, workdir, params, stop)
    except evaluate.Interrupted:
        return None


def _evaluate_run(config, workdir, params, stop):
    # -- Models and data -------------------------------------------------------------------------
    module, initial = train.build_model(config)
    trained = {"params": params}
    reduces = config.curriculum != "supervised"
    original = initial if config.weights and reduces else trained
    norm = get_variant(config.model.name).norm
    pixels, labels, masks = _load(config, module.backbone.image_size)
    arrays = {"pixels": pixels, "label": labels}

    def collect(variables, fn, **more):
        jitted = jax.jit(lambda v, b: fn(v, normalize(b["pixels"], norm), b))
        return evaluate.collect(
            lambda batch: jitted(variables, batch), {**arrays, **more}, config.eval.batch_size, stop
        )

    # -- Dense, ours, random ---------------------------------------------------------------------
    def dense_pass(variables, images, batch):
        logits, out = module.apply(variables, images, execution="dense")
        return {"logits": logits, "attention": jnp.stack([a.mean(1) for a in out["attention"]], 1)}

    dense = collect(original, dense_pass)
    results: dict[str, Any] = {"run": config.name, "examples": len(labels)}
    results["dense"] = {
        **dict(evaluate.accuracy(dense["logits"], labels)),
        **dict(evaluate.cost(module, None)),
    }
    maps = {
        f"raw_attention_block_{i}": dense["attention"][:, i] for i in range(module.backbone.depth)
    }
    if reduces:
        ours = collect(trained, lambda v, x, b: _masked_pass(module, config.threshold, v, x))
        results["iared2"] = {
            **dict(evaluate.accuracy(ours["logits"], labels)),
            **dict(evaluate.kept_tokens(ours["keep"])),
            **dict(evaluate.cost(module, ours["keep"])),
        }
        results["random"] = _random(module, collect, trained, original, ours["keep"], labels)
        scores = {f"group_{g + 1}": ours["scores"][:, g] for g in range(module.num_groups)}
        maps = {**scores, **maps}
    if masks is not None:
        results["foreground_share"] = float(masks.mean())
        results["segmentation"] = dict(evaluate.segmentation(maps, masks))

    # -- Speed -----------------------------------------------------------------------------------
    if reduces and config.eval.speed_batch:
        keep = ours["keep"]
        capacities = [max(1, int(count)) for count in keep.sum(-1).max(0)]
        images = normalize(jnp.asarray(pixels[: config.eval.speed_batch]), norm)
        executions = dict(
            evaluate.throughput(
                module,
                original,
                trained,
                images,
                thresholds=config.threshold,
                capacities=capacities,
                rounds=config.eval.speed_rounds,
            )
        )
        results["images_per_second"] = {
            "batch": len(images),
            "dtype": config.model.dtype,
            "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
            "capacities": capacities,
            "padding_share": float(1 - keep.sum() / (sum(capacities) * len(keep))),
            "executions": executions,
        }

    # -- Write and show ---------------------------------------------------------------------------
    results["config"] = flatten(config)
    results["versions"] = _versions()
    metadata = {"model": config.model.name, "config": results["config"]}
    save_weights(trained, workdir / "weights.safetensors", metadata, interpreters=reduces)
    drawn = _draw(config, workdir, module, trained, original, pixels, norm) if reduces else {}
    made = tables.tables(results)
    footer = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    tables.write_html(workdir / "report.html", f"IA-RED2: {config.name}", made, drawn, footer)
    (workdir / "results.json").write_text(json.dumps(results, indent=1))
    print("\n\n".join(tables.as_text(table) for table in made), flush=True)
    log.info("results.json, report.html and figures are in %s", workdir)
    return results


def _load(config, image_size):
    source = SOURCES[config.data.name]
    pixels, labels, masks = source.load(
        config.data.eval_split, config.data.eval_size, config.data.seed
    )
    pixels = np.stack([resized(image, image_size) for image in pixels])
    if masks is not None and masks.shape[1] != image_size:
        factor, rest = divmod(image_size, masks.shape[1])
        # A mask is exact only at its own size or a multiple of it.
        masks = None if rest else masks.repeat(factor, axis=1).repeat(factor, axis=2)
    return pixels, labels, masks


def _masked_pass(module, thresholds, variables, images, keep=None):
    logits, out = module.apply(variables, images, thresholds, keep=keep)
    return {
        "logits": logits,
        "keep": jnp.stack(out["keep"], axis=1),
        "scores": jnp.stack(out["scores"], axis=1),
    }


def _random(module, collect, trained, original, keep, labels) -> dict[str, float]:
    """Random masks with the same counts per image and group; nothing is retrained for them.

    On the trained model, and for comparison on the backbone it started from.
    """
    counts = [jnp.asarray(count) for count in keep.sum(-1).T]
    masks = random_like(jax.random.key(RANDOM_MASK_SEED), counts, keep.shape[-1])
    masks = np.stack([np.asarray(mask) for mask in masks], axis=1)

    def accuracy(variables):
        answers = collect(
            variables,
            lambda v, x, b: {
                "logits": _masked_pass(
                    module, 0.5, v, x, [b["keep"][:, g] for g in range(module.num_groups)]
                )["logits"]
            },
            keep=masks,
        )
        return dict(evaluate.accuracy(answers["logits"], labels))

    before = accuracy(original)
    return {**accuracy(trained), **{f"original_backbone_{k}": v for k, v in before.items()}}


def _draw(config, workdir, module, trained, original, pixels, norm) -> dict[str, Path]:
    if not config.eval.figures:
        return {}
    shown = pixels[: config.eval.figures]
    folder = workdir / "figures"
    group, block = min(2, module.num_groups), min(1, module.backbone.depth - 1)
    return {
        "What the model looked at (Figure 3)": figures.draw_comparison(
            module, trained, shown, norm, folder / "heatmaps.png", group=group, block=block,
            thresholds=config.threshold, attention_variables=original,
        ),
        "What each group still sees (Figure 4)": figures.draw_hierarchy(
            module, trained, shown, norm, folder / "hierarchy.png", thresholds=config.threshold
        ),
    }  # fmt: skip


def _versions() -> dict[str, str]:
    packages = ("iared2_jax", "jax", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions}
