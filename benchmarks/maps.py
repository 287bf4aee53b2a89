"""What every map costs, as a multiple of one forward pass of the same images.

    python -m benchmarks.maps --model=deit_s --images 64 --batch 16

Maps of one or two passes are timed in turn, in one process, beside the plain forward pass. LIME and
occlusion are hundreds of forward passes for each image: they are timed on a few images beside the
same forward pass, and what is told is the cost of each of their passes, too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from iared2_jax.attribution.batched_forward import dense_logits
from iared2_jax.attribution.methods import METHODS, attribute
from iared2_jax.report.tables import as_text
from iared2_jax.timing import interleaved
from iared2_jax.token_reduction.create import create_model
from iared2_jax.token_reduction.model import IARed2

FORWARD = "forward pass"
# Those that run many changed copies of each image; how many, of N patches and S samples.
COPIES: dict[str, Callable[[int, int], int]] = {
    "occlusion": lambda patches, samples: patches + 1,
    "lime": lambda patches, samples: samples + 1,
}


def in_batches(fn: Callable[[Any], Any], images: Any, batch: int) -> Callable[[], list[Any]]:
    """A call of `fn` on all images, a batch at a time."""
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return lambda: [fn(part) for part in parts]


def measure(
    module: IARed2, variables: Any, images: Any, batch: int, rounds: int, samples: int, few: int
) -> dict[str, dict[str, float]]:
    """Seconds of every map, and multiples of the forward pass."""

    def call(method: str, **options: Any) -> Callable[[Any], Any]:
        return lambda part: attribute(method, module, variables, part, **options)

    quick = [name for name in METHODS if name not in (*COPIES, "memorability")]
    calls = {name: in_batches(call(name), images, batch) for name in quick}
    calls[FORWARD] = in_batches(lambda part: dense_logits(module, variables, part), images, batch)
    timings = interleaved(calls, rounds)
    forward = timings[FORWARD].median
    found = {
        name: {
            "seconds": timing.median,
            "images": len(images),
            "of_forward": timing.median / forward,
        }
        for name, timing in timings.items()
    }
    options = {"lime": {"samples": samples}}
    slow = {name: in_batches(call(name, **options.get(name, {})), images[:few], few)
            for name in COPIES}  # fmt: skip
    slow[FORWARD] = in_batches(lambda part: dense_logits(module, variables, part), images, 64)
    timings = interleaved(slow, max(1, rounds // 2))
    per_image = timings[FORWARD].median / len(images)
    for name, copies in COPIES.items():
        passes = copies(module.input_spec.num_patches, samples)
        share = timings[name].median / few / per_image
        found[name] = {
            "seconds": timings[name].median,
            "images": few,
            "of_forward": share,
            "passes": passes,
            "of_forward_per_pass": share / passes,
        }
    return found


def table(found: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row per map, the cheapest first."""
    rows = [["map", "images", "seconds", "of a forward pass", "each of its passes"]]
    for name, row in sorted(found.items(), key=lambda item: item[1]["of_forward"]):
        each = f"{row['of_forward_per_pass']:.2f}" if "passes" in row else ""
        rows.append(
            [name, str(row["images"]), f"{row['seconds']:.2f}", f"{row['of_forward']:.2f}", each]
        )
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="images that a map takes at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000, help="of LIME")
    parser.add_argument("--few", type=int, default=1, help="images for LIME and occlusion")
    flags = parser.parse_args()
    module, variables = create_model(flags.model)
    images = jax.random.normal(jax.random.key(0), (flags.images, *module.input_spec.shape))
    images = jnp.asarray(images, jnp.float32)
    found = measure(module, variables, images, flags.batch, flags.rounds, flags.samples, flags.few)
    title = f"{flags.model}, {flags.images} images, {flags.batch} at a time"
    print(as_text((title, table(found))), flush=True)
    out = flags.out or common.RESULTS / f"maps_{flags.model}_{jax.default_backend()}.json"
    common.write(out, {**common.environment(), "model": flags.model, "batch": flags.batch,
                       "samples": flags.samples, "maps": found})  # fmt: skip


if __name__ == "__main__":
    main()
