r"""The distiller on scikit-learn's handwritten digits: teacher, two students, a probe and an export, in minutes.

make quickstart runs, with W=runs/quickstart_distill:
  python main.py --config=configs/vit_distill/quickstart.py:teacher --workdir=W/teacher
  python main.py --config=configs/vit_distill/quickstart.py:half --workdir=W/half      r=2
  python main.py --config=configs/vit_distill/quickstart.py:third --workdir=W/third    r=3
  python main.py --config=configs/vit_distill/quickstart.py:probe --workdir=W/probe    of the half (and :probe_third)
  python main.py --mode=export --export=timm --workdir=W/half
The students see 10 images a class and no label. Measured: README.
"""

from configs import common
from configs.vit_distill import distill, probe, teacher

ROOT = "runs/quickstart_distill"
REDUCTIONS = {"half": 2, "third": 3}


def get_config(arg=None):
    """`arg`: teacher, half, third, probe or probe_third."""
    step = common.parse_arg(arg, step="half").step
    if step == "teacher":
        config = teacher.get_config("digits")
        config.train.tensorboard = False
        return config
    if step in REDUCTIONS:
        config = distill.get_config()
        config.teacher.checkpoint = f"{ROOT}/teacher/teacher"
        config.few_shot.per_class = 10
        config.student.reduction = REDUCTIONS[step]
        config.lora.rank = 16
        config.augment.update(scale_min=0.5, flip=False)  # mirrored digits are other signs
        config.optim.learning_rate = 1e-2
        config.train.update(batch_size=64, num_steps=300, cached_views=8, tensorboard=False)
    elif step in ("probe", "probe_third"):
        config = probe.get_config()
        config.student.workdir = f"{ROOT}/{'third' if step == 'probe_third' else 'half'}"
        config.probe.kinds = ("logistic", "knn")
    else:
        raise ValueError(f"step: expected teacher, {', '.join(REDUCTIONS)}, probe or probe_third, found {step!r}")
    config.data.update(kind="digits", name="digits")
    return config
