"""Any folder of images as a data set: flat (all normal), BMAD-like or MVTec-like.

Axis alphabet: N images of a split.
"""

from pathlib import Path

from input_pipeline.index import Index
from input_pipeline.tree import read_tree


def index_folder(
    root: str | Path,
    name: str = "",
    calibration_fraction: float = 0.1,
    seed: int = 0,
    require_train: bool = True,
    groups: str = "auto",
) -> Index:
    """Indexes a folder; the layouts are listed in `input_pipeline.tree`. Raises DataError as `tree.read_tree` does.

    Args:
      root: the folder. Images directly in it, or in folders of no known name, are all training normals; else it holds
        train, valid, test.
      name: of the data set; the folder's own name if empty.
      calibration_fraction, seed: the training normals held out, see `index.calibration_rows`.
      require_train: False to index a folder for evaluation only.
      groups: see `groups.groups_of`.
    """
    root = Path(root)
    return read_tree(root, name or root.resolve().name, calibration_fraction, seed, require_train, groups=groups)
