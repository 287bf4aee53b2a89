"""The named variants, in one table, and `create_model`."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.backbone import Backbone
from iared2_jax.models.cait import LAYER_SCALE, CaiT
from iared2_jax.models.iared2 import IARed2
from iared2_jax.models.interpreter import POLICY_TOKENS
from iared2_jax.models.vit import ViT
from iared2_jax.typing import Array, Norm

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


def split_into_groups(depth: int, groups: int | Sequence[int]) -> tuple[int, ...]:
    """Blocks per group: D equal groups from a number, or the given sizes, checked.

    Example:
      >>> split_into_groups(12, 3), split_into_groups(12, (2, 4, 6))
      ((4, 4, 4), (2, 4, 6))
    """
    if isinstance(groups, int):
        if groups < 1 or depth % groups:
            divisors = [d for d in range(1, depth + 1) if depth % d == 0]
            raise UsageError(
                f"groups={groups} does not divide the depth of {depth} blocks: use one of "
                f"{divisors}, or a list of group sizes that add up to {depth}"
            )
        return (depth // groups,) * groups
    sizes = tuple(int(size) for size in groups)
    if sum(sizes) != depth or any(size < 1 for size in sizes):
        raise UsageError(
            f"group sizes {list(sizes)} must be positive and add up to the depth of {depth} blocks"
        )
    return sizes


def create_module(
    name: str,
    num_classes: int | None = None,
    groups: int | Sequence[int] = 3,
    policy_token: str | None = None,
    dtype: Any = jnp.float32,
    **interpreter: Any,
) -> IARed2:
    """The module alone, without parameters; the arguments are `create_model`'s."""
    variant = get_variant(name)
    if policy_token is None:
        policy_token = "cls" if variant.backbone.num_prefix else "learned"
    if policy_token not in POLICY_TOKENS:
        raise UsageError(
            f"policy_token {policy_token!r} is unknown: use one of {', '.join(POLICY_TOKENS)}"
        )
    if policy_token == "cls" and not variant.backbone.num_prefix:
        raise UsageError(f'{name} has no CLS token in its blocks: use policy_token="learned"')
    known = {"interpreter_heads", "scale", "init_bias"}
    for key in interpreter:
        if key not in known:
            raise UsageError(f"create_model has no option {key!r}{nearest(key, known)}")
    interpreter.setdefault("interpreter_heads", variant.interpreter_heads)
    backbone = variant.backbone
    if backbone.embed_dim % interpreter["interpreter_heads"]:
        raise UsageError(
            f"interpreter_heads={interpreter['interpreter_heads']} does not divide the width "
            f"{backbone.embed_dim} of {name}"
        )
    backbone = backbone.clone(
        num_classes=backbone.num_classes if num_classes is None else num_classes, dtype=dtype
    )
    return IARed2(
        backbone=backbone,
        group_sizes=split_into_groups(backbone.depth, groups),
        policy_token=policy_token,
        norm=variant.norm,
        crop_pct=variant.crop_pct,
        **interpreter,
    )


def create_model(
    name: str,
    num_classes: int | None = None,
    groups: int | Sequence[int] = 3,
    policy_token: str | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    **interpreter: Any,
) -> tuple[IARed2, dict[str, Any]]:
    """A named backbone with its interpreters, freshly initialised.

    Args:
      name: one of `VARIANTS`, e.g. "deit_s", or the same model's name in timm.
      num_classes: of the head; None takes the variant's own.
      groups: D, how many equal groups; or the blocks of each group, e.g. (2, 4, 6).
      policy_token: "cls" (the CLS token at the group's entry) or "learned" (a vector per group);
        None: "cls", where the backbone's blocks have one.
      seed: of the initialisation.
      dtype: of the computation, e.g. jnp.bfloat16; parameters stay float32.
      **interpreter: interpreter_heads, scale, init_bias (see `models.interpreter.Interpreter`).

    Returns:
      The linen module, and its variables {"params": {"backbone": .., "interpreter_1": .., ..}}.

    Raises:
      UsageError: an unknown name or option, or groups that do not fit the depth.

    Example:
      >>> module, variables = create_model("vit_micro", groups=3)
      >>> logits, out = module.apply(variables, jnp.zeros([1, 64, 64, 3]), thresholds=0.5)
      >>> logits.shape, [tuple(s.shape) for s in out["scores"]]
      ((1, 10), [(1, 64), (1, 64), (1, 64)])
    """
    module = create_module(name, num_classes, groups, policy_token, dtype, **interpreter)
    return module, init_variables(module, seed)


def init_variables(module: IARed2, seed: int = 0) -> dict[str, Any]:
    """Fresh variables for `module`, from the same distributions as `module.init`.

    They are drawn on the host: the same on every device, and in a fraction of the time it takes to
    compile a random kernel for each of some hundred parameters.
    """
    size = module.backbone.image_size
    shapes = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((1, size, size, 3))), jax.random.key(0)
    )
    rng = np.random.default_rng(seed)

    def draw(path, shape: jax.ShapeDtypeStruct) -> Array:
        name = "/".join(str(entry.key) for entry in path)
        distribution = next((fn for pattern, fn in _INITIAL if re.search(pattern, name)), None)
        if distribution is None:
            raise ValueError(f"no initial distribution is known for {name}: use module.init")
        return jnp.asarray(distribution(rng, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """DeiT's standard deviation of 0.02; one uniform number each, by the inverse distribution."""
    return 0.02 * special.ndtri(rng.uniform(special.ndtr(-8), special.ndtr(8), shape))


def _fan_in_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-1, 1, shape) / shape[0] ** 0.5


# The initialisers of the modules once more, by name; a test holds the two together.
_INITIAL = (
    (r"/bias$", lambda rng, shape: np.zeros(shape)),
    (r"/scale$", lambda rng, shape: np.ones(shape)),
    (r"interpreter_\d+/policy_token$", lambda rng, shape: rng.normal(size=shape)),
    (r"interpreter_\d+/[qk]/kernel$", _fan_in_uniform),
    (r"/gamma_\d$", lambda rng, shape: np.full(shape, LAYER_SCALE)),
    (r"(kernel|cls_token|dist_token|pos_embed)$", _normal),
)
