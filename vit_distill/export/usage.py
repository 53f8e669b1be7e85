"""Python code for the model card: loads an export and computes the features of image.jpg.

Every snippet stands for itself, expects to run in the export's own folder and ends with `features`.
"""

from pathlib import Path

from vit_distill.export.other_tools import transformers_class
from vit_distill.student import Student

_TIMM = """
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("image.jpg").convert("{mode}")
features = model.forward_head(model.forward_features(transform(image)[None]), pre_logits=True)
"""

_HUGGING_FACE = """
from PIL import Image
from transformers import AutoImageProcessor, {name}

processor = AutoImageProcessor.from_pretrained(".")
model = {name}.from_pretrained("."{options}).eval()
image = processor(Image.open("image.jpg").convert("{mode}"), return_tensors="pt")
features = model.base_model(**image).{feature}
"""

_ADAPTERS = """
from core.vit import VisionTransformer
from vit_distill.export.adapters import load_adapters
from vit_distill.teacher import load_teacher

teacher = load_teacher("TEACHER")  # the file named above; another one is refused
student = load_adapters(".", teacher)
{image}
features = VisionTransformer(student.config).apply({{"params": student.params}}, image).pooled
"""

_STABLEHLO = """
from pathlib import Path

import jax.export

model = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
{image}
features = model.call(image)["pooled"]  # also "tokens" and, with a head, "logits"; any number of images
"""

_ONNX = """
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
{image}
image = image.transpose(0, 3, 1, 2)
features = session.run(["pooled"], {{"images": image}})[0]  # also "tokens" and, with a head, "logits"
"""

_IMAGE = """
import numpy as np
from PIL import Image, ImageOps

image = Image.open("image.jpg").convert("{mode}")
image = ImageOps.fit(image, ({resize}, {resize}), Image.Resampling.{interpolation})
image = image.crop(({start}, {start}, {end}, {end}))
image = np.float32(image).reshape(1, {size}, {size}, {channels}) / 255
image = (image - np.float32({mean})) / np.float32({std})
"""


def usage(student: Student, kind: str, folder: Path) -> str:
    """The snippet for an export of this kind, written to `folder`, with the student's preprocessing."""
    mode = "L" if student.config.in_channels == 1 else "RGB"
    if kind == "huggingface":
        name, options = transformers_class(folder)
        options = "".join(f", {key}={value}" for key, value in options.items())
        feature = "pooler_output" if student.config.pool == "attention" else "last_hidden_state[:, 0]"
        return _HUGGING_FACE.strip().format(name=name, options=options, mode=mode, feature=feature)
    if kind == "timm":
        return _TIMM.strip().format(mode=mode)
    p = student.preprocessing
    start = round((p.resize_size - p.image_size) / 2)
    image = _IMAGE.strip().format(
        mode=mode,
        resize=p.resize_size,
        interpolation=p.interpolation.upper(),
        start=start,
        end=start + p.image_size,
        size=p.image_size,
        channels=student.config.in_channels,
        mean=list(p.mean),
        std=list(p.std),
    )
    return {"adapters": _ADAPTERS, "stablehlo": _STABLEHLO, "onnx": _ONNX}[kind].strip().format(image=image)
