"""What a config asks for: train and evaluate, only evaluate, or explain pictures."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import ml_collections

from iared2_jax.config.checks import validate
from iared2_jax.config.migration import adopt_old_names
from iared2_jax.errors import Interrupted
from iared2_jax.experiment import compare
from iared2_jax.experiment.build import (
    Model,
    build_model,
    build_module,
    build_phases,
    check_data,
    dataset_of,
    load_initial,
    model_options,
)
from iared2_jax.experiment.run_directory import (
    DENSE,
    adopt_config,
    dense_backbone,
    has_begun,
    keep_dense,
    keep_start,
    locked,
    starting_point,
    write_config,
)
from iared2_jax.signals import Stop
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.training.curriculum import dense_phase
from iared2_jax.training.loop import train_phases
from iared2_jax.training.step import TrainState
from iared2_jax.weights.files import read_tensors
from iared2_jax.weights.load import (
    has_interpreters,
    load_model,
    num_classes_of,
    warn_if_untrained,
)

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """Does what `config.mode` says.

    Raises:
      Interrupted: a signal stopped it; the state is saved, and the same call goes on.
    """
    if config.mode == "explain":
        explain(config)
    elif config.mode == "eval":
        evaluate(config, workdir)
    else:
        train_and_evaluate(config, workdir)


def _check(config: ml_collections.ConfigDict) -> None:
    adopt_old_names(config)
    validate(config, jax.device_count())


def train(
    config: ml_collections.ConfigDict, workdir: str | Path, stop: Stop | None = None
) -> TrainState:
    """Trains what the config says, from the workdir's newest checkpoint on, and returns the state.

    On SIGTERM (or `stop.request()`) the state is saved at the current step, and returned; the same
    call goes on from there, to bitwise the same parameters on the same devices.

    Raises:
      UsageError: the config or the workdir cannot be used; nothing was compiled or changed.
      NonFiniteError: too many non-finite steps in a row. The last good checkpoint is kept.
      CheckpointError: no checkpoint could be written, or none of those there is whole.
    """
    workdir = Path(workdir)
    module = _checked_module(config, workdir)
    variables = starting_point(config, module, workdir)
    with contextlib.nullcontext(stop) if stop is not None else Stop() as asked, locked(workdir):
        return _train_locked(config, workdir, module, variables, asked)


def _checked_module(config: ml_collections.ConfigDict, workdir: Path | None = None) -> IARed2:
    """The config's model; everything that the config will need is opened and checked on the way.

    Args:
      workdir: of a run that is to train. One that has begun goes on without what it began with.
    """
    _check(config)
    check_data(config)
    module = build_module(config)
    if workdir is not None:
        for phase in build_phases(config, module):
            if not has_begun(workdir):
                phase.kind.open(module, phase.options)
    return module


def _train_locked(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    variables: dict[str, Any],
    stop: Stop,
) -> TrainState:
    """The training of a workdir that the caller has locked."""
    dataset = dataset_of(config)
    adopt_config(config, dataset, workdir)
    keep_start(config, module, variables, workdir)
    plan = build_phases(config, module)
    return train_phases(
        config,
        workdir,
        module,
        variables,
        plan,
        dataset,
        stop,
        keep_dense=lambda params: keep_dense(module, params, workdir),
    )


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> TrainState:
    """`train`, then the evaluation and report of the finished model; returns the final state.

    Raises:
      Interrupted: a signal stopped it; the state is saved, and the same call goes on.
    """
    workdir = Path(workdir)
    module = _checked_module(config, workdir)
    compare.check_comparison(config)
    with Stop() as stop:
        state, results = _train_then_evaluate(config, workdir, module, stop)
        if config.compare.selectors:
            with locked(workdir):
                _compare_locked(config, workdir, module, state, results, stop)
    return state


def _train_then_evaluate(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    stop: Stop,
    dense: dict[str, Any] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """The final state and the results; locks the workdir from the first step to the last file.

    Raises:
      Interrupted: a signal stopped the training; the state is saved.
    """
    variables = starting_point(config, module, workdir)
    with locked(workdir):
        state = _train_locked(config, workdir, module, variables, stop)
        if stop.requested:
            raise Interrupted("stopped by a signal, state saved: the same command goes on")
        # From the disk: the first step took the buffers over.
        original = dense_backbone(config, module, build_phases(config, module), workdir)
        results = _evaluate_locked(
            config, workdir, module, state.eval_params, original, stop, dense
        )
    return state, results


def _evaluate_locked(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    params: dict[str, Any],
    original: dict[str, Any],
    stop: Stop,
    dense: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The results of a finished model; they, weights and page are in its workdir, which is locked.

    Args:
      dense: the figures of the backbone that it started from, if they are known.
    """
    from iared2_jax.report.results import evaluate_run  # slow to import: matplotlib

    dataset, options = dataset_of(config), model_options(config)
    return evaluate_run(
        config, workdir, module, params, original, dataset, stop, options, dense=dense
    )


def _compare_locked(
    config: ml_collections.ConfigDict,
    workdir: Path,
    module: IARed2,
    state: TrainState,
    results: dict[str, Any],
    stop: Stop,
) -> None:
    """Makes the baselines, and adds all methods to results and page; the workdir is locked."""
    from iared2_jax.report.page import write_again

    found, folders, kept = {}, {}, compare.kept_shares(results)
    dense = results["dense"]  # all of them start from the same backbone
    plan = build_phases(config, module)
    weights = str(workdir / DENSE) if dense_phase(plan) else None
    for selector in config.compare.selectors:
        baseline = compare.baseline_config(config, selector, kept, weights)
        folder = folders[selector] = workdir / compare.FOLDER / selector
        found[selector] = compare.finished(baseline, folder)
        if found[selector] is None:
            log.info("baseline %s, at %s of the tokens", selector, kept)
            folder.mkdir(parents=True, exist_ok=True)
            own = build_module(baseline)
            if baseline.mode == "train":
                _, found[selector] = _train_then_evaluate(baseline, folder, own, stop, dense)
            else:
                start = starting_point(baseline, own, folder)
                params = start["params"]
                found[selector] = _evaluate_locked(
                    baseline, folder, own, params, start, stop, dense
                )
    clips = module.input_spec.is_clip
    results["methods"] = compare.methods(results, found, clips)
    if config.eval.speed_batch:
        original = dense_backbone(config, module, plan, workdir)
        trained = {"params": state.eval_params}
        dataset = dataset_of(config)
        rates = compare.rates(config, dataset, module, original, trained, folders)
        for name, rate in rates.items():
            results["methods"][name]["clips_per_s" if clips else "images_per_s"] = rate
    write_again(results, workdir)


def evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """The evaluation and report of `config.weights`, into <workdir>/eval; no weights are written.

    What an evaluation before has written there stays until this one is finished.

    Returns:
      The results.

    Raises:
      Interrupted: a signal stopped it; nothing was written.
    """
    from iared2_jax.report.results import evaluate_run

    module, folder = _checked_module(config), Path(workdir) / "eval"
    variables = load_initial(config, module, config.weights)
    tensors, dataset = read_tensors(config.weights)[0], dataset_of(config)
    if config.reduction.selector == "interpreter":
        warn_if_untrained(config.weights, tensors)
    with Stop() as stop, locked(folder):
        results = evaluate_run(
            config,
            folder,
            module,
            variables["params"],
            variables,
            dataset,
            stop,
            scored=has_interpreters(tensors),
        )
        write_config(config, dataset, folder)
    return results


def explain(config: ml_collections.ConfigDict) -> list[Path]:
    """Writes heatmaps beside the pictures of `config.data.path`; returns the pictures.

    The model is what a file of ours says it is, else config.model with config.weights.
    """
    from iared2_jax.report.pictures import explain_pictures

    _check(config)
    return explain_pictures(config, lambda: _model_to_explain(config))


def _model_to_explain(config: ml_collections.ConfigDict) -> Model:
    tensors, metadata = read_tensors(config.weights)
    if "create_model" in metadata:
        return load_model(config.weights)
    config = config.copy_and_resolve_references().unlock()
    classes = config.model.num_classes or num_classes_of(tensors)
    config.model.num_classes = classes or 1  # no kind of weights we know: loading will say so
    model = build_model(config)
    warn_if_untrained(config.weights, tensors)
    return model
