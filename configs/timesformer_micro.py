"""A backbone of clips: timesformer_micro on Moving MNIST, from scratch, dense.

Not in the paper, which starts from a TimeSformer trained on Kinetics-400; this makes a small joint
space-time model on clips that are always there: a digit crosses a cluttered canvas, and the class
is which of eight ways. A model of single frames can only guess (12.5%), see data/moving_mnist.py.

Expected: not trained to its end yet. The one run there was (seed 0, stopped at step 3,800) had 46%
training accuracy, loss 1.06, still falling slowly: learning is too slow for weights worth shipping.
Hardware: 2 CPU cores, about 0.1 s a step on idle ones, so 10 to 20 minutes.

    python -m iared2_jax.main --config=configs/timesformer_micro.py --workdir=runs/timesformer_micro

Variants: `:runlocal` takes a few steps, to see that it runs.
"""

from iared2_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg)
    config = default_config()
    config.name = "timesformer_micro"
    config.curriculum = "supervised"
    config.model.name = "timesformer_micro"
    config.model.num_classes = 8
    config.data.name = "moving_mnist"
    config.data.eval_size = 1000

    config.supervised.batch_size = 32
    config.supervised.epochs = 0.0
    config.supervised.steps = 6000
    config.supervised.optimizer = "muon"
    config.supervised.learning_rate = 1e-2
    config.supervised.warmup_steps = 100
    config.supervised.weight_decay = 0.02
    config.supervised.clip_norm = 1.0
    config.supervised.label_smoothing = 0.05
    config.checkpoint_every = 250

    if arg.runlocal:
        config.supervised.batch_size = 8
        config.supervised.steps = 4
        config.log_every = 2
        config.data.eval_size = 16
        config.eval.batch_size = 8
        config.eval.figures = 2
        config.eval.speed_rounds = 1
    return config
