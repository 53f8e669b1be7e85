"""Which blocks of the teacher a student keeps, and the copy itself.

Axes: n images, H W C image, B batch, N tokens, D width, L layers. With reduction r, one block in r is kept: the paper's
"compression factor" (Grigore et al., arXiv 2404.09326).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.transformer import block_name
from core.vit import VisionTransformer, VitConfig, build_block
from vit_distill.losses import cosine

RULES = ("first", "last", "even", "truncate")
CRITERIA = ("removal", "influence")


def choose_blocks(depth: int, reduction: int, rule: str) -> tuple[int, ...]:
    """Blocks to keep, ascending, from 0.

    Args:
      depth: L of the teacher.
      reduction: r; depth / r blocks are kept.
      rule: "first": the first of every r (the reference's code); "last": the last of every r (the paper's figure);
        "even": equally spaced from block 0 to block L-1; "truncate": the lowest L / r; or a list such as "0,2,5",
        which is taken as it is, whatever `reduction` says.

    Raises:
      ValueError: if r does not divide the depth, for an unknown rule, and for a list that is not ascending in [0, L).
    """
    if rule not in RULES:
        return _parse_blocks(depth, rule)
    num_blocks = _num_blocks(depth, reduction)
    if rule == "first":
        return tuple(range(0, depth, reduction))
    if rule == "last":
        return tuple(range(reduction - 1, depth, reduction))
    if rule == "truncate":
        return tuple(range(num_blocks))
    return tuple(int(i) for i in np.linspace(0, depth - 1, num_blocks).round())


def _num_blocks(depth: int, reduction: int) -> int:
    if reduction < 1 or depth % reduction:
        divisors = [r for r in range(1, depth + 1) if depth % r == 0]
        raise ValueError(f"reduction {reduction} does not divide the teacher's {depth} blocks: use one of {divisors}")
    return depth // reduction


def _parse_blocks(depth: int, rule: str) -> tuple[int, ...]:
    try:
        blocks = tuple(int(part) for part in rule.split(","))
    except ValueError:
        expected = f'expected one of {RULES}, "calibrated" (calibrated_blocks) or a list like "0,2,5"'
        raise ValueError(f"blocks: {expected}, found {rule!r}") from None
    _check_blocks(depth, blocks)
    return blocks


def _check_blocks(depth: int, blocks: Sequence[int]) -> None:
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= depth:
        raise ValueError(f"blocks: expected ascending numbers from 0 to {depth - 1}, found {list(blocks)}")


def copy_blocks(config: VitConfig, params: Mapping[str, Any], blocks: Sequence[int]) -> tuple[VitConfig, dict]:
    """The student at step 0: the teacher's `blocks`, renumbered from 0, and everything that is not a block.

    Returns:
      The student's config and parameters; the arrays are the teacher's own, not copies.

    Raises:
      ValueError: for blocks that the teacher does not have.
    """
    _check_blocks(config.depth, blocks)
    names = [block_name(i) for i in range(config.depth)]
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(f"teacher: expected parameters of {config.depth} blocks, found none of {missing}")
    student = {name: value for name, value in params.items() if name not in names}
    student |= {block_name(new): params[names[old]] for new, old in enumerate(blocks)}
    return dataclasses.replace(config, depth=len(blocks)), student


def aligned_targets(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """For each student block, the teacher block whose output it has to give.

    A kept block stands for itself and for the dropped ones up to the next kept block, so block i answers for the output
    before kept block i+1, the last one for the teacher's last. With "first" and r=3 of 12 that is 2, 5, 8, 11. Where
    the dropped blocks come before the kept ones ("last": block 0 dropped, the last block kept), it answers for itself.

    Raises:
      ValueError: for blocks that the teacher does not have.
    """
    _check_blocks(depth, blocks)
    if blocks[0] != 0 and blocks[-1] == depth - 1:
        return tuple(blocks)
    return (*(following - 1 for following in blocks[1:]), depth - 1)


def calibrated_blocks(
    config: VitConfig,
    params: Mapping[str, Any],
    images: jax.Array,
    reduction: int,
    criterion: str = "removal",
    batch_size: int = 32,
) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """Blocks chosen on images, beside what the uniform rules give on the same images.

    Args:
      images: [n, H, W, C], as the model takes them.
      criterion: "removal": blocks are dropped one at a time, each time the one whose absence changes the teacher's last
        output least; "influence": those are dropped that turn the tokens least, 1 - cosine(input, output), measured
        once in the whole teacher (Men et al., ShortGPT, arXiv 2403.03853).

    Returns:
      The blocks to keep and, for them and the rules first, even and last, rows {"rule", "blocks", "loss"}: loss is the
      mean absolute difference of all tokens after the last block from the teacher's, before any training.

    Raises:
      ValueError: for an unknown criterion, no image, or a reduction that does not divide the depth.
    """
    num_blocks = _num_blocks(config.depth, reduction)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {CRITERIA}, found {criterion!r}")
    if not len(images):
        raise ValueError("calibrated blocks: expected at least one image, found none")
    probe = _Probe(config, params, images, batch_size)
    chosen = probe.greedy(num_blocks) if criterion == "removal" else probe.influential(num_blocks)
    candidates = {criterion: chosen} | {
        rule: choose_blocks(config.depth, reduction, rule) for rule in ("first", "even", "last")
    }
    return chosen, [
        {"rule": rule, "blocks": list(blocks), "loss": probe.loss(blocks)} for rule, blocks in candidates.items()
    ]


class _Probe:
    """Runs any subset of a teacher's blocks over batches of images; one compilation serves every block."""

    def __init__(self, config: VitConfig, params: Mapping[str, Any], images: jax.Array, batch_size: int):
        params = jax.tree.map(jnp.asarray, params)
        self.params = [params[block_name(i)] for i in range(config.depth)]
        self.num_images = len(images)
        block, model = build_block(config), VisionTransformer(config)
        self.apply = jax.jit(lambda p, x: block.apply({"params": p}, x)[0])
        self.l1 = jax.jit(lambda x, y: jnp.abs(x - y).mean())
        embed = jax.jit(lambda p, images: model.apply({"params": p}, images).embedded)
        self.batches = []  # (images in it, tokens before the first block, tokens after the last), on the host
        for start in range(0, len(images), batch_size):
            tokens = np.asarray(embed(params, images[start : start + batch_size]))
            self.batches.append((len(tokens), tokens, np.asarray(self._run(range(config.depth), tokens)[-1])))

    def _run(self, blocks: Sequence[int], tokens: jax.Array) -> list[jax.Array]:
        """Tokens before and after each of the blocks."""
        outputs = [tokens]
        for i in blocks:
            outputs.append(self.apply(self.params[i], outputs[-1]))
        return outputs

    def loss(self, blocks: Sequence[int]) -> float:
        total = sum(size * float(self.l1(self._run(blocks, x)[-1], y)) for size, x, y in self.batches)
        return total / self.num_images

    def greedy(self, num_blocks: int) -> tuple[int, ...]:
        kept = tuple(range(len(self.params)))
        while len(kept) > num_blocks:
            losses = np.zeros(len(kept))
            for size, tokens, target in self.batches:
                prefix = self._run(kept[:-1], tokens)
                for j in range(len(kept)):
                    losses[j] += size * float(self.l1(self._run(kept[j + 1 :], prefix[j])[-1], target))
            drop = int(losses.argmin())
            kept = (*kept[:drop], *kept[drop + 1 :])
        return kept

    def influential(self, num_blocks: int) -> tuple[int, ...]:
        turned = jax.jit(lambda x, y: 1 - cosine(x, y).mean())
        influence = np.zeros(len(self.params))
        for size, tokens, _ in self.batches:
            outputs = self._run(range(len(self.params)), tokens)
            influence += [size * float(turned(x, y)) for x, y in itertools.pairwise(outputs)]
        return tuple(sorted(np.argsort(-influence, kind="stable")[:num_blocks].tolist()))
