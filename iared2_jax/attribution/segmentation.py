"""Weakly-supervised segmentation: does a map find the object? (paper, Tables 1 and 5)

The protocol of the ImageNet-Segmentation evaluation of Chefer et al. (2021): a map is enlarged
bilinearly to the image and min-max normalised per image; foreground is what exceeds its mean.
Pixels are counted over the whole set before anything is divided. A set that does not fit in memory
is counted batch by batch:

    counts = [measure(heatmaps, masks) for heatmaps, masks in batches]
    summarise(concatenate(counts))
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

THRESHOLDS: Float[np.ndarray, " thresholds"] = np.arange(100) / 100  # of the normalised map


class SegmentationScores(NamedTuple):
    """Over all pixels of a set.

    pixel_accuracy: share of pixels labelled right.
    mean_accuracy: mean of the two classes' recalls.
    mean_iou: mean of the two classes' intersection over union.
    """

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float


METRICS = (*SegmentationScores._fields, "average_precision", "best_iou")
_IOU = SegmentationScores._fields.index("mean_iou")


class MapCounts(NamedTuple):
    """What `measure` finds in maps, a row per image; all that `summarise` needs.

    A confusion is pixels by [truth, prediction], 0 the background, 1 the foreground.

    confusion: at the paper's threshold, the mean of the normalised map.
    sweep: at each of `THRESHOLDS`.
    average_precision: of the map as a ranking of both classes' pixels.
    """

    confusion: Int[np.ndarray, "n 2 2"]
    sweep: Int[np.ndarray, "n thresholds 2 2"]
    average_precision: Float[np.ndarray, " n"]


def normalised(heatmaps: Float[np.ndarray, "b ..."]) -> Float[np.ndarray, "b ..."]:
    """(h - min h) / (max h - min h) per image; 0 everywhere for a map that tells nothing.

    That is a constant map, or one with a NaN or an infinity in it: the published evaluation, too,
    sets to 0 what is not a number then.
    """
    low, high = _over_pixels(np.min, heatmaps), _over_pixels(np.max, heatmaps)
    with np.errstate(invalid="ignore", over="ignore"):
        span = high - low
        tells = np.isfinite(span) & (span > 0)
        return np.where(tells, (heatmaps - low) / np.where(tells, span, 1), 0)


def _over_pixels(reduce: Any, heatmaps: np.ndarray) -> np.ndarray:
    return reduce(heatmaps, axis=tuple(range(1, heatmaps.ndim)), keepdims=True)


def foreground(heatmaps: Float[np.ndarray, "b ..."]) -> Bool[np.ndarray, "b ..."]:
    """What exceeds the mean of the min-max normalised map; a constant map has no foreground."""
    return _above_mean(normalised(heatmaps))


def _above_mean(scaled: np.ndarray) -> np.ndarray:
    return scaled > _over_pixels(np.mean, scaled)


def score_segmentation(
    predicted: Bool[np.ndarray, "b ..."], masks: Bool[np.ndarray, "b ..."]
) -> SegmentationScores:
    """The three figures of Table 1, from one 2x2 confusion matrix over all pixels.

    A class that neither the masks nor the prediction have counts as fully right.

    Example:
      >>> mask = np.array([[[True, True], [False, False]]])
      >>> score_segmentation(np.ones_like(mask), mask)
      SegmentationScores(pixel_accuracy=0.5, mean_accuracy=0.5, mean_iou=0.25)
    """
    confusion = _confusion((masks & predicted).sum(), predicted.sum(), masks.sum(), masks.size)
    return SegmentationScores(*_rates(confusion).tolist())


def _confusion(hits: Any, predicted: Any, truth: Any, pixels: int) -> Num[np.ndarray, "*r 2 2"]:
    """[truth, prediction], from how many pixels are foreground in both, and in either."""
    misses, alarms = truth - hits, predicted - hits
    cells = np.broadcast_arrays(pixels - truth - alarms, alarms, misses, hits)
    return np.stack(cells, axis=-1).reshape(*cells[0].shape, 2, 2)


def _rates(confusion: Num[np.ndarray, "*r 2 2"]) -> Float[np.ndarray, "*r 3"]:
    """Pixel accuracy, mean of the two recalls, mean of the two IoUs: as `SegmentationScores`."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    truth, guessed = confusion.sum(axis=-1), confusion.sum(axis=-2)
    union = truth + guessed - hits
    recall = np.divide(hits, truth, out=np.ones(hits.shape), where=truth > 0)
    iou = np.divide(hits, union, out=np.ones(hits.shape), where=union > 0)
    accuracy = hits.sum(axis=-1) / truth.sum(axis=-1)
    return np.stack([accuracy, recall.mean(axis=-1), iou.mean(axis=-1)], axis=-1)


def measure(heatmaps: Float[np.ndarray, "b ..."], masks: Bool[np.ndarray, "m ..."]) -> MapCounts:
    """Counts what maps get right, image by image.

    Average precision is the published one: of [1 - h, h] against [background, foreground], over the
    pixels of both, h the normalised map. A map that tells nothing has 0 in both there, not 1 and 0,
    and so 0.5, like a random one. Half of what is ranked is always right, so an image without
    foreground has an average precision, too; its confusions count like any other's.

    Args:
      heatmaps: [b, h, w], of clips [b, t, h, w]; any finite range.
      masks: the truth, of the same shape.

    Raises:
      ValueError: the two shapes differ.

    Source:
      Chefer et al., "Transformer Interpretability Beyond Attention Visualization" (2021), their
      ImageNet-Segmentation script.

    Example:
      >>> counts = measure(np.array([[[0.0, 0.1], [0.2, 1.0]]]), np.array([[[0, 0], [1, 1]]]) > 0)
      >>> counts.confusion.tolist(), counts.sweep[0, 15].tolist()
      ([[[2, 0], [1, 1]]], [[2, 0], [0, 2]])
    """
    if heatmaps.shape != masks.shape:
        raise ValueError(
            f"maps of shape {list(heatmaps.shape)} cannot be compared with masks of shape "
            f"{list(masks.shape)}: enlarge the maps to the images (attribution.maps.to_heatmaps)"
        )
    scaled = normalised(heatmaps)
    rows = (array.reshape(len(masks), -1) for array in (scaled, masks, _above_mean(scaled)))
    flat, truth, predicted = rows
    hits = (truth & predicted).sum(axis=1)
    confusion = _confusion(hits, predicted.sum(axis=1), truth.sum(axis=1), flat.shape[1])
    # Sorted once, for all the thresholds, and because two sorted halves are ranked twice as fast.
    order = np.argsort(flat, axis=1)
    flat, truth = np.take_along_axis(flat, order, 1), np.take_along_axis(truth, order, 1)
    precision = [_average_precision(h, m) for h, m in zip(flat, truth, strict=True)]
    return MapCounts(confusion, _sweep(flat, truth), np.array(precision, np.float64))


def _sweep(
    ascending: Float[np.ndarray, "b p"], truth: Bool[np.ndarray, "b p"]
) -> Int[np.ndarray, "b thresholds 2 2"]:
    """The confusions of `ascending > threshold`, for each of `THRESHOLDS`."""
    pixels = ascending.shape[1]
    below = np.stack([np.searchsorted(row, THRESHOLDS, side="right") for row in ascending])
    missed = np.pad(truth.cumsum(axis=1), ((0, 0), (1, 0)))  # [b, k]: of the k lowest pixels
    total = missed[:, -1:]
    return _confusion(total - np.take_along_axis(missed, below, 1), pixels - below, total, pixels)


def _average_precision(ascending: np.ndarray, truth: np.ndarray) -> float:
    """The average precision of one normalised map, its pixels in ascending order."""
    from sklearn.metrics import average_precision_score  # two seconds to import

    if ascending[-1] == 0:
        return 0.5
    right = np.concatenate([~truth, truth[::-1]])
    return float(average_precision_score(right, np.concatenate([1 - ascending, ascending[::-1]])))


def concatenate(counts: Sequence[MapCounts]) -> MapCounts:
    """The counts of several batches, at least one, as one."""
    return MapCounts(*(np.concatenate(parts) for parts in zip(*counts, strict=True)))


def summarise(counts: MapCounts, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The figures of a map over a whole set; pixels are added up first, then divided.

    Args:
      bootstrap: resamples of the images that the intervals come from; 0: no intervals.
      seed: of the resamples.

    Returns:
      pixel_accuracy, mean_accuracy, mean_iou: Table 1's, see `SegmentationScores`.
      average_precision: mean over images (the published mAP).
      best_iou, best_threshold: the mIoU at the one of `THRESHOLDS` (the lowest, of equals) that is
        best over the whole set, and which. It is chosen on the masks that it is scored with.
      predicted_share: of the pixels, those predicted foreground at the paper's threshold.
      chance_iou: the mIoU of a map that marks as many pixels of the set, but at random: of the
        confusion C'[t, p] = C[t, .] C[., p] / C[., .].
      interval: {metric: [low, high]} of `METRICS`, the 2.5th and 97.5th percentile over resamples
        of as many images with replacement; the best threshold is chosen anew in each.
      All are shares in [0, 1].

    Example:
      >>> maps = np.array([[[0.0, 0.1], [0.2, 1.0]]])
      >>> found = summarise(measure(maps, maps > 0.15))
      >>> found["pixel_accuracy"], found["best_iou"], found["best_threshold"]
      (0.75, 1.0, 0.1)
    """
    images = len(counts.average_precision)
    found = {key: float(of[0]) for key, of in _figures(counts, np.ones((1, images))).items()}
    confusion = counts.confusion.sum(axis=0)
    by_chance = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    found["predicted_share"] = float(confusion[:, 1].sum() / confusion.sum())
    found["chance_iou"] = float(_rates(by_chance)[_IOU])
    if not bootstrap:
        return found
    rng = np.random.default_rng(seed)
    resampled = _figures(
        counts, rng.multinomial(images, np.full(images, 1 / images), size=bootstrap)
    )
    interval = {key: np.percentile(resampled[key], (2.5, 97.5)).tolist() for key in METRICS}
    return {**found, "interval": interval}


def _figures(counts: MapCounts, weights: Num[np.ndarray, "r n"]) -> dict[str, np.ndarray]:
    """The figures [r] of sets in which the images are as often as each row of `weights` says."""
    weights = weights.astype(np.float64)  # its product is one of BLAS; counts stay exact

    def total(rows: np.ndarray) -> np.ndarray:
        return (weights @ rows.reshape(len(rows), -1)).reshape(-1, *rows.shape[1:])

    by_threshold = _rates(total(counts.sweep))[..., _IOU]
    return {
        **dict(zip(SegmentationScores._fields, _rates(total(counts.confusion)).T, strict=True)),
        "average_precision": total(counts.average_precision) / weights.sum(axis=1),
        "best_iou": by_threshold.max(axis=1),
        "best_threshold": THRESHOLDS[by_threshold.argmax(axis=1)],
    }
