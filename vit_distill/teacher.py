"""Pretrained vision transformers from files, folders, the hub, or at random: weights, architecture, preprocessing.

Architecture comes from names and shapes of the tensors; what they cannot tell (heads, epsilon, GELU, mean and std) from
the config beside the file, the architecture's name or the family's custom. What was assumed is said in the report.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from core import tree
from core.vit import VitConfig, init_params
from vit_distill import positions
from vit_distill.formats import architectures, canonical, hub, inference
from vit_distill.formats.checkpoint import Beside, Checkpoint
from vit_distill.formats.reading import read_format
from vit_distill.formats.tensors import INDEX, SUFFIXES, read_config_json, read_tensors
from vit_distill.preprocessing import Preprocessing

_CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(VitConfig))
_PREPROCESSING_FIELDS = ("mean", "std", "interpolation", "crop_fraction")
OVERRIDES = (*_CONFIG_FIELDS, *_PREPROCESSING_FIELDS, "position_resize")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a weight file.

    Attributes:
      matched, missing: names in the file; the missing were allowed and have their initial value.
      unused: names left out, allowed or known to be no part of the encoder, each with the reason.
      reshaped: tensors that were changed to fit, with both sizes.
      sha256: of the file, or of the digests of several (`formats.tensors.TensorFile`); of the parameters for a random
        teacher.
      format: for example "timm".
      notes: assumptions.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    reshaped: tuple[str, ...]
    sha256: str
    format: str
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """A short table, one line a fact."""
        rows = [f"format    {self.format}", f"sha256    {self.sha256}", f"matched   {len(self.matched)} tensors"]
        for label in ("missing", "unused", "reshaped", "notes"):
            values = getattr(self, label)
            rows += [f"{label:9} {value}" for value in values[:8]]
            if len(values) > 8:
                rows.append(f"{label:9} ... and {len(values) - 8} more")
        return rows

    def facts(self) -> dict[str, Any]:
        """The same in full as plain JSON, but for the matched names, which are counted, and the file's identity."""
        names = {label: list(getattr(self, label)) for label in ("missing", "unused", "reshaped", "notes")}
        return {"matched": len(self.matched)} | names

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A pretrained model as data.

    Attributes:
      name: architecture and tag where known, else the file's name.
      config: architecture.
      params: float32 parameters of core.vit.VisionTransformer(config).
      preprocessing: what it expects of its images.
      source: plain JSON: format, file, sha256, licence, architecture.
      report: what became of the file's tensors.
    """

    name: str
    config: VitConfig
    params: Any
    preprocessing: Preprocessing
    source: Mapping[str, Any]
    report: LoadReport


def function_facts(config: VitConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """What a model computes beside its weights, whose sha256 does not tell it: the fields of both as plain JSON."""
    # Through JSON, which knows lists alone.
    return json.loads(json.dumps(dataclasses.asdict(config) | dataclasses.asdict(preprocessing)))


def load_teacher(
    checkpoint: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> Teacher:
    """Loads a pretrained ViT, strictly: every tensor has its counterpart or is allowed by name.

    Args:
      checkpoint: a weight file (.safetensors, .npz, .pth) or the index of several (.safetensors.index.json), a folder
        with one and its config, "hf-hub:ORG/NAME", or "random:ARCHITECTURE" (timm's name, seeded weights).
      overrides: any of OVERRIDES; None keeps what the file says. `image_size` resizes the position embedding by the
        variant `position_resize` (vit_distill.positions).
      allow_missing: patterns (* and ?) of tensors that may keep their initial value.
      allow_unused: patterns of tensors in the file to leave out.

    Raises:
      ValueError: for a file that is damaged, pickled, of an unknown format, or that does not fit; the message names
        the tensor, key or file.
    """
    overrides = _checked_overrides(overrides or {})
    if checkpoint.startswith("random:"):
        return _random_teacher(checkpoint.removeprefix("random:"), overrides)
    if checkpoint.startswith("hf-hub:"):
        name = checkpoint.removeprefix("hf-hub:")
        return _load(_weight_file(hub.download(name)), overrides, allow_missing, allow_unused, name)
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise ValueError(f"teacher checkpoint {checkpoint}: no such file or folder (nor hf-hub:... or random:...)")
    return _load(_weight_file(path), overrides, allow_missing, allow_unused)


def load_teacher_of(config: Any) -> Teacher:
    """The teacher that `config.teacher` names, its load report printed.

    Raises:
      ValueError: without a checkpoint, and as `load_teacher`.
    """
    section = config.teacher
    if not section.checkpoint:
        raise ValueError(
            "teacher.checkpoint is empty: set --config.teacher.checkpoint to a weight file, a folder of timm or "
            "Hugging Face, hf-hub:ORGANISATION/NAME, or random:NAME"
        )
    overrides = {name: value for name, value in section.overrides.items() if value is not None}
    teacher = load_teacher(
        section.checkpoint,
        overrides=overrides,
        allow_missing=tuple(section.allow_missing),
        allow_unused=tuple(section.allow_unused),
    )
    print(teacher.report)
    print("\n".join(describe(teacher)))
    return teacher


def describe(teacher: Teacher) -> list[str]:
    """What was read or assumed of a teacher, as lines for the console."""
    config, preprocessing = teacher.config, teacher.preprocessing
    tokens = f"{config.num_registers} registers, " * bool(config.num_registers) + f"{config.pool} pooling"
    tokens += ", rotary positions" * (config.position == "rotary")
    mean, std = ((", ".join(f"{value:.4g}" for value in values)) for values in (preprocessing.mean, preprocessing.std))
    return [
        f"teacher   {teacher.name}: {config.depth} blocks of width {config.width}, {config.num_heads} heads, patch "
        f"{config.patch_size} at {config.image_size} px, {tokens}",
        f"          {config.activation if config.mlp == 'mlp' else config.mlp}, norm epsilon {config.norm_eps:g}"
        + ", layer scale" * config.layer_scale,
        f"images    resize {preprocessing.resize_size} ({preprocessing.interpolation}), crop "
        f"{preprocessing.image_size}, mean {mean}, std {std}",
    ]


def _checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise ValueError(f"overrides: expected some of {', '.join(OVERRIDES)}; found {', '.join(unknown)}")
    return {key: value for key, value in overrides.items() if value is not None}


def _weight_file(path: Path) -> Path:
    """The weight file itself, or the one of a folder, or the index of several."""
    if path.is_file():
        return path
    for name in ("model.safetensors", f"model{INDEX}"):
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(
            f"{path}: expected model.safetensors, model{INDEX} or a single weight file, found {names}: name the file"
        )
    return found[0]


def _load(
    path: Path, overrides: dict[str, Any], allow_missing: Sequence[str], allow_unused: Sequence[str], name: str = ""
) -> Teacher:
    file = read_tensors(path)
    beside = Beside(
        read_config_json(path.parent / "config.json"),
        read_config_json(path.parent / "preprocessor_config.json"),
        file.wrapper,
    )
    left_out = [tensor for tensor in file.tensors if canonical.matches(tensor, allow_unused)]
    kept = {tensor: array for tensor, array in file.tensors.items() if tensor not in left_out}
    try:
        found, ignored = read_format(kept, beside)
        config, notes = _build_config(found, overrides)
        state, reshaped = _resized(found, config, overrides)
        params, matched, missing = canonical.to_params(config, state, found.source_name, allow_missing)
        preprocessing = _build_preprocessing(found, config, overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: a tensor, or a field of the JSON beside it, has a form that no model of a known format has "
            f"({type(error).__name__}: {error}): download or write both again"
        ) from error
    unused = (*(f"{tensor} (allowed)" for tensor in left_out), *(f"{k} ({v})" for k, v in ignored.items()))
    report = LoadReport(
        matched, missing, unused, reshaped, file.sha256, found.format, (*file.notes, *found.notes, *notes)
    )
    facts = {key: value for key, value in found.facts.items() if value is not None}
    source = {
        **facts,
        "format": found.format,
        "file": path.name,
        "sha256": file.sha256,
        "licence": facts.get("licence") or _readme_licence(path.parent / "README.md") or "unknown",
    }
    stem = path.name.removesuffix(INDEX) if path.name.endswith(INDEX) else path.stem
    if stem in ("model", "pytorch_model"):  # what every folder of timm or Hugging Face calls it
        stem = path.absolute().parent.name
    return Teacher(name or facts.get("name") or stem, config, params, preprocessing, source, report)


def _build_config(found: Checkpoint, overrides: Mapping[str, Any]) -> tuple[VitConfig, tuple[str, ...]]:
    """Shapes, then the file's config, then overrides; notes on what was assumed."""
    settings = {**found.settings, **{key: overrides[key] for key in _CONFIG_FIELDS if key in overrides}}
    asked = {key: settings[key] for key in ("position_on_prefix", "position") if key in settings}
    fields = inference.infer_config(found.state, found.source_name, **asked) | settings
    notes: tuple[str, ...] = ()
    if "num_heads" not in fields:
        heads = architectures.standard_heads(fields["width"])
        if heads is None:
            raise ValueError(
                f"num_heads: no config beside the file names it and width {fields['width']} has no customary one; give "
                "overrides num_heads"
            )
        fields["num_heads"] = heads
        notes = (f"num_heads {heads} assumed: customary for width {fields['width']}",)
    if "image_size" not in fields:
        raise ValueError("image_size: neither rotary positions nor a config beside the file tell it: give overrides")
    config = VitConfig(**fields)
    trained = found.trained_activation
    if trained not in ("", config.activation):
        # What timm computes stays the default: a file of a model that was fine-tuned in timm looks the same.
        note = (
            f"the weights were trained with {trained}, timm computes {config.activation} for this architecture, and so "
            f"does this: unless they were fine-tuned in timm since, give overrides activation "
            f"(--config.teacher.overrides.activation={trained})"
        )
        logging.warning("%s: %s", found.facts.get("name"), note)
        notes += (note,)
    known = {entry.name for entry in canonical.entries(config)}
    unused = [*found.unused, *dict.fromkeys(found.source_name(name) for name in found.state if name not in known)]
    if unused:
        raise ValueError(
            f"{len(unused)} tensors have no place in this architecture: {canonical.shorten(unused)}; if they do not "
            "matter, name them in allow_unused"
        )
    return config, notes


def _resized(
    found: Checkpoint, config: VitConfig, overrides: Mapping[str, Any]
) -> tuple[canonical.State, tuple[str, ...]]:
    """State with the position embedding, where there is one, for the config's image size."""
    if config.position == "rotary":
        return found.state, ()
    variant = overrides.get("position_resize", found.position_resize)
    old, prefix = found.state["pos_embed"], config.num_prefix * config.position_on_prefix
    new = positions.resize_positions(old, prefix, config.image_size // config.patch_size, variant)
    if new is old:
        return found.state, ()
    line = f"{found.source_name('pos_embed')} {list(old.shape)} -> {list(new.shape)} ({variant})"
    return {**found.state, "pos_embed": new}, (line,)


def _build_preprocessing(found: Checkpoint, config: VitConfig, overrides: Mapping[str, Any]) -> Preprocessing:
    fields = {**found.preprocessing, **{key: overrides[key] for key in _PREPROCESSING_FIELDS if key in overrides}}
    if not {"mean", "std"} <= set(fields):
        raise ValueError(
            "mean and std: no config beside the file tells them, and models of this format use different ones "
            f"(ImageNet's {architectures.IMAGENET['mean']}, {architectures.IMAGENET['std']}, or 0.5 for all); give "
            "overrides mean and std"
        )
    fields |= {key: tuple(float(x) for x in fields[key]) for key in ("mean", "std")}
    if len(fields["mean"]) != config.in_channels:
        raise ValueError(f"mean and std: expected {config.in_channels} channels, found {len(fields['mean'])}")
    return Preprocessing(**{**fields, "image_size": config.image_size})


def _readme_licence(path: Path) -> str | None:
    """The `license:` line of a hub repository's README."""
    if not path.is_file():
        return None
    lines = path.read_text(errors="replace").splitlines()[:40]
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), None)


def _random_teacher(name: str, overrides: Mapping[str, Any]) -> Teacher:
    """An architecture of timm's with initial weights from a fixed seed: for plans, benchmarks and tests."""
    fields = {key: overrides[key] for key in _CONFIG_FIELDS if key in overrides}
    config = dataclasses.replace(architectures.architecture_config(name), **fields)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    half = dict.fromkeys(("mean", "std"), (0.5,) * config.in_channels)
    preprocessing = _build_preprocessing(Checkpoint("random", {}, preprocessing=half), config, overrides)
    digest = tree.fingerprint(params)
    report = LoadReport((), (), (), (), digest, "random", ("seeded random weights",))
    source = {"format": "random", "file": name, "sha256": digest, "licence": "none needed", "architecture": name}
    return Teacher(f"random:{name}", config, params, preprocessing, source, report)
