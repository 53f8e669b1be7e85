r"""How well a frozen student or teacher's features tell classes apart: linear probe, logistic regression, k-NN.

Command: python main.py --config=configs/vit_distill/probe.py --config.student.workdir=W --config.data.root=DIR \
           --workdir=P
     or: the same with --config.teacher.checkpoint=FILE_OR_FOLDER for the teacher itself
Each probe's hyper-parameter is chosen on the validation split (data.valid_fraction of train where there is none), of
two classes and of findings by AUC, of more classes by balanced accuracy; the test split is scored once.
"""

from configs import common


def get_config(arg=None):
    """`arg`: none."""
    common.parse_arg(arg)
    config = common.distiller()
    config.command = "probe"
    config.data.kind = "folder"
    for section in ("few_shot", "lora", "loss", "augment", "optim", "train", "calibration"):
        del config[section]
    del config.data["split"]  # all three are used
    config.student = dict(workdir="")  # of a distilled student, or set teacher.checkpoint
    config.probe = dict(
        kinds=("linear", "logistic", "knn"),
        num_seeds=3,  # of the linear probe; the others have nothing random
        feature_batch_size=64,
        feature_dtype="float32",  # float32 | bfloat16
        cache=True,  # keep features in workdir/features, keyed by model, names and pixels
        epochs=90,
        warmup_epochs=10,
        batch_size=512,
        learning_rates=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),  # for 256 images a batch; WeCoLoRA's is 0.1
        c_values=(0.001, 0.01, 0.1, 1.0),
        max_iterations=1000,  # of the logistic regression's solver
        neighbours=(1, 5, 10, 20, 50),
    )
    return config
