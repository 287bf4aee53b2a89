"""Maps by every method: against PyTorch, on every kind of backbone, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import iared2_jax
from iared2_jax.attribution.attention_flow import flow
from iared2_jax.attribution.batched_forward import dense_logits
from iared2_jax.attribution.methods import METHODS, attribute
from iared2_jax.attribution.methods.lime import draw_rows, fit_segments
from iared2_jax.attribution.targets import class_logit
from iared2_jax.errors import UsageError
from iared2_jax.models.backbones.cait import CaiT
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.input_spec import clips, images
from iared2_jax.token_reduction.create import init_variables
from iared2_jax.token_reduction.model import IARed2
from tests import map_oracles
from tests.test_extension_pages import run_page
from tests.test_perturbation import HERE, PATCH, bright, planted

RULES = ("conserving", "plain")

# Of the largest value of a map. Ours are in float32, the oracle's in float64: relevance divides by
# sums that nearly cancel out, the more so the more layers it has passed (in float32 the oracle
# errs as much); the plain rules double what comes in at every layer, and lose as many digits.
TOLERANCE = {
    "transformer_attribution": 2e-4,
    "transformer_attribution_from_0": 5e-3,
    "partial_lrp_conserving": 5e-4,
    "partial_lrp_plain": 5e-4,
    "lrp_conserving": 2e-2,
    "lrp_plain": 4e-2,
}


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def assert_maps_agree(ours, theirs, names):
    for name in names:
        here, there = np.asarray(ours[name]), theirs[name]
        largest = max(np.abs(there).max(), 1e-6)  # a map may be 0
        error = np.abs(here - there).max() / largest
        assert error <= TOLERANCE.get(name, 1e-5), f"{name}: {error:.1e} of its largest value"


# -- Against the oracle.


def maps_by_oracles_names(module, variables, inputs, target):
    """Our maps, called what `map_oracles` calls them."""

    def by(method, **options):
        return METHODS[method](module, variables, inputs, **options)

    explained = functools.partial(by, target=target)
    return {
        "rollout": by("rollout"),
        "rollout_from_0": by("rollout", start_block=0),
        "gradcam": explained("gradcam"),
        "gradcam_tokens": explained("gradcam_tokens"),
        "grad_rollout": explained("grad_rollout"),
        "transformer_attribution": explained("transformer_attribution"),
        "transformer_attribution_from_0": explained("transformer_attribution", start_block=0),
        **{f"partial_lrp_{rules}": explained("partial_lrp", rules=rules) for rules in RULES},
        **{f"lrp_{rules}": explained("lrp", rules=rules) for rules in RULES},
    }


def with_the_oracles_weights(case, spec, folder):
    """Our ViT of a case, and its weights, read from a file as others write it."""
    backbone = ViT(spec, case.dim, case.depth, case.heads, num_classes=case.classes)
    module = IARed2(backbone, (1,) * case.depth, interpreter_heads=case.heads)
    save_file(map_oracles.case_weights(), folder / "case.safetensors")
    return module, iared2_jax.load_weights(module, folder / "case.safetensors")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    case = map_oracles.CASE
    spec = images(case.size, case.patch)
    return with_the_oracles_weights(case, spec, tmp_path_factory.mktemp("case"))


def compiled_maps(module):
    """`maps_by_oracles_names` of variables, inputs and classes."""
    return jax.jit(functools.partial(maps_by_oracles_names, module))


@pytest.fixture(scope="module")
def case_maps(case):
    """Our maps of the case's images, for any classes; compiled once."""
    module, variables = case
    return functools.partial(compiled_maps(module), variables, map_oracles.case_images())


@pytest.mark.parametrize("kind", ["predicted", "target"])
def test_maps_are_those_of_the_published_scripts(case_maps, kind):
    """The stored answers of an independent implementation, one image at a time, in float64."""
    theirs = map_oracles.stored()[kind]
    ours = case_maps(theirs["explained"])
    assert_maps_agree(ours, theirs, ours.keys() & theirs.keys())
    assert len(ours.keys() & theirs.keys()) == (9 if kind == "predicted" else 11)


def test_the_predicted_class_is_explained_where_none_is_asked_for(case):
    module, variables = case
    theirs = map_oracles.stored()["predicted"]
    inputs = map_oracles.case_images()
    ours = {"gradcam_tokens": attribute("gradcam_tokens", module, variables, inputs)}
    assert_maps_agree(ours, theirs, ours)
    logits = jnp.array([[0.0, 3.0, 2.0], [5.0, 1.0, 4.0]])
    assert class_logit(None)(logits).tolist() == [3, 5]
    assert class_logit(jnp.array([2, 1]))(logits).tolist() == [2, 1]


@pytest.mark.parity
def test_maps_are_the_live_oracles(tmp_path, monkeypatch):
    """Another depth, width and patch, pictures that are not square; classes predicted and given."""
    pytest.importorskip("torch")
    case = map_oracles.Case(dim=48, depth=2, heads=4, size=48, patch=8, classes=7, target=(2, 5))
    monkeypatch.setattr(map_oracles, "CASE", case)
    spec = images((32, 72), 8)  # 4 x 9 patches, as many as of 48 x 48 px
    module, variables = with_the_oracles_weights(case, spec, tmp_path)
    pixels = np.random.default_rng(5).normal(size=(3, *spec.shape)).astype(np.float32)
    weights, compiled = map_oracles.case_weights(), compiled_maps(module)
    for target in (None, [2, 5, 0]):
        theirs = map_oracles.torch_maps(weights, pixels, case.heads, case.patch, target)
        ours = compiled(variables, pixels, target and jnp.array(target))
        assert_maps_agree(ours, theirs, ours)


@pytest.mark.parity
def test_the_stored_answers_are_what_the_oracle_says_now():
    pytest.importorskip("torch")
    for key, value in map_oracles.case_answers().items():
        kind, name = key.split("/")
        np.testing.assert_allclose(value, map_oracles.stored()[kind][name], rtol=1e-5, atol=1e-7)


# -- Attention multiplied up, by hand.


def in_full(matrix, tokens):
    """I + A over CLS and patches, where the matrix may be of patches alone, or of CLS's query."""
    full = np.eye(tokens)
    first = tokens - matrix.shape[1] if matrix.shape[1] < tokens else 0
    full[first : first + matrix.shape[0], tokens - matrix.shape[1] :] += matrix
    return full


SPEC = images(16, 8)  # 4 patches
FLOWS = {
    "vit": (ViT(SPEC, 6, 2, 1), [(5, 5)] * 3),
    "distilled": (ViT(SPEC, 6, 2, 1, distilled=True), [(6, 6)] * 3),
    "cait": (CaiT(SPEC, 6, 2, 1, 1), [(4, 4), (4, 4), (1, 5)]),
}


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_flow_is_the_answers_row_of_the_product_of_whole_matrices(name, normalise):
    backbone, shapes = FLOWS[name]
    policy = "cls" if backbone.num_prefix else "learned"
    module = IARed2(backbone, (1, 1), policy, interpreter_heads=1)
    rng = np.random.default_rng(0)
    matrices = [rng.random((2, *shape)).astype(np.float32) for shape in shapes]
    prefix = max(1, backbone.num_prefix)  # CaiT's CLS comes at the end, but is a token
    for start_block in (0, 1, 2):
        found = flow(module, matrices, start_block=start_block, normalise=normalise)
        for index in range(2):
            product = np.eye(prefix + 4)
            for matrix in matrices[start_block:]:
                step = in_full(matrix[index], prefix + 4)
                product = (step / step.sum(axis=1, keepdims=True) if normalise else step) @ product
            answers = product[: 2 if name == "distilled" else 1]
            expected = answers.mean(axis=0)[prefix:]
            np.testing.assert_allclose(found[index], expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match=r"start_block must be in 0\.\.2, got 3"):
        flow(module, matrices, start_block=3)


# -- All methods, on every kind of backbone.

# One block: how blocks follow each other, the tests above show.
SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
BACKBONES = {
    "distilled, of clips": ViT(clips((8, 16), frames=2, patch=8), **SMALL, distilled=True),
    "cait": CaiT(images(16, 8), **SMALL, class_depth=1),
}
OPTIONS = {
    "interpreter": {"group": 1},
    "raw_attention": {"block": 0},
    "rollout": {"start_block": 0},
    "transformer_attribution": {"start_block": 0},
    "lime": {"samples": 8},
    "occlusion": {},
}
OF_PIXELS = ("lrp", "center")
NOT_NEGATIVE = (
    *("interpreter", "raw_attention", "rollout", "gradcam", "gradcam_tokens", "grad_rollout"),
    *("partial_lrp", "transformer_attribution", "random", "center"),
)


def model_of(backbone):
    """Weights so large that scores differ, and attention attends; CaiT's layer scale is 0.6."""
    policy = "cls" if backbone.num_prefix else "learned"
    module = IARed2(backbone, (1,), policy, interpreter_heads=3)

    def enlarged(path, x):
        return x + 0.6 if "gamma" in path[-1].key else 6 * x

    return module, jax.tree_util.tree_map_with_path(enlarged, init_variables(module))


def maps_of(module, names):
    """The maps by these methods, of variables and inputs."""

    def maps(variables, inputs):
        return {
            name: attribute(name, module, variables, inputs, **OPTIONS.get(name, {}))
            for name in names
        }

    return jax.jit(maps)


@pytest.fixture(scope="module", params=BACKBONES)
def every_map(request):
    """A module, inputs, and all their maps: of the inputs, and of them in the other order."""
    module, variables = model_of(BACKBONES[request.param])
    inputs = np.random.default_rng(0).normal(size=(2, *module.input_spec.shape)).astype(np.float32)
    compiled = maps_of(module, [name for name in METHODS if name != "memorability"])
    return module, inputs, compiled(variables, inputs), compiled(variables, inputs[::-1])


def test_every_method_gives_finite_values_per_patch_or_pixel(every_map):
    module, inputs, maps, _ = every_map
    for name, values in maps.items():
        pixels = name in OF_PIXELS
        expected = inputs.shape[:-1] if pixels else (2, module.input_spec.num_patches)
        assert values.shape == expected, name
        assert np.isfinite(values).all(), name
        # What GradCAM cuts off at 0 may be all of it.
        assert np.ptp(values[0]) > 0 or name.startswith("gradcam"), name
        if name in NOT_NEGATIVE:
            assert (values >= 0).all(), name


def test_a_map_does_not_depend_on_the_batch(every_map):
    """The published code explains one image at a time; here any number, each by itself."""
    *_, maps, swapped = every_map
    for name, values in maps.items():
        tolerance = 1e-4 * np.abs(values).max()
        np.testing.assert_allclose(values, swapped[name][::-1], rtol=0, atol=tolerance)
        if name != "center" and not name.startswith("gradcam"):
            assert not np.array_equal(values[0], values[1]), name


@pytest.fixture(scope="module")
def toy():
    """The page's backbone: no CLS in its blocks, no attention shown, layers of other kinds."""
    page = run_page("add_a_backbone.md", slice(0, 1))
    module = IARed2(page["Toy"](), (1, 1), "learned", interpreter_heads=3)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_variables(module))
    variables = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)
    return module, variables, rng.standard_normal((2, *module.input_spec.shape), np.float32)


WITHOUT = {
    "rollout": "Toy shows no attention weights",
    "gradcam": "Toy shows no attention weights",
    "grad_rollout": "Toy shows no attention weights",
    "gradcam_tokens": "Toy does not show what enters its attention",
    "partial_lrp": "relevance cannot be propagated through Toy",
    "lrp": "relevance cannot be propagated through Toy",
    "transformer_attribution": "relevance cannot be propagated through Toy",
    "memorability": "memorability needs a scorer",
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_a_backbone_does_not_show_is_said_in_a_sentence(toy, name):
    with pytest.raises(UsageError, match=WITHOUT[name]):
        attribute(name, *toy)


def test_all_other_maps_need_nothing_of_a_backbone(toy):
    module, variables, inputs = toy
    maps = maps_of(module, [name for name in METHODS if name not in WITHOUT])(variables, inputs)
    assert maps.keys() >= {"interpreter", "raw_attention", "lime", "occlusion"}
    for name, values in maps.items():
        assert np.isfinite(values).all(), name
        assert np.ptp(values[0]) > 0, name


def test_attention_without_cls_has_no_answer_to_follow(toy):
    """A user's backbone may show its attention, and have no token that the classifier reads."""
    from iared2_jax.attribution.attention_flow import require_attention

    with pytest.raises(UsageError, match="Toy has no CLS token"):
        require_attention(toy[0], [np.zeros((2, 1, 16, 16))])


class Sowing(ViT):
    """A backbone that has intermediates of its own."""

    def run_block(self, index, x, layout):
        self.sow("intermediates", "norms", jnp.linalg.norm(x, axis=-1))
        return super().run_block(index, x, layout)


def test_taps_are_not_confused_by_what_else_is_sown_or_checkpointed():
    module, variables = model_of(Sowing(images(16, 8), **SMALL))
    inputs = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    for model in (module, module.clone(remat=True)):
        for name in ("rollout", "grad_rollout"):
            how = functools.partial(METHODS[name], model, start_block=0)
            assert jax.eval_shape(how, variables, inputs).shape == (2, 4)


# -- What is covered.


@pytest.fixture(scope="module")
def reader():
    """A model that reads one patch, and two images in which it is bright."""
    return *planted(), bright(2)


def only(values, patch=PATCH):
    """All but this patch's are 0."""
    others = np.delete(np.asarray(values), patch, axis=1)
    np.testing.assert_allclose(others, np.zeros_like(others), atol=1e-6)
    return np.asarray(values)[:, patch]


def probabilities(reader, inputs):
    module, variables, _ = reader
    return np.asarray(jax.nn.softmax(dense_logits(module, variables, inputs)))


def test_occlusion_is_the_probability_that_is_lost(reader):
    *_, x = reader
    covered = x.copy()
    covered[:, *HERE] = -0.5
    whole, left = probabilities(reader, x), probabilities(reader, covered)
    lost = only(attribute("occlusion", *reader, fill=-0.5))
    np.testing.assert_allclose(lost, (whole - left)[:, 1], rtol=1e-5)
    # Of another class it is gained; the copies run in batches of any size.
    lost = only(attribute("occlusion", *reader, fill=-0.5, target=0, batch_size=5))
    np.testing.assert_allclose(lost, (whole - left)[:, 0], rtol=1e-5)


def test_a_window_covers_the_patches_around(reader):
    values = np.asarray(attribute("occlusion", *reader, window=3)).reshape(2, 4, 4)
    near = np.zeros((4, 4), bool)
    near[0:3, 1:4] = True  # around row 1, column 2
    assert (values[:, near] > 0.1).all()
    np.testing.assert_allclose(values[:, ~near], np.zeros((2, 7)), atol=1e-6)
    with pytest.raises(UsageError, match="window must be an odd number of patches, got 2"):
        attribute("occlusion", *reader, window=2)


def test_a_window_of_clips_covers_its_frame_alone():
    """Patch 6 of 2 x 2 x 2 frames is row 1, column 1 of frame 0."""
    module, variables = planted(clips(16, frames=2, patch=8))
    x = np.ones((1, 2, 16, 16, 3), np.float32)
    values = attribute("occlusion", module, variables, x, window=3)
    grid = np.asarray(module.input_spec.on_grid(values))[0]
    assert (grid[0] > 0.01).all()  # every window of the frame covers it
    np.testing.assert_allclose(grid[1], np.zeros((2, 2)), atol=1e-6)


# -- LIME.


fitted = jax.jit(fit_segments)


def lime_weights(rows):
    """As the `lime` package weights samples: by their cosine distance to the first."""
    x = rows.astype(float)
    norms = np.linalg.norm(x, axis=1)
    cosine = np.divide(x @ x[0], norms * norms[0], out=np.zeros(len(x)), where=norms > 0)
    return np.sqrt(np.exp(-((1 - cosine) ** 2) / 0.25**2))


def test_lime_fits_a_weighted_ridge_regression():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    rows = np.array(draw_rows(jax.random.key(0), 100, 16))
    rows[5] = False  # nothing is shown
    y = (rows @ rng.normal(size=16) + rng.normal(size=100)).astype(np.float32)
    weights = lime_weights(rows)
    ridge = Ridge(alpha=1, fit_intercept=True).fit(rows.astype(float), y, sample_weight=weights)
    np.testing.assert_allclose(fitted(rows, y), ridge.coef_, atol=1e-5)


def test_samples_show_half_of_the_segments_and_the_first_all():
    rows = np.asarray(draw_rows(jax.random.key(1), 100, 16))
    assert rows[0].all()
    assert abs(rows[1:].mean() - 0.5) < 0.05


def test_lime_finds_the_patch_that_is_read(reader):
    values = np.asarray(attribute("lime", *reader, samples=100, fill=-1.0))
    assert (values.argmax(axis=1) == PATCH).all()
    assert np.abs(np.delete(values, PATCH, axis=1)).max() < 0.1 * values[:, PATCH].min()
    # What it loses, another class gains.
    other = np.asarray(attribute("lime", *reader, samples=100, fill=-1.0, target=[0, 1]))
    assert other[0, PATCH] < 0 < other[1, PATCH]
    # By its mean colour nothing is lost of what this model reads.
    even = attribute("lime", *reader, samples=100)
    np.testing.assert_allclose(even, np.zeros((2, 16)), atol=1e-5)


def patch_numbers():
    """The patches as segments, numbered otherwise."""
    numbers = 3 * np.arange(16)[::-1].reshape(4, 4) - 7
    return numbers.repeat(8, axis=0).repeat(8, axis=1)


def test_segments_may_be_given_or_found_by_a_function(reader):
    how = {"samples": 100, "fill": -1.0}
    of_patches = attribute("lime", *reader, **how)
    given = np.broadcast_to(patch_numbers(), (2, 32, 32))
    seen = []

    def found(image):
        seen.append(image)
        return patch_numbers()

    by_array, by_function = (
        np.asarray(attribute("lime", *reader, **how, segments=s)) for s in (given, found)
    )
    np.testing.assert_array_equal(by_array, by_function)
    assert by_array.shape == (2, 32, 32)  # per pixel, the same in all of a segment
    per_patch = by_array.reshape(2, 4, 8, 4, 8)
    assert (per_patch == per_patch[:, :, :1, :, :1]).all()
    # Other segments are left out by the same rows, but the same patch is found.
    values = per_patch[:, :, 0, :, 0].reshape(2, 16)
    assert (values.argmax(axis=1) == of_patches.argmax(axis=1)).all()
    # A function sees the picture in [0, 1], as skimage's take it.
    np.testing.assert_allclose(seen[0], reader[2][0] * 0.5 + 0.5, atol=1e-6)


def test_an_image_may_have_fewer_segments_than_another(reader):
    """As if it were alone, with its own number of columns."""
    module, variables, x = reader
    few = np.zeros((32, 32), int)
    few[HERE] = 1
    segments = np.stack([few, patch_numbers()])
    how = {"samples": 100, "fill": -1.0}
    values = np.asarray(attribute("lime", module, variables, x, segments=segments, **how))
    inside, outside = values[0][HERE], values[0][:8]
    assert np.ptp(inside) == np.ptp(outside) == 0
    # The first two columns of the rows that were drawn are this image's.
    rows = np.asarray(draw_rows(jax.random.key(0), 100, 16))[:, :2]
    covered = x[:1].copy()
    covered[:, *HERE] = -1
    shown, hidden = (probabilities(reader, image)[0, 1] for image in (x[:1], covered))
    expected = fitted(rows, np.where(rows[:, 1], shown, hidden))
    np.testing.assert_allclose([outside[0, 0], inside[0, 0]], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"segments": "slic"}, """must be "patches", integers or a function, got 'slic'"""),
        ({"segments": np.zeros((2, 16), int)}, r"integers \[2, 32, 32\], got int64 \[2, 16\]"),
        ({"segments": lambda image: np.zeros((32, 32))}, r"integers \[2, 32, 32\], got float64"),
        ({"segments": lambda image: np.zeros((4, 4), int)}, r"integers .* got int64 \[2, 4, 4\]"),
        ({"samples": 1}, "at least 2 samples, got 1"),
    ],
)
def test_lime_is_refused_in_words(reader, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        attribute("lime", *reader, **options)


@pytest.mark.parity
def test_lime_is_the_lime_packages(reader):
    """The same segments, and rows as the package has drawn them: the same weights."""
    lime_image = pytest.importorskip("lime.lime_image")
    module, variables, x = reader
    spec = module.input_spec
    pixels = (np.asarray(x[0], float) + 1) / 2

    def classify(pictures):
        return probabilities(reader, spec.normalize(jnp.asarray(255 * pictures)))

    drawn = []

    class Recorded(lime_image.LimeImageExplainer):
        def data_labels(self, *args, **options):
            drawn.append(super().data_labels(*args, **options))
            return drawn[-1]

    explainer = Recorded(random_state=0)
    theirs = explainer.explain_instance(
        pixels, classify, labels=(1,), top_labels=None, hide_color=0, num_samples=100,
        segmentation_fn=lambda image: np.arange(16).reshape(4, 4).repeat(8, 0).repeat(8, 1),
    )  # fmt: skip
    theirs = np.array([weight for _, weight in sorted(theirs.local_exp[1])])
    ((rows, answers),) = drawn
    ours = fitted(rows.astype(bool), answers[:, 1].astype(np.float32))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # Rows of our own say the same, but for chance.
    own = attribute("lime", module, variables, x[:1], samples=400, fill=-1.0)
    np.testing.assert_allclose(own[0], theirs, atol=0.1 * np.abs(theirs).max())


# -- Maps from elsewhere, and those that know nothing.


def test_memorability_is_the_mean_score_of_the_windows_that_cover_a_pixel(reader):
    module, variables, x = reader
    found = attribute(
        "memorability", module, variables, x, scorer=lambda w: w.mean(axis=(1, 2, 3)),
        window=12, stride=8,
    )  # fmt: skip
    total, count = np.zeros((2, 32, 32)), np.zeros((32, 32))
    for top in (0, 8, 16, 20):  # the last windows touch the border
        for left in (0, 8, 16, 20):
            window = np.s_[top : top + 12, left : left + 12]
            total[:, *window] += x[:, *window].mean(axis=(1, 2, 3))[:, None, None]
            count[window] += 1
    np.testing.assert_allclose(found, total / count, atol=1e-5)


def test_memorability_takes_maps_as_they_are(reader):
    maps = np.random.default_rng(0).random((2, 32, 32), np.float32)
    np.testing.assert_array_equal(attribute("memorability", *reader, maps=maps), maps)


def brightness(windows):
    return windows.mean(axis=(1, 2, 3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "needs a scorer"),
        ({"scorer": brightness, "maps": np.zeros((2, 32, 32))}, "needs a scorer"),
        ({"maps": np.zeros((2, 4, 4))}, r"maps must be \[2, 32, 32\], got \[2, 4, 4\]"),
        ({"scorer": brightness, "window": 64}, "window=64 and stride=32 px do not fit"),
        ({"scorer": lambda windows: windows}, "scorer must give 2 numbers for 2 windows"),
    ],
)
def test_memorability_is_refused_in_words(reader, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        attribute("memorability", *reader, **options)


def test_memorability_is_of_images():
    module, variables = planted(clips(16, frames=2, patch=8))
    x = np.zeros((1, 2, 16, 16, 3), np.float32)
    with pytest.raises(UsageError, match="memorability is of images"):
        attribute("memorability", module, variables, x, scorer=brightness)


def test_random_is_drawn_from_the_image_and_the_seed(reader):
    module, variables, x = reader
    values = np.asarray(attribute("random", module, variables, x))
    np.testing.assert_array_equal(attribute("random", module, variables, x[::-1]), values[::-1])
    np.testing.assert_array_equal(attribute("random", module, variables, x[1:]), values[1:2])
    assert not np.array_equal(values[0], values[1])
    other = attribute("random", module, variables, x, seed=1)
    assert not np.array_equal(other, values)
    assert ((values >= 0) & (values < 1)).all()


def test_center_falls_with_the_distance_from_the_middle():
    module, variables = planted(images((16, 48), 8))
    (found,) = np.asarray(attribute("center", module, variables, np.zeros((1, 16, 48, 3), "f")))
    y, x = np.mgrid[:16, :48] + 0.5
    distance = np.hypot(y - 8, x - 24)
    np.testing.assert_allclose(found, 1 - distance / distance.max(), atol=1e-6)


# -- What is refused.


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("gradcm", {}, r"no attribution method 'gradcm' \(did you mean 'gradcam'"),
        ("occlusion", {"windw": 3}, r"occlusion has no option 'windw' \(did you mean 'window'"),
        ("occlusion", {"target": 3}, r"target=3, but the model has classes 0\.\.2"),
        ("occlusion", {"target": [0, -1]}, r"target=-1, but the model has classes 0\.\.2"),
        ("occlusion", {"target": [0, 1, 2]}, "a class, or one for each of the 2 images"),
        ("occlusion", {"target": [[0], [1]]}, "a class, or one for each of the 2 images"),
        ("occlusion", {"target": 0.5}, "a class, or one for each of the 2 images, got 0.5"),
        ("occlusion", {"target": "cat"}, "a class, or one for each of the 2 images, got 'cat'"),
        ("random", {"target": 1}, "random explains no class: leave target out"),
        ("interpreter", {"target": 1}, "interpreter explains no class"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_words(reader, method, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        attribute(method, *reader, **options)


@pytest.mark.parametrize("made", [np.zeros(2), np.zeros((2, 15)), [0.5, 1], None, "map"])
def test_a_users_function_must_give_a_map(reader, made):
    def mine(module, variables, inputs):
        return made

    with pytest.raises(
        UsageError, match=r"mine must give a value per patch \[2, 16\] or per pixel"
    ):
        iared2_jax.explain(*reader, method=mine)
    with pytest.raises(UsageError, match="the method must give a value per patch"):
        attribute(functools.partial(mine), *reader)


def test_one_class_or_one_for_each_image(reader):
    """A number, a list of one, an array: the same class for all; else each image's own."""
    both = [np.asarray(attribute("occlusion", *reader, target=t)) for t in (0, 1)]
    for target in ([1], np.array([1, 1], np.uint8), jnp.array(1)):
        found = attribute("occlusion", *reader, target=target)
        np.testing.assert_array_equal(found, both[1])
    own = attribute("occlusion", *reader, target=[0, 1])
    np.testing.assert_array_equal(own, [both[0][0], both[1][1]])


@pytest.mark.parametrize("rules", ["conserve", "plane"])
def test_there_are_two_sets_of_rules(case, rules):
    module, variables = case
    inputs = map_oracles.case_images()
    for method in ("lrp", "partial_lrp"):
        with pytest.raises(UsageError, match=f"there are no rules '{rules}' "):
            attribute(method, module, variables, inputs, rules=rules)
