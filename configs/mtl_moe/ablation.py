r"""The detector's ablation from one command: every row trained with several seeds, one table, resumable.

Command: python main.py --config=configs/mtl_moe/ablation.py --config.data.root=DIR --config.data.name=NAME --workdir=W
Argument: preset=tiny|small|base. The data need normal and abnormal test images; the base row is this config without its
section `ablation`. Some rows only, by name or pattern: --config.ablation.rows="('dense_*', 'only_*', 'fusion_*')"; more
rows and seeds can be added later to the same --workdir. The rows: docs/extending.md, or any wrong name.
Cost: rows x seeds x the base's training, where wide, deep, long and large-image rows cost several times as much; the
cells keep their checkpoints (about 50 MB each with the tiny preset, whose rows of 1500 updates took 7 to 9 minutes on
one hyperthread: docs/results_detector.md).
"""

from configs import common


def get_config(arg=None):
    """`arg`: preset."""
    arg = common.parse_arg(arg, preset="tiny")
    config = common.detector(arg.preset)
    config.command = "ablation"
    config.data.kind = "folder"
    config.data.name = "folder"
    # A quarter of the default: what counts is the difference between rows.
    config.train.num_steps //= 4
    config.train.refresh_step //= 4
    config.ablation = dict(
        rows=("*",),  # names or patterns of rows; the base is always there
        num_seeds=3,  # seed, seed + 1, ...
        painted_images=128,  # calibration normals, at most, that defects are painted on
    )
    return config
