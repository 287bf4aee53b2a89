"""A trained model beside its dense baseline, on one evaluation set."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from einops import rearrange

from iared2_jax.data.image_files import EvalInputs
from iared2_jax.evaluation import evaluators
from iared2_jax.fast_inference.sub_batches import as_caches_hold
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.model import IARed2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A trained model beside the dense baseline, on one evaluation set.

    Attributes:
      trained: variables of the finished model.
      original: variables of the dense baseline: the backbone as `config.weights` has it. A backbone
        that was trained from scratch is its own baseline.
      reduces: whether it drops tokens at all (a supervised run does not).
      scored: whether its interpreters were trained, so that their scores mean something.
      pixels, labels, masks: the evaluation set; labels may be None, and masks, the segmentation
        truth, too.
      class_names: of the labels.
      crops: of clips: several crops of each, whose logits make a video's answer; else None.
      reduction: what a model is applied with to drop tokens (`config.loading.reduction_of`).
    """

    config: ml_collections.ConfigDict
    module: IARed2
    trained: dict[str, Any]
    original: dict[str, Any]
    reduces: bool
    scored: bool
    pixels: np.ndarray | EvalInputs
    labels: np.ndarray | None
    masks: np.ndarray | None
    class_names: tuple[str, ...]
    stop: Stop | None
    crops: np.ndarray | EvalInputs | None
    reduction: dict[str, Any]

    @property
    def selector(self) -> str:
        return self.reduction["selector"]

    @property
    def applied(self) -> dict[str, Any]:
        """What the reduced model is applied with: masked, or gathered where counts are fixed."""
        slots = self.module.slots(self.reduction["keep_ratios"], self.selector)
        how = {"execution": "gathered", "capacities": slots} if slots else {}
        return {**self.reduction, **how}

    def compiled(self, fn: Callable[..., dict[str, jax.Array]]) -> Callable[..., Any]:
        """`fn(variables, inputs, batch)`, jitted, with the inputs normalised on the device.

        On a CPU it runs some inputs at a time: what it returns has a row each.
        """
        module = self.module

        def some(variables, batch):
            return fn(variables, module.input_spec.normalize(batch["pixels"]), batch)

        return jax.jit(lambda v, batch: as_caches_hold(module, functools.partial(some, v), batch))

    def collect(
        self, fn: Callable[..., Any], variables: dict[str, Any], **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The results of a compiled `fn` over the whole evaluation set."""
        arrays = {"pixels": self.pixels, **more}
        return evaluators.collect(
            lambda batch: fn(variables, batch), arrays, self.config.eval.batch_size, self.stop
        )

    def video_answers(self, variables: dict[str, Any], **how: Any) -> dict[str, Any]:
        """{"video": top-1 and top-5 of the summed logits of every video's crops}; {} for images.

        Args:
          how: what the model is applied with.
        """
        if self.crops is None or self.labels is None:
            return {}
        spec, module = self.module.input_spec, self.module

        @jax.jit
        def summed(variables, batch):
            crops = batch["crops"]
            flat = spec.normalize(rearrange(crops, "b v ... -> (b v) ..."))
            logits = as_caches_hold(module, lambda x: module.apply(variables, x, **how)[0], flat)
            return {"top": evaluators.top_classes(logits.reshape(*crops.shape[:2], -1).sum(axis=1))}

        seen = evaluators.collect(
            lambda batch: summed(variables, batch),
            {"crops": self.crops},
            max(1, self.config.eval.batch_size // 3),
            self.stop,
        )
        return {"video": dict(evaluators.accuracy(seen["top"], self.labels))}
