"""Do maps find the object? ImageNet-Segmentation: the paper's Tables 1 and 5.

Paper, pixel accuracy / mAcc / mIoU, with DeiT-S:

    raw attention, block 0    68.3  / 50.5  / 37.1
    raw attention, block 1    67.87 / 61.77 / 46.37     Table 1's "raw attention"
    raw attention, block 2    71.9  / 55.7  / 42.6
    LIME                      67.32 / 47.80 / 33.94
    MemNet                    52.81 / 53.70 / 34.66
    GradCAM                   65.91 / 55.04 / 41.31
    LRP                       50.72 / 50.62 / 32.62
    ours, second group        70.36 / 64.86 / 49.42
    all background            70.7  / 50.0  / 35.4      not in the paper: a map that marks nothing
    random, 30% marked        58.3  / 50.0  / 35.8      not in the paper

The last two follow from the share of foreground, 29.3%, which the paper's figures imply. So do the
shares of pixels marked: 30% by block 1 and ours, 50% by LRP and MemNet, 4% by LIME. LRP's row is
that of a random map, and by pixel accuracy alone the map that marks nothing beats ours.
Expected: the paper's figures; not run on the real file: not at hand. Its 4,276 images are of 445
classes, not all of them ImageNet-1k's, and have no labels, so there is no accuracy.
Hardware and time: not known, not run. Counting alone takes a CPU 15 to 30 ms per map of 224 px,
nearly all of it average precision.

    python -m iared2_jax.main --config=configs/segmentation.py --workdir=runs/deit_s \
      --config.data.path=<gtsegs_ijcv.mat> --config.weights=runs/deit_s/weights.safetensors

The file: calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat. The weights are a trained
run's (configs/deit_s.py); without trained interpreters, only the other maps mean anything. It needs
h5py: pip install 'iared2_jax[segmentation]'.
Variants: `:runlocal` takes the demo's backbone and a few of its scenes, in the true file format.
"""

from iared2_jax.config import default_config, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg)
    config = default_config()
    config.name = "segmentation"
    config.mode = "eval"
    config.data.name = "imagenet_segmentation"
    config.data.eval_split = "all"
    config.data.eval_size = 0  # all
    config.eval.maps = ("all",)
    if arg.runlocal:
        config = runlocal(config)
        config.eval.lime_samples = 20
        config.model.name = config.weights = "vit_micro"
        config.model.num_classes = 10
    return config
