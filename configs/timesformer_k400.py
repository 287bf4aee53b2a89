"""IA-RED² on TimeSformer (joint space-time attention), Kinetics-400: the paper's Table 3.

Paper, error of a clip / of a video: 28.2 / 23.8 dense at 24 clips/s, 35.3 / 29.1 ours at 81 (V100).
Its baselines at as many clips/s: random 34.3 / 28.2, attention 38.1 / 31.4, temporal difference
32.3 / 26.9. So in the paper ours loses to random and to temporal difference.
Expected: the paper's figures; not run at this scale (Kinetics has not been at hand).
Hardware in the paper: 8 clips a GPU; 5 + 1 epochs, D = 1; the number of GPUs is not known.

    python -m iared2_jax.main --config=configs/timesformer_k400.py --workdir=runs/timesformer_k400 \
      --config.data.path=<folder with train.csv, val.csv> --config.weights=<jointST weights>

A line of the lists is `path label`. The weights are any file that `iared2_jax.load_weights` reads,
e.g. mmaction2's timesformer_jointST checkpoint.

One baseline: --config.curriculum=selector --config.reduction.selector=temporal_difference
  --config.reduction.keep_ratios=0.35 and a workdir of its own. (selectors.SELECTORS)
More groups: --config.model.groups=3. The other reading of clip-1: --config.eval.clip_view=random.
Variants: `:table3` trains and evaluates the three baselines beside ours, at the tokens ours keeps;
`:runlocal` takes two steps on a few embedded clips of 64 px, from random weights.
"""

from iared2_jax.config import default_config, parse_arg, runlocal


def get_config(arg=None):
    arg = parse_arg(arg, table3=False)
    config = default_config()
    config.name = "timesformer_k400"
    config.model.name = "timesformer_jointst_b"
    config.model.num_classes = 400
    config.model.groups = 1

    config.data.name = "videos"
    config.data.eval_split = "val"
    config.data.eval_size = 0
    config.data.threads = 8
    config.eval.batch_size = 24

    for phase in (config.interpreter, config.backbone):
        phase.batch_size = 64
        phase.optimizer = "sgd"
        phase.learning_rate = 2.5e-3
        phase.momentum = 0.9
        phase.weight_decay = 1e-4  # TimeSformer's
    config.interpreter.epochs = 5.0
    config.backbone.epochs = 1.0
    config.model.remat = True

    if arg.table3:
        config.compare.selectors = ("random", "attention_block_1", "temporal_difference")
    if arg.runlocal:
        config = runlocal(config)
        config.model.name = "timesformer_jointst_s"
        config.model.image_size = (64, 64)
        config.data.threads = 2
    return config
