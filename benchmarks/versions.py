"""Is this version as fast as the one before? Both in one process, their calls interleaved.

    git worktree add /path/to/before <commit>
    python -m benchmarks.versions --before=/path/to/before

Each version is imported under its own names, its programs are compiled, and then all are timed in
turn: dense, masked and ragged execution of one batch (ragged in the same plan), a step of an
interpreter and one of the backbone. A ratio above 1 says that this version is slower.
"""

import functools
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from iared2_jax.timing import interleaved

HERE = Path(__file__).parent.parent
CALLS = ("dense", "masked", "ragged", "interpreter step", "backbone step")


class Version:
    """One checkout's package, imported from its folder and kept apart from any other.

    Modules are asked for by the names they had in 0.1, which later versions still know.
    """

    def __init__(self, root: Path):
        self._outside = {k: v for k, v in sys.modules.items() if _is_ours(k)}
        for name in self._outside:
            del sys.modules[name]
        # A version that was imported before finds old names for itself.
        self._finders = list(sys.meta_path)
        sys.meta_path[:] = [f for f in sys.meta_path if not _is_ours(type(f).__module__)]
        sys.path.insert(0, str(root))
        try:
            self.package = importlib.import_module("iared2_jax")
            names = ("config", "models.registry", "optim", "phases", "ragged.plan", "steps")
            self.modules = {name: self._load(name) for name in names}
        finally:
            sys.path.remove(str(root))
        if Path(self.package.__file__).parent.parent != root:
            raise SystemExit(f"{self.package.__file__} was imported, not {root}")

    def _load(self, name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(f"iared2_jax.{name}")

    def leave(self) -> None:
        """Gives the names of the modules back; what was compiled stays usable."""
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(self._outside)
        sys.meta_path[:] = self._finders

    def calls(self, model: str, batch: int, plan: Path | None) -> dict[str, Callable[[], Any]]:
        """Compiled calls on the same images, weights and masks in every version."""
        module, variables = self.package.create_model(model)
        shape = np.shape(jax.eval_shape(lambda: _inputs(module, batch)))
        images = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
        dense = jax.jit(lambda v, x: module.apply(v, x, execution="dense")[0])
        masked = jax.jit(lambda v, x: module.apply(v, x, 0.5)[0])
        given = self.modules["ragged.plan"].Plan.load(plan) if plan else None
        run = self.package.accelerate(
            module, variables, batch, images=images, plan=given, cache_dir=None
        )
        self.plan = run.plan
        steps = dict(self._steps(module, variables, batch))
        return {
            "dense": functools.partial(dense, variables, images),
            "masked": functools.partial(masked, variables, images),
            "ragged": lambda: run(images)[0],
            **steps,
        }

    def _steps(self, module: Any, variables: Any, batch: int):
        """A training step of interpreter 2, and one of the backbone under it."""
        config = self.modules["config"].default_config()
        for section in (config.interpreter, config.backbone):
            section.batch_size, section.epochs, section.steps = batch, 0.0, 10
        rng = np.random.default_rng(1)
        pixels = rng.integers(0, 256, (batch, *_inputs(module, 1).shape[1:]), np.uint8)
        labels = rng.integers(0, 10, batch).astype(np.int32)
        data = {"image": pixels, "input": pixels, "label": labels}
        steps, phases = self.modules["steps"], self.modules["phases"]
        try:
            curriculum = phases.phases(config, module.group_sizes)
        except TypeError:  # later versions are told the length of an epoch
            curriculum = phases.phases(config, module.group_sizes, epoch_size=batch)
        for name, phase in (("interpreter step", curriculum[2]), ("backbone step", curriculum[3])):
            mesh = steps.data_mesh(jax.devices()[:1])
            step = steps.make_train_step(module, phase, config, mesh)
            params = jax.tree.map(jnp.copy, variables["params"])
            state = _initial(steps, params, phase, module)
            yield name, _stepping(step, state, data)


def _initial(steps: Any, params: Any, phase: Any, module: Any) -> Any:
    try:
        return steps.initial_state(params, phase, module, 0.0)
    except TypeError:  # version 0.1 asked for the sizes of the groups
        return steps.initial_state(params, phase, module.group_sizes, 0.0)


def _stepping(step: Callable[..., Any], state: Any, data: dict[str, Any]) -> Callable[[], Any]:
    held = [state]  # a step takes its state's buffers over

    def call() -> Any:
        held[0], metrics = step(held[0], data)
        return metrics

    return call


def _inputs(module: Any, batch: int) -> jax.Array:
    spec = getattr(module, "input_spec", None)
    size = getattr(module.backbone, "image_size", None)
    return jnp.zeros((batch, *(spec.shape if spec else (size, size, 3))))


def _is_ours(name: str) -> bool:
    return name == "iared2_jax" or name.startswith("iared2_jax.")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of that version")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    flags = parser.parse_args()
    folder = common.RESULTS

    before = Version(flags.before.resolve())
    old = before.calls(flags.model, flags.batch, None)
    before.leave()
    after = Version(HERE)
    with tempfile.TemporaryDirectory() as aside:  # both run by one plan
        plan = Path(aside) / "plan.json"
        before.plan.save(plan)
        new = after.calls(flags.model, flags.batch, plan)
    after.leave()

    rows = {}
    for name in CALLS:  # two by two: what runs in between would only cool the caches
        timings = interleaved({"before": old[name], "after": new[name]}, flags.rounds)
        ratio = timings["after"].median / timings["before"].median
        rows[name] = {
            "ratio": ratio, **{f"{key}_ms": 1e3 * t.median for key, t in timings.items()}
        }  # fmt: skip
        print(f"{name:18} {ratio:.3f}  {1e3 * timings['after'].median:.1f} ms", flush=True)
    result = {
        "command": f"python -m benchmarks.versions --model={flags.model} --batch={flags.batch}",
        **common.environment(),
        "rounds": flags.rounds,
        "calls": rows,
    }
    out = flags.out or folder / f"versions_{flags.model}_{jax.default_backend()}.json"
    common.write(out, result)


if __name__ == "__main__":
    main()
