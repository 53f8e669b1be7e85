"""The detector on the embedded phantoms: no download, minutes on two cores.

Command: make quickstart, or python main.py --config=configs/mtl_moe/quickstart.py --workdir=runs/quickstart
"""

from configs import common


def get_config(arg=None):
    """No argument."""
    common.parse_arg(arg)
    config = common.detector("tiny")
    config.data.name = "phantom"
    config.train.num_steps = 400
    config.train.refresh_step = 150
    config.train.save_every = 200
    return config
