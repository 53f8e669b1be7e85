"""A merged student as files that other tools load: timm, Hugging Face, adapters only, StableHLO, ONNX.

`export.export` writes, reloads, compares and only then moves into place; one module per format we write ourselves.
"""
