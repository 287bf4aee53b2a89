"""The pages about selectors and attribution methods run as they stand."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT

import iared2_jax
from iared2_jax.attribution.methods import METHODS, attribute
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import GroupPlan, Plan
from iared2_jax.models.taps import apply_with_taps, tap_gradients
from iared2_jax.token_reduction.selectors import SELECTORS, Random, get_selector


def run_page(name: str, blocks: slice = slice(None)) -> dict:
    """The names that a page's Python defines."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.S)
    names = {"__name__": "page"}
    for block in code[blocks]:
        exec(compile(block, f"docs/{name}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def micro():
    module, variables = iared2_jax.load_model("vit_micro")
    pixels = iared2_jax.data.cluttered_mnist.load("test", 4)[0]
    return module, variables, np.asarray(module.input_spec.normalize(pixels))


RATIOS = (0.7, 0.5, 0.3)
COUNTS = (45, 32, 20)


@pytest.mark.parametrize(
    "name", ["Distance", "random", pytest.param("Norm", marks=pytest.mark.slow)]
)
def test_a_selector_keeps_the_same_tokens_in_every_execution(micro, name):
    module, variables, images = micro
    page = run_page("add_a_selector.md", slice(0, 2))
    selector = get_selector(page.get(name, name) if name == "random" else page[name]())
    options = dict(keep_ratios=RATIOS, selector=selector)
    masked, out = jax.jit(lambda v, x: module.apply(v, x, **options))(variables, images)
    assert [np.asarray(keep).sum(-1).tolist() for keep in out.keep] == [[c] * 4 for c in COUNTS]
    assert not np.array_equal(out.keep[0][0], out.keep[0][1])  # it looks at the image
    gathered = jax.jit(
        lambda v, x: module.apply(v, x, execution="gathered", capacities=COUNTS, **options)
    )(variables, images)
    plan = Plan(4, tuple(GroupPlan("padded", 2, ((2 * (c + 1), c + 1),)) for c in COUNTS))
    run = iared2_jax.accelerate(module, variables, 4, plan=plan, cache_dir=None, **options)
    for logits, other in (gathered, run(images)):
        np.testing.assert_allclose(logits, masked, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(other.keep, out.keep, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_random_depends_on_the_image_and_not_on_its_batch(micro):
    module, variables, images = micro
    apply = jax.jit(lambda v, x: module.apply(v, x, keep_ratios=RATIOS, selector="random")[1].keep)
    keep, again = apply(variables, images), apply(variables, images[::-1])
    for mine, other in zip(keep, again, strict=True):
        np.testing.assert_array_equal(mine, other[::-1])
    tokens = np.zeros((4, 65, 96), np.float32)  # not looked at
    one, other = (Random(seed=s).input_scores(images, tokens, module) for s in (0, 1))
    assert not np.array_equal(one, other)


def test_selectors_are_refused_in_words(micro):
    module, variables, images = micro
    with pytest.raises(UsageError, match=r"no selector 'atention' \(did you mean 'attention'"):
        module.apply(variables, images, selector="atention")
    with pytest.raises(ValueError, match="needs keep_ratios"):
        module.apply(variables, images, selector="random")
    assert set(SELECTORS) >= {"interpreter", "attention", "random"}


@pytest.mark.slow
def test_the_page_on_methods_runs(micro):
    known = dict(METHODS)
    try:
        page = run_page("add_an_attribution_method.md")
    finally:
        METHODS.clear()
        METHODS.update(known)
    assert page["heatmaps"].shape == (4, 64, 64)
    module, variables, images = micro
    # To first order: what the page says of a token, finite differences say, too.
    values = page["gradient_times_token"](module, variables, images[:1], block=0)
    _, _, taps = apply_with_taps(module, variables, images[:1], execution="dense")
    x, patch, eps = taps.block_inputs[0], 20, 1e-2

    def winning(x):
        for index in range(module.backbone.depth):
            x, _ = module.apply(variables, index, x, method=lambda m, *a: m.backbone.run_block(*a))
        return module.apply(variables, x, None, method=lambda m, *a: m.backbone.classify(*a))[0]

    label = int(winning(x).argmax())
    step = eps * x[:, 1 + patch]
    up, down = (winning(x.at[:, 1 + patch].add(s))[0, label] for s in (step, -step))
    np.testing.assert_allclose(values[0, patch], (up - down) / (2 * eps), rtol=0.05)


def test_methods_are_refused_in_words(micro):
    module, variables, images = micro
    with pytest.raises(UsageError, match="no attribution method 'gradcm'"):
        attribute("gradcm", module, variables, images)
    with pytest.raises(UsageError, match="raw_attention has no option 'blok'"):
        attribute("raw_attention", module, variables, images, blok=1)
    with pytest.raises(UsageError, match=r"block must be in 0\.\.5, got 6"):
        attribute("raw_attention", module, variables, images, block=6)
    with pytest.raises(UsageError, match=r"group must be in 1\.\.3, got 0"):
        attribute("interpreter", module, variables, images, group=0)


@pytest.mark.parametrize("execution", ["dense", "masked"])
def test_taps_show_the_attention_that_is_used(micro, execution):
    module, variables, images = micro
    plain, out = jax.jit(lambda v, x: module.apply(v, x, execution=execution))(variables, images)
    logits, _, taps = apply_with_taps(module, variables, images, execution=execution)
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-4)
    for weights, cls in zip(taps.attention, out.attention, strict=True):
        np.testing.assert_allclose(weights.sum(-1), np.ones(weights.shape[:3]), rtol=1e-5)
        np.testing.assert_allclose(weights[:, :, 0, 1:], cls, atol=1e-6)
    assert [x.shape for x in taps.block_inputs] == [(4, 65, 96)] * 6


def test_tap_gradients_are_the_models_own(micro):
    """Summed over patches, the gradient at the first block's input is the embedding bias'."""
    module, variables, images = micro

    def objective(params):
        return module.apply({"params": params}, images, execution="dense")[0][:, 3].sum()

    expected = jax.grad(objective)(variables["params"])["backbone"]["patch_embed"]["bias"]
    _, _, _, gradients = tap_gradients(
        module, variables, images, lambda logits: logits[:, 3], execution="dense"
    )
    found = gradients.block_inputs[0][:, 1:].sum(axis=(0, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert all(float(abs(g).max()) > 0 for g in gradients.attention)


def test_out_reads_as_the_dict_it_was(micro):
    module, variables, images = micro
    _, out = module.apply(variables, images)
    with pytest.warns(DeprecationWarning, match=r"read out\.scores"):
        assert out["scores"] is out.scores
    with pytest.warns(DeprecationWarning, match=r"read out\.interpreter_logits"):
        assert out["head_logits"] is out.interpreter_logits
    with pytest.raises(KeyError):
        out["token"]
    assert "keep" in out
