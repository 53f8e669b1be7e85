r"""Distils a pretrained vision transformer into every r-th of its blocks, on a few unlabelled images.

python main.py --config=configs/vit_distill/distill.py --config.teacher.checkpoint=FILE_OR_FOLDER \
  --config.data.root=IMAGES --config.student.reduction=2 --workdir=W

The learning rate is to be tuned; with images held out the run does it itself, in three to five runs more:
  --config.optim.learning_rates='(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)' --config.optim.tune_steps=100
What it costs on your machine before it runs: the same with --mode=plan. Results: docs/results_distiller.md.
"""

from configs import common


def get_config(arg=None):
    """No argument."""
    common.parse_arg(arg)
    config = common.distiller()
    # Of these, ascending, the one of the smallest loss on held-out images replaces learning_rate; (): none is tried.
    config.optim.learning_rates = ()
    config.optim.tune_steps = 0  # updates of the runs that choose it; 0: as many as of the training
    return config
