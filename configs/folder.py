"""My own pictures, my own checkpoint: a lighter model, or an explanation.

The folder has train/<class>/*.jpg and val/<class>/*.jpg (or .png). Weights are anything that
`iared2_jax.load_weights` reads. If they are for your classes, one command:

    python -m iared2_jax.main --config=configs/folder.py --workdir=runs/mine \
      --config.data.path=<folder> --config.model.name=deit_s --config.weights=<checkpoint>

If they are for other classes (ImageNet's, say), fine-tune them first; an interpreter that is
rewarded by an untrained head learns to drop everything:

    python -m iared2_jax.main --config=configs/folder.py --workdir=runs/dense \
      --config.data.path=<folder> --config.weights=<checkpoint> --config.curriculum=supervised
    ... then as above, with --config.weights=runs/dense/weights.safetensors

Expected: depends on your data; the report compares with the dense model you started from.
Hardware: one GPU for DeiT-S at these batches; on a CPU with hundreds of pictures, hours.
Only evaluate, or only explain (a folder of pictures without classes will do):

    ... --config.mode=eval
    ... --config.mode=explain --config.data.path=<pictures>

Variants: `:model=vit_s16` names the model; `:runlocal` takes a few steps on a small folder.
"""

from iared2_jax.config import default_config, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, model="deit_s")
    config = default_config()
    config.name = "folder"
    config.model.name = arg.model
    config.model.num_classes = 0  # as many as there are folders in train/
    config.data.name = "folder"
    config.data.eval_split = "val"
    config.data.eval_size = 0  # all
    config.backbone.train_head = True
    for phase in (config.interpreter, config.backbone, config.supervised):
        phase.batch_size = 64
    config.supervised.epochs = 20.0
    config.supervised.learning_rate = 5e-5  # fine-tuning
    return runlocal(config) if arg.runlocal else config
