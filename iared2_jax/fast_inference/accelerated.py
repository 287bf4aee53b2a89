"""`Accelerated`: a model compiled in a plan, which takes images in any number and form."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from iared2_jax.data.inputs import Images, as_inputs, is_traced
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference.engine import run_ragged
from iared2_jax.fast_inference.plan import Plan
from iared2_jax.fast_inference.plan_request import PlanRequest
from iared2_jax.fast_inference.sub_batches import run_whole
from iared2_jax.token_reduction.model import Thresholds
from iared2_jax.token_reduction.output import Output
from iared2_jax.typing import Array

_KEPT_PENDING = 32  # usage counts that may still be on the device


@contextlib.contextmanager
def programs_kept(folder: Path | None) -> Iterator[None]:
    """JAX's persistent compilation cache in `folder`, unless the user has chosen one."""
    if folder is None or jax.config.jax_compilation_cache_dir:
        yield
        return
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads its settings once

    use(options)
    try:
        yield
    finally:
        use(before)


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled program, and the arguments that it gets again at every call.

    Attributes:
      compiled: (variables, images, thresholds, size) -> logits, out, usage counts.
      variables: on all devices.
      thresholds: a row per image; None: those of `accelerate` belong to its own images.
      size: of a full batch.
      overflow: of every group's output, all 0.
    """

    compiled: jax.stages.Compiled
    variables: Mapping[str, Any]
    thresholds: jax.Array | None
    size: jax.Array
    overflow: tuple[jax.Array, ...]


class Accelerated:
    """A compiled model; made by `accelerate`. Call it with images: logits, out.

    Attributes:
      plan: how it runs; print it. None before the first call, if that is to be planned for.
      batch_size: images per compiled call, over all devices.
      sharding: of the images; those that have it already are not copied.
      num_prefix: tokens that are no patch, and are never dropped.
      compiled: the one program it is; see `jax.stages.Compiled`, e.g. for its memory. None as long
        as the plan is.
    """

    def __init__(
        self,
        request: PlanRequest,
        plan: Plan | None,
        programs: Path | None = None,
        plan_for: Callable[[np.ndarray], "Accelerated"] | None = None,
    ):
        """A model compiled for `plan`, or for what `plan_for` makes of the first call's images."""
        module, devices = request.module, request.devices
        self.plan = plan
        self.batch_size = request.batch_size * len(devices)
        self._num_groups, self._spec = module.num_groups, module.input_spec
        self.num_prefix = module.num_prefix
        self._shape = (self.batch_size, *self._spec.shape)
        self._plan_for = plan_for
        self.forget_usage()
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        self.sharding, self._everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        self._program = None if plan is None else self._compile(request, plan, programs, mesh)

    @property
    def compiled(self) -> jax.stages.Compiled | None:
        return None if self._program is None else self._program.compiled

    def _compile(
        self, request: PlanRequest, plan: Plan, programs: Path | None, mesh: jax.sharding.Mesh
    ) -> _Program:
        """The program of the plan, and what it gets at every call put on the devices."""
        variables = jax.device_put(request.variables, self._everywhere)
        size = jax.device_put(np.int32(self.batch_size), self._everywhere)
        nothing = jax.device_put(np.zeros(self.batch_size, np.int32), self.sharding)
        shared = request.thresholds
        images, thresholds = (
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self.sharding)
            for shape in (self._shape, (self.batch_size, self._num_groups))
        )
        forward = _sharded_forward(request, plan, mesh)
        lowered = jax.jit(forward).lower(variables, images, thresholds, size)
        with programs_kept(programs):
            compiled = lowered.compile()
        return _Program(
            compiled=compiled,
            variables=variables,
            # One each per image of the sample are of no other image.
            thresholds=None if shared.ndim == 2 else self._per_image(shared),
            size=size,
            overflow=(nothing,) * self._num_groups,
        )

    def _go_on_as(self, planned: "Accelerated") -> None:
        """Takes over another's plan and program: whoever holds this object calls them from now."""
        self.plan, self._program, self._plan_for = planned.plan, planned._program, None
        self.forget_usage()

    def _checked(self, thresholds: Thresholds, count: int) -> np.ndarray:
        """Thresholds of a call: one per group [D], or one each per image [count, D]."""
        values = per_group(thresholds, self._num_groups)
        if values.ndim == 2 and len(values) == 1:
            values = values[0]
        if values.ndim == 2 and len(values) != count:
            raise UsageError(f"thresholds are for {len(values)} images, the call has {count}")
        return values

    def _per_image(self, values: np.ndarray) -> jax.Array:
        """Thresholds on the device, a row each; of images that pad the batch they are 0."""
        if values.ndim == 2:
            values = np.pad(values, ((0, self.batch_size - len(values)), (0, 0)))
        values = np.broadcast_to(values, (self.batch_size, self._num_groups))
        return jax.device_put(values, self.sharding)

    def __call__(
        self, images: Images, thresholds: Thresholds | None = None
    ) -> tuple[Float[Array, "b classes"], Output]:
        """Logits, and `out` on the original patch grid, as of masked execution.

        Args:
          images: see `data.inputs.as_inputs`; any number. A batch on the device, in float32 and
            with `sharding`, is taken as it is. Fewer than `batch_size` are padded, more run batch
            after batch; then the results are NumPy arrays. No number compiles anything.
          thresholds: others than those of `accelerate`; the plan stays the same. Needed where that
            had one each per image, of its own images.

        Raises:
          UsageError: no images, or of another size; thresholds for more or fewer images, or none
            where they are needed; a call within a function that is compiled.
        """
        if not self._in_place(images, self._shape):
            if is_traced(images):
                raise UsageError(
                    "an accelerated model is compiled already: call it as it is, or call "
                    "module.apply within the function that you compile"
                )
            images = as_inputs(images, self._spec)
        if self._program is None:
            self._go_on_as(self._plan_for(np.asarray(images, np.float32)))
        if thresholds is None and self._program.thresholds is None:
            raise UsageError(
                "accelerate had thresholds of each of its own images: give those of these images, "
                "run(images, thresholds)"
            )
        count = images.shape[0]
        as_it_is = count == self.batch_size and self._in_place(
            thresholds, (count, self._num_groups)
        )
        if thresholds is not None and not as_it_is:
            thresholds = self._checked(thresholds, count)
        if count > self.batch_size:
            return self._batch_after_batch(np.asarray(images), thresholds)
        return self._one_batch(images, thresholds)

    def _batch_after_batch(
        self, images: np.ndarray, thresholds: np.ndarray | None
    ) -> tuple[np.ndarray, Output]:
        own = thresholds is not None and thresholds.ndim == 2  # one each per image
        parts = []
        for first in range(0, len(images), self.batch_size):
            rows = slice(first, first + self.batch_size)
            parts.append(self._one_batch(images[rows], thresholds[rows] if own else thresholds))
        return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)

    def _one_batch(
        self, images: Array, thresholds: Array | None
    ) -> tuple[Float[Array, "b classes"], Output]:
        program, size = self._program, images.shape[0]
        given, real = program.thresholds, program.size
        if thresholds is not None:
            ready = isinstance(thresholds, jax.Array)
            given = thresholds if ready else self._per_image(thresholds)
        if size < self.batch_size:
            # On the host: the device would compile a program for every size.
            full = np.zeros(self._shape, np.float32)
            full[:size] = np.asarray(images)
            images, real = full, jax.device_put(np.int32(size), self._everywhere)
        if not self._in_place(images, self._shape):
            if images.dtype != np.float32:
                images = np.asarray(images, np.float32)
            images = jax.device_put(images, self.sharding)
        logits, out, used = program.compiled(program.variables, images, given, real)
        out = out.replace(overflow=program.overflow)
        self._count(used)
        if size < self.batch_size:
            logits, out = jax.tree.map(lambda x: np.asarray(x)[:size], (logits, out))
        return logits, out

    def _in_place(self, x: Any, shape: tuple[int, ...]) -> bool:
        """Whether the program can take `x` as it is."""
        return (
            isinstance(x, jax.Array)
            and not is_traced(x)
            and x.shape == shape
            and x.dtype == jnp.float32
            and x.sharding.is_equivalent_to(self.sharding, x.ndim)
        )

    def _count(self, used: jax.Array) -> None:
        self._pending.append(used)
        if len(self._pending) > _KEPT_PENDING:  # the oldest are long finished: nothing waits
            self._fold(self._pending[: _KEPT_PENDING // 2])
            del self._pending[: _KEPT_PENDING // 2]

    def _fold(self, pending: list[jax.Array]) -> None:
        for used in pending:
            self._used += np.asarray(used).sum(axis=0)  # over the devices

    def forget_usage(self) -> None:
        """Starts `usage` anew."""
        groups = () if self.plan is None else self.plan.groups
        self._pending: list[jax.Array] = []
        self._used = np.zeros(sum(len(group.shapes) for group in groups), np.int64)

    @property
    def usage(self) -> list[dict[str, Any]]:
        """Per group: how often each shape ran so far, the places for tokens in all of them, and
        how often only the last, the largest one fitted.

        A plan whose `larger` is not rare was made from images that keep fewer tokens than these:
        plan anew, with these images.
        """
        if self.plan is None:
            return []
        self._fold(self._pending)
        self._pending = []
        report = []
        ends = np.cumsum([len(group.shapes) for group in self.plan.groups])
        for group, end in zip(self.plan.groups, ends, strict=True):
            used = self._used[end - len(group.shapes) : end]
            shapes = {shape: int(n) for shape, n in zip(group.shapes, used, strict=True)}
            report.append(
                {
                    "shapes": shapes,
                    "places": sum(shape[0] * n for shape, n in shapes.items()),
                    "larger": int(used[-1]) if len(used) > 1 else 0,
                }
            )
        return report


def _sharded_forward(
    request: PlanRequest, plan: Plan, mesh: jax.sharding.Mesh
) -> Callable[..., tuple[Array, Output, Array]]:
    """(variables, images, thresholds, size) -> logits, out and usage counts, over the devices."""
    execute = run_ragged if plan.groups else run_whole

    def forward(variables, images, thresholds, size):
        """One device's share: it counts its own rows, and takes its own turns."""
        first = jax.lax.axis_index("data") * images.shape[0]
        real = jnp.clip(size - first, 0, images.shape[0])
        logits, out, used = execute(request.forward, plan, variables, images, thresholds, real)
        used = jnp.concatenate([jnp.zeros(0, jnp.int32), *used])
        # Every array that a program returns costs a call 4 us.
        return logits, out.replace(overflow=()), used[None]

    return jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,  # the loops start from constants, which vary over no axis
    )


def per_group(thresholds: Thresholds, num_groups: int) -> np.ndarray:
    """Thresholds as float32, one per group [D] or one each per image [b, D].

    Raises:
      UsageError: of another shape, or NaN.
    """
    values = np.asarray(thresholds, np.float32)
    if np.isnan(values).any() or values.ndim > 2 or values.shape[-1:] not in ((), (num_groups,)):
        raise UsageError(
            f"thresholds must be one number, {num_groups}, or {num_groups} per image, "
            f"got {np.array2string(values, threshold=8)}"
        )
    return np.broadcast_to(values, (*values.shape[:-1], num_groups))
