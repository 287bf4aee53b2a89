"""The named variants, in one table."""

import dataclasses
import functools
from collections.abc import Callable

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.backbones.cait import CaiT
from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.input_spec import HALF_NORM, InputSpec, clips, images


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a name stands for.

    Attributes:
      backbone: with its published sizes, and the preparation of its inputs.
      interpreter_heads: as many as the backbone's, or 6.
      parameters: of the backbone; a test counts them.
      timm: the same model's name in timm, which `create_model` takes, too.
    """

    backbone: Backbone
    interpreter_heads: int = 6
    parameters: int = 0
    timm: str = ""


_tiny = functools.partial(ViT, embed_dim=192, num_heads=3)
_small = functools.partial(ViT, embed_dim=384, num_heads=6)
_base = functools.partial(ViT, embed_dim=768, num_heads=12)

# How the published weights' pixels were prepared.
_IMAGENET_224 = images(224, crop_pct=0.9)
_IMAGENET_384 = images(384)
_HALF_224 = images(224, norm=HALF_NORM, crop_pct=0.9)
_HALF_384 = images(384, norm=HALF_NORM)
_CAIT_224 = images(224)
_MICRO = {"embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 2}  # for a CPU
_DINO_518 = images(518, 14)
_CLIP_224 = clips(224, frames=8, crop_pct=0.875)  # of 256 px


def _deit3(make: Callable[..., ViT]) -> ViT:
    """DeiT-III: layer scale, and a CLS token without a position."""
    return make(_IMAGENET_224, layer_scale=1e-4, prefix_positions=False)


def _dinov2(make: Callable[..., ViT]) -> ViT:
    return make(_DINO_518, layer_scale=1e-5, pool="cls_mean")


def _dinov2_reg(make: Callable[..., ViT]) -> ViT:
    """DINOv2 with registers, CLS's position added to CLS, as timm has it."""
    return make(_DINO_518, layer_scale=1e-5, pool="cls_mean", registers=4, prefix_positions=False)


VARIANTS: dict[str, Variant] = {
    # DeiT (Touvron et al. 2021), ImageNet-1k.
    "deit_ti": Variant(
        _tiny(_IMAGENET_224),
        interpreter_heads=3,
        parameters=5_717_416,
        timm="deit_tiny_patch16_224",
    ),
    "deit_s": Variant(_small(_IMAGENET_224), parameters=22_050_664, timm="deit_small_patch16_224"),
    "deit_b": Variant(_base(_IMAGENET_224), parameters=86_567_656, timm="deit_base_patch16_224"),
    "deit_b_384": Variant(
        _base(_IMAGENET_384), parameters=86_859_496, timm="deit_base_patch16_384"
    ),
    "deit_ti_distilled": Variant(
        _tiny(_IMAGENET_224, distilled=True),
        interpreter_heads=3,
        parameters=5_910_800,
        timm="deit_tiny_distilled_patch16_224",
    ),
    "deit_s_distilled": Variant(
        _small(_IMAGENET_224, distilled=True),
        parameters=22_436_432,
        timm="deit_small_distilled_patch16_224",
    ),
    "deit_b_distilled": Variant(
        _base(_IMAGENET_224, distilled=True),
        parameters=87_338_192,
        timm="deit_base_distilled_patch16_224",
    ),
    "deit_b_distilled_384": Variant(
        _base(_IMAGENET_384, distilled=True),
        parameters=87_630_032,
        timm="deit_base_distilled_patch16_384",
    ),
    # ViT with AugReg weights (Steiner et al. 2021): the same shapes, another normalisation.
    "vit_s16": Variant(_small(_HALF_224), parameters=22_050_664, timm="vit_small_patch16_224"),
    "vit_b16": Variant(_base(_HALF_224), parameters=86_567_656, timm="vit_base_patch16_224"),
    "vit_s16_384": Variant(_small(_HALF_384), parameters=22_196_584, timm="vit_small_patch16_384"),
    "vit_b16_384": Variant(_base(_HALF_384), parameters=86_859_496, timm="vit_base_patch16_384"),
    # DeiT-III (Touvron et al. 2022), ImageNet-1k.
    "deit3_s16": Variant(_deit3(_small), parameters=22_059_496, timm="deit3_small_patch16_224"),
    "deit3_b16": Variant(_deit3(_base), parameters=86_585_320, timm="deit3_base_patch16_224"),
    # DINOv2 (Oquab et al. 2024), no classes of its own: a head over CLS and the mean of patches.
    "dinov2_s14": Variant(_dinov2(_small), parameters=22_825_192, timm="vit_small_patch14_dinov2"),
    "dinov2_b14": Variant(_dinov2(_base), parameters=88_116_712, timm="vit_base_patch14_dinov2"),
    "dinov2_s14_reg": Variant(
        _dinov2_reg(_small), parameters=22_826_344, timm="vit_small_patch14_reg4_dinov2"
    ),
    "dinov2_b14_reg": Variant(
        _dinov2_reg(_base), parameters=88_119_016, timm="vit_base_patch14_reg4_dinov2"
    ),
    # CaiT (Touvron et al. 2021), distilled on ImageNet-1k.
    "cait_xxs24": Variant(
        CaiT(_CAIT_224, embed_dim=192, num_heads=4),
        interpreter_heads=4,
        parameters=11_956_264,
        timm="cait_xxs24_224",
    ),
    "cait_s24": Variant(
        CaiT(_CAIT_224), interpreter_heads=8, parameters=46_916_200, timm="cait_s24_224"
    ),
    # TimeSformer with joint space-time attention (Bertasius et al. 2021), Kinetics-400: Table 3.
    # Pixels as mmaction2's weights have them, and ImageNet-21k's ViT, from which it is trained.
    "timesformer_jointst_s": Variant(_small(_CLIP_224, num_classes=400), parameters=21_822_736),
    "timesformer_jointst_b": Variant(_base(_CLIP_224, num_classes=400), parameters=86_112_400),
    # Ours, small enough for a CPU: vit_micro over 4 frames, 256 tokens, for eight motions.
    "timesformer_micro": Variant(
        ViT(
            clips(64, frames=4, patch=8, norm=HALF_NORM),
            num_classes=8,
            **_MICRO,
        ),
        interpreter_heads=3,
        parameters=474_920,
    ),
    # Ours, for 64 px: the demo on Cluttered MNIST. Trained weights ship with the package.
    "vit_micro": Variant(
        ViT(images(64, 8, norm=HALF_NORM), num_classes=10, **_MICRO),
        interpreter_heads=3,
        parameters=474_730,
    ),
    # Ours, as small: section 4.2's other backbone on the same digits.
    "cait_micro": Variant(
        CaiT(images(64, 8, norm=HALF_NORM), num_classes=10, **_MICRO),
        interpreter_heads=3,
        parameters=625_882,
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


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size and tuple(size)


def resized(
    spec: InputSpec,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    num_frames: int | None = None,
    map_channel: bool = False,
) -> InputSpec:
    """A variant's input at another size; None leaves as it is.

    With another number of channels, all get the mean of the norm. map_channel: see `InputSpec`.

    Raises:
      UsageError: sizes that make no input.
    """
    height, width = _pair(image_size) or spec.size
    patch = _pair(patch_size) or spec.patch
    count = spec.channels if channels is None else channels
    if num_frames is not None and not spec.is_clip:
        raise UsageError(f"num_frames={num_frames} is for models of clips; this one takes images")
    frames = spec.frames if num_frames is None else num_frames
    norm = spec.norm
    if count != spec.channels:
        norm = tuple((sum(values) / len(values),) * count for values in norm)
    try:
        return dataclasses.replace(
            spec,
            height=height,
            width=width,
            patch=patch,
            channels=count,
            frames=frames,
            norm=norm,
            map_channel=map_channel,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
