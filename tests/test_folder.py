"""Images in class folders: order, labels, the flat ImageNet validation folder, bad input."""

import logging
import pickle
import re

import pytest

from iared2_jax.data import folder
from iared2_jax.data.folder import open_folder
from iared2_jax.data.imagenet import validation_synsets
from iared2_jax.errors import UsageError


def put(root, *names):
    """Files whose content is their own name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


@pytest.fixture
def root(tmp_path):
    return put(tmp_path, "train/dog/2.png", "train/dog/10.JPG", "train/cat/1.jpeg", "val/dog/3.jpg")


def refused(root, split, *words):
    with pytest.raises(UsageError) as caught:
        open_folder(root, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_classes_and_files_are_sorted_and_hidden_files_ignored(root):
    put(root, "train/.DS_Store", "train/cat/._1.jpeg", "train/.cache/x.jpg")
    images = open_folder(root, "train")
    assert images.class_names == ("cat", "dog")
    assert [(item["file_name"], item["label"], item["image"]) for item in images] == [
        ("cat/1.jpeg", 0, b"train/cat/1.jpeg"),
        ("dog/10.JPG", 1, b"train/dog/10.JPG"),
        ("dog/2.png", 1, b"train/dog/2.png"),
    ]
    assert len(images) == 3
    with pytest.raises(IndexError):
        images[3]
    assert pickle.loads(pickle.dumps(images))[2] == images[2]  # for Grain's workers


@pytest.mark.parametrize("split", ["val", "validation"])
def test_val_has_the_classes_of_train(root, split):
    (only,) = open_folder(root, split)  # there is no cat
    assert only == {"image": b"val/dog/3.jpg", "label": 1, "file_name": "dog/3.jpg"}
    assert open_folder(root, split).class_names == ("cat", "dog")


def test_other_files_are_counted_in_one_warning(root, caplog):
    put(root, "train/list.txt", "train/cat/a.gif", "train/dog/b.gif", "train/dog/more/c.jpg")
    with caplog.at_level(logging.WARNING, logger=folder.__name__):
        assert len(open_folder(root, "train")) == 3
    (record,) = caplog.records
    assert "4 entries" in record.getMessage()
    assert ".gif (2), .txt (1), folder (1)" in record.getMessage()


def test_what_is_missing_or_empty_is_named(tmp_path, root):
    refused(root, "test", "'test'", "train")
    refused(tmp_path / "nowhere", "train", "nowhere/train", "root/train/<class>")
    # Classes straight under the root could be any split: they are none.
    refused(put(tmp_path / "bare", "cat/1.jpg", "dog/1.jpg"), "train", "bare/train is not there")
    refused(put(tmp_path / "loose", "train/1.jpg"), "train", "no classes")
    refused(put(tmp_path / "half", "train/cat/1.jpg"), "val", "half/val is not there")
    put(root, "train/emu/notes.txt", "val/fox/1.jpg")
    refused(root, "train", "train/emu holds no .jpg")
    refused(root, "val", "'fox'", "not in")
    put(tmp_path / "void", "train/cat/1.jpg", "val/notes.txt")
    refused(tmp_path / "void", "val", "neither class folders nor images")


def imagenet_root(tmp_path, numbers):
    wanted = {validation_synsets()[number - 1] for number in numbers}
    put(tmp_path, *(f"train/{synset}/1.JPEG" for synset in wanted))
    return put(tmp_path, *(f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers))


def test_flat_imagenet_validation_needs_no_list(tmp_path):
    numbers = (1, 7, 20_000, 50_000)  # a part of it will do
    images = open_folder(imagenet_root(tmp_path, numbers), "val")
    assert len(images) == 4
    for number, item in zip(numbers, images, strict=True):
        assert item["file_name"] == f"ILSVRC2012_val_{number:08d}.JPEG"
        assert images.class_names[item["label"]] == validation_synsets()[number - 1]


def test_the_devkits_list_must_agree(tmp_path):
    root = imagenet_root(tmp_path, (1, 2))
    devkit = root / "ILSVRC2012_validation_ground_truth.txt"
    # The ids follow an order of their own: any one-to-one map to the synsets is right.
    ids = {synset: 1000 - place for place, synset in enumerate(sorted(set(validation_synsets())))}
    official = [str(ids[synset]) for synset in validation_synsets()]
    devkit.write_text("\n".join(official) + "\n")
    assert len(open_folder(root, "val")) == 2
    devkit.write_text("\n".join(official[:-1]))
    refused(root, "val", "49999 lines for 50000 images")
    devkit.write_text("\n".join([official[1], *official[1:]]))
    refused(root, "val", "not the official list")
    devkit.write_text("\n".join("1" for _ in official))
    refused(root, "val", "not the official list")


def test_another_flat_folder_needs_its_list(tmp_path):
    root = put(tmp_path, "train/polar bear/1.jpg", "train/cat/1.jpg", "val/b.jpg", "val/a.png")
    refused(root, "val", "val_synsets.txt", "no class folders")
    listed = root / "val_synsets.txt"
    listed.write_text("polar bear\ncat\n")
    images = open_folder(root, "val")
    assert [(item["file_name"], item["label"]) for item in images] == [("a.png", 1), ("b.jpg", 0)]
    listed.write_text("cat\n")
    refused(root, "val", "1 lines for 2 images")
    listed.write_text("cat\nyak\n")
    refused(root, "val", "b.jpg", "'yak'", "not in train")


def test_numbers_beyond_imagenets_are_refused(tmp_path):
    root = put(tmp_path, "train/cat/1.jpg", "val/ILSVRC2012_val_00050001.JPEG")
    refused(root, "val", "val_synsets.txt")


def test_messages_name_the_split_folder(root):
    with pytest.raises(UsageError, match=re.escape(str(root))):
        open_folder(put(root, "val/yak/1.jpg"), "val")
