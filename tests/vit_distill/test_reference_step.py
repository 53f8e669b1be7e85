"""One full training step against PyTorch, written here from the description of the method, not from our code.

Teacher of 4 blocks, student of its blocks 0 and 2, a low-rank pair on q, k, v, out, fc1 and fc2, L1 between the last
blocks' tokens before the final norm with half of the weight on the cls token, one step of AdamW with decoupled weight
decay. PyTorch computes W x + b + B(A x) in float64 and never merges; ours merges and computes in float32.

    python tests/vit_distill/test_reference_step.py

writes what PyTorch gives to data/reference_step.npz, for machines without PyTorch.
"""

import math
from pathlib import Path

import numpy as np
import pytest

STORED = Path(__file__).parent / "data" / "reference_step.npz"
DEPTH, KEPT, WIDTH, HEADS, HIDDEN, PATCH, SIDE, RANK, BATCH = 4, (0, 2), 16, 2, 24, 8, 16, 3, 4
RATE, DECAY, BETAS, EPSILON = 1e-2, 0.05, (0.9, 0.95), 1e-8
LAYERS = {
    "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "out": (WIDTH, WIDTH),
    "fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH),
}  # fmt: skip


def make_inputs():
    """Flat float32: images, "teacher/<block>/<layer>/{weight [in, out], bias}", "lora/<block>/<layer>/{a, b}"."""
    rng = np.random.default_rng(0)
    tokens = (SIDE // PATCH) ** 2 + 1
    inputs = {
        "images": rng.normal(size=(BATCH, SIDE, SIDE, 3)),
        "teacher/embed/weight": 0.1 * rng.normal(size=(PATCH * PATCH * 3, WIDTH)),
        "teacher/embed/bias": 0.1 * rng.normal(size=WIDTH),
        "teacher/cls": rng.normal(size=WIDTH),
        "teacher/position": 0.5 * rng.normal(size=(tokens, WIDTH)),
    }
    for i in range(DEPTH):
        for norm in ("norm1", "norm2"):
            inputs[f"teacher/{i}/{norm}/weight"] = 1 + 0.2 * rng.normal(size=WIDTH)
            inputs[f"teacher/{i}/{norm}/bias"] = 0.2 * rng.normal(size=WIDTH)
        for layer, (fan_in, fan_out) in LAYERS.items():
            inputs[f"teacher/{i}/{layer}/weight"] = rng.normal(size=(fan_in, fan_out)) / math.sqrt(fan_in)
            inputs[f"teacher/{i}/{layer}/bias"] = 0.2 * rng.normal(size=fan_out)
    for i in range(len(KEPT)):
        # B is not 0, as it is in the middle of training: at 0, no gradient reaches A.
        for layer, (fan_in, fan_out) in LAYERS.items():
            inputs[f"lora/{i}/{layer}/a"] = rng.uniform(-1, 1, size=(fan_in, RANK)) / math.sqrt(fan_in)
            inputs[f"lora/{i}/{layer}/b"] = 0.3 * rng.normal(size=(RANK, fan_out))
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def torch_step(inputs):
    """Loss, gradient of every adapter and the adapters after the step, in float64."""
    import torch
    from torch.nn import functional

    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in inputs.items()}
    adapters = {name: value.requires_grad_() for name, value in values.items() if name.startswith("lora/")}

    def forward(blocks, adapted):
        # A convolution of stride PATCH, its weight [D, C, P, P] filled from the [P*P*C, D] matrix.
        weight = values["teacher/embed/weight"].reshape(PATCH, PATCH, 3, WIDTH).permute(3, 2, 0, 1)
        x = functional.conv2d(values["images"].permute(0, 3, 1, 2), weight, values["teacher/embed/bias"], stride=PATCH)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([values["teacher/cls"].expand(BATCH, 1, WIDTH), x], dim=1) + values["teacher/position"]
        for position, block in enumerate(blocks):

            def layer(name, x, block=block, position=position):
                y = x @ values[f"teacher/{block}/{name}/weight"] + values[f"teacher/{block}/{name}/bias"]
                if adapted:
                    y = y + (x @ values[f"lora/{position}/{name}/a"]) @ values[f"lora/{position}/{name}/b"]
                return y

            def norm(name, x, block=block):
                affine = (values[f"teacher/{block}/{name}/{leaf}"] for leaf in ("weight", "bias"))
                return functional.layer_norm(x, (WIDTH,), *affine, eps=1e-6)

            y = norm("norm1", x)
            q, k, v = (layer(n, y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in ("query", "key", "value"))
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + layer("out", y)
            x = x + layer("fc2", functional.gelu(layer("fc1", norm("norm2", x))))
        return x

    with torch.no_grad():
        target = forward(range(DEPTH), adapted=False)
    difference = (forward(KEPT, adapted=True) - target).abs()
    loss = 0.5 * difference.mean() + 0.5 * difference[:, 0].mean()
    optimizer = torch.optim.AdamW(adapters.values(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    loss.backward()
    gradients = {f"gradient/{name}": value.grad.numpy().copy() for name, value in adapters.items()}
    optimizer.step()
    updated = {f"updated/{name}": value.detach().numpy() for name, value in adapters.items()}
    return {"loss": np.float64(loss.item()), **gradients, **updated}


def _split(inputs, prefix):
    """The arrays as our trees: parameters, or adapters, of blocks named in order."""
    axes_in = {"out": (HEADS, WIDTH // HEADS)}
    axes_out = dict.fromkeys(("query", "key", "value"), (HEADS, WIDTH // HEADS))
    blocks = {}
    for path, value in inputs.items():
        parts = path.split("/")
        if parts[0] != prefix or len(parts) != 4:
            continue
        _, block, layer, leaf = parts
        rows, columns = axes_in.get(layer, (-1,)), axes_out.get(layer, (-1,))
        if leaf == "weight" and layer in LAYERS:
            leaf, value = "kernel", value.reshape(*(axes_in.get(layer, value.shape[:1])), *columns)
        elif leaf == "weight":
            leaf = "scale"
        elif leaf == "bias":
            value = value.reshape(columns)
        elif leaf == "a":
            value = value.reshape(*rows, RANK)
        elif leaf == "b":
            value = value.reshape(RANK, *columns)
        node = blocks.setdefault(f"block_{int(block):02d}", {})
        if layer in LAYERS:
            node = node.setdefault("mlp" if layer.startswith("fc") else "attn", {})
        node.setdefault(layer, {})[leaf] = value
    return blocks


def our_step(inputs):
    """The same from the functions that the training command compiles."""
    import jax
    import jax.numpy as jnp
    import optax

    from configs import common
    from core.step import make_train_step_fn
    from core.vit import VitConfig
    from vit_distill.distill import build_distiller, build_state, make_loss_fn, make_targets_fn
    from vit_distill.preprocessing import Preprocessing
    from vit_distill.teacher import LoadReport, Teacher

    vit = VitConfig(depth=DEPTH, width=WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, patch_size=PATCH, image_size=SIDE)
    params = _split(inputs, "teacher") | {
        "embed": {"proj": {"kernel": inputs["teacher/embed/weight"], "bias": inputs["teacher/embed/bias"]}},
        "cls_token": inputs["teacher/cls"].reshape(1, 1, WIDTH),
        "pos_embedding": inputs["teacher/position"][None],
        "norm": {"scale": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)},
    }
    report = LoadReport((), (), (), (), "", "test")
    teacher = Teacher("test", vit, params, Preprocessing(SIDE, (0.5,) * 3, (0.5,) * 3), {}, report)
    config = common.distiller()
    config.student.update(reduction=DEPTH // len(KEPT), blocks="first", method="lora")
    config.lora.update(preset="enhanced", rank=RANK)
    config.loss.update(kind="l1", target="pre_norm", blocks="last", cls_weight=0.5)
    distiller = build_distiller(config, teacher)
    assert distiller.blocks == KEPT

    def decayed(tree):
        return jax.tree.map(lambda _: True, tree)

    tx = optax.adamw(RATE, *BETAS, eps=EPSILON, weight_decay=DECAY, mask=decayed)
    adapters = jax.tree.map(jnp.asarray, _split(inputs, "lora"))
    images = jnp.asarray(inputs["images"])
    targets = make_targets_fn(distiller)(params, images)
    batch, loss_fn = {"views": images, "targets": targets}, make_loss_fn(distiller)
    key = jax.random.key(0)
    gradients = jax.jit(jax.grad(lambda a: loss_fn(a, {}, batch, key, 0, distiller.base)[0]))(adapters)
    update = make_train_step_fn(loss_fn, tx, ema_decay=0.0)
    state, metrics = update(build_state(distiller, tx, adapters), batch, key, distiller.base)
    found = {"loss": metrics["loss"]}
    for kind, tree in (("gradient", gradients), ("updated", state.params)):
        for path, value in inputs.items():
            if path.startswith("lora/"):
                _, block, layer, leaf = path.split("/")
                part = "mlp" if layer.startswith("fc") else "attn"
                ours = tree[f"block_{int(block):02d}"][part][layer][leaf]
                found[f"{kind}/{path}"] = np.asarray(ours).reshape(value.shape)
    return found


def _compare(found, expected):
    assert set(found) == set(expected)
    assert len(found) == 1 + 2 * 2 * len(LAYERS) * len(KEPT)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    for name in expected:
        if name.startswith("gradient/"):
            # float32 against float64; gradients of a leaf are 0.01 to 0.3 in size.
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-6, err_msg=name)
        elif name.startswith("updated/"):
            # Adam's first step is the rate times the sign of the gradient: 1 % of the rate where it is nearly 0.
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-2 * RATE, err_msg=name)


@pytest.fixture(scope="module")
def stored():
    """(inputs, results of PyTorch) of the file."""
    with np.load(STORED) as file:
        arrays = dict(file)
    inputs = {name.removeprefix("input/"): value for name, value in arrays.items() if name.startswith("input/")}
    return inputs, {name: value for name, value in arrays.items() if not name.startswith("input/")}


def test_one_step_is_that_of_pytorch(stored):
    inputs, expected = stored
    _compare(our_step(inputs), expected)


def test_the_stored_step_is_what_pytorch_gives_today(stored):
    pytest.importorskip("torch")
    inputs, expected = stored
    for name, value in torch_step(inputs).items():
        np.testing.assert_allclose(expected[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


if __name__ == "__main__":
    inputs = make_inputs()
    results = {name: np.asarray(value, np.float32) for name, value in torch_step(inputs).items()}
    STORED.parent.mkdir(exist_ok=True)
    with STORED.open("wb") as file:
        np.savez_compressed(file, **results, **{f"input/{name}": value for name, value in inputs.items()})
    print(f"{STORED}: {STORED.stat().st_size // 1000} kB, loss {results['loss']:.6f}")
