"""Packages, dependency ranges and extras. The tested set is pinned in constraints.txt."""

from setuptools import find_packages, setup

# One line a bound: why it is there.
INSTALL_REQUIRES = [
    "jax>=0.10,<0.12",  # make_mesh axis types and jax.shard_map (core/mesh.py, mtl_moe/moe.py); 0.11 needs Python 3.12
    "flax>=0.12,<0.13",  # Linen as in 0.12
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12,<0.13",  # the CheckpointManager / Composite API used in core/checkpoint.py
    "numpy>=2.0",
    "ml-collections>=1.1",  # typed config overrides from the command line
    "einops>=0.8",
    "absl-py>=2.1",
    "ml-dtypes>=0.5",  # bfloat16 in safetensors
    "safetensors>=0.5",  # reads and writes weight files without running code from them
    "huggingface-hub>=1.0",  # teachers by name: hf-hub:ORGANISATION/NAME
    "scikit-learn>=1.5",  # logistic regression of the probes; its digits are the embedded data of the distiller
    "scipy>=1.15",  # connected regions, Gaussian filters; kmeans2(rng=...) came with 1.15
    "pillow>=11",  # reads every image format but DICOM and NIfTI (extra `medical`)
    "matplotlib>=3.9",  # figures of the report
    "jinja2>=3.1",  # the report page, with escaping
    "markupsafe>=2.1",  # the same: text that is already HTML
    "tqdm>=4.66",  # progress bar
    # Needed by tf.data pipelines, TFDS sources and TensorBoard only: imported where they are used, so that a
    # decoded .npz cache can be trained from on a machine without them (see docs/data.md).
    "tensorflow-cpu>=2.21; platform_machine in 'x86_64 AMD64'",
    "tensorflow>=2.21; platform_machine not in 'x86_64 AMD64'",  # ARM (macOS arm64, Linux aarch64) has no -cpu wheel
    "tensorflow-datasets>=4.9.10",  # first release that works with numpy 2.4 and protobuf 7
    "importlib-resources>=6",  # tensorflow-datasets 4.9.10 imports it without naming it
    "clu>=0.0.12",  # TensorBoard writer
    "tensorboard>=2.19",  # clu's writer imports it; tensorflow 2.21 no longer brings it
]
# python-gdcm decodes the compressed DICOM of hospitals (JPEG lossless, JPEG-LS, JPEG 2000); its licence is Apache-2.0,
# that of pylibjpeg-libjpeg, which pydicom also takes, is GPL.
MEDICAL = ["pydicom>=3", "python-gdcm>=3.0", "nibabel>=5.3"]
EXTRAS = {
    "medical": MEDICAL,
    "cuda": ["jax[cuda13]>=0.10,<0.12"],
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    "torch": ["torch>=2.4"],  # reads .pth files, through weights_only=True
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.15", *MEDICAL],
    # Independent references. Tests that need them are skipped without; stored outputs of theirs are always compared.
    "parity": ["torch>=2.4", "timm>=1.0.12", "transformers>=5", "onnx>=1.17", "onnxruntime>=1.20"],
}

setup(
    name="mtl-moe-vit-distill",
    version="0.1.0",
    description="Multi-task Mixture-of-Experts anomaly detection and few-shot ViT distillation in JAX",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",  # TensorFlow has no wheels for 3.14
    packages=find_packages(include=["mtl_moe*", "vit_distill*", "input_pipeline*", "core*", "configs*"]),
    package_data={"core": ["report_template.html"]},
    py_modules=["main"],
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mtl-moe-vit-distill=main:run"]},
)
