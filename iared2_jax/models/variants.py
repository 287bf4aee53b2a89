"""The named variants, in one table."""

import dataclasses
import functools

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.backbones.cait import CaiT
from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.typing import Norm

IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a name stands for.

    Attributes:
      backbone: with its published sizes.
      norm: of the pixels: mean and standard deviation.
      crop_pct: of an evaluation image, the share that the centre crop keeps (`data.images`).
      interpreter_heads: as many as the backbone's, or 6.
      parameters: of the backbone; a test counts them.
      timm: the same model's name in timm, which `create_model` takes, too.
    """

    backbone: Backbone
    norm: Norm = IMAGENET_NORM
    crop_pct: float = 0.9
    interpreter_heads: int = 6
    parameters: int = 0
    timm: str = ""


_tiny = functools.partial(ViT, embed_dim=192, num_heads=3)
_small = functools.partial(ViT, embed_dim=384, num_heads=6)
_base = functools.partial(ViT, embed_dim=768, num_heads=12)

VARIANTS: dict[str, Variant] = {
    # DeiT (Touvron et al. 2021), ImageNet-1k.
    "deit_ti": Variant(
        _tiny(), interpreter_heads=3, parameters=5_717_416, timm="deit_tiny_patch16_224"
    ),
    "deit_s": Variant(_small(), parameters=22_050_664, timm="deit_small_patch16_224"),
    "deit_b": Variant(_base(), parameters=86_567_656, timm="deit_base_patch16_224"),
    "deit_b_384": Variant(
        _base(image_size=384), crop_pct=1.0, parameters=86_859_496, timm="deit_base_patch16_384"
    ),
    "deit_ti_distilled": Variant(
        _tiny(distilled=True),
        interpreter_heads=3,
        parameters=5_910_800,
        timm="deit_tiny_distilled_patch16_224",
    ),
    "deit_s_distilled": Variant(
        _small(distilled=True), parameters=22_436_432, timm="deit_small_distilled_patch16_224"
    ),
    "deit_b_distilled": Variant(
        _base(distilled=True), parameters=87_338_192, timm="deit_base_distilled_patch16_224"
    ),
    "deit_b_distilled_384": Variant(
        _base(image_size=384, distilled=True),
        crop_pct=1.0,
        parameters=87_630_032,
        timm="deit_base_distilled_patch16_384",
    ),
    # ViT with AugReg weights (Steiner et al. 2021): the same shapes, another normalisation.
    "vit_s16": Variant(
        _small(), norm=HALF_NORM, parameters=22_050_664, timm="vit_small_patch16_224"
    ),
    "vit_b16": Variant(_base(), norm=HALF_NORM, parameters=86_567_656, timm="vit_base_patch16_224"),
    "vit_s16_384": Variant(
        _small(image_size=384),
        norm=HALF_NORM,
        crop_pct=1.0,
        parameters=22_196_584,
        timm="vit_small_patch16_384",
    ),
    "vit_b16_384": Variant(
        _base(image_size=384),
        norm=HALF_NORM,
        crop_pct=1.0,
        parameters=86_859_496,
        timm="vit_base_patch16_384",
    ),
    # CaiT (Touvron et al. 2021), distilled on ImageNet-1k.
    "cait_xxs24": Variant(
        CaiT(embed_dim=192, num_heads=4),
        crop_pct=1.0,
        interpreter_heads=4,
        parameters=11_956_264,
        timm="cait_xxs24_224",
    ),
    "cait_s24": Variant(
        CaiT(), crop_pct=1.0, interpreter_heads=8, parameters=46_916_200, timm="cait_s24_224"
    ),
    # Ours, for 64 px: the demo on Cluttered MNIST. Trained weights ship with the package.
    "vit_micro": Variant(
        ViT(
            image_size=64,
            patch_size=8,
            embed_dim=96,
            depth=6,
            num_heads=3,
            mlp_ratio=2,
            num_classes=10,
        ),
        norm=HALF_NORM,
        crop_pct=1.0,
        interpreter_heads=3,
        parameters=474_730,
    ),
}

_TIMM_NAMES = {variant.timm: name for name, variant in VARIANTS.items() if variant.timm}


def is_variant(name: str) -> bool:
    """Whether `create_model` knows the name."""
    return _TIMM_NAMES.get(name.partition(".")[0], name) in VARIANTS


def get_variant(name: str) -> Variant:
    """The table's row for `name`, ours or timm's (a tag like ".fb_in1k" does not matter).

    Raises:
      UsageError: there is none; with the nearest real name.
    """
    if not is_variant(name):
        raise UsageError(f"there is no model {name!r}{nearest(name, [*VARIANTS, *_TIMM_NAMES])}")
    return VARIANTS[_TIMM_NAMES.get(name.partition(".")[0], name)]
