"""What a vision transformer and its distillation cost: multiply-adds and memory, counted from shapes alone.

Counted are the matrix products, one multiply-add (MAC) a product term, 2 FLOPs a MAC; norms, activations and the
optimiser are left out (elementwise: below a tenth even for tiny models, tests/vit_distill/test_flops.py). Axes:
B batch, N tokens, D width, K heads, R rank, L layers, M the MLP's hidden width.
"""

import dataclasses
from collections.abc import Collection, Mapping

from core.tree import num_params
from core.vit import VitConfig, abstract_params
from vit_distill.lora import TARGETS, LoraConfig
from vit_distill.student import METHODS

FLOPS_PER_MAC = 2


@dataclasses.dataclass(frozen=True)
class ForwardCost:
    """MACs of one image through a model.

    Attributes:
      embed, attention, mlp, head: patch embedding; attention and MLP of ONE block; classifier (0 without).
      depth: L.
      pool: attention pooling (0 without).
    """

    embed: int
    attention: int
    mlp: int
    head: int
    depth: int
    pool: int = 0

    @property
    def block(self) -> int:
        return self.attention + self.mlp

    @property
    def encoder(self) -> int:
        """All but pooling and head: what distillation runs."""
        return self.embed + self.depth * self.block

    @property
    def total(self) -> int:
        return self.encoder + self.pool + self.head


@dataclasses.dataclass(frozen=True)
class StepCost:
    """MACs of one update over the whole batch.

    Attributes:
      teacher: the teacher's forward pass; 0 with cached features.
      forward, backward: of the student.
      merge: A B of the adapters, once a micro-batch; with DoRA also the gradients of both factors.
    """

    teacher: int
    forward: int
    backward: int
    merge: int

    @property
    def total(self) -> int:
        return self.teacher + self.forward + self.backward + self.merge


def dense_shapes(config: VitConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each dense layer of a block, by the name of its LoRA target."""
    width, hidden = config.width, config.mlp_dim
    square = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    return square | {"fc1": (width, 2 * hidden if config.mlp == "swiglu" else hidden), "fc2": (hidden, width)}


def forward_cost(config: VitConfig) -> ForwardCost:
    """MACs of one image [H, W, C] of `config.image_size`."""
    tokens, width = config.num_tokens, config.width
    dense = {name: tokens * inputs * outputs for name, (inputs, outputs) in dense_shapes(config).items()}
    mlp = dense["fc1"] + dense["fc2"]
    pool = 0
    if config.pool == "attention":  # query, out and MLP of one token; key, value and two products of the patches
        pool = 2 * width * (width + config.mlp_dim) + 2 * config.num_patches * width * (width + 1)
    return ForwardCost(
        embed=config.num_patches * config.patch_size**2 * config.in_channels * width,
        attention=sum(dense.values()) - mlp + 2 * tokens**2 * width,
        mlp=mlp,
        head=width * config.num_classes,
        depth=config.depth,
        pool=pool,
    )


def backward_macs(
    config: VitConfig,
    kernels: Collection[str] | None,
    norms: bool = False,
    biases: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> int:
    """MACs of the gradient for one image, from the loss on the last block's tokens down.

    Products whose result nobody needs are not counted (JAX leaves them out too): no gradient of frozen kernels, none
    below the first trained parameter.

    Args:
      kernels: LoRA targets whose kernels get a gradient in every block; None: every parameter of the model is trained.
      norms, biases: whether the blocks' norms or the dense layers' biases are trained as well.
      ranks: of low-rank factors that get the gradient instead of the named kernels (`lora.attach`).
    """
    everything = kernels is None
    kernels = set(TARGETS) if everything else set(kernels)
    if not (kernels or norms or biases):
        return 0
    options = {"norms": norms, "biases": biases, "ranks": ranks or {}}
    first = _block_backward(config, kernels, upstream=everything, **options)
    others = _block_backward(config, kernels, upstream=True, **options)
    embed = forward_cost(config).embed if everything else 0  # of its kernel; pixels need no gradient
    return embed + first + (config.depth - 1) * others


def _block_backward(
    config: VitConfig,
    kernels: Collection[str],
    *,
    upstream: bool,
    norms: bool,
    biases: bool,
    ranks: Mapping[str, int],
) -> int:
    """As `backward_macs`, of one block; `upstream`: whether its input depends on trained parameters."""
    tokens, width = config.num_tokens, config.width
    dense = {name: tokens * inputs * outputs for name, (inputs, outputs) in dense_shapes(config).items()}
    # Of factors: x A and g B^T, and from these the gradients of B and A.
    low_rank = {name: 2 * tokens * rank * sum(dense_shapes(config)[name]) for name, rank in ranks.items()}
    macs = sum((dense | low_rank)[name] for name in kernels)
    touched = set(TARGETS) if biases else set(kernels)
    depends = upstream or norms  # the input of query, key and value depends on trained parameters
    query, key, value = (depends or name in touched for name in ("query", "key", "value"))
    if depends:
        macs += dense["query"] + dense["key"] + dense["value"]
    # Gradients of query, key, the attention weights and value, each one product.
    macs += (query + key + (query or key) + value) * tokens**2 * width
    if query or key or value:
        macs += dense["out"]
    depends = depends or bool(touched & {"query", "key", "value", "out"})
    macs += dense["fc1"] if depends else 0
    return macs + (dense["fc2"] if depends or "fc1" in touched else 0)


def merge_macs(config: VitConfig, ranks: Mapping[str, int]) -> int:
    """MACs of A B for every adapter of the model; `ranks`: rank by LoRA target."""
    shapes = dense_shapes(config)
    return config.depth * sum(shapes[name][0] * rank * shapes[name][1] for name, rank in ranks.items())


def step_cost(
    student: VitConfig,
    teacher: VitConfig,
    batch_size: int,
    method: str,
    lora: LoraConfig | None = None,
    *,
    accumulation: int = 1,
    cached: bool = False,
) -> StepCost:
    """MACs of one update in float32 (in bfloat16 factors are applied beside the kernel: near enough the same).

    Args:
      method: "lora" | "full" | "scratch" | "copy" (no training: all zero).
      lora: needed for "lora" only.
      accumulation: micro-batches; the adapters are merged anew in each.
      cached: whether the teacher's features are stored and its forward pass falls away.

    Raises:
      ValueError: for another method, or "lora" without its config.
    """
    if method not in METHODS:
        raise ValueError(f"student.method: expected one of {METHODS}, found {method!r}")
    if method == "copy":
        return StepCost(0, 0, 0, 0)
    if method == "lora" and lora is None:
        raise ValueError('method "lora" needs the LoRA config')
    merge, kernels, norms, biases, ranks = 0, None, True, True, {}
    if method == "lora":
        ranks = dict(lora.ranks)
        merge = (3 if lora.dora else 1) * accumulation * merge_macs(student, ranks)
        kernels, norms, biases = set(ranks), lora.train_norms, lora.train_biases
    return StepCost(
        teacher=0 if cached else batch_size * forward_cost(teacher).encoder,
        forward=batch_size * forward_cost(student).encoder,
        backward=batch_size * backward_macs(student, kernels, norms, biases, {} if lora and lora.dora else ranks),
        merge=merge,
    )


def model_size(config: VitConfig) -> dict[str, int | float]:
    """Parameters (with the head), bytes in float32 and GFLOPs an image (2 a MAC, with the head)."""
    params = num_params(abstract_params(config))
    return {
        "depth": config.depth,
        "params": params,
        "bytes": 4 * params,
        "gflops": FLOPS_PER_MAC * forward_cost(config).total / 1e9,
    }


def train_memory(
    student: VitConfig,
    teacher: VitConfig,
    teacher_batch: int,
    micro_batch: int,
    method: str,
    num_trained: int,
    *,
    compute_bytes: int = 4,
    teacher_bytes: int = 4,
    ranks: Mapping[str, int] | None = None,
    cached: bool = False,
) -> dict[str, int]:
    """Estimated bytes of training by what they hold, and their "total"; an estimate: XLA fuses and reuses buffers.

    Args:
      teacher_batch, micro_batch: images that the teacher and the student's gradient take at once.
      num_trained: trained scalars (`core.tree.num_params`), float32: value, average, two moments and gradient.
      compute_bytes, teacher_bytes: bytes a number of the student's computation and of the teacher.
      ranks: of the adapters; the adapted kernels exist once more merged.
      cached: no teacher in memory.

    Activations kept for the gradient: 8 D + 2 M + K N numbers a token and block (Korthikanti et al., arXiv 2205.05198,
    without dropout). K N, the attention weights, are counted always, though fused attention never writes them: there
    the estimate is too high.
    """
    student_size, teacher_size = (num_params(abstract_params(config)) for config in (student, teacher))
    memory = {
        "teacher": 0 if cached else teacher_bytes * teacher_size,
        "student": 4 * student_size if method == "lora" else 0,  # otherwise the trained weights are the student
        "training state": 5 * 4 * num_trained,
        "merged kernels": 0,
        "activations": compute_bytes * micro_batch * student.depth * _kept_per_block(student),
        "teacher activations": 0 if cached else teacher_bytes * teacher_batch * _kept_per_block(teacher),
    }
    if method == "lora":
        shapes = dense_shapes(student)
        memory["merged kernels"] = 4 * student.depth * sum(shapes[t][0] * shapes[t][1] for t in dict(ranks or {}))
    return memory | {"total": sum(memory.values())}


def _kept_per_block(config: VitConfig) -> int:
    hidden = (3 if config.mlp == "swiglu" else 2) * config.mlp_dim
    return config.num_tokens * (8 * config.width + hidden + config.num_heads * config.num_tokens)
