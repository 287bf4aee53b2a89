"""What a table can be made on: a config, its sizes, and where its runs start from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from iared2_jax.errors import UsageError

HEAD_SEED = 0
# Beside every run: the paper's baselines, and what EViT and others drop by. Where blocks are
# fine-tuned, also the original fine-tuned as long.
IMAGE_BASELINES = {
    "interpreters": ("random", "attention_block_1", "attention"),
    "iared2": ("random", "attention_block_1", "attention", "dense"),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """The data and the model of a table's runs.

    Attributes:
      name: as the flag --preset has it.
      config: from pixels to the config, as the flag --config has it.
      size: pixels, where the command does not say. sizes: all that there are; (): any.
      trains_head: whether all runs start from a head that is trained first, on the trunk that the
        user names; else from the weights that the config or the user names.
      options: that every run has, by key, as text.
      baselines: the selectors that runs of a curriculum are compared with.
      student: options of a smaller model that learns from the original; {}: there is none.
      minutes: about what a kind of run takes at `size` on two CPU cores; {}: nobody knows.
    """

    name: str
    config: Callable[[int], str]
    size: int
    sizes: tuple[int, ...] = ()
    trains_head: bool = False
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    baselines: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: IMAGE_BASELINES
    )
    student: Mapping[str, str] = dataclasses.field(default_factory=dict)
    minutes: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def minutes_of(self, kind: str, size: int) -> float | None:
        """About what a kind of run takes, by the number of tokens; None: nobody knows."""
        return self.minutes[kind] * (size / self.size) ** 2 if kind in self.minutes else None

    def check(self, sizes: Sequence[int], seeds: Sequence[int]) -> None:
        """Refuses sizes and seeds that it has no runs of.

        Raises:
          UsageError: a size that it lacks, or a seed that is the head's.
        """
        if self.sizes and (others := sorted({*sizes} - {*self.sizes})):
            there = " or ".join(map(str, self.sizes))
            raise UsageError(f"--sizes {others[0]}: {self.name} has images of {there} px alone")
        if self.trains_head and HEAD_SEED in seeds:
            raise UsageError(
                f"--seeds {HEAD_SEED}: the head has learned the answers of that seed's scenes; "
                "take others"
            )
