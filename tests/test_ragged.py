"""Ragged execution gives masked execution's numbers, whatever the counts, shapes and plans."""

import dataclasses
import functools
import importlib.metadata
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iared2_jax
from iared2_jax.errors import UsageError
from iared2_jax.fast_inference import GroupPlan, Plan, planner
from iared2_jax.fast_inference.accelerated import Accelerated, per_group
from iared2_jax.fast_inference.engine import run_ragged
from iared2_jax.fast_inference.forward import ForwardSpec
from iared2_jax.fast_inference.group import all_blocks, first_block_repeated, run_group
from iared2_jax.fast_inference.plan import _cuts, choose_shapes, needs
from iared2_jax.fast_inference.plan_request import PlanRequest, cached_plan, keep_plan
from iared2_jax.fast_inference.planner import MAX_SHAPES
from iared2_jax.models import input_spec
from iared2_jax.models.backbones.cait import CaiT
from iared2_jax.models.backbones.vit import ViT
from iared2_jax.models.token_layouts import packed
from iared2_jax.report import results
from iared2_jax.token_reduction.compaction import kept_first, take_tokens
from iared2_jax.token_reduction.model import KEEP_ALL, IARed2
from iared2_jax.token_reduction.selectors import get_selector

N = 16  # patches of the test model
T = N + 1


def full(rows: int) -> tuple[int, int]:
    return rows * T, T


@functools.cache
def model(groups: int = 2, kind: str = "vit", policy_token: str = "cls"):
    sizes = dict(input_spec=input_spec.images(32, 8), embed_dim=24, depth=2 * groups, num_heads=3)
    sizes |= dict(mlp_ratio=2, num_classes=5)
    backbone = {
        "vit": ViT(**sizes),
        "distilled": ViT(**sizes, distilled=True),
        "cait": CaiT(**sizes),
        "dinov2": ViT(**sizes, registers=2, layer_scale=1e-5, pool="cls_mean"),
    }[kind]
    module = IARed2(backbone, (2,) * groups, policy_token, interpreter_heads=3)
    images = jnp.zeros([1, 32, 32, 3])
    variables = module.init(jax.random.key(3), images)

    def larger(path, x):
        """Than the initial ones: scores that differ, attention that attends."""
        return jnp.full_like(x, 0.5) if "gamma" in str(path[-1]) else 4 * x

    return module, jax.tree_util.tree_map_with_path(larger, variables)


def some_images(count: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, 32, 32, 3))


def request(
    module, variables, batch_size, thresholds=0.5, devices=1, **forward: object
) -> PlanRequest:
    return PlanRequest(
        forward=ForwardSpec(module, **forward),
        variables=variables,
        batch_size=batch_size,
        thresholds=per_group(thresholds, module.num_groups),
        devices=tuple(jax.devices()[:devices]),
    )


def assert_close(actual, expected) -> None:
    """Within 1e-4 of the largest number there is."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def assert_same(ragged, masked, attention: bool = False) -> None:
    (logits, out), (expected, reference) = ragged, masked
    assert_close(logits, expected)
    np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(expected, -1))
    assert_close(out.features, reference.features)
    for group, keep in enumerate(reference.keep):
        np.testing.assert_array_equal(out.keep[group], keep)
        assert_close(out.scores[group], reference.scores[group])
        entering = np.asarray(reference.keep[group - 1] if group else np.ones_like(keep))
        alive = np.where(entering[..., None], reference.interpreter_logits[group], 0)
        assert_close(out.interpreter_logits[group], alive)
    if attention:
        for row, expected_row in zip(out.attention, reference.attention, strict=True):
            assert_close(row, expected_row)


@st.composite
def group_plans(draw, batch: int, num_tokens: int):
    """Fields of a GroupPlan (built in the test: the type checker draws from `random`)."""
    kind = draw(st.sampled_from(["padded", "packed"]))
    rows = draw(st.integers(1, batch))
    lengths = sorted(draw(st.sets(st.integers(1, num_tokens - 1), max_size=2)))
    if kind == "padded":
        shapes = [(rows * length, length) for length in lengths]
    else:
        most = rows * num_tokens - 1
        places = sorted(draw(st.sets(st.integers(1, most), max_size=len(lengths))))
        blocks = draw(st.sampled_from([k for k in (1, 2, 3) if rows % k == 0]))
        shapes = [
            (place, *(max(1, length - 2 * (blocks - 1 - k)) for k in range(blocks)))
            for place, length in zip(places, lengths, strict=False)
        ]
        return kind, rows, (*shapes, (rows * num_tokens, *(num_tokens,) * blocks))
    return kind, rows, (*shapes, (rows * num_tokens, num_tokens))


@st.composite
def scenarios(draw):
    groups = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["vit", "distilled", "cait", "dinov2"]))
    batch = draw(st.integers(1, 6))
    num_tokens = N + {"vit": 1, "distilled": 2, "cait": 0, "dinov2": 3}[kind]
    plans = [draw(group_plans(batch, num_tokens)) for _ in range(groups)]
    # From "keep all" to "keep none"; a score that equals its threshold is dropped in both.
    thresholds = draw(
        st.lists(st.sampled_from([KEEP_ALL, 0.2, 0.4, 0.5, 0.6, 1.0]), min_size=groups,
                 max_size=groups)
    )  # fmt: skip
    policy_token = "learned" if kind == "cait" else draw(st.sampled_from(["cls", "learned"]))
    which = groups, kind, policy_token
    return which, batch, plans, draw(st.booleans()), thresholds, draw(st.integers(0, 99))


@hypothesis.given(scenarios())
@hypothesis.settings(max_examples=3)
def test_ragged_equals_masked(scenario):
    check_scenario(scenario)


@pytest.mark.slow
@pytest.mark.timeout(900)
@hypothesis.given(scenarios())
@hypothesis.settings(max_examples=12)
def test_ragged_equals_masked_in_many_scenarios(scenario):
    check_scenario(scenario)


def check_scenario(scenario):
    which, batch, plans, switch, thresholds, seed = scenario
    plan = Plan(batch, tuple(GroupPlan(*fields) for fields in plans), switch=switch)
    module, variables = model(*which)
    plan.check(batch, [module.backbone.num_prefix + N] * module.num_groups)
    images = some_images(batch, seed)
    ragged = jax.jit(functools.partial(run_ragged, ForwardSpec(module, attention=True), plan))(
        variables,
        images,
        jnp.broadcast_to(np.float32(thresholds), (batch, len(thresholds))),
        jnp.int32(batch),
    )
    masked = jax.jit(module.apply)(variables, images, np.float32(thresholds))
    assert_same(ragged[:2], masked, attention=True)


PLANS = {
    "one capacity": GroupPlan("padded", 6, ((6 * 10, 10), full(6))),
    "buckets": GroupPlan("padded", 2, ((2 * 6, 6), (2 * 10, 10), full(2))),
    "packed": GroupPlan("packed", 6, ((50, 12), full(6))),
    "packed sub-batches": GroupPlan("packed", 4, ((20, 8), (40, 14), full(4))),
    "uneven sub-batches": GroupPlan("packed", 5, ((30, 10), full(5))),
    "packed, in blocks": GroupPlan("packed", 6, ((50, 2, 9, 13), (102, T, T, T))),
    "sub-batches in blocks": GroupPlan("packed", 4, ((30, 4, 12), (40, 6, 14), (68, T, T))),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_count_from_none_to_all(name):
    module, variables = model(2)
    images = some_images(6)
    scores = -np.sort(-np.asarray(module.apply(variables, images)[1].scores[0]))
    counts = [0, 1, 5, 9, 15, 16]  # of the six images
    thresholds = np.full((6, 2), 0.0, np.float32)
    for image, count in enumerate(counts):
        edges = np.concatenate([[1.0], scores[image], [0.0]])
        thresholds[image, 0] = (edges[count] + edges[count + 1]) / 2
    thresholds[:, 1] = [0.4, KEEP_ALL, 0.5, 0.6, KEEP_ALL, 0.5]
    run = Accelerated(request(module, variables, 6), Plan(6, (PLANS[name],) * 2))
    logits, out = run(images, thresholds)
    masked = module.apply(variables, images, thresholds)
    assert np.asarray(out.keep[0]).sum(-1).tolist() == counts
    assert_same((logits, out), masked)


@pytest.mark.parametrize("name", ["buckets", "packed, in blocks"])
def test_ties_are_dropped_alike(name):
    """All scores equal the threshold, or exceed it, exactly."""
    module, variables = model(2)
    zeros = jax.tree.map(jnp.zeros_like, variables)  # every score is 0.5
    plan = Plan(6, (PLANS[name],) * 2)
    for threshold, kept in ((0.5, 0), (float(np.nextafter(np.float32(0.5), np.float32(0))), N)):
        run = Accelerated(request(module, zeros, 6, threshold), plan)
        _, out = run(some_images(6))
        assert np.asarray(out.keep[1]).sum(-1).tolist() == [kept] * 6


@pytest.mark.parametrize("name", PLANS)
def test_nan_in_one_image_reaches_no_other(name):
    """Padding is 0, whatever lies beside it or lay there before."""
    module, variables = model(2)
    images = some_images(6).at[2].set(jnp.nan)
    run = Accelerated(request(module, variables, 6, 0.5), Plan(6, (PLANS[name],) * 2))
    logits, _ = run(images)
    assert np.isnan(logits[2]).all()  # as of masked execution
    clean, _ = module.apply(variables, images[np.array([0, 1, 3, 4, 5])], 0.5)
    assert_close(np.delete(np.asarray(logits), 2, 0), clean)


@pytest.mark.parametrize("name", PLANS)
def test_poisoned_slots_leak_nowhere(name):
    """NaN in every slot of the buffer that no survivor owns changes nothing."""
    module, variables = model(2)
    images = some_images(6)
    keep = jnp.asarray(np.random.default_rng(0).random((6, N)) < 0.5)
    x = module.apply(variables, images, method=lambda m, x: m.backbone.embed(x))
    poisoned = jnp.where(
        jnp.pad(keep, ((0, 0), (1, 0)), constant_values=True)[..., None], x, jnp.nan
    )
    places = jnp.broadcast_to(jnp.arange(N), keep.shape)

    def cls(tokens):
        state = {"tokens": tokens}
        return run_group(ForwardSpec(module), PLANS[name], variables, 1, state, keep, places)[0][
            "tokens"
        ]

    expected, _ = module.apply(variables, 1, x, keep, method="run_blocks")
    result = cls(poisoned)
    assert_close(result[:, 0], expected[:, 0])
    for image in range(6):
        survivors = np.flatnonzero(keep[image])
        assert_close(result[image, 1 : 1 + len(survivors)], expected[image, 1 + survivors])


def test_tail_batches_and_other_thresholds():
    module, variables = model(2)
    images = some_images(5)
    run = Accelerated(request(module, variables, 6, 0.5), Plan(6, (PLANS["buckets"],) * 2))
    for count in (1, 4, 5):
        assert_same(run(images[:count]), module.apply(variables, images[:count], 0.5))
    assert_same(run(images, thresholds=0.3), module.apply(variables, images, 0.3))


@pytest.mark.parametrize("devices", [1, 8])
def test_sharded_over_devices(devices):
    module, variables = model(2)
    images = some_images(16)
    each = 16 // devices
    plans = (GroupPlan("packed", each, (full(each),)), GroupPlan("padded", 1, ((9, 9), full(1))))
    run = Accelerated(request(module, variables, each, 0.5, devices), Plan(each, plans))
    assert_same(run(images), module.apply(variables, images, 0.5))
    assert_same(run(images[:11]), module.apply(variables, images[:11], 0.5))
    assert sum(run.usage[1]["shapes"].values()) == 32  # two calls of 16 sub-batches of one image


def test_bfloat16_is_as_near_to_float32_as_masked():
    module, variables = model(2)
    variables = jax.tree.map(lambda x: x / 2, variables)
    half = module.clone(backbone=module.backbone.clone(dtype=jnp.bfloat16))
    images = some_images(6)
    plan = Plan(6, (PLANS["packed"],) * 2)
    exact, _ = module.apply(variables, images, KEEP_ALL)
    masked, _ = jax.jit(lambda v, x: half.apply(v, x, KEEP_ALL))(variables, images)
    ragged, _ = Accelerated(request(half, variables, 6, KEEP_ALL), plan)(images)
    error, theirs = (float(jnp.linalg.norm(x - exact)) for x in (ragged, masked))
    assert 0 < error < 2 * theirs < 0.2 * float(jnp.linalg.norm(exact))


# -- Fixed budgets.


@pytest.mark.parametrize("score", ["interpreter", "attention"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fixed_budget_equals_masked(score, rows):
    module, variables = model(3)
    ratios = (1.0, 0.6, 0.3)
    counts = [17, 11, 6]  # ceil(ratio * 16) + CLS
    plans = tuple(GroupPlan("padded", rows, ((rows * c, c),)) for c in counts)
    images = some_images(4)
    asked = request(module, variables, 4, 0.5, keep_ratios=ratios, selector=get_selector(score))
    run = Accelerated(asked, Plan(4, plans))
    logits, out = run(images)
    expected, reference = module.apply(variables, images, keep_ratios=ratios, selector=score)
    assert_close(logits, expected)
    for keep, expected_keep, count in zip(out.keep, reference.keep, counts, strict=True):
        np.testing.assert_array_equal(keep, expected_keep)
        assert np.asarray(keep).sum(-1).tolist() == [count - 1] * 4
    # Fewer images than the batch: the padding costs the same and changes nothing.
    assert_close(run(images[:3])[0], expected[:3])


def test_attention_scores_are_the_last_blocks_cls_attention():
    module, variables = model(2)
    images = some_images(3)
    _, out = module.apply(variables, images, keep_ratios=(1.0, 0.5), selector="attention")
    np.testing.assert_allclose(out.scores[1], np.asarray(out.attention[1]).mean(1), rtol=1e-5)
    assert out.interpreter_logits == ()


@pytest.mark.parametrize(
    ("ratios", "score", "words"),
    [
        ((1.0,), "interpreter", "2 shares"),
        ((1.0, 0.0), "interpreter", "shares in"),
        ((0.5, 0.5), "attention", "start with 1"),
        (None, "attention", "start with 1"),
        ((1.0, 0.5), "magic", "no selector 'magic'"),
    ],
)
def test_budgets_that_make_no_sense(ratios, score, words):
    module, variables = model(2)
    with pytest.raises(ValueError, match=words):
        module.apply(variables, some_images(1), keep_ratios=ratios, selector=score)
    with pytest.raises(UsageError, match=words):
        iared2_jax.accelerate(module, variables, 2, keep_ratios=ratios, selector=score)


# -- Plans.


def test_accelerate_plans_compiles_once_and_keeps_the_plan(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    module, variables = model(2)
    images = some_images(12)
    run = iared2_jax.accelerate(
        module, variables, 4, images=images, cache_dir=str(tmp_path), attention=True
    )
    assert {"ragged", "masked"} <= run.plan.measured.keys()
    assert sum(len(group.shapes) for group in run.plan.groups) <= MAX_SHAPES["cpu"]
    run(images[:4])

    compiled = []
    listen = functools.partial(lambda event, *_, **__: compiled.append(event))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for first, count in ((0, 4), (4, 4), (8, 3), (0, 1)):
            batch = images[first : first + count]
            compiled.clear()
            ragged = run(np.asarray(batch))
            assert not [event for event in compiled if "compile" in event]
            assert_same(ragged, module.apply(variables, batch, 0.5), attention=True)
    finally:
        jax.monitoring.clear_event_listeners()

    (path,) = (tmp_path / "plans").iterdir()
    assert Plan.load(path) == run.plan
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    jax.clear_caches()
    try:
        again = iared2_jax.accelerate(
            module, variables, 4, images=images, cache_dir=str(tmp_path), attention=True
        )
    finally:
        jax.monitoring.clear_event_listeners()
    assert again.plan == run.plan
    assert "/jax/compilation_cache/cache_hits" in hits
    assert jax.config.jax_compilation_cache_dir == before
    assert "ragged" in str(run.plan)


def test_a_plan_is_pinned_and_saved(tmp_path):
    module, variables = model(2)
    plan = Plan(
        3, (PLANS["buckets"],) * 2, switch=True, key={"made": "by hand"}, measured={"x": 0.5}
    )
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    plan = Plan(3, (GroupPlan("padded", 3, (full(3),)),) * 2)
    run = iared2_jax.accelerate(module, variables, 3, plan=plan)
    assert run.plan is plan
    assert_same(run(some_images(3)), module.apply(variables, some_images(3), 0.5))


def test_a_cache_that_cannot_be_written_is_only_told(tmp_path, caplog):
    module, variables = model(2)
    (tmp_path / "plans").write_text("a file, where there should be a folder")
    keep_plan(request(module, variables, 2), Plan(2, masked_rows=2), tmp_path)
    assert "the plan cannot be kept" in caplog.text
    other = tmp_path / "other"
    (other / "plans").mkdir(parents=True)
    asked = request(module, variables, 2)
    keep_plan(asked, Plan(2, masked_rows=2), other)
    (file,) = (other / "plans").iterdir()
    file.unlink()
    file.mkdir()  # nor the file itself
    (file / "x").touch()
    caplog.clear()
    keep_plan(asked, Plan(2, masked_rows=2), other)
    assert "the plan cannot be kept" in caplog.text


@pytest.mark.parametrize(
    "content", ["not JSON", '{"batch_size": 2, "groups": [], "of": "tomorrow"}']
)
def test_a_cached_plan_that_cannot_be_read_is_made_anew(content, tmp_path, caplog):
    module, variables = model(2)
    asked = request(module, variables, 2)
    plan = Plan(2, masked_rows=2, key=asked.key())
    keep_plan(asked, plan, tmp_path)
    assert cached_plan(asked, tmp_path).masked_rows == 2
    (file,) = (tmp_path / "plans").glob("*.json")
    file.write_text(content)
    assert cached_plan(asked, tmp_path) is None
    assert "a new one replaces it" in caplog.text
    keep_plan(asked, plan, tmp_path)
    assert cached_plan(asked, tmp_path).masked_rows == 2


def test_a_masked_plan_says_so():
    module, variables = model(2)
    plan = Plan(5, (), masked_rows=2)
    assert "dropping does not pay" in str(plan)
    run = iared2_jax.accelerate(module, variables, 5, plan=plan)
    images = some_images(5)
    logits, out = run(images)
    expected, reference = module.apply(variables, images, 0.5)
    assert_close(logits, expected)
    np.testing.assert_array_equal(out.keep[1], reference.keep[1])
    assert run.usage == []


def test_usage_counts_what_only_the_largest_shape_held():
    module, variables = model(2)
    tight = GroupPlan("padded", 2, ((2 * 2, 2), full(2)))
    run = Accelerated(request(module, variables, 4, KEEP_ALL), Plan(4, (tight,) * 2))
    for _ in range(40):  # more than stay on the device
        run(some_images(4))
    assert [group["larger"] for group in run.usage] == [80, 80]
    assert_same(run(some_images(4)), module.apply(variables, some_images(4), KEEP_ALL))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(4, (GroupPlan("padded", 3, (full(3),)),) * 2), "batches of 4 images"),
        (Plan(3, (GroupPlan("padded", 3, (full(3),)),)), "1 groups, the model has 2"),
        (Plan(3, (GroupPlan("padded", 3, ((30, 10),)),) * 2), "does not hold 3 images of 17"),
        (Plan(3, (GroupPlan("heap", 3, (full(3),)),) * 2), "malformed"),
        (Plan(3, (GroupPlan("padded", 3, (full(3), full(3))),) * 2), "out of order"),
        # The second holds more places than the first, but not its rows.
        (Plan(3, (GroupPlan("packed", 3, ((10, 9), (12, 5), full(3))),) * 2), "out of order"),
        (Plan(3, (GroupPlan("padded", 3, ()),) * 2), "malformed"),
        (Plan(3, (GroupPlan("padded", 3, ((51,),)),) * 2), "malformed"),
    ],
)
def test_plans_for_something_else_are_refused(plan, words):
    module, variables = model(2)
    with pytest.raises(UsageError, match=words):
        iared2_jax.accelerate(module, variables, 3, plan=plan)


def test_bad_input_is_one_sentence(tmp_path):
    module, variables = model(2)
    with pytest.raises(UsageError, match="multiple of the 2 devices"):
        iared2_jax.accelerate(module, variables, 3, devices=jax.devices()[:2])
    with pytest.raises(UsageError, match="thresholds must be"):
        iared2_jax.accelerate(module, variables, 3, thresholds=(0.5, 0.5, 0.5))
    with pytest.raises(UsageError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps({"groups": 3}))
    with pytest.raises(UsageError, match="is not a plan"):
        Plan.load(tmp_path / "bad.json")
    run = iared2_jax.accelerate(
        module, variables, 3, plan=Plan(3, (GroupPlan("padded", 3, (full(3),)),) * 2)
    )
    for images in (jnp.zeros([0, 32, 32, 3]), jnp.zeros([2, 16, 16, 3])):
        with pytest.raises(UsageError, match=r"the model takes \[B, 32, 32, 3\], at least one"):
            run(images)


@hypothesis.given(st.data())
def test_chosen_shapes_hold_what_was_seen(data):
    lengths = np.array(
        data.draw(st.lists(st.lists(st.integers(1, T), min_size=6, max_size=6), min_size=1,
                           max_size=5))
    )  # fmt: skip
    kind = data.draw(st.sampled_from(["padded", "packed"]))
    rows = data.draw(st.integers(1, 6))
    blocks = data.draw(
        st.sampled_from([k for k in (1, 2) if rows % k == 0 and kind == "packed"] or [1])
    )
    needed = needs(lengths, rows, blocks).reshape(-1, 1 + blocks)
    limit = data.draw(st.integers(1, 4))
    shapes = choose_shapes(kind, needed, rows, T, limit, step=4)
    assert len(shapes) <= limit + 1
    Plan(6, (GroupPlan(kind, rows, shapes),)).check(6, [T])
    places = np.array([shape[0] for shape in shapes])
    largest = shapes[-2] if len(shapes) > 1 else shapes[-1]
    if kind == "packed" and places[-1] > needed[:, 0].max() + max(4, rows):
        assert (needed <= np.array(largest)).all()
    assert (needed <= np.array(shapes[-1])).all()


@pytest.mark.parametrize("step", [2, 4])
def test_one_image_that_keeps_all_needs_no_whole_sub_batch(step):
    """Nor a few tokens more in all than were seen: a packed plan has them to spare."""
    rows, most = 16, 65
    needed = needs(np.full((3, rows), 30), rows, blocks=2).reshape(-1, 3)
    *_, spare, whole = choose_shapes("packed", needed, rows, most, 3, step)
    later = needs(np.array([[29] * 15 + [most]]), rows, blocks=2).reshape(3)
    assert (later <= spare).all()
    assert spare[0] < 0.6 * whole[0]


@hypothesis.given(st.lists(st.integers(1, 12), min_size=1, max_size=10), st.integers(1, 4))
def test_cuts_waste_least(values, limit):
    distinct = sorted(set(values))
    ways = itertools.chain.from_iterable(
        itertools.combinations(distinct[:-1], count) for count in range(min(limit, len(distinct)))
    )

    def waste(cuts):
        return sum(min(cut for cut in cuts if cut >= value) for value in values)

    cuts = _cuts(np.array(values), limit)
    assert len(cuts) <= limit
    assert waste(cuts) == min(waste([*way, distinct[-1]]) for way in ways)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("cait", [False, True])
def test_the_planners_stand_in_is_the_group_with_equal_blocks(kind, cait):
    module, variables = model(1, "cait", "learned") if cait else model(1)
    backbone = dict(variables["params"]["backbone"])
    backbone["block_1"] = backbone["block_0"]
    variables = {"params": {**variables["params"], "backbone": backbone}}
    b, prefix = 4, module.backbone.num_prefix
    most = prefix + N
    tokens = jax.random.normal(jax.random.key(0), (b, most, module.backbone.embed_dim))
    keep = jax.random.bernoulli(jax.random.key(1), 0.6, (b, N))
    places = jnp.broadcast_to(jnp.arange(N), (b, N))
    plan = GroupPlan(kind, b, ((b * most, most),))

    @functools.partial(jax.jit, static_argnums=0)
    def run(blocks, variables):
        state, spec = {"tokens": tokens}, ForwardSpec(module)
        state, *_ = run_group(spec, plan, variables, 1, state, keep, places, run_blocks=blocks)
        return state["tokens"]

    expected, actual = (
        np.asarray(run(blocks, variables)) for blocks in (all_blocks, first_block_repeated)
    )
    survivors = np.arange(most) < prefix + np.asarray(keep).sum(1, keepdims=True)
    assert_close(actual[survivors], expected[survivors])
    assert not np.allclose(expected, tokens)


def test_kernels_are_einsum_on_a_cpu():
    module, variables = model(2)
    assert planner.attention_kernels(module, variables, "cpu") == ["einsum"]


def test_a_plan_that_packs_is_refused_where_all_images_are_as_long():
    module, variables = model(2)
    plan = Plan(2, (GroupPlan("packed", 2, ((2 * (N // 2 + 1), N // 2 + 1),)),) * 2)
    with pytest.raises(UsageError, match="with keep_ratios all are as long"):
        iared2_jax.accelerate(
            module, variables, 2, keep_ratios=(0.5, 0.5), plan=plan, cache_dir=None
        )


def test_kernels_are_tried_without_interpreters(caplog):
    """EViT's and ToMe's models have groups for which the weights need have no interpreter."""
    module, variables = model(2)
    bare = {"params": {"backbone": variables["params"]["backbone"]}}
    half = module.clone(backbone=module.backbone.clone(dtype=jnp.bfloat16))
    # There is no cuDNN here: that it is tried, and said not to run, shows that the einsum has run.
    assert planner.attention_kernels(half, bare, "gpu") == ["einsum"]
    assert "cuDNN attention does not run here" in caplog.text


def test_the_faster_attention_kernel_is_planned_with(monkeypatch):
    module, variables = model(2)
    ask = request(module, variables, 2)
    keep = np.ones((4, 2, N), bool)
    seconds = {"einsum": 2.0, "cudnn": 1.0}
    timed = []

    def time(request, keep, kernel, group, plans):
        timed.append((kernel, group, plans))
        return dict.fromkeys(plans, seconds[kernel])

    monkeypatch.setattr(planner, "attention_kernels", lambda *asked: list(seconds))
    monkeypatch.setattr(planner, "_time_group", time)
    assert planner._fastest_kernel(ask, keep) == "cudnn"
    assert {kernel for kernel, *_ in timed} == set(seconds)
    whole = GroupPlan("padded", 2, ((2 * T, T),))
    assert all(plans == [whole] for *_, plans in timed)


def test_a_checkout_that_is_not_installed_is_accelerated(monkeypatch):
    """Imported from a folder, as in a notebook, the package has no version."""
    known = importlib.metadata.version

    def version(name):
        if name == "iared2_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    module, variables = model(2)
    key = request(module, variables, 2).key()
    assert key["versions"]["iared2_jax"] == "not installed"
    assert key["versions"]["jax"] == results.versions()["jax"] == jax.__version__
    assert results.versions()["iared2_jax"] == "not installed"


# -- The layouts themselves.


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_partition_puts_the_kept_first_in_order(row):
    slots, places = (np.asarray(x)[0] for x in kept_first(np.array([row])))
    assert slots.tolist() == [*np.flatnonzero(row), *np.flatnonzero(~np.array(row))]
    assert slots[places].tolist() == list(range(len(row)))


def test_take_tokens_has_the_gradient_of_indexing():
    tokens = jax.random.normal(jax.random.key(0), (2, 7, 3))
    slots = jnp.array([[6, 0, 3], [2, 1, 5]])
    weights = jax.random.normal(jax.random.key(1), (2, 3, 3))
    ours = jax.grad(lambda x: (weights * take_tokens(x, slots)).sum())(tokens)
    plain = jax.grad(lambda x: (weights * jnp.take_along_axis(x, slots[..., None], 1)).sum())
    np.testing.assert_allclose(ours, plain(tokens))


@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 7))
def test_packed_spreads_and_collects(lengths, spare):
    total = sum(lengths) + spare
    hypothesis.assume(total)
    blocks = 2 if len(lengths) % 2 == 0 else 1
    half = len(lengths) // 2
    needed = [max(lengths[:half]), max(lengths[half:])] if blocks == 2 else [max(lengths)]
    x = np.random.default_rng(0).normal(size=(1, total, 2)).astype(np.float32)

    def core(qkv, valid, lengths):  # what attention hands back, with rows that can be told apart
        return 2 * qkv, jnp.moveaxis(qkv[:, :, :1], 1, 2) * valid[:, None]

    @jax.jit
    def there_and_back(lengths, x):
        layout = packed(lengths, total, [max(1, length) for length in needed])
        return layout.spread(x), *layout.attend(x, core)

    rows, y, weights = map(np.asarray, there_and_back(np.asarray(lengths), x))
    start = 0
    for image, length in enumerate(lengths):
        np.testing.assert_array_equal(rows[image, :length], x[0, start : start + length])
        assert (rows[image, length:] == 0).all()
        start += length

    np.testing.assert_array_equal(y[0, :start], 2 * x[0, :start])
    np.testing.assert_array_equal(weights[:, 0], rows[:, :, 0])


def test_cait_is_accelerated_with_its_class_attention():
    module, variables = model(2, "cait", "learned")
    images = some_images(6)
    thresholds = float(np.median(module.apply(variables, images)[1].scores[0]))
    plans = (
        GroupPlan("packed", 6, ((60, 9, 12), (96, N, N))),
        GroupPlan("padded", 2, ((2 * 6, 6), (2 * N, N))),
    )
    asked = request(module, variables, 6, thresholds, attention=True)
    ragged = Accelerated(asked, Plan(6, plans))(images)
    masked = module.apply(variables, images, thresholds)
    assert 0 < np.asarray(masked[1].keep[0]).mean() < 1
    assert_same(ragged, masked, attention=True)
    assert len(ragged[1].attention) == 2
    with pytest.raises(UsageError, match="needs a CLS token in the blocks"):
        iared2_jax.accelerate(module, variables, 2, keep_ratios=(1, 0.5), selector="attention")


def test_thresholds_per_image_need_their_images():
    module, variables = iared2_jax.create_model("vit_micro")
    with pytest.raises(UsageError, match="thresholds per image need the images"):
        iared2_jax.accelerate(module, variables, 2, np.full((2, 3), 0.5), cache_dir=None)


def test_thresholds_of_other_images_are_refused():
    """None is padded with 0, by which an image would keep nearly all, and nobody would know."""
    module, variables = model(2)
    plan = Plan(4, (GroupPlan("padded", 4, (full(4),)),) * 2)
    run = Accelerated(request(module, variables, 4), plan)
    for count, given in ((4, 3), (3, 4), (3, 2), (9, 8), (9, 4)):
        with pytest.raises(UsageError, match=f"for {given} images, the call has {count}"):
            run(some_images(count), np.full((given, 2), 0.5))
    images = some_images(9)
    mixed = np.linspace(0.3, 0.7, 18, dtype=np.float32).reshape(9, 2)
    for thresholds in (mixed, np.array([[0.4, 0.6]]), (0.4, 0.6), 0.5):
        assert_same(run(images, thresholds), module.apply(variables, images, thresholds))
    of_a_sample = Accelerated(request(module, variables, 4, mixed[:4]), plan)
    with pytest.raises(UsageError, match=r"give those of these images, run\(images, thresholds"):
        of_a_sample(images[:4])
    expected = module.apply(variables, images[:4], mixed[:4])
    assert_same(of_a_sample(images[:4], mixed[:4]), expected)
    on_device = jax.device_put(mixed[:4], of_a_sample.sharding)
    assert_same(of_a_sample(images[:4], on_device), expected)


def test_a_small_samples_thresholds_are_repeated_with_its_images():
    module, variables = model(2)
    sample = request(module, variables, 5, np.array([[0.2, 0.3], [0.6, 0.7]]))
    sample = dataclasses.replace(sample, images=some_images(2))
    images, thresholds = planner.example_batch(sample)
    for row in range(5):
        np.testing.assert_array_equal(images[row], sample.images[row % 2])
        np.testing.assert_array_equal(thresholds[row], sample.thresholds[row % 2])
