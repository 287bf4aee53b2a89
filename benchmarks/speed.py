"""Do dropped tokens buy time? Every way to run the model, in one process, interleaved.

    python -m benchmarks.speed --model=deit_s
    python -m benchmarks.speed --checkpoint=runs/cluttered_mnist/weights.safetensors

Images on the device to logits on the device. The dense baseline is the fastest of the whole batch
and of sub-batches of it. Plans are made with other images than the timed ones. With a checkpoint of
a run the counts are those of its evaluation images; else they are drawn (benchmarks/workload.py).
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import common, peers
from benchmarks.workload import KEPT, SPREADS, Workload, from_checkpoint, synthetic
from iared2_jax import accelerate, count_flops
from iared2_jax.evaluation.evaluators import dense_functions, padding_share
from iared2_jax.fast_inference import Accelerated, Plan, planner
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.plan_request import PlanRequest
from iared2_jax.fast_inference.sub_batches import sub_batch_sizes
from iared2_jax.models.variants import get_variant
from iared2_jax.report.tables import METHODS, as_text
from iared2_jax.timing import interleaved
from iared2_jax.token_reduction.create import split_into_groups
from iared2_jax.token_reduction.schedules import PUBLISHED, flops_of, published_budget


@dataclasses.dataclass
class Variant:
    """One way to run the batch, ready to be called."""

    call: Callable[[], Any]
    kind: str  # dense | masked | fixed | ragged | selector | peer
    compile_seconds: float | None = None
    memory_bytes: int | None = None
    run: Accelerated | None = None
    linear: float | None = None  # linear multiply-accumulates per image, where not the ragged ones'


def measure(
    sample: Workload,
    timed: Workload,
    rounds: int,
    peer_model: str | None = None,
    quick: bool = False,
    rivals: bool = True,
    observe: Callable[[Callable[[], Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """All variants for one batch; `timed` is the batch, `sample` what the plans are made with.

    Args:
      peer_model: timm's counterpart is timed, too.
      quick: few programs are compiled: the whole batch at a time, one kernel for attention, one
        packed list.
      rivals: a plan is searched for as well, and EViT and ToMe are timed.
      observe: what else to note of a variant's call, beside its time.
    """
    images = jnp.asarray(timed.images)
    variants = _ours(sample, timed, images, quick, rivals)
    skipped = {}
    if peer_model:
        calls, skipped = peers.callables(
            peer_model,
            timed.variables,
            timed.images,
            [round(float(c)) for c in timed.counts.mean(0)],
            float(np.mean(count_flops(timed.module, tuple(timed.counts.T)).full)),
            device="cuda" if jax.default_backend() == "gpu" else "cpu",
            dtype=jnp.dtype(timed.module.backbone.dtype).name,
        )
        _assert_same_logits(timed, images, calls["timm eager"])
        variants |= {name: Variant(call, "peer") for name, call in calls.items()}
    errors = _errors(timed, images, variants)
    calls = {name: variant.call for name, variant in variants.items()}
    # 11 rounds of 1 ms say little: more, while they fit into a quarter of a second each.
    timings = interleaved(calls, (rounds, 300), seconds=rounds / 4, primed=planner.QUICK)
    report = _report(timed, variants, timings, errors, skipped)
    for name, call in calls.items() if observe else ():
        report["variants"][name] |= observe(call)
    return report


def _ours(
    sample: Workload, timed: Workload, images: jax.Array, quick: bool, rivals: bool
) -> dict[str, Variant]:
    module, variables, b = timed.module, timed.variables, len(timed.images)
    kernel = planner.attention_kernels(module, variables)[-1]
    variants: dict[str, Variant] = {}

    def add(name, kind, fn, *args):
        program, seconds = common.compiled(fn, *args)
        call = functools.partial(program, *args)
        variants[name] = Variant(call, kind, seconds, common.memory(program))

    dense = dense_functions(module, variables, b)
    whole = [name for name in dense if "at a time" not in name]
    for name in whole[-1:] if quick else dense:
        add(name, "dense", dense[name], variables, images)
    add(
        "masked",
        "masked",
        lambda v, x, t: module.apply(v, x, t)[0],
        variables,
        images,
        jnp.asarray(timed.thresholds),
    )

    def accelerated(name, kind, module=module, linear=None, **options):
        start = time.perf_counter()
        run = accelerate(module, variables, b, cache_dir=None, **options)
        seconds = time.perf_counter() - start

        # With the thresholds of the timed images.
        given = jnp.asarray(timed.thresholds) if kind == "ragged" else None

        def call():
            return run(images, given)[0]

        memory = common.memory(run.compiled)
        variants[name] = Variant(call, kind, seconds, memory, run, linear)

    ask = {"thresholds": sample.thresholds, "images": sample.images}
    for name, (kind, rows) in layouts(b, jax.default_backend()).items():
        if not quick or name == "ragged, packed":
            plan = uniform_plan(sample, b, kind, rows, kernel)
            accelerated(name, "ragged", plan=plan, **ask)
    shares = timed.counts.mean(0) / module.input_spec.num_patches
    accelerated("fixed budget", "fixed", keep_ratios=tuple(float(s) for s in shares))
    if not rivals:
        return variants
    accelerated("ragged, planned", "ragged", **ask)
    linear = float(np.mean(count_flops(module, tuple(timed.counts.T)).linear))
    for selector in PUBLISHED if hasattr(module.backbone, "run_attention_half") else ():
        share = linear / count_flops(module).linear
        groups, ratios = published_budget(module, selector, share)
        own = module.clone(group_sizes=split_into_groups(module.backbone.depth, groups))
        cost = flops_of(own, ratios, selector).linear
        budget = {"keep_ratios": ratios, "selector": selector}
        accelerated(f"{METHODS[selector]} in JAX", "selector", own, cost, **budget)
    return variants


def uniform_plan(
    sample: Workload, b: int, kind: str, rows: int, attention_kernel: str = "einsum"
) -> Plan:
    """The same layout in every group."""
    request = PlanRequest(
        forward=ForwardSpec(sample.module),
        variables=sample.variables,
        batch_size=b,
        thresholds=sample.thresholds,
        images=sample.images,
    )
    plan = planner.uniform_plan(request, kind, rows)
    return dataclasses.replace(plan, attention_kernel=attention_kernel)


def layouts(b: int, platform: str) -> dict[str, tuple[str, int]]:
    """The same layout in every group, beside the planner's mixture: by row name, (kind, rows)."""
    few = sub_batch_sizes(b, platform)[-1] if platform == "gpu" else min(4, b)
    wanted = {"ragged, one capacity": ("padded", b), "ragged, packed": ("packed", b)}
    if few < b:
        wanted[f"ragged, buckets of {few}"] = ("padded", few)
    return {
        name: (kind, rows)
        for name, (kind, rows) in wanted.items()
        if not (kind == "packed" and rows == 1)
    }


def _assert_same_logits(timed: Workload, images: jax.Array, theirs: Callable[[], Any]) -> None:
    ours = timed.module.apply(timed.variables, images[:4], execution="dense")[0]
    other = theirs()[:4].float().cpu().numpy()
    error = np.abs(np.asarray(ours) - other).max() / np.abs(other).max()
    limit = 1e-4 if timed.module.backbone.dtype == jnp.float32 else 5e-2
    if not error < limit:
        raise SystemExit(f"timm's logits differ from ours by {error:.2g}: nothing was timed")


def _errors(timed: Workload, images: jax.Array, variants: dict[str, Variant]) -> dict[str, float]:
    """Largest difference from masked execution over the largest logit, of every ragged variant."""
    expected = np.asarray(variants["masked"].call(), np.float32)
    scale = np.abs(expected).max()
    errors = {}
    for name, variant in variants.items():
        if variant.kind == "ragged":
            errors[name] = float(np.abs(np.asarray(variant.call()) - expected).max() / scale)
            variant.run.forget_usage()
    return errors


def _report(timed, variants, timings, errors, skipped) -> dict[str, Any]:
    b = len(timed.images)
    dense = min(
        (name for name, v in variants.items() if v.kind == "dense"), key=lambda n: timings[n].median
    )
    rows = {}
    for name, variant in variants.items():
        timing = timings[name]
        speed_up = timings[dense].median / timing.median
        row = {
            "kind": variant.kind,
            "p50_ms": 1e3 * timing.median,
            "p25_ms": 1e3 * timing.lower,
            "p75_ms": 1e3 * timing.upper,
            "p95_ms": 1e3 * timing.p95,
            "images_per_second": b / timing.median,
            "over_dense": speed_up,
            "compile_seconds": variant.compile_seconds,
            "memory_bytes": variant.memory_bytes,
        }
        if variant.linear is not None:
            row["linear_flops"] = variant.linear
        if variant.run is not None:
            row["plan"] = str(variant.run.plan)
        if variant.kind in ("ragged", "fixed"):
            row["of_possible"] = speed_up / timed.possible
        if variant.kind == "ragged":
            row["error"] = errors[name]
            row["shapes"] = sum(len(group.shapes) for group in variant.run.plan.groups)
            usage = variant.run.usage
            if usage:
                row["padding_share"] = padding_share(variant.run, timed.counts)
                row["larger"] = sum(g["larger"] for g in usage)
        rows[name] = row
    return {
        "batch": b,
        "dtype": jnp.dtype(timed.module.backbone.dtype).name,
        "counts": timed.source,
        "kept": (timed.counts.mean(0) / timed.module.input_spec.num_patches).tolist(),
        "flops_ratio": 1 / timed.possible,
        "possible": timed.possible,
        "baseline": dense,
        "verdict": _verdict(rows, timed.possible, b),
        "skipped": skipped,
        "variants": rows,
    }


def _verdict(rows: dict[str, Any], possible: float, b: int) -> str:
    ours = rows.get("ragged, planned") or rows["ragged, packed"]
    gain = ours["over_dense"]
    if "dropping does not pay" in ours["plan"] or gain < 1:
        return f"batch {b}: dropping does not pay here ({gain:.2f}x the fastest dense)"
    return (
        f"batch {b}: {gain:.2f}x the fastest dense, of {possible:.2f}x possible "
        f"({100 * gain / possible:.0f}%)"
    )


def table(result: dict[str, Any]) -> str:
    """One batch's rows as text."""
    header = ["variant", "images/s", "p50 ms", "p95 ms", "over dense", "of possible", "padding"]
    header += ["compile s", "MiB"]
    rows = [header]
    for name, row in result["variants"].items():
        of = f"{row['of_possible']:.2f}" if "of_possible" in row else ""
        padding = f"{100 * row['padding_share']:.0f}%" if "padding_share" in row else ""
        compiling = "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}"
        memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.0f}"
        rows.append(
            [
                name,
                f"{row['images_per_second']:.1f}",
                f"{row['p50_ms']:.1f}",
                f"{row['p95_ms']:.1f}",
                f"{row['over_dense']:.2f}x",
                of,
                padding,
                compiling,
                memory,
            ]
        )
    title = (
        f"batch {result['batch']}, {result['dtype']}, {result['counts']}: possible "
        f"{result['possible']:.2f}x; baseline: {result['baseline']}"
    )
    return as_text((title, rows)) + "\n  " + result["verdict"]


def break_even(results: Sequence[dict[str, Any]]) -> str:
    """The smallest measured batch from which on dropping pays."""
    paying = None
    for result in sorted(results, key=lambda r: -r["batch"]):
        if result["variants"]["ragged, planned"]["over_dense"] <= 1:
            break
        paying = result["batch"]
    return f"dropping pays from batch {paying} on" if paying else "dropping pays at no batch here"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over batch size, each kind of execution a line, the possible dashed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    dtype = results[0]["dtype"]
    results = [r for r in results if (r["dtype"], r["counts"]) == (dtype, results[0]["counts"])]
    batches = [r["batch"] for r in results]
    axes.plot(batches, [r["possible"] for r in results], "k--", label="possible")
    for name in ("ragged, planned", "fixed budget", "masked"):
        axes.plot(batches, [r["variants"][name]["over_dense"] for r in results], "o-", label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="batch", ylabel="speed over the fastest dense", title=dtype)
    axes.set_xticks(batches, batches)
    axes.minorticks_off()
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def _write(out: Path, flags: argparse.Namespace, reason: str | None, results: list) -> None:
    which = "--checkpoint=..." if flags.checkpoint else f"--model={flags.model}"
    common.write(
        out,
        {
            "command": f"python -m benchmarks.speed {which}",
            **common.environment(),
            "peers": reason or "timm",
            "break_even": break_even(results),
            "results": sorted(results, key=lambda result: result["batch"]),
        },
    )
    draw(sorted(results, key=lambda result: result["batch"]), out.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="weights.safetensors of a run")
    on_gpu = jax.default_backend() == "gpu"
    sizes = [1, 8, 32, 128, 256, 1024] if on_gpu else [1, 8, 16, 32]
    parser.add_argument("--batch", type=int, nargs="+", help=f"{sizes}; of clips: 2, on a GPU 8")
    dtypes = ["bfloat16", "float32"] if on_gpu else ["float32"]
    parser.add_argument("--dtype", nargs="+", default=dtypes)
    parser.add_argument("--spread", nargs="+", default=["uneven"], choices=list(SPREADS))
    parser.add_argument(
        "--kept",
        nargs="+",
        help="mean shares kept, a number per group: 1,0.7,0.45 (models of clips: 0.35 0.5 0.7)",
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    flags = parser.parse_args(argv)
    clips = not flags.checkpoint and get_variant(flags.model).backbone.input_spec.is_clip
    flags.batch = flags.batch or ([8 if on_gpu else 2] if clips else sizes)
    shares = flags.kept or (["0.35", "0.5", "0.7"] if clips else [",".join(map(str, KEPT))])
    kept = [tuple(float(share) for share in text.split(",")) for text in shares]

    reason = peers.missing() if flags.peers else "not asked for"
    name = flags.checkpoint.parent.name if flags.checkpoint else flags.model
    if flags.checkpoint or flags.model not in peers.TIMM_NAMES:
        reason = reason or f"timm has no {name}"
    print(f"peers: {reason or 'timm'}", flush=True)
    out = flags.out or common.RESULTS / f"speed_{name}_{jax.default_backend()}.json"
    results = []
    for dtype in flags.dtype:
        # A checkpoint has counts of its own.
        drawn = [("", ())] if flags.checkpoint else itertools.product(flags.spread, kept)
        for spread, shares in drawn:
            most = max(flags.batch)
            if flags.checkpoint:
                everything = from_checkpoint(flags.checkpoint, 64 + most, jnp.dtype(dtype))
            else:
                everything = synthetic(flags.model, 64 + most, spread, shares, jnp.dtype(dtype))
            sample, rest = everything.rows(0, 64), everything.rows(64, 64 + most)
            for batch in flags.batch:
                result = measure(
                    sample, rest.rows(0, batch), flags.rounds, None if reason else flags.model
                )
                print("\n" + table(result), flush=True)
                results.append(result)
                _write(out, flags, reason, results)
    print("\n" + break_even(results))


if __name__ == "__main__":
    main()
