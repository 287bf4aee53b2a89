"""What trains in a phase, and with which optimizer."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import optax
from flax import traverse_util
from optax.contrib import muon

# Which part of the model a parameter belongs to: the first rule that matches. {block} parts are
# counted in groups, like the interpreters.
RULES: tuple[tuple[str, str], ...] = (
    (r"interpreter_(\d+)/.*", "interpreter"),
    (r"backbone/block_(\d+)/.*", "blocks"),
    (r"backbone/(patch_embed/.*|pos_embed|cls_token|dist_token)", "embedding"),
    (r"backbone/(norm|head|head_dist|class_block_\d+)/.*", "head"),
)

Part = tuple[str, int]  # ("interpreter", 2), ("blocks", 3), ("embedding", 0), ("head", 0)
FlatParams = dict[str, Any]


def part_of(path: str, group_sizes: tuple[int, ...]) -> Part:
    """The part of the model that the parameter at `path` belongs to.

    Raises:
      ValueError: if no rule matches, so that no parameter is frozen by accident.

    Example:
      >>> part_of("backbone/block_5/attn/qkv/kernel", group_sizes=(4, 4, 4))
      ('blocks', 2)
    """
    for pattern, part in RULES:
        match = re.fullmatch(pattern, path)
        if match and part == "interpreter":
            return part, int(match[1])
        if match and part == "blocks":
            ends = [sum(group_sizes[: group + 1]) for group in range(len(group_sizes))]
            return part, 1 + next(g for g, end in enumerate(ends) if int(match[1]) < end)
        if match:
            return part, 0
    raise ValueError(f"no rule says which part of the model the parameter {path} belongs to")


def split_trainable(
    params: Mapping[str, Any], trains: Collection[Part], group_sizes: tuple[int, ...]
) -> tuple[FlatParams, FlatParams]:
    """Splits parameters into (trainable, frozen), flat, by the parts that train."""
    flat = traverse_util.flatten_dict(params, sep="/")
    trainable = {k: v for k, v in flat.items() if part_of(k, group_sizes) in trains}
    return trainable, {k: v for k, v in flat.items() if k not in trainable}


def merge(trainable: FlatParams, frozen: FlatParams) -> dict[str, Any]:
    """The inverse of `split_trainable`."""
    return traverse_util.unflatten_dict({**trainable, **frozen}, sep="/")


def _matrices_only(params):
    """Weight decay acts on matrices, not on biases, norms and tokens."""
    return jax.tree.map(lambda value: value.ndim == 2, params)


def _adam(learning_rate, phase):
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(phase.weight_decay, _matrices_only),
        optax.scale_by_learning_rate(learning_rate),
    )


def _sgd(learning_rate, phase):
    return optax.chain(
        optax.add_decayed_weights(phase.weight_decay, _matrices_only),
        optax.sgd(learning_rate, phase.momentum, nesterov=True),
    )


def _muon(learning_rate, phase):
    # Matrices by Muon, scaled to AdamW's update size so that learning rates carry over; the rest
    # by AdamW.
    return muon(
        learning_rate,
        weight_decay=phase.weight_decay,
        weight_decay_mask=_matrices_only,
        consistent_rms=0.2,
    )


# "adam" and "adamw" differ only by name: with weight_decay=0 they are the same, else decoupled.
OPTIMIZERS = {"adam": _adam, "adamw": _adam, "sgd": _sgd, "muon": _muon}


def learning_rate_schedule(phase, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine from the peak to 0 at the phase's last step."""
    warmup = min(phase.warmup_steps, steps - 1)
    if warmup == 0:
        return optax.cosine_decay_schedule(phase.learning_rate, steps)
    return optax.warmup_cosine_decay_schedule(0.0, phase.learning_rate, warmup, steps)


def make_optimizer(phase, steps: int) -> optax.GradientTransformation:
    """The optimizer of one phase, from its options in the config."""
    optimizer = OPTIMIZERS[phase.optimizer](learning_rate_schedule(phase, steps), phase)
    if phase.clip_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(phase.clip_norm), optimizer)
    return optimizer
