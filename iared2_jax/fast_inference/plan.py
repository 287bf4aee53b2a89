"""A plan: how each group runs its survivors. Printed, saved, loaded, pinned."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iared2_jax.errors import UsageError
from iared2_jax.files import write_json

KINDS = ("padded", "packed")
EVEN_EIGHTHS = (2, 3, 4, 5, 6, 8)  # of all tokens, the lengths of `even_plan`


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """One group's sub-batches: images sorted by count, `rows` at a time, each in a static shape.

    Attributes:
      kind: "padded": one row per image. "packed": one list of the sub-batch's tokens; rows only for
        attention.
      rows: images per sub-batch.
      shapes: ascending tuples (places, row_length, ..), in tokens with the prefix: the places that
        the linear layers see (rows * row_length when padded), and the length of an image's row in
        attention, for each of some equal blocks of the sub-batch's images (one when padded). A
        sub-batch runs in the first shape that holds it. None is smaller than the one before in any
        entry. The last holds anything.
    """

    kind: str
    rows: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def blocks(self) -> int:
        """The number of blocks in which attention takes a sub-batch's images."""
        return len(self.shapes[0]) - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model runs a batch.

    Attributes:
      batch_size: images per call and device.
      groups: one `GroupPlan` each; empty: the model as a whole runs by `execution`.
      masked_rows: images at a time of a model that runs as a whole.
      execution: "masked", because dropping does not pay here; "gathered", of a selector that
        reduces tokens within a block, whose fixed budget fills every slot.
      switch: a group that runs the whole batch at once takes its shape by one branch, not by a loop
        per shape: a GPU waits for the host at each, XLA:CPU runs a branch's elementwise work on one
        core.
      attention_kernel: one of the backbone's `attention_kernels`.
      key: what the plan was made for; a saved plan is only used where all of it agrees.
      measured: seconds per batch of what was tried, on `key["device"]`.
      planned_from: whose token counts the shapes suit, if not those of the images that were given.
    """

    batch_size: int
    groups: tuple[GroupPlan, ...] = ()
    masked_rows: int = 0
    execution: str = "masked"
    attention_kernel: str = "einsum"
    switch: bool = False
    key: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    planned_from: str = ""

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan that `save` wrote.

        Raises:
          UsageError: the file is missing or is no plan.
        """
        try:
            values = json.loads(Path(path).read_text())
            groups = tuple(
                GroupPlan(g["kind"], g["rows"], tuple(tuple(shape) for shape in g["shapes"]))
                for g in values.pop("groups")
            )
            return cls(groups=groups, **values)
        except OSError as error:
            raise UsageError(f"plan {path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} is not a plan: delete it, and accelerate() makes a new one"
            ) from error

    def check(self, batch_size: int, most_tokens: Sequence[int]) -> None:
        """Refuses a plan that was made for another model or batch size.

        Args:
          batch_size: images per call and device.
          most_tokens: that an image can have in each group, prefix included.

        Raises:
          UsageError: one sentence on what does not fit.
        """
        if self.batch_size != batch_size:
            raise UsageError(
                f"the plan is for batches of {self.batch_size} images per device, "
                f"this is {batch_size}: plan anew"
            )
        if not self.groups:
            return
        if len(self.groups) != len(most_tokens):
            raise UsageError(
                f"the plan is for {len(self.groups)} groups, the model has {len(most_tokens)}: "
                "plan anew"
            )
        for number, (group, num_tokens) in enumerate(
            zip(self.groups, most_tokens, strict=True), start=1
        ):
            if group.kind not in KINDS or not 1 <= group.rows <= batch_size:
                raise UsageError(f"the plan's group {number} is malformed: {group}")
            entries = {len(shape) for shape in group.shapes}
            if len(entries) != 1 or entries == {0} or entries == {1} or group.rows % group.blocks:
                raise UsageError(f"the plan's group {number} is malformed: {group}")
            if group.shapes[-1] != (group.rows * num_tokens, *(num_tokens,) * group.blocks):
                raise UsageError(
                    f"the plan's group {number} ends with the shape {group.shapes[-1]}, which "
                    f"does not hold {group.rows} images of {num_tokens} tokens: plan anew"
                )
            # A sub-batch takes the shape whose place is the number of those too small for it.
            for low, high in itertools.pairwise(group.shapes):
                if low == high or any(a > b for a, b in zip(low, high, strict=True)):
                    raise UsageError(
                        f"the plan's group {number} has shapes out of order: {high} behind {low}"
                    )

    def __str__(self) -> str:
        head = f"batches of {self.batch_size}, attention by {self.attention_kernel}"
        if not self.groups:
            why = "dropping does not pay here; " if self.execution == "masked" else ""
            lines = [f"{head}: {why}{self.execution}, {self.masked_rows} images at a time"]
        else:
            lines = [head]
            for number, group in enumerate(self.groups, start=1):
                shapes = ", ".join(
                    f"{places} ({'/'.join(map(str, lengths))})"
                    if group.kind == "packed"
                    else str(lengths[0])
                    for places, *lengths in group.shapes
                )
                lines.append(
                    f"  group {number}: {group.kind}, {group.rows} images at a time, "
                    f"tokens: {shapes}"
                )
        lines += [
            f"  measured: {name} {1e3 * seconds:.2f} ms"
            for name, seconds in sorted(self.measured.items(), key=lambda item: item[1])
        ]
        if self.planned_from:
            lines.append(f"  planned from {self.planned_from}")
        return "\n".join(lines)


def even_plan(batch_size: int, most_tokens: Sequence[int]) -> Plan:
    """A plan made without counts, for what keeps now more, now less: lengths in even steps.

    A sub-batch is 8 images, or 16 where they are small; of more than 64, an eighth of the batch.

    Args:
      batch_size: images, or rollouts, per call and device.
      most_tokens: that an image can have in each group, prefix included.
    """
    rows = min(batch_size, max(16 if max(most_tokens) <= 128 else 8, batch_size // 8))

    def group(most: int) -> GroupPlan:
        lengths = sorted({-(-most * eighths // 8) for eighths in EVEN_EIGHTHS})
        return GroupPlan("padded", rows, tuple((rows * length, length) for length in lengths))

    return Plan(batch_size, tuple(map(group, most_tokens)))


def needs(lengths: np.ndarray, rows: int, blocks: int = 1) -> np.ndarray:
    """What sub-batches need: (places, row_length of each block) [batches, chunks, 1 + blocks].

    Args:
      lengths: tokens per image, prefix included [batches, batch].
      rows: images per sub-batch; they are sorted by length first, the last one may be smaller.
    """
    ordered = np.sort(lengths, axis=1)
    missing = -ordered.shape[1] % rows
    # As in the engine: images that do not exist come first, and have no tokens.
    ordered = np.pad(ordered, ((0, 0), (missing, 0)))
    chunks = ordered.reshape(len(ordered), -1, blocks, rows // blocks)
    return np.concatenate([chunks.sum((-1, -2))[..., None], chunks.max(-1)], axis=-1)


def choose_shapes(
    kind: str, needed: np.ndarray, rows: int, num_tokens: int, limit: int, step: int
) -> tuple[tuple[int, ...], ...]:
    """The shapes, at most `limit` and one that holds anything, with least padding on `needed`.

    What comes later may need more than was seen, and a whole sub-batch in the last shape is dear.
    So some have tokens to spare.

    Args:
      kind: see `GroupPlan`.
      needed: (places, row_length, ..) of sub-batches that were seen [n, 1 + blocks].
      rows: images per sub-batch.
      num_tokens: of an image of which nothing is dropped.
      limit: shapes besides the last; each is a compiled loop body.
      step: row lengths are multiples of it, places of rows * step / 4 or of it.

    Returns:
      Tuples (places, row_length, ..), each at least as large as the one before in every place.
    """
    choose = _padded_shapes if kind == "padded" else _packed_shapes
    full = (rows * num_tokens, *(num_tokens,) * (needed.shape[1] - 1))
    shapes = choose(needed, rows, num_tokens, limit, step)
    return (*(shape for shape in shapes if shape[0] < full[0]), full)


def _padded_shapes(
    needed: np.ndarray, rows: int, num_tokens: int, limit: int, step: int
) -> list[tuple[int, ...]]:
    """Row lengths that waste least; the longest with two steps to spare."""
    lengths = np.minimum(_round_up(needed[:, 1], step), num_tokens)
    *below, largest = _cuts(lengths, limit)
    return [(rows * length, length) for length in (*below, largest + 2 * step)]


def _packed_shapes(
    needed: np.ndarray, rows: int, num_tokens: int, limit: int, step: int
) -> list[tuple[int, ...]]:
    """Places that waste least, each with the row lengths that its sub-batches need and two steps.

    The largest of several spares a tenth more places than were seen, and rows of any length: these
    are padding for attention alone, and one image that keeps all would need them.
    """
    unit = max(step, rows * step // 4)
    lengths = np.minimum(_round_up(needed[:, 1:], step), num_tokens)
    places = np.minimum(_round_up(needed[:, 0], unit), rows * num_tokens)
    shapes: list[tuple[int, ...]] = []
    longest = np.ones(lengths.shape[1], int)
    for cut in _cuts(places, max(limit - 1, 1)):
        longest = np.maximum(longest, lengths[places <= cut].max(axis=0))
        spare = np.minimum(longest + 2 * step, num_tokens)
        shapes.append((cut, *(int(length) for length in spare)))
    if limit > 1:
        spare = int(_round_up(1.1 * places.max(), unit))
        shapes.append((spare, *(num_tokens,) * lengths.shape[1]))
    return shapes


def _round_up(values: Any, unit: int) -> Any:
    """The next multiples of a unit."""
    return (-(-values // unit) * unit).astype(int)


def _cuts(values: np.ndarray, limit: int) -> list[int]:
    """The values, at most `limit` and the largest among them, that waste least when rounding up.

    Exact, by dynamic programming over the distinct values: the best way to cover the first j with
    k cuts ends with a cut at j, which covers what the best way with k - 1 cuts left over.
    """
    distinct, counts = np.unique(values, return_counts=True)
    seen = np.concatenate([[0], counts.cumsum()])
    cost = np.concatenate([[0], np.full(len(distinct), np.inf)])  # of covering the first j
    choices: list[np.ndarray] = []
    for _ in range(min(limit, len(distinct))):
        # [i, j]: the first i covered before, i..j-1 rounded up to the last of them.
        ends = np.arange(1, len(distinct) + 1)
        covered = np.where(
            np.arange(len(distinct) + 1)[:, None] < ends, seen[ends] - seen[:, None], np.inf
        )
        with np.errstate(invalid="ignore"):
            total = cost[:, None] + covered * distinct
        choices.append(np.argmin(total, axis=0))
        cost = np.concatenate([[0], total.min(axis=0)])
    cuts, left = [], len(distinct)
    for choice in reversed(choices):
        if left:
            cuts.append(int(distinct[left - 1]))
            left = int(choice[left - 1])
    return cuts[::-1]
