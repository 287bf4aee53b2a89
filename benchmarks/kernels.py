"""Where a GPU's time goes: its kernels by the time they take, and the gaps between them.

A library for `benchmarks.gpu_suite`; JAX's profiler says when each kernel ran.
"""

import collections
import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

_SHOWN = 40  # kernels, those that take most


def kernel_times(call: Callable[[], Any], calls: int = 3) -> dict[str, Any]:
    """Runs a compiled call a few times under the profiler; see `summary`."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return summary(events, calls)


def summary(events: Iterable[Mapping[str, Any]], calls: int) -> dict[str, Any]:
    """Kernels per call of a trace (Chrome's trace format), on all streams of GPUs.

    Returns:
      kernels: how many. busy_ms: the time in which at least one runs. gaps_ms: the rest of the time
      from the first kernel's start to the last one's end, all calls together divided by their
      number, so the host's turns between calls included. by_name: [name, ms, times], the longest
      first. All 0 and empty where nothing ran on a GPU.
    """
    events = list(events)
    named = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("ph") == "M" and event["name"] in named:
            named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    gpus = {pid for (pid, _), name in named["process_name"].items() if "GPU" in name}
    # Other lanes of a GPU's process repeat its kernels, by operation or by module.
    streams = {lane for lane, name in named["thread_name"].items() if "Stream" in name}
    ran = [
        event
        for event in events
        if event.get("ph") == "X"
        and event["pid"] in gpus
        and (event["pid"], event["tid"]) in streams
    ]
    times, counts = collections.Counter(), collections.Counter()
    busy, end, start = 0.0, 0.0, 0.0
    for index, event in enumerate(sorted(ran, key=lambda event: event["ts"])):
        times[event["name"]] += event["dur"]
        counts[event["name"]] += 1
        if index == 0:
            start = end = event["ts"]
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    per_call = 1e-3 / calls  # from microseconds
    return {
        "kernels": len(ran) / calls,
        "busy_ms": busy * per_call,
        "gaps_ms": (end - start - busy) * per_call,
        "by_name": [
            [name, time * per_call, counts[name] / calls]
            for name, time in times.most_common(_SHOWN)
        ],
    }
