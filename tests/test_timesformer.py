"""TimeSformer with joint attention: the ViT that takes clips; its sizes, tokens, weights."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import iared2_jax
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import GroupPlan, Plan
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.input_spec import InputSpec, clips
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.model import IARed2
from tests import oracles

# Not square, and another number of frames than of rows or columns: a mixed-up axis shows.
SPEC = InputSpec(16, 24, patch=(8, 8), frames=4)  # 4 x (2 x 3)
SIZES = dict(embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=5)
DEPTH = 2


def random_model(groups=(1, 1)):
    """Parameters so large that scores differ, and attention attends."""
    module = IARed2(ViT(SPEC, **SIZES), groups, interpreter_heads=3)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), init_variables(module)
    )
    return module, variables


def random_clips(count, spec=SPEC, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *spec.shape), np.float32)


def test_flops_are_those_of_the_specification():
    dense = iared2_jax.count_flops("timesformer_jointst_b")
    assert (round(dense.linear / 1e9, 1), round(dense.full / 1e9, 1)) == (134.2, 179.6)
    # What the paper's 24 -> 81 clips/s stands for, were time proportional to it.
    kept = iared2_jax.count_flops("timesformer_jointst_b", (0.35 * 1568,), interpreters=False)
    assert round(kept.full / 1e9, 1) == 53.2


def test_a_token_is_its_patch_its_place_and_its_frame():
    """Token 1 + n T + t: the image model's token n of frame t, plus the time embedding of t."""
    module, variables = random_model()
    params = variables["params"]["backbone"]
    inputs = random_clips(2)
    tokens = module.backbone.apply({"params": params}, inputs, method="embed")
    image_spec = InputSpec(SPEC.height, SPEC.width, patch=SPEC.patch)
    of_images = {name: value for name, value in params.items() if name != "time_embed"}
    for t in range(SPEC.frames):
        frame = ViT(image_spec, **SIZES).apply({"params": of_images}, inputs[:, t], method="embed")
        np.testing.assert_allclose(tokens[:, 0], frame[:, 0], rtol=1e-6)  # CLS has no time
        expected = frame[:, 1:] + params["time_embed"][:, t]
        np.testing.assert_allclose(tokens[:, 1 + t :: SPEC.frames], expected, atol=1e-5)


def test_scores_lie_on_the_frames_grid():
    module, variables = random_model()
    scores = module.apply(variables, random_clips(2))[1].scores[0]
    assert scores.shape == (2, SPEC.num_patches)
    grid = SPEC.on_grid(scores)
    assert grid.shape == (2, 4, 2, 3)
    np.testing.assert_array_equal(grid[:, 3, 1, 2], scores[:, (1 * 3 + 2) * 4 + 3])


def test_every_execution_gives_the_same_logits():
    module, variables = random_model()
    inputs = random_clips(6)
    masked_run = jax.jit(module.apply)
    slots = functools.partial(module.apply, execution="gathered", capacities=(24, 24))
    gathered_run = jax.jit(slots)
    plan = Plan(
        6, (GroupPlan("packed", 6, ((90, 20), (150, 25))), GroupPlan("padded", 3, ((75, 25),)))
    )
    ragged_run = iared2_jax.accelerate(module, variables, 6, plan=plan, cache_dir=None)
    for thresholds in ((0.5, 0.5), (0.45, 0.6), (0.99, 0.5)):
        values = jnp.array(thresholds)
        masked, out = masked_run(variables, inputs, values)
        for logits, other in (gathered_run(variables, inputs, values), ragged_run(inputs, values)):
            np.testing.assert_allclose(logits, masked, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(masked, -1))
            for mine, theirs in zip(other.keep, out.keep, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_micro_model_drops_in_every_selector():
    module, variables = iared2_jax.create_model("timesformer_micro", groups=1)
    inputs = random_clips(2, module.input_spec)
    assert module.input_spec.shape == (4, 64, 64, 3)
    _, out = module.apply(variables, inputs, keep_ratios=(0.35,), selector="random")
    assert np.asarray(out.keep[0]).sum(-1).tolist() == [90, 90]  # ceil(.35 * 256)


# -- The baselines of Table 3.


@pytest.mark.parametrize(
    "name", ["random", "attention_block_1", "magnitude", "temporal_difference"]
)
def test_a_baseline_keeps_the_same_tokens_in_every_execution(name):
    module, variables = random_model()
    inputs, options = random_clips(4), dict(keep_ratios=(0.6, 0.4), selector=name)
    counts = (15, 10)  # of 24, rounded up
    masked, out = jax.jit(functools.partial(module.apply, **options))(variables, inputs)
    assert [np.asarray(keep).sum(-1).tolist() for keep in out.keep] == [[c] * 4 for c in counts]
    slots = functools.partial(module.apply, execution="gathered", capacities=counts, **options)
    plan = Plan(4, tuple(GroupPlan("padded", 2, ((2 * (c + 1), c + 1),)) for c in counts))
    run = iared2_jax.accelerate(module, variables, 4, plan=plan, cache_dir=None, **options)
    for logits, other in (jax.jit(slots)(variables, inputs), run(inputs)):
        np.testing.assert_allclose(logits, masked, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(other.keep, out.keep, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["magnitude", "temporal_difference"])
def test_scores_of_the_pixels_are_those_by_hand(name):
    """||W x_t|| and ||W (x_t - x_{t-1})||; a still clip changes in its first frame only."""
    module, variables = random_model()
    inputs = random_clips(2)
    inputs[1] = inputs[1, :1]
    options = dict(keep_ratios=(0.5, 0.5), selector=name)
    _, out = jax.jit(functools.partial(module.apply, **options))(variables, inputs)
    scores = np.asarray(SPEC.on_grid(out.scores[0]))
    kernel = np.asarray(variables["params"]["backbone"]["patch_embed"]["kernel"])
    for row, column in ((0, 0), (1, 2)):
        patch = inputs[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        patch = patch.reshape(2, SPEC.frames, -1)
        if name == "temporal_difference":
            patch = np.diff(patch, axis=1, prepend=0)
        expected = np.linalg.norm(patch @ kernel, axis=-1)
        np.testing.assert_allclose(scores[:, :, row, column], expected, rtol=1e-3, atol=1e-3)
    if name == "temporal_difference":
        assert np.abs(scores[1, 1:]).max() < 1e-3


def test_two_pass_attention_is_the_dense_models_map():
    module, variables = random_model()
    inputs = random_clips(2)
    dense = module.apply(variables, inputs, execution="dense")[1]
    for block in (0, 1):
        _, out = module.apply(
            variables, inputs, keep_ratios=(0.5, 0.5), selector=f"attention_block_{block}"
        )
        np.testing.assert_allclose(out.scores[0], dense.attention[block].mean(1), rtol=1e-5)


def test_baselines_are_refused_in_words():
    module, variables = random_model()
    with pytest.raises(ValueError, match=r"attention of block 2: there are blocks 0\.\.1"):
        module.apply(
            variables, random_clips(1), keep_ratios=(0.5, 0.5), selector="attention_block_2"
        )
    with pytest.raises(ValueError, match="needs keep_ratios"):
        module.apply(variables, random_clips(1), selector="temporal_difference")
    images, params = iared2_jax.create_model("vit_micro")
    with pytest.raises(ValueError, match='temporal_difference" needs clips'):
        images.apply(
            params,
            np.zeros((1, 64, 64, 3), np.float32),
            keep_ratios=(0.5, 0.5, 0.5),
            selector="temporal_difference",
        )


# -- Weights.


def shortened(name="timesformer_jointst_s", **options):
    module = create_module(name, groups=1, **options)
    return module.clone(backbone=module.backbone.clone(depth=DEPTH), group_sizes=(DEPTH,))


@pytest.fixture(scope="module")
def published():
    """transformers' names and tensors; their answers are in test_weights.py."""
    return oracles.weights_for(oracles.stored()["timesformer_jointst_s, timesformer"]["shapes"])


def renamed(tensors, rules):
    """The tensors by names that the first matching rule gives."""
    out = {}
    for name, value in tensors.items():
        rule = next((r for r in rules if re.fullmatch(r[0], name)), None)
        out[re.sub(*rule, name) if rule else name] = value
    assert len(out) == len(tensors)
    return out


_BLOCK = r"timesformer\.encoder\.layer\.(\d+)\."
TO_FACEBOOK = (
    (r"timesformer\.embeddings\.cls_token", "cls_token"),
    (r"timesformer\.embeddings\.position_embeddings", "pos_embed"),
    (r"timesformer\.embeddings\.time_embeddings", "time_embed"),
    (r"timesformer\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"timesformer\.embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (_BLOCK + r"layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (_BLOCK + r"attention\.attention\.qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"timesformer\.layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
)
_LAYER = r"backbone.transformer_layers.layers.\1."
TO_MMACTION = (
    (r"(cls_token|pos_embed|time_embed)", r"backbone.\1"),
    (r"patch_embed\.proj\.(\w+)", r"backbone.patch_embed.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", _LAYER + r"norms.0.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", _LAYER + r"norms.1.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", _LAYER + r"attentions.0.attn.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", _LAYER + r"attentions.0.attn.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", _LAYER + r"ffns.0.layers.0.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", _LAYER + r"ffns.0.layers.1.\2"),
    (r"norm\.(\w+)", r"backbone.norm.\1"),
    (r"head\.(\w+)", r"cls_head.fc_cls.\1"),
)
# Divided attention: the temporal one is there beside the other, which is ours.
TO_MMACTION_DIVIDED = (
    (r"(backbone.*)\.norms\.0\.(\w+)", r"\1.attentions.1.norm.\2"),
    (r"(backbone.*)\.norms\.1\.(\w+)", r"\1.ffns.0.norm.\2"),
    (r"(backbone.*)\.attentions\.0\.(.*)", r"\1.attentions.1.\2"),
)


def same_parameters(one, other):
    jax.tree.map(np.testing.assert_array_equal, one["params"], other["params"])


@pytest.fixture(scope="module")
def expected(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model.safetensors"
    save_file(published, path)
    return iared2_jax.load_weights(shortened(), path)


def test_the_authors_own_file(published, expected, tmp_path):
    ours = renamed(published, TO_FACEBOOK)
    wrapped = {f"model.{name}": value for name, value in ours.items()}
    path = oracles.save_pth(wrapped, tmp_path / "timesformer.pth")
    same_parameters(iared2_jax.load_weights(shortened(), path), expected)


def test_mmaction2s_joint_file(published, expected, tmp_path):
    theirs = renamed(renamed(published, TO_FACEBOOK), TO_MMACTION)
    path = oracles.save_pth(theirs, tmp_path / "timesformer_jointST.pth")
    same_parameters(iared2_jax.load_weights(shortened(), path), expected)


@pytest.mark.parametrize("kind", ["transformers", "facebook", "mmaction2"])
def test_divided_attention_is_loaded_for_what_is_shared(
    kind, published, expected, tmp_path, caplog
):
    names = ("attention.attention.qkv", "attention.output.dense")
    temporal = {
        "transformers": (
            "timesformer.encoder.layer.{}.temporal_layernorm.weight",
            *(f"timesformer.encoder.layer.{{}}.temporal_{name}.weight" for name in names),
            "timesformer.encoder.layer.{}.temporal_dense.bias",
        ),
        "facebook": (
            "blocks.{}.temporal_norm1.weight",
            "blocks.{}.temporal_attn.qkv.weight",
            "blocks.{}.temporal_attn.proj.bias",
            "blocks.{}.temporal_fc.weight",
        ),
        "mmaction2": (
            "backbone.transformer_layers.layers.{}.attentions.0.norm.weight",
            "backbone.transformer_layers.layers.{}.attentions.0.attn.in_proj_weight",
            "backbone.transformer_layers.layers.{}.attentions.0.attn.out_proj.bias",
            "backbone.transformer_layers.layers.{}.attentions.0.temporal_fc.weight",
        ),
    }[kind]
    tensors = published
    if kind != "transformers":
        tensors = renamed(tensors, TO_FACEBOOK)
    if kind == "mmaction2":
        tensors = renamed(renamed(tensors, TO_MMACTION), TO_MMACTION_DIVIDED)
    extra = {name.format(i): np.ones((3, 3), np.float32) for name in temporal for i in range(DEPTH)}
    save_file({**tensors, **extra}, tmp_path / "divided.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = iared2_jax.load_weights(shortened(), tmp_path / "divided.safetensors")
    same_parameters(loaded, expected)
    assert f"its temporal layers ({4 * DEPTH} tensors) have no place" in caplog.text


def test_an_image_model_becomes_one_of_clips(tmp_path, caplog):
    """Every frame is embedded as the image was; a still clip shows nothing new."""
    image_module = shortened("vit_s16", num_classes=400)
    variables = init_variables(image_module, 3)
    iared2_jax.save_weights(variables, tmp_path / "vit.safetensors", interpreters=False)
    module = shortened()
    with caplog.at_level(logging.WARNING):
        loaded = iared2_jax.load_weights(module, tmp_path / "vit.safetensors")
    assert "is an image model: time embeddings start at zero" in caplog.text
    params = loaded["params"]["backbone"]
    assert not np.any(params["time_embed"])
    image = oracles.images_for(224)[:1]
    still = np.repeat(image[:, None], 8, axis=1)
    backbone = module.backbone
    tokens = backbone.apply({"params": params}, still, method="embed")
    of_image = image_module.backbone.apply(
        {"params": variables["params"]["backbone"]}, image, method="embed"
    )
    np.testing.assert_allclose(tokens[:, 1:], np.repeat(of_image[:, 1:], 8, axis=1), atol=1e-5)


def test_other_frames_and_sizes(tmp_path):
    """Times by the nearest frame, as TimeSformer; places as of an image model; back bitwise."""
    module, variables = iared2_jax.create_model("timesformer_micro", groups=1, seed=1, num_frames=8)
    times = np.arange(8, dtype=np.float32)[None, :, None] * np.ones(96, np.float32)
    variables["params"]["backbone"]["time_embed"] = times
    known = {"create_model": {"name": "timesformer_micro", "groups": 1, "num_frames": 8}}
    path = tmp_path / "clips.safetensors"
    iared2_jax.save_weights(variables, path, known, spec=module.input_spec)
    again, loaded = iared2_jax.load_model(path)
    assert again.input_spec == module.input_spec
    same_parameters(loaded, variables)
    longer, params = iared2_jax.load_model(path, num_frames=12, image_size=(64, 96))
    assert longer.input_spec.grid == (12, 8, 12)
    found = params["params"]["backbone"]
    assert found["pos_embed"].shape == (1, 1 + 96, 96)
    nearest = [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    np.testing.assert_array_equal(found["time_embed"][0, :, 0], nearest)


def test_the_name_is_told_from_the_shapes(published, tmp_path):
    """A file with time embeddings is no image model, whatever else it shares with one."""
    module = create_module("timesformer_jointst_s", groups=1)
    variables = init_variables(module)
    iared2_jax.save_weights(variables, tmp_path / "w.safetensors", interpreters=False)
    found, _ = iared2_jax.load_model(tmp_path / "w.safetensors")
    assert found.input_spec == clips(224, frames=8, crop_pct=0.875)
    with pytest.raises(UsageError, match="has no place for time_embed"):
        iared2_jax.load_weights(
            create_module("vit_s16", num_classes=400), tmp_path / "w.safetensors"
        )


def test_bad_input_is_refused_in_words():
    with pytest.raises(UsageError, match="num_frames=8 is for models of clips"):
        iared2_jax.create_model("deit_s", num_frames=8)
    with pytest.raises(UsageError, match="sizes of an input must be positive"):
        create_module("timesformer_micro", num_frames=0)
    module, variables = random_model()
    with pytest.raises(
        ValueError, match=r"clips must be \[B, 4, 16, 24, 3\], got \[2, 16, 24, 3\]"
    ):
        module.apply(variables, random_clips(2)[:, 0])
    with pytest.raises(
        UsageError, match=r"pixels are \[2, 16, 24, 3\], but the model takes \[B, 4"
    ):
        iared2_jax.explain(module, variables, np.zeros((2, 16, 24, 3), np.uint8), group=1)
