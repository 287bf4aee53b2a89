"""Every option of a run, with its default, in one place; configs/*.py are deltas of it."""

import dataclasses
from typing import Any

import ml_collections

from iared2_jax.data.augment import CROP_FLIP

MODES = ("train", "eval", "explain")
TRAIN_EXECUTIONS = ("masked", "gathered")
DTYPES = ("float32", "bfloat16")


def _phase_defaults(**changes: Any) -> dict[str, Any]:
    """The options that every kind of phase has."""
    phase = dict(
        batch_size=512,  # global, over all devices
        steps=0,  # length of one phase: steps, or epochs; exactly one is above 0
        epochs=0.0,
        optimizer="adam",  # see optimizers.OPTIMIZERS
        learning_rate=4e-5,  # the peak; decays to 0 by a cosine
        warmup_steps=0,  # linear, from 0
        weight_decay=0.0,
        momentum=0.9,  # sgd only
        clip_norm=0.0,  # of the global gradient; 0 is off
        accumulate=1,  # micro-batches per step: less memory, the same update
    )
    return {**phase, **changes}


def default_config() -> ml_collections.ConfigDict:
    """The paper's image recipe (section 4), on data that is always there."""
    config = ml_collections.ConfigDict()
    config.name = "unnamed"
    # "train": and evaluate. "eval": only evaluate `weights`. "explain": the pictures in data.path.
    config.mode = "train"
    config.seed = 0

    config.model = ml_collections.ConfigDict()
    config.model.name = "deit_s"  # see models.variants.VARIANTS
    config.model.num_classes = 1000  # 0: as many as the data has
    # Of its inputs, px: (height, width); () and 0: the variant's own.
    config.model.image_size = ()
    config.model.patch_size = ()
    config.model.channels = 0
    config.model.num_frames = 0  # of clips
    config.model.groups = 3  # D equal groups
    config.model.group_sizes = ()  # or the blocks of each of the D, e.g. (2, 4, 6)
    # "cls" | "learned"; "": "cls", but "learned" for a backbone without CLS in its groups (CaiT).
    config.model.policy_token = ""
    config.model.interpreter_heads = 0  # 0: the variant's own
    config.model.scale = True  # divide the interpreter's logits by sqrt(head width)
    config.model.init_bias = 0.0  # added to them: 0 starts at a score of 0.5
    config.model.dtype = "float32"  # of the computation: "float32" | "bfloat16"

    # Where the parameters come from, first match wins: the workdir's own checkpoint; this; scratch.
    config.weights = ""  # whatever iared2_jax.load_weights takes: a file, a folder, hf://..
    # "scratch" says that random weights are meant; so does "" where data is made.

    config.data = ml_collections.ConfigDict()
    config.data.name = (
        "cluttered_mnist"  # "cluttered_mnist" | "moving_mnist" | "imagenet" | "folder"
    )
    # imagenet: TFDS' data_dir; folder: what has train/ and val/; "small": a few embedded images in
    # that format; mode "explain": a folder of pictures.
    config.data.path = ""
    config.data.seed = 0  # of the scenes, for data that is made
    config.data.eval_split = "test"  # imagenet: "validation"; folder: "val"
    config.data.eval_size = 2000  # images, evenly spread; 0: all
    config.data.threads = 2  # that prepare batches ahead
    config.data.bad_share = 0.001  # of the training images that may be unreadable
    # Of the training images, for data that is read. The paper does not tell what it used: crop and
    # flip is our choice. DeiT's own (data.augment.DEIT) is rand_augment=True, erasing=0.25,
    # mixup=0.8, cutmix=1.0, repeats=3; interpreters are never trained on mixed images.
    config.data.augment = ml_collections.ConfigDict(dataclasses.asdict(CROP_FLIP))

    # What is trained, in which order (training.phases.CURRICULA lists the phases):
    #   iared2        for each group: its interpreter, then the blocks from there on (the paper)
    #   interpreters  only the interpreters; the backbone's weights are untouched (Table 4)
    #   supervised    the backbone alone, all of it, dense: how a backbone is trained at first
    config.curriculum = "iared2"
    config.interpreter = ml_collections.ConfigDict(_phase_defaults(epochs=10.0))
    # The reward (Eq. 2) and the policy gradient (Eq. 3). The paper does not give tau.
    config.interpreter.tau = (1.0,)  # the price of an error: one for all groups, or one each
    config.interpreter.reward_denominator = "initial"  # "initial": N | "entering": N_j
    config.interpreter.log_prob_reduction = "sum"  # "sum" (Eq. 3) | "mean"
    # Sampled masks per image; they share the prefix and the greedy rollout.
    config.interpreter.rollouts = 1
    config.backbone = ml_collections.ConfigDict(_phase_defaults(epochs=20.0))
    config.backbone.label_smoothing = 0.0
    config.backbone.train_head = False  # train final norm and head with the blocks, too
    config.supervised = ml_collections.ConfigDict(
        _phase_defaults(epochs=300.0, optimizer="adamw", learning_rate=5e-4, weight_decay=0.05)
    )
    config.supervised.label_smoothing = 0.0

    config.reduction = ml_collections.ConfigDict()
    config.reduction.threshold = 0.5  # keep iff the score is above
    # How tokens that are dropped for good are left out of a training step: "masked" | "gathered",
    # into as many slots as the phase's first images need. The same gradients (docs/performance.md).
    config.reduction.train_execution = "masked"

    config.ema_decay = 0.0  # evaluate an exponential moving average of the parameters; 0 is off
    config.max_bad_steps = 10  # non-finite steps in a row (none is applied) before giving up

    config.log_every = 50  # steps per window of metrics
    config.checkpoint_every = 1000  # steps; and at the end of every phase
    config.keep_checkpoints = 3
    config.profile = False  # trace steps 10..15 after the start to <workdir>/profile

    config.explain = ml_collections.ConfigDict()
    config.explain.upright = True  # turn pictures by their EXIF orientation, as a person sees them

    config.eval = ml_collections.ConfigDict()
    config.eval.batch_size = 100
    config.eval.figures = 8  # images in the figures; 0 draws none
    config.eval.speed_batch = 32  # images per batch of the throughput figures; 0 measures none
    config.eval.speed_rounds = 15
    return config


def imagenet(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config on ImageNet-1k, every validation image counted."""
    config.data.name = "imagenet"
    config.data.eval_split = "validation"
    config.data.eval_size = 0
    return config


def runlocal(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config for a look at the machinery: two small steps of every phase, random weights."""
    config.weights = "scratch"
    config.data.path = "small"
    config.data.eval_size = 4
    for phase in (config.interpreter, config.backbone, config.supervised):
        phase.batch_size = 2
        phase.epochs = 0.0
        phase.steps = 2
    config.log_every = 1
    config.keep_checkpoints = 1
    config.eval.batch_size = 2
    config.eval.figures = 1
    config.eval.speed_batch = 0  # planning takes longer than all the rest
    return config


# Keys that may change between a run and its continuation: they do not change what is learned.
RESUMABLE = (
    "mode",
    "data.threads",
    "data.path",
    "data.bad_share",
    "max_bad_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "profile",
    "eval.batch_size",
    "eval.figures",
    "eval.speed_batch",
    "eval.speed_rounds",
    "explain.upright",
)
