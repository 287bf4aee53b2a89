"""What other people's code says about weights that anyone can make again: the parity tests' oracle.

A family's weights are drawn tensor by tensor, each seeded by its own name, so that a name that is
mixed up shows. timm and transformers run them; tests/fixtures/parity.npz keeps what they answered,
for machines without PyTorch:

    python -m tests.oracles        # needs the extra `parity`, and timm without its dependencies
"""

import dataclasses
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from iared2_jax.models.variants import VARIANTS

FIXTURES = Path(__file__).parent / "fixtures" / "parity.npz"
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A published kind of file: our variant, their naming, the class that runs it."""

    variant: str
    kind: str  # one of KINDS
    stored_depth: int = 2  # blocks of the stored answers; 0: all
    size: int | None = None  # px of the inputs; None: as published

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.kind}"

    @property
    def by_transformers(self) -> bool:
        return self.kind in ("vit", "deit", "timesformer", "dinov2", "dinov2_with_registers")

    @property
    def by_its_authors(self) -> bool:
        """Whether it is a file that timm reads in other names than its own."""
        return self.kind == "facebook" or (self.kind == "pth" and "deit3" in self.variant)

    @property
    def headless(self) -> bool:
        """Whether the file has no classifier: then the answer is the final norm's CLS token."""
        return self.variant.startswith("dinov2") and not self.by_transformers

    @property
    def inputs(self) -> np.ndarray:
        """Two normalised inputs."""
        spec = VARIANTS[self.variant].backbone.input_spec
        return images_for(self.size or spec.height, spec.frames)


# timm, and what has its names: the authors' .pth of DeiT, CaiT, DeiT-III, and DINOv2's; npz files;
# transformers' model types.
KINDS = (
    "timm", "pth", "facebook", "vision_transformer", "big_vision",
    "vit", "deit", "timesformer", "dinov2", "dinov2_with_registers",
)  # fmt: skip

FAMILIES = (
    *(
        Family(
            name,
            "timm",
            0 if name in ("deit_ti", "cait_xxs24") else 2,
            112 if name in ("dinov2_b14", "dinov2_s14_reg", "dinov2_b14_reg") else None,
        )
        for name, variant in VARIANTS.items()
        if variant.timm
    ),
    Family("deit_ti_distilled", "pth"),
    Family("cait_xxs24", "pth"),
    Family("deit3_s16", "pth"),
    Family("dinov2_s14", "facebook"),
    Family("dinov2_s14_reg", "facebook", size=112),
    Family("dinov2_s14", "dinov2", size=224),
    Family("dinov2_s14_reg", "dinov2_with_registers", size=112),
    Family("vit_s16", "vit"),
    Family("deit_ti_distilled", "deit"),
    Family("timesformer_jointst_s", "timesformer"),
    Family("vit_s16", "vision_transformer"),
    Family("vit_s16", "big_vision"),
)


def weights_for(shapes: Shapes) -> dict[str, np.ndarray]:
    """Random tensors, each a function of its name and shape alone; activations stay of size 1."""
    tensors = {}
    for name, shape in sorted(shapes.items()):
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        values = rng.standard_normal(shape, np.float32)
        leaf = name.replace("/", ".").rpartition(".")[2]
        if "gamma" in leaf or leaf == "lambda1":
            values = 0.5 + 0.1 * values
        elif leaf == "scale" or (leaf == "weight" and len(shape) == 1):
            values = 1 + 0.2 * values
        elif leaf in ("weight", "kernel"):
            fan_in = values.size // max(shape[0], shape[-1])
            values /= np.float32(fan_in**0.5)
        else:
            values *= np.float32(0.3)
        tensors[name] = values.astype(np.float32)
    return tensors


def images_for(size: int, frames: int | None = None) -> np.ndarray:
    """Two normalised images [2, size, size, 3], or clips of so many frames."""
    rng = np.random.Generator(np.random.PCG64(size))
    return rng.standard_normal((2, *([frames] if frames else []), size, size, 3), np.float32)


def probe(x: np.ndarray) -> np.ndarray:
    """What is stored of a block's output [2, tokens, d]: sums along fixed random directions."""
    rng = np.random.Generator(np.random.PCG64(x.shape[-1]))
    directions = rng.standard_normal((x.shape[-1], 4), np.float32) / np.float32(x.shape[-1] ** 0.5)
    return np.asarray(x)[:, :: max(1, x.shape[1] // 4)] @ directions


# -- Their models (needs torch, timm, transformers).


@dataclasses.dataclass
class Oracle:
    """Their model with `weights_for` its names: how to save it, and what it answers."""

    shapes: Shapes
    save: Callable[[Path], Path]
    run: Callable[[np.ndarray], tuple[np.ndarray, list[np.ndarray]]]


def build(family: Family, depth: int) -> Oracle:
    """The family's model, with `depth` blocks."""
    if family.by_transformers:
        return _transformers(family, depth)
    return _timm(family, depth)


def _answers(model, blocks, images: np.ndarray, logits) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits, and every block's output."""
    import torch

    outputs: list[np.ndarray] = []

    def keep(_, __, output):
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(output.numpy().copy())

    hooks = [block.register_forward_hook(keep) for block in blocks]
    with torch.inference_mode():
        answer = logits(model(torch.tensor(np.moveaxis(images, -1, -3))))
    for hook in hooks:
        hook.remove()
    return answer.numpy(), outputs


def _timm(family: Family, depth: int) -> Oracle:
    import torch

    from benchmarks import peers

    variant = VARIANTS[family.variant]
    options = {"no_embed_class": True} if family.kind == "big_vision" else {}
    if family.size:
        options["img_size"] = family.size
    timm = peers.timm()
    model = timm.create_model(variant.timm, pretrained=False, depth=depth, **options)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if family.kind in ("vision_transformer", "big_vision"):
        shapes = npz_shapes(shapes, family.kind, variant.backbone.num_heads)
        with tempfile.TemporaryDirectory() as folder:
            path = save_npz(weights_for(shapes), Path(folder) / "weights.npz")
            model.load_pretrained(str(path))
    elif family.by_its_authors:
        from timm.models.vision_transformer import checkpoint_filter_fn

        shapes = authors_shapes(shapes)
        state = {name: torch.tensor(x) for name, x in weights_for(shapes).items()}
        deit3 = family.variant.startswith("deit3")
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=deit3)
        model.load_state_dict(state, strict=True)
    else:
        state = {name: torch.tensor(x) for name, x in weights_for(shapes).items()}
        model.load_state_dict(state, strict=True)
    model = model.eval()

    def save(folder: Path) -> Path:
        return save_as(family, weights_for(shapes), folder)

    return Oracle(shapes, save, lambda x: _answers(model, model.blocks, x, lambda y: y))


def _transformers(family: Family, depth: int) -> Oracle:
    import torch
    import transformers

    backbone = VARIANTS[family.variant].backbone
    sizes = dict(
        hidden_size=backbone.embed_dim,
        num_hidden_layers=depth,
        num_attention_heads=backbone.num_heads,
        intermediate_size=backbone.mlp_ratio * backbone.embed_dim,
        image_size=backbone.input_spec.height,
        patch_size=backbone.input_spec.patch[0],
        num_labels=backbone.num_classes,
    )
    if family.kind.startswith("dinov2"):
        sizes["mlp_ratio"] = backbone.mlp_ratio
        del sizes["intermediate_size"]
    if family.kind == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    elif family.kind == "timesformer":
        joint = dict(num_frames=backbone.input_spec.frames, attention_type="joint_space_time")
        config = transformers.TimesformerConfig(**sizes, **joint)
        model = transformers.TimesformerForVideoClassification(config)
    elif family.kind == "dinov2":
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes))
    elif family.kind == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**sizes)
        model = transformers.Dinov2WithRegistersForImageClassification(config)
    else:
        config = transformers.DeiTConfig(**sizes)
        model = transformers.DeiTForImageClassificationWithTeacher(config)
    from safetensors.numpy import load_file, save_file

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        # By way of a file: on the hub tensors have other names than in memory.
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        shapes = {name: tuple(x.shape) for name, x in load_file(path).items()}
        save_file(weights_for(shapes), path, metadata={"format": "pt"})
        model = type(model).from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    body = getattr(model, family.kind)
    blocks = body.layers if hasattr(body, "layers") else body.encoder.layer

    def save(folder: Path) -> Path:
        return save_as(family, weights_for(shapes), folder)

    return Oracle(shapes, save, lambda x: _answers(model, blocks, x, lambda y: y.logits))


# -- Files in the published formats.


def save_as(family: Family, tensors: dict[str, np.ndarray], folder: Path) -> Path:
    """The tensors as the family's files hold them."""
    from safetensors.numpy import save_file

    if family.kind in ("vision_transformer", "big_vision"):
        return save_npz(tensors, folder / "weights.npz")
    if family.kind in ("pth", "facebook"):
        prefix = "module." if family.variant.startswith("cait") else ""
        state = {prefix + name: value for name, value in tensors.items()}
        return save_pth(state, folder / "weights.pth")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def save_pth(tensors: dict[str, np.ndarray], path: Path) -> Path:
    """As PyTorch saves it; byte by byte where there is no PyTorch."""
    try:
        import torch
    except ImportError:
        from tests.test_pth import pack, tensor

        state = {
            name: tensor(key, "Float", x.size, x.shape, tuple(s // 4 for s in x.strides))
            for key, (name, x) in enumerate(tensors.items())
        }
        path.write_bytes(
            pack({"model": state, "epoch": 299}, [x.tobytes() for x in tensors.values()])
        )
    else:
        state = {name: torch.tensor(x) for name, x in tensors.items()}
        torch.save({"model": state, "epoch": 299}, path)
    return path


def save_npz(tensors: dict[str, np.ndarray], path: Path) -> Path:
    np.savez(path, **tensors)
    return path


def npz_shapes(timm_shapes: Shapes, kind: str, heads: int) -> Shapes:
    """The names and shapes of the same model in vision_transformer's or big_vision's files."""
    d = timm_shapes["cls_token"][-1]
    classes = timm_shapes["head.bias"][0]
    patch = timm_shapes["patch_embed.proj.weight"][-1]
    depth = 1 + max(int(name.split(".")[1]) for name in timm_shapes if name.startswith("blocks."))
    hidden = timm_shapes["blocks.0.mlp.fc1.bias"][0]
    big = kind == "big_vision"
    prefix = "params/" if big else ""
    positions = "pos_embedding" if big else "Transformer/posembed_input/pos_embedding"
    shapes: Shapes = {
        "cls": (1, 1, d),
        positions: timm_shapes["pos_embed"],
        "embedding/kernel": (patch, patch, 3, d),
        "embedding/bias": (d,),
        "Transformer/encoder_norm/scale": (d,),
        "Transformer/encoder_norm/bias": (d,),
        "head/kernel": (d, classes),
        "head/bias": (classes,),
    }
    attention, norm2, mlp = (0, 1, 0) if big else (1, 2, 3)
    for index in range(depth):
        block = f"Transformer/encoderblock_{index}"
        for part in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_{attention}/{part}/kernel"] = (
                d, heads, d // heads
            )  # fmt: skip
            shapes[f"{block}/MultiHeadDotProductAttention_{attention}/{part}/bias"] = (
                heads, d // heads
            )  # fmt: skip
        out = f"{block}/MultiHeadDotProductAttention_{attention}/out"
        shapes |= {f"{out}/kernel": (heads, d // heads, d), f"{out}/bias": (d,)}
        for norm in ("LayerNorm_0", f"LayerNorm_{norm2}"):
            shapes |= {f"{block}/{norm}/scale": (d,), f"{block}/{norm}/bias": (d,)}
        for dense, (rows, columns) in (("Dense_0", (d, hidden)), ("Dense_1", (hidden, d))):
            shapes[f"{block}/MlpBlock_{mlp}/{dense}/kernel"] = (rows, columns)
            shapes[f"{block}/MlpBlock_{mlp}/{dense}/bias"] = (columns,)
    return {prefix + name: shape for name, shape in shapes.items()}


def authors_shapes(timm_shapes: Shapes) -> Shapes:
    """The same model in the .pth of its authors, DeiT-III's or DINOv2's (of 37 x 37 patches)."""
    shapes = dict(timm_shapes)
    if "head.weight" in shapes:
        return {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): x for name, x in shapes.items()}
    shapes["mask_token"] = (1, shapes["cls_token"][-1])
    if "reg_token" in shapes:
        shapes["pos_embed"] = (1, 1 + 37**2, shapes["cls_token"][-1])
        shapes["register_tokens"] = shapes.pop("reg_token")
    return shapes


# -- Stored answers.


def stored() -> dict[str, dict[str, Any]]:
    """By family: shapes, logits, and the probes of every block's output."""
    with np.load(FIXTURES) as file:
        shapes = json.loads(str(file["shapes"]))
        return {
            name: {
                "shapes": {key: tuple(shape) for key, shape in of_family.items()},
                "logits": file[f"{name}: logits"],
                "blocks": file[f"{name}: blocks"],
            }
            for name, of_family in shapes.items()
        }


def _answered() -> Iterator[tuple[str, Shapes, np.ndarray, np.ndarray]]:
    for family in FAMILIES:
        backbone = VARIANTS[family.variant].backbone
        oracle = build(family, family.stored_depth or backbone.depth)
        logits, blocks = oracle.run(family.inputs)
        yield family.name, oracle.shapes, logits, np.stack([probe(block) for block in blocks])


# -- A published, trained model (not part of the repository; see its README for where it is from).

PUBLISHED = Path(__file__).parents[2] / "shared" / "weights" / "dinov2_vits14_hf.safetensors"
PUBLISHED_FIXTURES = FIXTURES.with_name("dinov2.npz")
PUBLISHED_SIZES = (518, 224, 112)  # px; the first is its own


def published_model(folder: Path) -> Any:
    """transformers' Dinov2Model with the published weights."""
    import shutil

    import transformers

    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.save_pretrained(folder)
    shutil.copy(PUBLISHED, folder / "model.safetensors")
    transformers.utils.logging.disable_progress_bar()
    return transformers.Dinov2Model.from_pretrained(folder).eval()


def published_answers(model: Any, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Its normalised tokens, and what leaves every block."""
    import torch

    with torch.inference_mode():
        out = model(torch.tensor(np.moveaxis(images, -1, -3)), output_hidden_states=True)
    return out.last_hidden_state.numpy(), [x.numpy() for x in out.hidden_states[1:]]


def _store_published() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        model = published_model(Path(folder))
    for size in PUBLISHED_SIZES:
        tokens, blocks = published_answers(model, images_for(size)[:1])
        arrays[f"{size}: cls"] = tokens[:, 0]
        arrays[f"{size}: mean"] = tokens[:, 1:].mean(axis=1)
        arrays[f"{size}: blocks"] = np.stack([probe(block) for block in blocks])
    np.savez_compressed(PUBLISHED_FIXTURES, **arrays)


def main() -> None:
    """Asks all the oracles, and stores what they say."""
    if PUBLISHED.is_file():
        _store_published()
        print("published DINOv2", flush=True)
    shapes, arrays = {}, {}
    for name, of_family, logits, blocks in _answered():
        shapes[name] = of_family
        arrays |= {f"{name}: logits": logits, f"{name}: blocks": blocks}
        print(name, flush=True)
    FIXTURES.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURES, shapes=json.dumps(shapes), **arrays)


if __name__ == "__main__":
    main()
