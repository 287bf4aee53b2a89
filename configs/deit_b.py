"""IA-RED² on DeiT-B at 224 px, ImageNet-1k: the paper's Table 2.

Paper: 81.8 -> 80.9 top-1, 1.42x the images per second (V100), about 11.8 of 16.85 linear GFLOPs.
Expected: the paper's figures; not run at this scale yet (ImageNet has not been at hand).
Hardware in the paper: 16 V100, 32 images each; 3 x (10 + 20) epochs; time not known.

    python -m iared2_jax.main --config=configs/deit_b.py --workdir=runs/deit_b \
      --config.data.path=<prepared ImageNet> --config.weights=<deit_base_patch16_224>

Variants: `:runlocal` as in configs/deit_s.py.
"""

from iared2_jax.config import default_config, imagenet, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg)
    config = imagenet(default_config())
    config.name = "deit_b"
    config.model.name = "deit_b"
    return runlocal(config) if arg.runlocal else config
