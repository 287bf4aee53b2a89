"""The demo on clips: IA-RED² at the input of timesformer_micro, beside Table 3's baselines.

Not in the paper: Table 3 in small, on clips that are always there (data/moving_mnist.py), from the
timesformer_micro weights that ship with the package. One interpreter drops tokens at the input
(D = 1), as the paper's video model does; the baselines keep as many, and are fine-tuned as long.

Expected: see the README, four seeds.
Hardware: 2 CPU cores, under 10 minutes.

    python -m iared2_jax.main --config=configs/moving_mnist.py --workdir=runs/moving_mnist

Variants: `:runlocal` takes a few steps of every phase, to see that it runs.
"""

from iared2_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg)
    config = default_config()
    config.name = "moving_mnist"
    config.model.name = "timesformer_micro"
    config.model.num_classes = 8
    config.model.groups = 1
    config.model.interpreter_heads = 8
    config.model.init_bias = 1.0  # starts at a score of 0.73: keeps everything
    config.weights = "timesformer_micro"
    config.data.name = "moving_mnist"
    config.data.eval_size = 1000

    config.interpreter.tau = (4.0,)
    config.interpreter.rollouts = 2
    config.interpreter.batch_size = 32
    config.interpreter.epochs = 0.0
    config.interpreter.steps = 150
    config.interpreter.learning_rate = 1.5e-3
    config.interpreter.clip_norm = 1.0

    config.backbone.label_smoothing = 0.05  # as the backbone was trained
    config.backbone.batch_size = 32
    config.backbone.epochs = 0.0
    config.backbone.steps = 100
    config.backbone.learning_rate = 3e-4
    config.backbone.clip_norm = 1.0
    config.compare.selectors = ("random", "attention_block_1", "temporal_difference")
    config.log_every = 25
    config.checkpoint_every = 200
    config.eval.speed_rounds = 9
    config.eval.maps_size = 250  # clips have many pixels to count

    if arg.runlocal:
        for phase in (config.interpreter, config.backbone):
            phase.batch_size = 8
            phase.steps = 2
        config.compare.selectors = ("temporal_difference",)
        config.log_every = 1
        config.data.eval_size = 16
        config.eval.batch_size = 8
        config.eval.figures = 2
        config.eval.speed_batch = 0
    return config
