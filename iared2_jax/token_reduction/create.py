"""`create_model`: a named backbone with its interpreters, freshly initialised."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.attention_variants import AttentionVariant
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.models.parameters import declared
from iared2_jax.models.variants import get_variant, resized
from iared2_jax.token_reduction.interpreter import POLICY_TOKENS
from iared2_jax.token_reduction.model import INTERPRETER_KINDS, IARed2
from iared2_jax.typing import Array


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
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    num_frames: int | None = None,
    remat: bool = False,
    depth: int | None = None,
    attention: str = "dense",
    attention_size: int | None = None,
    map_channel: bool = False,
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
    known = {"interpreter_heads", "scale", "init_bias", "interpreter_kind"}
    for key in interpreter:
        if key not in known:
            raise UsageError(f"create_model has no option {key!r}{nearest(key, known)}")
    kind = interpreter.get("interpreter_kind", "attention")
    if kind not in INTERPRETER_KINDS:
        raise UsageError(
            f"interpreter_kind {kind!r} is unknown: use one of {', '.join(INTERPRETER_KINDS)}"
        )
    interpreter.setdefault("interpreter_heads", variant.interpreter_heads)
    backbone = variant.backbone
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"num_classes={num_classes} must be at least 1")
    if interpreter["interpreter_heads"] < 1:
        raise UsageError(f"interpreter_heads={interpreter['interpreter_heads']} must be at least 1")
    if backbone.embed_dim % interpreter["interpreter_heads"]:
        raise UsageError(
            f"interpreter_heads={interpreter['interpreter_heads']} does not divide the width "
            f"{backbone.embed_dim} of {name}"
        )
    if depth is not None and depth < 1:
        raise UsageError(f"depth={depth} must be at least 1 block")
    changes = {"num_classes": backbone.num_classes if num_classes is None else num_classes}
    changes |= {} if depth is None else {"depth": depth}
    spec = resized(backbone.input_spec, image_size, patch_size, channels, num_frames, map_channel)
    if spec != backbone.input_spec:
        changes["input_spec"] = spec
    if attention != "dense":
        changes["attention"] = _attention_variant(name, backbone, spec, attention, attention_size)
    elif attention_size is not None:
        raise UsageError(f'attention_size={attention_size} goes with an attention but "dense"')
    backbone = backbone.clone(**changes, dtype=dtype)
    return IARed2(
        backbone=backbone,
        group_sizes=split_into_groups(backbone.depth, groups),
        policy_token=policy_token,
        remat=remat,
        **interpreter,
    )


_ATTENTION_SIZES = {"linformer": 64}  # the paper's k; windows of 49 divide 14 x 14 patches


def _attention_variant(
    name: str, backbone: Any, spec: InputSpec, attention: str, size: int | None
) -> AttentionVariant:
    if not hasattr(backbone, "attention"):
        raise UsageError(f"{name} is a {type(backbone).__name__}, whose attention cannot be chosen")
    variant = AttentionVariant(
        attention, _ATTENTION_SIZES.get(attention, 49) if size is None else size
    )
    variant.check(spec.num_patches)
    return variant


def create_model(
    name: str,
    num_classes: int | None = None,
    groups: int | Sequence[int] = 3,
    policy_token: str | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    num_frames: int | None = None,
    remat: bool = False,
    depth: int | None = None,
    attention: str = "dense",
    attention_size: int | None = None,
    map_channel: bool = False,
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
      image_size, patch_size: px, one number or (height, width); None: the variant's own.
      num_frames: of a clip, for models that take clips; None: the variant's own.
      channels: of the inputs; another number than the variant's gets the mean of its norm.
      remat: gradient checkpointing: less memory in training, about a third more work.
      depth: how many blocks; None: the variant's own.
      attention: "dense", or in its place "linformer", "sinkhorn" or "routing", of a ViT: see
        `models.attention_variants`.
      attention_size: Linformer's k (None: 64), or the window w of the others (None: 49).
      map_channel: inputs have a map of each image, 0 to 1, as a last channel, which the backbone
        does not see: what the selector "memorability" drops by.
      **interpreter: interpreter_heads, scale, init_bias (see `Interpreter`), interpreter_kind (see
        `IARed2`).

    Returns:
      The linen module, and its variables {"params": {"backbone": .., "interpreter_1": .., ..}}.

    Raises:
      UsageError: an unknown name or option, or groups that do not fit the depth.

    Example:
      >>> module, variables = create_model("vit_micro", groups=3)
      >>> logits, out = module.apply(variables, jnp.zeros([1, 64, 64, 3]), thresholds=0.5)
      >>> logits.shape, [tuple(s.shape) for s in out.scores]
      ((1, 10), [(1, 64), (1, 64), (1, 64)])
    """
    module = create_module(
        name,
        num_classes,
        groups,
        policy_token,
        dtype,
        image_size,
        patch_size,
        channels,
        num_frames,
        remat,
        depth,
        attention,
        attention_size,
        map_channel,
        **interpreter,
    )
    return module, init_variables(module, seed)


def init_variables(module: IARed2, seed: int = 0) -> dict[str, Any]:
    """Fresh variables for `module`, from the same distributions as `module.init`.

    Where a parameter has an `Initial`, it is drawn on the host: the same on every device, and in a
    fraction of the time it takes to compile a random kernel for each of some hundred parameters.
    Others come from `module.init`.
    """
    rng = np.random.default_rng(seed)
    found = declared(module, module.input_spec.shape)
    fresh: dict[str, Array] = {}
    if any(initial is None for _, initial in found.values()):
        inputs = jnp.zeros((1, *module.input_spec.shape))
        made = jax.jit(module.init)(jax.random.key(seed), inputs)["params"]
        fresh = traverse_util.flatten_dict(made, sep="/")
    values = {
        path: fresh[path]
        if initial is None
        else jnp.asarray(initial.draw(rng, shape.shape), shape.dtype)
        for path, (shape, initial) in sorted(found.items(), key=lambda item: item[0].split("/"))
    }
    return {"params": traverse_util.unflatten_dict(values, sep="/")}
