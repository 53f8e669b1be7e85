"""The detector on any folder of normal images, with or without valid, test and masks (docs/data.md).

Command: python main.py --config=configs/mtl_moe/folder.py --config.data.root=DIR --workdir=W
Argument: preset=tiny|small|base, for example --config=configs/mtl_moe/folder.py:preset=small
Cost and result, tiny preset, one CPU core, image AUROC on br35h and chest_xray, mean of three seeds: at 64 pixels 16 to
18 minutes, 0.917 and 0.896; at 128 pixels 85 to 120 minutes, 0.933 and 0.907 (docs/results_detector.md). Other presets:
not measured.
"""

from configs import common


def get_config(arg=None):
    """`arg`: preset."""
    arg = common.parse_arg(arg, preset="tiny")
    config = common.detector(arg.preset)
    config.data.kind = "folder"
    config.data.name = "folder"
    return config
