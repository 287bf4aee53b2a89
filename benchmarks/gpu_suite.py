"""Every open question that only a GPU can answer, in one command and one JSON file.

    python -m benchmarks.gpu_suite

First smoke tests of what is new or private to the device, then speed at the paper's kept shares (of
clips, too; "quick" questions compile little), what training costs, what a training step needs in
memory, and what maps cost. A
question that fails is recorded with its error and the next is asked; none is begun after
`--minutes`, and `--ask` asks only some. On a machine without a GPU it only shows that it runs:
`python -m benchmarks.gpu_suite --models deit_ti --batch 2 --video timesformer_micro --rounds 1`.
"""

import argparse
import dataclasses
import functools
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, kernels, maps, memory, peers, speed, train_cost
from benchmarks.workload import KEPT, Workload, synthetic
from iared2_jax import accelerate
from iared2_jax.fast_inference.plan import KINDS, Plan
from iared2_jax.models.attention import attend, attend_cudnn
from iared2_jax.timing import interleaved
from iared2_jax.token_reduction.compaction import kept_first, take_tokens
from iared2_jax.token_reduction.create import create_model


def _called(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A compiled call. What a function closes over instead, XLA may compute while compiling."""
    return functools.partial(jax.jit(fn), *args)


def cudnn_attention(tokens: int, rounds: int) -> dict[str, Any]:
    """cuDNN's attention against the einsum: without and with lengths; largest errors, seconds."""
    images = 64 if jax.default_backend() == "gpu" else 2
    shape = (images, 6, tokens, 64)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(
        jax.random.key(0), 3))  # fmt: skip
    lengths = jnp.asarray(np.random.default_rng(0).integers(1, tokens + 1, images), jnp.int32)
    valid = jnp.arange(tokens) < lengths[:, None]
    fns = {
        "einsum": _called(attend, q, k, v, None),
        "cudnn": _called(attend_cudnn, q, k, v, None),
        "einsum, lengths": _called(attend, q, k, v, valid),
        "cudnn, lengths": _called(attend_cudnn, q, k, v, lengths),
    }
    real = np.asarray(valid)[:, None, :, None]

    def error(one, other, where):
        difference = np.asarray(fns[one]()[0] - fns[other]()[0], np.float32)
        return float(np.abs(np.where(where, difference, 0)).max())

    return {
        "error": error("einsum", "cudnn", True),
        "error_lengths": error("einsum, lengths", "cudnn, lengths", real),
        "ms": {name: 1e3 * t.median for name, t in interleaved(fns, rounds).items()},
    }


def compaction(rounds: int) -> dict[str, float]:
    """Moving survivors, forward and backward: our gathers against the derived scatter-add (ms)."""
    rng = np.random.default_rng(0)
    b = 256 if jax.default_backend() == "gpu" else 8
    tokens = jnp.asarray(rng.standard_normal((b, 196, 384)), jnp.float32)
    keep = jnp.asarray(rng.random((b, 196)) < 0.7)
    scores = jnp.asarray(rng.random((b, 196)), jnp.float32)
    slots = kept_first(keep)[0][:, :144]

    def ours(x, slots):
        return (take_tokens(x, slots) ** 2).sum()

    def derived(x, slots):
        return (jnp.take_along_axis(x, slots[..., None], 1) ** 2).sum()

    calls = {
        "partition": _called(kept_first, keep),
        "top_k": _called(lambda x: jax.lax.top_k(x, 144), scores),
        "argsort": _called(lambda x: jnp.argsort(x, axis=1), scores),
        "gradient, ours": _called(jax.grad(ours), tokens, slots),
        "gradient, derived": _called(jax.grad(derived), tokens, slots),
    }
    return {name: 1e3 * t.median for name, t in interleaved(calls, rounds).items()}


def agreement(model: str) -> dict[str, dict[str, float]]:
    """Gathered and ragged against masked execution: largest difference over the largest logit.

    In float32 with exact products, with the device's own (TF32 on an NVIDIA GPU), and in bfloat16.
    """
    found = {}
    for name, dtype, precision in (
        ("float32, exact products", jnp.float32, "highest"),
        ("float32", jnp.float32, None),
        ("bfloat16", jnp.bfloat16, None),
    ):
        with jax.default_matmul_precision(precision):
            found[name] = _agreement(synthetic(model, 16, "uneven", dtype=dtype).rows(0, 8))
    return found


def _agreement(work: Workload) -> dict[str, float]:
    images, thresholds = jnp.asarray(work.images), jnp.asarray(work.thresholds)
    capacities = tuple(int(most) for most in work.counts.max(axis=0))
    apply = functools.partial(work.module.apply, work.variables, images, thresholds)
    expected = np.asarray(jax.jit(apply)()[0], np.float32)
    gathered = jax.jit(lambda: apply(execution="gathered", capacities=capacities)[0])
    ask = {"thresholds": work.thresholds, "images": work.images}
    logits = {"gathered": gathered()}
    for kind in KINDS:
        plan = _two_shapes(speed.uniform_plan(work, len(images), kind, 4))
        run = accelerate(work.module, work.variables, len(images), plan=plan, cache_dir=None, **ask)
        logits[f"ragged, {kind}"] = run(images, thresholds)[0]
    scale = np.abs(expected).max()
    return {
        name: float(np.abs(np.asarray(y, np.float32) - expected).max() / scale)
        for name, y in logits.items()
    }


def _two_shapes(plan: Plan) -> Plan:
    """The middle one and the one that holds anything: enough to be right, compiled soon."""
    few = [{group.shapes[len(group.shapes) // 2], group.shapes[-1]} for group in plan.groups]
    groups = [
        dataclasses.replace(group, shapes=tuple(sorted(shapes)))
        for group, shapes in zip(plan.groups, few, strict=True)
    ]
    return dataclasses.replace(plan, groups=tuple(groups))


def _on_device(call: Callable[[], Any], times: int = 10) -> dict[str, Any]:
    """The time of a call where the host does not wait for each, and where the device spends it."""
    jax.block_until_ready(call())
    begun = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    seconds = (time.perf_counter() - begun) / times
    return {"in_a_row_ms": 1e3 * seconds, "kernels": kernels.kernel_times(call)}


def ceilings(rounds: int) -> dict[str, float]:
    """What the device can do: bf16 matmul in TFLOP/s, copy in TB/s."""
    on_gpu = jax.default_backend() == "gpu"
    n = 8192 if on_gpu else 1024
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    x = jnp.zeros((1 << (29 if on_gpu else 22),), jnp.float32)
    product, copy = _called(jnp.matmul, a, a), _called(lambda x: x + 1, x)
    t = interleaved({"matmul": product, "copy": copy}, rounds)
    return {
        "matmul_tflops": 2 * n**3 / t["matmul"].median / 1e12,
        "copy_tb_per_s": 2 * x.nbytes / t["copy"].median / 1e12,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["deit_s", "deit_b", "deit_b_384"])
    parser.add_argument("--video", default="timesformer_jointst_b", help="a model of clips")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.35, 0.5, 0.7])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32, 1, 1024])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--ask", nargs="+", default=[""], help="how the names of questions begin")
    flags = parser.parse_args(argv)
    started = time.monotonic()
    asked = f" --ask {' '.join(map(repr, flags.ask))}" if any(flags.ask) else ""
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.gpu_suite{asked}",
        **common.environment(),
        "questions": {},
    }
    folder = Path(os.environ.get("OUT", common.RESULTS))
    out = flags.out or folder / f"gpu_suite_{jax.default_backend()}.json"
    for name, question in _questions(flags, out).items():
        if not name.startswith(tuple(flags.ask)):
            continue
        begun = time.monotonic() - started
        if begun > 60 * flags.minutes:
            result["questions"][name] = {"not asked": f"{begun:.0f} s were over"}
        else:
            try:
                result["questions"][name] = question()
            except Exception as error:  # the others still want an answer
                traceback.print_exc()
                text = f"{type(error).__name__}: {str(error)[:500]}"
                result["questions"][name] = {"failed": text}
        took = time.monotonic() - started - begun
        print(f"[{took:5.0f} s] {name}", flush=True)
        common.write(out, result)
    failed = [name for name, answer in result["questions"].items() if "failed" in (answer or {})]
    print(f"failed: {', '.join(failed) or 'nothing'}")


def _questions(flags: argparse.Namespace, out: Path) -> dict[str, Callable[[], Any]]:
    """All questions by name, those that matter most first: the device may be lent for minutes."""
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    ask: dict[str, Callable[[], Any]] = {"ceilings": lambda: ceilings(flags.rounds)}
    for tokens in (197, 144, 577):
        ask[f"cudnn attention, {tokens} tokens"] = functools.partial(
            cudnn_attention, tokens, flags.rounds
        )
    ask["compaction"] = lambda: compaction(flags.rounds)
    ask["agreement"] = lambda: agreement(flags.models[0])

    def speed_of(model, batch, kept=KEPT, **options):
        return functools.partial(_speed, model, batch, dtype, flags.rounds, kept, **options)

    first, *others = flags.models
    largest, *smaller = flags.batch
    clips = {
        f"speed {flags.video} 8, {share} kept": speed_of(flags.video, 8, (share,))
        for share in flags.shares
    }
    quick = {"quick": True, "observe": _on_device}
    ask["peers"] = speed_of(first, largest, **quick)
    few = {**quick, "rivals": False}
    ask[f"quick {flags.video} 8"] = speed_of(flags.video, 8, flags.shares[:1], **few)
    for model in others:
        ask[f"quick {model} {largest}"] = speed_of(model, largest, **few)
    ask[f"speed {first} {largest}"] = speed_of(first, largest)
    rows = "64" if dtype == jnp.bfloat16 else "2"
    cost = ["--model", first, "--batch", rows, "--out", f"{out.with_suffix('')}_cost.json"]
    ask["train cost"] = lambda: train_cost.main(cost)
    sizes = [(first, batch) for batch in smaller] + [(model, largest) for model in others]
    sizes += [(model, batch) for batch in smaller for model in others if batch < 1024]
    ask |= {f"speed {model} {batch}": speed_of(model, batch) for model, batch in sizes}
    for remat in (False, True):
        ask[f"memory {flags.video} 8, remat {remat}"] = functools.partial(
            memory.measure, flags.video, 8, remat, dtype
        )
    ask |= clips
    ask[f"maps {first}"] = lambda: _maps(first, min(5, flags.rounds))
    return ask


def _maps(model: str, rounds: int) -> dict[str, Any]:
    """What every map costs; LIME with few samples, for what each of its passes costs."""
    batch = 64 if jax.default_backend() == "gpu" else 2
    module, variables = create_model(model)
    images = jax.random.normal(jax.random.key(0), (batch, *module.input_spec.shape))
    return maps.measure(module, variables, images, batch, rounds, samples=128, few=1)


def _speed(
    model: str, batch: int, dtype: Any, rounds: int, kept: Sequence[float], **options: Any
) -> dict[str, Any]:
    """`speed.measure` on drawn counts; beside timm for one image, and where `quick`."""
    sample_size = max(64, min(batch, 256))
    work = synthetic(model, sample_size + batch, "uneven", kept, dtype)
    beside_timm = model in peers.TIMM_NAMES and (options.get("quick") or batch == 1)
    peer = model if beside_timm and peers.missing() is None else None
    sample, timed = work.rows(0, sample_size), work.rows(sample_size, sample_size + batch)
    answer = speed.measure(sample, timed, rounds, peer, **options)
    print(speed.table(answer), flush=True)
    return answer


if __name__ == "__main__":
    main()
