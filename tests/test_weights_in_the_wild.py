"""Weights as people have them: wrapped, sharded, headless, averaged, of other sizes, or broken."""

import io
import json
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from iared2_jax import create_model, load_model, load_weights, save_weights
from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import images
from iared2_jax.token_reduction.create import create_module
from iared2_jax.weights.files import read_tensors
from iared2_jax.weights.formats.npz import read_npz
from iared2_jax.weights.formats.pth import find_state_dict
from iared2_jax.weights.positions import resize_positions
from iared2_jax.weights.save import timm_tensors


@pytest.fixture(scope="module")
def micro():
    """Module, variables, and the backbone by timm's names."""
    module, variables = create_model("vit_micro", seed=5)
    return module, variables, timm_tensors(variables, interpreters=False)


def assert_loaded(module, variables, source, **options):
    loaded = load_weights(module, source, **options)["params"]["backbone"]
    jax.tree.map(np.testing.assert_array_equal, loaded, variables["params"]["backbone"])


# -- Wrapped, sharded, among other files -----------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "model.model.", "module._orig_mod.model."]
)
def test_prefixes_of_wrappers_are_taken_off(micro, tmp_path, prefix):
    module, variables, tensors = micro
    save_file({prefix + name: x for name, x in tensors.items()}, tmp_path / "w.safetensors")
    assert_loaded(module, variables, tmp_path / "w.safetensors")


def test_a_prefix_that_not_all_share_stays(tmp_path):
    save_file({"model.a": np.zeros(2), "b": np.zeros(2)}, tmp_path / "w.safetensors")
    assert set(read_tensors(tmp_path / "w.safetensors")[0]) == {"model.a", "b"}


def sharded(tensors, folder):
    names = sorted(tensors)
    files = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def test_shards_are_read_together(micro, tmp_path):
    module, variables, tensors = micro
    index = sharded(tensors, tmp_path)
    for source in (tmp_path, index):
        assert_loaded(module, variables, source)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lists model-00002-of-00002\.safetensors, which"):
        load_weights(module, tmp_path)
    index.write_text('{"weight_map": []}')
    with pytest.raises(UsageError, match="no index"):
        load_weights(module, tmp_path)


def test_a_trainers_folder_is_searched_for_weights_alone(micro, tmp_path):
    module, variables, tensors = micro
    for other in ("rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin"):
        (tmp_path / other).write_bytes(b"no weights")
    with pytest.raises(UsageError, match="has no weights"):
        load_weights(module, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_loaded(module, variables, tmp_path)


# -- No head, another head, an average -------------------------------------------------------------


def test_a_backbone_without_a_head_gets_a_fresh_one_or_is_refused(micro, tmp_path, caplog):
    module, variables, tensors = micro
    path = tmp_path / "trunk.safetensors"
    headless = {name: x for name, x in tensors.items() if not name.startswith("head")}
    # in21k files have a layer between features and head, of no use here.
    save_file({**headless, "pre_logits.fc.weight": np.zeros((96, 96), np.float32)}, path)
    loaded = load_weights(module, path)["params"]["backbone"]
    np.testing.assert_array_equal(
        loaded["block_3"]["mlp"]["fc1"]["kernel"],
        variables["params"]["backbone"]["block_3"]["mlp"]["fc1"]["kernel"],
    )
    assert (
        "trunk.safetensors has no head: backbone/head/bias and backbone/head/kernel start anew"
        in (caplog.text)
    )
    with pytest.raises(
        UsageError, match="has no head, the data have 10 classes: train a head"
    ) as e:
        load_weights(module, path, fresh_head=False)
    assert "nearest" not in str(e.value)
    model, _ = load_model(path, "vit_micro", num_classes=7)
    assert model.backbone.num_classes == 7


def test_half_a_head_is_no_head(micro, tmp_path):
    module, _, tensors = micro
    half = {name: x for name, x in tensors.items() if name != "head.bias"}
    save_file(half, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"it lacks head\.bias"):
        load_weights(module, tmp_path / "w.safetensors")


def test_weights_and_their_average(caplog):
    raw, average = {"a": np.zeros(1)}, {"a": np.ones(1)}
    for name in ("model_ema", "state_dict_ema", "ema"):
        both = {"model": raw, name: average}
        caplog.clear()
        assert find_state_dict(both)["a"] == 0
        assert f"(model) and their moving average ({name}): the weights are taken" in caplog.text
        caplog.clear()
        assert find_state_dict(both, ema=True)["a"] == 1
        assert find_state_dict(both, ema=False)["a"] == 0
        assert find_state_dict({name: average, "epoch": 3})["a"] == 1
        assert not caplog.text
    with pytest.raises(UsageError, match="no moving average"):
        find_state_dict({"model": raw}, ema=True)


# -- Sizes -----------------------------------------------------------------------------------------


def test_a_grid_is_not_guessed_from_a_square_total(tmp_path):
    """CLS and a 16 x 14 grid are 225 = 15 x 15 rows; CLS must not become a place."""
    _, variables = create_model("deit_ti", image_size=(256, 224))
    path = tmp_path / "w.safetensors"
    save_weights(variables, path, interpreters=False)
    with pytest.raises(UsageError, match="positions for 224 patches, which are not the model"):
        load_weights(create_module("deit_ti"), path)
    module = create_module("deit_ti", image_size=(256, 224))
    assert_loaded(module, variables, path)


def test_positions_go_to_a_grid_that_is_not_square():
    ramp = np.broadcast_to(np.arange(14.0, dtype=np.float32)[None, :, None], (14, 14, 2))
    positions = np.concatenate([np.full((1, 2), 9, np.float32), ramp.reshape(196, 2)])[None]
    spec = images((224, 320))
    wide = resize_positions(positions, spec, 1)
    assert wide.shape == (1, 1 + 14 * 20, 2)
    np.testing.assert_array_equal(wide[0, 0], [9, 9])
    columns = wide[0, 1:].reshape(14, 20, 2)[7, 3:-3, 0]
    np.testing.assert_allclose(columns, ((np.arange(20) + 0.5) * 0.7 - 0.5)[3:-3], atol=1e-2)
    alone = resize_positions(positions[:, 1:], spec, 1, joined=False)
    np.testing.assert_array_equal(alone[0, 0], [0, 0])
    np.testing.assert_array_equal(alone[0, 1:], wide[0, 1:])


def test_a_patch_kernel_must_have_the_models_sides_and_channels(tmp_path):
    for options in ({"patch_size": (4, 16)}, {"patch_size": (16, 4)}):  # 64 values each, as 8 x 8
        module, variables = create_model("vit_micro", **options)
        path = tmp_path / "w.safetensors"
        save_weights(variables, path, interpreters=False, spec=module.input_spec)
        assert_loaded(module, variables, path)
        with pytest.raises(UsageError, match=r"patches of \d+ x \d+ px with 3 channels, but this"):
            load_weights(create_module("vit_micro"), path)


def test_integer_weights_are_refused(micro, tmp_path):
    module, _, tensors = micro
    broken = {**tensors, "blocks.0.mlp.fc1.weight": np.zeros((192, 96), np.int8)}
    save_file(broken, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"blocks\.0\.mlp\.fc1\.weight holds int8, no floats"):
        load_weights(module, tmp_path / "w.safetensors")


@pytest.mark.parametrize("channels", [1, 4])
def test_any_model_is_written_and_read(tmp_path, channels):
    module, variables = create_model("vit_micro", image_size=(16, 24), channels=channels)
    known = {"create_model": {"name": "vit_micro", "image_size": (16, 24), "channels": channels}}
    for spec in (module.input_spec, None):
        save_weights(variables, tmp_path / "w.safetensors", known, spec=spec)
        again, loaded = load_model(tmp_path / "w.safetensors")
        assert again == module
        jax.tree.map(np.testing.assert_array_equal, loaded, variables)


# -- Broken or foreign -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    ["[]", "3", "null", "{", '"x"', '{"create_model": []}', '{"create_model": 3}'],
)
def test_metadata_that_say_nothing_are_ignored(micro, tmp_path, metadata, caplog):
    module, variables, tensors = micro
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={"iared2_jax": metadata, "format": "pt"})
    assert_loaded(module, variables, path)
    assert "its metadata do not say which model it is" in caplog.text


@pytest.mark.parametrize(
    "known",
    [
        {"name": "vit_micro", "num_classes": -3},
        {"name": "vit_micro", "num_classes": "ten"},
        {"name": "vit_micro", "groups": {}},
        {"name": "vit_micro", "colour": 1},
        {"name": 3},
        {"name": "vit_macro"},
        {"name": "vit_micro", "image_size": "large"},
    ],
)
def test_metadata_of_an_impossible_model_are_refused_in_words(micro, tmp_path, known):
    path = tmp_path / "w.safetensors"
    save_file(micro[2], path, metadata={"iared2_jax": json.dumps({"create_model": known})})
    with pytest.raises(UsageError) as caught:
        load_model(path)
    assert str(caught.value).count("\n") == 0


def npz_with(entry: bytes, name: str = "a.npy", size: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, entry)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_npz_files_that_claim_too_much_or_are_broken(tmp_path):
    path = tmp_path / "w.npz"
    values = np.arange(6.0).reshape(2, 3)
    for good in (values, np.asfortranarray(values), np.float32(2)):
        np.savez_compressed(path, a=good)
        np.testing.assert_array_equal(read_npz(path)["a"], good)
    bomb = npz_with(npy(np.zeros(1 << 23)))  # 64 MiB of zeros in some 64 KiB
    claim = npz_with(npy(np.zeros(4)).replace(b"(4,), ", b"(1<<40,)").replace(b"1<<40", b"99999"))
    objects = npz_with(npy(np.array([{}], dtype=object)))
    torn = bytearray(npz_with(npy(np.random.default_rng(0).random(1000))))
    torn[200:260] = b"\0" * 60
    for content, words in (
        (bomb, "would unpack to"),
        (claim, "claims|not a readable"),
        (objects, "holds Python objects"),
        (bytes(torn), "not a readable"),
        (npz_with(b"no array"), "not a readable"),
        (b"PK\x03\x04 no zip", "not a readable"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=words):
            read_npz(path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["blocks.0.mlp.w12.weight", "patch_embed.proj.weight"], "SwiGLU"),
        (["encoder.layer.0.mlp.weights_in.weight"], "SwiGLU"),
        (["attn_pool.latent", "patch_embed.proj.weight"], "a head that pools by attention .SigLIP"),
        (["vision_model.head.probe"], "a head that pools by attention .SigLIP"),
        (["params/img/MAPHead_0/probe", "params/img/embedding/kernel"], "a head that pools by"),
    ],
)
def test_what_no_backbone_here_has_is_named(micro, tmp_path, names, words):
    save_file({name: np.zeros(3, np.float32) for name in names}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=f"w.safetensors: these weights have {words}") as caught:
        load_weights(micro[0], tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_fresh_interpreters_are_spoken_of_only_when_all_is_loaded(micro, tmp_path, caplog):
    path = tmp_path / "w.safetensors"
    save_file({**micro[2], "more": np.zeros(1, np.float32)}, path)
    with pytest.raises(UsageError, match="has no place for more"):
        load_model(path, "vit_micro")
    assert "no interpreters" not in caplog.text
