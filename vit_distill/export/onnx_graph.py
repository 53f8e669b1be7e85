"""VisionTransformer as an ONNX graph, node by node: no tracer, no torch.

Input "images" [batch, C, H, W], float32, normalised; outputs as in `compare.named_outputs`. The batch is dynamic. Axes:
B batch, H W C image, P patch side, N tokens, D width, K heads.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from core.rotary import angles
from core.transformer import block_name
from core.vit import VitConfig

# LayerNormalization came with 17; every runtime since 2022 reads it, so no newer operator is used.
OPSET = 17
IR_VERSION = 8


def build_onnx(config: VitConfig, params: Mapping[str, Any], name: str) -> Any:
    """The model as an onnx.ModelProto called `name`, with float32 weights inside."""
    from onnx import TensorProto, helper

    graph = _Graph(config, params)
    tokens, pooled, logits = graph.build()
    side = config.image_size
    shapes = {"tokens": (tokens, [config.num_tokens, config.width]), "pooled": (pooled, [config.width])}
    if logits:
        shapes["logits"] = (logits, [config.num_classes])
    for output, (value, _) in shapes.items():
        graph.nodes.append(helper.make_node("Identity", [value], [output]))
    info = helper.make_tensor_value_info
    built = helper.make_graph(
        graph.nodes,
        name,
        [info("images", TensorProto.FLOAT, ["batch", config.in_channels, side, side])],
        [info(output, TensorProto.FLOAT, ["batch", *shape]) for output, (_, shape) in shapes.items()],
        graph.initializers,
    )
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="vit_distill")
    model.ir_version = IR_VERSION
    return model


class _Graph:
    """Nodes and weights under construction. Methods take and give names of values."""

    def __init__(self, config: VitConfig, params: Mapping[str, Any]):
        self.config, self.params = config, params
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; the name of its output, or a list of names."""
        from onnx import helper

        names = [f"{kind.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, name: str = "") -> str:
        """Adds an array; floats become float32, integers int64. Its name is `name` or a number."""
        from onnx import numpy_helper

        array = np.asarray(value)
        array = np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int64)
        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array.reshape(np.shape(value)), name))
        return name

    def build(self) -> tuple[str, str, str]:
        """The whole model; names of tokens, pooled and logits ("" without a head)."""
        cfg = self.config
        x = self.embed("images")
        if cfg.pre_norm:
            x = self.norm(x, "norm_pre")
        for i in range(cfg.depth):
            x = self.block(x, block_name(i))
        tokens = self.norm(x, "norm") if cfg.final_norm == "tokens" else x
        start, end = (0, 1) if cfg.pool == "token" else (cfg.num_prefix, cfg.num_tokens)
        patches = self.op("Slice", tokens, *(self.constant([value]) for value in (start, end, 1)))
        if cfg.pool == "attention":
            patches = self.pool(patches, "pool")  # one token
        pooled = self.op("ReduceMean", patches, axes=[1], keepdims=0)
        if cfg.final_norm == "pooled":
            pooled = self.norm(pooled, "norm")
        return tokens, pooled, self.dense(pooled, "head") if cfg.num_classes else ""

    def embed(self, images: str) -> str:
        """[B, C, H, W] -> [B, N, D] with prefix tokens and positions."""
        cfg = self.config
        patch, width = cfg.patch_size, cfg.width
        kernel = np.asarray(self.leaf("embed/proj/kernel")).reshape(patch, patch, cfg.in_channels, width)
        weights = [self.constant(kernel.transpose(3, 2, 0, 1), "embed/proj/kernel")]
        if cfg.patch_bias:
            weights.append(self.weight("embed/proj/bias"))
        x = self.op("Conv", images, *weights, kernel_shape=[patch, patch], strides=[patch, patch])
        x = self.op("Transpose", self.reshape(x, 0, width, cfg.num_patches), perm=[0, 2, 1])
        learned = cfg.position == "learned"
        position = self.weight("pos_embedding") if learned else ""
        if learned and not cfg.position_on_prefix:
            x = self.op("Add", x, position)
        if cfg.num_prefix:
            batch = self.op("Slice", self.op("Shape", x), self.constant([0]), self.constant([1]))
            shape = self.op("Concat", batch, self.constant([1, 1]), axis=0)
            names = ["cls_token"] * cfg.class_token + ["reg_tokens"] * bool(cfg.num_registers)
            prefix = [self.op("Expand", self.weight(name), shape) for name in names]
            x = self.op("Concat", *prefix, x, axis=1)
        return self.op("Add", x, position) if learned and cfg.position_on_prefix else x

    def block(self, x: str, path: str) -> str:
        y = self.attention(self.norm(x, f"{path}/norm1"), f"{path}/attn")
        x = self.op("Add", x, self.scaled(y, f"{path}/ls1"))
        y = self.mlp(self.norm(x, f"{path}/norm2"), f"{path}/mlp")
        return self.op("Add", x, self.scaled(y, f"{path}/ls2"))

    def pool(self, x: str, path: str) -> str:
        """`core.transformer.AttentionPool`, its one token [B, 1, D]."""
        x = self.attention(x, f"{path}/attn", asking=self.weight(f"{path}/query_token"))
        return self.op("Add", x, self.mlp(self.norm(x, f"{path}/norm"), f"{path}/mlp"))

    def attention(self, x: str, path: str, asking: str = "") -> str:
        """`core.transformer.SelfAttention`; one token `asking` [1, 1, D] serves the batch."""
        cfg = self.config
        head_dim = cfg.width // cfg.num_heads

        def heads(name: str, perm: list[int]) -> str:
            asked = asking if asking and name == "query" else x
            flat = self.dense(asked, f"{path}/{name}", (cfg.width, cfg.width))
            parted = self.reshape(flat, 0, 0, cfg.num_heads, head_dim)
            if cfg.rotary and name != "value":
                parted = self.rotated(parted, angles(cfg.rotary, head_dim))
            return self.op("Transpose", parted, perm=perm)

        query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
        logits = self.op("Mul", self.op("MatMul", query, key), self.constant(head_dim**-0.5))
        mixed = self.op("MatMul", self.op("Softmax", logits, axis=-1), value)
        mixed = self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, cfg.width)
        return self.dense(mixed, f"{path}/out", (cfg.width, cfg.width))

    def rotated(self, x: str, turned: np.ndarray) -> str:
        """`core.rotary.rotate` of [B, N, K, Dh] by angles [N, Dh / 2]."""
        cos, sin = (self.constant(np.tile(values(turned), 2)[:, None]) for values in (np.cos, np.sin))
        halves = self.op("Split", x, self.constant([turned.shape[1]] * 2), outputs=2, axis=-1)
        other = self.op("Concat", self.op("Neg", halves[1]), halves[0], axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", other, sin))

    def mlp(self, x: str, path: str) -> str:
        hidden = self.dense(x, f"{path}/fc1")
        if self.config.mlp == "swiglu":
            sizes = self.constant([self.config.mlp_dim] * 2)
            gate, value = self.op("Split", hidden, sizes, outputs=2, axis=-1)
            hidden = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), value)
        else:
            hidden = self.activation(hidden)
        return self.dense(hidden, f"{path}/fc2")

    def activation(self, x: str) -> str:
        """A key of core.transformer.ACTIVATIONS, written out: the operator Gelu came only with opset 20."""
        if self.config.activation == "quick_gelu":
            return self.op("Mul", x, self.op("Sigmoid", self.op("Mul", x, self.constant(1.702))))
        if self.config.activation == "gelu":
            gate = self.op("Erf", self.op("Mul", x, self.constant(math.sqrt(0.5))))
        else:
            cubic = self.op("Mul", self.op("Mul", x, self.op("Mul", x, x)), self.constant(0.044715))
            gate = self.op("Tanh", self.op("Mul", self.op("Add", x, cubic), self.constant(math.sqrt(2 / math.pi))))
        gate = self.op("Mul", self.op("Add", gate, self.constant(1.0)), self.constant(0.5))
        return self.op("Mul", x, gate)

    def dense(self, x: str, path: str, shape: tuple[int, int] | None = None) -> str:
        """x @ kernel + bias (if there is one); kernels over heads are flattened to `shape`."""
        kernel = np.asarray(self.leaf(f"{path}/kernel"))
        out = self.op("MatMul", x, self.constant(kernel.reshape(shape or kernel.shape), f"{path}/kernel"))
        if "bias" not in self.leaf(path):
            return out
        return self.op("Add", out, self.constant(np.ravel(self.leaf(f"{path}/bias")), f"{path}/bias"))

    def norm(self, x: str, path: str) -> str:
        weights = (self.weight(f"{path}/scale"), self.weight(f"{path}/bias"))
        return self.op("LayerNormalization", x, *weights, axis=-1, epsilon=self.config.norm_eps)

    def scaled(self, y: str, path: str) -> str:
        return self.op("Mul", y, self.weight(path)) if self.config.layer_scale else y

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.constant(list(shape)))

    def weight(self, path: str) -> str:
        return self.constant(np.asarray(self.leaf(path)), path)

    def leaf(self, path: str) -> Any:
        """The parameter, or the subtree, under a path such as "block_00/norm1/scale"."""
        return functools.reduce(lambda node, name: node[name], path.split("/"), self.params)
