"""ImageNet from small tars of the official layout: records, order, a killed run, bad input."""

import hashlib
import io
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from iared2_jax.data import imagenet
from iared2_jax.errors import DataError, UsageError

ROOT = Path(__file__).parent.parent
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"
NAMES = [
    *("n01440764_10026.JPEG", "n01440764_2.JPEG", "n01440764_7.JPEG"),
    *(CMYK, "n01739381_5.JPEG"),
    *(PNG, "n02105855_3.JPEG"),
    "n15075141_9.JPEG",
]
LABELS = {"n01440764": 0, "n01739381": 59, "n02105855": 230, "n15075141": 999}
VALIDATION = [3, 1, 2, 50_000]  # in no order, as in the official tar


def picture(name):
    """A smooth picture of its own for every name, so that a JPEG keeps it nearly."""
    phase = hashlib.md5(name.encode()).digest()[:3]
    rows, columns = np.mgrid[:24, :32]
    channels = [128 + 100 * np.sin(0.1 * rows + 0.07 * columns + p) for p in phase]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(name):
    stream = io.BytesIO()
    image = picture(name)
    if name == CMYK:
        image = image.convert("CMYK")
    image.save(stream, "PNG" if name == PNG else "JPEG")
    return stream.getvalue()


def tar(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def class_tars(names):
    synsets = sorted({name[:9] for name in names})
    return {f"{s}.tar": tar({n: encoded(n) for n in names if n[:9] == s}) for s in synsets}


def write_tars(folder):
    """Both tars in the official layout, with the CMYK and the PNG special case."""
    (folder / TRAIN_TAR).write_bytes(tar(class_tars(NAMES)))
    files = {val_name(number): encoded(val_name(number)) for number in VALIDATION}
    (folder / VAL_TAR).write_bytes(tar(files))
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    assert imagenet.prepare(tars, data_dir) == data_dir / "imagenet2012" / "5.1.0"
    return data_dir


@pytest.fixture
def copy(prepared, tmp_path):
    """The prepared folder, to be damaged."""
    folder = tmp_path / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    for path in (prepared / "imagenet2012" / "5.1.0").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def no_network_and_no_tensorflow(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network"))
    yield
    assert "tensorflow" not in sys.modules


def refused(function, *args, words):
    with pytest.raises(UsageError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def in_tfds_order(split, names):
    return sorted(names, key=lambda name: hashlib.md5((split + name).encode()).hexdigest())


# The labels


def test_the_thousand_classes():
    assert len(imagenet.synsets()) == len(set(imagenet.synsets())) == 1000
    assert list(imagenet.synsets()) == sorted(imagenet.synsets())
    assert len(set(imagenet.class_names())) == 1000
    named = dict(zip(imagenet.synsets(), imagenet.class_names(), strict=True))
    assert named["n01440764"] == "tench, Tinca tinca"
    assert named["n02123045"] == "tabby, tabby cat"
    assert named["n15075141"].startswith("toilet tissue")
    votes = imagenet.validation_synsets()
    assert len(votes) == 50_000
    assert {votes.count(synset) for synset in imagenet.synsets()[::100]} == {50}


def test_class_names_are_timms():
    spec = pytest.importorskip("importlib.util").find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    path = Path(spec.origin).parent / "data" / "_info" / "imagenet_synset_to_lemma.txt"
    lemmas = dict(line.split("\t") for line in path.read_text().splitlines())
    differ = [
        (name, lemmas[synset])
        for synset, name in zip(imagenet.synsets(), imagenet.class_names(), strict=True)
        if name != lemmas[synset]
    ]
    assert differ == [("crane (bird)", "crane"), ("crane (machine)", "crane")]


# Preparing


def test_every_record_is_there_in_the_order_of_tfds(prepared):
    train = imagenet.open_prepared(prepared, "train")
    assert [item["file_name"] for item in train] == in_tfds_order("train", NAMES)
    for item in train:
        name = item["file_name"]
        assert item["label"] == LABELS[name[:9]]
        if name not in (CMYK, PNG):
            assert item["image"] == encoded(name)
    validation = imagenet.open_prepared(prepared, "validation")
    expected = in_tfds_order("validation", map(val_name, VALIDATION))
    assert [item["file_name"] for item in validation] == expected
    for item in validation:
        number = int(item["file_name"][15:23])
        synset = imagenet.validation_synsets()[number - 1]
        assert item["label"] == imagenet.synsets().index(synset)
        assert item["image"] == encoded(item["file_name"])


@pytest.mark.parametrize("name", [CMYK, PNG])
def test_odd_images_become_rgb_jpegs(prepared, name):
    (item,) = [x for x in imagenet.open_prepared(prepared, "train") if x["file_name"] == name]
    image = Image.open(io.BytesIO(item["image"]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 24))
    difference = np.asarray(image, np.int32) - np.asarray(picture(name), np.int32)
    assert np.abs(difference).max() < 16


def test_the_list_of_odd_images():
    assert len(imagenet.NOT_RGB_JPEG) == 23
    assert {CMYK, PNG} < imagenet.NOT_RGB_JPEG


def test_tfds_own_shuffle_writes_the_same_records(prepared, tmp_path):
    class Oracle(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=imagenet.synsets()),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for name in NAMES:
                if name not in (CMYK, PNG):
                    image = io.BytesIO(encoded(name))
                    yield name, {"image": image, "label": name[:9], "file_name": name}

    oracle = Oracle(data_dir=tmp_path)
    oracle.download_and_prepare(file_format="array_record")
    ours = tfds.builder_from_directory(prepared / "imagenet2012" / "5.1.0")

    def raw(builder):
        from tensorflow_datasets.core.decode import DeserializeMethod

        return list(builder.as_data_source("train", deserialize_method=DeserializeMethod.RAW_BYTES))

    plain = [
        record
        for record, name in zip(raw(ours), in_tfds_order("train", NAMES), strict=True)
        if name not in (CMYK, PNG)
    ]
    assert plain == raw(oracle)


def test_tfds_reads_it_by_its_own_name(prepared):
    source = tfds.data_source("imagenet2012", split="train", data_dir=prepared, download=False)
    item = source[0]
    assert item["file_name"].decode() == in_tfds_order("train", NAMES)[0]
    assert item["image"].shape == (24, 32, 3)


def test_many_shards_hold_the_same_records(tars, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet.shard_utils.ShardConfig, "min_shard_size", 2_000)
    imagenet.prepare(tars, tmp_path)
    several = imagenet.open_prepared(tmp_path, "train")
    assert len(list((tmp_path / "imagenet2012" / "5.1.0").glob("*train*"))) > 1
    assert list(several) == list(imagenet.open_prepared(prepared, "train"))


def test_a_prepared_folder_is_checked_and_kept(tars, prepared, caplog):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    with caplog.at_level(logging.INFO, logger=imagenet.__name__):
        imagenet.prepare(tars / "not needed any more", prepared)
    assert "train: 8 images, prepared before" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_too_few_images_are_said(tars, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger=imagenet.__name__):
        imagenet.prepare(tars, tmp_path)
    assert "train: there are 8 images, not the official 1281167" in caplog.text


# Preparing, killed


SLOW = """
import sys, time
from pathlib import Path
from iared2_jax.data import imagenet
read = imagenet._Image.read
imagenet._Image.read = lambda self: (time.sleep(0.3), read(self))[1]
imagenet.prepare(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_run_starts_over(tars, prepared, tmp_path, caplog):
    run = subprocess.Popen([sys.executable, "-c", SLOW, tars, tmp_path], cwd=ROOT)
    parent = tmp_path / "imagenet2012"
    deadline = time.monotonic() + 60
    while not list(parent.glob("incomplete.*/*train*")):  # until it writes its first shard
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    (leftover,) = parent.iterdir()
    refused(imagenet.open_prepared, tmp_path, "train", words=["no prepared imagenet2012"])

    with caplog.at_level(logging.WARNING, logger=imagenet.__name__):
        imagenet.prepare(tars, tmp_path)
    assert f"{leftover} was left by a run that was cut off" in caplog.text
    assert [path.name for path in parent.iterdir()] == ["5.1.0"]
    for split in ("train", "validation"):
        again = list(imagenet.open_prepared(tmp_path, split))
        assert again == list(imagenet.open_prepared(prepared, split))


# Preparing, from bad tars


def test_missing_tars_are_named(tars, tmp_path):
    refused(imagenet.prepare, tmp_path, tmp_path, words=[f"{TRAIN_TAR} and {VAL_TAR}"])
    (tmp_path / TRAIN_TAR).write_bytes((tars / TRAIN_TAR).read_bytes())
    with pytest.raises(UsageError) as caught:
        imagenet.prepare(tmp_path, tmp_path / "data")
    assert VAL_TAR in str(caught.value)
    assert TRAIN_TAR not in str(caught.value)
    assert not (tmp_path / "data").exists()


def odd_member(kind):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("n01440764_1.JPEG")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("train", "word"),
    [
        (b"<html>not found</html>" * 100, "damaged or no tar"),
        (tar({}), "no images"),
        (tar({"../n01440764.tar": tar({})}), "'../n01440764.tar'"),
        (tar({"n00000001.tar": tar({})}), "n00000001"),
        (tar({"n01440764.tar": tar({"/n01440764_1.JPEG": b""})}), "'/n01440764_1.JPEG'"),
        (tar({"n01440764.tar": tar({"n01443537_1.JPEG": b""})}), "'n01443537_1.JPEG'"),
        (tar({"n01440764.tar": odd_member(tarfile.SYMTYPE)}), "'n01440764_1.JPEG'"),
        (tar({"n01440764.tar": b"x" * 2000}), "damaged or no tar"),
        (tar({"n01440764.tar": tar({"n01440764_1.JPEG": b"x" * 9000})[:5000]}), "damaged or no"),
        (tar(class_tars(["n01440764_1.JPEG"]))[:1500], "damaged or no tar"),
    ],
)
def test_bad_train_tars_are_refused_before_anything_is_written(tars, tmp_path, train, word):
    (tmp_path / TRAIN_TAR).write_bytes(train)
    (tmp_path / VAL_TAR).symlink_to(tars / VAL_TAR)
    refused(imagenet.prepare, tmp_path, tmp_path / "data", words=[word, TRAIN_TAR])
    assert not (tmp_path / "data").exists()


def test_a_file_twice_is_refused(tars, tmp_path):
    (tmp_path / TRAIN_TAR).symlink_to(tars / TRAIN_TAR)
    content = tar({val_name(1): b"a"})
    (tmp_path / VAL_TAR).write_bytes(content[:1024] + content)  # header and data, then all again
    refused(imagenet.prepare, tmp_path, tmp_path / "data", words=[val_name(1), "twice"])


@pytest.mark.parametrize("number", [0, 50_001])
def test_validation_images_without_a_label_are_refused(tars, tmp_path, number):
    (tmp_path / TRAIN_TAR).symlink_to(tars / TRAIN_TAR)
    (tmp_path / VAL_TAR).write_bytes(tar({val_name(number): b"a"}))
    refused(imagenet.prepare, tmp_path, tmp_path / "data", words=[val_name(number)])


def test_a_full_disk_is_seen_before(tars, tmp_path, monkeypatch):
    free = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(imagenet.shutil.os, "statvfs", lambda _: free)
    refused(imagenet.prepare, tars, tmp_path, words=["0.0 GB free"])


def test_a_folder_that_is_in_the_way_is_named(tars, tmp_path):
    folder = tmp_path / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    refused(imagenet.prepare, tars, tmp_path, words=[str(folder), "remove it"])


def test_a_data_dir_that_is_a_file_is_refused(tars, tmp_path):
    (tmp_path / "file").touch()
    refused(imagenet.prepare, tars, tmp_path / "file", words=["cannot be made"])


# Opening


def test_all_three_folders_open_the_same(prepared):
    folders = [prepared, prepared / "imagenet2012", prepared / "imagenet2012" / "5.1.0"]
    first, *others = [imagenet.open_prepared(folder, "train") for folder in folders]
    assert len(first) == 8
    assert first.class_names == imagenet.class_names()
    for other in others:
        assert list(other) == list(first)
    with pytest.raises(IndexError):
        first[8]
    assert pickle.loads(pickle.dumps(first))[5] == first[5]  # for Grain's workers


def test_a_wrong_split_or_folder_is_named(prepared, tmp_path):
    refused(imagenet.open_prepared, prepared, "validatoin", words=["'validatoin'", "'validation'"])
    command = "python -m iared2_jax.data.imagenet --tars"
    for folder in (tmp_path, tmp_path / "nowhere"):
        refused(imagenet.open_prepared, folder, "train", words=[str(folder), command])


def test_tfrecord_is_refused_with_the_command(copy):
    info = copy / "dataset_info.json"
    fields = json.loads(info.read_text())
    for file_format in ("tfrecord", None):  # None: as TFDS did before it had formats
        fields.pop("fileFormat")
        if file_format:
            fields["fileFormat"] = file_format
        info.write_text(json.dumps(fields))
        words = ["prepared as tfrecord", "python -m iared2_jax.data.imagenet"]
        refused(imagenet.open_prepared, copy, "train", words=words)
        fields["fileFormat"] = "array_record"
    info.write_text(info.read_text()[:-20])
    refused(imagenet.open_prepared, copy, "train", words=["dataset_info.json is damaged"])


def test_other_classes_are_refused(copy):
    labels = copy / "label.labels.txt"
    labels.write_text("\n".join(reversed(labels.read_text().split())))
    refused(imagenet.open_prepared, copy, "train", words=["not imagenet2012"])


def cut(path, size):
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: cut(path, 65536), "holds 0 of 8 records"),
        (lambda path: cut(path, path.stat().st_size - 1), "holds 0 of 8 records"),
        (lambda path: cut(path, 0), "holds 0 of 8 records"),
        (lambda path: path.write_bytes(b"x" * 200_000), "holds 0 of 8 records"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["64 KiB", "1 byte", "empty", "another file", "missing"],
)
def test_cut_shards_are_named(copy, damage, word):
    (shard,) = copy.glob("*-train.*")
    damage(shard)
    refused(imagenet.open_prepared, copy, "train", words=[word, str(shard), "prepare anew"])
    imagenet.open_prepared(copy, "validation")  # whose shard is whole
    refused(imagenet.prepare, copy, copy.parent.parent, words=[word])


def test_a_flipped_byte_names_its_shard(copy):
    (shard,) = copy.glob("*-train.*")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 255  # within the first records, which are compressed
    shard.write_bytes(content)
    records = imagenet.open_prepared(copy, "train")
    with pytest.raises(DataError, match="is damaged: copy it again") as caught:
        list(records)
    assert str(shard) in str(caught.value)


# The command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "iared2_jax.data.imagenet", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command(tars, tmp_path):
    done = command(f"--tars={tars}", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.rpartition(",")[0] for line in lines if " of " in line] == [
        "train: 8 of 8 images",
        "validation: 4 of 4 images",
    ]
    assert "ownload" not in done.stdout
    assert len(imagenet.open_prepared(tmp_path, "train")) == 8


def test_a_wrong_command_ends_in_one_line(tmp_path, capsys):
    for arguments in ([], ["--tars=x"], [f"--tars={tmp_path}", f"--data_dir={tmp_path}"]):
        assert imagenet.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("iared2_jax: ")
