"""Baselines beside a finished run: the same backbone and recipe, as many tokens, other choices."""

import json
import logging
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from iared2_jax.config.checks import DENSE_BASELINE
from iared2_jax.config.loading import reduction_of
from iared2_jax.data.datasets import Dataset
from iared2_jax.errors import UsageError
from iared2_jax.evaluation.evaluators import dense_calls, speed_sample
from iared2_jax.experiment.build import build_module
from iared2_jax.experiment.run_directory import finished_results
from iared2_jax.fast_inference import accelerate
from iared2_jax.timing import interleaved
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.schedules import PUBLISHED, linear_share, published_budget
from iared2_jax.training.phases import PHASES, stages
from iared2_jax.weights.load import load_model

log = logging.getLogger(__name__)

Variables = dict[str, Any]
FOLDER = "baselines"  # below the run's, one folder per selector
_OF_DENSE = "random"  # the selector of the baseline that drops nothing: its scores never matter
# Rows that are not called after their selector. "attention" is the paper's baseline, block 1's; the
# selector of that name, the attention before each group, has a row of its own.
_ROW_NAMES = {
    "attention_block_1": "attention",
    "attention": "attention_before_group",
    DENSE_BASELINE: "original_fine_tuned",
}


def baseline_config(
    config: ml_collections.ConfigDict,
    selector: str,
    keep_ratios: tuple[float, ...],
    weights: str | None = None,
) -> ml_collections.ConfigDict:
    """The run that gives the start of `config`'s run another selector.

    It fine-tunes for as many steps as all fine-tuning of `config`'s own run together, so not at all
    (mode "eval") if that one only trains interpreters, and keeps at least as many tokens in each
    group; all of the first, where the selector is the attention before the group, and all of every
    group for `DENSE_BASELINE`: what the fine-tuning does by itself. EViT and ToMe reduce tokens
    where their papers do, so that they cost as much (`schedules.published_budget`). Of the maps,
    only its scores are measured, and by masks alone.

    Args:
      weights: of the dense backbone, if it is not the one that `config` names.
    """
    if selector == "attention":  # there is none before the first block
        keep_ratios = (1.0, *keep_ratios[1:])
    if selector == DENSE_BASELINE:
        keep_ratios = (1.0,) * len(keep_ratios)
    baseline = config.copy_and_resolve_references().unlock()
    baseline.name = f"{config.name}, {selector}"
    baseline.mode = "train" if fine_tunes(config) else "eval"
    baseline.curriculum = "selector"
    baseline.weights = config.weights if weights is None else weights
    baseline.reduction.selector = _OF_DENSE if selector == DENSE_BASELINE else selector
    baseline.reduction.keep_ratios = keep_ratios
    if selector in PUBLISHED:
        module = build_module(config)
        kept = [ratio * module.input_spec.num_patches for ratio in keep_ratios]
        share = count_flops(module, kept).linear / count_flops(module).linear
        groups, ratios = published_budget(module, selector, share)
        baseline.model.groups, baseline.model.group_sizes = groups, ()
        baseline.reduction.keep_ratios = ratios
        if (cheapest := linear_share(build_module(baseline), ratios, selector)) > share + 0.01:
            log.warning(
                "%s cannot be as cheap as the run here: %.1f%% of the linear FLOPs, not %.1f%%",
                selector,
                100 * cheapest,
                100 * share,
            )
    baseline.compare.selectors = ()
    baseline.backbone.steps *= len(keep_ratios)  # one phase in place of one for each group
    baseline.backbone.epochs *= len(keep_ratios)
    baseline.eval.figures = 0
    # Of its maps only its scores are in the comparison.
    baseline.eval.maps = ("interpreter",) if config.eval.maps else ()
    baseline.eval.perturbation = False
    baseline.eval.speed_batch = 0  # all methods are timed together, in the end
    return baseline.lock()


def fine_tunes(config: ml_collections.ConfigDict) -> bool:
    """Whether a run changes the blocks of a backbone that drops tokens."""
    kinds = {name for name, _ in stages(config.curriculum, 1) if PHASES[name].reduces}
    trained = [PHASES[name].trains(config[PHASES[name].section], 1, 1) for name in kinds]
    return any(part == "blocks" for parts in trained for part, _ in parts)


def check_comparison(config: ml_collections.ConfigDict) -> None:
    """Refuses selectors that the config's model cannot have, before anything is trained.

    Raises:
      UsageError: one sentence that names the selector.
    """
    if DENSE_BASELINE in config.compare.selectors and not fine_tunes(config):
        raise UsageError(
            f"config.compare.selectors has {DENSE_BASELINE!r}, the original fine-tuned as long as "
            f"the run's blocks, but config.curriculum={config.curriculum!r} leaves the blocks as "
            "they are: leave it out"
        )
    for selector in config.compare.selectors:
        try:
            build_module(baseline_config(config, selector, (0.5,) * config.model.groups))
        except UsageError as error:
            reason = str(error).removeprefix("config.reduction: ")
            raise UsageError(f"config.compare.selectors has {selector!r}: {reason}") from error


def kept_shares(results: dict[str, Any]) -> tuple[float, ...]:
    """The share of the N tokens that each group of a finished run keeps, rounded up to 0.001.

    Of a group that keeps none it is 0.001, too: a budget is one token at least.
    """
    shares = np.ceil(1000 * np.array(results["iared2"]["kept"], float)) / 1000
    return tuple(np.maximum(shares, 0.001).tolist())


def finished(config: ml_collections.ConfigDict, folder: Path) -> dict[str, Any] | None:
    """The results of a baseline that has been through with this very config; None: of none."""
    return finished_results(config, folder) if (folder / "weights.safetensors").exists() else None


def row_name(selector: str) -> str:
    """What a selector's row is called: as in the paper's tables."""
    return _ROW_NAMES.get(selector, selector)


def methods(
    results: dict[str, Any], baselines: dict[str, dict[str, Any]], clips: bool
) -> dict[str, dict[str, Any]]:
    """One row per method: errors in per cent, share of tokens kept, FLOPs, mIoU of its scores.

    The share is the mean over the groups, the scores are those of the first.

    Args:
      results: of the run itself. baselines: of the others, by selector.
      clips: whether the inputs are clips; then errors are "clip1_error" and "video1_error".
    """
    rows = {"original": _row(results, "dense", None, clips)}
    for selector, found in baselines.items():
        # The attention before each group has no scores before the first; the dense one's are noise;
        # ToMe's say what is like another, and EViT's are the attention of a block without drops.
        unscored = ("attention", DENSE_BASELINE, *PUBLISHED)
        scores = None if selector in unscored else f"{selector}_group_1"
        rows[row_name(selector)] = _row(found, "reduced", scores, clips)
    rows["iared2"] = _row(results, "iared2", "group_1", clips)
    return rows


def _row(results: dict[str, Any], block: str, scores: str | None, clips: bool) -> dict[str, Any]:
    figures = results[block]
    row = {"clip1_error" if clips else "top1_error": 100 * (1 - figures["top1"])}
    if "video" in figures:
        row["video1_error"] = 100 * (1 - figures["video"]["top1"])
    row["kept_per_group"] = figures.get("kept", [1.0])
    row["kept"] = float(np.mean(row["kept_per_group"]))
    row["flops"] = figures["flops"]
    if scores in results.get("segmentation", {}):
        row["mean_iou"] = results["segmentation"][scores]["mean_iou"]
    return row


def rates(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    module: IARed2,
    original: Variables,
    trained: Variables,
    folders: dict[str, Path],
) -> dict[str, float]:
    """Inputs a second of every method by the ragged engine, all timed in turn in one process.

    Args:
      original, trained: of the run itself. folders: of the baselines' runs, by selector.

    Returns:
      Rates by the names that `methods` gives the rows.
    """
    size = config.eval.speed_batch
    pixels, _, _ = dataset.load(config.data.eval_split, config.data.eval_size, config.data.seed)
    timed, sample = speed_sample(module.input_spec, pixels, size)

    def fast(module: IARed2, variables: Variables, reduction: dict[str, Any]) -> Any:
        run = accelerate(module, variables, len(timed), images=sample, cache_dir=None, **reduction)
        return lambda: run(timed)[0]

    variants = dict(dense_calls(module, original, timed))
    for selector, folder in folders.items():
        own = json.loads((folder / "results.json").read_text())["config"]
        reduction = {
            "keep_ratios": tuple(own["reduction.keep_ratios"]),
            "selector": own["reduction.selector"],
        }
        weights = folder / "weights.safetensors"
        loaded = load_model(
            weights, map_channel=module.input_spec.map_channel, dtype=module.backbone.dtype
        )
        variants[row_name(selector)] = fast(*loaded, reduction)
    variants["iared2"] = fast(module, trained, reduction_of(config))
    timings = interleaved(variants, config.eval.speed_rounds)
    per_second = {name: len(timed) / timing.median for name, timing in timings.items()}
    dense = [per_second.pop(name) for name in list(per_second) if name.startswith("dense")]
    return {"original": max(dense), **per_second}
