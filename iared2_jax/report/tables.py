"""A run's results as tables of text."""

from collections.abc import Sequence
from typing import Any

Table = tuple[str, list[list[str]]]  # title; rows, the first is the header


def tables(results: dict[str, Any]) -> list[Table]:
    """The tables of `results` (see `report.results.evaluate_run`), as rows of strings."""
    made = [_accuracy(results)]
    if "methods" in results:
        made.insert(0, _methods(results))
    confusions = (reduced_of(results) or results["dense"]).get("confusions")
    if confusions:
        made.append(_confusions(confusions))
    if "agreement" in results:
        made.append(_agreement(results))
    if "segmentation" in results:
        made.append(_segmentation(results))
    if "perturbation" in results:
        made.append(_perturbation(results))
    if "images_per_second" in results:
        made.append(_speed(results))
    return made


def reduced_of(results: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the model that drops tokens, by its interpreters or by another selector."""
    return results.get("iared2") or results.get("reduced")


def _accuracy(results: dict[str, Any]) -> Table:
    dense = results["dense"]
    videos = ["video top-1"] if "video" in dense else []
    rows = [
        [
            "model", "top-1", "top-5", *videos, "kept per group", "MMACs linear", "MMACs full",
            "of dense",
        ],
        _accuracy_row("dense", dense, dense, "1.00"),
    ]  # fmt: skip
    if ours := reduced_of(results):
        name = results["selector"].replace("_", " ") if "reduced" in results else "IA-RED2"
        shares = " / ".join(f"{share:.2f}" for share in ours["kept"])
        rows.append(_accuracy_row(name, ours, dense, shares))
        if "random" in results:
            random = {**ours, "video": {}, **results["random"]}
            rows.append(_accuracy_row("random masks, same counts", random, dense, shares))
    inputs = "videos" if videos else "images"
    return f"Accuracy and cost, {results['examples']} {inputs}", rows


def _accuracy_row(name: str, row: dict[str, Any], dense: dict[str, Any], kept: str) -> list[str]:
    full = row["flops"]["full"]
    videos = []
    if "video" in dense:
        videos = [f"{100 * row['video']['top1']:.2f}%" if row["video"] else ""]
    accuracy = [f"{100 * row[key]:.2f}%" if key in row else "" for key in ("top1", "top5")]
    return [
        name,
        *accuracy,
        *videos,
        kept,
        f"{row['flops']['linear'] / 1e6:.2f}",
        f"{full / 1e6:.2f}",
        f"{100 * full / dense['flops']['full']:.1f}%",
    ]


# What the rows of a comparison are called.
METHODS = {
    "iared2": "IA-RED2",
    "attention": "attention of block 1",
    "attention_before_group": "attention before each group",
    "original_fine_tuned": "original, fine-tuned as long",
    "evit": "EViT",
    "tome": "ToMe",
}


def _methods(results: dict[str, Any]) -> Table:
    """Table 3's columns, for every method of a comparison."""
    columns = {
        "clip1_error": ("clip-1 error", "{:.2f}%"),
        "top1_error": ("top-1 error", "{:.2f}%"),
        "video1_error": ("video-1 error", "{:.2f}%"),
        "kept": ("kept", "{:.3f}"),
        "linear": ("MMACs linear", "{:.1f}"),
        "full": ("MMACs full", "{:.1f}"),
        "clips_per_s": ("clips/s", "{:.0f}"),
        "images_per_s": ("images/s", "{:.0f}"),
        "mean_iou": ("mIoU", "{:.1f}"),
    }
    rows = {
        name: {
            **row,
            **{key: value / 1e6 for key, value in row["flops"].items()},
            **({"mean_iou": 100 * row["mean_iou"]} if "mean_iou" in row else {}),
        }
        for name, row in results["methods"].items()
    }
    there = [key for key in columns if any(key in row for row in rows.values())]
    made = [["method", *(columns[key][0] for key in there)]]
    for name, row in rows.items():
        cells = [columns[key][1].format(row[key]) if key in row else "" for key in there]
        label = METHODS.get(name, name.replace("_", " "))
        made.append([label, *cells])
    return "Beside the baselines, which keep at least as many tokens", made


def _confusions(confusions: list[dict[str, Any]]) -> Table:
    rows = [["class", "taken for", "images", "of the class"]]
    for pair in confusions:
        share = f"{100 * pair['share']:.1f}%"
        rows.append([pair["is"], pair["taken_for"], str(pair["images"]), share])
    return "What is taken for what, most often", rows


_SHOWN = {
    "as_trained": "as trained, group by group",
    "kept_from_the_start": "the kept ones, from the first block on",
    "random_from_the_start": "as many at random",
    "dropped_from_the_start": "the dropped ones",
}


def _agreement(results: dict[str, Any]) -> Table:
    rows = [["patches that the network is shown", "top-1", "same answer as dense"]]
    for key, label in _SHOWN.items():
        figures = results["agreement"][key]
        shares = (figures["top1"], figures["same_as_dense"])
        rows.append([label, *(f"{100 * share:.2f}%" for share in shares)])
    return "Does the network answer by what it keeps?", rows


_SEGMENTATION = {
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mAcc",
    "mean_iou": "mIoU",
    "chance_iou": "chance",
    "predicted_share": "marked",
    "best_iou": "best mIoU",
    "average_precision": "mAP",
}


def _segmentation(results: dict[str, Any]) -> Table:
    """The figures of every map: at the paper's threshold, at the best one, and without any."""
    rows = [["map", *_SEGMENTATION.values()]]
    for name, scores in results["segmentation"].items():
        cells = [_with_spread(scores, key) for key in _SEGMENTATION if key in scores]
        rows.append([name.replace("_", " "), *cells])
    title = (
        f"Weakly-supervised segmentation, {results['map_images']} inputs, foreground "
        f"{100 * results['foreground_share']:.1f}% of the pixels (± half a 95% interval)"
    )
    return title, rows


def _perturbation(results: dict[str, Any]) -> Table:
    keys = ("positive_auc", "negative_auc", "deletion_auc", "insertion_auc")
    first = next(iter(results["perturbation"].values()))
    titles = ("positive ↓", "negative ↑", "deletion ↓", "insertion ↑")
    checks = ("random_weights", "random_labels", "other_class")
    rows = [["map", *titles, *(check.replace("_", " ") for check in checks)]]
    for name, figures in results["perturbation"].items():
        sanity = results.get("sanity", {}).get(name, {})
        cells = [_with_spread(figures, key) for key in keys]
        cells += [f"{sanity[check]:.2f}" if check in sanity else "" for check in checks]
        rows.append([name.replace("_", " "), *cells])
    title = (
        f"Perturbation, areas under the {first['read']} and the probability, and what a map has in "
        "common with that of other weights, labels or another class (1: the same)"
    )
    return title, rows


def _with_spread(figures: dict[str, Any], key: str) -> str:
    """A share in per cent, and half its interval."""
    text = f"{100 * figures[key]:.1f}"
    if key not in figures.get("interval", {}):
        return text
    low, high = figures["interval"][key]
    return f"{text} ±{50 * (high - low):.1f}"


def _speed(results: dict[str, Any]) -> Table:
    speed = results["images_per_second"]
    baseline = speed["executions"][speed["baseline"]]["median"]
    unit = f"{speed.get('inputs', 'images')}/s"  # version 0.1 knew images alone
    rows = [["execution", unit, "quartiles", f"over {speed['baseline']}"]]
    for name, rate in speed["executions"].items():
        quartiles = f"{rate['p25']:.0f} .. {rate['p75']:.0f}"
        over = f"{rate['median'] / baseline:.2f}x"
        rows.append([name, f"{rate['median']:.0f}", quartiles, over])
    title = f"Throughput, batch {speed['batch']}, {speed['dtype']}, {speed['device']}"
    return title, rows


def as_text(table: Table) -> str:
    """One table in columns, for a terminal."""
    title, rows = table
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  " + "   ".join(cells)

    rule = "  " + "-" * (len(line(rows[0])) - 2)
    return "\n".join([title, rule, line(rows[0]), rule, *map(line, rows[1:]), rule])
