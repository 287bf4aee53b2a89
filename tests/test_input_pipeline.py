"""The input benchmark runs, and compares what it says; nothing is timed."""

import json

import numpy as np
import pytest

pytest.importorskip("skimage.data")

from benchmarks import decoders, input_pipeline
from benchmarks.input_pipeline import CLOSE, OURS, PLAIN


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("input") / "x.json"
    tiny = ["--images=6", "--batch=3", "--batches=1", "--rounds=1"]
    input_pipeline.main([*tiny, f"--out={out}"])
    return json.loads(out.read_text())


def test_every_row_is_a_rate(result):
    for table in ("pipelines", "loaders", "decode_only", "resize_only"):
        assert result[table]
        for row in result[table]:
            rate = row["images_per_second"]
            assert 0 < row["images_per_second_p25"] <= rate <= row["images_per_second_p75"]
            assert row["images_per_core_second"] > 0
            assert row["ms_per_image"] == pytest.approx(1000 / rate)
            assert row["images"] >= 3


def test_our_pipelines_run_with_one_two_and_all_threads(result):
    for name in ("ours, crop + flip", "ours, DeiT's augmentation"):
        threads = [row["threads"] for row in result["pipelines"] if row["name"] == name]
        assert threads == sorted({1, 2, result["cores"]})
    assert "ours, evaluation" in {row["name"] for row in result["pipelines"]}


def test_the_reference_is_pillow_and_ours_is_exactly_it(result):
    off = {row["name"]: row["grey_levels_from_pil"] for row in result["loaders"]}
    assert off.pop(PLAIN) == off.pop(OURS) == 0
    assert all(0 <= levels < 5 for levels in off.values())


def test_what_is_not_installed_has_a_reason(result):
    timed = {row["name"] for row in result["decode_only"] + result["resize_only"]}
    timed |= {row["name"] for row in result["pipelines"]}
    every = {*decoders.DECODERS, *decoders.RESIZERS, "tf.data"}
    assert every <= timed | result["skipped"].keys()
    assert not timed & result["skipped"].keys()
    assert all(": " in reason for reason in result["skipped"].values())


def test_files_are_as_large_as_imagenets(tmp_path):
    jpegs = input_pipeline.write_jpegs(tmp_path, 12)
    assert jpegs.mean_bytes() == pytest.approx(input_pipeline.MEAN_BYTES, rel=0.15)
    assert len({path.read_bytes() for path in jpegs.paths}) == 12
    assert {path.parent.name for path in jpegs.paths} == set(input_pipeline.PHOTOGRAPHS)


def test_what_cannot_be_made_is_skipped():
    def broken():
        raise RuntimeError("no such operator\nand a trace")

    skipped = {}
    assert input_pipeline.installed({"a": lambda: 1, "b": broken}, skipped) == {"a": 1}
    assert skipped == {"b": "RuntimeError: no such operator"}


def test_grey_levels():
    black = np.zeros((2, 2, 3), np.uint8)
    assert input_pipeline.grey_levels([black + 255, black], [black, black]) == 127.5


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({}, "Stay with Pillow"),
        ({"a": (105, 0.0), "b": (90, 3.0)}, "Stay with Pillow"),
        ({"a": (150, 0.1), "b": (140, 0.0)}, "Pick a: 1.50 times"),
        ({"a": (150, 0.1), "b": (200, 2.0)}, "b is the fastest, 2.00 times, but 2.00 grey"),
        ({"b": (200, CLOSE + 0.1)}, "b is the fastest"),
    ],
)
def test_the_verdict_needs_speed_and_pixels(others, said):
    rows = {PLAIN: (100, 0.0), OURS: (300, 0.0), **others}
    loaders = [
        {"name": name, "images_per_core_second": rate, "grey_levels_from_pil": off}
        for name, (rate, off) in rows.items()
    ]
    assert said in input_pipeline.verdict(loaders)
