"""BMAD, the benchmark of six medical anomaly sets (Bao et al., arXiv 2306.11876; repository DorisBao/BMAD).

Axis alphabet: H W C image, N images of a split.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from input_pipeline.index import DataError, Index
from input_pipeline.tree import has_splits, read_tree, unwrap


@dataclass(frozen=True)
class BmadSet:
    """Published facts of one set: (normal, abnormal) counts, native (height, width), folder names seen in copies."""

    train: tuple[int, int]
    valid: tuple[int, int]
    test: tuple[int, int]
    native_size: tuple[int, int]
    has_masks: bool
    channels: int
    folders: tuple[str, ...]


BMAD = {
    "brain": BmadSet((7500, 0), (39, 44), (640, 3075), (240, 240), True, 1, ("brain", "brats2021", "brats2021slice")),
    "liver": BmadSet((1542, 0), (93, 73), (833, 660), (512, 512), True, 1, ("liver", "histdiy")),
    "resc": BmadSet((4297, 0), (45, 70), (1041, 764), (512, 1024), True, 1, ("resc", "retinaresc")),
    "oct2017": BmadSet((26315, 0), (8, 24), (242, 726), (512, 496), False, 1, ("oct2017", "retinaoct2017", "oct")),
    "rsna": BmadSet((8000, 0), (70, 1420), (781, 16413), (1024, 1024), False, 1, ("rsna", "chestrsna", "chest")),
    "camelyon16": BmadSet(
        (5088, 0), (100, 136), (997, 1000), (256, 256), False, 3, ("camelyon16", "camelyon16256", "histopathology")
    ),
}


def bmad_set(name: str) -> BmadSet:
    """The table's row of one set; ValueError listing the six names."""
    if name not in BMAD:
        raise ValueError(f"unknown BMAD set '{name}': expected one of {', '.join(BMAD)}")
    return BMAD[name]


def _word(folder: str) -> str:
    """`Retina_RESC_AD` -> `retinaresc`: a folder name without case, separators and the archives' `_AD` or `-AD`."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"[_-]AD$", "", folder, flags=re.IGNORECASE).lower())


def find_root(name: str, root: str | Path) -> Path:
    """The folder of set `name`: `root` itself, or the one folder in it that goes by a known name."""
    root = unwrap(Path(root))
    if has_splits(root):
        return root
    folders = sorted(c for c in root.iterdir() if c.is_dir())
    found = [c for c in folders if _word(c.name) in bmad_set(name).folders]
    if len(found) != 1:
        raise DataError(
            f"{root}: expected train/, valid/, test/ or one folder of set '{name}' (called like "
            f"{', '.join(bmad_set(name).folders)}), found {', '.join(c.name for c in found or folders) or 'no folder'}"
        )
    return found[0]


def _counts(index: Index) -> dict[str, tuple[int, int]]:
    """(normal, abnormal) of train (calibration included), valid and test."""
    counts = {}
    for split, parts in {"train": ("train", "calibration"), "valid": ("valid",), "test": ("test",)}.items():
        labels = [e.label for part in parts for e in index.splits.get(part, ())]
        counts[split] = (labels.count(0), labels.count(1))
    return counts


def compare_with_table(name: str, index: Index) -> tuple[str, ...]:
    """One line for every count, and for masks, that differ from the published table."""
    expected, lines = bmad_set(name), []
    for split, found in _counts(index).items():
        wanted = getattr(expected, split)
        if found != wanted:
            lines.append(
                f"{split}: {found[0]} normal + {found[1]} abnormal, the BMAD table says {wanted[0]} + {wanted[1]}"
            )
    has_masks = any(e.mask for split in index.splits.values() for e in split)
    if has_masks != expected.has_masks:
        lines.append(f"masks {'found' if has_masks else 'not found'}, the BMAD table says otherwise")
    return tuple(lines)


def index_bmad(
    name: str,
    root: str | Path,
    calibration_fraction: float = 0.1,
    seed: int = 0,
    require_train: bool = True,
    groups: str = "auto",
) -> Index:
    """Indexes one BMAD set in any of the layouts of its copies (`docs/data.md`).

    Args:
      name: brain, liver, resc, oct2017, rsna or camelyon16.
      root: the set's folder or its parent.
      calibration_fraction, seed: the training normals held out, see `index.calibration_rows`.
      require_train: False accepts the re-packed few-shot copies, which have no train folder (evaluation only).
      groups: see `groups.groups_of`.

    Returns:
      The index; counts that differ from the published table are in its `warnings`, not errors.

    Raises:
      ValueError: unknown name.
      DataError: as `tree.read_tree`, or no folder of that set.
    """
    bmad_set(name)
    index = read_tree(find_root(name, root), name, calibration_fraction, seed, require_train, groups=groups)
    lines = compare_with_table(name, index)
    layout = f"BMAD {name}, counts {'differ from' if lines else 'equal'} the table: {index.layout}"
    return replace(index, layout=layout, warnings=index.warnings + lines)
