"""The detector on one of BMAD's six sets: brain, liver, resc, oct2017, rsna, camelyon16.

Command: python main.py --config=configs/mtl_moe/bmad.py:brain --config.data.root=DIR --workdir=W
Argument: the set, and preset=tiny|small|base: --config=configs/mtl_moe/bmad.py:rsna,preset=base
Where to get the sets, all commands, computed cost: docs/bmad.md. Not measured: the sets cannot be had on the project's
machines.
"""

from configs import common

SETS = ("brain", "liver", "resc", "oct2017", "rsna", "camelyon16")


def get_config(arg=None):
    """`arg`: name of the set, preset."""
    arg = common.parse_arg(arg, name="brain", preset="small")
    if arg.name not in SETS:
        raise ValueError(f"expected one of {SETS}, found {arg.name!r}")
    config = common.detector(arg.preset)
    config.data.kind = "bmad"
    config.data.name = arg.name
    if arg.name == "camelyon16":
        config.data.channels = 3
    return config
