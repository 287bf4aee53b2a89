"""IA-RED² on ViT-S/16 with AugReg weights (Steiner et al. 2021), ImageNet-1k.

Not in the paper: the recipe of its Table 2 on a backbone that was trained in another way. Pixels
are normalised to -1 .. 1, as these weights expect.
Expected: nothing published to compare with; AugReg's own ViT-S/16 at 224 px has 81.4 top-1
(vit_small_patch16_224 in timm). Not run at this scale yet.
Hardware and time: as configs/deit_s.py, which is the same size.

    python -m iared2_jax.main --config=configs/vit_augreg_s16.py --workdir=runs/vit_augreg_s16 \
      --config.data.path=<prepared ImageNet> --config.weights=<vit_small_patch16_224, or its .npz>

Variants: `:runlocal` as in configs/deit_s.py.
"""

from iared2_jax.config import default_config, imagenet, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg)
    config = imagenet(default_config())
    config.name = "vit_augreg_s16"
    config.model.name = "vit_s16"
    return runlocal(config) if arg.runlocal else config
