"""Every map of the same images, by every protocol; agreement, sanity checks, and the figures."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from iared2_jax.attribution.batched_forward import dense_logits
from iared2_jax.attribution.maps import to_heatmaps
from iared2_jax.attribution.methods import METHODS, attribute
from iared2_jax.attribution.methods.interpreter import masked_pass
from iared2_jax.attribution.segmentation import METRICS, measure, summarise
from iared2_jax.data.inputs import is_traced
from iared2_jax.errors import Interrupted, UsageError
from iared2_jax.evaluation import map_sources as map_sources_module
from iared2_jax.evaluation.agreement import SHOWN, answers_when_shown
from iared2_jax.evaluation.compare_maps import check_sanity, compare_maps
from iared2_jax.evaluation.map_sources import MapSource, map_sources
from iared2_jax.evaluation.perturbation import perturb
from iared2_jax.evaluation.sanity import fit_random_labels, rank_correlation
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.input_spec import HALF_NORM, images
from iared2_jax.report import figures as figures_module
from iared2_jax.report.figures import draw_curves, draw_maps
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import first_in_order, random_order
from tests.test_perturbation import HERE, PATCH, planted

N = 10


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_maps_of_one_pass_are_computed_once(monkeypatch):
    """All blocks' attention comes from one forward pass; other inputs are another one."""
    module, passes = create_module("vit_micro", num_classes=10), []
    attention = map_sources_module.attention_of_blocks

    def counted(module, variables, inputs):
        passes.append(inputs)
        return attention(module, variables, inputs)

    monkeypatch.setattr(map_sources_module, "attention_of_blocks", counted)
    sources = map_sources(module, ["raw_attention"])
    variables = init_variables(module, 0)
    one, other = jax.random.normal(jax.random.key(0), (2, 2, *module.input_spec.shape))
    classes = jnp.zeros(2, int)
    del passes[:]  # of the shapes
    for inputs in (one, other, one):
        for block in range(6):
            found = sources[f"raw_attention_block_{block}"](variables, inputs, classes)
            np.testing.assert_array_equal(found, attention(module, variables, inputs)[block])
    assert [x is y for x, y in zip(passes, (one, other, one), strict=True)] == [True] * 3


# -- Rank correlation.


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 5, 4, 6)).round(1)  # with ties
    other[0], other[1] = np.exp(one[0]), -(one[1] ** 3)
    expected = [
        scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic
        for a, b in zip(one, other, strict=True)
    ]
    found = rank_correlation(one, other)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found[:2], [1, -1])


def test_a_constant_map_correlates_with_nothing():
    maps = np.random.default_rng(0).normal(size=(2, 9))
    maps[0] = 3
    np.testing.assert_allclose(rank_correlation(maps, maps), [0, 1])


# -- A model of which everything is known: it reads one patch.


@pytest.fixture(scope="module")
def reader():
    return planted()


def scenes(count=N):
    """Grey noise; the patch that is read is bright in the first half, and dark in the others.

    Returns:
      Pixels, labels (what the model says), masks (that patch).
    """
    pixels = np.random.default_rng(0).integers(100, 156, (count, 32, 32, 3), np.uint8)
    labels = (np.arange(count) < count // 2).astype(np.int64)
    pixels[:, *HERE] = np.where(labels, 255, 0)[:, None, None, None]
    masks = np.zeros((count, 32, 32), bool)
    masks[:, *HERE] = True
    return pixels, labels, masks


def marked(variables, inputs, target):
    """The patch that is read."""
    return jnp.zeros((len(inputs), 16)).at[:, PATCH].set(1)


def brightness(variables, inputs, target):
    return inputs.mean(axis=-1)


def sources_for(module):
    """Two that know nothing of the model, and one of each kind that the library makes."""
    made = {"marked": MapSource(marked), "brightness": MapSource(brightness)}
    return {**made, **map_sources(module, ("random", "center"))}


@pytest.fixture(scope="module")
def compared(reader):
    module, variables = reader
    pixels, labels, masks = scenes()
    compare = functools.partial(
        compare_maps, module, variables, pixels, labels=labels, masks=masks, keep=3
    )
    sources = sources_for(module)
    return {
        4: compare(sources=sources, batch_size=4, sanity=False),
        10: compare(sources=sources, batch_size=10),
    }


def test_padding_changes_no_figure(compared):
    """Ten images by fours are twelve rows."""
    padded, whole = compared[4], compared[10]
    assert padded.keys() == {"segmentation", "perturbation", "left_out", "values"}
    for part in padded:
        (here, structure), (there, other) = map(jax.tree.flatten, (padded[part], whole[part]))
        assert structure == other
        for a, b in zip(here, there, strict=True):
            assert a == b if isinstance(a, str) else np.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_results_have_what_is_promised(compared):
    found = compared[10]
    maps = {"marked", "brightness", "random", "center"}
    assert found.keys() == {"segmentation", "perturbation", "sanity", "left_out", "values"}
    assert found["left_out"] == {}
    assert found["segmentation"].keys() == maps | {"all_background"}
    for figures in found["segmentation"].values():
        assert {*METRICS, "interval", "predicted_share", "chance_iou"} <= figures.keys()
        assert {"pixel_accuracy", "mean_accuracy", "mean_iou", "average_precision", "best_iou"} == {
            *figures["interval"]
        }
        for name, (low, high) in figures["interval"].items():
            assert low - 1e-9 <= figures[name] <= high + 1e-9
    areas = {"positive_auc", "negative_auc", "deletion_auc", "insertion_auc"}
    assert found["perturbation"].keys() == maps
    for figures in found["perturbation"].values():
        assert areas == figures["interval"].keys()
        assert figures["read"] == "accuracy"
        for name, (low, high) in figures["interval"].items():
            assert low - 1e-6 <= figures[name] <= high + 1e-6
    assert found["sanity"].keys() == maps
    assert {name: len(kept) for name, kept in found["values"].items()} == dict.fromkeys(maps, 3)
    # It is written as JSON.
    written = {k: v for k, v in found.items() if k != "values"}
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_the_map_of_what_is_read_is_the_best(compared):
    found = compared[10]
    for protocol, metric, best in (
        ("segmentation", "best_iou", max),
        ("segmentation", "average_precision", max),
        ("perturbation", "positive_auc", min),
        ("perturbation", "negative_auc", max),
    ):
        maps = {name: figures[metric] for name, figures in found[protocol].items()}
        assert best(maps, key=maps.get) == "marked", metric
    # Bright scenes are taken for dark ones, and so wrong, at once; dark ones stay right.
    curves = found["perturbation"]["marked"]["curves"]
    np.testing.assert_allclose(curves["positive"]["accuracy"], [1] + [0.5] * 10)
    np.testing.assert_allclose(curves["negative"]["accuracy"], [1] * 10 + [0.5])


def test_figures_are_those_of_the_protocols(compared, reader):
    module, variables = reader
    pixels, labels, masks = scenes()
    found, inputs = compared[10], module.input_spec.normalize(pixels)
    heatmaps = np.asarray(to_heatmaps(marked(variables, inputs, None), module.input_spec))
    np.testing.assert_array_equal(found["values"]["marked"], marked(variables, inputs[:3], None))
    assert found["segmentation"]["marked"] == summarise(measure(heatmaps, masks))
    share = 1 / 16
    nothing = found["segmentation"]["all_background"]
    assert nothing["pixel_accuracy"] == pytest.approx(1 - share)
    assert (nothing["mean_accuracy"], nothing["mean_iou"]) == pytest.approx((0.5, (1 - share) / 2))
    curves = perturb(module, variables, inputs, jnp.asarray(heatmaps), labels)
    for order, of in found["perturbation"]["marked"]["curves"].items():
        np.testing.assert_allclose(of["accuracy"], curves[order].correct.mean(axis=0), rtol=1e-6)
        expected = curves[order].probability.mean(axis=0)
        np.testing.assert_allclose(of["probability"], expected, rtol=1e-5)


def test_only_what_is_asked_for_is_measured(reader, monkeypatch):
    module, variables = reader
    pixels, _, masks = scenes(4)
    compare = functools.partial(compare_maps, module, variables, pixels, batch_size=4)
    sources = {"marked": MapSource(marked)}
    with monkeypatch.context() as patch:
        patch.setattr("iared2_jax.evaluation.compare_maps.ends_of", lambda *_: pytest.fail("asked"))
        found = compare(sources=sources, masks=masks, perturbation=False, sanity=False)
    assert found.keys() == {"left_out", "segmentation"}
    found = compare(sources=sources, sanity=False)
    assert found.keys() == {"left_out", "perturbation"}
    assert found["perturbation"]["marked"]["read"] == "agreement"


def test_the_label_may_be_explained_in_the_place_of_the_prediction(reader):
    module, variables = reader
    pixels, labels, _ = scenes(4)
    asked = []

    def note(variables, inputs, target):
        if not is_traced(target):  # what is tried first, on nothing
            asked.append(np.asarray(target))
        return marked(variables, inputs, target)

    found = {}
    for explained in ("predicted", "label"):
        found[explained] = compare_maps(
            module, variables, pixels, labels=1 - labels, explained=explained, sanity=False,
            sources={"m": MapSource(note, explains_class=True)}, batch_size=4,
        )["perturbation"]["m"]["curves"]["positive"]  # fmt: skip
    for explained in found:
        compare_maps(
            module, variables, pixels, labels=1 - labels, explained=explained, sanity=False,
            sources={"m": MapSource(note, explains_class=True)}, batch_size=4, perturbation=False,
        )  # fmt: skip
    np.testing.assert_array_equal(asked, [labels, 1 - labels, labels, 1 - labels])
    first = [found[explained]["probability"][0] for explained in found]
    np.testing.assert_allclose(first, [1, 0], atol=0.05)
    for curves in found.values():  # the accuracy is that of the labels, whatever is explained
        assert curves["accuracy"][0] == 0


# -- Sanity checks.


def test_shuffled_labels_are_learned_by_heart(reader):
    """By the backbone alone; the labels are the same, for other images."""
    module, variables = reader
    pixels, labels, _ = scenes(6)
    inputs = module.input_spec.normalize(pixels)
    shuffled = np.random.default_rng(3).permutation(labels)
    assert 0 < (shuffled == labels).sum() < 6
    ways = {"learning_rate": 0.5, "most_steps": 1, "seed": 3}
    found, accuracy = fit_random_labels(module, variables, inputs, labels, **ways)
    assert accuracy == pytest.approx((shuffled == labels).mean())  # before the step
    # One step of Adam is as long as the learning rate: down, as most labels are the wrong ones.
    gain = found["params"]["backbone"]["head"]
    np.testing.assert_allclose(gain, variables["params"]["backbone"]["head"] - 0.5, rtol=1e-5)
    assert found["params"]["interpreter_1"] is variables["params"]["interpreter_1"]
    # What it knows already needs no step: these are the weights whose accuracy is told.
    bright = inputs[:3]
    found, accuracy = fit_random_labels(module, variables, bright, np.ones(3, int), enough=1)
    assert accuracy == 1
    gain = found["params"]["backbone"]["head"]
    np.testing.assert_array_equal(gain, variables["params"]["backbone"]["head"])


def test_sanity_checks_say_what_a_map_depends_on(reader):
    """The same map for other weights, or for another class: then it explains neither."""
    module, variables = reader
    asked, seen = [], []

    def of_interpreter(variables, inputs, target):
        kernel = variables["params"]["interpreter_1"]["k"]["kernel"]
        return jnp.broadcast_to(kernel[:16, 0], (len(inputs), 16))

    def of_backbone(variables, inputs, target):
        gain = variables["params"]["backbone"]["head"]
        seen.append(len(inputs))
        return jnp.where(gain == 4, 1, -1) * jnp.broadcast_to(jnp.arange(16.0), (len(inputs), 16))

    def of_class(variables, inputs, target):
        asked.append(target)
        sign = jnp.where(target == 1, 1, -1)[:, None]
        return sign * jnp.arange(16.0)

    sources = {
        "marked": MapSource(marked),
        "scores": MapSource(of_interpreter),
        "backbone": MapSource(of_backbone, many_passes=True),
        "class": MapSource(of_class, explains_class=True),
    }
    inputs = module.input_spec.normalize(scenes(6)[0])
    classes, counted = jnp.array([1, 0, 1, 0, 1, 2]), np.arange(6) < 5
    both = {"trained": variables, "original": variables}
    values = {name: source(variables, inputs, classes) for name, source in sources.items()}
    seen.clear()
    check = functools.partial(check_sanity, module, both, inputs, classes, sources, values, counted)
    found = check(np.array([1, 0, 1, 0, 0, 0]))
    assert found["marked"] == pytest.approx({"random_weights": 1, "random_labels": 1})
    assert abs(found["scores"]["random_weights"]) < 0.7
    assert found["scores"]["random_labels"] == pytest.approx(1)  # the interpreters stay
    # Its weights start at 4 everywhere, drawn anew or not; learning moves them.
    assert found["backbone"] == pytest.approx({"random_weights": 1, "random_labels": -1})
    assert seen == [4] * 2  # what costs many passes is asked of a few images
    # Classes 1 and 0 have opposite maps; so have the next ones, 2 and 1.
    assert found["class"]["other_class"] == pytest.approx(-1)
    np.testing.assert_array_equal(asked[-1], [2, 1, 2, 1, 2, 0])
    without = check(None)
    assert without["marked"].keys() == {"random_weights"}


# -- What cannot be measured.


def test_nonsense_is_refused_in_words(reader):
    module, variables = reader
    pixels, _, masks = scenes(4)
    compare = functools.partial(
        compare_maps, module, variables, pixels, batch_size=4, sanity=False, perturbation=False
    )
    with pytest.raises(UsageError, match="none of the masks has any foreground"):
        compare(masks=np.zeros_like(masks), sources={})
    nowhere = {"lost": MapSource(lambda variables, x, target: jnp.full((len(x), 16), jnp.nan))}
    with pytest.raises(UsageError, match="the map 'lost' is NaN everywhere on an image"):
        compare(masks=masks, sources=nowhere)
    with pytest.raises(UsageError, match=r"no replacement 'grey'; there is black, blur, mean"):
        compare(sources={"m": MapSource(marked)}, perturbation=True, replacement="grey")
    for explained in ("label", "truth"):
        with pytest.raises(UsageError, match=f"explained='{explained}' must be predicted, or"):
            compare(masks=masks, sources={}, explained=explained)
    with pytest.raises(UsageError, match=r"no attribution method 'gradcm'"):
        map_sources(module, ("gradcm",))
    with pytest.raises(UsageError, match=r"lime has no option 'sampels'"):
        map_sources(module, ("lime",), options={"lime": {"sampels": 10}})


def test_a_stopped_comparison_writes_nothing(reader):
    stop = Stop()
    stop.request()
    pixels, _, _ = scenes(4)
    with pytest.raises(Interrupted):
        compare_maps(*reader, pixels, sources={"marked": MapSource(marked)}, stop=stop)


def test_maps_that_a_model_cannot_have_are_left_out_with_the_reason(reader):
    module, variables = reader
    pixels, _, masks = scenes(4)
    methods = ("raw_attention", "gradcam", "lrp", "random", "memorability")
    found = compare_maps(
        module, variables, pixels, masks=masks, sources=map_sources(module, methods),
        perturbation=False, sanity=False, batch_size=4,
    )  # fmt: skip
    assert found["segmentation"].keys() == {"random", "all_background"}
    assert found["left_out"].keys() == {"raw_attention", "gradcam", "lrp", "memorability"}
    assert "Planted shows no attention weights" in found["left_out"]["gradcam"]


# -- A model as it is used: with interpreters, attention, and what it was before.


@pytest.fixture(scope="module")
def micro():
    """A small ViT of two groups: trained variables, and those before."""
    spec = images(32, 8, norm=HALF_NORM)
    module = IARed2(ViT(spec, 24, 2, 3, 2, num_classes=5), (1, 1), interpreter_heads=3)
    return module, *(jax.tree.map(lambda x: 6 * x, init_variables(module, seed)) for seed in (0, 1))


def test_sources_are_named_by_group_and_by_block(micro):
    module, *_ = micro
    sources = map_sources(module)
    groups, blocks = ["group_1", "group_2"], ["raw_attention_block_0", "raw_attention_block_1"]
    others = set(METHODS) - {"interpreter", "raw_attention", "memorability"}
    assert list(sources)[:4] == groups + blocks
    assert set(sources) == {*groups, *blocks, *others}
    assert {name for name, source in sources.items() if source.of == "trained"} == set(groups)
    explain_a_class = {name for name, source in sources.items() if source.explains_class}
    assert explain_a_class == others - {"rollout", "random", "center"}
    options = {"memorability": {"scorer": len}}
    assert "memorability" in map_sources(module, options=options)
    assert list(map_sources(module, ("random", "interpreter"))) == ["random", *groups]


def test_interpreters_are_the_trained_models_and_all_else_the_one_before(micro):
    module, trained, original = micro
    pixels, labels, masks = scenes(4)
    sources = map_sources(module, ("interpreter", "raw_attention", "gradcam_tokens"))
    found = compare_maps(
        module, trained, pixels, original=original, labels=labels, masks=masks,
        sources=sources, sanity=False, keep=4, batch_size=4,
    )  # fmt: skip
    inputs = module.input_spec.normalize(pixels)
    answers = dense_logits(module, original, inputs).argmax(axis=-1)
    scores = masked_pass(module, trained, inputs, 0.5).scores
    assert np.abs(scores[0] - masked_pass(module, original, inputs, 0.5).scores[0]).max() > 0.01
    expected = {
        "group_1": scores[0],
        "group_2": scores[1],
        "raw_attention_block_1": attribute("raw_attention", module, original, inputs, block=1),
        "gradcam_tokens": attribute("gradcam_tokens", module, original, inputs, target=answers),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found["values"][name], values, rtol=1e-4, atol=1e-6)
    # All are judged by the backbone before: what it says of whole images is every curve's start.
    for figures in found["perturbation"].values():
        start = figures["curves"]["positive"]["accuracy"][0]
        assert start == pytest.approx((answers == labels).mean())


def test_the_network_is_asked_with_what_it_kept_and_with_as_many_others(micro):
    module, variables, _ = micro
    inputs = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)

    @jax.jit
    def forced(variables, inputs, patches):
        """The same patches from the first block to the last."""
        return module.apply(variables, inputs, keep=[patches] * 2)[0]

    apply, key = jax.jit(module.apply), jax.random.key(0)
    thresholds = np.median(np.array(apply(variables, inputs, np.full(2, 0.5))[1].scores), (1, 2))
    trained, out = apply(variables, inputs, thresholds)
    kept = np.asarray(out.keep[-1])
    counts = kept.sum(axis=1)
    assert 0 < kept.sum() < np.asarray(out.keep[0]).sum() < kept.size
    shown = answers_when_shown(module, variables, inputs, key, thresholds)
    others = np.asarray(first_in_order(random_order(key, jnp.asarray(inputs), 16), counts))
    np.testing.assert_array_equal(others.sum(axis=1), counts)  # as many of each image
    expected = {
        "as_trained": trained,
        "kept_from_the_start": forced(variables, inputs, kept),
        "dropped_from_the_start": forced(variables, inputs, ~kept),
        "random_from_the_start": forced(variables, inputs, others),
    }
    assert set(shown) == set(SHOWN) == set(expected)
    for name, logits in expected.items():
        np.testing.assert_allclose(shown[name], logits, rtol=1e-4, atol=1e-5)
    for name in SHOWN[1:]:
        assert np.abs(shown["as_trained"] - shown[name]).max() > 1e-3
    # In another batch an image is shown the same patches.
    turned = answers_when_shown(module, variables, inputs[::-1], key, thresholds)
    for name in SHOWN:
        np.testing.assert_allclose(turned[name][::-1], shown[name], rtol=1e-4, atol=1e-5)
    # As trained can be a fixed budget, too.
    budget = (0.5, 0.25)
    under_it = answers_when_shown(module, variables, inputs, key, keep_ratios=budget)
    expected, out = module.apply(variables, inputs, keep_ratios=budget)
    np.testing.assert_allclose(under_it["as_trained"], expected, rtol=1e-4, atol=1e-5)
    alone = forced(variables, inputs, out.keep[-1])
    np.testing.assert_allclose(under_it["kept_from_the_start"], alone, rtol=1e-4, atol=1e-5)


# -- Figures.


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_maps_and_curves_are_drawn(compared, tmp_path, suffix):
    pixels, *_ = scenes(3)
    found, spec = compared[10], images(32, 8)
    maps = {name: to_heatmaps(values, spec) for name, values in found["values"].items()}
    for path in (
        draw_maps(spec, pixels, maps, tmp_path / f"new/maps.{suffix}"),
        draw_curves(found, tmp_path / f"curves.{suffix}"),
    ):
        if suffix == "pdf":
            assert path.read_bytes().startswith(b"%PDF")
        else:
            assert np.asarray(Image.open(path).convert("RGB")).std() > 10  # something is drawn


def test_maps_of_clips_are_drawn_frame_by_frame(tmp_path):
    from iared2_jax.models.input_spec import clips

    spec = clips((16, 24), frames=2, patch=8, channels=1, norm=((0.5,), (0.5,)))
    pixels = np.zeros((1, *spec.shape), np.uint8)
    maps = {"a_map_with_a_long_name": np.random.default_rng(0).random((1, 2, 16, 24), np.float32)}
    with Image.open(draw_maps(spec, pixels, maps, tmp_path / "maps.png")) as picture:
        assert picture.width > 2 * picture.height


def test_kept_patches_are_as_they_were_and_dropped_ones_can_be_seen():
    """A photograph keeps its colours; on a black ground, grey shows what is dropped."""
    spec = images(8, 4)
    grid = np.array([[True, False], [False, True]])
    for brightness in (200, 0):
        picture = np.full((8, 8, 3), brightness, np.uint8)
        picture[0, 0] = 255
        lit = figures_module._lit(picture, grid, spec)
        assert lit[:4, :4].mean() > 2 * lit[:4, 4:].mean() > 0
        np.testing.assert_allclose(lit[0, 0], 1)
        if brightness:
            np.testing.assert_allclose(lit[4:, 4:], brightness / 255)
