"""What every benchmark needs: the machine in words, a JSON file, a compiled call."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from iared2_jax.versions import NOT_INSTALLED, version

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, versions, and the settings that move the figures."""
    packages = ("iared2_jax", "jax", "jaxlib", "flax", "numpy", "torch", "timm")
    versions = {"python": platform.python_version(), **installed(*packages)}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "flags": {
            key: os.environ[key] for key in ("XLA_FLAGS", "GLIBC_TUNABLES") if key in os.environ
        },
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def installed(*packages: str) -> dict[str, str]:
    """The versions of those that are there."""
    versions = {package: version(package) for package in packages}
    return {package: text for package, text in versions.items() if text != NOT_INSTALLED}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def compiled(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """`fn` compiled for `args`, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    return program, time.perf_counter() - start


def memory(program: jax.stages.Compiled) -> int | None:
    """Bytes that a program needs beside its arguments, if the backend tells."""
    analysis = program.memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes) if analysis else None


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}", flush=True)


def parser(doc: str) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="deit_s", help="a named variant")
    made.add_argument("--out", type=Path, help="the JSON file; a plot goes beside it")
    return made
