"""The table of what else saves FLOPs: cheaper attentions, and a smaller student (section 4.2)."""

import dataclasses
import functools
from collections.abc import Sequence

from iared2_jax.report.tables import METHODS
from iared2_jax.tables.presets import Preset
from iared2_jax.tables.runs import Run
from iared2_jax.tables.shared_runs import (
    as_long_as_ours,
    finished_seeds,
    head_and_seeds,
    original_run,
)
from iared2_jax.tables.table import (
    OURS_BETTER_BY,
    PLAIN_COLUMNS,
    Results,
    Row,
    Table,
    finished_by_key,
    plain_row,
    set_beside_ours,
)
from iared2_jax.token_reduction.create import create_module

_OURS = "iared2"
_STUDENT = "student"
# By the runs' names: a title, the attention, and its k or window for N patches. The paper's window
# is all of DeiT's 197 tokens.
ATTENTIONS = {
    "dense": ("dense attention, fine-tuned as long", "dense", lambda n: 0),
    "linformer": ("Linformer, k = {}", "linformer", lambda n: 64 if n > 64 else n // 4),
    "sinkhorn": ("Sinkhorn, windows of {}", "sinkhorn", lambda n: n // 4),
    "sinkhorn-whole": ("Sinkhorn, one window (the paper's)", "sinkhorn", lambda n: n),
    "routing": ("Routing, windows of {}", "routing", lambda n: n // 4),
    "routing-whole": ("Routing, one window (the paper's)", "routing", lambda n: n),
}


def attentions_table(title: str, paper: str, presets: Sequence[str]) -> Table:
    """Every attention fine-tuned as long as our blocks, a student, and ours, over seeds."""
    return Table(title, paper, (*PLAIN_COLUMNS, OURS_BETTER_BY), _runs, _rows, presets)


def _name(size: int, what: str, seed: int) -> str:
    return f"{size}px-attention-{what}-{seed}"


def _runs(preset: Preset, sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    made = []
    for size in sizes:
        made += head_and_seeds(preset, _OURS, size, seeds, baselines=False)
        for seed in seeds:
            made += [_attention_run(preset, size, what, seed) for what in ATTENTIONS]
            if preset.student:
                made.append(_student_run(preset, size, seed))
    return made


def _attention_run(preset: Preset, size: int, what: str, seed: int) -> Run:
    """The original with another attention, all of it fine-tuned by our blocks' recipe."""
    recipe = preset.recipe(size)
    _, attention, of_patches = ATTENTIONS[what]
    patches = create_module(recipe.model.name, image_size=size).input_spec.num_patches
    copied = (
        *("batch_size", "optimizer", "learning_rate", "momentum"),
        *("weight_decay", "clip_norm", "label_smoothing"),
    )
    own = {
        "curriculum": "supervised",
        "seed": str(seed),
        "model.attention": attention,
        "model.attention_size": str(of_patches(patches)),
        **{f"supervised.{key}": str(recipe.backbone[key]) for key in copied},
        **as_long_as_ours(recipe, "supervised"),
        "supervised.train_trunk": "True",
        "supervised.cached_examples": "0",
    }
    name, options = _name(size, what, seed), {"eval.maps": "()"}
    return original_run(preset, name, size, options, kind="attention", own=own)


def _student_run(preset: Preset, size: int, seed: int) -> Run:
    """A model of fewer blocks from scratch, by the original's answers."""
    options = {"seed": str(seed), "eval.maps": "()"}
    run = original_run(preset, _name(size, _STUDENT, seed), size, options, kind=_STUDENT)
    return dataclasses.replace(run, config=preset.student, distils=True)


def _rows(sizes: Sequence[int], seeds: Sequence[int], results: Results) -> list[Row]:
    made = []
    for size in sizes:
        ours = finished_seeds(_OURS, size, seeds, results)
        dense = next(iter(ours.values()))["dense"]
        of_size = [plain_row(size, "original", {None: (dense, dense)})]
        for what in (*ATTENTIONS, _STUDENT):
            found = finished_by_key(functools.partial(_name, size, what), seeds, results)
            if not found:
                continue
            config = next(iter(found.values()))["config"]
            pairs = {seed: (run["dense"], dense) for seed, run in found.items()}
            of_size.append(plain_row(size, _title(what, config), pairs))
        pairs = {seed: (run["iared2"], dense) for seed, run in ours.items()}
        of_size.append(plain_row(size, METHODS["iared2"], pairs))
        set_beside_ours(of_size, of_size[-1])
        made += of_size
    return made


def _title(what: str, config: dict) -> str:
    if what == _STUDENT:
        return f"student of {config['model.depth']} blocks, distilled"
    return ATTENTIONS[what][0].format(config["model.attention_size"])
