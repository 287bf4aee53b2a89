"""Every option of a run, with its default; configs/*.py are deltas of it.

The options of a training phase are declared by its kind, in training/phases/.
"""

import dataclasses

import ml_collections

from iared2_jax.data.augment import CROP_FLIP
from iared2_jax.data.cutouts import CutoutOptions
from iared2_jax.training.phases import PHASES

MODES = ("train", "eval", "explain")
TRAIN_EXECUTIONS = ("masked", "gathered", "ragged")
DTYPES = ("float32", "bfloat16")


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
    # "dense" | "linformer" | "sinkhorn" | "routing": models/attention_variants.py
    config.model.attention = "dense"
    config.model.attention_size = 0  # Linformer's k, or the window; 0: 64, and 49
    config.model.depth = 0  # blocks, e.g. 8 of a student; 0: the variant's own
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
    config.model.interpreter_kind = "attention"  # the paper's | "dynamicvit", its predictors
    # Gradient checkpointing: less memory, about a third more work (docs/performance.md).
    config.model.remat = False
    config.model.dtype = "float32"  # of the computation: "float32" | "bfloat16"

    # Where the parameters come from, first match wins: the workdir's own checkpoint; this; scratch.
    config.weights = ""  # whatever iared2_jax.load_weights takes: a file, a folder, hf://..
    # "scratch" says that random weights are meant; so does "" where data is made.

    config.data = ml_collections.ConfigDict()
    config.data.name = (
        # "cluttered_mnist" | "moving_mnist" | "cutouts" | "imagenet" | "imagenet_segmentation" |
        # "folder" | "videos"
        "cluttered_mnist"
    )
    # imagenet: TFDS' data_dir; folder: what has train/ and val/; videos: what has train.csv and
    # val.csv; cutouts: what has <class>/*.png; imagenet_segmentation: gtsegs_ijcv.mat; "small": a
    # few embedded images or clips as any of these; mode "explain": a folder of pictures or videos.
    config.data.path = ""
    config.data.seed = 0  # of the scenes, for data that is made
    # How cut-outs are composed, see data.cutouts.CutoutOptions: the folder of `backgrounds`; `task`
    # "object" or "kind"; sizes as shares of the image; how many fragments as `clutter`.
    config.data.cutouts = ml_collections.ConfigDict(dataclasses.asdict(CutoutOptions()))
    config.data.eval_split = "test"  # imagenet: "validation"; folder: "val"; segmentation: "all"
    config.data.eval_size = 2000  # images, evenly spread; 0: all
    # Of imagenet and folder, what another model says of every image, for the selector and the map
    # "memorability": <maps>/<split>/<name of the image file>.png, grey, as large as the image.
    config.data.maps = ""
    config.data.threads = 2  # that prepare batches ahead
    config.data.bad_share = 0.001  # of the training images or videos that may be unreadable
    config.data.sampling_rate = 32  # of videos: how far apart frames are, counted at 30 a second
    # Of the training images, for data that is read. The paper does not tell what it used: crop and
    # flip is our choice. DeiT's own (data.augment.DEIT) is rand_augment=True, erasing=0.25,
    # mixup=0.8, cutmix=1.0, repeats=3; interpreters are never trained on mixed images.
    config.data.augment = ml_collections.ConfigDict(dataclasses.asdict(CROP_FLIP))

    # What is trained, in which order (training.phases.CURRICULA lists the phases):
    #   iared2        for each group: its interpreter, then the blocks from there on (the paper)
    #   interpreters  only the interpreters; the backbone's weights are untouched (Table 4)
    #   selector      all blocks, under the tokens that reduction.selector keeps: a baseline
    #   supervised    the backbone alone, dense: how a backbone is trained at first; or only its
    #                 head, on a published trunk (config.supervised.train_trunk=False)
    #   distillation  the backbone alone, by the answers of config.distillation.teacher
    #   dynamicvit    interpreters and all blocks at once, by Gumbel-softmax
    config.curriculum = "iared2"
    # config.interpreter, .backbone, .dynamicvit and so on: each kind of phase declares its own
    # options, with their defaults, in training/phases/<kind>.py.
    for kind in PHASES.values():
        options = {**config.get(kind.section, {}), **kind.options()}
        config[kind.section] = ml_collections.ConfigDict(options)

    config.reduction = ml_collections.ConfigDict()
    # What scores the tokens, see selectors.SELECTORS. Any but "interpreter" is a baseline: for the
    # curriculum "selector", and for evaluation.
    config.reduction.selector = "interpreter"
    config.reduction.threshold = 0.5  # keep iff the score is above
    # Or a fixed budget: the share of the N tokens that each group keeps, the best-scoring ones.
    config.reduction.keep_ratios = ()
    # How dropped tokens are left out of a training step, for the same gradients
    # (docs/performance.md): "masked", they are only masked | "gathered", the others move into as
    # many slots as the phase's first images need | "ragged", as gathered, and in an interpreter's
    # phase, whose blocks need no gradient, every rollout runs on what it keeps itself.
    config.reduction.train_execution = "masked"

    # Baselines beside the run, e.g. ("random", "attention_block_1"): the same start under each
    # selector, at the share of tokens that the run itself keeps ("attention" keeps all in the first
    # group, "dense" in all; "evit" and "tome" spend its linear FLOPs as their papers do),
    # fine-tuned as long as the run's blocks (not at all by "interpreters"); in
    # <workdir>/baselines/, and as `methods` in results.json.
    config.compare = ml_collections.ConfigDict()
    config.compare.selectors = ()

    config.ema_decay = 0.0  # evaluate an exponential moving average of the parameters; 0 is off
    config.max_bad_steps = 10  # non-finite steps in a row (none is applied) before giving up

    config.log_every = 50  # steps per window of metrics
    config.checkpoint_every = 1000  # steps; and at the end of every phase
    config.keep_checkpoints = 3
    config.profile = False  # trace steps 10..15 after the start to <workdir>/profile

    config.explain = ml_collections.ConfigDict()
    config.explain.upright = True  # turn pictures by their EXIF orientation, as a person sees them
    # Maps on the page beside the groups' scores, names of attribution.METHODS.
    config.explain.maps = ("raw_attention", "rollout", "gradcam", "transformer_attribution")

    config.eval = ml_collections.ConfigDict()
    config.eval.batch_size = 100
    # What the network answers from the kept, the dropped and random patches alone: five passes.
    config.eval.agreement = True
    # Thresholds on the curves of accuracy over FLOPs by dropping tokens, by magnitude pruning of
    # the blocks' linear layers, and by both (Figure 5; `pruning` in results.json); 0: no curves.
    config.eval.pruning = 0
    # Of videos: top-1 of a clip ("clip-1") sees the "centre" from the video's start, or a "random"
    # crop at a random time; the video's ("video-1") adds up the logits of three crops, or is off.
    config.eval.clip_view = "centre"
    config.eval.video = True
    # Maps that are measured, names of attribution.METHODS or "all": where the data has masks by the
    # segmentation protocol, and with `perturbation` by taking pixels away. "random" and "center"
    # are always beside them.
    config.eval.maps = ("interpreter", "raw_attention")
    config.eval.maps_size = 0  # images they are measured on, the first of the evaluation's; 0: all
    config.eval.perturbation = False  # 20 forward passes per image and map; and the sanity checks
    config.eval.replacement = "black"  # of pixels taken away: "black" | "mean" | "blur"
    config.eval.explained = "predicted"  # the class that maps explain: "predicted" | "label"
    config.eval.lime_samples = 1000  # forward passes per image for LIME
    config.eval.page_images = 50  # images that the report's page has to look at; 0: none
    config.eval.figures = 8  # images in the figures; 0 draws none
    config.eval.speed_batch = 32  # images per batch of the throughput figures; 0 measures none
    config.eval.speed_rounds = 15
    return config


def imagenet(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets a config, in place, to ImageNet-1k with every validation image; returns it."""
    config.data.name = "imagenet"
    config.data.eval_split = "validation"
    config.data.eval_size = 0
    return config


def from_scratch(phase: ml_collections.ConfigDict, steps: int, batch_size: int = 64) -> None:
    """Sets a phase's section, in place, to the recipe of the small models that ship: Muon."""
    phase.batch_size = batch_size
    phase.epochs = 0.0
    phase.steps = steps
    phase.optimizer = "muon"
    phase.learning_rate = 4e-3
    phase.warmup_steps = 100
    phase.weight_decay = 0.02
    phase.clip_norm = 1.0


def runlocal(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets a config, in place, to two small steps of every phase from random weights; returns it.

    To see that it runs.
    """
    config.weights = "scratch"
    config.data.path = "small"
    config.data.eval_size = 4
    for section in {kind.section for kind in PHASES.values()}:
        phase = config[section]
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
    "model.remat",
    "data.threads",
    "data.path",
    "data.maps",
    "data.cutouts.backgrounds",
    "data.bad_share",
    "max_bad_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "profile",
    "eval.batch_size",
    "eval.agreement",
    "eval.pruning",
    "eval.clip_view",
    "eval.video",
    "eval.maps",
    "eval.maps_size",
    "eval.perturbation",
    "eval.replacement",
    "eval.explained",
    "eval.lime_samples",
    "eval.page_images",
    "eval.figures",
    "eval.speed_batch",
    "eval.speed_rounds",
    "explain.upright",
    "explain.maps",
    "compare.selectors",
)
