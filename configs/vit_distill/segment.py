r"""How well a frozen student or teacher's patch tokens tell the classes of pixels apart: linear and two-layer heads.

Command: python main.py --config=configs/vit_distill/segment.py --config.student.workdir=W --config.data.root=DIR \
           --workdir=P
     or: the same with --config.teacher.checkpoint=FILE_OR_FOLDER for the teacher itself
Images with masks (docs/distill_data.md). The learning rate is chosen on the validation split; the test split is scored
once. Pixels of mask value 255 are ignored.
"""

from configs import common
from configs.vit_distill import probe


def get_config(arg=None):
    """`arg`: none."""
    common.parse_arg(arg)
    config = probe.get_config()
    config.command = "segment"
    config.data.kind = "segmentation"
    del config["probe"]
    config.segment = dict(
        heads=("linear", "mlp"),
        num_seeds=3,
        feature_batch_size=64,
        feature_dtype="float32",  # float32 | bfloat16
        num_steps=1000,
        warmup_steps=50,
        batch_size=16,
        hidden_dim=256,  # of the two-layer head
        weight_decay=0.01,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
    )
    return config
