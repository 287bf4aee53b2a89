"""What is asked of a dataset."""

import dataclasses

from iared2_jax.data.augment import CROP_FLIP, AugmentOptions
from iared2_jax.data.cutouts import DEFAULT, CutoutOptions
from iared2_jax.models.input_spec import InputSpec

CLIP_VIEWS = ("centre", "random")


@dataclasses.dataclass(frozen=True)
class DataRequest:
    """Options that a dataset is opened with.

    Attributes:
      spec: the inputs that the model takes.
      path: where its files are; `SMALL` makes a few. Not for data that is made.
      augment: of the training images; data that is made is not augmented.
      bad_share: of the training images or videos that may be unreadable.
      sampling_rate: of clips, how far apart their frames are, counted at 30 a second.
      cutouts: how scenes of cut-outs are composed.
      maps: the folder of a map for every image file; "": there is none.
      clip_view: of the evaluation clips, one of `CLIP_VIEWS`: the centre of each from its video's
        start, or a random crop at a random time.
    """

    spec: InputSpec
    path: str = ""
    augment: AugmentOptions = CROP_FLIP
    bad_share: float = 0.001
    sampling_rate: int = 32
    cutouts: CutoutOptions = DEFAULT
    maps: str = ""
    clip_view: str = "centre"
