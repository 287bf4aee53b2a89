"""What each table needs on each kind of data, and which rows it makes of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from iared2_jax.errors import UsageError
from iared2_jax.tables.runs import Run
from iared2_jax.tables.statistics import mean, paired

CUTOUTS = "configs/dinov2_cutouts.py"
# Baselines beside every run, as the paper's tables have them.
SELECTORS = ("random", "attention_block_1")
_QUIET = {"eval.figures": "0", "eval.page_images": "0", "eval.speed_batch": "0"}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper: how it is asked for, and what it shows.

    Attributes:
      title: a line above it.
      curriculum: what is trained after the head.
      paper: the paper's own row of it, in words.
    """

    title: str
    curriculum: str
    paper: str


TABLES = {
    "2": Table(
        "Interpreters and fine-tuned blocks, beside baselines fine-tuned as long (Table 2's way)",
        "iared2",
        "DeiT-S on ImageNet: original 79.8, random 78.4, attention 78.4, ours 79.1 (70% of FLOPs)",
    ),
    "4": Table(
        "Interpreters on a backbone whose weights stay as they are (Table 4's way)",
        "interpreters",
        "DeiT-B on ImageNet: 224 px 81.8 to 80.3 at 70% of the FLOPs, 384 px 82.8 to 81.9 at 70%",
    ),
}
PRESETS = ("cutouts",)
# Minutes of two CPU cores at 112 px, measured but for iared2's, which is reckoned from its steps;
# of larger images by their number of tokens.
_MINUTES = {"head": 7.0, "interpreters": 17.0, "iared2": 40.0, "speed": 4.0}


def runs_of(table: str, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    """The runs of a table of cut-outs: for each size one head, a run for each seed, one for speed.

    All seeds share the head: it stands for the published model that a user starts from.
    """
    curriculum, runs = TABLES[table].curriculum, []
    for size in sizes:
        config = f"{CUTOUTS}:size={size}"
        times = (size / 112) ** 2

        def minutes(kind: str, times: float = times) -> float:
            return times * _MINUTES[kind]

        head = f"{size}px-head"
        runs.append(
            Run(
                head,
                config,
                {"curriculum": "supervised", "eval.maps": "()", **_QUIET},
                minutes=minutes("head"),
            )
        )
        for seed in seeds:
            options = {
                "curriculum": curriculum,
                "seed": str(seed),
                "compare.selectors": repr(SELECTORS),
                **_QUIET,
                "eval.figures": "4",
            }
            name = run_name(table, size, seed)
            runs.append(Run(name, config, options, start=head, minutes=minutes(curriculum)))
        timed = {
            "mode": "eval",
            "curriculum": curriculum,
            "eval.maps": "()",
            "data.eval_size": "128",
            **_QUIET,
            "eval.speed_batch": "32",
        }
        first = run_name(table, size, seeds[0])
        runs.append(Run(f"{first}-speed", config, timed, start=first, minutes=minutes("speed")))
    return runs


def run_name(table: str, size: int, seed: int) -> str:
    """The folder of one seed's run."""
    return f"{size}px-{TABLES[table].curriculum}-{seed}"


def rows_of(
    table: str,
    sizes: Sequence[int],
    seeds: Sequence[int],
    results: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """The table's rows: a method at a size, each figure a `Mean` over the seeds.

    Args:
      results: of the runs that are there, by name.

    Raises:
      UsageError: of a size there is no seed at all.
    """
    rows = []
    for size in sizes:
        there = [seed for seed in seeds if run_name(table, size, seed) in results]
        if not there:
            raise UsageError(f"no run of {size} px is finished yet: there is nothing to tabulate")
        found = [results[run_name(table, size, seed)] for seed in there]
        rows += _rows_of_size(size, there, found)
        speed = results.get(f"{run_name(table, size, seeds[0])}-speed")
        if speed is not None:
            _add_speed({row["method"]: row for row in rows if row["pixels"] == size}, speed)
    return rows


def _rows_of_size(size: int, seeds: Sequence[int], found: Sequence[Mapping[str, Any]]) -> list[Row]:
    def of(method: str, key: str) -> list[Any]:
        return [results["methods"][method][key] for results in found]

    rows, ours = [], of("iared2", "top1_error")
    dense = {kind: found[0]["dense"]["flops"][kind] for kind in ("linear", "full")}
    for method in found[0]["methods"]:
        errors = of(method, "top1_error")
        row: Row = {
            "pixels": size,
            "method": method,
            "seeds": list(seeds),
            "top1": mean([100 - error for error in errors]),
            "lost": paired(errors, of("original", "top1_error")),
            "kept": _kept(method, found),
            "ours_better_by": paired(errors, ours) if method != "iared2" else None,
        }
        for kind in ("linear", "full"):
            shares = [100 * flops[kind] / dense[kind] for flops in of(method, "flops")]
            row[f"{kind}_flops"] = mean(shares)
        rows.append(row)
    return rows


def _add_speed(rows: Mapping[str, Row], speed: Mapping[str, Any]) -> None:
    """Images a second of the dense model and of ours, and the latter over what FLOPs allow."""
    rates = speed["images_per_second"]["executions"]
    dense = max(rate["median"] for name, rate in rates.items() if name.startswith("dense"))
    ragged, share = rates["ragged"]["median"], rows["iared2"]["full_flops"].values[0] / 100
    rows["original"]["images_per_s"] = mean([dense])
    rows["iared2"]["images_per_s"] = mean([ragged])
    rows["iared2"]["of_possible"] = mean([100 * ragged / dense * share])


def _kept(method: str, found: Sequence[Mapping[str, Any]]) -> list[float]:
    """What a method keeps of the tokens in each group; a baseline at least as much as we do."""
    if method == "original":
        return [1.0] * len(found[0]["iared2"]["kept"])
    shares = [results["iared2"]["kept"] for results in found]
    return [float(sum(group) / len(group)) for group in zip(*shares, strict=True)]
