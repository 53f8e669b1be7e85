"""The detector's network: one trunk, expert blocks told the task, a light head per task; all views in one forward.

Axes: B images, V views (of all tasks), R = B * V rows, N tokens, h w token grid, D width, T tasks, E experts.
A view of an image for a task is one row with a task id. The dense trunk does not know the task; then a task embedding
is added and the Mixture-of-Experts blocks (the encoder's last and the decoder neck) choose experts by token and task.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from core.dense import Dense, activation_dtype
from core.transformer import EncoderBlock, Mlp, PatchEmbed, block_name, patchify, unpatchify
from mtl_moe.moe import Dispatch, MoeMlp, active_hidden_dim, total_hidden_dim
from mtl_moe.tasks import Geometry, Task

MLP_KINDS = ("moe", "dense_active", "dense_params")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; see configs/common.py for the presets and what each field means."""

    width: int
    num_heads: int
    patch_size: int
    num_dense_layers: int
    num_moe_layers: int
    num_neck_layers: int
    mlp_dim: int
    mlp: str
    num_experts: int
    expert_dim: int
    shared_expert: bool
    top_k: int
    router: str

    def __post_init__(self):
        if self.mlp not in MLP_KINDS:
            raise ValueError(f"model.mlp: expected one of {MLP_KINDS}, found {self.mlp!r}")
        for name in ("width", "num_heads", "patch_size", "mlp_dim", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("num_dense_layers", "num_moe_layers", "num_neck_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}: expected at least 0, found {getattr(self, name)}")


def expert_blocks(config: ModelConfig) -> list[str]:
    """Names of the blocks that are told the task, in their order: the encoder's last, then the neck's."""
    names = [f"expert_{i:02d}" for i in range(config.num_moe_layers)]
    return names + [f"neck_{i:02d}" for i in range(config.num_neck_layers)]


class Trunk(nn.Module):
    """Dense encoder without knowledge of the task: inputs [R, H, W, C + 1] -> tokens [R, N, D]."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, use_position: jax.Array) -> jax.Array:
        """`use_position` is float {0, 1} [R]: whether the row gets the position embedding."""
        cfg = self.config
        x = PatchEmbed(cfg.width, cfg.patch_size, dtype=self.dtype, name="embed")(2.0 * inputs - 1.0)
        position = self.param("pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], cfg.width))
        x = x + (position * use_position[:, None, None]).astype(x.dtype)
        for i in range(cfg.num_dense_layers):
            block = EncoderBlock(
                cfg.num_heads,
                lambda name: Mlp(cfg.mlp_dim, dtype=self.dtype, name=name),
                dtype=self.dtype,
                name=block_name(i),
            )
            x, _ = block(x)
        return x


class Detector(nn.Module):
    """See the module's docstring; `dispatch` as in `mtl_moe.moe.apply_experts`."""

    config: ModelConfig
    tasks: Sequence[Task]
    image_size: int
    dtype: Any = jnp.float32
    mesh: Mesh | None = None
    dispatch: Dispatch = "auto"

    @nn.compact
    def __call__(
        self, inputs: Mapping[str, jax.Array], *, train: bool, shared_views: bool = False
    ) -> tuple[dict[str, jax.Array], dict[str, Mapping[str, jax.Array]]]:
        """Solves tasks on their views.

        Args:
          inputs: by task name, float32 [V_t, B, H, W, C + 1]; any non-empty subset of the model's tasks.
          train: adds router noise (needs the rng stream "router").
          shared_views: the inputs are the tasks' `views` of the same images: the trunk, which knows no task, runs once
            for those that are the same. Same result to float rounding.

        Returns:
          Head outputs by task name, float32 [V_t, B, H, W, dim] or [V_t, B, h, w, dim]; and by expert block its
          balance losses and router statistics (empty for dense controls).
        """
        cfg = self.config
        tasks = [(index, task) for index, task in enumerate(self.tasks) if task.name in inputs]
        counts = [inputs[task.name].shape[0] for _, task in tasks]
        batch = inputs[tasks[0][1].name].shape[1]
        # Rows of one image side by side: with images split over devices every device keeps its own.
        rows = jnp.concatenate([inputs[task.name] for _, task in tasks], axis=0)
        rows = rearrange(rows, "v b h w c -> (b v) h w c")
        by_view = [(index, task.use_position) for (index, task), count in zip(tasks, counts, strict=True)
                   for _ in range(count)]  # fmt: skip
        task_ids = jnp.tile(jnp.array([index for index, _ in by_view], jnp.int32), batch)
        use_position = jnp.tile(jnp.array([float(use) for _, use in by_view]), batch)

        trunk = Trunk(cfg, dtype=self.dtype, name="trunk")
        if shared_views:
            different, of_view = distinct_views([task for _, task in tasks])
            x = rearrange(rows, "(b v) h w c -> b v h w c", b=batch)[:, different]
            with_position = use_position.reshape(batch, -1)[:, different].reshape(-1)
            x = trunk(rearrange(x, "b u h w c -> (b u) h w c"), with_position)
            x = rearrange(rearrange(x, "(b u) n d -> b u n d", b=batch)[:, of_view], "b v n d -> (b v) n d")
        else:
            x = trunk(rows, use_position)
        embedding = self.param("task_embedding", nn.initializers.normal(0.02), (len(self.tasks), cfg.width))
        x = x + embedding[task_ids][:, None].astype(x.dtype)
        make_mlp = functools.partial(_expert_mlp, cfg, len(self.tasks), self.dtype, self.mesh, self.dispatch)
        aux = {}
        for name in expert_blocks(cfg):
            block = EncoderBlock(cfg.num_heads, make_mlp, dtype=self.dtype, name=name)
            if cfg.mlp == "moe":
                x, aux[name] = block(x, task_ids, not train)
            else:
                x, _ = block(x)

        x = rearrange(x, "(b v) n d -> b v n d", b=batch)
        outputs, start = {}, 0
        for (_, task), count in zip(tasks, counts, strict=True):
            views = inputs[task.name].swapaxes(0, 1)
            outputs[task.name] = self._head(task, x[:, start : start + count], views).swapaxes(0, 1)
            start += count
        return outputs, aux

    def _head(self, task: Task, x: jax.Array, views: jax.Array) -> jax.Array:
        """Tokens [B, V, N, D] and the views they were made from [B, V, H, W, C + 1] to the output [B, V, ...]: layer
        norm and one linear layer.

        Heads of pixels have a hidden layer that also reads the patch's own pixels, as the skip connections of a U-Net
        do: tokens need not carry every detail, and an error is a change the model wants, not what it could not store.
        Hidden pixels are grey there as in the view.
        """
        batch, num_views, tokens, width = x.shape
        patch = self.config.patch_size
        pixels = task.head.kind == "pixels"
        dim = task.head.dim * (patch**2 if pixels else 1)
        dtype = activation_dtype(self.dtype)
        flat = nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=f"norm_{task.name}")(x.reshape(-1, width))
        if pixels:
            detail = patchify(2.0 * views.reshape(-1, *views.shape[2:]) - 1.0, patch).astype(dtype)
            flat = jnp.concatenate([flat, detail.reshape(flat.shape[0], -1)], axis=-1)
            flat = jax.nn.gelu(Dense((2 * width,), dtype=self.dtype, name=f"detail_{task.name}")(flat))
        out = Dense((dim,), dtype=self.dtype, name=f"head_{task.name}")(flat)
        out = out.reshape(batch * num_views, tokens, dim).astype(jnp.float32)
        if pixels:
            out = unpatchify(out, patch, self.image_size)
        else:
            out = rearrange(out, "r (h w) d -> r h w d", h=self.image_size // patch)
        return out.reshape(batch, num_views, *out.shape[1:])


def distinct_views(tasks: Sequence[Task]) -> tuple[np.ndarray, np.ndarray]:
    """Of all tasks' views, one after the other: the first of each that differs for the trunk [U], and which of these
    every view is [V]."""
    keys = [(name, task.use_position) for task in tasks for name in task.view_names]
    different = list(dict.fromkeys(keys))
    return np.array([keys.index(key) for key in different]), np.array([different.index(key) for key in keys])


def _expert_mlp(
    cfg: ModelConfig, num_tasks: int, dtype: Any, mesh: Mesh | None, dispatch: Dispatch, name: str
) -> nn.Module:
    """The MLP of an expert block. A function, not a method: Linen would make a method's modules the detector's own."""
    if cfg.mlp == "moe":
        return MoeMlp(
            num_experts=cfg.num_experts,
            hidden_dim=cfg.expert_dim,
            num_tasks=num_tasks,
            top_k=cfg.top_k,
            shared_expert=cfg.shared_expert,
            router=cfg.router,
            dtype=dtype,
            mesh=mesh,
            dispatch=dispatch,
            name=name,
        )
    if cfg.mlp == "dense_active":
        hidden = active_hidden_dim(cfg.expert_dim, cfg.top_k, cfg.shared_expert)
    else:
        hidden = total_hidden_dim(cfg.expert_dim, cfg.num_experts, cfg.shared_expert)
    return Mlp(hidden, dtype=dtype, name=name)


def build_model_config(config: Any) -> ModelConfig:
    """`config.model` as a ModelConfig.

    Raises:
      ValueError: for an unknown field or kind.
    """
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    found = set(config)
    if fields != found:
        raise ValueError(f"model: missing {sorted(fields - found)}, unknown {sorted(found - fields)}")
    return ModelConfig(**{name: config[name] for name in fields})


def build_geometry(config: Any) -> Geometry:
    """Sizes from `config.data` and `config.model`.

    Raises:
      ValueError: if the side of image or tile is not a whole number of patches, or the tile larger than the image.
    """
    field = "tile_size" if config.data.tile_size else "image_size"
    size, patch = config.data[field], config.model.patch_size
    if patch < 1 or size < patch or size % patch:
        raise ValueError(f"data.{field}={size} is not a multiple of model.patch_size={patch}")
    if size > config.data.image_size:
        raise ValueError(f"data.tile_size={size} is larger than data.image_size={config.data.image_size}")
    return Geometry(size, patch, config.data.channels, config.model.width)


def trunk_tokens(config: ModelConfig, trunk_params: Any, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Tokens of clean images [B, H, W, C] by a trunk alone, each token of zero mean and unit variance: [B, h, w, D]."""
    inputs = jnp.concatenate([images, jnp.zeros_like(images[..., :1])], -1)
    x = Trunk(config, dtype=dtype).apply({"params": trunk_params}, inputs, jnp.ones(images.shape[0]))
    x = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=1e-6)
    return rearrange(x, "b (h w) d -> b h w d", h=images.shape[1] // config.patch_size)
