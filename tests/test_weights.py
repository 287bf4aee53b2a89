"""Weights in and out: other people's files give their own numbers, ours come back bitwise."""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from iared2_jax import create_model, load_model, load_weights, save_weights
from iared2_jax.errors import UsageError
from iared2_jax.models.input_spec import images
from iared2_jax.models.variants import VARIANTS
from iared2_jax.token_reduction.create import create_module
from iared2_jax.weights.files import read_tensors
from iared2_jax.weights.positions import resize_positions
from iared2_jax.weights.save import timm_tensors
from tests import oracles

STORED = oracles.stored()


def shortened(variant: str, depth: int, dtype=jnp.float32, size=None):
    """The variant with its first blocks only, one group."""
    module = create_module(variant, groups=1, dtype=dtype, image_size=size)
    return module.clone(backbone=module.backbone.clone(depth=depth), group_sizes=(depth,))


def answers(module, variables, images, headless=False):
    """Logits (or what a head reads of CLS), and every block's output."""

    @jax.jit
    def run(params, images):
        def walk(backbone, x):
            outputs = []
            x = backbone.embed(x)
            for index in range(backbone.depth):
                x, _ = backbone.run_block(index, x)
                outputs.append(x)
            logits, features, _ = backbone.classify(x)
            return features[:, : backbone.embed_dim] if headless else logits, outputs

        return module.backbone.apply({"params": params}, images, method=walk)

    return run(variables["params"]["backbone"], images)


def assert_close(actual, expected, limit=1e-4):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(actual) - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.parametrize("family", oracles.FAMILIES, ids=lambda family: family.name)
def test_parity_with_what_others_answered(family, tmp_path):
    kept = STORED[family.name]
    backbone = VARIANTS[family.variant].backbone
    depth = family.stored_depth or backbone.depth
    module = shortened(family.variant, depth, size=family.size)
    path = oracles.save_as(family, oracles.weights_for(kept["shapes"]), tmp_path)
    variables = load_weights(module, path)
    logits, blocks = answers(module, variables, family.inputs, family.headless)
    assert_close(logits, kept["logits"])
    assert len(blocks) == len(kept["blocks"])
    for block, expected in zip(blocks, kept["blocks"], strict=True):
        assert_close(oracles.probe(block), expected)
    if family.kind == "timm":  # out again as it came in
        out = timm_tensors(variables, interpreters=False)
        fresh = {"head.weight", "head.bias"} if family.headless else set()
        assert out.keys() - fresh == kept["shapes"].keys()
        for name, value in oracles.weights_for(kept["shapes"]).items():
            np.testing.assert_array_equal(out[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["deit_ti, timm", "cait_xxs24, timm"])
def test_bfloat16_keeps_the_answer(name, tmp_path):
    """Where the first class is ahead of the second by a tenth of the logits' spread."""
    family = next(family for family in oracles.FAMILIES if family.name == name)
    kept = STORED[name]
    backbone = VARIANTS[family.variant].backbone
    module = shortened(family.variant, backbone.depth, jnp.bfloat16)
    variables = load_weights(
        module, oracles.save_as(family, oracles.weights_for(kept["shapes"]), tmp_path)
    )
    logits, _ = answers(module, variables, family.inputs)
    first, second = -np.sort(-kept["logits"], axis=-1)[:, :2].T
    clear = first - second > 0.1 * kept["logits"].std()
    assert clear.any()
    same = np.argmax(logits, -1) == kept["logits"].argmax(-1)
    assert same[clear].all()


def test_npz_with_all_blocks_in_one_array(tmp_path):
    """big_vision's scanned models; and an optimizer's state beside the weights is no weight."""
    name = "vit_s16, big_vision"
    tensors = oracles.weights_for(STORED[name]["shapes"])
    blocks = {key: value for key, value in tensors.items() if "encoderblock_0/" in key}
    scanned = {key: value for key, value in tensors.items() if "encoderblock_" not in key}
    for key in blocks:
        both = [tensors[key.replace("_0/", f"_{i}/", 1)] for i in range(2)]
        scanned[key.replace("encoderblock_0", "encoderblock")] = np.stack(both)
    scanned["opt/state/step"] = np.array(7)
    np.savez(tmp_path / "w.npz", **scanned)
    module = shortened("vit_s16", 2)
    logits, _ = answers(module, load_weights(module, tmp_path / "w.npz"), oracles.images_for(224))
    assert_close(logits, STORED[name]["logits"])


# -- Ours.


@pytest.fixture
def micro():
    return create_model("vit_micro")


def leaves(variables):
    return jax.tree_util.tree_leaves_with_path(variables["params"])


@pytest.mark.parametrize("name", ["vit_micro", "deit_ti_distilled", "cait_xxs24"])
def test_weights_round_trip_bitwise(name, tmp_path):
    module, variables = create_model(name, seed=1)
    save_weights(variables, tmp_path / "w.safetensors")
    loaded = load_weights(module, tmp_path / "w.safetensors")
    for (path, mine), (_, theirs) in zip(leaves(loaded), leaves(variables), strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=str(path))
    assert not list(tmp_path.glob("*.draft"))


def test_a_backbone_file_leaves_the_interpreters_alone(micro, tmp_path):
    module, variables = micro
    _, other = create_model("vit_micro", seed=1)
    save_weights(variables, tmp_path / "w.safetensors", interpreters=False)
    mine = load_weights(module, tmp_path / "w.safetensors", seed=1)["params"]
    kept = other["params"]["interpreter_1"]["q"]["kernel"]
    np.testing.assert_array_equal(mine["interpreter_1"]["q"]["kernel"], kept)
    cls_token = variables["params"]["backbone"]["cls_token"]
    np.testing.assert_array_equal(mine["backbone"]["cls_token"], cls_token)


def test_half_precision_files_are_read(micro, tmp_path):
    module, variables = micro
    for dtype in (jnp.bfloat16, jnp.float16):
        half = {
            name: np.asarray(jnp.asarray(value, dtype))
            for name, value in timm_tensors(variables).items()
        }
        save_file(half, tmp_path / "w.safetensors")
        loaded = load_weights(module, tmp_path / "w.safetensors")["params"]["backbone"]
        kernel = variables["params"]["backbone"]["head"]["kernel"]
        np.testing.assert_array_equal(loaded["head"]["kernel"], kernel.astype(dtype))
        assert loaded["head"]["kernel"].dtype == jnp.float32


def test_the_shipped_weights_fit_their_model(micro):
    module, variables = micro
    loaded = load_weights(module, "vit_micro")
    _, metadata = read_tensors("vit_micro")
    assert metadata["top1"] >= 0.93
    assert metadata["examples"] == 2000
    before = variables["params"]["backbone"]["head"]["kernel"]
    assert not np.array_equal(loaded["params"]["backbone"]["head"]["kernel"], before)


# -- What a file may differ in.


def test_another_class_count_starts_the_head_anew_and_says_so(tmp_path, caplog):
    _, variables = create_model("vit_micro", num_classes=7)
    save_weights(variables, tmp_path / "w.safetensors")
    module, fresh = create_model("vit_micro", num_classes=10)
    with caplog.at_level(logging.WARNING):
        loaded = load_weights(module, tmp_path / "w.safetensors")["params"]["backbone"]
    assert "is for 7 classes: backbone/head/bias and backbone/head/kernel start anew" in (
        caplog.text
    )
    kernel = fresh["params"]["backbone"]["head"]["kernel"]
    np.testing.assert_array_equal(loaded["head"]["kernel"], kernel)
    with pytest.raises(UsageError, match="is for 7 classes, the data have 10 classes: train"):
        load_weights(module, tmp_path / "w.safetensors", fresh_head=False)
    np.testing.assert_array_equal(loaded["cls_token"], variables["params"]["backbone"]["cls_token"])


def test_positions_are_resized_with_the_image(tmp_path):
    _, variables = create_model("deit_ti", num_classes=2)
    save_weights(variables, tmp_path / "w.safetensors", interpreters=False)
    larger = shortened("deit_ti", 12)
    larger = larger.clone(backbone=larger.backbone.clone(input_spec=images(384), num_classes=2))
    loaded = load_weights(larger, tmp_path / "w.safetensors")["params"]["backbone"]["pos_embed"]
    kept = variables["params"]["backbone"]["pos_embed"]
    assert loaded.shape == (1, 577, 192)
    # A command checks its weights within a trace, before anything is written.
    jax.eval_shape(lambda: load_weights(larger, tmp_path / "w.safetensors"))
    np.testing.assert_array_equal(loaded[:, 0], kept[:, 0])
    # A field that is linear in space stays so, but for the border.
    ramp = np.broadcast_to(np.arange(14.0, dtype=np.float32)[:, None, None], (14, 14, 3))
    positions = np.concatenate([np.zeros((1, 3), np.float32), ramp.reshape(196, 3)])[None]
    grid = resize_positions(positions, images(384), 1)[0, 1:].reshape(24, 24, 3)
    expected = (np.arange(24) + 0.5) * 14 / 24 - 0.5
    np.testing.assert_allclose(grid[3:-3, 5, 0], expected[3:-3], atol=1e-3)
    np.testing.assert_array_equal(resize_positions(positions, images(224), 1), positions)


def test_files_of_others_say_which_model_they_are(tmp_path, micro):
    _, variables = create_model("cait_xxs24", num_classes=3)
    save_weights(variables, tmp_path / "w.safetensors", interpreters=False)
    module, loaded = load_model(tmp_path)  # a folder with one file
    assert module.backbone == create_module("cait_xxs24", num_classes=3).backbone
    assert module.policy_token == "learned"
    token = loaded["params"]["backbone"]["cls_token"]
    np.testing.assert_array_equal(token, variables["params"]["backbone"]["cls_token"])

    _, variables = create_model("deit_small_patch16_224")
    save_weights(variables, tmp_path / "w.safetensors", interpreters=False)
    with pytest.raises(UsageError, match="could be deit_s or vit_s16: give its name"):
        load_model(tmp_path / "w.safetensors")
    module, _ = load_model(tmp_path / "w.safetensors", "vit_s16", groups=2)
    assert module.group_sizes == (6, 6)


# -- What it refuses.


def test_weights_that_do_not_fit_are_refused(micro, tmp_path):
    module, _ = micro
    path = tmp_path / "w.safetensors"
    with pytest.raises(UsageError, match="no weights file"):
        load_weights(module, path)
    with pytest.raises(UsageError, match="shipped"):
        load_weights(module, "vit_macro")
    with pytest.raises(UsageError, match="has no weights in it"):
        load_weights(module, tmp_path)
    save_weights(create_model("deit_ti", num_classes=10)[1], path)
    with pytest.raises(UsageError, match=r"no place for blocks\.6\."):
        load_weights(module, path)
    with pytest.raises(UsageError, match="is for another model"):
        load_weights(create_module("deit_s", num_classes=10), path)
    save_weights(create_model("vit_micro", groups=2)[1], path)
    with pytest.raises(UsageError, match=r"lacks interpreters\.3\."):
        load_weights(module, path)
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(UsageError, match="not a readable safetensors"):
        load_weights(module, path)
    path.write_bytes(content[:-10])
    with pytest.raises(UsageError, match="not a readable safetensors"):
        load_weights(module, path)
    save_file({"layer1.0.conv1.weight": np.zeros((3, 3), np.float32)}, path)
    with pytest.raises(UsageError, match=r"of no kind known here: it has layer1\.0\.conv1"):
        load_weights(module, path)
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(UsageError, match=r"not a readable \.npz"):
        load_weights(module, tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", objects=np.array([{}], object))
    with pytest.raises(UsageError, match=r"not a readable \.npz"):
        load_weights(module, tmp_path / "x.npz")


def test_a_missing_name_lists_the_ten_nearest(micro, tmp_path):
    module, variables = micro
    tensors = timm_tensors(variables)
    tensors["blocks.3.attn.qkw.weight"] = tensors.pop("blocks.3.attn.qkv.weight")
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UsageError) as caught:
        load_weights(module, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "lacks blocks.3.attn.qkv.weight" in message
    assert "no place for blocks.3.attn.qkw.weight" in message
    assert "nearest: blocks.3.attn.qkw.weight" in message
    assert "\n" not in message

    del tensors["blocks.3.attn.qkw.weight"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="nearest:") as caught:
        load_weights(module, tmp_path / "w.safetensors")
    assert str(caught.value).partition("nearest: ")[2].count(",") == 9


def test_what_changes_the_answer_is_never_ignored(micro, tmp_path):
    """A file with layer scale, or a norm that our model lacks, is another model."""
    module, variables = micro
    tensors = {**timm_tensors(variables), "blocks.0.attn.q_norm.weight": np.ones(96, np.float32)}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"no place for blocks\.0\.attn\.q_norm\.weight"):
        load_weights(module, tmp_path / "w.safetensors")


def test_weights_that_are_not_finite_are_refused(micro, tmp_path):
    module, variables = micro
    variables["params"]["backbone"]["cls_token"] *= np.nan
    save_weights(variables, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="cls_token has values that are not finite"):
        load_weights(module, tmp_path / "w.safetensors")


def test_the_hub_without_its_package_says_so(micro, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'iared2_jax\[hub\]'"):
        load_weights(micro[0], "hf://owner/name")


def test_the_hub_is_read_from_its_cache(micro, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    module, variables = micro
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    save_weights(variables, snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load_weights(module, "hf://owner/name")
    token = variables["params"]["backbone"]["cls_token"]
    np.testing.assert_array_equal(loaded["params"]["backbone"]["cls_token"], token)
    with pytest.raises(UsageError, match="hf://owner/nobody cannot be fetched"):
        load_weights(module, "hf://owner/nobody")


def test_the_metadata_says_which_model_it_is(micro, tmp_path):
    _, variables = micro
    options = {"name": "vit_micro", "num_classes": 10, "groups": [2, 2, 2]}
    save_weights(variables, tmp_path / "w.safetensors", {"create_model": options})
    assert read_tensors(tmp_path / "w.safetensors")[1] == {"create_model": options}
    assert "interpreters.1.q.weight" in load_file(tmp_path / "w.safetensors")
    assert load_model(tmp_path / "w.safetensors")[0].group_sizes == (2, 2, 2)


def test_interpreters_are_not_put_into_another_model(micro, tmp_path):
    """Shapes alone would let them."""
    _, variables = micro
    options = {"name": "vit_micro", "num_classes": 10, "groups": [4, 1, 1], "init_bias": 1.0}
    path = tmp_path / "w.safetensors"
    save_weights(variables, path, {"create_model": options})
    with pytest.raises(UsageError, match=r"group_sizes=\(4, 1, 1\), but this model"):
        load_weights(create_module("vit_micro"), path)
    with pytest.raises(UsageError, match=r"init_bias=1\.0, but this model has 0\.0"):
        load_weights(create_module("vit_micro", groups=(4, 1, 1)), path)
    load_weights(create_module("vit_micro", groups=(4, 1, 1), init_bias=1.0), path)
    assert load_model(path, "vit_micro")[0].init_bias == 1.0
    save_weights(variables, path, {"create_model": options}, interpreters=False)
    load_weights(create_module("vit_micro"), path)  # a backbone is a backbone
