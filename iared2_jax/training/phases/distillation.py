"""Training of a smaller backbone by a larger one's answers: the paper's teacher-student row."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Float, PRNGKeyArray

from iared2_jax.errors import UsageError, nearest
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

KINDS = ("hard", "soft")
HEADS = ("class", "token")


class DistillationPhase(PhaseKind):
    """(1 - a) cross-entropy with the labels + a distillation loss with a teacher's answers.

    Touvron et al. 2021 (DeiT), section 4. "hard": cross-entropy with the teacher's class. "soft":
    temperature^2 KL(teacher / temperature || student / temperature), the mean over the batch. The
    student learns these with the head of its distillation token ("token", of a distilled variant),
    or with the one head it has ("class").
    """

    section = "distillation"
    reduces = False

    def options(self) -> dict[str, Any]:
        """DeiT's recipe; its options of distillation."""
        return phase_options(
            epochs=300.0,
            optimizer="adamw",
            learning_rate=5e-4,
            weight_decay=0.05,
            label_smoothing=0.0,
            teacher="",  # whatever iared2_jax.load_model takes: a file, a folder, hf://.., a name
            kind="hard",  # "hard" | "soft"
            head="class",  # that learns the teacher's answers: "class" | "token"
            alpha=0.5,  # the distillation loss's weight, the labels' is 1 - alpha
            temperature=1.0,  # of "soft"
            # DeiT's published code divides "soft" by the number of classes, too: 1,000 times weaker
            # than its formula on ImageNet.
            per_class=False,
        )

    def check_options(self, options: ml_collections.ConfigDict) -> None:
        """Refuses unknown kinds and heads, and a weight or temperature that means nothing."""
        for key, choices in (("kind", KINDS), ("head", HEADS)):
            if options[key] not in choices:
                raise UsageError(
                    f"config.distillation.{key}={options[key]!r} is unknown"
                    f"{nearest(options[key], choices)}"
                )
        if options.alpha > 1:
            raise UsageError(f"config.distillation.alpha={options.alpha} must be at most 1")
        if options.temperature == 0:
            raise UsageError("config.distillation.temperature=0.0 must be above 0")

    def check(self, options: ml_collections.ConfigDict, num_groups: int) -> None:
        """Refuses to distil from nobody."""
        if not options.teacher:
            raise UsageError(
                "config.curriculum has distillation, but config.distillation.teacher is empty: "
                "name its weights (--config.distillation.teacher=deit_base.safetensors)"
            )

    def open(self, module: IARed2, options: ml_collections.ConfigDict) -> None:
        """Refuses a teacher that is not there, or cannot teach this model."""
        _teacher(module, options)

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        return whole_backbone(num_groups)

    def fixed_groups(self, group: int) -> int:
        return 0

    def stream(
        self,
        context: PhaseContext,
        params: Params,
        batches: Callable[[int], Iterator[Batch]],
        step: int,
    ) -> Iterator[Batch]:
        """Training batches, with what the teacher answers to the very same images."""
        teacher, variables = _teacher(context.module, context.phase.options)
        examples = super().stream(context, params, batches, step)

        @jax.jit
        def answers(variables: dict[str, Params], inputs: Array) -> Array:
            pixels = teacher.input_spec.normalize(inputs)
            return teacher.apply(variables, pixels, execution="dense")[0]

        return ({**batch, "teacher": answers(variables, batch["input"])} for batch in examples)

    def loss(
        self, context: PhaseContext, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """The weighted sum, and both losses apart."""
        options = context.phase.options
        module, variables = context.module, {"params": params}
        if options.head == "token":
            logits, taught = module.apply(variables, batch["input"], method="dense_heads")
        else:
            logits, _ = module.apply(variables, batch["input"], execution="dense")
            taught = logits
        labels, metrics = cross_entropy(logits, batch, options.label_smoothing)
        distilled = distillation_loss(taught, batch["teacher"], options)
        loss = (1 - options.alpha) * labels + options.alpha * distilled
        agrees = (taught.argmax(-1) == batch["teacher"].argmax(-1)).mean()
        own = {"distillation": distilled, "agreement": agrees, "overflow": jnp.zeros(())}
        return loss, {**metrics, **own}


def distillation_loss(
    student: Float[Array, "b classes"],
    teacher: Float[Array, "b classes"],
    options: ml_collections.ConfigDict,
) -> Float[Array, ""]:
    """See `DistillationPhase`; `options` are its own."""
    if options.kind == "hard":
        log_p = jax.nn.log_softmax(student)
        return -jnp.take_along_axis(log_p, teacher.argmax(-1)[:, None], axis=1).mean()
    t = options.temperature
    log_p, log_q = jax.nn.log_softmax(student / t), jax.nn.log_softmax(teacher / t)
    divergence = t**2 * (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()
    return divergence / student.shape[-1] if options.per_class else divergence


def _teacher(module: IARed2, options: ml_collections.ConfigDict) -> tuple[IARed2, dict[str, Any]]:
    """The teacher's model, fit to teach this one.

    Raises:
      UsageError: it has other classes or inputs, or fewer blocks; or the student no second head.
    """
    from iared2_jax.weights.load import load_dense_model

    teacher, variables = load_dense_model(options.teacher)
    found = f"config.distillation.teacher={options.teacher!r}"
    mine, theirs = module.backbone, teacher.backbone
    if theirs.num_classes != mine.num_classes:
        raise UsageError(
            f"{found} knows {theirs.num_classes} classes, the student {mine.num_classes}"
        )
    # A map behind the images is no matter to a teacher.
    shapes = [dataclasses.replace(x.input_spec, map_channel=False).shape for x in (theirs, mine)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{found} takes inputs of {shapes[0]}, the student of {shapes[1]}: set "
            "config.model.image_size"
        )
    if mine.depth > theirs.depth:
        raise UsageError(
            f"{found} has {theirs.depth} blocks, fewer than the student's {mine.depth}: "
            "set config.model.depth"
        )
    if options.head == "token" and not getattr(mine, "distilled", False):
        raise UsageError(
            'config.distillation.head="token" needs a student with a distillation token: a '
            'variant like deit_s_distilled, or head="class"'
        )
    return teacher, variables
