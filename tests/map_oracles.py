"""Attribution maps of a vision transformer in plain PyTorch: the oracle of the maps' tests.

A forward pass that keeps every intermediate, and the maps computed from them step by step, one
image at a time, in float64. Relevance goes back through the stored intermediates by explicit rules,
without autograd. tests/fixtures/maps.npz keeps the answers for a small case, for machines without
PyTorch:

    python -m tests.map_oracles        # needs torch

Where the facts come from (rules only; all code here is our own):

- The network, its names and its token order: timm's vision_transformer.py. Same logits, to 1e-13.
- Rollout, attention GradCAM, transformer attribution, partial and full LRP: what the scripts of
  Transformer-Explainability (Chefer et al., CVPR 2021) compute for one image. They leave out
  block 0, hence the two forms of rollout and transformer attribution. "plain" is the set of rules
  of their LRP baselines, "conserving" the set of their own method.
- Gradient rollout: Transformer-MM-Explainability (Chefer et al., ICCV 2021), self-attention only.
- GradCAM on tokens: pytorch-grad-cam's convention for vision transformers.
- Our own: a denominator is moved 1e-9 away from zero, where theirs is moved up whatever its sign;
  a fan-out's relevances add up also where the value is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.oracles import Shapes, images_for, weights_for

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]

FIXTURES = Path(__file__).parent / "fixtures" / "maps.npz"
LAYER_NORM_EPSILON = 1e-6
DIVISION_EPSILON = 1e-9
RULES = {"conserving": True, "plain": False}


def torch_maps(
    state: dict[str, np.ndarray],
    images: np.ndarray,
    num_heads: int,
    patch: int,
    target: list[int] | None = None,
) -> dict[str, np.ndarray]:
    """Maps of normalised images [B, H, W, 3], by name: [B, N] of patches or [B, H, W] of pixels.

    `target` is a class for each image; None: the predicted ones. Beside the maps, `logits`,
    `explained` (the classes) and `relevance_sums_conserving` (at the input of every block).
    """
    import torch

    weights = {name: torch.tensor(x, dtype=torch.float64) for name, x in state.items()}
    answers = []
    targets = [None] * len(images) if target is None else target
    for image, chosen in zip(images, targets, strict=True):
        pixels = torch.tensor(image, dtype=torch.float64)
        answers.append(maps_of(pixels, weights, num_heads, patch, chosen))
    return {name: np.stack([answer[name] for answer in answers]) for name in answers[0]}


def maps_of(
    image: Tensor, weights: Weights, num_heads: int, patch: int, target: int | None
) -> dict[str, np.ndarray]:
    """Every map of one image [H, W, 3], in the precision of its arguments until the end."""
    run = forward(image, weights, num_heads, patch)
    target = int(run.logits.argmax()) if target is None else target
    attention = [block.attention.detach() for block in run.blocks]
    gradients, of_tokens = gradients_of(run, target)
    maps = {
        "logits": run.logits,
        "rollout": rollout(attention[1:]),
        "rollout_from_0": rollout(attention),
        "gradcam": gradcam(attention[-1], gradients[-1]),
        "gradcam_tokens": gradcam_tokens(run.blocks[-1].norm1, of_tokens),
        "grad_rollout": attribution(attention, gradients),
    }
    for name, conserving in RULES.items():
        relevance = relevance_of(run, target, conserving)
        maps[f"partial_lrp_{name}"] = cls_row(positive_mean(relevance.attention[-1]))
        maps[f"lrp_{name}"] = relevance.pixels
        if conserving:
            of_attention = relevance.attention
            maps["transformer_attribution"] = attribution(of_attention[1:], gradients[1:])
            maps["transformer_attribution_from_0"] = attribution(of_attention, gradients)
            maps["relevance_sums_conserving"] = relevance.block_sums
    answers = {name: value.detach().float().numpy() for name, value in maps.items()}
    return answers | {"explained": np.int32(target)}


# -- The network, with everything kept.


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's intermediates, [tokens, d], or [heads, tokens, ..] where said."""

    weights: Weights  # without the prefix "blocks.{i}."
    entered: Tensor
    norm1: Tensor
    queries: Tensor  # [heads, tokens, d / heads], as are keys and values
    keys: Tensor
    values: Tensor
    attention: Tensor  # [heads, tokens, tokens], after the softmax
    context: Tensor  # attention @ values, heads side by side
    attended: Tensor  # what the attention adds to `entered`
    middle: Tensor
    norm2: Tensor
    activated: Tensor  # [tokens, hidden], after GELU
    mixed: Tensor  # what the MLP adds to `middle`


@dataclasses.dataclass(frozen=True)
class Run:
    """A forward pass of one image."""

    weights: Weights
    grid: tuple[int, int]
    patches: Tensor  # [N, 3 * patch * patch], the pixels
    tokens: Tensor  # [1 + N, d], before the positions are added
    blocks: list[Block]
    pooled: Tensor  # [d], the CLS token after the last norm
    logits: Tensor  # [classes]


def forward(image: Tensor, weights: Weights, num_heads: int, patch: int) -> Run:
    """The logits of one image, and all that comes before them."""
    import torch

    pixels = image.detach().requires_grad_()  # so that autograd follows
    grid = (image.shape[0] // patch, image.shape[1] // patch)
    patches = to_patches(pixels, patch)
    embedded = patches @ patch_kernel(weights).T + weights["patch_embed.proj.bias"]
    tokens = torch.cat([weights["cls_token"][0], embedded])
    x = tokens + weights["pos_embed"][0]
    blocks = []
    for index in range(depth_of(weights)):
        prefix = f"blocks.{index}."
        inner = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        blocks.append(run_block(x, inner, num_heads))
        x = blocks[-1].middle + blocks[-1].mixed
    pooled = layer_norm(x, weights, "norm")[0]
    logits = linear(pooled, weights, "head")
    return Run(weights, grid, patches, tokens, blocks, pooled, logits)


def run_block(x: Tensor, weights: Weights, num_heads: int) -> Block:
    """A pre-norm block: attention, then MLP."""
    norm1 = layer_norm(x, weights, "norm1")
    queries, keys, values = (
        split_heads(part, num_heads) for part in linear(norm1, weights, "attn.qkv").chunk(3, -1)
    )
    attention = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
    context = merge_heads(attention @ values)
    attended = linear(context, weights, "attn.proj")
    middle = x + attended
    norm2 = layer_norm(middle, weights, "norm2")
    activated = gelu(linear(norm2, weights, "mlp.fc1"))
    mixed = linear(activated, weights, "mlp.fc2")
    return Block(
        weights, x, norm1, queries, keys, values, attention, context, attended, middle, norm2,
        activated, mixed,
    )  # fmt: skip


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A dense layer, bias included."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    normalised = centred / (variance + LAYER_NORM_EPSILON).sqrt()
    return normalised * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """GELU, exact."""
    return x * (1 + (x / 2**0.5).erf()) / 2


def depth_of(weights: Weights) -> int:
    """Number of blocks."""
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))


def patch_kernel(weights: Weights) -> Tensor:
    """The patch embedding as a matrix [d, 3 * patch * patch]."""
    return weights["patch_embed.proj.weight"].flatten(1)


def to_patches(image: Tensor, patch: int) -> Tensor:
    """Patches [N, 3 * patch * patch] of an image [H, W, 3], row by row, channels first inside."""
    height, width, channels = image.shape
    cells = image.reshape(height // patch, patch, width // patch, patch, channels)
    return cells.permute(0, 2, 4, 1, 3).reshape(-1, channels * patch * patch)


def to_pixels(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sum over the channels, [H, W], of what `to_patches` took apart."""
    patch = int((patches.shape[-1] // 3) ** 0.5)
    cells = patches.reshape(*grid, 3, patch, patch).sum(2)
    return cells.permute(0, 2, 1, 3).reshape(grid[0] * patch, grid[1] * patch)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[heads, tokens, d / heads] of [tokens, d]."""
    return x.reshape(len(x), num_heads, -1).transpose(0, 1)


def merge_heads(x: Tensor) -> Tensor:
    """[tokens, d] of [heads, tokens, d / heads]."""
    return x.transpose(0, 1).flatten(1)


# -- Maps of attention and gradients.


def gradients_of(run: Run, target: int) -> tuple[list[Tensor], Tensor]:
    """Gradients of a class's logit: at every block's attention, and at the last block's norm1."""
    import torch

    places = [block.attention for block in run.blocks] + [run.blocks[-1].norm1]
    *of_attention, of_tokens = torch.autograd.grad(run.logits[target], places)
    return of_attention, of_tokens


def cls_row(matrix: Tensor) -> Tensor:
    """What the CLS token has of every patch: [N] of [1 + N, 1 + N]."""
    return matrix[0, 1:]


def positive_mean(x: Tensor) -> Tensor:
    """Mean over the heads of the positive parts."""
    return x.clamp(min=0).mean(0)


def identity_like(x: Tensor) -> Tensor:
    """The identity of the size of attention [heads, tokens, tokens]."""
    import torch

    return torch.eye(x.shape[-1], dtype=x.dtype)


def chained(matrices: Sequence[Tensor]) -> Tensor:
    """Product of the blocks' matrices, the last block's leftmost."""
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    return product


def rollout(attention: Sequence[Tensor]) -> Tensor:
    """Attention rollout: rows of (mean over heads + I) sum to 1."""
    mixed = [a.mean(0) + identity_like(a) for a in attention]
    return cls_row(chained([m / m.sum(-1, keepdim=True) for m in mixed]))


def attribution(attention: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Product of I + E_h[(G * A)^+], A being attention (gradient rollout) or its relevance."""
    pairs = zip(attention, gradients, strict=True)
    return cls_row(chained([identity_like(a) + positive_mean(g * a) for a, g in pairs]))


def gradcam(attention: Tensor, gradient: Tensor) -> Tensor:
    """GradCAM on the CLS token's attention, a head being a channel; before min-max."""
    weight = gradient[:, 0, 1:].mean(-1, keepdim=True)
    return (attention[:, 0, 1:] * weight).mean(0).clamp(min=0)


def gradcam_tokens(tokens: Tensor, gradient: Tensor) -> Tensor:
    """GradCAM on patch tokens [1 + N, d], the features being the channels; before min-max."""
    return (tokens[1:] * gradient[1:].mean(0)).sum(-1).clamp(min=0)


# -- Layer-wise relevance propagation.


@dataclasses.dataclass(frozen=True)
class Relevance:
    """Where the relevance of one class went."""

    attention: list[Tensor]  # per block [heads, tokens, tokens]
    block_sums: Tensor  # [depth], at the input of every block
    positions: Tensor  # [1 + N, d], discarded
    cls_token: Tensor  # [d], discarded
    pixels: Tensor  # [H, W]


def relevance_of(run: Run, target: int, conserving: bool) -> Relevance:
    """Relevance from a class's logit (1) back to the pixels; GELU, softmax and norms pass it on."""
    import torch

    with torch.no_grad():
        of_logits = torch.zeros_like(run.logits)
        of_logits[target] = 1
        relevance = torch.zeros_like(run.tokens)
        relevance[0] = through_linear(of_logits, run.pooled, run.weights["head.weight"], conserving)
        of_attention, sums = [], []
        for block in reversed(run.blocks):
            relevance, of_block = through_block(relevance, block, conserving)
            of_attention.insert(0, of_block)
            sums.insert(0, relevance.sum())
        positions = run.weights["pos_embed"][0]
        of_tokens, of_positions = through_sum(relevance, run.tokens, positions, conserving)
        of_patches = through_patch_embedding(of_tokens[1:], run.patches, patch_kernel(run.weights))
        pixels = to_pixels(of_patches, run.grid)
        return Relevance(of_attention, torch.stack(sums), of_positions, of_tokens[0], pixels)


def through_block(relevance: Tensor, block: Block, conserving: bool) -> tuple[Tensor, Tensor]:
    """Relevance of a block's input [tokens, d], and of its attention [heads, tokens, tokens]."""
    of_middle, of_mixed = through_sum(relevance, block.middle, block.mixed, conserving)
    of_activated = through_linear(
        of_mixed, block.activated, block.weights["mlp.fc2.weight"], conserving
    )
    of_norm2 = through_linear(
        of_activated, block.norm2, block.weights["mlp.fc1.weight"], conserving
    )
    of_middle = of_middle + of_norm2

    of_entered, of_attended = through_sum(of_middle, block.entered, block.attended, conserving)
    of_context = through_linear(
        of_attended, block.context, block.weights["attn.proj.weight"], conserving
    )
    of_heads = split_heads(of_context, len(block.attention))
    of_attention, of_values = through_product(of_heads, block.attention, block.values)
    of_queries, of_keys = through_product(of_attention, block.queries, block.keys.mT)
    of_qkv = [merge_heads(part) for part in (of_queries, of_keys.mT, of_values)]
    of_norm1 = through_qkv(of_qkv, block, conserving)
    return of_entered + of_norm1, of_attention


def through_qkv(parts: Sequence[Tensor], block: Block, conserving: bool) -> Tensor:
    """Relevance of norm1's output, which three layers read: theirs add up."""
    weights = block.weights["attn.qkv.weight"].chunk(3)
    pairs = zip(parts, weights, strict=True)
    return sum(through_linear(part, block.norm1, weight, conserving) for part, weight in pairs)


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, b being moved away from zero; 0 where b is 0."""
    nonzero = b != 0
    return a * nonzero / (b + DIVISION_EPSILON * b.sign() + ~nonzero)


def through_linear(relevance: Tensor, x: Tensor, weight: Tensor, conserving: bool) -> Tensor:
    """Relevance of x, in proportion to the positive products x+ W+ and x- W-; biases get none.

    Conserving: of the sum of the two. Plain: of each by itself, which doubles the relevance where
    an output has both.
    """
    low_x, high_x = x.clamp(max=0), x.clamp(min=0)
    low_weight, high_weight = weight.clamp(max=0), weight.clamp(min=0)
    high, low = high_x @ high_weight.T, low_x @ low_weight.T
    of_high = safe_divide(relevance, high + low if conserving else high)
    of_low = safe_divide(relevance, high + low if conserving else low)
    return high_x * (of_high @ high_weight) + low_x * (of_low @ low_weight)


def through_product(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of the two operands of `a @ b`, a half each."""
    ratio = safe_divide(relevance, a @ b)
    return a * (ratio @ b.mT) / 2, b * (a.mT @ ratio) / 2


def through_sum(relevance: Tensor, a: Tensor, b: Tensor, conserving: bool) -> tuple[Tensor, Tensor]:
    """Relevance of the two operands of `a + b`.

    Conserving: each is rescaled, so that their sums are of the whole's sign, add up to it, and keep
    the ratio of their absolute values.
    """
    ratio = safe_divide(relevance, a + b)
    of_a, of_b = a * ratio, b * ratio
    if not conserving:
        return of_a, of_b
    sum_a, sum_b = of_a.sum(), of_b.sum()
    total, size = relevance.sum(), sum_a.abs() + sum_b.abs()
    share_a = safe_divide(sum_a.abs(), size) * total
    share_b = safe_divide(sum_b.abs(), size) * total
    return of_a * safe_divide(share_a, sum_a), of_b * safe_divide(share_b, sum_b)


def through_patch_embedding(relevance: Tensor, patches: Tensor, kernel: Tensor) -> Tensor:
    """Relevance of pixels [N, 3 * patch * patch] by the z^B rule: products, less their least."""
    least, most = patches.min(), patches.max()  # of the whole image
    low, high = kernel.clamp(max=0), kernel.clamp(min=0)
    above = patches @ kernel.T - least * high.sum(-1) - most * low.sum(-1)
    ratio = safe_divide(relevance, above)
    return patches * (ratio @ kernel) - least * (ratio @ high) - most * (ratio @ low)


# -- The small case, and its stored answers.


@dataclasses.dataclass(frozen=True)
class Case:
    """A ViT of DeiT-Ti's width, small otherwise."""

    dim: int = 192
    depth: int = 3
    heads: int = 3
    size: int = 64  # pixels
    patch: int = 16
    classes: int = 10
    target: tuple[int, int] = (3, 7)  # a class for each of the two images


CASE = Case()


def case_shapes() -> Shapes:
    """timm's names and shapes of the case's tensors."""
    d, patches = CASE.dim, (CASE.size // CASE.patch) ** 2
    kernels = {
        "patch_embed.proj": (d, 3, CASE.patch, CASE.patch),
        "norm": (d,),
        "head": (CASE.classes, d),
    }
    for index in range(CASE.depth):
        kernels |= {
            f"blocks.{index}.norm1": (d,),
            f"blocks.{index}.attn.qkv": (3 * d, d),
            f"blocks.{index}.attn.proj": (d, d),
            f"blocks.{index}.norm2": (d,),
            f"blocks.{index}.mlp.fc1": (4 * d, d),
            f"blocks.{index}.mlp.fc2": (d, 4 * d),
        }
    shapes: Shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + patches, d)}
    for name, shape in kernels.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def case_weights() -> dict[str, np.ndarray]:
    """The case's tensors, by timm's names."""
    return weights_for(case_shapes())


def case_images() -> np.ndarray:
    """Two normalised images [2, size, size, 3]."""
    return images_for(CASE.size)


def case_answers() -> dict[str, np.ndarray]:
    """What is stored: "predicted/" and "target/" before the names of `torch_maps`."""
    answers = {}
    for kind, target in (("predicted", None), ("target", list(CASE.target))):
        maps = torch_maps(case_weights(), case_images(), CASE.heads, CASE.patch, target)
        answers |= {f"{kind}/{name}": value for name, value in maps.items()}
    # Maps of pixels are nine tenths of the file; those of one kind are enough.
    return {name: x for name, x in answers.items() if not name.startswith("predicted/lrp_")}


def stored() -> dict[str, dict[str, np.ndarray]]:
    """The stored answers: by kind ("predicted", "target"; maps of pixels only here), by name."""
    answers: dict[str, dict[str, np.ndarray]] = {"predicted": {}, "target": {}}
    with np.load(FIXTURES) as file:
        for key in file.files:
            kind, name = key.split("/")
            answers[kind][name] = file[key]
    return answers


def write() -> None:
    """Stores what the oracle says of the small case."""
    FIXTURES.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURES, **case_answers())


if __name__ == "__main__":
    write()
