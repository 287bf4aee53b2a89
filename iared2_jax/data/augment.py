"""The training augmentation of DeiT: RandAugment, random erasing, mixup and CutMix, repeats.

Each is a pure function of its input and a generator. In DeiT's order: crop, flip, `rand_augment`
(a PIL image), `random_erasing` (its uint8 pixels), then `mixup_cutmix` (the batch).

DeiT: Touvron et al., "Training data-efficient image transformers & distillation through attention"
(2021), Table 9. What the table leaves open (ranges, ops, who is mixed with whom) is as in timm,
the library that DeiT was trained with.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np
from jaxtyping import Float32, Int, Num, UInt8
from PIL import Image, ImageEnhance, ImageOps

from iared2_jax.files import with_tuples
from iared2_jax.typing import Norm

Color = tuple[int, int, int]

IMAGENET_GREY: Color = (124, 116, 104)  # ImageNet's mean, 0..255

OP_PROBABILITY = 0.5  # of each layer of RandAugment
MAX_MAGNITUDE = 10.0  # strength 1

ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
ERASING_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
    """What a training example goes through; the defaults are DeiT's (Table 9).

    Attributes:
      rand_augment: `rand_augment` with its defaults, timm's 'rand-m9-mstd0.5-inc1'.
      erasing: the probability of `random_erasing`.
      mixup, cutmix: alpha of their Beta distributions, 0 for off. (The table says "prob."; the code
        of DeiT mixes every batch, by one of the two.)
      repeats: copies of an image in an epoch, see `repeated_example`.
      flip: the probability of a horizontal flip.
      scale, ratio: of the random crop: its share of the image's area, and width / height.
    """

    rand_augment: bool = True
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    repeats: int = 3
    flip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


def augment_options(section: ml_collections.ConfigDict) -> AugmentOptions:
    """The options that a section of a config gives; lists are tuples here."""
    return AugmentOptions(**with_tuples(section))


DEIT = AugmentOptions()
CROP_FLIP = AugmentOptions(rand_augment=False, erasing=0.0, mixup=0.0, cutmix=0.0, repeats=1)
NONE = dataclasses.replace(CROP_FLIP, flip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))


# -- RandAugment.


class Op(NamedTuple):
    """An op of RandAugment: `argument` of a strength in [0, 1] and a sign, which `apply` takes.

    moves: whether it moves pixels; else it changes their colours.
    """

    argument: Callable[[float, int], float]
    apply: Callable[[Image.Image, float, Color], Image.Image]
    moves: bool = False


def _solarize_add(image: Image.Image, added: int, fill: Color) -> Image.Image:
    table = [min(255, v + added) if v < 128 else v for v in range(256)]
    return image.point(table * 3)


def _posterize(image: Image.Image, bits: int, fill: Color) -> Image.Image:
    """Black at 0 bits, as in DeiT's day; `ImageOps.posterize` refuses that since Pillow 13."""
    return image.point([v & ~(255 >> bits) for v in range(256)] * 3)


def _enhance(enhancer: type) -> Op:
    """A factor of 1 changes nothing; both less and more of the quality are augmentation."""
    return Op(
        lambda s, sign: max(0.1, 1 + sign * 0.9 * s), lambda im, v, _: enhancer(im).enhance(v)
    )


def _affine(largest: float, matrix: Callable[[float, int, int], tuple[float, ...]]) -> Op:
    """Output pixel (x, y) is input pixel `matrix` @ (x, y, 1), bicubic."""
    return Op(
        lambda s, sign: sign * largest * s,
        lambda image, v, fill: image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix(v, *image.size),
            resample=Image.Resampling.BICUBIC,
            fillcolor=fill,
        ),
        moves=True,
    )


# The "increasing" set: the stronger, the further from the image, for every op that has a strength.
OPS: dict[str, Op] = {
    "auto_contrast": Op(lambda s, _: 0, lambda im, *_: ImageOps.autocontrast(im)),
    "equalize": Op(lambda s, _: 0, lambda im, *_: ImageOps.equalize(im)),
    "invert": Op(lambda s, _: 0, lambda im, *_: ImageOps.invert(im)),
    "rotate": Op(  # degrees, counter-clockwise
        lambda s, sign: sign * 30 * s,
        lambda im, v, fill: im.rotate(v, resample=Image.Resampling.BICUBIC, fillcolor=fill),
        moves=True,
    ),
    "posterize": Op(lambda s, _: 4 - int(4 * s), _posterize),  # bits kept, 4 to 0
    "solarize": Op(  # inverted from this value on, 256 to 0
        lambda s, _: 256 - int(256 * s), lambda im, v, _: ImageOps.solarize(im, v)
    ),
    "solarize_add": Op(lambda s, _: int(110 * s), _solarize_add),  # added to values below 128
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(0.3, lambda v, w, h: (1, v, 0, 0, 1, 0)),
    "shear_y": _affine(0.3, lambda v, w, h: (1, 0, 0, v, 1, 0)),
    "translate_x": _affine(0.45, lambda v, w, h: (1, 0, v * w, 0, 1, 0)),  # share of the side
    "translate_y": _affine(0.45, lambda v, w, h: (1, 0, 0, 0, 1, v * h)),
}


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    magnitude: float = 9,
    layers: int = 2,
    magnitude_std: float = 0.5,
    fill: Color = IMAGENET_GREY,
    moves_only: bool = False,
) -> Image.Image:
    """`layers` ops in turn, drawn from `OPS` with replacement, each applied half the time.

    The strength of each is clip(N(magnitude, magnitude_std), 0, 10) / 10, its sign a fair coin.
    The defaults are DeiT's 'rand-m9-mstd0.5-inc1'.

    Args:
      image: an RGB image.
      rng: where all randomness comes from.
      magnitude, magnitude_std: in units where 10 is the end of every op's range.
      layers: how many ops are drawn.
      fill: colour, 0..255, of what geometric ops bring in from outside the image.
      moves_only: of the ops that are drawn, apply those that move pixels alone: so a map of an
        image goes where the image goes, by a generator of the same state.

    Source: Cubuk et al., "RandAugment" (2019), with timm's ranges and its noise on the magnitude.
    """
    ops = rng.integers(len(OPS), size=layers)
    applied = rng.random(layers) < OP_PROBABILITY
    strengths = rng.normal(magnitude, magnitude_std, layers).clip(0, MAX_MAGNITUDE) / MAX_MAGNITUDE
    signs = rng.choice((-1, 1), size=layers)
    for index, strength, sign in zip(ops[applied], strengths[applied], signs[applied], strict=True):
        op = list(OPS.values())[index]
        if op.moves or not moves_only:
            image = op.apply(image, op.argument(float(strength), int(sign)), fill)
    return image


# -- Random erasing.


def random_erasing(
    pixels: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    norm: Norm,
    probability: float = 0.25,
) -> UInt8[np.ndarray, "h w 3"]:
    """With `probability`, a copy in which one rectangle is noise; else `pixels` itself.

    Its area is U(0.02, 1/3) of the image, its height / width log-uniform in [0.3, 1/0.3], its place
    uniform. A rectangle that does not fit is drawn again, up to 10 times; then nothing is erased.

    The noise is N(0, 1) per pixel and channel after normalisation. These pixels are not normalised
    yet (that happens on the device), so they get round(255 * clip(mean + std * noise, 0, 1)). This
    differs from DeiT in the clipping, of 3 % of the noise with ImageNet's `norm`, and the rounding.

    Args:
      pixels: an image, 0..255.
      rng: where all randomness comes from.
      norm: mean and standard deviation per channel that the model's input is normalised by, 0..1.
      probability: of erasing anything.

    Source: Zhong et al., "Random Erasing Data Augmentation" (2017); timm's mode 'pixel'.
    """
    if rng.random() >= probability:
        return pixels
    height, width, _ = pixels.shape
    for _ in range(ERASING_ATTEMPTS):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = np.exp(rng.uniform(*np.log(ERASED_ASPECT)))
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            mean, std = np.asarray(norm)
            noise = (mean + std * rng.standard_normal((h, w, 3))).clip(0, 1)
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = np.rint(255 * noise)
            break
    return pixels


# -- Mixup and CutMix.


def mixup_cutmix(
    images: Num[np.ndarray, "b ... h w c"],
    labels: Int[np.ndarray, " b"],
    num_classes: int,
    rng: np.random.Generator,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_prob: float = 0.5,
    probability: float = 1.0,
    smoothing: float = 0.1,
) -> tuple[Num[np.ndarray, "b ... h w c"], Float32[np.ndarray, "b num_classes"]]:
    """A batch mixed with itself in reverse, one λ for all rows: image i with image b - 1 - i.

    Mixup: x = λ x_i + (1 - λ) x_j, λ ~ Beta(mixup_alpha, mixup_alpha).
    CutMix: x_i with a box of x_j, its sides sqrt(1 - λ) of the image's, λ ~ Beta(cutmix_alpha,
    cutmix_alpha), its centre uniform. The border clips the box: λ becomes the share x_i keeps.
    Both: y = λ y_i + (1 - λ) y_j, where y_i is one-hot, smoothed: smoothing / num_classes
    everywhere, and 1 - smoothing more at the label. Rows of targets sum to 1.

    Args:
      images: pixels, normalised or not (mixing commutes with normalising). The result has their
        type; uint8 is rounded.
      labels: classes, 0..num_classes - 1.
      num_classes: columns of the targets.
      rng: where all randomness comes from.
      mixup_alpha, cutmix_alpha: 0 turns one off; with both 0, the labels are smoothed, no more.
      switch_prob: share of CutMix among mixed batches where both are on.
      probability: of mixing the batch at all.
      smoothing: of the labels.

    Source: Zhang et al., "mixup" (2017), eq. 1; Yun et al., "CutMix" (2019), eqs. 1 and 2;
    "batch" mode of timm.
    """
    lam = 1.0
    if (mixup_alpha > 0 or cutmix_alpha > 0) and rng.random() < probability:
        cut = cutmix_alpha > 0 and (mixup_alpha <= 0 or rng.random() < switch_prob)
        alpha = cutmix_alpha if cut else mixup_alpha
        images, lam = (_cutmix if cut else _mixup)(images, rng.beta(alpha, alpha), rng)
    targets = np.full((len(labels), num_classes), smoothing / num_classes)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return images, (lam * targets + (1 - lam) * targets[::-1]).astype(np.float32)


def _mixup(images: np.ndarray, lam: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    mixed = np.float32(lam) * images + np.float32(1 - lam) * images[::-1]
    if np.issubdtype(images.dtype, np.integer):
        np.rint(mixed, out=mixed)
    return mixed.astype(images.dtype), lam


def _cutmix(images: np.ndarray, lam: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    height, width = images.shape[-3:-1]  # of a clip, too: the box is in all of its frames
    rows, columns = (_span(side, (1 - lam) ** 0.5, rng) for side in (height, width))
    mixed = images.copy()
    mixed[..., rows, columns, :] = images[::-1][..., rows, columns, :]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)


def _span(side: int, share: float, rng: np.random.Generator) -> slice:
    """`share` of a side around a uniform centre, as far as it lies inside."""
    length = int(side * share)
    first = int(rng.integers(side)) - length // 2
    return slice(max(first, 0), min(first + length, side))


# -- Repeated augmentation.


def repeated_example(k: int, epoch_size: int, repeats: int = 3) -> tuple[int, int]:
    """Example k of training: its place in the shuffled epoch k // epoch_size, and which copy it is.

    With n = k mod epoch_size, place = n // repeats and copy = n mod repeats: copies are neighbours,
    an epoch has as many examples as without repeats, and sees the first ceil(epoch_size / repeats)
    images of its shuffle. `repeats=1` is the plain order.

    Source: Hoffer et al., "Augment your batch" (2020); DeiT's sampler, which also drops what is
    left over from a multiple of 256.

    Example:
      >>> [repeated_example(k, epoch_size=4) for k in range(5)]
      [(0, 0), (0, 1), (0, 2), (1, 0), (0, 0)]
    """
    place, copy = divmod(k % epoch_size, repeats)
    return place, copy
