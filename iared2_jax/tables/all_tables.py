"""The tables that can be asked for, by their numbers in the paper or a name of ours."""

from iared2_jax.tables.ablation import ablation_table
from iared2_jax.tables.accuracy import accuracy_table
from iared2_jax.tables.attentions import attentions_table
from iared2_jax.tables.input_drops import input_drops_table
from iared2_jax.tables.maps import maps_table
from iared2_jax.tables.peers import peers_table
from iared2_jax.tables.pruning import pruning_table
from iared2_jax.tables.table import Table
from iared2_jax.tables.trained_peers import trained_peers_table

_IMAGES = ("cutouts", "cutouts_kind", "cluttered_mnist", "imagenet")
TABLES: dict[str, Table] = {
    "1": maps_table(
        "Where the object is: maps at the paper's threshold, and at any (Table 1's way)",
        "DeiT-S on ImageNet-Segmentation, pixel accuracy / mAcc / mIoU: raw attention 67.9 / 61.8 "
        "/ 46.4, LIME 67.3 / 47.8 / 33.9, MemNet 52.8 / 53.7 / 34.7, GradCAM 65.9 / 55.0 / 41.3, "
        "LRP 50.7 / 50.6 / 32.6, ours 70.4 / 64.9 / 49.4",
        presets=_IMAGES,
    ),
    "2": accuracy_table(
        "Interpreters and fine-tuned blocks, beside baselines fine-tuned as long (Table 2's way)",
        "DeiT-S on ImageNet: original 79.8, random 78.4, attention 78.4, ours 79.1 (70% of FLOPs); "
        "CaiT-S24 (section 4.2): 83.5 to 82.9 at 7.5 of 9.4 G",
        curriculum="iared2",
        presets=(*_IMAGES, "imagenet_b", "imagenet_cait", "cluttered_mnist_cait"),
    ),
    "3": accuracy_table(
        "Clips: one interpreter at the input, beside baselines fine-tuned as long (Table 3)",
        "TimeSformer on Kinetics-400, error of a clip / of a video: original 28.2 / 23.8 at 24 "
        "clips/s, random 34.3 / 28.2, attention 38.1 / 31.4, temporal difference 32.3 / 26.9, ours "
        "35.3 / 29.1 at 81 clips/s",
        curriculum="iared2",
        presets=("moving_mnist", "kinetics"),
        clips=True,
    ),
    "4": accuracy_table(
        "Interpreters on a backbone whose weights stay as they are (Table 4's way)",
        "DeiT-B on ImageNet: 224 px 81.8 to 80.3 at 70% of the FLOPs, 384 px 82.8 to 81.9 at 70%",
        curriculum="interpreters",
        presets=("cutouts", "cutouts_kind", "cluttered_mnist", "imagenet_b"),
    ),
    "5": input_drops_table(
        "30% dropped once, at the input, and fine-tuned (Table 5, and Table 2's baselines)",
        "DeiT-S on ImageNet, attention of block 0 / 1 / 2: mIoU 37.1 / 46.4 / 42.6, top-1 78.6 / "
        "78.4 / 79.3 at 2.9 / 3.3 / 3.6 of 4.2 G; random 78.4",
        presets=_IMAGES,
    ),
    "attentions": attentions_table(
        "Cheaper attentions and a smaller student in place of dropping (section 4.2)",
        "DeiT-S on ImageNet: Sinkhorn 77.9 at 720 images/s, Routing 77.7 at 663 (window 197, which "
        "is all), Linformer 75.7, a student of 70% of the FLOPs 76.0, ours 79.1",
        presets=_IMAGES,
    ),
    "fig5": pruning_table(
        "Dropping tokens, pruning weights, and both (Figure 5)",
        "both: 1.7 times fewer FLOPs for 1.7 points",
        presets=("cluttered_mnist", "cutouts", "imagenet"),
    ),
    "peers": peers_table(
        "Beside EViT, ToMe and others, whose weights nobody trained for it",
        "none. By their own authors: EViT, DeiT-S on ImageNet, trained with it, 79.8 to 79.5 at "
        "3.0 of 4.6 G; ToMe off the shelf, ViT-S/16 of AugReg, r = 13, 81.4 to 79.3",
        presets=_IMAGES,
    ),
    "trained_peers": trained_peers_table(
        "Beside EViT, ToMe and DynamicViT, fine-tuned as long",
        "none. By their own authors, DeiT-S on ImageNet: EViT 79.8 to 79.5 at 3.0 of 4.6 G, "
        "DynamicViT 79.3 at 2.9 G",
        presets=_IMAGES,
    ),
    "ablation": ablation_table(
        "What the paper leaves open, one choice at a time (its ablation, and more)",
        "D = 2 / 3 / 4 groups, DeiT-S on ImageNet at 2.9 G: 78.6 / 79.1 / 78.8; no other choice",
    ),
}
