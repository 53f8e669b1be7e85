r"""Every row of the paper's ablation from one command: one target, equal images, updates and batches, tuned rates.

Command: python main.py --config=configs/vit_distill/table.py --config.teacher.checkpoint=FILE_OR_FOLDER \
           --config.data.root=IMAGES --workdir=W
Students are probed where the data, or table.probe_data, have labels; without labels the rows tell how far their
features are from the teacher's on held-out images, by which learning rates are chosen in any case.
A stopped run goes on by the same command; rows, ratios, reductions and seeds can be added later:
--config.table.ratios='(0.01, 0.1)' --config.table.rows='("teacher", "copy", "enhanced")'.
Rows that the paper does not have: last, calibrated, post, full_post, aligned, warm, cls, full_cls, muon, full_muon,
muon_post, full_muon_post, recipe (ROWS in vit_distill/table.py).
Cost: rows x ratios x reductions x (seeds - 1 + three to five learning rates) distillations; --mode=plan tells what one
costs. With train.cached_views=4 the teacher leaves the loop and its features are shared by the rows.
Results: docs/results_distiller.md.
"""

from configs import common


def get_config(arg=None):
    """No argument."""
    common.parse_arg(arg)
    config = common.distiller()
    config.command = "table"
    config.few_shot = dict(seed=config.few_shot.seed)  # how many images: table.ratios
    del config.data["split"], config.lora["truncate_to"]  # the table uses every split, and adapters as trained
    config.table = dict(
        rows=("teacher", "copy", "scratch", "full", "plain", "enhanced", "dora", "truncate"),
        ratios=(0.01, 0.1),  # of each class of the training images
        reductions=(2, 3),
        num_seeds=3,  # seed, seed + 1, ...: start values, crops and order; the images are the same
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),  # ascending; one is chosen for each row, ratio and reduction
        tune_steps=0,  # updates of the runs that choose it; 0: as many as in the table
        held_out=256,  # validation images whose feature loss chooses it
        # Labelled set that students are probed on, where it is another than `data`, which then needs no labels.
        probe_data=dict(kind="", name="", root="", groups=""),  # groups "": as of `data`
        probe=dict(
            kind="logistic",  # linear | logistic | knn; segment: of data with masks, students are compared by mIoU
            per_class=100,  # training images of each class (of segment in all); 0: all
            batch_size=256,  # of the feature extraction
            c_values=(0.001, 0.01, 0.1),
            max_iterations=300,
            neighbours=(1, 5, 10, 20, 50),
            learning_rates=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),  # of the linear probe, as the next three
            linear_batch_size=512,
            epochs=90,
            warmup_epochs=10,
            segment=dict(  # the linear head on patch tokens, as of configs/vit_distill/segment.py
                num_steps=1000,
                warmup_steps=50,
                batch_size=16,
                weight_decay=0.01,
                learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
            ),
        ),
    )
    return config
