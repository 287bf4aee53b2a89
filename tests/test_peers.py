"""The peers of the speed report compute what they claim to (needs torch and timm)."""

import functools
import itertools
import sys

import jax
import numpy as np
import pytest

import iared2_jax
from benchmarks import peers
from iared2_jax.errors import UsageError
from iared2_jax.token_reduction import schedules
from iared2_jax.token_reduction.create import create_module

torch = pytest.importorskip("torch")
if peers.missing():
    pytest.skip(peers.missing(), allow_module_level=True)

N = 196
COUNTS = (196, 120, 60)
IMAGES = np.random.default_rng(1).standard_normal((2, 224, 224, 3), np.float32)


@functools.cache
def ours():
    """DeiT-Ti with every parameter random, so that none can be swapped or left out unnoticed."""
    module, variables = iared2_jax.create_model("deit_ti", groups=3)
    rng = np.random.default_rng(0)
    return module, jax.tree.map(
        lambda x: 2 * x + 0.05 * rng.standard_normal(x.shape, np.float32), variables
    )


@functools.cache
def our_logits(**arguments) -> np.ndarray:
    module, variables = ours()
    apply = jax.jit(lambda variables, images: module.apply(variables, images, **arguments)[0])
    return np.asarray(apply(variables, IMAGES))


def dense() -> np.ndarray:
    return our_logits(execution="dense")


def vit():
    return peers.timm_model("deit_ti", ours()[1])


def run(model) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).numpy()


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest, relative to the largest number there is."""
    return np.abs(actual - expected).max() / np.abs(expected).max()


def entering_mlp(model) -> list[int]:
    """Tokens that enter each block's MLP."""
    tokens = []
    for block in model.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, x: tokens.append(x[0].shape[1]))
    assert np.isfinite(run(model)).all()
    return tokens


def test_timm_with_our_weights_is_our_dense_model():
    assert difference(run(vit()), dense()) < 1e-4
    # The two images' logits differ: the comparison is not one of constants.
    assert difference(dense()[0], dense()[1]) > 0.1


def test_top_k_that_keeps_all_is_dense():
    assert difference(run(peers.topk_model(vit(), (N, N, N))), dense()) < 1e-4


def test_top_k_is_our_fixed_budget_by_attention():
    expected = our_logits(keep_ratios=tuple(count / N for count in COUNTS), selector="attention")
    assert difference(run(peers.topk_model(vit(), COUNTS)), expected) < 1e-4
    # Which tokens are kept matters here: neither all of them nor one less gives these numbers.
    assert difference(dense(), expected) > 0.01
    one_less = run(peers.topk_model(vit(), (196, 119, 60)))
    assert difference(one_less, expected) > 1e-3


def test_top_k_has_its_counts():
    tokens = entering_mlp(peers.topk_model(vit(), COUNTS))
    assert tokens == [1 + count for count in COUNTS for _ in range(4)]


@pytest.mark.parametrize("counts", [(100, 50, 20), (196, 60, 120), (196, 100, 0), (196,) * 5])
def test_bad_counts_are_refused(counts):
    with pytest.raises(UsageError, match="counts"):
        peers.topk_model(vit(), counts)


def test_tome_without_merging_is_dense():
    assert difference(run(peers.tome_model(vit(), 0)), dense()) < 1e-4


def test_tome_has_r_tokens_less_after_each_block():
    assert entering_mlp(peers.tome_model(vit(), 8)) == [197 - 8 * (i + 1) for i in range(12)]
    # 197 -> 99 -> 50 -> ..: never more than what A has beside CLS.
    assert entering_mlp(peers.tome_model(vit(), 200))[:4] == [99, 50, 26, 14]


def test_tome_merges_equal_tokens_without_loss():
    # CLS and six tokens, of which 2 equals 3 and 4 equals 5: two edges of similarity 1.
    x = torch.tensor(np.random.default_rng(0).standard_normal((1, 7, 4), np.float32))
    x[:, 2], x[:, 4] = x[:, 3], x[:, 5]
    merged, size = peers._merge(x, torch.ones(1, 7, 1), x[:, None], r=2)
    # Of A (0, 2, 4, 6) CLS and 6 stay, in an order that starts with CLS; then B (1, 3, 5).
    torch.testing.assert_close(merged, x[:, [0, 6, 1, 3, 5]])
    assert size.flatten().tolist() == [1, 1, 1, 2, 2]


def slow_tome(vit, r: int) -> np.ndarray:
    """ToMe's steps for the first image: whole attention matrices, pairs one by one."""
    x = peers._embed(vit, torch.tensor(IMAGES[:1].transpose(0, 3, 1, 2)))[0]
    size = torch.ones(len(x))
    for block in vit.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, 3, 64).permute(1, 2, 0, 3)
        weights = size * (q @ k.mT / 8).exp()
        y = weights / weights.sum(dim=-1, keepdim=True) @ v
        x = x + block.attn.proj(y.permute(1, 0, 2).reshape(len(x), 192))
        keys = k.mean(dim=0)
        cosine = torch.cosine_similarity(keys[:, None], keys[None], dim=-1)
        odd = range(1, len(x), 2)
        pairs = [(i, max(odd, key=lambda j: cosine[i, j])) for i in range(2, len(x), 2)]
        pairs = sorted(pairs, key=lambda pair: -cosine[pair])[:r]
        groups = [[i] for i in range(0, len(x), 2) if i not in dict(pairs)]
        groups += [[j, *(i for i, target in pairs if target == j)] for j in odd]
        x = torch.stack([(size[group] @ x[group]) / size[group].sum() for group in groups])
        size = torch.stack([size[group].sum() for group in groups])
        x = x + block.mlp(block.norm2(x))
    return vit.head(vit.norm(x[:1])).numpy()


def test_tome_is_what_the_paper_says():
    with torch.inference_mode():
        expected = slow_tome(vit(), 14)
    assert difference(run(peers.tome_model(vit(), 14))[:1], expected) < 1e-4
    assert difference(dense()[:1], expected) > 0.01


def test_our_tome_is_theirs():
    """The selector "tome", in JAX, and ToMe in PyTorch: r = 14 in each of the twelve blocks."""
    module = create_module("deit_ti", groups=12)
    ratios = schedules.constant_number(N, groups=12, number=14)
    run_ours = jax.jit(
        lambda variables: module.apply(
            variables,
            IMAGES,
            execution="gathered",
            capacities=module.slots(ratios, "tome"),
            keep_ratios=ratios,
            selector="tome",
        )[0]
    )
    assert difference(run_ours(ours()[1]), run(peers.tome_model(vit(), 14))) < 1e-4


def test_tome_r():
    full = iared2_jax.count_flops("deit_s").full
    assert peers.tome_flops("deit_s", 0) == full
    costs = [peers.tome_flops("deit_s", r) for r in range(99)]
    assert all(more > less for more, less in itertools.pairwise(costs))
    assert peers.tome_r("deit_s", full) == peers.tome_r("deit_s", 2 * full) == 0
    assert peers.tome_r("deit_s", 0.0) == 98
    # The paper's DeiT-S at r=13: 2.7 GFLOPs (table 4).
    assert round(costs[13] / 1e9, 1) == 2.7
    chosen = [peers.tome_r("deit_s", share * full) for share in np.linspace(1, 0.3, 15)]
    assert chosen == sorted(chosen)
    assert [peers.tome_r("deit_s", cost) for cost in costs] == list(range(99))


def test_callables():
    target = iared2_jax.count_flops("deit_ti", COUNTS).full
    ready, skipped = peers.callables("deit_ti", ours()[1], IMAGES, COUNTS, target, compile=False)
    assert list(ready) == ["timm eager", "timm top-k", "timm ToMe"]
    assert not skipped
    assert difference(ready["timm eager"]().numpy(), dense()) < 1e-4
    assert ready["timm ToMe"]().shape == (2, 1000)


def test_what_torch_cannot_compile_is_left_out_with_its_reason(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    ready, skipped = peers.callables("deit_ti", ours()[1], IMAGES, COUNTS, 1e9)
    assert list(ready) == ["timm eager", "timm top-k", "timm ToMe"]
    reason = "RuntimeError: no C++ compiler"
    assert skipped == {"timm compile": reason, "timm top-k compile": reason}


def test_weights_that_do_not_fit_are_refused():
    params = dict(ours()[1]["params"]["backbone"])
    del params["cls_token"]
    with pytest.raises(RuntimeError, match="cls_token"):
        peers.timm_model("deit_ti", {"params": {"backbone": params}})
    with pytest.raises(UsageError, match="deit_ti"):
        peers.timm_model("deit_ti_distilled", ours()[1])


def test_missing_names_what_is_missing(monkeypatch):
    assert "torchvision" not in sys.modules or hasattr(sys.modules["torchvision"], "__version__")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm" in peers.missing()
    assert "pip install" in peers.missing()
