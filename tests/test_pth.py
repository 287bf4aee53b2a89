"""`.pth` files: what honest ones hold, and that forged or damaged ones are refused in a sentence.

The files are put together from pickle opcodes by hand, as an attacker would; torch is not needed.
"""

import argparse
import io
import pickle
import struct
import sys
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from iared2_jax.errors import UsageError
from iared2_jax.weights.formats.pth import find_state_dict, read_pth


@dataclass
class Name:
    module: str
    name: str


@dataclass
class Call:
    function: Any
    args: tuple


@dataclass
class Build:
    object: Any
    state: Any


@dataclass
class Persistent:
    pid: Any


@dataclass
class Raw:
    opcodes: bytes


def encode(value):
    """Protocol 2 opcodes that leave `value` on the stack."""
    match value:
        case Raw(opcodes):
            return opcodes
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, args):
            return encode(function) + encode(args) + b"R"
        case Build(target, state):
            return encode(target) + encode(state) + b"b"
        case Persistent(pid):
            return encode(pid) + b"Q"
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def pack(content, storages=(), extra=(), compression=zipfile.ZIP_STORED):
    """The bytes of a checkpoint: `content` as its pickle, `storages` as data/0, data/1, ..."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + encode(content) + b".")
        for i, storage in enumerate(storages):
            archive.writestr(f"x/data/{i}", storage)
        for name, data in extra:
            archive.writestr(name, data)
    return buffer.getvalue()


def tensor(key, kind, count, size, stride, offset=0):
    storage = Persistent(("storage", Name("torch", f"{kind}Storage"), str(key), "cpu", count))
    hooks = Call(Name("collections", "OrderedDict"), ())
    args = (storage, offset, size, stride, False, hooks)
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), args)


@pytest.fixture
def pth(tmp_path):
    """Writes bytes to x.pth and gives the path."""

    def write(data):
        path = tmp_path / "x.pth"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def refused(pth):
    """The one sentence in which x.pth with these bytes is refused."""

    def read(data):
        path = pth(data)
        with pytest.raises(UsageError) as caught:
            read_pth(path)
        text = str(caught.value)
        assert text.startswith(f"{path} ")
        assert "\n" not in text
        return text

    return read


ONE = np.arange(6, dtype=np.float32)


def one_tensor(size=(2, 3), stride=(3, 1), offset=0, count=6, key=0):
    content = {"w": tensor(key, "Float", count, size, stride, offset)}
    return pack(content, [ONE.tobytes()])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Float", "f4"), ("Double", "f8"), ("Half", "f2"), ("Char", "i1"), ("Short", "i2"),
        ("Int", "i4"), ("Long", "i8"), ("Byte", "u1"), ("Bool", "?"),
    ],
)  # fmt: skip
def test_plain_dtypes(pth, kind, dtype):
    values = np.array([[0, 1, 2], [3, 4, 100]]).astype(dtype)
    path = pth(pack({"w": tensor(0, kind, 6, (2, 3), (3, 1))}, [values.tobytes()]))
    loaded = read_pth(path)["w"]
    assert loaded.dtype == values.dtype
    np.testing.assert_array_equal(loaded, values)


def test_bfloat16_comes_as_float32(pth):
    values = np.array([0.0, 1.0, -2.5, np.inf, 3.140625], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    loaded = read_pth(pth(pack({"w": tensor(0, "BFloat16", 5, (5,), (1,))}, [halves.tobytes()])))
    assert loaded["w"].dtype == np.float32
    np.testing.assert_array_equal(loaded["w"], values)


def test_views_scalars_and_shared_storages(pth):
    content = {
        "transposed": tensor(0, "Float", 6, (3, 2), (1, 3)),
        "tail": tensor(0, "Float", 6, (2,), (1,), offset=4),
        "every_other": tensor(0, "Float", 6, (3,), (2,)),
        "scalar": tensor(0, "Float", 6, (), (), offset=5),
        "empty": tensor(0, "Float", 6, (0, 4), (4, 1)),
        "nothing": tensor(1, "Float", 0, (0,), (1,)),
        "expanded": tensor(0, "Float", 6, (5, 2), (0, 1)),
    }
    loaded = read_pth(pth(pack(content, [ONE.tobytes(), b""])))
    np.testing.assert_array_equal(loaded["transposed"], ONE.reshape(2, 3).T)
    np.testing.assert_array_equal(loaded["tail"], ONE[4:])
    np.testing.assert_array_equal(loaded["every_other"], ONE[::2])
    assert loaded["scalar"].shape == ()
    assert loaded["scalar"] == 5
    assert loaded["empty"].shape == (0, 4)
    assert loaded["nothing"].shape == (0,)
    np.testing.assert_array_equal(loaded["expanded"], np.tile(ONE[:2], (5, 1)))
    assert np.shares_memory(loaded["tail"], loaded["transposed"])


def test_what_stands_beside_the_weights_is_inert(pth):
    new = Raw(b"cargparse\nNamespace\n)\x81")
    dtype = Call(Name("numpy", "dtype"), ("f8", False, True))
    scalar = Call(Name("numpy.core.multiarray", "scalar"), (dtype, "12345678"))
    weights = Build(Call(Name("collections", "OrderedDict"), ()), {"_metadata": {"": 1}})
    loaded = read_pth(
        pth(
            pack(
                {
                    "args": Build(new, {"lr": 0.1, "__class__": 1}),
                    "best": scalar,
                    "size": Call(Name("torch", "Size"), ((1, 2),)),
                    "dtype": Name("torch", "float32"),
                    "model": weights,
                    "epoch": 3,
                }
            )
        )
    )
    assert loaded["epoch"] == 3
    assert loaded["model"] == {}
    assert not hasattr(loaded["args"], "lr")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"), ("os", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
        ("__builtin__", "getattr"), ("numpy", "load"), ("torch", "load"), ("torch", "hub"),
        ("torch.storage", "_load_from_bytes"), ("argparse", "Namespace.__init__.__globals__"),
    ],
)  # fmt: skip
def test_code_is_refused_and_not_run(refused, tmp_path, module, name):
    canary = tmp_path / "canary"
    evil = Call(Name(module, name), (f"touch {canary}",))
    weights = tensor(0, "Float", 6, (6,), (1,))
    text = refused(pack({"w": weights, "x": evil}, [ONE.tobytes()]))
    assert f"holds code ({module}.{name}), not only tensors: it was not loaded" in text
    assert not canary.exists()


def test_reduce_is_refused_and_not_run(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'canary'}",)

    for protocol in (2, 4, 5):
        program = pickle.dumps({"w": Evil()}, protocol)
        assert "system), not only" in refused(pack(Raw(program[2:-1])))
    assert not (tmp_path / "canary").exists()


def test_classes_of_the_reader_cannot_be_changed(refused, pth):
    slots = (None, {"__setstate__": 1, "__new__": 2, "items": 3})
    for module, name in [
        ("argparse", "Namespace"), ("collections", "OrderedDict"), ("torch", "FloatStorage"),
        ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ]:  # fmt: skip
        refused(pack({"x": Build(Name(module, name), slots)}))
    instance = Build(Call(Name("collections", "OrderedDict"), ()), slots)
    assert list(read_pth(pth(pack({"x": instance})))["x"].items()) == []
    assert read_pth(pth(one_tensor()))["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (3, 2)}, "outside its storage"),
        ({"offset": 1}, "outside its storage"),
        ({"stride": (-3, 1)}, "no possible shape"),
        ({"offset": -1}, "no possible shape"),
        ({"size": (2, True)}, "no possible shape"),
        ({"size": (2.0, 3)}, "no possible shape"),
        ({"size": (2,)}, "no possible shape"),
        ({"size": 6, "stride": 1}, "no possible shape"),
        ({"size": (100_000, 1_000_000), "stride": (0, 0)}, "tensor of shape"),
        ({"size": (1 << 62, 1 << 62), "stride": (0, 0)}, "tensor of shape"),
        ({"size": (0, 1 << 70)}, "cannot be read"),
        ({"count": 7}, "7 values of 4 bytes, but holds 24 bytes"),
        ({"count": 1 << 60}, "but holds 24 bytes"),
        ({"count": -6}, "type that is not known"),
        ({"key": 9}, "cannot be read"),
        ({"key": "../data.pkl"}, "cannot be read"),
        ({"size": (1,) * 80, "stride": (1,) * 80}, "cannot be read"),
    ],
)
def test_impossible_tensors_are_refused(refused, change, message):
    assert message in refused(one_tensor(**change))


def test_bombs_are_refused(refused):
    content = {"w": tensor(0, "Byte", 1 << 28, (1 << 28,), (1,))}
    deflated = pack(content, [bytes(1 << 24)], compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(deflated)
    # Stored, but the directory claims 1 GiB where there are 24 bytes.
    data = bytearray(one_tensor())
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", 1 << 30)
    assert "compressed" in refused(bytes(data))
    # A memo index of two billion would take 32 GiB.
    assert "too many objects" in refused(pack({"w": Raw(b"}r\xff\xff\xff\x7f")}))
    many = Raw(b"ccollections\nOrderedDict\nq\x000(" + b"h\x00)R" * 100_001 + b"l")
    assert "too many objects" in refused(pack({"w": many}))
    # To hash a million nested tuples would overflow the stack and end Python itself.
    assert "too many objects" in refused(pack({"w": Raw(b"})" + b"\x85" * 1_000_000 + b"K\x01s")}))
    assert "far more than tensors" in refused(pack({"w": Raw(b"N" * ((16 << 20) + 1))}))


def test_every_cut_is_one_sentence(refused):
    data = one_tensor()
    for end in range(0, len(data), 7):
        refused(data[:end])
    assert "cut short or damaged" in refused(data[:-1])


def test_every_bit_flip_is_refused_or_harmless(pth):
    data = one_tensor()
    assert np.array_equal(read_pth(pth(data))["w"].ravel(), ONE)
    for at in range(len(data)):
        path = pth(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            loaded = read_pth(path)
        except UsageError:
            continue
        np.testing.assert_array_equal(loaded["w"].ravel(), ONE)  # dates and the like


def test_flipped_weights_fail_their_checksum(refused):
    data = one_tensor()
    at = data.index(ONE.tobytes())
    text = refused(data[:at] + b"\x01" + data[at + 1 :])
    assert "Bad CRC-32" in text
    assert "download or copy it again" in text


def test_other_files_are_refused(refused, tmp_path):
    assert "not a PyTorch checkpoint (it starts with b'<html><b')" in refused(b"<html><body>404")
    assert "not a PyTorch checkpoint" in refused(b"")
    assert "not a PyTorch checkpoint" in refused(pickle.dumps({"w": 1}))
    assert "big-endian" in refused(pack({}, extra=[("x/byteorder", b"big")]))
    assert "holds a int" in refused(pack(3))
    assert "no possible shape" in refused(
        pack(Call(Name("torch._utils", "_rebuild_tensor_v2"), (1, 0, (1,), (1,))))
    )
    assert "cannot be read" in refused(pack(Persistent("x")))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.json", "{}")
    assert "no data.pkl" in refused(buffer.getvalue())
    with pytest.raises(UsageError, match="is not a file"):
        read_pth(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_pth(tmp_path / "none.pth")


def test_names_of_a_file_cannot_steer_the_terminal(refused):
    program = b"\x80\x04\x8c\x05\x1b[2Jm\x8c\x03a\nb\x93"
    assert r"\x1b[2Jm.a\nb" in refused(pack(Raw(program[2:])))


def test_legacy_without_torch_says_what_to_do(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refused(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")


def test_find_state_dict():
    weights = {"a": np.zeros(1), "b": np.ones(2)}
    assert find_state_dict(weights) == weights
    for entry in ("model", "state_dict", "model_state", "module"):
        assert find_state_dict({entry: weights, "epoch": 1, "optimizer": {"state": {}}}) == weights
    assert list(find_state_dict({"model": "vit", "state_dict": weights})) == ["a", "b"]
    mixed = {"module.a": weights["a"], "b": weights["b"]}
    assert list(find_state_dict({"model": mixed})) == ["module.a", "b"]


@pytest.mark.parametrize(
    "checkpoint", [{"epoch": 3, "net": {}}, {"epoch": 3, "net": {}, "model": {}}]
)
def test_find_state_dict_names_the_keys_there_are(checkpoint):
    with pytest.raises(UsageError, match="only the keys epoch, net"):
        find_state_dict(checkpoint)
    with pytest.raises(UsageError, match=r"\(none\)"):
        find_state_dict({})


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def training_state(torch):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    grid = torch.arange(24.0).reshape(2, 3, 4)
    odd = {
        "permuted": grid.permute(2, 0, 1), "slice": grid[:, ::2, 1:],
        "expanded": grid[:1].expand(7, 3, 4),
        "parameter": torch.nn.Parameter(grid), "half": grid.half(), "bf16": grid.bfloat16(),
        "bool": grid > 3, "scalar": torch.tensor(7), "empty": torch.zeros(0, 3),
    }  # fmt: skip
    args = argparse.Namespace(lr=0.1, model="deit_tiny_patch16_224")
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "odd": odd,
            "args": args, "epoch": 299}  # fmt: skip


def assert_same(torch, saved, loaded):
    """`loaded` holds `saved`, tensor by tensor."""
    if isinstance(saved, dict):
        assert list(saved) == list(loaded)
        for key in saved:
            assert_same(torch, saved[key], loaded[key])
    elif isinstance(saved, torch.Tensor):
        assert isinstance(loaded, np.ndarray)
        expected = saved.detach().float() if saved.dtype == torch.bfloat16 else saved.detach()
        assert loaded.dtype == expected.numpy().dtype
        np.testing.assert_array_equal(loaded, expected.numpy())
    elif isinstance(saved, list):
        assert len(saved) == len(loaded)
        for one, other in zip(saved, loaded, strict=True):
            assert_same(torch, one, other)
    elif isinstance(saved, int | float | str):
        assert saved == loaded


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(torch, tmp_path, zipped):
    path = tmp_path / "deit.pth"
    saved = training_state(torch)
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    loaded = read_pth(path)
    assert_same(torch, saved, loaded)
    assert list(find_state_dict(loaded)) == list(saved["model"])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_of_torch_with_other_objects(torch, tmp_path, protocol):
    path = tmp_path / "x.pth"
    saved = {
        "w": torch.ones(2), "score": np.float64(0.5), "history": np.arange(3), "seen": {1, 2},
        "device": torch.device("cpu"), "dtype": torch.float16, "shape": torch.Size([1, 2]),
    }  # fmt: skip
    torch.save(saved, path, pickle_protocol=protocol)
    loaded = read_pth(path)
    assert list(loaded) == list(saved)
    np.testing.assert_array_equal(loaded["w"], [1, 1])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_of_torch_is_code(torch, refused, zipped):
    buffer = io.BytesIO()
    torch.save({"model": torch.nn.Linear(2, 2)}, buffer, _use_new_zipfile_serialization=zipped)
    text = refused(buffer.getvalue())
    assert "holds code (torch.nn.modules.linear.Linear)" in text
    assert "state_dict() instead" in text


def test_damaged_legacy_files(torch, refused, tmp_path):
    buffer = io.BytesIO()
    torch.save(training_state(torch), buffer, _use_new_zipfile_serialization=False)
    for end in (15, 40, 200, len(buffer.getvalue()) - 4):
        refused(buffer.getvalue()[:end])
