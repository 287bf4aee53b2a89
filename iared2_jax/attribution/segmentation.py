"""Weakly-supervised segmentation: does a map find the object? (paper, Tables 1 and 5)

The protocol of the ImageNet-Segmentation evaluation of Chefer et al. (2021): a map is enlarged
bilinearly to the image and min-max normalised per image; foreground is what exceeds its mean.
Pixels are counted over the whole set before anything is divided.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class SegmentationScores(NamedTuple):
    """Over all pixels of a set.

    pixel_accuracy: share of pixels labelled right.
    mean_accuracy: mean of the two classes' recalls.
    mean_iou: mean of the two classes' intersection over union.
    """

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float


def foreground(heatmaps: Float[np.ndarray, "b ..."]) -> Bool[np.ndarray, "b ..."]:
    """What exceeds the mean of the min-max normalised map; a constant map has no foreground."""
    pixels = tuple(range(1, heatmaps.ndim))
    low = heatmaps.min(axis=pixels, keepdims=True)
    span = heatmaps.max(axis=pixels, keepdims=True) - low
    normalised = (heatmaps - low) / np.where(span > 0, span, 1)
    return normalised > normalised.mean(axis=pixels, keepdims=True)


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
    confusion = np.zeros((2, 2))
    np.add.at(confusion, (masks.astype(int).ravel(), predicted.astype(int).ravel()), 1)
    hits, truth, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = truth + guessed - hits
    recall = np.divide(hits, truth, out=np.ones(2), where=truth > 0)
    iou = np.divide(hits, union, out=np.ones(2), where=union > 0)
    return SegmentationScores(
        float(hits.sum() / confusion.sum()), float(recall.mean()), float(iou.mean())
    )
