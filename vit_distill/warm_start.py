"""Closed-form start of the adapters: ridge regression of low rank, block by block, on the student's own inputs.

Axes: n images, H W C image, N tokens, D width, F inputs of a layer, R rank, L layers. The layers that write into the
residual stream (out, fc2) act on a block's output linearly, so the best change of their kernels of rank R has a closed
form (reduced-rank regression: Izenman, J. Multivariate Analysis 5, 1975). It saves updates, not final quality.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from core.dense import outer
from core.low_rank import product
from core.transformer import block_name
from core.vit import VisionTransformer, VitConfig, build_block
from vit_distill.lora import Adapters, LoraConfig, merge

# Part of the block, name of the sown input, and layer scale of the branch.
SITES = {"out": ("attn", "heads", "ls1"), "fc2": ("mlp", "hidden", "ls2")}
SHARES = (1.0, 0.5, 0.25)

Batches = Sequence[tuple[np.ndarray, np.ndarray]]


def warm_start(
    config: VitConfig,
    params: Mapping[str, Any],
    adapters: Adapters,
    lora: LoraConfig,
    images: jax.Array,
    targets: Sequence[jax.Array],
    *,
    ridge: float = 1e-2,
    batch_size: int = 32,
    dtype: Any = jnp.float32,
) -> Adapters:
    """Adapters with which every student block comes close to its teacher block at once.

    Blocks are solved in order, each on the outputs of the solved ones before it: fc2 against what the block misses;
    with out adapted too, then out against what is left and fc2 again, if that helps.

    Args:
      config, params: the student's, before the adapters.
      adapters: as `init_adapters` gives them.
      images: [n, H, W, C] as the model takes them.
      targets: for each student block the teacher's tokens [n, N, D] that it has to give, before the final norm.
      ridge: added to the diagonal of the layer's second moments, as a share of its mean.
      batch_size: images at once.
      dtype: that operands of products are rounded to, see `core.dense`; sums are float32.

    Returns:
      A new tree; only "a", "b" and "magnitude" of the solved layers differ.

    Raises:
      ValueError: if fc2 is not adapted, or targets do not fit the student's blocks and images.
    """
    check_targets(lora)
    expected = (len(images), config.num_tokens, config.width)
    shapes = [tuple(target.shape) for target in targets]
    if shapes != [expected] * config.depth:
        raise ValueError(f"warm start: expected {config.depth} targets of shape {expected}, found {shapes}")
    solver = _Solver(config, params, lora, ridge, dtype)
    slices = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
    tokens = [np.asarray(solver.embed(solver.params, images[rows])) for rows in slices]
    solved = dict(adapters)
    for i in range(config.depth):
        batches = [(x, np.asarray(targets[i][rows])) for x, rows in zip(tokens, slices, strict=True)]
        solved[block_name(i)] = solver.solve(i, solved[block_name(i)], batches)
        tokens = solver.outputs(i, solved[block_name(i)], batches)
    return solved


def check_targets(lora: LoraConfig) -> None:
    """Raises ValueError unless fc2 is adapted."""
    ranks = dict(lora.ranks)
    if "fc2" not in ranks:
        raise ValueError(
            f'warm start writes into fc2: add it to lora.targets, found {tuple(ranks)} (or use "enhanced")'
        )


def low_rank_ridge(second: np.ndarray, cross: np.ndarray, rank: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The M = a @ b of this rank that minimises |X M - Y|^2 + lambda |M|^2, lambda = ridge * mean(diag(X'X)).

    Args:
      second: X'X [F, F].
      cross: X'Y [F, D].

    Returns:
      a [F, R] and b [R, D], of equal norm component by component.
    """
    penalised = second.copy()
    np.fill_diagonal(penalised, second.diagonal() + ridge * second.diagonal().mean())
    full = scipy.linalg.solve(penalised, cross, overwrite_a=True, assume_a="pos")
    # The best of a rank is the full solution projected on the leading directions of its (augmented) fit.
    directions = np.linalg.eigh(cross.T @ full)[1][:, ::-1][:, :rank]
    a = full @ directions
    norms = np.linalg.norm(a, axis=0)
    root = np.sqrt(np.where(norms > 0, norms, 1.0))
    return a / root[None], directions.T * root[:, None]


def _cross(x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """x^T y, [M, D] and [M, F] -> [D, F] float32, of operands rounded to `dtype`."""
    if dtype == jnp.float32:  # in full: GPU and TPU would round the operands otherwise
        return jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST)
    return outer(x.astype(dtype), y.astype(dtype))


class _Solver:
    """Solves one block at a time; one compilation of each function serves all blocks."""

    def __init__(self, config: VitConfig, params: Mapping[str, Any], lora: LoraConfig, ridge: float, dtype: Any):
        self.params, self.lora, self.ridge = jax.tree.map(jnp.asarray, params), lora, ridge
        block, model = build_block(config, dtype), VisionTransformer(config)
        self.embed = jax.jit(lambda p, images: model.apply({"params": p}, images).embedded)
        self.apply = jax.jit(lambda p, x: block.apply({"params": p}, x)[0])

        def moments(p: Any, x: jax.Array, target: jax.Array, site: str) -> tuple[jax.Array, jax.Array, jax.Array]:
            part, sown, _ = SITES[site]
            (out, _), state = block.apply({"params": p}, x, mutable="intermediates")
            inputs = state["intermediates"][part][sown][0].reshape(x.shape[0] * x.shape[1], -1)
            missing = (target - out).reshape(-1, x.shape[-1])
            return _cross(inputs, inputs, dtype), _cross(inputs, missing, dtype), jnp.square(missing).sum()

        self.moments = jax.jit(moments, static_argnames="site")
        self.add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    def solve(self, index: int, layers: Adapters, batches: Batches) -> Adapters:
        """New adapters of one block from (inputs, targets) of the block, both [n, N, D]."""
        layers, error = self._with(index, layers, batches, "fc2")
        if "out" not in dict(self.lora.ranks):
            return layers
        # A change of out also moves what the MLP reads, which the regression does not know: the largest share of it
        # that helps is taken, none if need be.
        a, b, _ = self._fit(index, layers, batches, "out")
        for share in SHARES:
            changed, left = self._with(index, self._put(index, layers, "out", a, share * b), batches, "fc2")
            if left < error:
                return changed
        return layers

    def outputs(self, index: int, layers: Adapters, batches: Batches) -> list[np.ndarray]:
        """The block's outputs with these adapters."""
        p = self._merged(index, layers)
        return [np.asarray(self.apply(p, x)) for x, _ in batches]

    def _with(self, index: int, layers: Adapters, batches: Batches, site: str) -> tuple[Adapters, float]:
        """The adapters with the best ones of a site, and the squared error of the block's outputs with them."""
        a, b, error = self._fit(index, layers, batches, site)
        return self._put(index, layers, site, a, b), error

    def _merged(self, index: int, layers: Adapters) -> Any:
        name = block_name(index)
        return merge({name: self.params[name]}, {name: layers}, self.lora)[name]

    def _fit(self, index: int, layers: Adapters, batches: Batches, site: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Factors [F, R], [R, D] for what the block misses without the adapter of this site, and what is left of it.

        The last is a sum of squares, exact for a block whose outputs are linear in the site's inputs: fc2's.
        """
        part, _, layer_scale = SITES[site]
        rank = dict(self.lora.ranks)[site]
        without = {name: leaf for name, leaf in layers[part][site].items() if name not in ("a", "b", "magnitude")}
        p = self._merged(index, {**layers, part: {**layers[part], site: without}})
        # Added up one by one: a batch's moments of a ViT-B are 47 MB.
        sums = functools.reduce(self.add, (self.moments(p, x, target, site) for x, target in batches))
        second, cross, missing = (np.asarray(part, np.float64) for part in sums)
        a, b = low_rank_ridge(second, cross, rank, self.ridge)
        if layer_scale in p:
            gain = np.asarray(p[layer_scale], np.float64).reshape(1, -1)
            b = np.where(gain != 0, b, 0.0)
        change = a @ b
        left = float(missing - 2 * np.vdot(change, cross) + np.vdot(change, (second @ a) @ b))
        if layer_scale in p:
            b = np.divide(b, gain, out=b, where=gain != 0)
        return a, b / self.lora.scale(rank), left

    def _put(self, index: int, layers: Adapters, site: str, a: np.ndarray, b: np.ndarray) -> Adapters:
        """The block's adapters with these factors at a site; DoRA's magnitude becomes that of the sum."""
        part = SITES[site][0]
        layer = dict(layers[part][site])
        layer |= {"a": jnp.asarray(a, jnp.float32).reshape(layer["a"].shape), "b": jnp.asarray(b, jnp.float32)}
        if "magnitude" in layer:
            kernel = jnp.asarray(self.params[block_name(index)][part][site]["kernel"], jnp.float32)
            total = kernel + self.lora.scale(b.shape[0]) * product(layer["a"], layer["b"])
            layer["magnitude"] = jnp.sqrt(jnp.square(total).sum(range(total.ndim - 1)))
        return {**layers, part: {**layers[part], site: layer}}
