"""IA-RED² on DeiT-S, ImageNet-1k: the paper's Table 2.

Paper: 79.8 -> 79.1 top-1, 930 -> 1360 images/s (V100), about 2.9 of 4.24 linear GFLOPs.
Expected: the paper's figures; not run at this scale yet (ImageNet has not been at hand).
Hardware in the paper: 16 V100, 32 images each; 3 x (10 + 20) epochs; time not known.

    python -m iared2_jax.data.imagenet --tars=<official tars> --data_dir=<folder>   # once
    python -m iared2_jax.main --config=configs/deit_s.py --workdir=runs/deit_s \
      --config.data.path=<folder> --config.weights=<deit_small_patch16_224>

The weights are any file that `iared2_jax.load_weights` reads.
Variants: `:runlocal` takes two real steps of all six phases on a CPU, in about a minute: on a few
embedded digits, prepared as ImageNet is (or on data.path), from random weights. `:student` is the
teacher-student row beside it (paper: 76.0 at 70% of the FLOPs): eight of the twelve blocks, 67% of
the FLOPs, trained from scratch by DeiT's recipe with a teacher's answers; the paper tells neither
teacher nor kind, so it is DeiT's "hard", and the teacher DeiT-S itself:

    python -m iared2_jax.main --config=configs/deit_s.py:student --workdir=runs/student \
      --config.data.path=<folder> --config.distillation.teacher=<deit_small_patch16_224>

`:student,token` gives the student a distillation token that learns the teacher's answers.
`:dynamicvit` is DynamicViT (Rao et al. 2021) by its own recipe: four groups, predictors in place of
the interpreters, all of it trained for 30 epochs (its authors: 79.3 at 2.9 of 4.6 G, full). Not run
at this scale.
"""

import dataclasses

from iared2_jax.config import default_config, imagenet, parse_arg, runlocal
from iared2_jax.data.augment import DEIT


def get_config(arg=None):
    arg = parse_arg(arg, student=False, token=False, dynamicvit=False)
    config = imagenet(default_config())  # the defaults are this table's recipe
    config.name = "deit_s"
    if arg.student:
        config.name = "deit_s_student"
        config.curriculum = "distillation"
        config.weights = "scratch"
        config.model.name = "deit_s_distilled" if arg.token else "deit_s"
        config.model.depth, config.model.groups = 8, 4
        config.distillation.head = "token" if arg.token else "class"
        config.distillation.batch_size = 1024
        config.distillation.learning_rate = 1e-3  # 5e-4 for each 512 images
        config.distillation.epochs = 300.0
        config.distillation.warmup_steps = 6255  # five epochs
        config.distillation.label_smoothing = 0.1
        config.data.augment.update(dataclasses.asdict(DEIT))
        config.ema_decay = 0.99996
    if arg.dynamicvit:
        config.name = "deit_s_dynamicvit"
        config.curriculum = "dynamicvit"
        config.model.interpreter_kind = "dynamicvit"
        config.model.groups = 4
        config.reduction.keep_ratios = config.dynamicvit.keep_target  # at inference, too
        config.dynamicvit.batch_size = 1024
        config.dynamicvit.optimizer, config.dynamicvit.weight_decay = "adamw", 0.05
        config.dynamicvit.label_smoothing = 0.1
        config.data.augment.update(dataclasses.asdict(DEIT))
    return runlocal(config) if arg.runlocal else config
