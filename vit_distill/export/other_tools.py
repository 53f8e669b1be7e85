"""Exported folders read by the tools they are made for: timm and transformers, where they are installed.

Axes: B batch, H W C image. Readers take uint8 images [B, S, S, C] at the student's `resize_size`, and normalise them as
the tool says.
"""

import importlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vit_distill.export.compare import Outputs
from vit_distill.preprocessing import Preprocessing

Reader = Callable[[np.ndarray], Outputs]


# What must import for a tool to work: transformers itself imports lazily.
_PROBES = {"timm": ("torch", "timm"), "transformers": ("torch", "transformers.models.vit.modeling_vit")}


def unavailable(tool: str) -> str:
    """Why `tool` cannot be used here, "" if it can: it is not installed, or its installation is broken."""
    try:
        for name in _PROBES[tool]:
            importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: builds of torch that do not fit together
        return f"cannot be imported: {error}"
    return ""


def with_version(tool: str) -> str:
    """For example "timm 1.0.31"."""
    return f"{tool} {importlib.metadata.version(tool)}"


def read_timm(folder: Path) -> Reader:
    """Model of a timm folder, loaded strictly by timm.create_model."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    preprocessing = Preprocessing(data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]))

    @torch.inference_mode()
    def call(images: np.ndarray) -> Outputs:
        tokens = model.forward_features(_planes(preprocessing, images))
        found = {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True)}
        if model.num_classes:
            found["logits"] = model.forward_head(tokens)
        return {name: value.numpy() for name, value in found.items()}

    return call


def transformers_class(folder: Path) -> tuple[str, dict[str, Any]]:
    """Class that the config.json of a folder names, and what its from_pretrained needs beside the folder."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    # Alone, transformers' ViT would add a layer after the encoder that no student has.
    return name, {"add_pooling_layer": False} if name == "ViTModel" else {}


def read_transformers(folder: Path) -> Reader:
    """Model of a Hugging Face folder, of the class its config names.

    Raises:
      ValueError: if transformers left weights of the model or tensors of the file out.
    """
    import torch
    import transformers

    name, options = transformers_class(folder)
    model, loading = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    wrong = {key: sorted(map(str, values)) for key, values in loading.items() if values}
    if wrong:
        raise ValueError(f"{name} did not load strictly: {wrong}")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    preprocessing = Preprocessing(model.config.image_size, mean, std)
    model.eval()

    @torch.inference_mode()
    def call(images: np.ndarray) -> Outputs:
        planes = _planes(preprocessing, images)
        out = model.base_model(planes)
        found = {"tokens": out.last_hidden_state}
        if name == "SiglipVisionModel":
            found["pooled"] = out.pooler_output
        if hasattr(model, "classifier"):
            found["logits"] = model(planes).logits
        return {name: value.numpy() for name, value in found.items()}

    return call


def _planes(preprocessing: Preprocessing, images: np.ndarray) -> Any:
    """uint8 [B, S, S, C] -> normalised torch [B, C, H, W]."""
    import torch

    return torch.from_numpy(np.array(preprocessing.evaluate(images)).transpose(0, 3, 1, 2).copy())
