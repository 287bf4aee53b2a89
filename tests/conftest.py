"""What every test shares: 8 simulated devices, shape checks, a config that takes seconds."""

import atexit
import os
import tempfile

# Before jax is imported anywhere. Commands that a test starts see one device.
_DEVICES = " --xla_force_host_platform_device_count=8"
ONE_DEVICE = os.environ.get("XLA_FLAGS", "").replace(_DEVICES, "")
os.environ["XLA_FLAGS"] = ONE_DEVICE + _DEVICES
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit it
    # What several tests, workers or commands compile alike, one of them compiles.
    _COMPILED = tempfile.TemporaryDirectory(prefix="iared2-jax-compiled-")
    atexit.register(_COMPILED.cleanup)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from jaxtyping import install_import_hook

# Annotated shapes are checked at run time, here and only here.
install_import_hook("iared2_jax", "typecheck.checked")

import dataclasses
import importlib.util
from pathlib import Path

import hypothesis
import jax
import ml_collections
import pytest

from iared2_jax.fast_inference import planner
from iared2_jax.models import variants
from iared2_jax.signals import Stop

ROOT = Path(__file__).parent.parent

# Plans need not be the best here: fewer shapes and candidates to compile, and no other logits.
planner.MAX_SHAPES["cpu"] = 6
planner.FINALISTS = 1
planner.SECONDS = 0.0

# Models with a block per group: less to trace and compile where the depth does not matter.
for _short, _name, _parameters in (
    ("vit_3_blocks", "vit_micro", 250_378),
    ("deit_3_blocks", "deit_ti", 1_713_640),
    ("cait_3_blocks", "cait_xxs24", 2_605_216),
):
    _variant = variants.VARIANTS[_name]
    variants.VARIANTS[_short] = dataclasses.replace(
        _variant, backbone=_variant.backbone.clone(depth=3), parameters=_parameters, timm=""
    )

# Compiling takes longer than hypothesis allows an example by default.
hypothesis.settings.register_profile(
    "jax",
    deadline=None,
    max_examples=15,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jax")


def load_config(name: str, arg: str = "") -> ml_collections.ConfigDict:
    """The config of configs/<name>.py:<arg>."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


class StopAfter(Stop):
    """Requested after so many steps of one phase: it is asked at its start and before each step."""

    def __init__(self, steps: int):
        self._asked, self._answers = 0, steps + 1
        super().__init__()

    @property
    def requested(self) -> bool:
        self._asked += 1
        return self._asked > self._answers

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


@pytest.fixture
def tiny_config() -> ml_collections.ConfigDict:
    """The demo's config, a few steps of every phase, from random weights, on three blocks."""
    config = load_config("cluttered_mnist", "runlocal")
    config.model.name, config.weights = "vit_3_blocks", ""
    config.data.eval_size = 16
    config.model.group_sizes = ()  # equal groups
    return config


@pytest.fixture(autouse=True, scope="module")
def _leaves_jax_as_it_was():
    """A test file leaves neither compiled programs to the next nor JAX's options changed."""
    before = dict(jax.config.values)
    yield
    jax.clear_caches()
    assert dict(jax.config.values) == before


@pytest.fixture(scope="module")
def compiled_quickly():
    """For programs that run once or twice: what takes time is compiling them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def clip_config() -> ml_collections.ConfigDict:
    """The small TimeSformer on clips of two frames and 32 patches, D = 1, from random weights."""
    config = load_config("timesformer_micro", "runlocal")
    config.weights = "scratch"
    config.model.groups, config.model.num_frames = 1, 2
    config.model.patch_size = (16, 16)
    return config
