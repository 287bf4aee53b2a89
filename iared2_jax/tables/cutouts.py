"""The runs of tables on cut-outs: a head on the published trunk, and what starts from it.

All seeds share the head: it stands for the published model that a user starts from. It has learned
scenes of a seed that no run has: on those, it is right more often than on any others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from iared2_jax.errors import UsageError
from iared2_jax.tables.runs import Run
from iared2_jax.tables.table import ConfigOfSize, Results

HEAD_SEED = 0
# A head is trained before there are interpreters.
_OF_INTERPRETERS = ("compare.", "model.policy_token", "model.init_bias", "eval.agreement")
# Baselines beside every run: the paper's, and what EViT and others drop by. Where blocks are
# fine-tuned, also the original fine-tuned as long: the head's trunk has never seen these scenes.
SELECTORS = {
    "interpreters": ("random", "attention_block_1", "attention"),
    "iared2": ("random", "attention_block_1", "attention", "dense"),
}
# Numbers only: no pictures, no page of images, no timing; without "agreement", five passes fewer.
QUIET = {
    "eval.figures": "0",
    "eval.page_images": "0",
    "eval.speed_batch": "0",
    "eval.agreement": "False",
}


def minutes(at_112: float, size: int) -> float:
    """About what takes `at_112` minutes at 112 px, by the number of tokens."""
    return at_112 * (size / 112) ** 2


def head_name(size: int) -> str:
    """The folder of the head's run."""
    return f"{size}px-head"


def head_run(config: ConfigOfSize, size: int) -> Run:
    """The run that trains the head."""
    options = {"curriculum": "supervised", "seed": str(HEAD_SEED), "eval.maps": "()", **QUIET}
    return Run(
        head_name(size),
        config(size),
        options,
        ignored=_OF_INTERPRETERS,
        minutes=minutes(7, size),
    )


def reducing_name(curriculum: str, size: int, seed: int) -> str:
    """The folder of one seed's run."""
    return f"{size}px-{curriculum}-{seed}"


def reducing_run(config: ConfigOfSize, curriculum: str, size: int, seed: int) -> Run:
    """The run that trains interpreters, and by "iared2" the blocks behind each."""
    options = {
        "curriculum": curriculum,
        "seed": str(seed),
        "compare.selectors": repr(SELECTORS[curriculum]),
        **QUIET,
        "eval.figures": "4",
    }
    # Measured; of "iared2" reckoned from its steps.
    time = {"interpreters": 17, "iared2": 55}[curriculum]
    return Run(
        reducing_name(curriculum, size, seed),
        config(size),
        options,
        start=head_name(size),
        minutes=minutes(time, size),
    )


def speed_name(curriculum: str, size: int, seed: int) -> str:
    """The folder of the run that times a seed's model."""
    return f"{reducing_name(curriculum, size, seed)}-speed"


def speed_run(config: ConfigOfSize, curriculum: str, size: int, seed: int) -> Run:
    """The run that times the dense model and the ragged engine, of a finished run's weights."""
    options = {
        "mode": "eval",
        "curriculum": curriculum,
        "eval.maps": "()",
        "data.eval_size": "128",
        **QUIET,
        "eval.speed_batch": "32",
    }
    start = reducing_name(curriculum, size, seed)
    return Run(
        speed_name(curriculum, size, seed),
        config(size),
        options,
        start=start,
        minutes=minutes(4, size),
    )


def from_head(name: str, config: str, size: int, options: Mapping[str, str], at_112: float) -> Run:
    """A run that starts from the head's weights and asks no interpreter.

    Args:
      config: as the flag --config has it. at_112: the minutes that it takes at 112 px.
    """
    return Run(
        name,
        config,
        {**QUIET, **options},
        start=head_name(size),
        ignored=_OF_INTERPRETERS,
        minutes=minutes(at_112, size),
    )


def maps_name(size: int) -> str:
    """The folder of the run of all maps."""
    return f"{size}px-maps"


def maps_run(config: ConfigOfSize, size: int) -> Run:
    """The run that measures every map of the model before anything is dropped."""
    options = {
        "mode": "eval",
        "curriculum": "supervised",
        "eval.maps": "('all',)",
        "eval.lime_samples": "128",  # 200 images; a CPU takes a minute for 20 samples of each
        "data.eval_size": "200",
    }
    return from_head(maps_name(size), config(size), size, options, at_112=25)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises a UsageError if a seed is the head's."""
    if HEAD_SEED in seeds:
        raise UsageError(
            f"--seeds {HEAD_SEED}: the head has learned the answers of that seed's scenes; take "
            "others"
        )


def head_and_seeds(
    config: ConfigOfSize, curriculum: str, size: int, seeds: Sequence[int]
) -> list[Run]:
    """The head's run, and each seed's.

    Raises:
      UsageError: a seed is the head's.
    """
    check_seeds(seeds)
    return [head_run(config, size), *(reducing_run(config, curriculum, size, s) for s in seeds)]


def seeds_there(
    curriculum: str, size: int, seeds: Sequence[int], results: Results
) -> dict[int, Mapping[str, Any]]:
    """The results of those seeds' runs that are there, if any."""
    names = {seed: reducing_name(curriculum, size, seed) for seed in seeds}
    return {seed: results[name] for seed, name in names.items() if name in results}


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
