"""The detector on any folder of normal images, with or without valid, test and masks (docs/data.md).

Command: python main.py --config=configs/mtl_moe/folder.py --config.data.root=DIR --workdir=W
Argument: preset=tiny|small|base, for example --config=configs/mtl_moe/folder.py:preset=small
"""

from configs import common


def get_config(arg=None):
    """`arg`: preset."""
    arg = common.parse_arg(arg, preset="tiny")
    config = common.detector(arg.preset)
    config.data.kind = "folder"
    config.data.name = "folder"
    return config
