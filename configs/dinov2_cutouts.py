"""IA-RED² on a published DINOv2, for photographs of objects pasted on photographs of places.

Not in the paper: its own situation (a well-trained ViT, natural images, interpreters on top) at a
size that a CPU can carry, with masks that are exact. Objects are <class>/*.png with alpha,
backgrounds any photographs; `data/cutouts.py` says how scenes are made of them. The trunk has no
classes, so its head is trained first, on features that are computed once; then, in the same
command, the interpreters and the blocks behind each:

    python -m iared2_jax.main --config=configs/dinov2_cutouts.py --workdir=runs/dinov2_cutouts \
      --config.data.path=<objects> --config.data.cutouts.backgrounds=<photographs> \
      --config.weights=<dinov2_vits14, of transformers, timm or its authors>

Measured at 112 px (docs/results/cutouts): the trained head is right on 84.5% of 1,000 test scenes
(254 objects, on backgrounds that training never saw); with interpreters alone 84.2, 86.3 and 85.0%
(seeds 1 to 3) at 66 to 68% of the linear FLOPs. With the blocks fine-tuned 95.2, 95.2 and 94.4% at
66 to 70%, where the original fine-tuned as long has 96.6, 95.7 and 95.6%. `:kind`, dense, with its
head alone trained: 67.9% of 12 kinds (objects never seen), with interpreters 61.1, 63.5, 65.7% at
62 to 67%. Larger, with interpreters alone (trained on an H100): 168 px, 93.7 to 94.2, 93.5, 93.8%
at 70 to 71%; 224 px, 93.9 to 94.8, 94.2, 93.8% at 65 to 71%.
Hardware: 2 CPU cores run the dense model at 39 to 60 images a second at 112 px, and at 7 to 12 at
224 px. An interpreter's rollouts run ragged: at 224 px its step takes half as long as masked.

Variants: `:interpreters` leaves the trunk's weights as they are (Table 4's way); `:kind` asks for
the class of objects that training never saw, in place of which object it is; `:size=112` (px, a
multiple of 14) is faster; `:runlocal` takes two steps on a few digits. Several:
`:interpreters,size=112`.
"""

from iared2_jax.config import default_config, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, interpreters=False, kind=False, size=224)
    config = default_config()
    config.name = "dinov2_cutouts"
    config.model.name = "dinov2_s14"
    config.model.image_size = (112, 112) if arg.runlocal else (arg.size, arg.size)
    config.model.num_classes = 0  # as many as there are objects, or classes of them
    config.data.name = "cutouts"
    config.data.eval_size = 1000
    config.data.cutouts.task = "kind" if arg.kind else "object"
    config.data.cutouts.object_scale = (0.6, 0.95) if arg.kind else (0.4, 0.75)

    config.curriculum = "supervised+interpreters" if arg.interpreters else "supervised+iared2"
    config.supervised.train_trunk = False
    config.supervised.cached_examples = 8 if arg.runlocal else 10240
    config.supervised.batch_size = 256
    config.supervised.epochs = 0.0
    config.supervised.steps = 600
    config.supervised.learning_rate = 1e-2
    config.supervised.weight_decay = 0.0

    # The paper's equal groups, with a budget each (docs/policy_gradient.md). Before any block an
    # interpreter judges single patches: the first group keeps all, as the paper's Figure 4 says.
    # A learned query, not the CLS token's: what is kept should not hang on the place.
    config.model.init_bias = 1.0
    config.model.policy_token = "learned"
    for phase in (config.interpreter, config.backbone):
        phase.batch_size = 16
        phase.epochs = 0.0
        phase.clip_norm = 1.0
    config.interpreter.steps = 120
    config.interpreter.lengths = (0.25, 2.0, 1.0)
    config.backbone.steps = 80
    config.interpreter.estimator = "rloo"
    config.interpreter.rollouts = 3
    config.interpreter.answer = "probability"
    config.interpreter.keep_target = (1.0, 0.48, 0.38)
    config.interpreter.target_weight = 100.0
    config.interpreter.tau = (10.0,)
    config.interpreter.learning_rate = 3e-3
    config.backbone.learning_rate = 1e-5
    config.reduction.train_execution = "ragged"
    config.log_every = 20
    config.checkpoint_every = 50
    config.eval.maps_size = 200
    return runlocal(config) if arg.runlocal else config
