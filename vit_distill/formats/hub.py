"""Checkpoints of the Hugging Face hub, through the optional package huggingface_hub; cached, offline afterwards."""

from pathlib import Path

_FILES = (
    "config.json", "preprocessor_config.json", "README.md", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "*.npz",
)  # fmt: skip


def download(name: str) -> Path:
    """Folder in the hub's cache with "ORG/NAME" or "ORG/NAME@REVISION"; weights as safetensors or npz only.

    Raises:
      ValueError: without the package, without network and cache, if there is no such repository or no such weights.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(
            f"hf-hub:{name} needs the package huggingface_hub: pip install huggingface-hub, or download the "
            "repository's folder by other means and give its path"
        ) from error
    repository, _, revision = name.partition("@")
    options = {"repo_id": repository, "revision": revision or None, "allow_patterns": list(_FILES)}
    try:
        # Falls back to the cache by itself when the hub cannot be reached.
        folder = Path(huggingface_hub.snapshot_download(**options))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ValueError(f"hf-hub:{name}: no such repository or revision, or it is private: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"hf-hub:{name}: not in the cache, and the hub cannot be reached. Load it once with network, or give the "
            f"path of a downloaded folder ({type(error).__name__})"
        ) from error
    if not any(path.suffix in (".safetensors", ".npz") for path in folder.iterdir()):
        raise ValueError(
            f"hf-hub:{name}: holds neither model.safetensors, whole or in parts, nor .npz; pickled weights "
            "(pytorch_model.bin) are not fetched: take another revision, or write a folder with "
            "timm.models.save_for_hf or save_pretrained, both with safe_serialization=True, and give its path"
        )
    return folder
