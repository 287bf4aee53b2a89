"""The report's page: what it says, and in Chromium what it does."""

import base64
import dataclasses
import json
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from iared2_jax import load_model
from iared2_jax.data import cluttered_mnist
from iared2_jax.report import explorer as explorer_file
from iared2_jax.report.explorer import THRESHOLDS, collect_images, costs_of, slider
from iared2_jax.report.page import PAGE, write_again, write_explanations, write_page
from iared2_jax.token_reduction.create import create_module
from iared2_jax.token_reduction.flops import count_flops

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1280,1000",
)

NASTY = "</script><b>&"
CLASSES = (NASTY, "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OWN = (0.55, 0.5, 0.45)  # on no stop of the slider
IMAGES = 20


def spread(variables, factor=8.0):
    """The variables with interpreters whose scores are all over (0, 1)."""
    params = {
        name: jax.tree.map(lambda x: factor * x, part) if name.startswith("interpreter") else part
        for name, part in variables["params"].items()
    }
    return {"params": params}


@pytest.fixture(scope="module")
def model():
    module, variables = load_model("vit_micro")
    return module, spread(variables), variables


@pytest.fixture(scope="module")
def scenes():
    pixels, labels = cluttered_mnist.load("test", IMAGES)[:2]
    labels = labels.copy()
    labels[:3] = (labels[:3] + 1) % 10  # some that the dense model gets wrong, too
    return pixels, labels


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(IMAGES, 64)).astype(np.float32)
    return {f"patches {NASTY}": patches, "heatmap": rng.random((IMAGES, 64, 64), np.float32)}


@pytest.fixture(scope="module")
def explorer(model, scenes, maps):
    module, trained, original = model
    pixels, labels = scenes
    return collect_images(
        module,
        trained,
        original,
        pixels,
        labels=labels,
        class_names=CLASSES,
        names=[f"scene {i} {NASTY if i == 4 else ''}" for i in range(IMAGES)],
        thresholds=OWN,
        maps=maps,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def at(model, scenes):
    """What masked execution does at some thresholds: logits, masks and scores [B, D, N]."""
    module, trained, _ = model
    inputs = module.input_spec.normalize(scenes[0])
    apply = jax.jit(module.apply)

    def run(thresholds):
        logits, out = apply(trained, inputs, np.float32(thresholds))
        return np.asarray(logits), np.stack(out.keep, axis=1), np.stack(out.scores, axis=1)

    return run


RESULTS = {
    "run": f"run {NASTY}",
    "examples": 20,
    "dense": {"top1": 0.5, "top5": 0.75, "flops": {"linear": 1e6, "full": 2e6}},
    "versions": {"python": "3", "jax": "0"},
}


@pytest.fixture(scope="module")
def page(explorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / PAGE
    write_page(path, RESULTS, [], explorer)
    return path


def unpacked(explorer, image, position):
    """How many groups see each patch, row by row."""
    rows = np.frombuffer(base64.b64decode(image.depth), np.uint8)
    row = rows.reshape(len(explorer.positions), -1)[position]
    depths = row[:, None] >> (explorer.bits * np.arange(8 // explorer.bits)) & 2**explorer.bits - 1
    return depths.reshape(-1)[: explorer.rows * explorer.columns]


# -- The data.


def test_every_position_holds_the_models_own_masks_and_answers(explorer, at):
    for position in (0, 7, explorer.start, len(explorer.positions) - 1):
        logits, keep, _ = at(explorer.positions[position].thresholds)
        probabilities = np.asarray(jax.nn.softmax(logits))
        for i, image in enumerate(explorer.images):
            np.testing.assert_array_equal(unpacked(explorer, image, position), keep[i].sum(axis=0))
            assert image.answers[position] == logits[i].argmax()
            assert image.probabilities[position] == pytest.approx(probabilities[i].max(), abs=1e-4)


def test_the_slider_starts_where_the_model_was_trained(model):
    module = model[0]
    positions, start = slider(module, 0.5)
    assert [each.thresholds for each in positions] == [(t, t, t) for t in THRESHOLDS]
    assert positions[start].label == "0.50"
    positions, start = slider(module, [0.512, 0.512, 0.512])
    assert (len(positions), start, positions[start].label) == (20, 10, "0.512")
    positions, start = slider(module, OWN)
    assert positions[start].label == "0.55 / 0.50 / 0.45"
    with pytest.raises(ValueError, match="one number or 3"):
        slider(module, [0.5, 0.5])


@pytest.mark.parametrize("name", ["vit_micro", "deit_s_distilled", "cait_xxs24"])
def test_costs_add_up_to_count_flops(name):
    module = create_module(name, groups=2)
    costs, n = costs_of(module), module.input_spec.num_patches
    assert costs.dense == count_flops(module)._asdict()
    for kept in ((0, 0), (n, n), (n // 2, 1), (7, 7)):
        for convention, expected in count_flops(module, kept)._asdict().items():
            changes = costs.changes[convention]
            ours = costs.whole[convention] + sum(changes[g][k] for g, k in enumerate(kept))
            assert ours == pytest.approx(expected, rel=1e-12)


def test_maps_come_back_as_they_were(explorer, maps, at):
    layers = [layer.name for layer in explorer.layers]
    assert layers == [*(f"Scores of group {g}" for g in (1, 2, 3)), *maps]
    patches, heatmap = explorer.layers[3:]
    assert (patches.rows, patches.columns, patches.smooth) == (8, 8, False)
    assert (heatmap.rows, heatmap.columns, heatmap.smooth) == (56, 56, True)
    _, keep, scores = at(OWN)
    for i, image in enumerate(explorer.images):
        np.testing.assert_allclose(values_of(image, 3), maps[layers[3]][i], atol=0.02)
        second = np.where(keep[i, 0], scores[i, 1], np.nan)
        np.testing.assert_allclose(values_of(image, 1), second, atol=1 / 254)


def values_of(image, layer):
    codes = np.frombuffer(base64.b64decode(image.maps[layer]), np.uint8).astype(float)
    low, high = image.ranges[layer]
    return np.where(codes > 0, low + (codes - 1) / 254 * (high - low), np.nan)


def test_clips_lie_frame_by_frame_in_a_row():
    module, variables = load_model("timesformer_micro", groups=1, num_frames=2)
    spec = module.input_spec
    pixels = np.random.default_rng(0).integers(0, 256, (3, *spec.shape), np.uint8)
    values = np.arange(spec.num_patches, dtype=np.float32)[None].repeat(3, axis=0)
    found = collect_images(module, variables, variables, pixels, maps={"index": values})
    h, w = spec.frame_grid
    assert (found.rows, found.columns, found.frames) == (h, spec.frames * w, spec.frames)
    assert found.images[0].label is None
    grid = np.rint(values_of(found.images[0], 1)).reshape(h, spec.frames, w)
    np.testing.assert_allclose(grid.swapaxes(0, 1), spec.on_grid(values[0]), atol=1)
    assert found.images[0].picture.startswith("data:image/png")


def test_what_does_not_fit_is_refused(model, scenes):
    module, trained, original = model
    for options, message in (
        ({"labels": [1]}, "labels must be 2, one per input, got 1"),
        ({"maps": {"it": np.zeros((2, 9))}}, "the map 'it' must be"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_images(module, trained, original, scenes[0][:2], batch_size=8, **options)


# -- The file.


def data_of(page):
    text = page.read_text()
    return json.loads(re.search(r'id="explorer-data"[^>]*>(.*?)</script>', text, re.S).group(1))


def test_names_cannot_leave_their_place(page, explorer):
    text = page.read_text()
    assert NASTY not in text
    assert "<b>" not in text
    assert "run &lt;/script&gt;&lt;b&gt;&amp;" in text
    assert data_of(page)["class_names"][0] == NASTY


def test_it_asks_nothing_of_any_network(page):
    text = page.read_text()
    for found in re.findall(r"(?:src|href)=[\"']?([^\"'\s>]*)", text):
        assert found.startswith(("data:", "#")), found
    assert "default-src 'none'" in text
    for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest"):
        assert word not in text


def test_written_again_it_keeps_explorer_and_figures(page, explorer, tmp_path):
    (tmp_path / "figures").mkdir()
    figure = tmp_path / "figures" / "heatmaps.png"
    figure.write_bytes(b"a picture")
    write_page(tmp_path / PAGE, RESULTS, [figure], explorer)
    before = (tmp_path / PAGE).read_text()
    write_again(RESULTS, tmp_path)
    assert (tmp_path / PAGE).read_text() == before
    assert f"data:image/png;base64,{base64.b64encode(b'a picture').decode()}" in before
    assert data_of(tmp_path / PAGE) == json.loads(json.dumps(dataclasses.asdict(explorer)))


def test_without_an_explorer_it_is_tables_and_figures(tmp_path):
    write_page(tmp_path / PAGE, RESULTS, [])
    text = (tmp_path / PAGE).read_text()
    assert "50.00%" in text
    assert "<script" not in text
    write_again(RESULTS, tmp_path)
    assert (tmp_path / PAGE).read_text() == text


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of 500 noisy photographs, with what DeiT-S might make of them and 8 maps."""
    module, rng = create_module("deit_s"), np.random.default_rng(0)
    n, count = module.input_spec.num_patches, 500

    def reduced(module, variables, pixels, thresholds):
        b = len(pixels)
        depth = (3.99 * rng.random((b, n)) ** (0.5 + thresholds[0])).astype(np.uint8)
        scores = rng.random((b, 3, n), np.float32)
        answers = rng.integers(0, 1000, b)
        return explorer_file._Reduced(depth, answers, rng.random(b), scores)

    def dense(module, variables, pixels):
        return rng.integers(0, 1000, len(pixels)), rng.random(len(pixels))

    field = rng.normal(size=(1024, 1024, 3)).cumsum(axis=0).cumsum(axis=1)  # smooth ..
    field = 128 + 60 * (field - field.mean()) / field.std() + rng.normal(0, 25, field.shape)
    field = field.clip(0, 255).astype(np.uint8)  # .. and grainy
    corners = rng.integers(0, 800, (count, 2))
    pixels = np.stack([field[y : y + 224, x : x + 224] for y, x in corners])
    maps = {f"map {i}": rng.random((count, n), np.float32) for i in range(8)}
    path = tmp_path_factory.mktemp("large") / PAGE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer_file, "_reduced", reduced)
        patch.setattr(explorer_file, "_dense", dense)
        names = [f"class {i}" for i in range(1000)]
        found = collect_images(module, {}, {}, pixels, class_names=names, thresholds=OWN, maps=maps)
    write_explanations(path, found, "500 photographs", {"python": "3"})
    return path


def test_500_photographs_stay_below_25_mb(large):
    assert len(data_of(large)["positions"]) == 20
    assert large.stat().st_size < 25e6


# -- In Chromium.


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
        pytest.skip("there is no Chromium: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(str(CHROMEDRIVER))
    driver = selenium.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Browsed:
    """The page in a browser, as a reader would use it."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get(path.as_uri())
        self.wait()

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self):
        """Until what is chosen is drawn, which happens when its picture is decoded."""
        deadline = time.monotonic() + 30
        while not self.run("return document.getElementById('detail').dataset.drawn"):
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.02)

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def text(self, element):
        return self.run("return document.getElementById(arguments[0]).innerText", element)

    def value(self, element):
        return float(
            self.run("return document.getElementById(arguments[0]).dataset.value", element)
        )

    def set(self, element, value):
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            element,
            str(value),
        )

    def listed(self):
        return self.run("return [...document.querySelectorAll('#list li')].map((e) => e.id)")

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()


@pytest.fixture
def browsed(chromium, page):
    browsed = Browsed(chromium, page)
    yield browsed
    assert browsed.errors() == []
    asked = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(name.startswith("data:") for name in browsed.run(asked))


def figures_of(module, keep):
    """Per image what the page shows: kept [B, D], linear and full [B], the share of dense [B]."""
    counts = keep.sum(axis=-1)
    flops = count_flops(module, tuple(counts.T))
    return counts, flops.linear, flops.full, flops.full / count_flops(module).full


def test_the_slider_says_what_the_model_does_there(browsed, explorer, at, model, scenes):
    _, labels = scenes
    for position in (explorer.start, 2, 12, len(explorer.positions) - 1):
        browsed.set("threshold", position)
        assert browsed.text("threshold-label") == explorer.positions[position].label
        logits, keep, _ = at(explorer.positions[position].thresholds)
        counts, linear, full, of_dense = figures_of(model[0], keep)
        for group in range(3):
            assert browsed.value(f"own-kept-{group + 1}") == counts[0, group]
            mean = counts[:, group].mean()
            assert browsed.value(f"mean-kept-{group + 1}") == pytest.approx(mean, rel=1e-12)
        expected = {"share": keep.mean(axis=(1, 2)), "linear": linear, "full": full}
        for name, values in {**expected, "of-dense": of_dense}.items():
            assert browsed.value(f"own-{name}") == pytest.approx(values[0], rel=1e-12)
            assert browsed.value(f"mean-{name}") == pytest.approx(values.mean(), rel=1e-12)
        right = (logits.argmax(axis=-1) == labels).mean()
        assert browsed.value("mean-right") == pytest.approx(right)
        assert browsed.text("answer").startswith(CLASSES[logits[0].argmax()])
    keep = at(explorer.positions[explorer.start].thresholds)[1]
    assert 0.1 < keep.mean() < 0.9  # there was something to see


def test_filters_and_orders(browsed, explorer, at, scenes):
    labels = scenes[1]
    logits, keep, _ = at(OWN)
    right = logits.argmax(axis=-1) == labels
    dense_right = np.array([image.dense for image in explorer.images]) == labels
    assert 0 < (dense_right & ~right).sum() < (~right).sum() < IMAGES
    for name, chosen in (("all", right | True), ("wrong", ~right), ("lost", dense_right & ~right)):
        browsed.set("filter", name)
        assert browsed.listed() == [f"row-{i}" for i in np.flatnonzero(chosen)]
    assert browsed.text("count") == f"{(dense_right & ~right).sum()} of {IMAGES} images"
    browsed.set("filter", "all")
    kept = keep.sum(axis=(1, 2))
    for name, order in (
        ("most", np.argsort(kept, kind="stable")),
        ("least", np.argsort(-kept, kind="stable")),
    ):
        browsed.set("sort", name)
        assert browsed.listed() == [f"row-{i}" for i in order]


def test_the_search_finds_names_and_classes(browsed, scenes):
    browsed.set("search", "SCENE 1")
    assert browsed.listed() == [f"row-{i}" for i in range(IMAGES) if i == 1 or i >= 10]
    assert browsed.text("name") == "scene 1"
    browsed.set("search", "seven")
    named = {f"row-{i}" for i in np.flatnonzero(scenes[1] == 7)}
    assert named <= set(browsed.listed())
    browsed.set("search", "nothing like it")
    assert browsed.listed() == []
    assert browsed.text("mean-share") == "–"
    browsed.press("j")  # nowhere to go


def test_keys(browsed, explorer):
    from selenium.webdriver import Keys

    browsed.press("j", "j", Keys.ARROW_RIGHT, "k")
    assert browsed.text("name") == "scene 2"
    start = int(browsed.run("return document.getElementById('threshold').value"))
    browsed.press("]", "]", "[")
    assert browsed.text("threshold-label") == explorer.positions[start + 1].label
    browsed.press("0")
    assert browsed.text("threshold-label") == explorer.positions[start].label
    browsed.press("6")
    assert browsed.text("caption") == "Scores of group 2, as trained"
    browsed.press("/", "3", "j")
    assert browsed.run("return document.getElementById('search').value") == "3j"
    browsed.press(Keys.ESCAPE)
    browsed.run("document.getElementById('threshold').focus()")
    browsed.press(Keys.ARROW_LEFT)
    assert browsed.text("threshold-label") == explorer.positions[start - 1].label
    browsed.set("search", "")
    browsed.run("document.getElementById('list').focus()")
    browsed.press(Keys.END, Keys.ARROW_UP)
    assert browsed.text("name") == f"scene {IMAGES - 2}"


def test_dropped_patches_are_faded_and_kept_ones_are_not(browsed, explorer):
    browsed.press("2")
    browsed.wait()
    drawn = browsed.run(
        "const canvas = document.getElementById('large'), columns = arguments[0];"
        "const centre = (i) => Math.floor((i + .5) * canvas.width / columns);"
        "const at = (i) => [centre(i % columns), centre(Math.floor(i / columns)), 1, 1];"
        "const pixels = canvas.getContext('2d');"
        "return [...Array(64).keys()].map((i) => [...pixels.getImageData(...at(i)).data])",
        explorer.columns,
    )
    pixels = np.asarray(drawn)[:, 0]
    depth = unpacked(explorer, explorer.images[0], explorer.start)
    assert (pixels[depth == 0] > 150).all()
    assert (pixels[depth > 0] < 100).any()  # the black ground


def test_it_is_dark_where_the_reader_likes_it_dark(chromium, page):
    def ground(scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browsed = Browsed(chromium, page)
        assert browsed.errors() == []
        colour = browsed.run("return getComputedStyle(document.body).backgroundColor")
        return np.mean([int(x) for x in re.findall(r"\d+", colour)][:3])

    assert ground("dark") < 40
    assert ground("light") > 215


@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_small_screen_need_not_scroll_sideways(chromium, page, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browsed = Browsed(chromium, page)
        assert browsed.run("return document.documentElement.scrollWidth") <= width
        assert browsed.run("return document.getElementById('large').clientWidth") > 200
        assert browsed.run("return scrollY") == 0  # choosing from the list has not moved the page
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_500_photographs_are_explored_like_20(chromium, large):
    browsed = Browsed(chromium, large)
    assert len(browsed.listed()) == 500
    browsed.set("threshold", 15)
    browsed.set("filter", "lost")  # without labels: another answer than without dropping
    browsed.press("j")
    decoded = browsed.run("return document.querySelectorAll('#list img[src]').length")
    assert 0 < decoded < 100
    assert browsed.text("label") == ""
    assert browsed.errors() == []
