r"""Distils a pretrained vision transformer into every r-th of its blocks, on a few unlabelled images.

python main.py --config=configs/vit_distill/distill.py --config.teacher.checkpoint=FILE_OR_FOLDER \
  --config.data.root=IMAGES --config.student.reduction=2 --workdir=W

What it costs on your machine before it runs: the same with --mode=plan. Results: docs/results_distiller.md.
"""

from configs import common


def get_config(arg=None):
    """No argument."""
    common.parse_arg(arg)
    return common.distiller()
