r"""Distils a pretrained vision transformer into every r-th of its blocks, on a few unlabelled images.

python main.py --config=configs/vit_distill/distill.py --config.teacher.checkpoint=FILE_OR_FOLDER \
  --config.data.root=IMAGES --config.student.reduction=2 --workdir=W
Argument: recipe=small (a few hundred images) or paper (1 % of ImageNet, some 12 800 images: ten epochs of 1024 images
an update, 128 at a time), with its class folders as IMAGES: --config=configs/vit_distill/distill.py:paper
--config.few_shot.ratio=0.01. Run with a small teacher alone.

The learning rate is to be tuned; with images held out the run does it itself, in three or four runs more:
  --config.optim.learning_rates='(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)' --config.optim.tune_steps=100
What it costs on your machine before it runs: the same with --mode=plan. Results: docs/results_distiller.md.
"""

from configs import common

RECIPES = {
    "small": {},
    "paper": {
        "data.valid_fraction": 0.0,  # few_shot.ratio is of all training images
        "data.test_fraction": 0.0,
        "train.batch_size": 1024,
        "train.accumulation": 8,
        "train.num_steps": 125,
        "optim.learning_rate": 4e-3,  # 1e-3 for 256 images
        "optim.warmup_steps": 25,
        "optim.clip_norm": 0.0,
    },
}


def get_config(arg=None):
    """`arg`: recipe."""
    recipe = common.parse_arg(arg, recipe="small").recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {sorted(RECIPES)}, found {recipe!r}")
    config = common.distiller()
    config.update_from_flattened_dict(RECIPES[recipe])
    # Of these, ascending, the one of the smallest loss on held-out images replaces learning_rate; (): none is tried.
    config.optim.learning_rates = ()
    config.optim.tune_steps = 0  # updates of the runs that choose it; 0: as many as of the training
    return config
