"""IA-RED² on DeiT-B, interpreters only, at 384 or 224 px, ImageNet-1k: the paper's Table 4.

Paper, 384 px: 82.8 -> 81.9 top-1, 87.0 -> 129.6 images/s (1.48x), 49.4 -> 34.7 linear GFLOPs.
Paper, 224 px: 81.8 -> 80.3 top-1, 316.8 -> 452.5 images/s (1.42x), 16.8 -> 11.8 linear GFLOPs.
Expected: the paper's figures; not run at this scale yet (ImageNet has not been at hand).
Hardware in the paper: 16 V100, 32 images each; 3 x 10 epochs; time not known.
No weight of the backbone changes.

    python -m iared2_jax.main --config=configs/deit_b_384.py --workdir=runs/deit_b_384 \
      --config.data.path=<prepared ImageNet> --config.weights=<deit_base_patch16_384>
    python -m iared2_jax.main --config=configs/deit_b_384.py:size=224 ...

Variants: `:size=224`; `:runlocal` as in configs/deit_s.py.
"""

from iared2_jax.config import default_config, imagenet, parse_arg, runlocal
from iared2_jax.errors import UsageError


def get_config(arg=None):
    arg = parse_arg(arg, size=384)
    models = {384: "deit_b_384", 224: "deit_b"}
    if arg.size not in models:
        raise UsageError(f"size={arg.size} is not in Table 4: use 384 or 224")
    config = imagenet(default_config())
    config.name = "deit_b_384" if arg.size == 384 else "deit_b_224_interpreters"
    config.model.name = models[arg.size]
    config.curriculum = "interpreters"
    return runlocal(config) if arg.runlocal else config
