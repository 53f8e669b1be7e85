"""Counted multiply-adds against XLA's own count of compiled programs, and against numbers worked out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from core.tree import num_params, paths
from core.vit import VisionTransformer, VitConfig, abstract_params
from vit_distill import flops
from vit_distill.lora import LoraConfig, attach, init_adapters

SMALL = VitConfig(depth=3, width=96, num_heads=3, mlp_dim=384, patch_size=8, image_size=32)
VIT_B = VitConfig(depth=12, width=768, num_heads=12, mlp_dim=3072, patch_size=16, image_size=224, num_classes=1000)
BATCH, RANK = 4, 8
# XLA counts elementwise operations too; at this width they add up to a seventh to the products.
ABOVE = 1.15


def xla_flops(fn, *args) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def traced_macs(fn, *args) -> int:
    """Multiply-adds of the matrix products that the function's results need: exact, whatever a compiler makes of it."""

    def count(jaxpr) -> int:
        total, needed = 0, set(filter(_is_variable, jaxpr.outvars))
        for eqn in reversed(jaxpr.eqns):
            if not needed & set(eqn.outvars):
                continue  # an own gradient also writes down the products of what does not train
            needed |= set(filter(_is_variable, eqn.invars))
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += math.prod(shape[axis] for axis in contracted) * math.prod(eqn.outvars[0].aval.shape)
            total += sum(count(value.jaxpr) for value in eqn.params.values() if hasattr(value, "jaxpr"))
        return total

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


def _is_variable(atom) -> bool:
    return not hasattr(atom, "val")  # literals have one, and no hash


def check(expected_macs: int, fn, *args, above: float = ABOVE, compiled: bool = True) -> None:
    assert traced_macs(fn, *args) == expected_macs
    if compiled:  # seconds
        assert 1 <= xla_flops(fn, *args) / (flops.FLOPS_PER_MAC * expected_macs) <= above


def images(config: VitConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, config.image_size, config.image_size, config.in_channels), jnp.float32)


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(tuple((target, RANK) for target in targets))


def trained_fn(config: VitConfig, chosen):
    """The gradient with regard to the leaves whose path `chosen` accepts: loss on the last block's tokens."""
    params = paths(abstract_params(config))
    trained = {path: leaf for path, leaf in params.items() if chosen(path)}
    frozen = {path: leaf for path, leaf in params.items() if not chosen(path)}

    def loss(trained, frozen, pixels):
        tree: dict = {}
        for path, leaf in (trained | frozen).items():
            *folders, name = path.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = leaf
        return jnp.abs(VisionTransformer(config).apply({"params": tree}, pixels).blocks[-1]).sum()

    return jax.grad(loss), trained, frozen


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, num_classes=10),
        dataclasses.replace(SMALL, mlp="swiglu", num_registers=4, pool="mean", depth=2),
        dataclasses.replace(SMALL, patch_size=4, class_token=False, pool="mean", depth=1),
        dataclasses.replace(SMALL, num_registers=3, class_token=False, pool="attention", depth=1),
    ],
    ids=["vit", "swiglu", "small patches", "attention pooling"],
)
def test_forward_against_xla(config: VitConfig):
    def forward(params, pixels):
        output = VisionTransformer(config).apply({"params": params}, pixels)
        return output.pooled if output.logits is None else output.logits

    check(BATCH * flops.forward_cost(config).total, forward, abstract_params(config), images(config))


def test_published_size_of_vit_b():
    """17.6 GFLOPs with 2 a MAC and 86.57 M parameters: timm's figures for vit_base_patch16_224 are 16.9 GMACs
    without and 17.6 with the attention products."""
    size = flops.model_size(VIT_B)
    assert size["params"] == 86_567_656
    assert size["gflops"] == pytest.approx(2 * 17.56, rel=0.01)
    half = dataclasses.replace(VIT_B, depth=6, num_classes=0)
    assert flops.model_size(half)["params"] / 1e6 == pytest.approx(43.27, abs=0.01)  # as the paper's student


KERNELS = {
    "enhanced": ("query", "key", "value", "out", "fc1", "fc2"),
    "plain": ("query", "value"),
    "out": ("out",),
    "fc2": ("fc2",),
    "fc1": ("fc1",),
    "key": ("key",),
}


@pytest.mark.parametrize("name", KERNELS)
def test_backward_of_chosen_kernels_against_xla(name: str):
    """Forward and backward of one update; what JAX need not compute (below the first trained kernel) is not counted."""
    kernels = KERNELS[name]
    grad, trained, frozen = trained_fn(SMALL, lambda p: p.endswith("kernel") and p.split("/")[-2] in kernels)
    expected = BATCH * (flops.forward_cost(SMALL).encoder + flops.backward_macs(SMALL, kernels))
    check(expected, grad, trained, frozen, images(SMALL), compiled=name in ("enhanced", "plain"))


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        (lambda path: True, {"kernels": None}),
        (lambda path: "/norm" in path, {"kernels": (), "norms": True}),
        (
            lambda path: "block" in path and "norm" not in path and path.endswith("bias"),
            {"kernels": (), "biases": True},
        ),
    ],
    ids=["full", "norms", "biases"],
)
def test_backward_of_other_leaves_against_xla(chosen, options):
    grad, trained, frozen = trained_fn(SMALL, chosen)
    expected = BATCH * (flops.forward_cost(SMALL).encoder + flops.backward_macs(SMALL, **options))
    check(expected, grad, trained, frozen, images(SMALL), compiled=options["kernels"] is None)


@pytest.mark.parametrize("name", ["enhanced", "plain", "fc2"])
def test_a_step_with_adapters_against_xla(name: str):
    """Forward, low-rank backward and the product A B, as the loss computes them."""
    config = lora(*KERNELS[name])
    base = abstract_params(SMALL)
    adapters = jax.eval_shape(lambda key: init_adapters(key, base, config), jax.random.key(0))

    def loss(adapters, base, pixels):
        return jnp.abs(
            VisionTransformer(SMALL).apply({"params": attach(base, adapters, config)}, pixels).blocks[-1]
        ).sum()

    cost = flops.step_cost(SMALL, SMALL, BATCH, "lora", config, cached=True)
    check(cost.total, jax.grad(loss), adapters, base, images(SMALL), compiled=name == "enhanced", above=1.25)


def test_merge_against_xla():
    """W + A B and the gradients of A and B are three products of in x rank x out."""
    shapes = flops.dense_shapes(SMALL)
    factors = {
        name: (jax.ShapeDtypeStruct((n, RANK), jnp.float32), jax.ShapeDtypeStruct((RANK, m), jnp.float32))
        for name, (n, m) in shapes.items()
    }

    def loss(factors):
        return sum((a @ b).var() for a, b in factors.values())

    expected = 3 * flops.merge_macs(SMALL, dict.fromkeys(shapes, RANK)) // SMALL.depth
    check(expected, jax.grad(loss), factors, above=1.6)  # rank 8 only: the elementwise share is large


def test_a_step_by_hand():
    """Depth 1, width 2, 1 token a patch of 1 pixel: every product can be counted on paper."""
    tiny = VitConfig(
        depth=1,
        width=2,
        num_heads=1,
        mlp_dim=3,
        patch_size=1,
        image_size=1,
        in_channels=1,
        class_token=False,
        pool="mean",
    )
    forward = flops.forward_cost(tiny)
    assert (forward.embed, forward.attention, forward.mlp, forward.head) == (2, 4 * 4 + 2 * 2, 12, 0)
    cost = flops.step_cost(tiny, dataclasses.replace(tiny, depth=2), 10, "lora", lora("fc2"))
    assert cost.teacher == 10 * (2 + 2 * 32)
    assert cost.forward == 10 * 34
    assert cost.backward == 10 * 2 * RANK * (3 + 2)  # the gradients of fc2's factors, nothing else
    assert cost.merge == 3 * RANK * 2
    dora = flops.step_cost(tiny, tiny, 10, "lora", dataclasses.replace(lora("fc2"), dora=True))
    assert dora.backward == 10 * 6  # the gradient of fc2's kernel
    assert dora.merge == 3 * cost.merge
    assert flops.step_cost(tiny, tiny, 10, "lora", lora("fc2"), accumulation=5).merge == 5 * cost.merge
    assert cost.total == cost.teacher + cost.forward + cost.backward + cost.merge


def test_other_methods():
    assert flops.step_cost(SMALL, SMALL, 8, "copy").total == 0
    full, scratch = (flops.step_cost(SMALL, SMALL, 8, method, cached=True) for method in ("full", "scratch"))
    assert full == scratch
    assert full.teacher == 0 == full.merge
    with pytest.raises(ValueError, match=r"expected one of .*'copy'\), found 'half'"):
        flops.step_cost(SMALL, SMALL, 8, "half")
    with pytest.raises(ValueError, match="needs the LoRA config"):
        flops.step_cost(SMALL, SMALL, 8, "lora")


def test_memory_is_near_what_xla_allocates():
    """Activations of a gradient at batch 32: XLA's temporary buffers within a factor of two of the estimate."""
    grad, trained, frozen = trained_fn(SMALL, lambda path: True)
    pixels = jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)
    found = jax.jit(grad).lower(trained, frozen, pixels).compile().memory_analysis().temp_size_in_bytes
    memory = flops.train_memory(SMALL, SMALL, 64, 32, "full", num_params(trained), cached=True)
    assert 0.5 < found / memory["activations"] < 2
    assert memory["training state"] == 20 * num_params(trained)
    assert memory["teacher"] == memory["teacher activations"] == memory["student"] == 0
    assert memory["total"] == sum(memory.values()) - memory["total"]


def test_memory_of_adapters():
    ranks = {"query": 4, "fc1": 4}
    memory = flops.train_memory(SMALL, VIT_B, 2, 1, "lora", 1000, ranks=ranks, teacher_bytes=2)
    assert memory["teacher"] == 2 * 86_567_656
    assert memory["student"] == 4 * num_params(abstract_params(SMALL))
    assert memory["merged kernels"] == 4 * 3 * (96 * 96 + 96 * 384)
    assert memory["training state"] == 20_000
    assert memory["teacher activations"] == 2 * 2 * 197 * (8 * 768 + 2 * 3072 + 12 * 197)
