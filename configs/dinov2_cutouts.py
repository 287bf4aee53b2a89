"""IA-RED² on a published DINOv2, for photographs of objects pasted on photographs of places.

Not in the paper: its own situation (a well-trained ViT, natural images, interpreters on top) at a
size that a CPU can carry, with masks that are exact. Objects are <class>/*.png with alpha,
backgrounds any photographs; `data/cutouts.py` says how scenes are made of them. The trunk has no
classes, so a head is trained first, on the trunk as it is; interpreters that are rewarded by an
untrained head would learn to drop everything:

    python -m iared2_jax.main --config=configs/dinov2_cutouts.py:head --workdir=runs/dinov2_head \
      --config.data.path=<objects> --config.data.cutouts.backgrounds=<photographs> \
      --config.weights=<dinov2_vits14, of transformers, timm or its authors>
    python -m iared2_jax.main --config=configs/dinov2_cutouts.py --workdir=runs/dinov2_cutouts \
      --config.data.path=<objects> --config.data.cutouts.backgrounds=<photographs> \
      --config.weights=runs/dinov2_head/weights.safetensors

Expected: not run to the end yet; steps and learning rates of the second command are guesses. Of a
head on features of 2,560 scenes at 112 px, 1e-2 was the best of four learning rates (52% of 254
objects after 400 steps). Hardware: on 2 cores of an AMD EPYC the dense model runs 7 images a second
at 224 px, and 45 at 112 px (--config.model.image_size="(112, 112)").

Variants: `:head` trains the head; `:kind` asks for the class of objects that training never saw, in
place of which object it is; `:runlocal` takes two steps on a few digits. Several: `:head,kind`.
"""

from iared2_jax.config import default_config, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, head=False, kind=False)
    config = default_config()
    config.name = "dinov2_cutouts"
    config.model.name = "dinov2_s14"
    config.model.image_size = (112, 112) if arg.runlocal else (224, 224)
    config.model.num_classes = 0  # as many as there are objects, or classes of them
    config.data.name = "cutouts"
    config.data.eval_size = 1000
    config.data.cutouts.task = "kind" if arg.kind else "object"
    config.data.cutouts.object_scale = (0.6, 0.95) if arg.kind else (0.4, 0.75)
    config.data.cutouts.clutter = (0, 0) if arg.kind else (0, 4)

    config.supervised.train_trunk = False
    config.supervised.batch_size = 64
    config.supervised.epochs = 0.0
    config.supervised.steps = 300
    config.supervised.learning_rate = 1e-2
    config.supervised.weight_decay = 0.0
    if arg.head:
        config.curriculum = "supervised"

    # The demo's recipe for interpreters (configs/cluttered_mnist.py), in the paper's equal groups.
    config.model.init_bias = 1.0
    for phase in (config.interpreter, config.backbone):
        phase.batch_size = 32
        phase.epochs = 0.0
        phase.steps = 100
        phase.clip_norm = 1.0
    config.interpreter.reward_denominator = "entering"
    config.interpreter.rollouts = 2
    config.interpreter.learning_rate = 1e-3
    config.backbone.learning_rate = 1e-5
    config.log_every = 20
    config.checkpoint_every = 50
    return runlocal(config) if arg.runlocal else config
