"""A clip backbone of forty lines runs everywhere, and the package never heard of it."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iared2_jax
from iared2_jax import main
from iared2_jax.data import datasets
from iared2_jax.fast_inference import GroupPlan, Plan
from iared2_jax.models import variants
from iared2_jax.models.backbones.protocol import Backbone, BlockFlops
from iared2_jax.models.backbones.vit import Block
from iared2_jax.models.input_spec import InputSpec

# -- The forty lines.

SPEC = InputSpec(16, 24, channels=1, patch=(8, 8), frames=4, norm=((0.4,), (0.3,)))  # 4 x (2 x 3)


class ToyClip(nn.Module):
    """A ViT of two blocks over the patches of all frames at once."""

    input_spec: InputSpec = SPEC
    num_classes: int = 3
    dtype: jnp.dtype = jnp.float32
    attention_kernel: str = "einsum"
    attention_kernels = ("einsum",)
    num_prefix, embed_dim, depth, num_heads = 1, 24, 2, 3

    def setup(self):
        tokens = 1 + self.input_spec.num_patches
        self.patch_embed = nn.Dense(24, dtype=self.dtype)
        self.cls_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, 24))
        self.pos_embed = self.param("pos_embed", nn.initializers.normal(0.02), (1, tokens, 24))
        self.blocks = [Block(3, 2, self.dtype, name=f"block_{i}") for i in range(2)]
        self.norm, self.head = nn.LayerNorm(dtype=self.dtype), nn.Dense(self.num_classes)

    def embed(self, inputs):
        x = self.patch_embed(self.input_spec.to_patches(inputs))
        cls = jnp.broadcast_to(self.cls_token.astype(x.dtype), (len(x), 1, 24))
        return jnp.concatenate([cls, x], axis=1) + self.pos_embed.astype(x.dtype)

    def run_block(self, index, x, layout):
        return self.blocks[index](x, layout)

    def classify(self, x, alive):
        features = self.norm(x[:, 0]).astype(jnp.float32)
        return self.head(features), features, []

    def block_flops(self, tokens):
        return BlockFlops(4 * tokens * 24**2, 2 * tokens**2 * 24, 4 * tokens * 24**2)

    def other_flops(self, kept):
        linear = self.input_spec.num_patches * self.input_spec.patch_values * 24
        return (linear + 24 * self.num_classes,) * 2


# -- And forty for its data: a bright square that moves right, moves left, or stays.


def _clip(split: str, seed: int, index: int) -> tuple[np.ndarray, int, np.ndarray]:
    rng = np.random.default_rng((seed, len(split), index))
    label, top = int(rng.integers(3)), int(rng.integers(9))
    pixels = rng.integers(0, 60, SPEC.shape).astype(np.uint8)
    mask = np.zeros(SPEC.shape[:-1], bool)
    for frame in range(4):
        left = (8, 2 + 4 * frame, 14 - 4 * frame)[label]
        mask[frame, top : top + 8, left : left + 8] = True
    pixels[mask] += 180
    return pixels, label, mask


def open_clips(request: datasets.DataRequest) -> datasets.Dataset:
    def train_example(seed: int, index: int) -> dict[str, np.ndarray]:
        pixels, label, _ = _clip("train", seed, index)
        return {"input": pixels, "label": np.int32(label)}

    def load(split: str, size: int, seed: int) -> tuple:
        pixels, labels, masks = zip(*(_clip(split, seed, i) for i in range(size)), strict=True)
        return np.stack(pixels), np.array(labels, np.int32), np.stack(masks)

    assert request.spec == SPEC
    return datasets.Dataset(("still", "right", "left"), ("test",), 64, train_example, load)


@pytest.fixture(scope="module", autouse=True)
def _known():
    """The toy's names, as a user's config file would add them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.VARIANTS, "toy_clip", variants.Variant(ToyClip(), 3))
        patch.setitem(datasets.OPENERS, "toy_clips", open_clips)
        patch.setattr(datasets, "MADE", {*datasets.MADE, "toy_clips"})
        yield


@pytest.fixture(scope="module")
def model():
    """Parameters so large that scores differ, and attention attends."""
    module, variables = iared2_jax.create_model("toy_clip", groups=2)
    return module, jax.tree.map(lambda x: 6 * x, variables)


@pytest.fixture(scope="module")
def clips():
    return SPEC.normalize(jnp.asarray(open_clips(datasets.DataRequest(SPEC)).load("test", 6, 0)[0]))


def test_the_contract_is_met():
    assert isinstance(ToyClip(), Backbone)
    assert SPEC.grid == (4, 2, 3)


def test_every_execution_gives_the_same_logits(model, clips):
    module, variables = model
    masked, out = jax.jit(module.apply)(variables, clips, jnp.array([0.5, 0.45]))
    counts = [int(keep.sum()) for keep in out.keep]
    assert 0 < counts[1] < counts[0] < 6 * 24
    gathered = jax.jit(functools.partial(module.apply, execution="gathered", capacities=(24, 24)))(
        variables, clips, jnp.array([0.5, 0.45])
    )
    plan = Plan(
        6, (GroupPlan("packed", 6, ((90, 20), (150, 25))), GroupPlan("padded", 3, ((75, 25),)))
    )
    run = iared2_jax.accelerate(module, variables, 6, (0.5, 0.45), plan=plan, cache_dir=None)
    for logits, other in (gathered, run(clips)):
        np.testing.assert_allclose(logits, masked, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(other.keep, out.keep, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_heatmaps_are_clips(model, clips):
    module, variables = model
    heatmaps = iared2_jax.explain(module, variables, clips, group=1)
    assert heatmaps.shape == (6, 4, 16, 24)
    # The pixel in the middle of a patch has its score: patch (row 1, column 2) of frame 3.
    scores = jax.jit(module.apply)(variables, clips)[1].scores[0]
    grid = SPEC.on_grid(scores)
    np.testing.assert_allclose(grid[:, 3, 1, 2], scores[:, (1 * 3 + 2) * 4 + 3])
    np.testing.assert_allclose(heatmaps[:, 3, 15, 23], grid[:, 3, 1, 2], rtol=1e-5)


@pytest.mark.slow
def test_it_is_trained_evaluated_and_reported(tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(
        "from iared2_jax.config import default_config, parse_arg, runlocal\n"
        "def get_config(arg=None):\n"
        "    parse_arg(arg)\n"
        "    config = runlocal(default_config())\n"
        "    config.name, config.model.name, config.data.name = 'toy', 'toy_clip', 'toy_clips'\n"
        "    config.model.num_classes, config.model.groups = 0, 2\n"
        "    config.data.eval_size, config.reduction.train_execution = 8, 'gathered'\n"
        "    for phase in (config.interpreter, config.backbone):\n"
        "        phase.batch_size = 8\n"
        "    return config\n"
    )
    assert main.run([f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["examples"] == 8
    assert {"group_1", "group_2", "raw_attention_block_0"} <= results["segmentation"].keys()
    assert results["iared2"]["flops"]["full"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page
    assert (tmp_path / "run" / "figures" / "hierarchy.png").stat().st_size > 5_000
    module, _ = iared2_jax.load_model(tmp_path / "run" / "weights.safetensors")
    assert module.input_spec == SPEC
