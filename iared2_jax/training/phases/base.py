"""The contract of a kind of phase, and a stretch of training of that kind."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from iared2_jax.token_reduction.model import KEEP_ALL, IARed2
from iared2_jax.training.ragged import RaggedParts
from iared2_jax.typing import Array

Params = dict[str, Any]
Batch = dict[str, Array]
Metrics = dict[str, Array]
Capacities = tuple[int, ...]

# A part of the model that trains together: ("interpreter", j), ("blocks", j), ("embedding", 0),
# ("classifier", 0), what lies between blocks and head, or ("head", 0).
Part = tuple[str, int]


def phase_options(**own: Any) -> dict[str, Any]:
    """The options that every kind of phase has, with the defaults and options of one kind's own."""
    common = dict(
        batch_size=512,  # global, over all devices
        steps=0,  # length of one phase: steps, or epochs; exactly one is above 0
        epochs=0.0,
        optimizer="adam",  # see optimizers.OPTIMIZERS
        learning_rate=4e-5,  # the peak; decays to 0 by a cosine
        warmup_steps=0,  # linear, from 0
        weight_decay=0.0,
        momentum=0.9,  # sgd only
        clip_norm=0.0,  # of the global gradient; 0 is off
        accumulate=1,  # micro-batches per step: less memory, the same update
    )
    return {**common, **own}


class PhaseKind:
    """What is learned in a phase, and how; a subclass overrides what differs.

    Attributes:
      section: of the config, where its options are.
      mixes: whether its images may be mixed with each other (mixup, CutMix).
      reduces: whether tokens are dropped in it.
      frozen_blocks: whether no gradient passes through any block in it, so that all of them may run
        ragged.
      budgeted: whether a fixed budget, `config.reduction.keep_ratios`, goes with it, in training or
        when what it has trained is evaluated.
    """

    section: str
    mixes: bool = True
    reduces: bool = True
    frozen_blocks: bool = False
    budgeted: bool = False

    def options(self) -> dict[str, Any]:
        """The options of its section of the config, with their defaults."""
        return phase_options()

    def trains(
        self, options: ml_collections.ConfigDict, group: int, num_groups: int
    ) -> frozenset[Part]:
        """The parts of the model that move."""
        raise TypeError(f"{type(self).__name__} does not say what it trains")

    def length(self, options: ml_collections.ConfigDict, group: int) -> float:
        """How long the phase of a group is, in `steps` or `epochs` of its section."""
        return 1.0

    def rate(
        self, options: ml_collections.ConfigDict, part: Part, steps: int
    ) -> optax.Schedule | None:
        """What the learning rate of a part is multiplied by, at each of `steps`; None: by 1."""
        return None

    def thresholds(self, threshold: float, group: int, num_groups: int) -> tuple[float, ...]:
        """One threshold per group; interpreters after `group` keep everything."""
        return tuple(threshold if g <= group else KEEP_ALL for g in range(1, num_groups + 1))

    def fixed_groups(self, group: int) -> int:
        """The number of leading groups whose keep masks cannot change during this phase.

        All that decides them is frozen, so their dropped tokens may be gathered away: `capacities`
        has a slot count for each.
        """
        return group

    def initial_extra(self, module: IARed2, params: Params) -> Any:
        """The `TrainState.extra` that a phase begins with: state of its own, e.g. a teacher.

        It is saved in every checkpoint, and replaced where the next phase begins; {} for none.

        Args:
          params: the model's, as the phase begins. What is kept of them must be copied: the step
            takes their buffers over.
        """
        return {}

    def next_extra(self, extra: Any, params: Params) -> Any:
        """`TrainState.extra` after a step, e.g. a moving teacher; by default, as it was before.

        A step that is not finite leaves it alone.

        Args:
          params: the model's, after that step.
        """
        return extra

    def stream(
        self,
        context: "PhaseContext",
        params: Params,
        batches: Callable[[int], Iterator[Batch]],
        step: int,
    ) -> Iterator[Batch]:
        """The batches of the phase from its step `step` on; a pure function of its arguments.

        They may lie on the host: the loop spreads them over the devices.

        Args:
          params: as they are at that step.
          batches: the training batches from one example of the run on, spread over the devices.
        """
        phase = context.phase
        return batches(phase.first_example + step * phase.options.batch_size)

    def loss(
        self, context: "PhaseContext", params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """The loss of a batch and its metrics; differentiated with respect to what trains.

        With `context.capacities`, tokens that are dropped for good are gathered away: the same loss
        and gradient for less work, while metrics["overflow"], the tokens without a slot, is 0.
        """
        raise TypeError(f"{type(self).__name__} has no loss")

    def alarms(self, phase: "Phase", figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Names and sentences of what is going wrong late in the phase, and what to change."""
        yield from ()

    def unsettled(
        self, phase: "Phase", history: Sequence[tuple[int, Mapping[str, float]]]
    ) -> Iterator[tuple[str, str]]:
        """Names and sentences of what still moved when the phase ended.

        Args:
          history: the windows of the phase's last third, by their last steps.
        """
        yield from ()

    def check_options(self, options: ml_collections.ConfigDict) -> None:
        """Refuses values that no model and curriculum could make sense of.

        Raises:
          UsageError: one sentence with the key, its value and what would do.
        """

    def check(self, options: ml_collections.ConfigDict, num_groups: int) -> None:
        """Refuses options that make no sense for a model of so many groups.

        Raises:
          UsageError: one sentence with the key, its value and what would do.
        """

    def check_module(self, module: IARed2) -> None:
        """Refuses a model that this cannot train, before anything is trained.

        Raises:
          UsageError: one sentence.
        """

    def open(self, module: IARed2, options: ml_collections.ConfigDict) -> None:
        """Opens the files that the phase needs beside data and weights, before anything is written.

        Raises:
          UsageError: one sentence that names the file.
        """


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with one optimizer.

    Attributes:
      kind: what is learned, e.g. `InterpreterPhase`.
      group: which group, from 1; 0 where the phase is of none.
      trains: the parts of the model that move.
      thresholds: one per group. (Benchmarks give each image its own, [b, D].)
      selector, keep_ratios: what a phase of the `selector` kind drops by; see `IARed2.__call__`.
      first_step, steps: its place in the run.
      first_example: its place in the stream of training examples.
      options: the config's section for this kind (batch size, optimizer, ..).
    """

    kind: PhaseKind
    group: int
    trains: frozenset[Part]
    thresholds: tuple[float, ...] | np.ndarray
    first_step: int
    steps: int
    first_example: int
    options: ml_collections.ConfigDict
    selector: str = "interpreter"
    keep_ratios: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """The phase in words, e.g. "interpreter 2"."""
        return f"{self.kind.section} {self.group}" if self.group else self.kind.section

    @property
    def end(self) -> int:
        return self.first_step + self.steps

    @property
    def own_threshold(self) -> Array:
        """The threshold of the phase's group; [1], or [b, 1] where each image has its own."""
        return jnp.asarray(self.thresholds, jnp.float32)[..., self.group - 1, None]


@dataclasses.dataclass(frozen=True)
class PhaseContext:
    """All that a loss is computed from, besides parameters and data.

    Attributes:
      capacities: patch slots of each group whose masks are fixed (`PhaseKind.fixed_groups`); None:
        masked execution.
      ragged: runs the blocks of a phase with `frozen_blocks`; None: they run as `capacities` says.
      extra: `TrainState.extra` as a step's loss finds it: what `PhaseKind.initial_extra` made when
        the phase began, and `next_extra` after every step since. {} in `PhaseKind.stream`.
    """

    module: IARed2
    phase: Phase
    capacities: Capacities | None = None
    ragged: RaggedParts | None = None
    extra: Any = dataclasses.field(default_factory=dict)


def whole_backbone(num_groups: int) -> frozenset[Part]:
    """Every part of a backbone in so many groups; of the interpreters none."""
    blocks = {("blocks", number) for number in range(1, num_groups + 1)}
    return frozenset({*blocks, ("embedding", 0), ("classifier", 0), ("head", 0)})


def cross_entropy(logits: Array, batch: Batch, smoothing: float) -> tuple[Array, Metrics]:
    """Mean cross-entropy against the batch's targets, or its smoothed labels; the accuracy."""
    labels = batch["label"]
    if "target" in batch:  # of mixup and CutMix, smoothed already
        targets = batch["target"]
    else:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    loss = optax.losses.softmax_cross_entropy(logits, targets).mean()
    return loss, {"accuracy": (logits.argmax(-1) == labels).mean()}
