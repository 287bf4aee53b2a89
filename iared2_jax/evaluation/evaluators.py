"""Evaluators: accuracy, cost, speed. Each yields (name, value) pairs."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from iared2_jax.data.pipeline import eval_batches
from iared2_jax.errors import Interrupted
from iared2_jax.fast_inference import Accelerated, accelerate
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.planner import attention_kernels
from iared2_jax.fast_inference.sub_batches import run_dense, sub_batch_sizes
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.signals import Stop
from iared2_jax.timing import interleaved
from iared2_jax.token_reduction.flops import Flops, count_flops
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import Selector
from iared2_jax.typing import Array

Named = Iterator[tuple[str, Any]]
SPEED_SAMPLE = 128  # inputs that a ragged plan is made with


def collect(
    fn: Callable[[dict[str, Array]], dict[str, Array]],
    arrays: Mapping[str, Any],
    batch_size: int,
    stop: Stop | None = None,
) -> dict[str, np.ndarray]:
    """Runs `fn` over all examples in batches of one size; padding is cut off again.

    Args:
      fn: jitted; a batch to arrays [B, ...].
      arrays: the examples, by name: arrays, or what is read when it is indexed (`EvalInputs`).

    Raises:
      Interrupted: if `stop` was requested.
    """
    parts: list[dict[str, np.ndarray]] = []
    for batch in eval_batches(arrays, batch_size):
        if stop is not None and stop.requested:
            raise Interrupted("the evaluation was stopped by a signal: nothing was written")
        counted = batch.pop("counted")
        parts.append({k: np.asarray(v)[counted] for k, v in fn(batch).items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def top_classes(logits: Float[Array, "b classes"], most: int = 5) -> Int[Array, "b k"]:
    """The most likely classes of each image, the likeliest first; ties to the lower class."""
    return jax.lax.top_k(logits, min(most, logits.shape[-1]))[1]


def accuracy(top: Int[np.ndarray, "n k"], labels: np.ndarray) -> Named:
    """Top-1 and top-5, as shares in [0, 1].

    Args:
      top: `top_classes`.
    """
    yield "top1", float((top[:, 0] == labels).mean())
    yield "top5", float((top[:, :5] == labels[:, None]).any(axis=-1).mean())


def confusions(
    answers: Int[np.ndarray, " n"],
    labels: np.ndarray,
    class_names: Sequence[str],
    most: int = 10,
) -> list[dict[str, Any]]:
    """Which classes are taken for which, the most frequent first.

    Returns:
      {"is": name, "taken_for": name, "images": how many, "share": of that class's images} each.
    """
    wrong = answers != labels
    pairs, counts = np.unique(
        np.stack([labels[wrong], answers[wrong]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        {
            "is": class_names[pairs[i, 0]],
            "taken_for": class_names[pairs[i, 1]],
            "images": int(counts[i]),
            "share": float(counts[i] / (labels == pairs[i, 0]).sum()),
        }
        for i in order
    ]


def kept_tokens(counts: Int[np.ndarray, "n groups"], num_patches: int) -> Named:
    """Share of the N patches each group's blocks see: mean, p5 and p95 over images.

    Args:
      counts: tokens kept, per image and group.
    """
    share = counts / num_patches
    yield "kept", share.mean(axis=0).tolist()
    yield "kept_p5", np.percentile(share, 5, axis=0).tolist()
    yield "kept_p95", np.percentile(share, 95, axis=0).tolist()


def cost(
    module: IARed2,
    counts: Int[np.ndarray, "n groups"] | None,
    selector: str | Selector = "interpreter",
) -> Named:
    """FLOPs (multiply-accumulates) per image, linear and full; None: of the dense backbone.

    Args:
      counts: tokens kept, per image and group.
      selector: what chose them; its own cost is counted.
    """
    if counts is None:
        yield "flops", count_flops(module)._asdict()
        return
    flops = count_flops(module, tuple(counts.T), selector=selector)
    for name, reduce in (
        ("flops", np.mean),
        ("flops_p5", functools.partial(np.percentile, q=5)),
        ("flops_p95", functools.partial(np.percentile, q=95)),
    ):
        yield name, Flops(*(float(reduce(values)) for values in flops))._asdict()


def speed_sample(spec: InputSpec, pixels: Any, size: int) -> tuple[Array, np.ndarray]:
    """A batch of `size` to be timed, on the device, and others that plans are made with.

    Both normalised; where there are no others, plans are made with the same.
    """
    inputs = np.asarray(spec.normalize(jnp.asarray(pixels[: size + SPEED_SAMPLE])))
    return jnp.asarray(inputs[:size]), inputs[size:] if len(inputs) > size else inputs


def dense_functions(
    module: IARed2, variables: Mapping[str, Any], batch_size: int
) -> dict[str, Callable[[Mapping[str, Any], Array], Array]]:
    """The dense model's ways to run a batch, (variables, images) -> logits, by names "dense, ..".

    Whole, and in sub-batches that fit the caches; with every attention kernel that works here, the
    einsum first. The fastest of them is the baseline of every speed-up.
    """
    functions, sizes = {}, sub_batch_sizes(batch_size, jax.default_backend())
    for kernel, rows in itertools.product(attention_kernels(module, variables), sizes):
        name = "dense" if rows == batch_size else f"dense, {rows} at a time"
        name += "" if kernel == "einsum" else f", {kernel}"
        with_this = ForwardSpec(module).with_kernel(kernel).module
        functions[name] = functools.partial(run_dense, with_this, rows)
    return functions


def dense_calls(
    module: IARed2, variables: Mapping[str, Any], images: Array
) -> dict[str, Callable[[], Array]]:
    """`dense_functions`, compiled, for one batch on the device."""
    functions = dense_functions(module, variables, len(images))
    return {
        name: functools.partial(jax.jit(fn), variables, images) for name, fn in functions.items()
    }


def throughput(
    module: IARed2,
    dense: Mapping[str, Any],
    trained: Mapping[str, Any],
    images: Array,
    sample: Array,
    reduction: Mapping[str, Any],
    rounds: int,
) -> Named:
    """Images per second from a device-resident batch to logits, every execution in one run.

    Args:
      dense, trained: variables of the dense baseline and of the model that drops.
      images: one normalised batch on the device, timed.
      sample: other images, that the ragged plan is made with.
      reduction: thresholds, keep_ratios and selector, as `IARed2.__call__` takes them.
    """
    b = len(images)
    run = accelerate(module, trained, b, images=sample, cache_dir=None, **reduction)

    masked = jax.jit(lambda variables, x: module.apply(variables, x, **reduction)[0])
    variants = {
        **dense_calls(module, dense, images),
        "masked": lambda: masked(trained, images),
        "ragged": lambda: run(images)[0],
    }
    expected = np.asarray(variants["masked"]())
    logits, out = run(images)
    error = np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()
    run.forget_usage()
    executions = {}
    for name, timing in interleaved(variants, rounds).items():
        rates = {"median": timing.median, "p25": timing.upper, "p75": timing.lower}
        executions[name] = {key: b / seconds for key, seconds in rates.items()}
    yield "executions", executions
    names = [name for name in executions if name.startswith("dense")]
    yield "baseline", max(names, key=lambda name: executions[name]["median"])
    yield "plan", str(run.plan).splitlines()
    yield "ragged_error", float(error)
    counts = np.stack([np.asarray(keep).sum(axis=-1) for keep in out.keep], axis=1)
    own = dict(cost(module, counts, reduction.get("selector", "interpreter")))["flops"]["full"]
    yield "full_flops_share", own / count_flops(module).full
    if run.plan.groups:
        yield "padding_share", padding_share(run, counts)
    yield "batches_in_larger_shapes", sum(group["larger"] for group in run.usage)


def padding_share(run: Accelerated, counts: Int[np.ndarray, "b D"]) -> float:
    """The share of a ragged plan's places that held no token, in all calls with one batch.

    Args:
      run: on one device, called with nothing else since its usage was forgotten.
      counts: patches that the batch's images keep in each group.
    """
    usage, prefix = run.usage, run.num_prefix
    calls = sum(usage[0]["shapes"].values()) // -(-len(counts) // run.plan.groups[0].rows)
    return float(1 - calls * (counts + prefix).sum() / sum(group["places"] for group in usage))
