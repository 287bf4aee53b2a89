"""Every open question that only a GPU can answer, in one command and one JSON file.

    python -m benchmarks.gpu_suite

First smoke tests of what is new or private to the device, then speed at the paper's kept shares (of
clips, too), what a training step needs in memory, what maps cost, and what training costs. A
question that fails is recorded with its error and the next is asked; none is begun after
`--minutes`. On a machine without a GPU it only shows that it runs: `python -m benchmarks.gpu_suite
--models deit_ti --batch 2 --video timesformer_micro --rounds 1`.
"""

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

from benchmarks import common, maps, memory, peers, speed, train_cost
from benchmarks.workload import KEPT, synthetic
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
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1, 32, 1024])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--minutes", type=float, default=7.0)
    flags = parser.parse_args(argv)
    started = time.monotonic()
    result: dict[str, Any] = {
        "command": "python -m benchmarks.gpu_suite", **common.environment(), "questions": {}
    }  # fmt: skip
    folder = Path(os.environ.get("OUT", common.RESULTS))
    out = flags.out or folder / f"gpu_suite_{jax.default_backend()}.json"

    def ask(name: str, question: Callable[[], Any]) -> None:
        seconds = time.monotonic() - started
        if seconds > 60 * flags.minutes:
            result["questions"][name] = {"not asked": f"{seconds:.0f} s were over"}
        else:
            try:
                result["questions"][name] = question()
            except Exception as error:  # the others still want an answer
                traceback.print_exc()
                text = f"{type(error).__name__}: {str(error)[:500]}"
                result["questions"][name] = {"failed": text}
        print(f"[{time.monotonic() - started:5.0f} s] {name}", flush=True)
        common.write(out, result)

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    ask("ceilings", lambda: ceilings(flags.rounds))
    for tokens in (197, 144, 577):
        ask(
            f"cudnn attention, {tokens} tokens",
            lambda tokens=tokens: cudnn_attention(tokens, flags.rounds),
        )
    ask("compaction", lambda: compaction(flags.rounds))
    for batch in flags.batch:
        for model in flags.models:
            if batch == 1024 and model != flags.models[0]:
                continue
            ask(f"speed {model} {batch}", lambda m=model, b=batch: _speed(m, b, dtype, flags))
    for share in flags.shares:
        ask(
            f"speed {flags.video} 8, {share} kept",
            lambda share=share: _speed(flags.video, 8, dtype, flags, (share,)),
        )
    for remat in (False, True):
        ask(
            f"memory {flags.video} 8, remat {remat}",
            lambda remat=remat: memory.measure(flags.video, 8, remat, dtype),
        )
    ask(f"maps {flags.models[0]}", lambda: _maps(flags.models[0], flags.rounds))
    rows = "64" if dtype == jnp.bfloat16 else "2"
    cost = [
        "--model",
        flags.models[0],
        "--batch",
        rows,
        "--out",
        f"{out.with_suffix('')}_cost.json",
    ]
    ask("train cost", lambda: train_cost.main(cost))
    failed = [name for name, answer in result["questions"].items() if "failed" in (answer or {})]
    print(f"failed: {', '.join(failed) or 'nothing'}")


def _maps(model: str, rounds: int) -> dict[str, Any]:
    """What every map costs; LIME with few samples, for what each of its passes costs."""
    batch = 64 if jax.default_backend() == "gpu" else 2
    module, variables = create_model(model)
    images = jax.random.normal(jax.random.key(0), (batch, *module.input_spec.shape))
    return maps.measure(module, variables, images, batch, rounds, samples=128, few=1)


def _speed(
    model: str, batch: int, dtype: Any, flags: Any, kept: Sequence[float] = KEPT
) -> dict[str, Any]:
    sample_size = max(64, min(batch, 256))
    work = synthetic(model, sample_size + batch, "uneven", kept, dtype)
    peer = model if peers.missing() is None and batch in (1, 256) else None
    sample, timed = work.rows(0, sample_size), work.rows(sample_size, sample_size + batch)
    answer = speed.measure(sample, timed, flags.rounds, peer)
    print(speed.table(answer), flush=True)
    return answer


if __name__ == "__main__":
    main()
