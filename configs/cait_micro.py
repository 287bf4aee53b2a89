"""IA-RED² on a small CaiT, Cluttered MNIST: section 4.2's "Applicability" at a CPU's size.

Not in the paper, whose CaiT-S24 on ImageNet is configs/cait_s24.py. The backbone is trained from
scratch first, dense, then the demo's interpreters and blocks, in one command. No block of a CaiT's
groups sees a CLS token, so the interpreters learn their policy tokens, and there is no attention
baseline; the class-attention blocks count as part of the head.

Expected: not run at its full length yet.

    python -m iared2_jax.main --config=configs/cait_micro.py --workdir=runs/cait_micro

Variants: `:runlocal` takes a few steps of every phase, to see that it runs: four minutes on 2 CPU
cores, nearly all of it compiling.
"""

from iared2_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg)
    config = default_config()
    config.name = "cait_micro"
    config.curriculum = "supervised+iared2"
    config.model.name = "cait_micro"
    config.model.num_classes = 10

    # vit_micro's recipe, a third as long.
    config.supervised.batch_size = 64
    config.supervised.epochs = 0.0
    config.supervised.steps = 2000
    config.supervised.optimizer = "muon"
    config.supervised.learning_rate = 4e-3
    config.supervised.warmup_steps = 100
    config.supervised.weight_decay = 0.02
    config.supervised.clip_norm = 1.0
    config.supervised.label_smoothing = 0.05

    # The demo's, from here on.
    config.model.group_sizes = (4, 1, 1)
    config.model.init_bias = 1.0
    config.interpreter.estimator = "rloo"
    config.interpreter.rollouts = 3
    config.interpreter.answer = "probability"
    config.interpreter.exact_saving = True
    config.interpreter.tau = (40.0, 60.0, 600.0)
    config.interpreter.reward_denominator = "entering"
    config.interpreter.lengths = (1.5, 1.0, 1.0)
    config.interpreter.learning_rate = 5e-3
    config.backbone.label_smoothing = 0.05
    config.backbone.learning_rate = 2e-4
    for phase in (config.interpreter, config.backbone):
        phase.batch_size = 64
        phase.epochs = 0.0
        phase.steps = 80
        phase.clip_norm = 1.0
    config.log_every = 20
    config.checkpoint_every = 200
    config.eval.maps_size = 200

    if arg.runlocal:
        for phase in (config.supervised, config.interpreter, config.backbone):
            phase.batch_size = 8
            phase.steps = 2
        config.interpreter.lengths = (1.0,)
        config.log_every = 1
        config.data.eval_size = 32
        config.eval.batch_size = 16
        config.eval.maps_size = 16
        config.eval.figures = 2
        config.eval.speed_rounds = 1
    return config
