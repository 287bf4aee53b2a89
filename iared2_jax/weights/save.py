"""Weights out: safetensors in timm's naming, that timm itself reads.

Interpreters lie beside the backbone under "interpreters.j"; the metadata says which model it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from iared2_jax.files import writing
from iared2_jax.models.input_spec import InputSpec
from iared2_jax.weights.layouts import timm_name, to_timm


def timm_tensors(
    variables: Mapping[str, Any], interpreters: bool = True, spec: InputSpec | None = None
) -> dict[str, np.ndarray]:
    """The parameters by timm's names, in its shapes; interpreters as "interpreters.j"."""
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    return {
        timm_name(name): to_timm(name, np.asarray(value), spec)
        for name, value in params.items()
        if interpreters or name.startswith("backbone/")
    }


def save_weights(
    variables: Mapping[str, Any],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    interpreters: bool = True,
    spec: InputSpec | None = None,
) -> None:
    """Writes safetensors in timm's naming; a backbone alone is a file that timm loads strictly.

    Args:
      metadata: what `load_model` is to know: {"create_model": {"name": .., ..}}, a config; JSON.
      interpreters: write them, too, as "interpreters.j".
      spec: the model's `input_spec`; needed where patches are not square or not of colour images,
        to write the patch embedding as a convolution. Else it is written as a matrix there.

    Raises:
      CheckpointError: the disk is full, or refuses; what was at `path` stays.
    """
    tensors = timm_tensors(variables, interpreters, spec)
    text = json.dumps(dict(metadata or {}))
    with writing(Path(path)) as draft:
        save_file(tensors, draft, metadata={"iared2_jax": text})
