"""What the report's page explores: images, and what the model makes of them at every threshold."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from iared2_jax.evaluation.evaluators import collect
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.report.packing import (
    TINY,
    data_uris,
    in_a_row,
    on_fewer_cells,
    packed,
    quantised,
    shown_pictures,
    side_by_side,
    to_base64,
)
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.flops import count_flops
from iared2_jax.token_reduction.model import IARed2, Thresholds
from iared2_jax.typing import Array

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
BUDGET = 21e6  # bytes of a page's explorer: 500 images and the figures stay below 25 MB


@dataclasses.dataclass(frozen=True)
class Position:
    """A stop of the slider: the groups' thresholds, and what the page calls them."""

    label: str
    thresholds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of every number of kept patches, exact for any backbone; multiply-accumulates.

    An image costs `whole[c] + sum over groups j of changes[c][j][kept_j]`, for the conventions c
    "linear" and "full": what a group costs depends on the patches that it keeps, and on no others.

    Attributes:
      dense: the plain backbone.
      whole: with interpreters that keep everything.
      changes: per group, of keeping 0..N patches in place of all N.
    """

    dense: dict[str, float]
    whole: dict[str, float]
    changes: dict[str, list[list[float]]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A map that every image has: values on a grid of cells, drawn over the picture.

    Attributes:
      group: whose scores they are; None: another map.
      smooth: a heatmap of pixels; else each cell is a patch.
    """

    name: str
    rows: int
    columns: int
    group: int | None
    smooth: bool


@dataclasses.dataclass(frozen=True)
class Explored:
    """One image or clip of the explorer. Packed arrays are base64.

    Attributes:
      label: its class; None: nobody knows.
      picture: a data URI; the frames of a clip side by side.
      dense: the original model's likeliest class, and dense_probability its probability.
      answers, probabilities: the same of the model that drops, at every position.
      depth: how many groups see each patch, `ExplorerData.bits` each, at every position.
      maps: per layer, a byte per cell: 1..255 from low to high; 0: dropped before it was judged.
      ranges: per layer, low and high.
    """

    name: str
    label: int | None
    picture: str
    dense: int
    dense_probability: float
    answers: list[int]
    probabilities: list[float]
    depth: str
    maps: list[str]
    ranges: list[list[float]]


@dataclasses.dataclass(frozen=True)
class ExplorerData:
    """All that the page needs to explore a model: every number in it is the model's own.

    Attributes:
      kind: "images" or "clips".
      rows, columns: patches of a shown picture; a clip's are those of all `frames` in a row.
      groups: D. bits: of one depth.
      start: the position with the thresholds that the model is used with.
    """

    kind: str
    rows: int
    columns: int
    frames: int
    groups: int
    bits: int
    positions: list[Position]
    start: int
    costs: Costs
    class_names: list[str]
    layers: list[Layer]
    images: list[Explored]


def collect_images(
    module: IARed2,
    trained: Mapping[str, Any],
    original: Mapping[str, Any],
    pixels: Any,
    *,
    labels: Sequence[int] | Int[np.ndarray, " b"] | None = None,
    class_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    thresholds: Thresholds = 0.5,
    maps: Mapping[str, Array] | None = None,
    batch_size: int = 50,
    stop: Stop | None = None,
) -> ExplorerData:
    """Runs the model on images or clips at every threshold of the slider, by masked execution.

    What a group scores depends on what the one before has dropped. So each position holds what the
    model does there, at the cost of some 20 forward passes.

    Args:
      trained: variables of the model that drops tokens.
      original: variables of the model whose dense answers are shown beside it.
      pixels: uint8 [B, ..] at the model's size, or what gives them when it is indexed.
      class_names: of the labels and answers; names: of the images. Numbered by default.
      thresholds: that the model is used with, one number or one per group.
      maps: other maps to be shown, by name: a value per patch [B, N], or heatmaps [B, H, W] (of
        clips [B, T, H, W]).

    Raises:
      ValueError: thresholds, labels, names or maps that do not fit the model or the pixels.
      Interrupted: `stop` was requested on the way.
    """
    spec, maps = module.input_spec, dict(maps or {})
    if names is None:
        names = [f"{spec.kind[:-1]} {number}" for number in range(1, len(pixels) + 1)]
    given = {"names": names, **({} if labels is None else {"labels": labels}), **maps}
    _check_lengths(len(pixels), given)
    others = [_other_map(name, np.asarray(values), spec) for name, values in maps.items()]
    positions, start = slider(module, thresholds)
    look = functools.partial(_look, module, trained, original, positions, start)
    seen = collect(look, {"pixels": pixels}, min(batch_size, len(pixels)), stop)
    drawn = [*_score_maps(seen["scores"], seen["depth"][:, start], spec), *others]
    bits = next(bits for bits in (1, 2, 4, 8) if module.num_groups < 2**bits)
    rows, columns = spec.frame_grid
    return ExplorerData(
        kind=spec.kind,
        rows=rows,
        columns=columns * (spec.frames or 1),
        frames=spec.frames or 1,
        groups=module.num_groups,
        bits=bits,
        positions=positions,
        start=start,
        costs=costs_of(module),
        class_names=[str(name) for name in class_names or ()],
        layers=[each.layer for each in drawn],
        images=_images(seen, drawn, bits, spec, names, labels),
    )


def slider(module: IARed2, thresholds: Thresholds) -> tuple[list[Position], int]:
    """The stops of the slider in rising order, and which of them has the model's own thresholds.

    Raises:
      ValueError: thresholds that are not one number, or one per group.
    """
    own = np.asarray(thresholds, float)
    if own.ndim > 1 or own.size not in (1, module.num_groups):
        raise ValueError(
            f"thresholds must be one number or {module.num_groups}, got the shape {own.shape}"
        )
    own = tuple(np.broadcast_to(own, module.num_groups).tolist())
    stops = {(t,) * module.num_groups for t in THRESHOLDS} | {own}
    ordered = sorted(stops, key=lambda each: float(np.clip(each, 0, 1).mean()))
    return [Position(_called(each), each) for each in ordered], ordered.index(own)


def _called(thresholds: tuple[float, ...]) -> str:
    one = len(set(thresholds)) == 1
    shown = (f"{t:.2f}" if round(t, 2) == t else f"{t:.4g}" for t in thresholds)
    return next(shown) if one else " / ".join(shown)


def costs_of(module: IARed2) -> Costs:
    """The costs of a model, such that the page's sums are `count_flops`'s."""
    n, groups = module.input_spec.num_patches, module.num_groups
    whole = count_flops(module, (n,) * groups)._asdict()
    changes: dict[str, list[list[float]]] = {name: [] for name in whole}
    for group in range(groups):
        kept = [np.arange(n + 1) if g == group else np.full(n + 1, n) for g in range(groups)]
        for name, flops in count_flops(module, kept)._asdict().items():
            changes[name].append((np.broadcast_to(flops, n + 1) - whole[name]).tolist())
    return Costs(count_flops(module)._asdict(), whole, changes)


# -- The model on a batch.


def _look(
    module: IARed2,
    trained: Mapping[str, Any],
    original: Mapping[str, Any],
    positions: Sequence[Position],
    start: int,
    batch: dict[str, Any],
) -> dict[str, np.ndarray]:
    """All that the explorer shows of a batch: depth [B, P, N], answers [B, P], scores [B, D, N]."""
    pixels = batch["pixels"]
    dense, dense_probability = _dense(module, original, pixels)
    at = [
        jax.device_get(_reduced(module, trained, pixels, np.float32(position.thresholds)))
        for position in positions
    ]
    return {
        "picture": shown_pictures(np.asarray(pixels), module.input_spec),
        "dense": dense,
        "dense_probability": dense_probability,
        "answers": np.stack([each.answer for each in at], axis=1),
        "probabilities": np.stack([each.probability for each in at], axis=1),
        "depth": np.stack([each.depth for each in at], axis=1),
        "scores": at[start].scores,
    }


class _Reduced(NamedTuple):
    depth: Array
    answer: Array
    probability: Array
    scores: Array


@functools.partial(jax.jit, static_argnums=0)
def _reduced(module: IARed2, variables, pixels, thresholds) -> _Reduced:
    """Masked execution; the thresholds are traced, so that all positions share one program."""
    logits, out = module.apply(variables, module.input_spec.normalize(pixels), thresholds)
    depth = jnp.stack(out.keep, axis=1).sum(axis=1, dtype=jnp.uint8)
    return _Reduced(depth, *_likeliest(logits), jnp.stack(out.scores, axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _dense(module: IARed2, variables, pixels) -> tuple[Array, Array]:
    inputs = module.input_spec.normalize(pixels)
    return _likeliest(module.apply(variables, inputs, execution="dense")[0])


def _likeliest(logits: Float[Array, "b k"]) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))
    return probabilities.argmax(axis=-1), jnp.nan_to_num(probabilities.max(axis=-1))


# -- From arrays to text.


class _Drawn(NamedTuple):
    """A layer, and per image its cells as text and their range."""

    layer: Layer
    cells: list[str]
    ranges: Float[np.ndarray, "b 2"]


def _images(
    seen: Mapping[str, np.ndarray],
    drawn: Sequence[_Drawn],
    bits: int,
    spec: InputSpec,
    names: Sequence[str],
    labels: Sequence[int] | np.ndarray | None,
) -> list[Explored]:
    depth = in_a_row(seen["depth"], spec)
    depths = [to_base64(packed(image.reshape(len(image), -1), bits)) for image in depth]
    used = sum(map(len, depths)) + sum(len(text) for each in drawn for text in each.cells)
    pictures = data_uris(seen["picture"], BUDGET - used, max(spec.size) <= TINY)
    return [
        Explored(
            name=str(names[i]),
            label=None if labels is None else int(labels[i]),
            picture=pictures[i],
            dense=int(seen["dense"][i]),
            dense_probability=_rounded(seen["dense_probability"][i]),
            answers=seen["answers"][i].tolist(),
            probabilities=[_rounded(p) for p in seen["probabilities"][i]],
            depth=depths[i],
            maps=[each.cells[i] for each in drawn],
            ranges=[each.ranges[i].tolist() for each in drawn],
        )
        for i in range(len(depths))
    ]


def _score_maps(
    scores: Float[np.ndarray, "b D n"], depth: UInt8[np.ndarray, "b n"], spec: InputSpec
) -> list[_Drawn]:
    """The groups' scores; depth: at the same thresholds."""
    made = []
    for group in range(scores.shape[1]):
        cells = in_a_row(scores[:, group], spec)
        judged = in_a_row(depth >= group, spec)
        layer = Layer(f"Scores of group {group + 1}", *cells.shape[1:], group + 1, smooth=False)
        made.append(_Drawn(layer, *quantised(cells, judged)))
    return made


def _other_map(name: str, values: np.ndarray, spec: InputSpec) -> _Drawn:
    """A map of patches as it is, a heatmap on fewer cells.

    Raises:
      ValueError: it is neither.
    """
    patches = values.shape[1:] == (spec.num_patches,)
    if not patches and values.shape[1:] != spec.shape[:-1]:
        raise ValueError(
            f"the map {name!r} must be [B, {spec.num_patches}] or {list(spec.shape[:-1])} per "
            f"input, got {list(values.shape)}"
        )
    cells = in_a_row(values, spec) if patches else side_by_side(on_fewer_cells(values))
    layer = Layer(str(name), *cells.shape[1:], None, smooth=not patches)
    return _Drawn(layer, *quantised(cells, np.ones(cells.shape, bool)))


def _rounded(probability: Any) -> float:
    return round(float(probability), 4)


def _check_lengths(inputs: int, given: Mapping[str, Any]) -> None:
    if not inputs:
        raise ValueError("there must be at least one input to explore")
    for name, values in given.items():
        if len(values) != inputs:
            raise ValueError(f"{name} must be {inputs}, one per input, got {len(values)}")
