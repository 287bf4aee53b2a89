"""The page docs/add_a_backbone.md runs as it stands, and its toy drops patches as ours do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import traverse_util

from iared2_jax.fast_inference import GroupPlan, Plan, plan_request
from iared2_jax.models import variants
from iared2_jax.models.backbones.protocol import Backbone
from iared2_jax.token_reduction import create
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.model import KEEP_ALL, IARed2
from iared2_jax.training import optimizers

N, BATCH = 16, 8  # the toy's patches, the page's images
PLAN = Plan(
    BATCH,
    (
        GroupPlan("packed", BATCH, ((70, 12), (BATCH * N, N))),
        GroupPlan("padded", 3, ((3 * 6, 6), (3 * N, N))),  # leaves what lies behind 6 as it is
    ),
)
ENOUGH = (14, 12)  # capacities for what the toy keeps below; asserted


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Everything that the page's code defines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add_a_backbone.md").read_text(), re.S)
    names = {"__name__": "my_toy"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # Timing the layouts takes half a minute: here is a plan.
        patch.setattr(plan_request, "cached_plan", lambda asked, folder: PLAN)
        # So large that scores differ and attention attends.
        fresh = create.init_variables
        larger = lambda *args: jax.tree.map(lambda x: 8 * x, fresh(*args))  # noqa: E731
        patch.setattr(create, "init_variables", larger)
        known = dict(variants.VARIANTS)
        try:
            for block in blocks:
                exec(compile(block, "docs/add_a_backbone.md", "exec"), names)
        finally:
            variants.VARIANTS.clear()
            variants.VARIANTS.update(known)
    return names


@pytest.fixture(scope="module")
def model(page):
    return page["module"], page["variables"]


@pytest.fixture(scope="module")
def apply(model):
    """Masked, or gathered into some capacities; compiled once for each."""
    module, variables = model

    @functools.cache
    def compiled(**options):
        return jax.jit(functools.partial(module.apply, **options))

    def run(images, threshold=0.5, capacities=None, **arrays):
        execution = "gathered" if capacities else "masked"
        run = compiled(execution=execution, capacities=capacities)
        return run(variables, images, jnp.float32(threshold), **arrays)

    return run


@pytest.fixture(scope="module")
def ragged(page):
    return page["run"]


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (BATCH, 32, 32, 3))


@pytest.fixture(scope="module")
def threshold(apply, images):
    """That half of the first group's scores exceed."""
    return float(np.median(apply(images)[1].scores[0]))


@pytest.fixture(scope="module")
def decided(apply, images, threshold):
    """By masked execution, from the toy's own decisions."""
    return apply(images, threshold)


def assert_close(actual, expected) -> None:
    """Within 1e-4 of the largest number there is."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def poisoned(images, keep, value):
    """The images with other pixels wherever a patch is not in `keep` [B, N]."""
    pixels = jnp.repeat(jnp.repeat(keep.reshape(-1, 4, 4), 8, 1), 8, 2)[..., None]
    return jnp.where(pixels, images, value)


def test_the_page_runs_and_shows_what_it_says(page):
    assert isinstance(page["Toy"](), Backbone)
    assert page["heatmaps"].shape == (BATCH, 32, 32)
    assert 0 < page["heatmaps"].max() <= 1
    counts = np.asarray(page["out"].keep).sum(-1)
    assert count_flops(page["module"], tuple(counts)).full.mean() <= 170e3  # as asked of calibrate
    assert page["run"].plan is PLAN
    # What was saved is what was read.
    assert page["module"].backbone == page["Toy"]()
    made = page["init_variables"](page["module"])
    jax.tree.map(np.testing.assert_array_equal, page["variables"], made)


def test_masked_gathered_and_ragged_are_one(apply, decided, ragged, images, threshold):
    logits, out = decided
    counts = np.asarray(out.keep).sum(-1)
    assert 0 < counts[1].sum() < counts[0].sum() < BATCH * N
    gathered = apply(images, capacities=ENOUGH, keep=out.keep)
    for other, there in (gathered, ragged(images, threshold)):
        assert_close(other, logits)
        np.testing.assert_array_equal(there.keep, out.keep)
        for name in ("scores", "features"):
            assert_close(getattr(there, name), getattr(out, name))
    assert not np.any(gathered[1].overflow)


def test_keeping_all_is_the_dense_backbone(model, apply, images):
    module, variables = model
    dense, out = jax.jit(lambda v, x: module.apply(v, x, execution="dense"))(variables, images)
    assert_close(apply(images, KEEP_ALL)[0], dense)
    (attention,) = out.attention  # of the query that pools
    np.testing.assert_allclose(attention.sum(-1), np.ones((BATCH, 1)), rtol=1e-5)


@pytest.mark.parametrize("capacities", [None, ENOUGH])
def test_what_dropped_patches_show_does_not_matter(apply, decided, images, capacities):
    logits, out = decided
    keep = out.keep
    after, _ = apply(poisoned(images, keep[0], 1e4), capacities=capacities, keep=keep)
    assert_close(after, logits)
    # What the others show does.
    other, _ = apply(poisoned(images, ~keep[0], 1e4), capacities=capacities, keep=keep)
    assert float(jnp.abs(other - logits).max()) > 0.1


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_nan_everywhere_and_touches_no_other_image(
    apply, decided, ragged, images, threshold, value
):
    logits, out = decided
    broken = jnp.arange(BATCH) % 3 == 0  # even where only a dropped patch is
    poison = poisoned(images, out.keep[0] | ~broken[:, None], value)
    for after, there in (
        apply(poison, threshold),
        apply(poison, threshold, capacities=(N, N)),
        ragged(poison, threshold),
    ):
        assert np.isnan(after[broken]).all()
        assert_close(after[~broken], logits[~broken])
        for mine, theirs in zip(there.keep, out.keep, strict=True):
            np.testing.assert_array_equal(mine[~broken], theirs[~broken])


def test_images_that_keep_nothing_have_an_answer(apply, ragged, images):
    logits, out = apply(images, 1.0)
    assert not np.any(out.keep)
    assert np.isfinite(logits).all()
    assert_close(ragged(images, 1.0)[0], logits)


def test_cost_is_the_parameters(page, model):
    module, variables = model
    dense, some = count_flops(module), count_flops(module, kept=(8, 4))
    assert page["flops"] == some
    assert dense == count_flops(page["Toy"]())
    kernels = sum(x.size for x in jax.tree.leaves(variables["params"]["backbone"]) if x.ndim == 2)
    head = variables["params"]["backbone"]["head"]["kernel"].size
    assert dense.linear == N * (kernels - head) + head
    assert some.linear < dense.linear < dense.full
    per_image = count_flops(module, kept=(np.full(3, 8), np.full(3, 4))).full
    np.testing.assert_allclose(per_image, some.full)


def test_every_parameter_has_a_phase(model):
    module, variables = model
    paths = traverse_util.flatten_dict(variables["params"], sep="/")
    parts = {optimizers.part_of(path, module) for path in paths}
    groups = {(kind, group) for kind in ("interpreter", "blocks") for group in (1, 2)}
    assert parts == groups | {("embedding", 0), ("classifier", 0), ("head", 0)}


def test_half_precision_ends_in_float32(page, images):
    module = IARed2(page["Toy"](dtype=jnp.bfloat16), (1, 1), "learned", interpreter_heads=3)

    def run(images):
        variables = create.init_variables(module)
        embedded = module.apply(variables, images, method=lambda m, x: m.backbone.embed(x))
        return embedded, *module.apply(variables, images)

    embedded, logits, out = jax.eval_shape(run, images)
    assert embedded.dtype == jnp.bfloat16
    assert logits.dtype == out.features.dtype == jnp.float32
