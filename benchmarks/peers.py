"""What a user would otherwise pick: PyTorch and timm, static top-k, ToMe, with our weights.

A library for the speed report. It needs torch and timm (`missing` says what is not there); the
package itself never imports them.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int

from iared2_jax import count_flops
from iared2_jax.errors import UsageError, nearest
from iared2_jax.models.variants import get_variant
from iared2_jax.weights.save import timm_tensors

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:  # `missing` says so, and nothing below is called
    torch = nn = None

Module = nn.Module if nn else object

TIMM_NAMES = {
    "deit_ti": "deit_tiny_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "deit_b_384": "deit_base_patch16_384",
}

# timm goes in without its dependencies: torchvision has no CPU build beside torch's.
INSTALL = "pip install torch==2.13.0; pip install --no-deps timm"


# -- timm, with or without torchvision.


# What timm (1.0.31) reads from torchvision while it is imported, for its data loaders and CNNs.
_TORCHVISION = {
    "datasets": ("CIFAR10", "CIFAR100", "FashionMNIST", "ImageFolder", "KMNIST", "MNIST"),
    "ops": (),
    "ops.misc": ("FrozenBatchNorm2d",),
    "transforms": ("ToTensor",),
    "transforms.functional": (),
}


def _stand_ins() -> dict[str, ModuleType]:
    """Modules by the names of `_TORCHVISION`, with empty classes that nothing here ever uses."""
    modules = {"torchvision": ModuleType("torchvision")}
    for name, classes in _TORCHVISION.items():
        module = modules[f"torchvision.{name}"] = ModuleType(f"torchvision.{name}")
        vars(module).update({each: type(each, (), {}) for each in classes})
        parent, _, last = module.__name__.rpartition(".")
        setattr(modules[parent], last, module)
    # The keys of a table, so they must differ.
    modes = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
    modules["torchvision.transforms.functional"].InterpolationMode = modes
    return modules


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """The real torchvision if it can be imported; else stand-ins, gone again at the exit."""
    modules = {}
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # not there, or built for another torch
        modules = _stand_ins()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def timm() -> ModuleType:
    """timm, with stand-ins for torchvision where there is none."""
    with _torchvision():
        import timm
    return timm


def missing() -> str | None:
    """None if torch and timm can be imported; else one sentence: what cannot be, and the fix."""
    try:
        import torch  # noqa: F401

        timm()
    except ImportError as error:
        return f"the peers need torch and timm ({error}): {INSTALL}"
    return None


def set_threads(n: int) -> None:
    """The number of threads one torch operation uses on the CPU."""
    torch.set_num_threads(n)


# -- The same weights.


def timm_model(
    model: str, variables: Mapping[str, Any], device: str = "cpu", dtype: str = "float32"
) -> nn.Module:
    """timm's model, in eval mode, with our backbone's weights.

    Args:
      model: one of `TIMM_NAMES`.
      variables: of our module; {"params": {"backbone": ..}} is read.
      device, dtype: torch's names, of the parameters and of the computation.

    Raises:
      UsageError: timm has no counterpart of `model`.
      RuntimeError: names or shapes of the weights differ from timm's (a strict load).
      ImportError: `missing()`.
    """
    if model not in TIMM_NAMES:
        raise UsageError(f"timm has no counterpart of {model!r}{nearest(model, TIMM_NAMES)}")
    state = timm_tensors(variables, interpreters=False)
    classes = len(state["head.bias"])
    vit = timm().create_model(TIMM_NAMES[model], pretrained=False, num_classes=classes)
    vit.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True)
    return vit.to(device=device, dtype=getattr(torch, dtype)).eval()


# -- What top-k and ToMe share.


def _embed(vit: nn.Module, images: Float[torch.Tensor, "b 3 h w"]) -> Float[torch.Tensor, "b n d"]:
    """timm's own way from pixels to the first block."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


def _project(
    attention: nn.Module, x: Float[torch.Tensor, "b n d"]
) -> tuple[Float[torch.Tensor, "b heads n e"], ...]:
    """Queries, keys, values."""
    qkv = rearrange(
        attention.qkv(x), "b n (three h e) -> three b h n e", three=3, h=attention.num_heads
    )
    return qkv.unbind(0)


def _attend(
    attention: nn.Module,
    q: Float[torch.Tensor, "b heads n e"],
    k: Float[torch.Tensor, "b heads n e"],
    v: Float[torch.Tensor, "b heads n e"],
    bias: Float[torch.Tensor, "b 1 1 n"] | None = None,
) -> Float[torch.Tensor, "b n d"]:
    """Fused attention and the output projection; `bias` is added to the logits."""
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(rearrange(y, "b h n e -> b n (h e)"))


def _take(
    values: Float[torch.Tensor, "b n c"], index: Int[torch.Tensor, "b k"]
) -> Float[torch.Tensor, "b k c"]:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


# -- Static top-k.


class TopK(Module):
    """See `topk_model`."""

    def __init__(self, vit: nn.Module, counts: Sequence[int]):
        super().__init__()
        counts = [int(count) for count in counts]
        patches, depth = vit.patch_embed.num_patches, len(vit.blocks)
        if depth % len(counts):
            raise UsageError(f"{len(counts)} counts do not divide the depth of {depth} blocks")
        if counts[0] != patches or counts != sorted(counts, reverse=True) or counts[-1] < 1:
            raise UsageError(f"counts must fall from {patches} to 1 or more, got {counts}")
        self.vit = vit
        # After which block (None: after this one nothing is dropped) how many patches go on.
        self.kept: list[int | None] = [None] * depth
        for group in range(1, len(counts)):
            if counts[group] < counts[group - 1]:
                self.kept[group * (depth // len(counts)) - 1] = counts[group]

    def forward(self, images: Float[torch.Tensor, "b 3 h w"]) -> Float[torch.Tensor, "b classes"]:
        x = _embed(self.vit, images)
        for block, count in zip(self.vit.blocks, self.kept, strict=True):
            x = block(x) if count is None else _run_and_drop(block, x, count)
        return self.vit.forward_head(self.vit.norm(x))


def _run_and_drop(
    block: nn.Module, x: Float[torch.Tensor, "b n d"], count: int
) -> Float[torch.Tensor, "b k d"]:
    """The block, then CLS and the `count` patches its heads' CLS queries attend to most."""
    q, k, v = _project(block.attn, block.norm1(x))
    x = x + _attend(block.attn, q, k, v)
    x = x + block.mlp(block.norm2(x))
    # The fused kernel gives no weights; one query's row costs little.
    row = (q[:, :, :1] * block.attn.scale @ k.mT).float().softmax(dim=-1)
    best = row.mean(dim=1)[:, 0, 1:].topk(count, dim=1, sorted=False).indices
    return torch.cat([x[:, :1], _take(x[:, 1:], best)], dim=1)


def topk_model(timm_model: nn.Module, counts: Sequence[int]) -> nn.Module:
    """Static top-k: every image keeps the same number of patches, those CLS attends to most.

    The blocks form len(counts) equal groups. Before group g > 0, an image keeps CLS and its
    counts[g] patch tokens with the largest

        a = mean over heads of softmax(q_cls k^T / sqrt(e))

    in the last block of group g - 1. The score is EViT's (Liang et al., "Not All Patches Are What
    You Need", ICLR 2022, section 3.1), without its fused token. A group whose count is that of the
    group before runs as in the plain model.

    Args:
      timm_model: from `timm_model`; it is shared, not copied.
      counts: patch tokens of each group, falling; the first is N.

    Returns:
      A module from images [B, 3, H, W] to logits [B, classes].

    Raises:
      UsageError: counts that do not fit the model.
    """
    return TopK(timm_model, counts).eval()


# -- ToMe.


def _mergeable(tokens: int, r: int) -> int:
    """r, or as many as there are in set A (every second token) beside CLS."""
    return min(r, (tokens - 1) // 2)


class ToMe(Module):
    """See `tome_model`."""

    def __init__(self, vit: nn.Module, r: int):
        super().__init__()
        if r < 0:
            raise UsageError(f"r must be 0 or more, got {r}")
        self.vit = vit
        self.r = r

    def forward(self, images: Float[torch.Tensor, "b 3 h w"]) -> Float[torch.Tensor, "b classes"]:
        x, size = _embed(self.vit, images), None
        for block in self.vit.blocks:
            x, size = self._run(block, x, size)
        return self.vit.forward_head(self.vit.norm(x))

    def _run(
        self,
        block: nn.Module,
        x: Float[torch.Tensor, "b n d"],
        size: Float[torch.Tensor, "b n 1"] | None,
    ) -> tuple[Float[torch.Tensor, "b k d"], Float[torch.Tensor, "b k 1"] | None]:
        """One block that merges between its halves; `size` is None until something was merged."""
        q, k, v = _project(block.attn, block.norm1(x))
        bias = None if size is None else rearrange(size.log(), "b n 1 -> b 1 1 n")
        x = x + _attend(block.attn, q, k, v, bias)
        if r := _mergeable(x.shape[1], self.r):
            x, size = _merge(x, torch.ones_like(x[..., :1]) if size is None else size, k, r)
        return x + block.mlp(block.norm2(x)), size


def _merge(
    x: Float[torch.Tensor, "b n d"],
    size: Float[torch.Tensor, "b n 1"],
    k: Float[torch.Tensor, "b heads n e"],
    r: int,
) -> tuple[Float[torch.Tensor, "b n_less_r d"], Float[torch.Tensor, "b n_less_r 1"]]:
    """Bipartite soft matching: r tokens of A (0, 2, ..) go into their most similar ones of B."""
    keys = F.normalize(k.mean(dim=1), dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].mT
    similarity[:, 0] = -torch.inf  # CLS, in A, is never merged; in no B, nothing goes into it
    closeness, partner = similarity.max(dim=-1)
    order = closeness.argsort(dim=1)  # CLS first, the most similar last
    stay, leave = order[:, :-r].sort(dim=1).values, order[:, -r:]  # the image's order
    target = partner.gather(1, leave)[..., None]

    def merged(sums):
        a, b = sums[:, ::2], sums[:, 1::2]
        b = b.scatter_add(1, target.expand(-1, -1, b.shape[-1]), _take(a, leave))
        return torch.cat([_take(a, stay), b], dim=1)

    total = merged(size)
    return merged(x * size) / total, total


def tome_model(timm_model: nn.Module, r: int) -> nn.Module:
    """ToMe: every block merges r tokens between its attention and its MLP.

    Tokens alternate between sets A and B. Each of A finds its most similar one of B, by the cosine
    of their keys (mean over heads); the r most similar pairs become one token, the mean weighted by
    size (how many patches a token stands for). CLS is never merged. Attention is proportional:

        softmax(q k^T / sqrt(e) + log size) v

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3 and equation 1; written
    from the paper, with PyTorch's fused attention.

    Args:
      timm_model: from `timm_model`; it is shared, not copied.
      r: tokens fewer per block; a block with too few tokens merges what A has beside CLS.

    Returns:
      A module from images [B, 3, H, W] to logits [B, classes].

    Raises:
      UsageError: a negative r.
    """
    return ToMe(timm_model, r).eval()


def tome_flops(model: str, r: int) -> float:
    """Full multiply-accumulates per image of ToMe, by `count_flops`' convention.

    A block that n tokens enter and m = n - r leave costs 4 n d^2 + 2 n^2 d + 8 m d^2; the matching
    is not counted. r=0 gives `count_flops(model).full`.
    """
    vit = get_variant(model).backbone
    tokens = vit.num_prefix + vit.input_spec.num_patches
    total = count_flops(model).full - vit.depth * vit.block_flops(tokens).full
    for _ in range(vit.depth):
        block = vit.block_flops(tokens)
        total += block.projections + block.attention
        tokens -= _mergeable(tokens, r)
        total += vit.block_flops(tokens).mlp
    return total


def tome_r(model: str, target_full_flops: float) -> int:
    """The r with which ToMe's full multiply-accumulates are the nearest to the target.

    Args:
      model: one of `TIMM_NAMES`.
      target_full_flops: per image, e.g. `count_flops(module, kept).full`.
    """
    most = get_variant(model).backbone.input_spec.num_patches // 2
    return min(range(most + 1), key=lambda r: abs(tome_flops(model, r) - target_full_flops))


# -- To be timed.


def callables(
    model: str,
    variables: Mapping[str, Any],
    images: np.ndarray,
    counts: Sequence[int],
    target_full_flops: float,
    device: str = "cpu",
    dtype: str = "float32",
    compile: bool = True,
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, str]]:
    """What to time: each runs one model on one batch that lies on the device, and waits for it.

    "timm eager", "timm compile", "timm top-k", "timm top-k compile", "timm ToMe". Compiled ones are
    compiled here, by one call, for this batch's shape. Take one set at a time: the next call of
    this function throws away what torch.compile made for the sets before.

    On an NVIDIA GPU, float32 products are set to TF32, for the process: it is JAX's default there.

    Args:
      model: one of `TIMM_NAMES`.
      variables: of our module.
      images [B, H, W, 3]: normalised.
      counts: patch tokens of each group, for static top-k.
      target_full_flops: per image, for ToMe's r.
      device, dtype: torch's names.
      compile: also with torch.compile.

    Returns:
      The callables, by name, in the order above; each returns logits [B, classes]. And
      {name: reason} of those that torch.compile failed on.
    """
    if torch.device(device).type == "cuda" and dtype == "float32":
        torch.set_float32_matmul_precision("high")
    # Its cache is per function and short: beyond it, a shape would be refused, or run uncompiled.
    torch.compiler.reset()
    batch = torch.tensor(rearrange(images, "b h w c -> b c h w"))
    batch = batch.to(device=device, dtype=getattr(torch, dtype)).contiguous()
    vit = timm_model(model, variables, device, dtype)
    variants = (
        ("timm eager", vit, "timm compile"),
        ("timm top-k", topk_model(vit, counts), "timm top-k compile"),
        ("timm ToMe", tome_model(vit, tome_r(model, target_full_flops)), None),
    )
    ready, skipped = {}, {}
    for name, module, compiled_name in variants:
        ready[name] = _runner(module, batch)
        if not compile or compiled_name is None:
            continue
        try:
            run = _runner(torch.compile(module, fullgraph=True, dynamic=False), batch)
            run()
        except Exception as error:  # whatever its compiler, or the C++ compiler behind it, raises
            skipped[compiled_name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            ready[compiled_name] = run
    return ready, skipped


def _runner(
    module: nn.Module, batch: Float[torch.Tensor, "b 3 h w"]
) -> Callable[[], Float[torch.Tensor, "b classes"]]:
    def run():
        with torch.inference_mode():
            logits = module(batch)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        return logits

    return run
