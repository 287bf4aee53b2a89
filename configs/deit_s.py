"""IA-RED² on DeiT-S, ImageNet-1k: the paper's Table 2.

Paper: 79.8 -> 79.1 top-1, 930 -> 1360 images/s (V100), about 2.9 of 4.24 linear GFLOPs.
Not run at this scale yet: ImageNet readers and DeiT weights are not part of this version, so this
config is refused without `:runlocal`, which takes real steps of all six phases of DeiT-S, with the
embedded Cluttered MNIST scaled up to 224 px, from random weights, on a CPU.
Hardware in the paper: 16 V100, 32 images each.

    python -m iared2_jax.main --config=configs/deit_s.py:runlocal --workdir=runs/deit_s_runlocal
"""

from iared2_jax.config import default_config, parse_arg
from iared2_jax.errors import UsageError


def get_config(arg=None):
    arg = parse_arg(arg)
    config = default_config()  # the defaults are this table's recipe
    config.name = "deit_s"
    if not arg.runlocal:
        raise UsageError(
            "configs/deit_s.py needs ImageNet-1k, whose reader is not there yet: "
            "use --config=configs/deit_s.py:runlocal"
        )
    config.data.name = "cluttered_mnist"
    config.data.eval_size = 8
    config.model.num_classes = 10
    for phase in (config.interpreter, config.backbone):
        phase.batch_size = 4
        phase.epochs = 0.0
        phase.steps = 2
    config.log_every = 1
    config.eval.batch_size = 4
    config.eval.figures = 2
    config.eval.speed_batch = 4
    config.eval.speed_rounds = 1
    return config
