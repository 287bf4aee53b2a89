"""The paper's tables over several runs: what is missing, what came of them, as text."""

import contextlib
import csv
import dataclasses
import io
import json
import runpy

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from PIL import Image

from iared2_jax import create_model, save_weights
from iared2_jax.config.checks import validate
from iared2_jax.config.loading import flatten, load
from iared2_jax.data.datasets import MADE
from iared2_jax.data.images import open_image
from iared2_jax.data.small import small_imagenet
from iared2_jax.errors import Interrupted, UsageError
from iared2_jax.experiment.build import build_module, build_phases
from iared2_jax.experiment.run_directory import locked
from iared2_jax.tables import __main__ as command
from iared2_jax.tables import input_drops, pruning, shared_runs
from iared2_jax.tables.ablation import SETTINGS
from iared2_jax.tables.all_tables import TABLES
from iared2_jax.tables.presets import PRESETS
from iared2_jax.tables.runs import check_folder, missing_runs, results_of, seconds_of
from iared2_jax.tables.statistics import mean, paired
from iared2_jax.tables.table import set_beside_ours
from iared2_jax.tables.write import cells, comma_separated, markdown

GIVEN = {"data.path": "/objects", "weights": "/published"}
FLAGS = ["--table=4", "--seeds", "1", "2", *(f"--config.{k}={v}" for k, v in GIVEN.items())]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there


# -- Statistics.


def test_a_mean_has_students_interval():
    values = np.random.default_rng(0).normal(3, 2, size=5)
    found = mean(values.tolist())
    low, high = scipy.stats.t.interval(
        0.95, 4, loc=values.mean(), scale=scipy.stats.sem(values)
    )  # another way to the same
    np.testing.assert_allclose([found.value - found.half, found.value + found.half], [low, high])
    assert mean([2.0, 2.0]).half == 0
    assert mean([1.5]) == (1.5, None, (1.5,), None)
    assert mean([1.5]).text(1) == "1.5"
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_a_difference_is_taken_seed_by_seed():
    """What all seeds share cancels: a spread of 10 points hides no difference of 1."""
    found = paired([81.0, 91.0, 71.0], [80.0, 90.0, 70.0])
    assert (found.value, found.half) == (1, 0)
    with pytest.raises(ValueError, match="longer"):
        paired([1.0], [1.0, 2.0])


# -- Rows.


def fabricated(seed):
    """A finished run's results: dense 80, ours 79 + seed / 10, random 10 below."""
    flops = {"linear": 100.0, "full": 200.0}
    half = {kind: value / 2 for kind, value in flops.items()}
    ours = 21 - seed / 10
    return {
        "dense": {"top1": 0.8, "flops": flops},
        "iared2": {"top1": 1 - ours / 100, "kept": [1.0, 0.5 + seed / 10], "flops": half},
        "methods": {
            "original": {"top1_error": 20.0, "flops": flops, "kept_per_group": [1.0]},
            "random": {"top1_error": ours + 10, "flops": half, "kept_per_group": [1.0, 0.6]},
            "iared2": {
                "top1_error": ours,
                "flops": half,
                "kept_per_group": [1.0, 0.5 + seed / 10],
            },
        },
    }


SPEED = {
    "images_per_second": {
        "executions": {
            "dense": {"median": 10.0},
            "dense, 8 at a time": {"median": 12.0},
            "ragged": {"median": 21.6},
        }
    }
}


@pytest.fixture
def rows():
    results = {f"112px-interpreters-{seed}": fabricated(seed) for seed in (0, 1)}
    return TABLES["4"].rows([112], [0, 1, 2], {**results, "112px-interpreters-0-speed": SPEED})


def test_rows_are_means_over_the_seeds_that_are_there(rows):
    original, random, ours = rows
    assert [row["method"] for row in rows] == ["original", "random", "IA-RED2"]
    assert ours["seeds"] == [0, 1]
    np.testing.assert_allclose(ours["top1"].values, [79.0, 79.1])
    np.testing.assert_allclose(ours["lost"].value, 0.95)
    np.testing.assert_allclose(original["lost"].values, 0)
    np.testing.assert_allclose(random["ours_better_by"].values, 10)
    assert ours["ours_better_by"] is None
    np.testing.assert_allclose(ours["kept"], [1.0, 0.55])
    np.testing.assert_allclose(random["kept"], [1.0, 0.6])
    assert (original["full_flops"].value, random["linear_flops"].value) == (100, 50)


def test_speed_is_set_beside_the_fastest_dense_execution(rows):
    """21.6 images a second are 1.8 times 12, of the 2 that half the FLOPs allow."""
    ours = rows[-1]
    assert rows[0]["images_per_s"].value == 12
    np.testing.assert_allclose(ours["of_possible"].value, 90)
    # By the FLOPs of the batch that was timed, where they are known: 60% allow 1.67 times.
    known = {"images_per_second": {**SPEED["images_per_second"], "full_flops_share": 0.6}}
    found = {"112px-interpreters-0": fabricated(0), "112px-interpreters-0-speed": known}
    again = TABLES["4"].rows([112], [0], found)[-1]
    np.testing.assert_allclose(again["of_possible"].value, 108)


def test_a_table_as_text(rows):
    columns = TABLES["4"].columns
    text = cells(rows, columns)
    assert len({len(row) for row in text}) == 1
    ours = dict(zip(text[0], text[3], strict=True))
    assert ours["method"] == "IA-RED2"
    assert ours["kept per group"] == "1.00 / 0.55"
    assert ours["top-1, %"].startswith("79.0 ±") or ours["top-1, %"].startswith("79.1 ±")
    assert ours["ours better by, points"] == ""
    page = markdown("Title", ["What it is."], rows, columns)
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == len(text) + 1
    assert page.startswith("# Title\n")
    lines = list(csv.DictReader(io.StringIO(comma_separated(rows, columns))))
    assert [(line["method"], line["seed"], line["top1"]) for line in lines][-2:] == [
        ("IA-RED2", "0", "79"), ("IA-RED2", "1", "79.1")
    ]  # fmt: skip
    assert (lines[-2]["images_per_s"], lines[-1]["images_per_s"]) == ("21.6", "")


def judged(*shares):
    """A map's figures by the segmentation protocol."""
    keys = ("pixel_accuracy", "mean_accuracy", "mean_iou", "average_precision")
    figures = dict(zip(keys, shares, strict=True))
    return {**figures, "interval": {key: (x - 0.01, x + 0.01) for key, x in figures.items()}}


def test_maps_are_ours_over_seeds_and_the_others_once():
    def run(seed):
        block = {"raw_attention_block_1": judged(0.1, 0.1, 0.1, 0.1)}
        ours = {"group_1": judged(0.6 + seed / 10, 0.5, 0.4, 0.3)}
        return {"map_images": 200, "segmentation": {**ours, **block}}

    own = {f"112px-interpreters-{seed}": run(seed) for seed in (0, 1)}
    table = TABLES["1"]
    ours, attention = table.rows([112], [0, 1, 2], own)
    assert (ours["method"], ours["seeds"]) == ("IA-RED2, group 1", [0, 1])
    np.testing.assert_allclose(ours["pixel_accuracy"].values, [60, 70])
    assert attention["seeds"] == [None]  # it is of no seed
    assert attention["mean_iou"].values == (10,)
    np.testing.assert_allclose(attention["over_images"]["mean_iou"], 1)
    lime = {"map_images": 200, "segmentation": {"lime": judged(0.2, 0.2, 0.2, 0.2)}}
    every = {"112px-maps": lime}
    rows = table.rows([112], [0, 1, 2], {**own, **every})
    assert [row["method"] for row in rows] == ["IA-RED2, group 1", "lime"]
    text = cells(rows, table.columns)
    assert dict(zip(text[0], text[2], strict=True))["mIoU"] == "20.0"
    assert text[1][text[0].index("best mIoU")] == ""
    lines = list(csv.DictReader(io.StringIO(comma_separated(rows, table.columns))))
    assert [(line["method"], line["seed"]) for line in lines] == [
        ("IA-RED2, group 1", "0"), ("IA-RED2, group 1", "1"), ("lime", "")
    ]  # fmt: skip
    few = {"112px-maps": {**lime, "map_images": 100}}
    with pytest.raises(UsageError, match=r"measured on 100 and 200 images: .*maps_size"):
        table.rows([112], [0, 1], {**own, **few})
    with pytest.raises(UsageError, match="no run of 112 px is finished yet"):
        table.rows([112], [2], own)


def test_runs_without_their_baselines_are_rows_of_what_they_have():
    """Stopped among its baselines, a run still says what it has itself; others' rows are theirs."""
    whole = {f"112px-interpreters-{seed}": fabricated(seed) for seed in (1, 2)}
    bare = {key: value for key, value in fabricated(3).items() if key != "methods"}
    found = {**whole, "112px-interpreters-3": bare}
    rows = {row["method"]: row for row in TABLES["4"].rows([112], [1, 2, 3], found)}
    assert rows["IA-RED2"]["seeds"] == rows["original"]["seeds"] == [1, 2, 3]
    assert rows["random"]["seeds"] == [1, 2]
    assert rows["IA-RED2"]["top1"].values[2] == pytest.approx(100 * bare["iared2"]["top1"])
    assert len(rows["random"]["ours_better_by"].values) == 2
    alone = TABLES["4"].rows([112], [3], {"112px-interpreters-3": bare})
    assert [row["method"] for row in alone] == ["original", "IA-RED2"]


def test_a_seeds_figures_stand_on_its_own_line():
    """Also where ours lacks a seed that a rival has, and where another than the first was timed."""
    found = {f"112px-interpreters-{seed}": fabricated(seed) for seed in (1, 2, 3)}
    found["112px-interpreters-2-speed"] = SPEED
    columns = TABLES["4"].columns
    rows = TABLES["4"].rows([112], [1, 2, 3], found)
    random, ours = rows[1], rows[-1]
    cut = {**ours, "seeds": [1, 3], "lost": mean([ours["lost"].values[i] for i in (0, 2)])}
    theirs = {**random, "lost": mean([5.0, 6.0, 9.0])}
    set_beside_ours([theirs, cut], cut)
    lines = list(csv.DictReader(io.StringIO(comma_separated([theirs, ours], columns))))
    better = [line["ours_better_by"] for line in lines[:3]]
    expected = [5 - cut["lost"].values[0], None, 9 - cut["lost"].values[1]]
    assert [float(text) if text else None for text in better] == pytest.approx(expected)
    assert [line["images_per_s"] for line in lines[3:]] == ["", "21.6", ""]


def test_the_order_of_seeds_and_sizes_says_nothing(caplog):
    plans = []
    for seeds in (["1", "2", "3"], ["3", "1", "2", "1"]):
        caplog.clear()
        given = [f"--config.{key}={text}" for key, text in GIVEN.items()]
        arguments = ["--table=4", "--sizes", "168", "112", "--seeds", *seeds, "--dry-run", *given]
        assert command.main([*arguments, "--root=/nowhere"]) == 0
        plans.append(caplog.messages)
    assert plans[0] == plans[1]
    assert any(line.startswith("112px-interpreters-1-speed: missing") for line in plans[0])


def test_speed_is_left_out_without_the_run_that_was_timed():
    results = {"112px-interpreters-1": fabricated(1), "112px-interpreters-0-speed": SPEED}
    rows = TABLES["4"].rows([112], [0, 1], results)
    assert all("images_per_s" not in row for row in rows)


def test_peers_are_set_beside_ours_whichever_is_there():
    """Training-free selectors have no seeds, and each its own share of the FLOPs."""
    ours = {f"112px-interpreters-{seed}": fabricated(seed) for seed in (1, 2)}
    dense = ours["112px-interpreters-1"]["dense"]
    tome = {
        "dense": dense,
        "reduced": {"top1": 0.5, "kept": [0.9, 0.4], "flops": {"linear": 70.0, "full": 65.0}},
    }
    found = TABLES["peers"].rows([112], [1, 2, 3], {**ours, "112px-tome-70": tome})
    assert [row["method"] for row in found] == ["original", "ToMe", "IA-RED2"]
    assert [row["seeds"] for row in found] == [[None], [None], [1, 2]]
    peer = found[1]
    assert peer["kept"].value == pytest.approx(40)
    expected = [100 * run["iared2"]["top1"] - 50 for run in ours.values()]
    assert peer["ours_better_by"].values == pytest.approx(expected)  # it has no seed: of each
    text = comma_separated(found, TABLES["peers"].columns)
    line = list(csv.DictReader(io.StringIO(text)))[1]
    assert float(line["ours_better_by"]) == pytest.approx(np.mean(expected))
    assert peer["lost"].value == pytest.approx(100 * (dense["top1"] - 0.5))
    assert peer["linear_flops"].value == pytest.approx(7000 / dense["flops"]["linear"])
    alone = TABLES["peers"].rows([112], [1], {"112px-tome-70": tome})
    assert [row["method"] for row in alone] == ["original", "ToMe"]


def test_trained_peers_are_set_beside_ours_and_what_ours_were_compared_with():
    def run(block, top1):
        figures = {"top1": top1, "kept": [1.0, 0.4], "flops": {"linear": 70.0, "full": 140.0}}
        return {"dense": {"top1": 0.8, "flops": {"linear": 100.0, "full": 200.0}}, block: figures}

    row = {"top1_error": 25.0, "kept_per_group": [1.0, 0.5], "flops": {"linear": 75, "full": 150}}
    beside = {"original_fine_tuned": row, "attention_before_group": {**row, "top1_error": 40.0}}
    found = {
        "112px-iared2-1": {**run("iared2", 0.9), "methods": beside},
        "112px-evit-70-trained-1": run("reduced", 0.7),
        "112px-evit-70-trained-2": run("reduced", 0.72),
        "112px-dynamicvit-70-trained-2": run("iared2", 0.6),
    }
    rows = {row["method"]: row for row in TABLES["trained_peers"].rows([112], [1, 2], found)}
    assert list(rows) == [
        "original",
        "EViT",
        "DynamicViT",
        "original, fine-tuned as long",
        "attention before each group",
        "IA-RED2",
    ]
    assert rows["EViT"]["seeds"] == [1, 2]
    assert rows["EViT"]["top1"].values == pytest.approx((70, 72))
    assert rows["EViT"]["linear_flops"].value == pytest.approx(70)
    assert rows["DynamicViT"]["seeds"] == [2]
    assert rows["attention before each group"]["top1"].value == pytest.approx(60)
    assert rows["original, fine-tuned as long"]["kept"].value == pytest.approx(50)
    assert rows["IA-RED2"]["lost"].value == pytest.approx(-10)
    assert rows["EViT"]["ours_better_by"].values == pytest.approx((20,))  # of the seed both have
    assert "ours_better_by" not in rows["DynamicViT"]  # none is shared


def test_what_is_dropped_at_the_input_is_a_row_for_each_selector():
    def run(top1, mean_iou):
        return {
            "dense": {"top1": 0.8, "flops": {"linear": 100.0, "full": 200.0}},
            "reduced": {"top1": top1, "flops": {"linear": 78.0, "full": 150.0}},
            "segmentation": {"attention_block_1_group_1": {"mean_iou": mean_iou}},
        }

    names = [f"112px-input-attention_block_1-{seed}" for seed in (1, 2)]
    found = dict(zip(names, (run(0.7, 0.3), run(0.72, 0.3)), strict=True))
    rows = TABLES["5"].rows([112], [1, 2, 3], found)
    assert [row["method"] for row in rows] == ["original", "attention of block 1, two passes"]
    ours = rows[1]
    assert ours["seeds"] == [1, 2]
    assert ours["lost"].values == pytest.approx((10, 8))
    assert ours["linear_flops"].value == pytest.approx(78)
    assert ours["mean_iou"].value == pytest.approx(30)
    assert "mean_iou" not in rows[0]
    assert TABLES["5"].rows([112], [1], {}) == []


def test_clips_have_the_errors_of_a_clip_and_of_a_video():
    """The table's figures are those of a run of its own: results.json's "methods"."""
    flops = {"linear": 100.0, "full": 200.0}

    def row(error, share):
        return {
            "clip1_error": error,
            "video1_error": error / 2,
            "flops": {kind: share * value for kind, value in flops.items()},
            "kept_per_group": [share],
        }

    def run(error):
        methods = {
            "original": row(10.0, 1),
            "temporal_difference": row(30.0, 0.5),
            "iared2": row(error, 0.5),
        }
        return {"dense": {"flops": flops}, "methods": methods}

    table = TABLES["3"]
    found = {"64px-iared2-1": run(12.0), "64px-iared2-2": run(14.0)}
    original, difference, ours = table.rows([64], [1, 2], found)
    assert difference["method"] == "temporal difference"
    assert ours["clip1_error"].values == (12, 14)
    assert ours["video1_error"].values == (6, 7)
    assert ours["lost"].values == (2, 4)
    assert original["full_flops"].value == 100
    assert difference["ours_better_by"].values == (18, 16)
    text = cells([original, difference, ours], table.columns)
    assert dict(zip(text[0], text[3], strict=True))["clip-1 error, %"].startswith("13.0 ±")


def test_other_attentions_are_set_beside_ours():
    dense = {"top1": 0.9, "flops": {"linear": 100.0, "full": 200.0}}
    ours = {"top1": 0.88, "flops": {"linear": 60.0, "full": 110.0}}
    linformer = {"top1": 0.8, "flops": {"linear": 100.0, "full": 150.0}}
    student = {"top1": 0.7, "flops": {"linear": 70.0, "full": 140.0}}
    found = {
        "64px-iared2-1": {"dense": dense, "iared2": ours},
        "64px-attention-linformer-1": {
            "dense": linformer,
            "config": {"model.attention_size": 16},
        },
        "64px-attention-student-1": {"dense": student, "config": {"model.depth": 4}},
    }
    rows = TABLES["attentions"].rows([64], [1, 2], found)
    assert [row["method"] for row in rows] == [
        "original",
        "Linformer, k = 16",
        "student of 4 blocks, distilled",
        "IA-RED2",
    ]
    assert rows[1]["lost"].value == pytest.approx(10)
    assert rows[1]["full_flops"].value == pytest.approx(75)
    assert rows[1]["ours_better_by"].values == pytest.approx((8,))
    assert rows[0]["ours_better_by"].values == pytest.approx((-2,))
    assert rows[3]["ours_better_by"] is None
    with pytest.raises(UsageError, match="no run of 64 px is finished yet"):
        TABLES["attentions"].rows([64], [1], {})


def curve(*points):
    return [{"linear": linear, "accuracy": accuracy} for linear, accuracy in points]


def test_curves_of_pruning_are_read_at_a_loss_and_drawn(tmp_path):
    """Two times fewer FLOPs for a point, if a curve has such a point; over seeds, the mean."""
    tokens = curve((100, 0.9), (80, 0.9), (50, 0.89), (20, 0.5))
    weights = curve((100, 0.9), (90, 0.88))
    assert pruning.times_fewer(tokens, 0.0) == pytest.approx(1.25)
    assert pruning.times_fewer(tokens, 1.0) == pytest.approx(2)
    assert pruning.times_fewer(weights, 1.7) == 1
    one = {"pruning": {"tokens": tokens, "weights": weights, "both": tokens}}
    two = {"pruning": {"tokens": weights, "weights": weights, "both": tokens}}
    names = ("64px-iared2-1-pruning", "64px-iared2-3-pruning")
    rows = TABLES["fig5"].rows([64], [1, 2, 3], dict(zip(names, (one, two), strict=True)))
    assert [row["method"] for row in rows] == [*pruning.KINDS.values()]
    assert rows[0]["seeds"] == [1, 3]
    assert rows[0]["fewer_1.0"].values == pytest.approx((2, 1))
    figure = TABLES["fig5"].plot(rows)
    assert len(figure.axes[0].lines) == 6
    assert len(figure.axes[0].get_legend().texts) == 3


# -- Runs.


def test_settings_of_the_ablation_are_compared_seed_by_seed():
    def run(top1):
        ours = {"top1": top1, "kept": [1.0, 0.4], "flops": {"linear": 60.0, "full": 120.0}}
        return {"dense": {"top1": 0.9, "flops": {"linear": 100.0, "full": 200.0}}, "iared2": ours}

    found = {
        "64px-iared2-1": run(0.88),
        "64px-iared2-2": run(0.86),
        "64px-ablation-heads-1-2": run(0.81),
        "64px-ablation-heads-1-3": run(0.5),
    }
    recipe, one_head = TABLES["ablation"].rows([64], [1, 2, 3], found)
    assert recipe["lost"].values == pytest.approx((2, 4))
    assert "worse" not in recipe
    assert one_head["seeds"] == [2, 3]
    assert one_head["worse"].values == pytest.approx((5,))  # of seed 2, which both have
    assert one_head["full_flops"].value == pytest.approx(60)
    figure = TABLES["ablation"].plot([recipe, one_head])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["the recipe", "1 head"]
    assert [len(line.get_xdata()) for line in figure.axes[1].lines] == [2, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("table", "preset"), [(name, preset) for name in TABLES for preset in TABLES[name].presets]
)
def test_a_tables_runs_can_be_built(table, preset, tmp_path):
    """Every option is one, every model can be, and what starts from another takes its weights."""
    preset = dataclasses.replace(PRESETS[preset], segmentation_path="/masks.mat")
    sizes = [112, 168] if preset.name.startswith("cutouts") else [preset.size]
    runs = TABLES[table].runs(preset, sizes, [1, 2])
    names = [run.name for run in runs]
    per_size = {
        **{"1": 4, "2": 4, "3": 4, "4": 4, "5": 1 + 2 * 5, "fig5": 1 + 2 * 2},
        **{"peers": 1 + 2 + 4 * 3, "trained_peers": 1 + 2 + 2 * 3, "attentions": 1 + 2 + 2 * 6},
        "ablation": 1 + 2 * len(SETTINGS.get(preset.name, ())),
    }[table]
    if table == "attentions" and preset.student:
        per_size += 2
    if preset.name == "cluttered_mnist":  # at the share of the FLOPs that ours has there, too
        per_size += {"peers": 4, "trained_peers": 2 * 3}.get(table, 0)
    per_size += 2 * bool(table == "1" and preset.segmentation)  # our scores, measured on masks
    per_size -= not preset.trains_head
    assert len(set(names)) == len(names) == len(sizes) * per_size
    built = 0
    for place, run in enumerate(runs):
        config = run.built(tmp_path, GIVEN)
        on_masks = config.data.name == "imagenet_segmentation"
        assert config.data.path == ("/masks.mat" if on_masks else "/objects")
        # An evaluation makes no baselines, so a run that named some would never count as finished.
        assert config.mode == "train" or not config.compare.selectors
        starts_from = config.distillation.teacher if run.distils else config.weights
        if run.start:
            assert names.index(run.start) < place
            assert starts_from == str(tmp_path / run.start / "weights.safetensors")
        else:
            assert starts_from == "/published"
        if config.seed <= 1 and run.name.startswith(f"{sizes[0]}px"):
            built += 1
            validate(config, 1)
            config.model.num_classes = config.model.num_classes or 10  # else its data would say
            module = build_module(config)
            if config.data.name in MADE:  # else its data's size decides how long an epoch is
                assert config.mode == "eval" or build_phases(config, module)
    assert built >= len(names) / len(sizes) / 2


def test_a_setting_is_called_the_same_on_all_data():
    """Rows are made by the runs' names, which do not say the preset."""
    titles = {}
    for settings in SETTINGS.values():
        for name, (title, _) in settings.items():
            assert titles.setdefault(name, title) == title


@pytest.mark.parametrize("mine", [{}, {"backbone.steps": "7", "backbone.epochs": "0.0"}])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_takes_as_long_as_ours_takes_as_many_steps(preset, mine, tmp_path):
    """Peers and other attentions, whose blocks learn in one phase, beside ours, group by group.

    So, too, where the user's recipe is shorter, or says how long the head is to be trained.
    """
    given = {**GIVEN, **mine, "supervised.steps": "3", "supervised.epochs": "0.0"}
    preset = dataclasses.replace(preset, given=given)
    for table in ("trained_peers", "attentions", "5"):
        if preset.name not in TABLES[table].presets:
            continue
        lengths = set()
        for run in TABLES[table].runs(preset, [preset.size], [1]):
            config = run.built(tmp_path, given)
            if run.distils or config.curriculum in ("dynamicvit", "iared2"):
                continue
            section = {"selector": "backbone"}.get(config.curriculum, config.curriculum)
            if run.name.endswith("-head"):
                continue
            lengths.add((config[section].steps, config[section].epochs))
        recipe = load(preset.config(preset.size), mine)
        groups = recipe.model.groups
        assert lengths == {(groups * recipe.backbone.steps, groups * recipe.backbone.epochs)}


def test_a_row_is_of_the_setting_that_it_names_whatever_the_user_sets(tmp_path):
    given = {"interpreter.tau": "(1.0,)", "model.groups": "6", "reduction.selector": "random"}
    preset = dataclasses.replace(PRESETS["cluttered_mnist"], given=given)
    settings = {run.name: run.built(tmp_path, given) for run in
                TABLES["ablation"].runs(preset, [64], [1])}  # fmt: skip
    assert settings["64px-iared2-1"].interpreter.tau == (1.0,)
    assert settings["64px-ablation-heads-1-1"].interpreter.tau == (1.0,)
    assert settings["64px-ablation-tau-half-1"].interpreter.tau == (20.0, 30.0, 300.0)
    assert settings["64px-ablation-groups-2-1"].model.groups == 2
    for run in TABLES["5"].runs(preset, [64], [1]):
        config = run.built(tmp_path, given)
        assert config.model.groups == 1
        assert f"input-{config.reduction.selector}-" in run.name


def test_a_student_learns_from_what_others_start_from(tmp_path):
    """By its own config; without weights of the user's, from those that its config names."""
    runs = TABLES["attentions"].runs(PRESETS["cluttered_mnist"], [64], [1])
    (student,) = [run for run in runs if run.distils]
    assert student.built(tmp_path, {}).distillation.teacher == "vit_micro"
    config = student.built(tmp_path, {"weights": "/published"})
    assert (config.distillation.teacher, config.weights) == ("/published", "scratch")
    assert (config.curriculum, config.model.depth) == ("distillation", 4)


def _of_seed_1():
    return shared_runs.reducing_run(PRESETS["cutouts"], "interpreters", 112, 1)


def test_a_run_is_there_if_its_options_are_the_same_wherever_its_files_lie(tmp_path):
    head = shared_runs.head_runs(PRESETS["cutouts"], 112)[0]
    config = flatten(head.built(tmp_path, {**GIVEN, "data.path": "/elsewhere"}))
    (tmp_path / head.name).mkdir()
    (tmp_path / head.name / "results.json").write_text(json.dumps({"config": config}))
    assert results_of(head, tmp_path, GIVEN) is not None
    assert results_of(head, tmp_path, {**GIVEN, "supervised.steps": "7"}) is None
    # Nor does it matter how many threads made its batches ready.
    assert results_of(head, tmp_path, {**GIVEN, "data.threads": "16"}) is not None
    del config["eval.lime_samples"]  # as a version before this option would have written it
    (tmp_path / head.name / "results.json").write_text(json.dumps({"config": config}))
    assert results_of(head, tmp_path, GIVEN) is not None
    assert results_of(_of_seed_1(), tmp_path, GIVEN) is None


def test_another_recipe_of_the_interpreters_makes_no_new_head(tmp_path):
    head = shared_runs.head_runs(PRESETS["cutouts"], 112)[0]
    config = flatten(head.built(tmp_path, GIVEN))
    config.update({"interpreter.steps": 7, "model.policy_token": "cls"})
    (tmp_path / head.name).mkdir()
    (tmp_path / head.name / "results.json").write_text(json.dumps({"config": config}))
    assert results_of(head, tmp_path, GIVEN) is not None
    assert results_of(head, tmp_path, {**GIVEN, "model.num_classes": "7"}) is None


def test_a_run_that_was_stopped_among_its_baselines_is_not_there(tmp_path):
    run = _of_seed_1()
    record = {"config": flatten(run.built(tmp_path, GIVEN))}
    (tmp_path / run.name).mkdir()
    for methods, there in (({}, False), ({"methods": {}}, True)):
        (tmp_path / run.name / "results.json").write_text(json.dumps({**record, **methods}))
        assert (results_of(run, tmp_path, GIVEN) is not None) == there


def test_a_table_without_baselines_takes_a_run_that_has_them(tmp_path):
    """Not the other way round: then they are made, and nothing else."""
    preset = PRESETS["cluttered_mnist"]
    whole = shared_runs.reducing_run(preset, "iared2", 64, 1)
    bare = shared_runs.reducing_run(preset, "iared2", 64, 1, baselines=False)
    assert whole.name == bare.name
    folder = tmp_path / whole.name
    folder.mkdir()
    for run, methods in ((whole, {"methods": {}}), (bare, {})):
        config = flatten(run.built(tmp_path, {}))
        (folder / "results.json").write_text(json.dumps({"config": config, **methods}))
        (folder / "config.json").write_text(json.dumps(config))
        assert results_of(bare, tmp_path, {}) is not None
        assert (results_of(whole, tmp_path, {}) is not None) == (run is whole)
        check_folder(whole, tmp_path, {})


def asked(caplog, *flags):
    """The runs that a plan names."""
    caplog.clear()
    assert command.main([*flags, "--seeds", "1", "--dry-run"]) == 0
    return [line.split(":")[0] for line in caplog.messages if line.startswith("224px")]


def test_maps_of_images_bring_a_baseline_more(caplog):
    flags = ["--table=5", "--preset=imagenet", "--config.data.path=/images", "--config.weights=/w"]
    names = [f"224px-input-{name}-1" for name in input_drops.SELECTORS]
    assert asked(caplog, *flags) == [name for name in names if "memorability" not in name]
    assert asked(caplog, *flags, "--config.data.maps=/maps") == names
    preset = PRESETS["imagenet"].with_maps()
    (run, *_) = TABLES["2"].runs(preset, [224], [1])
    assert "'memorability'" in run.options["compare.selectors"]


def test_maps_of_the_papers_model_are_measured_on_other_images(caplog, capsys):
    flags = ["--table=1", "--preset=imagenet", "--config.data.path=/images", "--config.weights=/w"]
    assert command.main([*flags, "--dry-run"]) == 2
    assert "needs --segmentation=<gtsegs_ijcv.mat>" in capsys.readouterr().err
    given = [*flags, "--config.data.maps=/maps", "--segmentation=/masks.mat"]
    own = [f"224px-iared2-1{kind}" for kind in ("", "-segmentation")]
    assert asked(caplog, *given) == [*own, "224px-maps"]
    preset = dataclasses.replace(PRESETS["imagenet"], segmentation_path="/masks.mat")
    options = {"data.path": "/images", "data.maps": "/maps", "weights": "/w"}
    trained, scores, every = (
        run.built(ROOT, options) for run in TABLES["1"].runs(preset, [224], [1])
    )
    assert (trained.data.path, trained.data.maps) == ("/images", "/maps")
    for config in (scores, every):
        assert (config.data.name, config.data.path) == ("imagenet_segmentation", "/masks.mat")
        assert (config.model.name, config.model.num_classes, config.data.maps) == (
            "deit_s",
            1000,
            "",
        )
        validate(config, 1)
    assert scores.weights.endswith("224px-iared2-1/weights.safetensors")
    assert every.weights == "/w"
    for others in (["--table=2", "--preset=imagenet"], ["--table=1", "--preset=cluttered_mnist"]):
        assert command.main([*others, "--segmentation=/masks.mat", "--dry-run"]) == 2
        assert "--segmentation=/masks.mat is for --table=1" in capsys.readouterr().err


def test_a_folder_of_another_recipe_is_refused_before_anything_is_made(made, tmp_path, capsys):
    arguments = [*FLAGS, f"--root={tmp_path}", f"--out={tmp_path}/out"]
    folder = tmp_path / "cutouts" / _of_seed_1().name
    folder.mkdir(parents=True)
    config = flatten(_of_seed_1().built(tmp_path / "cutouts", GIVEN))
    (folder / "config.json").write_text(json.dumps({**config, "interpreter.steps": 7}))
    for dry_run in (["--dry-run"], []):
        assert command.main([*arguments, *dry_run]) == 2
        error = capsys.readouterr().err
        assert f"{folder} was made with other options: interpreter.steps (7 there" in error
        assert "move it away, or give another --root" in error
    assert made == []


# -- The command.


@pytest.fixture
def made(monkeypatch):
    """The names of the runs that were made: their results are fabricated, nothing is trained."""
    names = []

    def make(run, root, given):
        config = run.built(root, given)
        folder = root / run.name / ("eval" if config.mode == "eval" else "")
        folder.mkdir(parents=True, exist_ok=True)
        found = SPEED if config.mode == "eval" else fabricated(config.seed)
        record = {**found, "config": flatten(config), "versions": {"jax": "0"}}
        (folder / "results.json").write_text(json.dumps(record))
        names.append(run.name)

    monkeypatch.setattr(command, "make", make)
    return names


def test_the_command_makes_what_is_missing_and_writes_the_table(made, tmp_path, caplog):
    arguments = [*FLAGS, f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    assert command.main([*arguments, "--dry-run"]) == 0
    assert "112px-interpreters-2: missing" in caplog.text
    assert not list(tmp_path.iterdir())
    assert command.main(arguments) == 0
    expected = ["112px-head", "112px-interpreters-1", "112px-interpreters-2"]
    assert made == [*expected, "112px-interpreters-1-speed"]
    folder = tmp_path / "out" / "cutouts"
    assert "79.2 ±" in (folder / "table_4.md").read_text()
    record = json.loads((folder / "table_4.json").read_text())
    assert set(record["runs"]) == set(made)
    # In the run's own order, so that the same runs make the same file.
    assert list(record["runs"]["112px-interpreters-1"]["results"]) == list(fabricated(1))
    assert record["rows"][-1]["top1"]["values"] == [79.1, 79.2]
    for name in ("table_4.md", "table_4.csv", "table_4.json"):
        text = (folder / name).read_text()
        assert "/objects" not in text
        assert str(tmp_path) not in text
    assert command.main(arguments) == 0
    assert len(made) == 4  # nothing was made again


def test_runs_that_another_process_is_at_are_left_to_it(made, tmp_path, monkeypatch, caplog):
    """It goes on with the next, what waits for a start waits, and nothing is made twice."""
    root = tmp_path / "runs" / "cutouts"
    arguments = [*FLAGS, f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    head, first, second, speed = TABLES["4"].runs(PRESETS["cutouts"], [112], [1, 2])
    make, slept = command.make, []
    make(head, root, GIVEN)
    del made[:]
    at_work = contextlib.ExitStack()
    at_work.enter_context(locked(root / first.name, "table.lock"))

    def sleep(seconds):
        """Meanwhile the other process finishes the run."""
        slept.append(list(made))
        make(first, root, GIVEN)
        at_work.close()

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert command.main(arguments) == 0
    assert f"{first.name}: another process is at it" in caplog.text
    assert slept == [[second.name]]
    assert made == [second.name, first.name, speed.name]
    assert "79.2 ±" in (tmp_path / "out" / "cutouts" / "table_4.md").read_text()


def test_seeds_are_added_to_a_table_whose_runs_are_elsewhere(made, tmp_path, caplog):
    out = f"--out={tmp_path}/out"
    assert command.main([*FLAGS, f"--root={tmp_path}/first", out]) == 0
    first = json.loads((tmp_path / "out/cutouts/table_4.json").read_text())
    del made[:]
    seed_3 = ["--table=4", "--seeds", "3", *FLAGS[4:], out]
    assert command.main([*seed_3, f"--root={tmp_path}/second", "--add"]) == 0
    # The head's weights are in no table: what starts from them needs it made again.
    assert made == ["112px-head", "112px-interpreters-3"]
    both = json.loads((tmp_path / "out/cutouts/table_4.json").read_text())
    assert both["rows"][-1]["seeds"] == [1, 2, 3]
    assert set(both["runs"]) == {*first["runs"], "112px-interpreters-3"}
    kept = "112px-interpreters-2"
    assert both["runs"][kept] == first["runs"][kept]
    # Another table takes what it needs of it; this one has no run that has to be timed.
    caplog.clear()
    peers = [
        "--table=peers",
        *FLAGS[1:],
        f"--root={tmp_path}/third",
        out,
        "--dry-run",
        "--use",
        "4",
    ]
    assert command.main(peers) == 0
    assert "112px-interpreters-2: there" in caplog.text
    assert "112px-tome-70: missing" in caplog.text
    # Without --add it is not read.
    here = [*FLAGS, f"--root={tmp_path}/third", out, "--dry-run"]
    for options, state in ((["--add"], "there"), ([], "missing")):
        caplog.clear()
        assert command.main([*here, *options]) == 0
        assert f"112px-interpreters-1: {state}" in caplog.text


def test_runs_of_another_recipe_are_not_added(made, tmp_path, capsys):
    out = f"--out={tmp_path}/out"
    assert command.main([*FLAGS, f"--root={tmp_path}/first", out]) == 0
    before = (tmp_path / "out/cutouts/table_4.json").read_bytes()
    del made[:]
    other = [*FLAGS, f"--root={tmp_path}/second", out, "--add", "--config.interpreter.steps=7"]
    assert command.main(other) == 2
    error = capsys.readouterr().err
    assert "112px-interpreters-1 has other options: interpreter.steps (120 there, 7" in error
    assert "give another --out" in error
    assert made == []
    assert (tmp_path / "out/cutouts/table_4.json").read_bytes() == before


def test_what_was_timed_stays_when_an_earlier_seed_is_added(made, tmp_path):
    out = f"--out={tmp_path}/out"
    seed_2 = ["--table=4", "--seeds", "2", *FLAGS[4:], f"--root={tmp_path}/first", out]
    assert command.main(seed_2) == 0
    seed_1 = ["--table=4", "--seeds", "1", *FLAGS[4:], f"--root={tmp_path}/second", out]
    assert command.main([*seed_1, "--add"]) == 0
    record = json.loads((tmp_path / "out/cutouts/table_4.json").read_text())
    assert {f"112px-interpreters-{seed}-speed" for seed in (1, 2)} <= set(record["runs"])


def test_a_start_is_made_again_for_what_is_missing_alone():
    runs = TABLES["4"].runs(PRESETS["cutouts"], [112], [1, 2])
    names = [run.name for run in runs]
    head, first, second, speed = names

    def missing(found, here=()):
        return [run.name for run in missing_runs(runs, {*found, *here}, here)]

    assert missing(names) == []
    assert missing([head, first, speed]) == [head, second]
    assert missing([head, first, second]) == [head, first, speed]
    assert missing([first], here=[head]) == [first, second, speed]
    assert missing([], here=[head, first]) == [second, speed]


@pytest.mark.parametrize(("text", "message"), [(None, "there is no"), ("{", "is damaged")])
def test_a_table_that_cannot_be_added_to_is_named(text, message, tmp_path, capsys):
    path = tmp_path / "out" / "cutouts" / "table_4.json"
    if text is not None:
        path.parent.mkdir(parents=True)
        path.write_text(text)
    folders = [f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    assert command.main([*FLAGS, *folders, "--add"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error
    assert error.count("\n") == 1


def test_a_table_of_what_is_there_says_what_is_not(made, tmp_path, capsys):
    arguments = [f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    assert command.main([*FLAGS, *arguments]) == 0
    more = ["--table=4", "--seeds", "1", "2", "3", *FLAGS[4:], *arguments, "--finished"]
    assert command.main(more) == 0
    assert len(made) == 4
    page = (tmp_path / "out" / "cutouts" / "table_4.md").read_text()
    assert "Not made yet: 112px-interpreters-3." in page
    assert command.main(["--table=2", *FLAGS[1:], *arguments, "--finished"]) == 2
    assert "no run of 112 px is finished yet" in capsys.readouterr().err


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_nothing_is_one_line_and_no_file(table, tmp_path, capsys):
    folders = [f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    given = [f"--config.{key}={text}" for key, text in GIVEN.items()]
    assert command.main([f"--table={table}", "--finished", *given, *folders]) == 2
    error = capsys.readouterr().err
    assert "so there is nothing to tabulate: leave out --finished" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_is_told_by_the_exit_code_and_its_time_adds_up(tmp_path, monkeypatch):
    def stopped(config, folder):
        folder.mkdir(parents=True, exist_ok=True)
        raise Interrupted("stopped")

    monkeypatch.setattr("iared2_jax.experiment.run.run", stopped)
    arguments = [*FLAGS, f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    times = []
    for _ in range(2):
        assert command.main(arguments) == Interrupted.exit_code
        times.append(seconds_of(tmp_path / "runs" / "cutouts" / "112px-head"))
    assert 0 < times[0] < times[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table=9"], "--table: invalid choice"),
        (["--table=4", "--config.data.pth=x"], "did you mean 'data.path'?"),
        (["--table=4", "--seed=3"], "there is no flag '--seed' (did you mean '--seeds'?)"),
        (["--table=4", "--seeds", "1", "0"], "--seeds 0: the head has learned"),
        (["--table=4", "--config.seed=3"], "--config.seed is set by the table itself"),
        (["--table=ablation", "--preset=cutouts"], "is made on cluttered_mnist or imagenet, not"),
        (["--table=ablation", "--sizes", "112"], "cluttered_mnist has images of 64 px alone"),
        (["--table=4", "--sizes", "100", "--config.weights=scratch"], "100"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, tmp_path, capsys):
    folders = [f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    assert command.main([*flags, *folders]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


SMALL = {
    "data.path": "small",
    "weights": "scratch",
    **{f"{phase}.{key}": text for phase in ("interpreter", "backbone", "supervised", "distillation")
       for key, text in (("epochs", "0"), ("steps", "1"), ("batch_size", "8"))},
    "distillation.warmup_steps": "0",
    "interpreter.lengths": "(1.0,)",
    "eval.lime_samples": "8",
    "data.eval_size": "4",
    "eval.batch_size": "2",
    "log_every": "1",
}  # fmt: skip


def small_maps(folder):
    """A map of every image of the small imagenet: its brightness."""
    from iared2_jax.data.imagenet import open_prepared  # TFDS is slow to import

    for split in ("train", "validation"):
        records = open_prepared(small_imagenet(), split)
        for record in (records[i] for i in range(len(records))):
            path = (folder / split / record["file_name"]).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            open_image(record["image"]).convert("L").save(path)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("table", "preset", "model", "methods"),
    [
        ("2", "imagenet", "deit_3_blocks", 7),
        ("4", "imagenet_b", "deit_3_blocks", 5),
        ("5", "imagenet", "deit_3_blocks", 7),
        ("3", "kinetics", "timesformer_micro", 5),
    ],
)
def test_the_papers_own_settings_run_on_small_data_of_the_true_format(
    table, preset, model, methods, tmp_path, monkeypatch
):
    """Every run and row of it, a step each, on a small model from random weights."""
    if preset == "kinetics":
        pytest.importorskip("av", reason="videos are read by PyAV")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {**SMALL, "model.name": model}
    if preset == "imagenet":  # with maps of the images: a row more, MemNet's place
        options["data.maps"] = str(small_maps(tmp_path / "maps"))
    given = [f"--config.{key}={text}" for key, text in options.items()]
    flags = [f"--table={table}", f"--preset={preset}", "--seeds", "1"]
    folders = [f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]
    assert command.main([*flags, *given, *folders]) == 0
    written = json.loads((tmp_path / "out" / preset / f"table_{table}.json").read_text())
    assert len(written["rows"]) == methods
    assert [row["pixels"] for row in written["rows"]] == [224] * methods
    shares = [row["full_flops"]["value"] for row in written["rows"]]
    assert shares[0] == pytest.approx(100)
    assert all(0 < share <= 200 for share in shares)  # two passes, at most
    page = (tmp_path / "out" / preset / f"table_{table}.md").read_text()
    assert "Not made yet" not in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_table_1_of_the_papers_own_setting_runs_on_small_data(tmp_path, monkeypatch):
    """DeiT's place, its maps measured on masks in the format of ImageNet-Segmentation."""
    pytest.importorskip("h5py", reason="gtsegs_ijcv.mat is read by h5py")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "original.safetensors"
    save_weights(create_model("deit_3_blocks")[1], weights, interpreters=False)
    own = {"model.name": "deit_3_blocks", "weights": str(weights), "eval.maps_size": "4"}
    given = {**SMALL, **own}
    flags = ["--table=1", "--preset=imagenet", "--seeds", "1", "--segmentation=small"]
    flags += [f"--config.{key}={text}" for key, text in given.items()]
    assert command.main([*flags, f"--root={tmp_path}/runs", f"--out={tmp_path}/out"]) == 0
    written = json.loads((tmp_path / "out" / "imagenet" / "table_1.json").read_text())
    methods = [row["method"] for row in written["rows"]]
    assert methods[:3] == [f"IA-RED2, group {group}" for group in (1, 2, 3)]
    assert {"raw attention block 1", "gradcam", "lrp", "lime", "random"} <= set(methods)


# -- Photographs.


def test_figures_of_photographs(tmp_path):
    """Astronaut, cat, coffee, rocket and motorcycle in both figures, at any size of the model."""
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    draw = runpy.run_path(str(ROOT / "docs" / "photographs.py"))
    _, variables = create_model("vit_micro", num_classes=10, groups=3)
    options = {"name": "vit_micro", "num_classes": 10, "groups": 3}
    save_weights(variables, tmp_path / "w.safetensors", {"create_model": options})
    draw["main"]([f"--weights={tmp_path}/w.safetensors", "--size=32", f"--out={tmp_path}"])
    for name in ("heatmaps", "hierarchy"):
        with Image.open(tmp_path / f"photographs_{name}.png") as picture:
            assert min(picture.size) > 200
    shown = draw["photographs"]((32, 48))
    assert shown.shape == (5, 32, 48, 3)
    assert all(np.ptp(picture) > 100 for picture in shown)
