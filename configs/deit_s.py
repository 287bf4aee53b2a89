"""IA-RED² on DeiT-S, ImageNet-1k: the paper's Table 2.

Paper: 79.8 -> 79.1 top-1, 930 -> 1360 images/s (V100), about 2.9 of 4.24 linear GFLOPs.
Expected: the paper's figures; not run at this scale yet (ImageNet has not been at hand).
Hardware in the paper: 16 V100, 32 images each; 3 x (10 + 20) epochs; time not known.

    python -m iared2_jax.data.imagenet --tars=<official tars> --data_dir=<folder>   # once
    python -m iared2_jax.main --config=configs/deit_s.py --workdir=runs/deit_s \
      --config.data.path=<folder> --config.weights=<deit_small_patch16_224>

The weights are any file that `iared2_jax.load_weights` reads.
Variants: `:runlocal` takes two real steps of all six phases on a CPU, in about a minute: on a few
embedded digits, prepared as ImageNet is (or on data.path), from random weights.
"""

from iared2_jax.config import default_config, imagenet, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg)
    config = imagenet(default_config())  # the defaults are this table's recipe
    config.name = "deit_s"
    return runlocal(config) if arg.runlocal else config
