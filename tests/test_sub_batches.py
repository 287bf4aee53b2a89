"""A few images at a time, as a CPU's caches hold them, give what the whole batch gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from iared2_jax.config import default_config
from iared2_jax.config.loading import reduction_of
from iared2_jax.fast_inference import sub_batches
from iared2_jax.fast_inference.sub_batches import in_sub_batches, rows_in_cache
from iared2_jax.report.comparison import Comparison
from iared2_jax.report.results import _agreement, _dense, _random, _reduced
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.selectors.random import fingerprint
from iared2_jax.training.curriculum import phases
from iared2_jax.training.phases import PhaseContext
from iared2_jax.training.step import data_mesh

MODULE = create_module("vit_3_blocks", groups=3, init_bias=0.05)


def few_at_a_time(monkeypatch, rows):
    """So small a cache that it holds the tokens of so many images of `MODULE`."""
    values = rows * 65 * MODULE.backbone.embed_dim
    monkeypatch.setattr(sub_batches, "_CACHED_VALUES", values)


def test_the_rows_are_a_trees_and_the_last_ones_are_cut_off():
    tree = {"a": jnp.arange(14.0).reshape(7, 2), "b": jnp.arange(7)}
    seen = []

    def forward(factor, tree):
        seen.append(tree["b"].shape)
        return {"sum": factor * tree["a"].sum(-1) + tree["b"]}

    factor = jnp.full(7, 2.0)
    expected = 2 * tree["a"].sum(-1) + tree["b"]
    for rows, shape in ((3, (3,)), (7, (7,)), (0, (7,)), (9, (7,))):
        found = in_sub_batches(lambda f, t: forward(f[:, None][:, 0], t), rows, factor, tree)
        np.testing.assert_array_equal(found["sum"], expected)
        assert seen[-1] == shape


@pytest.mark.parametrize(
    ("name", "size", "rows"), [("dinov2_s14", 112, 15), ("dinov2_s14", 224, 4), ("deit_b", 224, 3)]
)
def test_a_cpu_takes_about_a_thousand_tokens_of_vit_s(name, size, rows):
    module = create_module(name, image_size=size)
    assert rows_in_cache(module, 100, "cpu") == rows
    assert rows_in_cache(module, 100, "gpu") == 100
    assert rows_in_cache(module, 1, "cpu") == 1
    assert all(1 <= rows_in_cache(module, batch, "cpu") <= batch for batch in range(1, 50))


def test_an_evaluation_has_the_same_figures(monkeypatch):
    """Also of random masks and patches, which are an image's own."""
    rng = np.random.default_rng(0)
    config = default_config()
    config.eval.batch_size = 4
    variables = init_variables(MODULE)
    comparison = Comparison(
        config=config,
        module=MODULE,
        trained=variables,
        original=variables,
        reduces=True,
        scored=True,
        pixels=rng.integers(0, 256, (6, 64, 64, 3), np.uint8),
        labels=np.arange(6) % 3,
        masks=None,
        class_names=tuple("abcdefghij"),
        stop=None,
        crops=None,
        reduction=reduction_of(config),
    )
    found = []
    for rows in (1000, 3):
        few_at_a_time(monkeypatch, rows)
        reduced, counts = _reduced(comparison)
        assert 0 < counts.min() < 64
        found.append(
            (
                _dense(comparison),
                reduced,
                counts,
                _random(comparison, counts),
                _agreement(comparison),
            )
        )
    whole, few = found
    assert jax.tree.structure(whole) == jax.tree.structure(few)
    jax.tree.map(np.testing.assert_array_equal, whole, few)


@pytest.mark.parametrize("devices", [1, 8])
def test_cached_features_are_the_same(tiny_config, monkeypatch, devices):
    """On several devices a batch is not taken apart."""
    tiny_config.curriculum = "supervised"
    options = tiny_config.supervised
    options.train_trunk, options.cached_examples, options.batch_size = False, 16, 8
    (phase,) = phases(tiny_config, (1, 1, 1), 16)
    params, rng = init_variables(MODULE)["params"], np.random.default_rng(0)
    examples = rng.integers(0, 256, (2, 8, 64, 64, 3), np.uint8)
    rows = NamedSharding(data_mesh(jax.devices()[:devices]), P("data"))

    def features():
        batches = ({"input": jax.device_put(x, rows), "label": np.zeros(8, int)} for x in examples)
        stream = phase.kind.stream(PhaseContext(MODULE, phase), params, lambda _: batches, 0)
        return np.concatenate([next(stream)["features"] for _ in range(2)])

    found = []
    for count in (1000, 3):
        few_at_a_time(monkeypatch, count)
        found.append(features())
    np.testing.assert_allclose(*found, atol=1e-5)
    assert len(np.unique(found[0][:, 0])) == 16


@pytest.mark.parametrize(
    "norm",
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
        ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)),  # CLIP
        ((0.5,), (0.5,)),
        ((0.45,), (0.225,)),  # TimeSformer
        ((0.0,), (1.0,)),
    ],
)
def test_no_program_sees_another_image(norm):
    """What is random for an image must not hang on the last bit of its normalised pixels."""
    mean, std = (np.array(values)[:, None] for values in norm)
    levels = jnp.asarray(((np.arange(256) / 255 - mean) / std), jnp.float32)
    shifted = levels[None] + np.array([-1e-5, 0, 1e-5], np.float32)[:, None, None]
    assert len({int(fingerprint(image)) for image in shifted}) == 1
    rng = np.random.default_rng(0)
    images = jnp.asarray(levels[0][rng.integers(0, 256, (50, 8, 8))])
    assert len({int(fingerprint(image)) for image in images}) == 50
    assert fingerprint(jnp.full(9, jnp.nan)) == fingerprint(jnp.zeros(9))
