"""Refuses a config that cannot mean anything, before anything is compiled."""

import math
from collections.abc import Collection

import ml_collections

from iared2_jax.attribution.methods import METHODS
from iared2_jax.config.defaults import (
    DTYPES,
    MODES,
    TRAIN_EXECUTIONS,
    default_config,
)
from iared2_jax.config.loading import (
    NAME_LISTS,
    flatten,
    input_spec_of,
    model_groups,
    weights_of,
)
from iared2_jax.data.datasets import MADE, OPENERS, WITH_MAPS
from iared2_jax.data.request import CLIP_VIEWS
from iared2_jax.errors import UsageError, nearest
from iared2_jax.evaluation.compare_maps import EXPLAINED
from iared2_jax.evaluation.perturbation import REPLACEMENTS
from iared2_jax.models.variants import VARIANTS, get_variant, is_variant
from iared2_jax.token_reduction.create import split_into_groups
from iared2_jax.token_reduction.interpreter import POLICY_TOKENS
from iared2_jax.token_reduction.selectors import SELECTORS
from iared2_jax.training.optimizers import OPTIMIZERS
from iared2_jax.training.phases import CURRICULA, PHASES, PhaseKind, curricula_of, stages

# Of `config.compare.selectors`: the baseline that drops nothing.
DENSE_BASELINE = "dense"


def validate(config: ml_collections.ConfigDict, device_count: int) -> None:
    """Refuses a config that cannot mean anything, before anything is compiled.

    Raises:
      UsageError: one sentence that names the key, its value and what would do.
    """
    _check_keys(config)
    _check_numbers(config)
    flat = flatten(config)

    def one_of(key, choices):
        if flat[key] not in choices:
            raise UsageError(f"config.{key}={flat[key]!r} is unknown{nearest(flat[key], choices)}")

    _check_curriculum(config)
    one_of("mode", MODES)
    one_of("data.name", OPENERS)
    if not is_variant(config.model.name):  # timm's names are names, too
        one_of("model.name", VARIANTS)
    one_of("model.dtype", DTYPES)
    one_of("model.policy_token", ("", *POLICY_TOKENS))
    one_of("reduction.train_execution", TRAIN_EXECUTIONS)
    one_of("reduction.selector", SELECTORS)
    one_of("eval.clip_view", CLIP_VIEWS)
    one_of("eval.replacement", REPLACEMENTS)
    one_of("eval.explained", EXPLAINED)
    for key in ("eval.maps", "explain.maps"):
        _check_maps(key, flat[key])
    _check_map_files(config)
    for selector in config.compare.selectors:
        if selector not in (*SELECTORS, DENSE_BASELINE):
            raise UsageError(
                f"config.compare.selectors has {selector!r}, which is unknown"
                f"{nearest(str(selector), (*SELECTORS, DENSE_BASELINE))}"
            )

    for kind in PHASES.values():
        kind.check_options(config[kind.section])

    groups = model_groups(config)
    if not isinstance(groups, int) and len(groups) != config.model.groups:
        raise UsageError(
            f"config.model.groups={config.model.groups}, but config.model.group_sizes="
            f"{list(groups)} lists {len(groups)}: change group_sizes, or empty it with "
            "--config.model.group_sizes=()"
        )
    for key in ("model.image_size", "model.patch_size"):
        if len(flat[key]) not in (0, 2):
            raise UsageError(f"config.{key}={flat[key]} must be (height, width), or empty")
    try:
        input_spec_of(config)
    except UsageError as error:
        raise UsageError(
            f"config.model.image_size, patch_size, channels and num_frames make no input: {error}"
        ) from error
    depth = config.model.depth or get_variant(config.model.name).backbone.depth
    sizes = split_into_groups(depth, groups)
    if config.data.name not in MADE and not config.data.path and config.mode != "explain":
        raise UsageError(
            f"config.data.name={config.data.name!r} needs config.data.path=<where its files are>"
        )
    if config.mode != "train" and not weights_of(config):
        raise UsageError(f"config.mode={config.mode} needs config.weights: which model?")
    kinds = {PHASES[name] for name, _ in stages(config.curriculum, len(sizes))}
    _check_reduction(config, kinds)
    for kind in kinds:
        _check_phase(kind.section, config[kind.section], device_count)
        kind.check(config[kind.section], len(sizes))


def _check_reduction(config: ml_collections.ConfigDict, kinds: Collection[PhaseKind]) -> None:
    """Whether what drops tokens goes with the curriculum's kinds of phases, and with the mode."""
    drops = any(kind.reduces for kind in kinds)
    selector, ratios = config.reduction.selector, list(config.reduction.keep_ratios)
    if config.eval.pruning and (not drops or selector != "interpreter"):
        raise UsageError(
            f"config.eval.pruning={config.eval.pruning} draws curves over interpreters' "
            "thresholds, but no interpreters drop tokens here: set --config.eval.pruning=0"
        )
    if ratios and (config.eval.pruning or config.mode == "explain"):
        what = "config.mode=explain" if config.mode == "explain" else "config.eval.pruning"
        raise UsageError(
            f"{what} goes by thresholds, not by the fixed budget config.reduction.keep_ratios="
            f"{ratios}: empty it with --config.reduction.keep_ratios=()"
        )
    if drops and not config.weights and config.data.name not in MADE:
        raise UsageError(
            "config.weights is empty, but interpreters need a trained backbone: name its file "
            '(--config.weights=deit_small.safetensors), or "scratch" if you mean it'
        )
    if config.mode != "train":
        return
    if config.curriculum != "selector" and selector != "interpreter":
        raise UsageError(
            f"config.reduction.selector={selector!r} is a baseline, but "
            f"config.curriculum={config.curriculum!r} does not train under one: set "
            "--config.curriculum=selector"
        )
    if ratios and any(kind.reduces and not kind.budgeted for kind in kinds):
        raise UsageError(
            f"config.reduction.keep_ratios={ratios} is a fixed budget, but "
            f"config.curriculum={config.curriculum!r} trains by thresholds: leave it out, or "
            "evaluate the trained model under it (--config.mode=eval)"
        )


def _check_curriculum(config: ml_collections.ConfigDict) -> None:
    names = curricula_of(config.curriculum)
    for name in names:
        if name not in CURRICULA:
            raise UsageError(f"config.curriculum={name!r} is unknown{nearest(name, CURRICULA)}")
    phases = stages(config.curriculum, 1)
    drops = [PHASES[kind].reduces for kind, _ in phases]
    named = {(PHASES[kind].section, group) for kind, group in phases}
    # Metrics and capacities go by a phase's name; and dense training would undo what drops tokens.
    if len(named) < len(phases) or drops != sorted(drops):
        raise UsageError(
            f"config.curriculum={config.curriculum!r} cannot be: a phase comes once in a run, and "
            "what trains the dense backbone comes before what drops tokens"
        )
    if config.compare.selectors and names[-1] not in ("iared2", "interpreters"):
        raise UsageError(
            "config.compare.selectors sets baselines beside our interpreters: it goes with "
            f"config.curriculum=iared2 or interpreters, not {config.curriculum!r}"
        )


def _check_maps(key: str, names: list[str]) -> None:
    for name in names:
        if name not in ("all", *METHODS):
            raise UsageError(
                f"config.{key} has {name!r}, which is unknown{nearest(str(name), METHODS)}"
            )


def _check_map_files(config: ml_collections.ConfigDict) -> None:
    """Whether maps of files are there where they are asked for, and nowhere else."""
    if not config.data.maps:
        asked = {
            "reduction.selector": [config.reduction.selector],
            "compare.selectors": config.compare.selectors,
            "eval.maps": config.eval.maps,
            "explain.maps": config.explain.maps,
        }
        for key, names in asked.items():
            if "memorability" in names:
                raise UsageError(
                    f'config.{key} has "memorability", which needs a map of every image: set '
                    "config.data.maps to their folder (or give a scorer to iared2_jax.compare_maps)"
                )
    elif config.mode == "explain" or config.data.name not in WITH_MAPS:
        raise UsageError(
            f"config.data.maps={config.data.maps!r} is of the images of "
            f"{' and '.join(sorted(WITH_MAPS))}, for the modes train and eval: leave it out"
        )


def _check_keys(config: ml_collections.ConfigDict) -> None:
    known = flatten(default_config())
    given = flatten(config)
    for key in given:
        if key not in known:
            raise UsageError(f"config.{key} is not an option{nearest(key, known)}")
    for key in known:
        if key not in given:
            raise UsageError(f"config.{key} is missing: start from config.default_config()")


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    flat = flatten(config)
    pairs = ("data.augment.scale", "data.augment.ratio", "data.cutouts.object_scale")
    for key, kinds in (
        ("interpreter.tau", (int, float)),
        ("interpreter.lengths", (int, float)),
        ("interpreter.keep_target", (int, float)),
        ("dynamicvit.keep_target", (int, float)),
        ("reduction.keep_ratios", (int, float)),
        *((f"model.{name}", (int,)) for name in ("group_sizes", "image_size", "patch_size")),
        *((pair, (int, float)) for pair in pairs),
        ("data.cutouts.clutter", (int,)),
        *((names, (str,)) for names in NAME_LISTS),
    ):
        if any(type(item) not in kinds for item in flat[key]):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UsageError(f"config.{key}={flat[key]} must hold only {names}")
    for key, value in flat.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"config.{key}={value} is not a finite number")
            if isinstance(number, int | float) and number < 0 and key != "model.init_bias":
                raise UsageError(f"config.{key}={value} must not be negative")
    for key in ("max_bad_steps", "log_every", "checkpoint_every", "keep_checkpoints",
                "eval.batch_size", "eval.speed_rounds", "eval.lime_samples", "data.augment.repeats",
                "data.threads", "data.sampling_rate"):  # fmt: skip
        if flat[key] < 1:
            raise UsageError(f"config.{key}={flat[key]} must be at least 1")
    smoothings = [key for key in flat if key.endswith(".label_smoothing")]
    for key in ("ema_decay", "data.bad_share", *smoothings):
        if flat[key] >= 1:
            raise UsageError(f"config.{key}={flat[key]} must be below 1")
    for key in ("data.augment.erasing", "data.augment.flip"):
        if flat[key] > 1:
            raise UsageError(f"config.{key}={flat[key]} must be at most 1")
    for key in pairs:
        if len(flat[key]) != 2 or not 0 < flat[key][0] <= flat[key][1]:
            raise UsageError(f"config.{key}={flat[key]} must be (least, greatest), above 0")
    if len(flat["data.cutouts.clutter"]) != 2:
        raise UsageError(
            f"config.data.cutouts.clutter={flat['data.cutouts.clutter']} must be (least, greatest)"
        )
    for key in ("seed", "data.seed"):
        if flat[key] >= 2**32:
            raise UsageError(f"config.{key}={flat[key]} must be below 2**32")
    if not 0 < config.reduction.threshold < 1:
        raise UsageError(
            f"config.reduction.threshold={config.reduction.threshold} must be between 0 and 1"
        )


def _check_phase(section: str, options: ml_collections.ConfigDict, device_count: int) -> None:
    if (options.steps > 0) == (options.epochs > 0):
        raise UsageError(
            f"config.{section}.steps={options.steps} and config.{section}.epochs={options.epochs}: "
            "exactly one of the two must be above 0"
        )
    if options.learning_rate == 0:
        raise UsageError(f"config.{section}.learning_rate=0.0 would train nothing")
    if options.optimizer not in OPTIMIZERS:
        raise UsageError(
            f"config.{section}.optimizer={options.optimizer!r} is unknown"
            f"{nearest(options.optimizer, OPTIMIZERS)}"
        )
    if options.accumulate < 1 or options.batch_size < 1:
        raise UsageError(f"config.{section}: batch_size and accumulate must be at least 1")
    rows = device_count * options.accumulate
    if options.batch_size % rows:
        raise UsageError(
            f"config.{section}.batch_size={options.batch_size} must be a multiple of {rows} "
            f"({device_count} devices x {options.accumulate} micro-batches)"
        )
