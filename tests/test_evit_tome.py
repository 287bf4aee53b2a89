"""EViT and ToMe: their published rules, restated token by token, against all executions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iared2_jax
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import GroupPlan, Plan
from iared2_jax.models.layers import gelu
from iared2_jax.token_reduction import schedules
from iared2_jax.token_reduction.compaction import compacted
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.matching import bipartite_match, list_order
from iared2_jax.token_reduction.reducers import Fuse, Merge
from iared2_jax.token_reduction.selectors import alive_counts, get_selector, keep_counts
from iared2_jax.token_reduction.state import all_alive

N = 64  # patches of vit_3_blocks
# EViT drops in the later of two groups, which has two blocks; ToMe merges in every block.
EVIT = schedules.constant_rate(N, groups=2, rate=0.6)
TOME = schedules.constant_number(N, groups=3, number=12)
SETTINGS = {"evit": ((1, 2), EVIT), "tome": ((1, 1, 1), TOME)}


@functools.cache
def model(group_sizes: tuple[int, ...]):
    """A small ViT with every parameter random, so that none can be left out unnoticed."""
    module = create_module("vit_3_blocks", groups=group_sizes)
    rng = np.random.default_rng(0)
    noise = lambda x: 2 * x + 0.05 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return module, jax.tree.map(noise, init_variables(module))


@functools.cache
def images(count: int = 3):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((count, 64, 64, 3)), jnp.float32)


@functools.cache
def run(selector: str, execution: str, **options):
    groups, ratios = SETTINGS[selector]
    module, variables = model(groups)
    ratios = options.pop("keep_ratios", ratios)
    if execution == "gathered":
        options["capacities"] = module.slots(ratios, selector)
    apply = jax.jit(
        lambda v, x: module.apply(
            v, x, execution=execution, selector=selector, keep_ratios=ratios, **options
        )
    )
    return apply(variables, images())


# -- The published rules on lists of tokens, in NumPy, one image at a time.


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def normed(x: np.ndarray, p) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def linear(x: np.ndarray, p) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def attention(x: np.ndarray, p, heads: int, sizes: np.ndarray):
    """x + MSA(LN x), the CLS query's mean weights, and the mean key of every token."""
    qkv = linear(normed(x, p["norm1"]), p["attn"]["qkv"])
    q, k, v = qkv.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + np.log(sizes)
    weights = softmax(logits)
    y = (weights @ v).transpose(1, 0, 2).reshape(len(x), -1)
    return x + linear(y, p["attn"]["proj"]), weights[:, 0].mean(0), k.mean(0)


def mlp(x: np.ndarray, p) -> np.ndarray:
    y = np.asarray(gelu(jnp.asarray(linear(normed(x, p["norm2"]), p["mlp"]["fc1"]))))
    return x + linear(y, p["mlp"]["fc2"])


def evit_step(x: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """CLS, the `count` tokens it attends to most, and the sum of the others times attention."""
    order = np.argsort(-weights[1:], kind="stable") + 1
    kept, others = order[:count], order[count:]
    if not len(others):
        return x
    fused = (weights[others, None] * x[others]).sum(0)
    return np.concatenate([x[:1], x[np.sort(kept)], fused[None]])


def tome_step(x: np.ndarray, keys: np.ndarray, sizes: np.ndarray, r: int):
    """The r tokens of A = (0, 2, ..) most like one of B = (1, 3, ..) are merged into it."""
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    similarity = keys[::2] @ keys[1::2].T
    similarity[0] = -np.inf  # CLS
    closeness, partner = similarity.max(-1), similarity.argmax(-1)
    by_closeness = np.argsort(-closeness, kind="stable")
    leave, stay = by_closeness[:r], np.sort(by_closeness[r:])
    a, b, size_a, size_b = x[::2], x[1::2] * sizes[1::2, None], sizes[::2], sizes[1::2].copy()
    for token in leave:
        b[partner[token]] += a[token] * size_a[token]
        size_b[partner[token]] += size_a[token]
    b /= size_b[:, None]
    return np.concatenate([a[stay], b]), np.concatenate([size_a[stay], size_b])


def by_the_rule(selector: str) -> tuple[np.ndarray, list[int]]:
    """Logits of all images, and how many tokens enter each block's MLP."""
    groups, ratios = SETTINGS[selector]
    module, variables = model(groups)
    params = jax.tree.map(np.asarray, variables["params"]["backbone"])
    counts = keep_counts(ratios, N, extra_tokens=1 if selector == "evit" else 0)
    tokens = module.apply(variables, images(), method="embed")
    first = np.cumsum([0, *module.group_sizes[:-1]]).tolist()
    logits = []
    for x in np.asarray(tokens, np.float64):
        sizes, lengths = np.ones(len(x)), []
        for index in range(3):
            p = params[f"block_{index}"]
            x, weights, keys = attention(x, p, module.backbone.num_heads, sizes)
            if index in first:
                count = counts[first.index(index)]
                if selector == "evit":
                    x = evit_step(x, weights, count)
                    sizes = np.ones(len(x))
                else:
                    x, sizes = tome_step(x, keys, sizes, len(x) - 1 - count)
            x = mlp(x, p)
            lengths.append(len(x) - 1)
        logits.append(linear(normed(x[0], params["norm"]), params["head"]))
    return np.stack(logits), lengths


@pytest.mark.parametrize("selector", ["evit", "tome"])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_every_execution_is_the_published_rule(selector, execution):
    expected, lengths = by_the_rule(selector)
    logits, out = run(selector, execution)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    groups, _ = SETTINGS[selector]
    per_block = np.repeat([keep.sum(-1) for keep in out.keep], groups, axis=0)
    np.testing.assert_array_equal(per_block, np.array(lengths)[:, None].repeat(3, 1))
    assert all((count == 0).all() for count in out.overflow)


@pytest.mark.parametrize("selector", ["evit", "tome"])
def test_gathered_says_what_masked_says(selector):
    (_, masked), (_, gathered) = (run(selector, how) for how in ("masked", "gathered"))
    for name in ("keep", "scores", "attention"):
        for expected, found in zip(getattr(masked, name), getattr(gathered, name), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("selector", ["evit", "tome"])
def test_accelerated_is_the_same_and_takes_any_number(selector):
    groups, ratios = SETTINGS[selector]
    module, variables = model(groups)
    fast = iared2_jax.accelerate(
        module, variables, 3, keep_ratios=ratios, selector=selector, cache_dir=None
    )
    logits, out = fast(images())
    expected, _ = run(selector, "masked")
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    assert not fast.plan.groups
    assert fast.plan.measured
    assert "gathered" in str(fast.plan)
    assert "does not pay" not in str(fast.plan)
    assert [keep.sum(-1).tolist() for keep in out.keep] == [
        [count] * 3 for count in module.slots(ratios, selector)
    ]
    ragged = Plan(3, tuple(GroupPlan("padded", 3, ((3 * 65, 65),)) for _ in groups))
    with pytest.raises(UsageError, match="reduces tokens within a block"):
        iared2_jax.accelerate(
            module, variables, 3, keep_ratios=ratios, selector=selector, plan=ragged
        )


@pytest.mark.parametrize(("selector", "execution"), [("evit", "masked"), ("tome", "gathered")])
def test_reducing_nothing_is_the_dense_model(selector, execution):
    groups, _ = SETTINGS[selector]
    module, variables = model(groups)
    dense, _ = jax.jit(lambda v, x: module.apply(v, x, execution="dense"))(variables, images())
    logits, _ = run(selector, execution, keep_ratios=(1.0,) * len(groups))
    np.testing.assert_allclose(logits, dense, atol=1e-5)


@pytest.mark.parametrize("selector", ["evit", "tome"])
def test_masked_tokens_do_not_leak_and_gradients_are_finite(selector):
    """Gathered training has the gradient of masked training."""
    groups, ratios = SETTINGS[selector]
    module, variables = model(groups)
    slots = module.slots(ratios, selector)

    def loss(variables, **how):
        logits, _ = module.apply(variables, images(), keep_ratios=ratios, selector=selector, **how)
        return jax.nn.logsumexp(logits, axis=-1).sum()

    masked = jax.jit(jax.grad(loss))(variables)
    gathered = jax.jit(jax.grad(functools.partial(loss, execution="gathered", capacities=slots)))(
        variables
    )
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(masked))
    assert 0 < largest < np.inf
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), masked, gathered
    )


# -- The reducers by hand.


def state(values, keys=None):
    """One image: CLS 100, and patches with these values."""
    x = jnp.asarray([[[100.0], *[[v] for v in values]]])
    found = all_alive(x, len(values))
    return found if keys is None else found._replace(keys=jnp.asarray([keys], jnp.float32))


@pytest.mark.parametrize("how", ["in_place", "compacted"])
def test_fuse_by_hand(how):
    """Patches 1 and 3 become 0.2 * 20 + 0.1 * 40 = 8, where the better of the two was."""
    keep = jnp.asarray([[True, False, True, False]])
    scores = jnp.asarray([[0.4, 0.2, 0.3, 0.1]])
    new = Fuse().reduce(state([10, 20, 30, 40]), keep, scores, 1)
    new = new if how == "in_place" else compacted(new, scores, 3, 1)
    alive = new.x[0, 1:, 0][new.alive[0]]
    np.testing.assert_allclose(alive, [10, 8, 30])
    assert new.origin[0][new.alive[0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize("how", ["in_place", "compacted"])
def test_merge_by_hand(how):
    """Targets are patches 0, 2, 4. Patch 1 is like 2, patch 3 like 0: one of them is merged."""
    keys = [[1, 0], [0.1, 1], [0, 1], [1, 0.01], [-1, -1]]
    before = state([10, 20, 30, 40, 50], keys)
    match = bipartite_match(before, 1)
    assert match.is_target[0].tolist() == [True, False, True, False, True]
    assert match.partner[0, jnp.asarray([1, 3])].tolist() == [2, 0]
    keep = jnp.asarray([[True, True, True, False, True]])
    scores, sizes = jnp.asarray([[2, 0.9, 2, 0.1, 2]]), jnp.asarray([[1.0, 1, 1, 3, 1]])
    new = Merge().reduce(before._replace(sizes=sizes), keep, scores, 1)
    new = new if how == "in_place" else compacted(new, scores, 4, 1)
    # Patch 0 is now (10 + 3 * 40) / 4; the list is patch 1, then the targets.
    by_order = sorted(np.flatnonzero(new.alive[0]).tolist(), key=list_order(new)[0].__getitem__)
    assert [int(new.origin[0, i]) for i in by_order] == [1, 0, 2, 4]
    np.testing.assert_allclose([new.x[0, 1 + i, 0] for i in by_order], [20, 32.5, 30, 50])
    np.testing.assert_allclose([new.sizes[0, i] for i in by_order], [1, 4, 1, 1])


# -- Budgets, cost, refusals.


def test_budgets_with_a_fused_token():
    """EViT's own for DeiT-S: three times 70% of what is there, and the fused token with it."""
    ratios = schedules.constant_rate(196, groups=4, rate=0.7)
    assert keep_counts(ratios, 196, extra_tokens=1) == (196, 138, 98, 70)
    assert alive_counts(ratios, 196, extra_tokens=1) == (196, 139, 99, 71)
    # A group that would drop one token for a fused one drops none.
    assert alive_counts((1, 0.5, 0.5), 8, extra_tokens=1) == (8, 5, 5)
    assert keep_counts((1, 0.5, 0.5), 8, extra_tokens=1) == (8, 4, 5)


def test_evit_on_deit_s_costs_what_its_paper_says():
    """At a rate of 0.7: 3.0 G multiply-accumulates (EViT, Table 1)."""
    module = create_module("deit_s", groups=4)
    ratios = schedules.constant_rate(196, groups=4, rate=0.7)
    assert round(schedules.flops_of(module, ratios, "evit").full / 1e9, 1) == 3.0


def test_tome_on_deit_s_costs_what_its_paper_says():
    """With r = 13: 2.7 G multiply-accumulates (ToMe, Table 4)."""
    module = create_module("deit_s", groups=12)
    ratios = schedules.constant_number(196, groups=12, number=13)
    assert round(schedules.flops_of(module, ratios, "tome").full / 1e9, 1) == 2.7


def test_flops_by_hand():
    """Of a group's first block, qkv, attention and proj see the tokens that enter it."""
    module, d = create_module("vit_micro", groups=6), 96
    kept = (60, 50, 50, 50, 50, 50)
    linear = 64 * 192 * d + d * 10
    full = linear
    for before, after in zip((64, *kept[:-1]), kept, strict=True):
        t, u = before + 1, after + 1
        linear += 4 * t * d**2 + 2 * 2 * u * d**2
        full += 4 * t * d**2 + 2 * 2 * u * d**2 + 2 * t**2 * d + (before / 2) ** 2 * 32
    found = count_flops(module, kept, selector="tome")
    np.testing.assert_allclose(found, (linear, full), rtol=1e-12)


def test_schedules_reach_a_cost():
    module = create_module("deit_s", groups=12)
    for selector, expected in (("evit", 4), ("tome", 12)):
        groups, ratios = schedules.published_budget(module, selector, 0.7)
        assert groups == expected
        own = create_module("deit_s", groups=groups)
        assert schedules.linear_share(own, ratios, selector) == pytest.approx(0.7, abs=0.005)
    # EViT's first group keeps all.
    groups, ratios = schedules.published_budget(module, "evit", 0.1)
    own = create_module("deit_s", groups=groups)
    assert own.slots(ratios, "evit") == (196, 2, 2, 2)
    assert schedules.constant_number(10, 4, 1.5) == (0.8, 0.7, 0.5, 0.4)
    for bad in (
        lambda: schedules.constant_number(196, 12, -1),
        lambda: schedules.constant_rate(196, 4, 0.0),
        lambda: schedules.cosine(3, 1.5),
        lambda: schedules.cosine(1, 0.5),
    ):
        with pytest.raises(UsageError):
            bad()


def test_what_makes_no_sense_is_refused():
    module, variables = model((1, 1, 1))

    def ask(**options):
        return module.apply(variables, images(), **options)

    with pytest.raises(ValueError, match=r"EViT needs keep_ratios"):
        ask(selector="evit")
    with pytest.raises(ValueError, match=r"at most every second token .* of 64 tokens 32 stay"):
        ask(selector="tome", keep_ratios=(0.4, 0.4, 0.4))
    with pytest.raises(ValueError, match="the reducer Merge compares the keys"):
        ask(selector="magnitude", reducer="merge", keep_ratios=TOME)
    cait = create_module("cait_xxs24")
    for selector in ("evit", "tome"):
        with pytest.raises(ValueError, match=r"CLS token|cannot be stopped"):
            cait.check_budget((1.0, 1.0, 1.0), get_selector(selector))
