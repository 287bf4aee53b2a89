"""Figures 3 and 4 of the paper on photographs that come with scikit-image, into docs/images.

    pip install scikit-image
    python docs/photographs.py --weights=<a run's weights.safetensors>

The pictures: astronaut (NASA, public domain), coffee, Chelsea the cat and rocket (CC0), and the
left view of Middlebury's motorcycle. The model is what the file says it is; --size shows it larger
images than it was trained with.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from skimage import data

import iared2_jax
from iared2_jax.data.images import eval_transform
from iared2_jax.report.figures import draw_comparison, draw_hierarchy


def photographs(size: tuple[int, int]) -> UInt8[np.ndarray, "5 h w 3"]:
    """The middle of each of the five pictures, at a size in px."""
    pictures = (data.astronaut(), data.cat(), data.coffee(), data.rocket())
    motorcycle, _, _ = data.stereo_motorcycle()
    return np.stack(
        [eval_transform(Image.fromarray(x), size, 1.0) for x in (*pictures, motorcycle)]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="of a run, with interpreters")
    parser.add_argument("--size", type=int, help="of the images, px; else the model's own")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    flags = parser.parse_args(argv)
    options = {"image_size": flags.size} if flags.size else {}
    module, variables = iared2_jax.load_model(flags.weights, **options)
    pixels = photographs(module.input_spec.size)
    for draw, name in ((draw_comparison, "heatmaps"), (draw_hierarchy, "hierarchy")):
        print(draw(module, variables, pixels, flags.out / f"photographs_{name}.png"))


if __name__ == "__main__":
    main()
