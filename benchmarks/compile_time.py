"""How long the first call waits: tracing and compiling, with an empty and with a full cache.

    python -m benchmarks.compile_time --model=deit_s

The cache is JAX's own persistent one (`jax_compilation_cache_dir`), in a folder that is empty at
first. Programs are compiled a second time after JAX has forgotten them.
"""

import functools
import tempfile
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import common
from benchmarks.workload import synthetic
from iared2_jax import accelerate
from iared2_jax.report.tables import as_text


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    flags = parser.parse_args(argv)
    work = synthetic(flags.model, max(32, flags.batch), "uneven")
    module, variables = work.module, work.variables
    images = jnp.asarray(work.images[: flags.batch])
    ask = {"thresholds": work.thresholds, "images": work.images}
    started = time.perf_counter()
    plan = accelerate(module, variables, flags.batch, cache_dir=None, **ask).plan
    planning = time.perf_counter() - started

    def dense(variables, images):
        return module.apply(variables, images, execution="dense")[0]

    def masked(variables, images):
        return module.apply(variables, images)[0]

    def loss(variables, images):
        return dense(variables, images).sum()

    pinned = functools.partial(
        accelerate, module, variables, flags.batch, plan=plan, thresholds=work.thresholds[0]
    )
    programs = {
        "dense": lambda: common.compiled(dense, variables, images),
        "masked": lambda: common.compiled(masked, variables, images),
        "ragged, from a plan": pinned,
        "gradient of dense": lambda: common.compiled(jax.grad(loss), variables, images),
    }
    rows = {name: {} for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compilation_cache.reset_cache()
        for cache in ("empty", "full"):
            for name, program in programs.items():
                jax.clear_caches()
                start = time.perf_counter()
                program()
                rows[name][f"{cache}_seconds"] = time.perf_counter() - start
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    shapes = sum(len(group.shapes) for group in plan.groups)
    table = [["program", "empty cache s", "full cache s"]]
    table += [
        [name, f"{row['empty_seconds']:.1f}", f"{row['full_seconds']:.1f}"]
        for name, row in rows.items()
    ]
    title = (
        f"{flags.model}, batch {flags.batch}: planning took {planning:.0f} s; "
        f"the ragged program has {shapes} shapes"
    )
    print(as_text((title, table)), flush=True)
    out = flags.out or common.RESULTS / f"compile_time_{flags.model}_{jax.default_backend()}.json"
    common.write(
        out,
        {
            "command": f"python -m benchmarks.compile_time --model={flags.model}",
            **common.environment(),
            "batch": flags.batch,
            "planning_seconds": planning,
            "shapes": shapes,
            "plan": str(plan),
            "programs": rows,
        },
    )


if __name__ == "__main__":
    main()
