"""The runs of tables on cut-outs: a head on the published trunk, and what starts from it.

All seeds share the head: it stands for the published model that a user starts from.
"""

from iared2_jax.tables.runs import Run

CONFIG = "configs/dinov2_cutouts.py"
# Baselines beside every run, as the paper's tables have them.
SELECTORS = ("random", "attention_block_1")
# Nothing but figures; five passes over all images are spared with "agreement".
QUIET = {
    "eval.figures": "0",
    "eval.page_images": "0",
    "eval.speed_batch": "0",
    "eval.agreement": "False",
}


def at_size(size: int) -> str:
    """The config of images of `size` px."""
    return f"{CONFIG}:size={size}"


def minutes(at_112: float, size: int) -> float:
    """About what takes `at_112` minutes at 112 px, by the number of tokens."""
    return at_112 * (size / 112) ** 2


def head(size: int) -> Run:
    """The run that trains the head."""
    options = {"curriculum": "supervised", "eval.maps": "()", **QUIET}
    return Run(f"{size}px-head", at_size(size), options, minutes=minutes(7, size))


def reducing_name(curriculum: str, size: int, seed: int) -> str:
    """The folder of one seed's run."""
    return f"{size}px-{curriculum}-{seed}"


def reducing(curriculum: str, size: int, seed: int) -> Run:
    """The run that trains interpreters, and by "iared2" the blocks behind each."""
    options = {
        "curriculum": curriculum,
        "seed": str(seed),
        "compare.selectors": repr(SELECTORS),
        **QUIET,
        "eval.figures": "4",
    }
    # Measured; of "iared2" reckoned from its steps.
    time = {"interpreters": 17, "iared2": 40}[curriculum]
    return Run(
        reducing_name(curriculum, size, seed),
        at_size(size),
        options,
        start=head(size).name,
        minutes=minutes(time, size),
    )


def timed(curriculum: str, size: int, seed: int) -> Run:
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
    return Run(f"{start}-speed", at_size(size), options, start=start, minutes=minutes(4, size))


def all_maps(size: int) -> Run:
    """The run that measures every map of the model before anything is dropped."""
    options = {
        "mode": "eval",
        "curriculum": "supervised",
        "eval.maps": "('all',)",
        "eval.lime_samples": "128",  # 200 images; a CPU takes a minute for 20 samples of each
        "data.eval_size": "200",
        **QUIET,
    }
    return Run(
        f"{size}px-maps",
        at_size(size),
        options,
        start=head(size).name,
        minutes=minutes(25, size),
    )
