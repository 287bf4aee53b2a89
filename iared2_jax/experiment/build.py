"""Model, data and phases, built from a config."""

from typing import Any

import jax.numpy as jnp
import ml_collections

from iared2_jax.config.loading import (
    input_sizes,
    input_spec_of,
    model_groups,
    reduction_of,
    weights_of,
)
from iared2_jax.data.augment import augment_options
from iared2_jax.data.cutouts import CutoutOptions
from iared2_jax.data.datasets import Dataset, open_dataset
from iared2_jax.data.request import DataRequest
from iared2_jax.errors import UsageError, nearest
from iared2_jax.files import with_tuples
from iared2_jax.token_reduction.create import create_module, init_variables
from iared2_jax.token_reduction.model import IARed2
from iared2_jax.token_reduction.selectors import get_selector
from iared2_jax.training.curriculum import phases
from iared2_jax.training.phases import PHASES, Phase, stages
from iared2_jax.weights.load import load_weights

Model = tuple[IARed2, dict[str, Any]]  # module and variables


def dataset_of(config: ml_collections.ConfigDict) -> Dataset:
    """The config's dataset, opened once per process, as its model takes it."""
    request = DataRequest(
        spec=input_spec_of(config),
        path=config.data.path,
        augment=augment_options(config.data.augment),
        bad_share=config.data.bad_share,
        sampling_rate=config.data.sampling_rate,
        cutouts=CutoutOptions(**with_tuples(config.data.cutouts)),
        maps=config.data.maps,
        clip_view=config.eval.clip_view,
    )
    return open_dataset(config.data.name, request)


def check_data(config: ml_collections.ConfigDict) -> None:
    """Opens what training and evaluation will read, and refuses what does not fit the config.

    Raises:
      UsageError: data that cannot be used, another split, or another number of classes.
    """
    dataset = dataset_of(config)
    if config.data.eval_split not in dataset.splits:
        raise UsageError(
            f"config.data.eval_split={config.data.eval_split!r} is unknown"
            f"{nearest(config.data.eval_split, dataset.splits)}"
        )
    if config.mode == "train" and not dataset.class_names:
        raise UsageError(
            f"config.data.name={config.data.name!r} has no labels to train with: it is for "
            "config.mode=eval"
        )
    if dataset.class_names and config.model.num_classes not in (0, dataset.num_classes):
        raise UsageError(
            f"config.model.num_classes={config.model.num_classes}, but {config.data.name} has "
            f"{dataset.num_classes} classes: set --config.model.num_classes={dataset.num_classes}"
        )
    dataset.open_split(config.data.eval_split)


def num_classes(config: ml_collections.ConfigDict) -> int:
    """The classes of the config's model: as many as it says, else as the data has.

    Raises:
      UsageError: neither has any.
    """
    count = config.model.num_classes or dataset_of(config).num_classes
    if not count:
        raise UsageError(
            f"config.model.num_classes=0, but {config.data.name} has no classes: give the model's"
        )
    return count


def _attention_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    if config.model.attention == "dense" and not config.model.attention_size:
        return {}
    return {
        "attention": config.model.attention,
        "attention_size": config.model.attention_size or None,
    }


def model_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments with which `create_model` makes the config's model."""
    options = {
        "name": config.model.name,
        "num_classes": num_classes(config),
        "groups": model_groups(config),
        "policy_token": config.model.policy_token or None,
        "scale": config.model.scale,
        "init_bias": config.model.init_bias,
        "interpreter_kind": config.model.interpreter_kind,
        **({"depth": config.model.depth} if config.model.depth else {}),
        **_attention_options(config),
        **{key: size for key, size in input_sizes(config).items() if size},
    }
    if config.model.interpreter_heads:
        options["interpreter_heads"] = config.model.interpreter_heads
    return options


def build_module(config: ml_collections.ConfigDict) -> IARed2:
    """The config's model without parameters.

    Raises:
      UsageError: options that make no model, or `config.reduction` does not fit it.
    """
    module = create_module(
        **model_options(config),
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        map_channel=bool(config.data.maps),  # of these inputs, not of the model that is saved
    )
    asked = reduction_of(config)
    try:
        module.check_budget(asked["keep_ratios"], get_selector(asked["selector"]))
    except ValueError as error:
        raise UsageError(f"config.reduction: {error}") from error
    return module


def build_model(config: ml_collections.ConfigDict) -> Model:
    """The config's model with the parameters it starts from: `config.weights`, else random ones."""
    module = build_module(config)
    if source := weights_of(config):
        return module, load_initial(config, module, source)
    return module, init_variables(module, config.seed)


def load_initial(config: ml_collections.ConfigDict, module: IARed2, source: str) -> dict[str, Any]:
    """Variables from a weights file; the head may be fresh only where it will be trained.

    A selector that reduces tokens within a block asks no interpreter, and has groups of its own.
    """
    # An interpreter's reward, and an evaluation, need answers that mean something.
    first, _ = stages(config.curriculum, 1)[0]
    fresh_head = config.mode == "train" and not PHASES[first].reduces
    interpreters = not get_selector(config.reduction.selector).after_attention
    return load_weights(
        module, source, seed=config.seed, fresh_head=fresh_head, interpreters=interpreters
    )


def build_phases(config: ml_collections.ConfigDict, module: IARed2) -> list[Phase]:
    """The phases of the config's curriculum.

    Raises:
      UsageError: one that cannot train this model.
    """
    plan = phases(config, module.group_sizes, dataset_of(config).epoch_size)
    for phase in plan:
        phase.kind.check_module(module)
    if config.reduction.train_execution == "ragged" and not module.shows_attention:
        raise UsageError(
            "config.reduction.train_execution='ragged' needs a model with dense attention: "
            'another goes by the tokens\' places in whole images; use "gathered"'
        )
    return plan
