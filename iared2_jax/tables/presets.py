"""What a table can be made on, by name: a config, its sizes, and where its runs start from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from iared2_jax.config.loading import load
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
        user names or from scratch with it; else from the weights that the config or the user names.
      options: that every run has, by key, as text. given: those of the user, which go before them.
      baselines: the selectors that runs of a curriculum are compared with.
      maps: whether the user gives a map of every image, `config.data.maps`: what "memorability"
        drops by is then one more baseline.
      segmentation: the config of the images that maps are measured on, where its own have no masks;
        "": they have. segmentation_path: where these lie, as the user says.
      share_of_ours: of the linear FLOPs, per cent, that ours has there, where that is far from the
        paper's 70; None: it is not.
      student: the config of a smaller model that learns from the original; "": there is none.
      minutes: about what a kind of run takes at `size` on two CPU cores; {}: nobody knows.
    """

    name: str
    config: Callable[[int], str]
    size: int
    sizes: tuple[int, ...] = ()
    trains_head: bool = False
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    baselines: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: IMAGE_BASELINES
    )
    maps: bool = False
    segmentation: str = ""
    segmentation_path: str = ""
    share_of_ours: int | None = None
    student: str = ""
    minutes: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def recipe(self, size: int) -> ml_collections.ConfigDict:
        """The config of our own runs, with the user's options: what rivals are to be equal to."""
        return load(self.config(size), {**self.options, **self.given})

    def with_maps(self) -> "Preset":
        """The same, where the user gives maps."""
        more = {kind: (*names, "memorability") for kind, names in self.baselines.items()}
        return dataclasses.replace(self, baselines=more, maps=True)

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


# Measured on cores that do nothing else.
_CUTOUT_MINUTES = {
    "head": 3.5,
    "interpreters": 6.5,
    "iared2": 23,
    "iared2 alone": 17,
    "speed": 2.1,
    "maps": 25,
    "selector": 9,
    "dynamicvit": 20,
    "evaluation": 1.2,
    "pruning": 25,
    "attention": 9,
}
# Measured: half of what one of two processes at once takes.
_DIGIT_MINUTES = {
    "interpreters": 2,
    "iared2": 6,
    "iared2 alone": 2,
    "speed": 1,
    "maps": 2,
    "selector": 0.8,
    "dynamicvit": 3.2,
    "evaluation": 0.2,
    "pruning": 0.6,
    "attention": 1.6,
    "student": 10,
}
# Of the demo's many maps two: the others are Table 1's.
_FEW_MAPS = {
    "eval.maps": "('interpreter', 'raw_attention')",
    "eval.maps_size": "200",
    "eval.perturbation": "False",
}
_CAIT_BASELINES = {"iared2": ("random", "magnitude", "dense")}  # its groups see no CLS token
_CLIP_BASELINES = {"iared2": ("random", "attention_block_1", "temporal_difference")}


def _of_cutouts(name: str, variant: str) -> Preset:
    return Preset(
        name,
        lambda size: f"configs/dinov2_cutouts.py:{variant}size={size}",
        size=112,
        trains_head=True,
        minutes=_CUTOUT_MINUTES,
    )


PRESETS = {
    preset.name: preset
    for preset in (
        _of_cutouts("cutouts", ""),  # which object, of those seen in training
        _of_cutouts("cutouts_kind", "kind,"),  # of which class, of objects never seen
        Preset(
            "cluttered_mnist",
            lambda size: "configs/cluttered_mnist.py",
            size=64,
            sizes=(64,),
            options=_FEW_MAPS,
            share_of_ours=43,
            minutes=_DIGIT_MINUTES,
            student="configs/cluttered_mnist.py:student",
        ),
        Preset(
            "moving_mnist",
            lambda size: "configs/moving_mnist.py",
            size=64,
            sizes=(64,),
            baselines=_CLIP_BASELINES,
            minutes={"iared2": 6, "speed": 1},
        ),
        Preset(
            "cluttered_mnist_cait",
            lambda size: "configs/cluttered_mnist.py:cait",
            size=64,
            sizes=(64,),
            trains_head=True,  # the whole backbone, from scratch
            options=_FEW_MAPS,
            baselines=_CAIT_BASELINES,
            minutes={"head": 12, "iared2": 7, "speed": 2},
        ),
        # The paper's own settings: DeiT-S, DeiT-B, CaiT-S24 and TimeSformer.
        Preset(
            "imagenet",
            lambda size: "configs/deit_s.py",
            size=224,
            sizes=(224,),
            segmentation="configs/segmentation.py",
            student="configs/deit_s.py:student",
        ),
        Preset(
            "imagenet_b",
            lambda size: f"configs/deit_b_384.py:size={size}",
            size=224,
            sizes=(224, 384),
        ),
        Preset(
            "imagenet_cait",
            lambda size: "configs/cait_s24.py",
            size=224,
            sizes=(224,),
            baselines=_CAIT_BASELINES,
        ),
        Preset(
            "kinetics",
            lambda size: "configs/timesformer_k400.py",
            size=224,
            sizes=(224,),
            baselines=_CLIP_BASELINES,
        ),
    )
}
