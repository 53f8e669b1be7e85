"""The detector on the embedded phantoms: no download, minutes on two cores.

Command: make quickstart, or python main.py --config=configs/mtl_moe/quickstart.py --workdir=runs/quickstart
"""

from configs import common


def get_config(arg=None):
    """No argument."""
    common.parse_arg(arg)
    config = common.detector("tiny")
    config.data.name = "phantom"
    config.data.mask_size = config.data.image_size  # phantoms are drawn at this size too: most of the time at 224
    config.train.num_steps = 300
    config.train.refresh_step = 100
    config.train.save_every = 100
    return config
