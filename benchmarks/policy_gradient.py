"""How noisy each estimator of the policy gradient is, per forward pass.

    python -m benchmarks.policy_gradient

At fixed parameters and images only the sampled masks are left to chance. With g the mean estimate
over many draws of masks, an estimator's noise is

    noise = passes * E|estimate - g|^2 / |g|^2,

the forward passes per image that a step would need until noise and signal are equal (an average of
n estimates has 1/n of the variance). Three places: a toy of eight tokens, where all masks are
enumerated, so that g is exact and the bias is seen; the first interpreter of the demo
(configs/cluttered_mnist.py) as it starts; and with a policy that has learned (--checkpoint,
a run's weights.safetensors).

    python -m benchmarks.policy_gradient --outcome --seeds 0 1 2

trains the demo's first interpreter by several recipes: what share of the tokens it keeps in the
end, and what that costs in accuracy, over seeds. On validation scenes, which no table uses.
"""

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from iared2_jax.config.loading import load
from iared2_jax.data.pipeline import train_batches
from iared2_jax.experiment.build import build_model, build_phases, dataset_of
from iared2_jax.report.tables import as_text
from iared2_jax.signals import Stop
from iared2_jax.token_reduction import estimators, policy
from iared2_jax.token_reduction.estimators import ESTIMATORS, ControlVariate
from iared2_jax.training.loop import train_phases
from iared2_jax.training.optimizers import merge, split_trainable
from iared2_jax.training.phases import PhaseContext
from iared2_jax.weights.load import load_weights

DEMO = "configs/cluttered_mnist.py"
ROLLOUTS = 4
TOKENS = 8  # of the toy
# Estimator and whether the saving is exact.
VARIANTS = tuple(itertools.product(ESTIMATORS, (False, True)))


def passes(name: str) -> int:
    """Forward passes per image of one estimate."""
    return ROLLOUTS + ESTIMATORS[name].greedy


def variant_name(estimator: str, exact_saving: bool) -> str:
    """What the table calls it."""
    return f"{estimator}, exact saving" if exact_saving else estimator


def noise_of(name: str, estimates: np.ndarray, square: float) -> float:
    """passes * E|estimate - g|^2 / |g|^2 of an unbiased estimator's estimates [m, p]; |g|^2."""
    return float(passes(name) * estimates.var(0, ddof=1).sum() / square)


# -- The toy ---------------------------------------------------------------------------------------


def toy_reward(masks: jax.Array, tau: float) -> tuple[jax.Array, jax.Array]:
    """Rewards and savings of masks [.., n]: right iff one of the first two tokens survives."""
    flat = masks.reshape(-1, TOKENS)
    saved = policy.saving(flat)
    rewards = policy.reward(flat, flat[:, 0] | flat[:, 1], tau)
    return rewards.reshape(masks.shape[:-1]), saved.reshape(masks.shape[:-1])


def toy(draws: int, tau: float = 4.0) -> dict[str, dict[str, float]]:
    """Noise and bias of every variant, by name, against the enumerated gradient."""
    head_logits = 1 + 0.5 * jax.random.normal(jax.random.key(0), (1, TOKENS, 1))
    alive = jnp.ones((1, TOKENS), bool)
    every = jnp.asarray(list(itertools.product([False, True], repeat=TOKENS)))

    def expected(z: jax.Array) -> jax.Array:
        scores = policy.informative_scores(z)
        chance = jnp.where(every, scores, 1 - scores).prod(axis=-1)
        return (chance * toy_reward(every, tau)[0]).sum()

    exact = np.asarray(jax.grad(expected)(head_logits)).ravel()
    rows = {}
    for name, exact_saving in VARIANTS:
        estimator = ESTIMATORS[name]

        def one(key, estimator=estimator, exact_saving=exact_saving):
            masks = estimator.sample(key, head_logits, alive, ROLLOUTS)
            greedy = policy.greedy(head_logits, alive)[:, None]
            run = jnp.concatenate([masks, greedy], axis=1) if estimator.greedy else masks
            rewards, savings = toy_reward(run, tau)

            def objective(z):
                control = None
                if exact_saving:
                    control = ControlVariate(savings, estimators.expected_saving(z, alive))
                return estimator.objective(z, masks, alive, rewards, control).sum()

            return jax.grad(objective)(head_logits)

        found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), draws))
        found = np.asarray(found, np.float64).reshape(draws, -1)
        error = found.mean(0) - exact
        rows[variant_name(name, exact_saving)] = {
            "noise": noise_of(name, found, (exact**2).sum()),
            # Of an unbiased estimator about 1: its squared error over what chance alone gives.
            "bias": float((error**2).sum() / (found.var(0).sum() / draws)),
        }
    return rows


# -- The demo's first interpreter ------------------------------------------------------------------


def estimates_of(
    context: PhaseContext, params: Any, batch: Any, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients [draws, p] of the phase's parameters over random masks, in two halves."""
    trainable, frozen = split_trainable(params, context.phase.trains, context.module)

    @jax.jit
    def one(key: jax.Array) -> jax.Array:
        def loss(trainable):
            return context.phase.kind.loss(context, merge(trainable, frozen), batch, key)[0]

        grads = jax.tree.leaves(jax.grad(loss)(trainable))
        return jnp.concatenate([g.ravel() for g in grads])

    found = np.stack([np.asarray(one(k)) for k in jax.random.split(jax.random.key(1), draws)])
    return found[::2], found[1::2]


def demo(context: PhaseContext, params: Any, batch: Any, draws: int) -> dict[str, dict[str, float]]:
    """Noise of every variant and answer. All estimate one g per answer, so they share its mean."""
    rows = {}
    for answer in policy.ANSWERS:
        halves, options = {}, context.phase.options
        for name, exact_saving in VARIANTS:
            own = options.copy_and_resolve_references().unlock()
            own.update(estimator=name, exact_saving=exact_saving, rollouts=ROLLOUTS, answer=answer)
            phase = dataclasses.replace(context.phase, options=own)
            here = dataclasses.replace(context, phase=phase)
            halves[name, exact_saving] = estimates_of(here, params, batch, draws)
        # The product of two independent means has no noise of its own on average: |g|^2 unbiased.
        weights = {key: 1 / np.concatenate(h).var(0).sum() for key, h in halves.items()}
        total = sum(weights.values())
        first, second = (
            sum(w * halves[key][i].mean(0) for key, w in weights.items()) / total for i in (0, 1)
        )
        square = float((first * second).sum())
        for (name, exact_saving), both in halves.items():
            row = f"{answer}: {variant_name(name, exact_saving)}"
            rows[row] = {"noise": noise_of(name, np.concatenate(both), square)}
    return rows


# -- What comes of it ------------------------------------------------------------------------------

# The demo's recipe and what it differs from; names of config.interpreter's options.
RECIPES: dict[str, dict[str, Any]] = {
    "the demo's": {},
    "right or wrong": {"answer": "right"},
    "sampled saving": {"exact_saving": False},
    "log-probability": {"answer": "log_probability"},
    "self-critical, 2 + greedy": {"estimator": "self_critical", "rollouts": 2},
    "antithetic, 2 pairs": {"estimator": "antithetic", "rollouts": 4},
    "a third of the learning rate": {"learning_rate": 1.5e-3},
    "all of Eq. 2 and 3": {
        "estimator": "self_critical",
        "rollouts": 2,
        "answer": "right",
        "exact_saving": False,
        "learning_rate": 1.5e-3,
    },
}


def first_interpreter(
    options: dict[str, Any], seed: int, images: int, split: str = "validation"
) -> dict[str, float]:
    """Trains the demo's first interpreter alone; what it keeps, and loses, of `images` scenes."""
    config = load(DEMO)
    config.seed = seed
    config.interpreter.update(options)
    module, variables = build_model(config)
    phase, dataset = build_phases(config, module)[0], dataset_of(config)
    with tempfile.TemporaryDirectory() as workdir:
        state = train_phases(config, Path(workdir), module, variables, [phase], dataset, Stop())

    @jax.jit
    def answers(params: Any, pixels: jax.Array) -> tuple[jax.Array, ...]:
        inputs, variables = module.input_spec.normalize(pixels), {"params": params}
        logits, out = module.apply(variables, inputs, phase.thresholds)
        dense, _ = module.apply(variables, inputs, execution="dense")
        undecided = (out.scores[0] > 0.3) & (out.scores[0] < 0.7)
        return logits.argmax(-1), dense.argmax(-1), out.keep[0].mean(), undecided.mean()

    pixels, labels, _ = dataset.load(split, images, 0)
    found = [
        answers(state.params, jnp.asarray(pixels[first : first + 100]))
        for first in range(0, images, 100)
    ]
    ours, dense = (np.concatenate([np.asarray(part[i]) for part in found]) for i in (0, 1))
    return {
        "kept": float(np.mean([part[2] for part in found])),
        "undecided": float(np.mean([part[3] for part in found])),
        "lost": float(100 * ((dense == labels).mean() - (ours == labels).mean())),
    }


def outcome(names: Sequence[str], seeds: Sequence[int], images: int) -> dict[str, Any]:
    """`first_interpreter` of every recipe and seed."""
    rows: dict[str, Any] = {}
    for name in names:
        runs = [first_interpreter(RECIPES[name], seed, images) for seed in seeds]
        rows[name] = {key: [run[key] for run in runs] for key in runs[0]}
        print(name, json.dumps(rows[name]), flush=True)
    return rows


def outcome_table(rows: dict[str, Any], seeds: Sequence[int]) -> str:
    """All recipes as text."""
    cells = [["recipe", "kept", "most from mean", "points lost", "scores .3 to .7"]]
    for name, row in rows.items():
        kept = np.array(row["kept"])
        cells.append(
            [
                name,
                " / ".join(f"{share:.2f}" for share in kept),
                f"{np.abs(kept - kept.mean()).max():.2f}",
                " / ".join(f"{lost:.1f}" for lost in row["lost"]),
                " / ".join(f"{share:.2f}" for share in row["undecided"]),
            ]
        )
    return as_text((f"the demo's first interpreter, seeds {', '.join(map(str, seeds))}", cells))


def table(places: dict[str, dict[str, dict[str, float]]]) -> str:
    """All places as text."""
    parts = []
    for place, rows in places.items():
        keys = list(next(iter(rows.values())))
        cells = [["estimator", *keys]]
        cells += [[name, *(f"{row[key]:.3g}" for key in keys)] for name, row in rows.items()]
        parts.append(as_text((place, cells)))
    return "\n".join(parts)


def _places(flags: Any) -> Iterator[tuple[str, Callable[[], dict[str, dict[str, float]]]]]:
    yield f"toy, {TOKENS} tokens", lambda: toy(flags.toy_draws)
    config = load(DEMO)
    module, variables = build_model(config)
    context = PhaseContext(module, build_phases(config, module)[0])
    batch = next(iter(train_batches(dataset_of(config), flags.batch, 0, config.seed, 1)))
    batch = {**batch, "input": module.input_spec.normalize(jnp.asarray(batch["input"]))}

    def with_weights(variables):
        return lambda: demo(context, variables["params"], batch, flags.draws)

    yield "demo, as the first interpreter starts", with_weights(variables)
    if flags.checkpoint:
        yield "demo, trained", with_weights(load_weights(module, flags.checkpoint))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what it wrote."""
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--toy_draws", type=int, default=100_000)
    parser.add_argument("--checkpoint", type=Path, help="of a run of the demo")
    parser.add_argument("--outcome", action="store_true", help="train, and see what is kept")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1000, help="that are kept of")
    flags = parser.parse_args(argv)
    if flags.outcome:
        rows = outcome(flags.recipes, flags.seeds, flags.images)
        print(outcome_table(rows, flags.seeds), flush=True)
        seeds = " ".join(map(str, flags.seeds))
        result = {
            "command": f"python -m benchmarks.policy_gradient --outcome --seeds {seeds}",
            **common.environment(),
            "seeds": flags.seeds,
            "images": flags.images,
            "recipes": {name: RECIPES[name] for name in rows},
            "outcome": rows,
        }
        name = f"policy_gradient_outcome_{jax.default_backend()}.json"
        common.write(flags.out or common.RESULTS / name, result)
        return result
    places = {}
    for name, measure in _places(flags):
        places[name] = measure()
        print(table({name: places[name]}), flush=True)
    result = {
        "command": f"python -m benchmarks.policy_gradient --batch={flags.batch} "
        f"--draws={flags.draws}",
        **common.environment(),
        "rollouts": ROLLOUTS,
        "batch": flags.batch,
        "draws": flags.draws,
        "places": places,
    }
    common.write(
        flags.out or common.RESULTS / f"policy_gradient_{jax.default_backend()}.json", result
    )
    return result


if __name__ == "__main__":
    main()
