"""The defaults that training a detector or a student needs, and the parser of `--config=FILE:ARGUMENT`.

What probes, tables, teachers and ablations need besides stands in their own files of `configs/`.

A config is a ConfigDict; any field can be changed on the command line (`--config.train.num_steps=500`), and an unknown
field is an error.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

TASKS = ("masked", "denoise", "synthetic", "jigsaw", "transform", "intensity", "cluster", "self_distill")
# What the tiny preset trains by default: every further task takes images/s from these, and in first trials cluster and
# intensity were neutral to harmful and self-distillation was not there.
TINY_TASKS = ("masked", "denoise", "synthetic", "jigsaw", "transform")

# Sizes of the network by preset, with the input side they are meant for and a jigsaw that divides its token grid.
PRESETS = {
    # CPU: about 1.6 M parameters.
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
    config.num_seeds = 1  # runs with seeds seed, seed + 1, ... in workdir/seed_<n>, then mean, deviation and ensemble
    config.data = dict(
        kind="phantom",  # phantom | bmad | folder | npz
        name="phantom",  # the BMAD set, or what the folder is called in reports
        root="",
        image_size=image_size,
        tile_size=0,  # side of the tiles in which the network sees an image, see mtl_moe/tiling.py; 0: the whole image
        mask_size=224,  # side of masks and of the maps that pixel metrics compare; 224 is BMAD's
        channels=1,  # 1: luminance; 3: RGB
        window=(),  # (centre, width) of DICOM files and volumes, in Hounsfield units for CT; (): as they say themselves
        calibration_fraction=0.1,  # of the training normals, whole patients or groups
        groups="auto",  # patients by DICOM header, file name or folder | image | a regular expression, see docs/data.md
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
        names=TINY_TASKS if preset == "tiny" else TASKS,
        # For each task: weight of its loss, augmentation (none | light | strong) and its own options.
        masked=dict(weight=1.0, augment="light", ratio=0.5, ssim_weight=0.1),
        # Weight 2: its squared error falls far below the scale fixed at the start; synthetic solves two problems.
        denoise=dict(weight=2.0, augment="light", noise_min=0.05, noise_max=0.3, cells=8),
        synthetic=dict(
            weight=2.0,
            augment="light",
            families=("blend", "blob", "texture", "deform", "haze", "cutpaste", "mass"),
            clean_share=0.15,
            radius_min=0.06,  # share of the image side
            radius_max=0.35,
            max_defects=3,  # one to so many in an image
            clean_weight=5.0,
        ),
        jigsaw=dict(weight=1.0, augment="light", tiles=tiles),
        transform=dict(weight=1.0, augment="none"),
        intensity=dict(weight=1.0, augment="none", strength=0.8, num_knots=6),
        cluster=dict(weight=1.0, augment="none", num_clusters=32, ratio=0.5),
        self_distill=dict(weight=1.0, augment="none", ratio=0.5),
    )
    config.optim = dict(
        kind="muon",  # muon | adamw, see core/optim.py
        learning_rate=4e-3 if preset == "tiny" else 1e-3,  # the first by held-out normals, the second a guess
        warmup_steps=100,
        weight_decay=0.05,
        b2=0.95,
        clip_norm=1.0,  # of all gradients together; 0: none
    )
    config.train = dict(
        batch_size=8,
        sampling="images",  # images | groups: every patient or group of near-duplicates as often as any other
        num_steps=6000,  # tiny preset: 38 minutes on one hyperthread of a Xeon, evaluation included
        accumulation=1,
        ema_decay=0.998,
        dtype="bfloat16",  # of the operands of products: float32 | bfloat16, see core/dense.py
        balance_weight=0.01,
        z_weight=0.001,
        scale_steps=100,  # warm-up over which the tasks' loss scales are measured
        refresh_step=1000,  # pseudo-labels move from pixels to the averaged encoder after this update
        log_every=50,
        save_every=1000,
        tensorboard=True,
    )
    if preset != "tiny":  # a length for GPUs, a guess: not measured yet
        config.optim.warmup_steps = 500
        config.train.batch_size = 64
        config.train.num_steps = 20_000
        config.train.refresh_step = 5_000
    config.slices = dict(  # --mode=slices: volumes to images
        axis="axial",  # axial | coronal | sagittal
        every=1,  # one slice of so many
        min_body=0.5,  # slices with less body than this share of the volume's fullest slice are left out
    )
    config.compress = dict(  # --mode=compress; the optimiser's other fields, batches and logs are those of training
        reduction=2,  # r: one block in r is kept, of the trunk and of the expert blocks
        rank=64,  # of the kept blocks' kernels' updates; it and the rate by token error on held-out normals
        num_steps=1200,
        kind="adamw",  # as optim.kind
        learning_rate=1e-2,
        save_every=200,
    )
    config.score = dict(
        fusion="tail",  # tail | robust_z | max | mean, see mtl_moe/calibration.py
        dtype="float32",  # as train.dtype; in float32 an image's score hardly depends on its batch mates
        batch_size=32,
        false_positive_rates=(0.01, 0.05, 0.1),
        gallery=6,  # cases of each kind in the report
        bootstrap=1000,
        painted=64,  # normals, at most, that defects are painted on where there are no abnormal images
        save_maps=False,  # also write each scored image's map to maps/: overlay as .png, values as .npy
        untrained=True,  # also score with the untrained network of the same architecture
    )
    config.mesh = dict(expert=1)  # devices that share the experts; all others split the batch
    return config


def distiller() -> ConfigDict:
    """Defaults of `vit_distill`: the paper's recipe but for what docs/differences.md names."""
    config = ConfigDict()
    config.system = "vit_distill"
    config.command = "distill"  # distill | probe | segment | teacher | table
    config.seed = 0
    config.teacher = dict(
        checkpoint="",  # file, folder, "hf-hub:ORGANISATION/NAME" or "random:TIMM_NAME"
        allow_missing=(),  # names of tensors that may be missing from the file, or
        allow_unused=(),  # left unused in it
        dtype="float32",  # of its forward pass: float32 | bfloat16
        # What is read from the file or the config beside it, unless it is set here.
        overrides=dict(
            image_size=placeholder(int),
            num_heads=placeholder(int),
            norm_eps=placeholder(float),
            activation=placeholder(str),
            pool=placeholder(str),
            mean=placeholder(tuple),
            std=placeholder(tuple),
            interpolation=placeholder(str),
            crop_fraction=placeholder(float),
            position_resize=placeholder(str),  # timm | bicubic | dinov2: positions for another image_size
        ),
    )
    config.data = dict(
        kind="folder",  # see docs/distill_data.md
        name="",
        root="",
        split="train",  # the images to distil on; labels are used by few_shot and probes only
        channels=3,
        valid_fraction=0.1,  # of train, where the source has no validation split
        test_fraction=0.2,  # the same for a labelled source without test and validation
        seed=0,  # of these splits
        groups="auto",  # patients by DICOM header | image: each by itself | a regular expression, see docs/data.md
        skip_corrupt=False,
        memory_limit_gb=8.0,
    )
    config.few_shot = dict(
        ratio=1.0,  # share of each class (of all images, where there are no labels)
        per_class=0,  # or so many images a class
        seed=0,
        manifest="",  # or the images that this manifest of an earlier run names
    )
    config.student = dict(
        reduction=2,  # r: one block in r is kept
        blocks="first",  # first | last | even | truncate | calibrated, or a list: "0,2,5"
        method="lora",  # lora | full (all weights of the copy train) | scratch (the same from random weights) | copy
    )
    config.lora = dict(
        preset="enhanced",  # enhanced: all six layers of a block | plain: query and value
        targets=(),  # or some of query, key, value, out, fc1, fc2
        rank=128,
        ranks=dict(query=0, key=0, value=0, out=0, fc1=0, fc2=0),  # 0: rank
        scaling="one",  # one | alpha (alpha / rank) | rank_stabilised (alpha / sqrt(rank))
        alpha=1.0,  # stays 1 with scaling one
        dora=False,
        train_norms=False,
        train_biases=False,
        warm_start=False,  # closed-form start from the few-shot images
        truncate_to=0,  # rank to cut trained adapters to, by --mode=evaluate; 0: as trained
    )
    config.loss = dict(
        kind="l1",  # l1 | mse | smooth_l1 | cosine | l1_kld
        target="pre_norm",  # pre_norm | post_norm
        blocks="last",  # last | aligned (every student block against the end of its group)
        cls_weight=0.0,  # share of the loss that looks at the cls token alone; 0: as any other token
        kld_weight=1.0,  # of the divergence in l1_kld
    )
    config.augment = dict(scale_min=0.2, flip=True)  # RandomResizedCrop's smallest share of the area
    config.optim = dict(
        kind="adamw",  # adamw (the paper's) | muon, see core/optim.py
        learning_rate=1e-3,
        warmup_steps=20,
        weight_decay=0.05,
        b2=0.95,
        clip_norm=1.0,  # of all gradients together; 0: none
    )
    config.train = dict(
        batch_size=128,
        num_steps=300,
        accumulation=1,
        ema_decay=0.0,  # 0: the last weights
        dtype="float32",  # of the student's computation: float32 | bfloat16
        cached_views=0,  # teacher features of so many fixed views an image are computed once (CPUs); 0: fresh crops
        log_every=10,
        save_every=100,
        tensorboard=True,
    )
    # Images for calibrated blocks (criterion: removal | influence), the warm start and the diagnostics.
    config.calibration = dict(num_images=128, criterion="removal")
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
