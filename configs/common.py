"""Every default of the detector lives here, and the parser of `--config=FILE:ARGUMENT`.

A config is a ConfigDict; any field can be changed on the command line (`--config.train.num_steps=500`), and an unknown
field is an error.
"""

from typing import Any

from ml_collections import ConfigDict

TASKS = ("masked", "denoise", "synthetic", "jigsaw", "transform", "intensity", "cluster", "self_distill")

# Sizes of the network by preset, with the input side they are meant for and a jigsaw that divides its token grid.
PRESETS = {
    # CPU: about 1.5 M parameters.
    "tiny": dict(
        image_size=64, tiles=4, width=128, num_heads=4, patch_size=8, num_dense_layers=2, num_moe_layers=2,
        num_neck_layers=1, mlp_dim=512, num_experts=6, expert_dim=128,
    ),
    # One GPU.
    "small": dict(
        image_size=128, tiles=4, width=384, num_heads=6, patch_size=8, num_dense_layers=5, num_moe_layers=3,
        num_neck_layers=2, mlp_dim=1536, num_experts=8, expert_dim=512,
    ),
    # One large GPU or a TPU slice; BMAD's resolution.
    "base": dict(
        image_size=224, tiles=7, width=768, num_heads=12, patch_size=16, num_dense_layers=8, num_moe_layers=4,
        num_neck_layers=2, mlp_dim=3072, num_experts=8, expert_dim=1024,
    ),
}  # fmt: skip


def detector(preset: str = "tiny") -> ConfigDict:
    """Defaults of `mtl_moe` for a preset ("tiny", "small", "base")."""
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, found {preset!r}")
    sizes = dict(PRESETS[preset])
    image_size, tiles = sizes.pop("image_size"), sizes.pop("tiles")
    config = ConfigDict()
    config.system = "mtl_moe"
    config.seed = 0
    config.num_seeds = 1  # runs with seeds seed, seed + 1, ... in workdir/seed_<n>, then mean and deviation
    config.data = dict(
        kind="phantom",  # phantom | bmad | folder | npz
        name="phantom",  # the BMAD set, or what the folder is called in reports
        root="",
        image_size=image_size,
        mask_size=224,  # side of masks and of the maps that pixel metrics compare; 224 is BMAD's
        channels=1,  # 1: luminance; 3: RGB
        calibration_fraction=0.1,  # of the training normals, whole patients or groups
        seed=0,  # of the calibration split, apart from the run's so that seeds share one split
        skip_corrupt=False,
        memory_limit_gb=8.0,  # decoded sets below it are held in memory, larger ones are streamed
        cache="",  # .npz written by --mode=prepare, read instead of the files
        phantom=dict(num_train=640, num_valid=32, num_test=160, seed=0, anatomies=("head", "chest", "abdomen")),
    )
    config.model = sizes | dict(
        mlp="moe",  # moe | dense_active (equal active FLOPs) | dense_params (equal parameters)
        shared_expert=True,
        top_k=2,
        router="shared",  # shared | per_task | fixed (one expert per task, with top_k=1)
    )
    config.tasks = dict(
        names=TASKS,
        # For each task: weight of its loss, augmentation (none | light | strong) and its own options.
        masked=dict(weight=1.0, augment="none", ratio=0.5, ssim_weight=0.1),
        denoise=dict(weight=1.0, augment="none", noise_min=0.05, noise_max=0.3, cells=8),
        synthetic=dict(
            weight=1.0,
            augment="none",
            families=("blend", "blob", "texture", "deform", "haze", "cutpaste"),
            clean_share=0.15,
            radius_min=0.05,
            radius_max=0.25,
            clean_weight=5.0,
        ),
        jigsaw=dict(weight=1.0, augment="light", tiles=tiles),
        transform=dict(weight=1.0, augment="none"),
        intensity=dict(weight=1.0, augment="none", strength=0.8, num_knots=6),
        cluster=dict(weight=1.0, augment="none", num_clusters=32, ratio=0.5),
        self_distill=dict(weight=1.0, augment="none", ratio=0.5),
    )
    config.optim = dict(learning_rate=2e-3, warmup_steps=100, weight_decay=0.05, b2=0.95, clip_norm=1.0)
    config.train = dict(
        batch_size=8,
        num_steps=6000,
        accumulation=1,
        ema_decay=0.998,
        dtype="float32",  # of the computation: float32 | bfloat16
        balance_weight=0.01,
        z_weight=0.001,
        scale_steps=100,  # warm-up over which the tasks' loss scales are measured
        refresh_step=2000,  # pseudo-labels move from pixels to the averaged encoder after this update
        log_every=50,
        save_every=1000,
        tensorboard=True,
    )
    config.score = dict(
        fusion="tail",  # tail | robust_z | max | mean, see mtl_moe/scoring.py
        batch_size=32,
        false_positive_rates=(0.01, 0.05, 0.1),
        gallery=6,  # cases of each kind in the report
        bootstrap=1000,
        untrained=True,  # also score with the untrained network of the same architecture
    )
    config.mesh = dict(expert=1)  # devices that share the experts; all others split the batch
    return config


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Reads "key=value,key=value" with the types of `defaults`; a bare word sets the first key.

    Raises:
      ValueError: for an unknown key or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, sign, text = part.partition("=")
        if not sign and defaults:
            key, text = next(iter(defaults)), part
        if key not in defaults:
            expected = f"one of {sorted(defaults)}" if defaults else "none: this config takes no argument"
            raise ValueError(f"config argument {key!r}: expected {expected}")
        kind = type(defaults[key])
        try:
            values[key] = text.lower() in ("1", "true") if kind is bool else kind(text)
        except ValueError as error:
            raise ValueError(f"config argument {key}={text!r}: expected {kind.__name__}") from error
    return ConfigDict(values)
