"""DynamicViT: which tokens are kept is learned with the backbone, by Gumbel-softmax."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Float, PRNGKeyArray

from iared2_jax.errors import UsageError
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.phases.base import (
    Batch,
    Metrics,
    Params,
    Part,
    PhaseContext,
    PhaseKind,
    cross_entropy,
    phase_options,
    whole_backbone,
)
from iared2_jax.typing import Array


class DynamicViTPhase(PhaseKind):
    """Interpreters and backbone at once, by gradients through relaxed masks.

        L = L_labels + w_r mean_j mean_b (rho_j - kept_bj)^2 + w_d KL(p || p_dense) + w_t L_tokens

    Rao et al. 2021, "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    Eq. 5 to 13. Masks are drawn by straight-through Gumbel-softmax and enter attention as its keys'
    weights (`IARed2.relaxed`). `kept` is the share of N that group j keeps of an image, rho_j its
    `keep_target`. p_dense and the tokens of L_tokens, the mean squared difference of the kept
    patches' last tokens, are those of the backbone as it was when the phase began.

    The published predictors are the interpreters of config.model.interpreter_kind="dynamicvit";
    the paper's interpreters learn by it, too. The published groups are four, of which the first has
    no predictor: keep_target=(1.0, 0.7, 0.49, 0.343). A group whose target is 1 keeps all in this
    phase, its interpreter stays as it is, and mean_j is over the others: so give such a model
    `keep_ratios`, or a threshold of `KEEP_ALL` for that group.
    """

    section = "dynamicvit"
    budgeted = True

    def options(self) -> dict[str, Any]:
        """The published recipe: 30 epochs, the backbone at rest for the first 5."""
        return phase_options(
            epochs=30.0,
            learning_rate=1e-3,  # of the interpreters
            label_smoothing=0.0,
            keep_target=(1.0, 0.7, 0.49, 0.343),  # rho: of all N tokens, one share for each group
            target_weight=2.0,  # w_r
            distill_weight=0.5,  # w_d
            token_weight=0.5,  # w_t
            temperature=1.0,  # of the Gumbel-softmax
            backbone_rate=0.01,  # the backbone's learning rate, of the interpreters'
            backbone_rest=1 / 6,  # the share of the phase, from its beginning, without it
        )

    def check_options(self, options: ml_collections.ConfigDict) -> None:
        """Refuses shares, temperatures and rates that cannot be."""
        if not all(0 < share <= 1 for share in options.keep_target):
            raise UsageError(
                f"config.dynamicvit.keep_target={tuple(options.keep_target)} must be shares of "
                "all tokens in (0, 1]"
            )
        if options.temperature <= 0:
            raise UsageError(f"config.dynamicvit.temperature={options.temperature} must be above 0")
        if not 0 <= options.backbone_rest < 1:
            raise UsageError(
                f"config.dynamicvit.backbone_rest={options.backbone_rest} must be a share of the "
                "phase in [0, 1)"
            )

    def check(self, options: ml_collections.ConfigDict, num_groups: int) -> None:
        """Refuses shares that are not one for each group."""
        if len(options.keep_target) != num_groups:
            raise UsageError(
                f"config.dynamicvit.keep_target has {len(options.keep_target)} values for "
                f"{num_groups} groups: give one each, or set config.model.groups"
            )

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        targets = enumerate(options.keep_target, 1)
        interpreters = {("interpreter", j) for j, target in targets if target < 1}
        return whole_backbone(num_groups) | interpreters

    def rate(
        self, options: ml_collections.ConfigDict, part: Part, steps: int
    ) -> optax.Schedule | None:
        """The backbone rests; then min(backbone_rate, c), where the interpreters have the cosine c.

        As in their code: a constant rate, until the interpreters' own has fallen below it.
        """
        if part[0] == "interpreter":
            return None
        rest, most = round(options.backbone_rest * steps), options.backbone_rate

        def rate(step: Array) -> Array:
            """The share of the interpreters' rate that the backbone has at this step."""
            cosine = jnp.maximum(0.5 * (1 + jnp.cos(jnp.pi * step / steps)), 1e-9)
            return jnp.where(step < rest, 0.0, jnp.minimum(most / cosine, 1.0))

        return rate

    def fixed_groups(self, group: int) -> int:
        return 0

    def check_module(self, module: IARed2) -> None:
        """Refuses backbones that do not show their last tokens, or weigh no keys."""
        if not hasattr(module.backbone, "final_tokens"):
            raise UsageError(
                f'config.curriculum has "dynamicvit", but {type(module.backbone).__name__} has no '
                "method `final_tokens`: use a ViT"
            )
        module.require_attention_weights('config.curriculum="dynamicvit"')

    def initial_extra(self, module: IARed2, params: Params) -> Any:
        """The backbone as it is now, which the phase distils from."""
        return {"backbone": jax.tree.map(jnp.copy, params["backbone"])}

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """The weighted sum, and its parts."""
        module, options = context.module, context.phase.options
        targets = options.keep_target
        choose = functools.partial(_kept, key, options.temperature, targets)
        logits, tokens, kept = module.apply(
            {"params": params}, batch["input"], choose, method="relaxed"
        )
        dense, dense_tokens = module.apply(
            {"params": context.extra}, batch["input"], method="dense_tokens"
        )
        labels, metrics = cross_entropy(logits, batch, options.label_smoothing)
        shares = jnp.stack([keep.mean(axis=1) for keep in kept], axis=1)
        asked = jnp.asarray(targets)
        missed = jnp.where(asked < 1, (asked - shares) ** 2, 0.0).mean(axis=0)
        ratio = missed.sum() / max(1, sum(target < 1 for target in targets))
        answers = divergence(logits, dense)
        last = token_difference(tokens, dense_tokens, kept[-1], module.num_prefix)
        loss = labels + options.target_weight * ratio
        loss = loss + options.distill_weight * answers + options.token_weight * last
        own = {"ratio": ratio, "distillation": answers, "tokens": last}
        own |= {f"keep_rate_{j}": share for j, share in enumerate(shares.mean(0), 1)}
        return loss, {**metrics, **own, "overflow": jnp.zeros(())}


def _kept(
    key: PRNGKeyArray,
    temperature: float,
    targets: Sequence[float],
    group: int,
    logits: Float[Array, "b n h"],
) -> Float[Array, "b n"]:
    if targets[group - 1] == 1:
        return jnp.ones(logits.shape[:2])
    return gumbel_keep(jax.random.fold_in(key, group), logits, temperature)


def gumbel_keep(
    key: PRNGKeyArray, logits: Float[Array, "b n h"], temperature: float = 1.0
) -> Float[Array, "b n"]:
    """Kept (1) or not (0), drawn with the probability I = mean_h sigmoid(logits).

    The two classes' Gumbel-softmax: with logistic noise g, the difference of two Gumbel noises,

        keep = [logit I + g > 0],   d keep = d sigmoid((logit I + g) / temperature).
    """
    one_head = logits[..., 0]
    if logits.shape[-1] > 1:
        keep, drop = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        one_head = jax.nn.logsumexp(keep, axis=-1) - jax.nn.logsumexp(drop, axis=-1)
    drawn = one_head + jax.random.logistic(key, one_head.shape)
    soft = jax.nn.sigmoid(drawn / temperature)
    return (drawn > 0) + (soft - jax.lax.stop_gradient(soft))


def divergence(
    logits: Float[Array, "b classes"], dense: Float[Array, "b classes"]
) -> Float[Array, ""]:
    """Mean KL(p_dense || p) over the images, as their code has it (`batchmean`)."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(dense)
    return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()


def token_difference(
    tokens: Float[Array, "b t d"],
    dense: Float[Array, "b t d"],
    kept: Float[Array, "b n"],
    num_prefix: int,
) -> Float[Array, ""]:
    """Mean squared difference of the kept patches' tokens; 0 where none is kept."""
    there = jax.lax.stop_gradient(kept)
    squared = ((tokens - dense)[:, num_prefix:] ** 2).mean(axis=-1)
    return (squared * there).sum() / jnp.maximum(there.sum(), 1.0)
