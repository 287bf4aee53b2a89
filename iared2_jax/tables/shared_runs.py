"""Runs that several tables need: a trained head, interpreters and blocks, timings, all maps.

Where a preset trains a head, all seeds share it: it stands for the published model that a user
starts from. It has learned scenes of a seed that no run has: on those, it is right more often than
on any others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from iared2_jax.errors import UsageError
from iared2_jax.tables.presets import HEAD_SEED, Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.table import Results, finished_by_key

# A head is trained before there are interpreters.
_OF_INTERPRETERS = ("compare.", "model.policy_token", "model.init_bias", "eval.agreement")
# Numbers only: no pictures, no page of images, no timing; without "agreement", five passes fewer.
QUIET = {
    "eval.figures": "0",
    "eval.page_images": "0",
    "eval.speed_batch": "0",
    "eval.agreement": "False",
}


def head_name(size: int) -> str:
    """The folder of the head's run."""
    return f"{size}px-head"


def head_runs(preset: Preset, size: int) -> list[Run]:
    """The run that trains the head, if there is one to train."""
    if not preset.trains_head:
        return []
    options = {"curriculum": "supervised", "seed": str(HEAD_SEED), "eval.maps": "()", **QUIET}
    return [
        Run(
            head_name(size),
            preset.config(size),
            {**preset.options, **options},
            ignored=(*_OF_INTERPRETERS, "model.group"),  # dense: it has no groups
            minutes=preset.minutes_of("head", size),
        )
    ]


def reducing_name(curriculum: str, size: int, seed: int) -> str:
    """The folder of one seed's run."""
    return f"{size}px-{curriculum}-{seed}"


def reducing_run(
    preset: Preset, curriculum: str, size: int, seed: int, baselines: bool = True
) -> Run:
    """The run that trains interpreters, and by "iared2" the blocks behind each.

    Args:
      baselines: False for a table that shows none: a run that has them will do, too.
    """
    options = {
        "curriculum": curriculum,
        "seed": str(seed),
        "compare.selectors": repr(preset.baselines[curriculum] if baselines else ()),
        **QUIET,
        "eval.figures": "4",
    }
    return Run(
        reducing_name(curriculum, size, seed),
        preset.config(size),
        {**preset.options, **options},
        start=_start(preset, size),
        ignored=() if baselines else ("compare.",),
        minutes=preset.minutes_of(curriculum if baselines else f"{curriculum} alone", size),
    )


def _start(preset: Preset, size: int) -> str:
    return head_name(size) if preset.trains_head else ""


def speed_name(curriculum: str, size: int, seed: int) -> str:
    """The folder of the run that times a seed's model."""
    return f"{reducing_name(curriculum, size, seed)}-speed"


def speed_run(preset: Preset, curriculum: str, size: int, seed: int) -> Run:
    """The run that times the dense model and the ragged engine, of a finished run's weights."""
    timing = {"data.eval_size": "128", "eval.speed_batch": "32"}
    name = speed_name(curriculum, size, seed)
    return evaluation_run(preset, name, curriculum, size, seed, timing, kind="speed")


def evaluation_run(
    preset: Preset,
    name: str,
    curriculum: str,
    size: int,
    seed: int,
    options: Mapping[str, str],
    kind: str,
) -> Run:
    """A run that evaluates a finished run's weights once more.

    Args:
      options: beside what all have; no map is measured. kind: of its minutes.
    """
    return Run(
        name,
        preset.config(size),
        {
            **preset.options,
            "mode": "eval",
            "curriculum": curriculum,
            "eval.maps": "()",
            "compare.selectors": "()",  # a config may name some
            **QUIET,
            **options,
        },
        start=reducing_name(curriculum, size, seed),
        minutes=preset.minutes_of(kind, size),
    )


def original_run(
    preset: Preset,
    name: str,
    size: int,
    options: Mapping[str, str],
    kind: str,
    own: Mapping[str, str] | None = None,
) -> Run:
    """A run that starts from the original's weights, and asks no interpreter.

    Args:
      options: that the user's own go before. own: that go before the user's, such as a length that
        was made equal to ours.
      kind: of its minutes, e.g. "selector" for one that fine-tunes all blocks.
    """
    return Run(
        name,
        preset.config(size),
        {**preset.options, **QUIET, **options},
        own=own or {},
        start=_start(preset, size),
        ignored=_OF_INTERPRETERS,
        minutes=preset.minutes_of(kind, size),
    )


def as_long_as_ours(recipe: ml_collections.ConfigDict, section: str = "backbone") -> dict[str, str]:
    """The options by which one phase fine-tunes as long as all of a recipe's groups together."""
    ours, groups = recipe.backbone, recipe.model.groups
    return {f"{section}.{unit}": str(groups * ours[unit]) for unit in ("steps", "epochs")}


def maps_name(size: int) -> str:
    """The folder of the run of all maps."""
    return f"{size}px-maps"


def maps_options() -> dict[str, str]:
    """The options by which the original's every map is measured."""
    return {"mode": "eval", "curriculum": "supervised", "eval.maps": "('all',)"}


def maps_run(preset: Preset, size: int) -> Run:
    """The run that measures every map of the model before anything is dropped."""
    options = {
        **maps_options(),
        "eval.lime_samples": "128",  # 200 images; a CPU takes a minute for 20 samples of each
        "data.eval_size": "200",
    }
    return original_run(preset, maps_name(size), size, options, kind="maps")


def head_and_seeds(
    preset: Preset, curriculum: str, size: int, seeds: Sequence[int], baselines: bool = True
) -> list[Run]:
    """The head's run, if there is one, and each seed's."""
    return [
        *head_runs(preset, size),
        *(reducing_run(preset, curriculum, size, seed, baselines) for seed in seeds),
    ]


def seeds_there(
    curriculum: str, size: int, seeds: Sequence[int], results: Results
) -> dict[int, Mapping[str, Any]]:
    """The results of our runs of those seeds that are there, if any."""
    return finished_by_key(lambda seed: reducing_name(curriculum, size, seed), seeds, results)


def finished_seeds(
    curriculum: str, size: int, seeds: Sequence[int], results: Results
) -> dict[int, Mapping[str, Any]]:
    """The results of those seeds' runs that are there.

    Raises:
      UsageError: there are none.
    """
    found = seeds_there(curriculum, size, seeds, results)
    if not found:
        raise UsageError(
            f"no run of {size} px is finished yet, so there is nothing to tabulate: leave out "
            "--finished to make it"
        )
    return found
