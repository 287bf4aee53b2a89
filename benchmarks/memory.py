"""What a training step needs in memory: batch, gradient checkpointing (remat), and bfloat16.

    python -m benchmarks.memory --model=timesformer_jointst_s --batch 1 2

Nothing is run. "Kept for the gradient" is what the forward pass of the backbone phase keeps until
its gradient is taken, counted in the traced program: the same on every device. "Program" is the
compiler's own analysis of the whole step, temporary and output buffers, for the device at hand.
XLA's CPU compiler drops the barriers that remat needs, so there it saves nothing in "program".
"""

import argparse
import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from iared2_jax.config import default_config
from iared2_jax.report.tables import as_text
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.optimizers import merge, split_trainable
from iared2_jax.training.phases import PHASES, Phase, PhaseContext
from iared2_jax.training.step import data_mesh, initial_state, make_train_step


def phase_of(module: IARed2, batch: int) -> Phase:
    """Fine-tuning of all blocks: the phase that needs most."""
    kind, options = PHASES["backbone"], default_config().backbone
    options.batch_size = batch
    trains = kind.trains(options, 1, module.num_groups)
    return Phase(kind, 1, trains, (0.5,) * module.num_groups, 0, 10, 0, options)


def measure(model: str, batch: int, remat: bool, dtype: Any) -> dict[str, Any]:
    """Bytes that one step needs."""
    module = create_module(model, groups=1, remat=remat, dtype=jnp.dtype(dtype))
    config, phase = default_config(), phase_of(module, batch)
    state = jax.eval_shape(
        lambda: initial_state(init_variables(module)["params"], phase, module, 0.0)
    )
    shape = (batch, *module.input_spec.shape)
    inputs = {
        "input": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    step = make_train_step(module, phase, config, data_mesh(jax.devices()[:1]))
    program = step.lower(state, inputs).compile()
    trainable, frozen = split_trainable(state.params, phase.trains, module)

    def loss(trainable, frozen, images, labels):
        rows = {"input": images, "label": labels}
        key = jax.random.key(0)
        return phase.kind.loss(PhaseContext(module, phase), merge(trainable, frozen), rows, key)[0]

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    # What a derivative keeps are its leaves: the parameters, which are there anyway, and more.
    derivative = jax.eval_shape(
        lambda *given: jax.vjp(lambda t: loss(t, *given[1:]), given[0])[1],
        *(trainable, frozen, images, inputs["label"]),
    )
    kept = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(derivative))
    kept -= collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(state.params))
    return {
        "model": model,
        "batch": batch,
        "remat": remat,
        "dtype": jnp.dtype(dtype).name,
        "kept_bytes": sum(n * math.prod(s) * d.itemsize for (s, d), n in kept.items()),
        "program_bytes": common.memory(program),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.set_defaults(model="timesformer_jointst_s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    flags = parser.parse_args(argv)
    results = [
        measure(flags.model, batch, remat, dtype)
        for batch, dtype, remat in itertools.product(flags.batch, flags.dtype, (False, True))
    ]
    print(table(flags.model, results))
    backend = jax.default_backend()
    result = {"command": _command(flags), **common.environment(), "results": results}
    common.write(flags.out or common.RESULTS / f"memory_{flags.model}_{backend}.json", result)


def _command(flags: argparse.Namespace) -> str:
    batches = " ".join(map(str, flags.batch))
    return f"python -m benchmarks.memory --model={flags.model} --batch {batches}"


def table(model: str, results: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    rows = [["batch", "dtype", "remat", "kept for the gradient, MiB", "program, MiB"]]
    for row in results:
        kept, program = (row[key] / 2**20 for key in ("kept_bytes", "program_bytes"))
        remat = "yes" if row["remat"] else "no"
        rows.append([str(row["batch"]), row["dtype"], remat, f"{kept:.0f}", f"{program:.0f}"])
    return as_text((f"A step of {model}, {jax.devices()[0].device_kind}", rows))


if __name__ == "__main__":
    main()
