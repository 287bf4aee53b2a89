"""IA-RED² on CaiT-S24 at 224 px, ImageNet-1k: the paper's section 4.2, "Applicability".

Paper: 83.5 -> 82.9 top-1, 9.4 -> 7.5 GFLOPs. It gives no groups: ours are 8, 8, 8 blocks.
CaiT's groups see no CLS token, so each interpreter learns its policy token; the class-attention
blocks read the patches that survive. They count as part of the head: frozen, as the paper trains
only what lies within the groups; `--config.backbone.train_head=true` trains them, too.
Expected: the paper's figures; not run at this scale yet (ImageNet has not been at hand).
Hardware in the paper: 16 V100, 32 images each; 3 x (10 + 20) epochs; time not known.

    python -m iared2_jax.main --config=configs/cait_s24.py --workdir=runs/cait_s24 \
      --config.data.path=<prepared ImageNet> --config.weights=<cait_s24_224, or S24_224.pth>

Variants: `:runlocal` as in configs/deit_s.py, but only the interpreters: to compile the backward
pass of 24 blocks takes a CPU 40 s.
"""

from iared2_jax.config import default_config, imagenet, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg)
    config = imagenet(default_config())
    config.name = "cait_s24"
    config.model.name = "cait_s24"
    if arg.runlocal:
        config.curriculum = "interpreters"
        return runlocal(config)
    return config
