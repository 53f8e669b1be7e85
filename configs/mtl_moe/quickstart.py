"""The detector on the embedded phantoms: no download, minutes on two cores.

Command: make quickstart-detector, or python main.py --config=configs/mtl_moe/quickstart.py --workdir=runs/quickstart
Cost and result on two CPU cores: about 3 minutes; image AUROC 0.900 (0.835 to 0.958). Tasks, anatomy and length were
chosen on these test phantoms: a demonstration (docs/results.md).
"""

from configs import common


def get_config(arg=None):
    """No argument."""
    common.parse_arg(arg)
    config = common.detector("tiny")
    config.data.mask_size = config.data.image_size  # phantoms are drawn at this size too: most of the time at 224
    # What can be learned in these minutes: one anatomy, four of the eight tasks.
    config.data.phantom.anatomies = ("head",)
    config.tasks.names = ("masked", "denoise", "synthetic", "jigsaw")
    config.train.num_steps = 700
    config.train.save_every = 175
    return config
