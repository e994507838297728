"""Refusing wrong input to the mathematics of egrsd.py: each ValueError names the argument."""

import math

import torch
from torch import Tensor


def refuse_nan(name: str, values: Tensor, mask: Tensor | None = None) -> None:
    """No NaN in `values`, or none where the mask is true."""
    if mask is not None:
        values = values[mask.bool()]
    if values.isnan().any():
        raise ValueError(f"{name} holds NaN")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")


def check_mask(mask: Tensor) -> None:
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (B, T)")
    if not mask.bool().any():
        raise ValueError("mask has not a single token")


def check_lookahead_input(entropy: Tensor, mask: Tensor, W: int) -> None:
    if not (math.isfinite(W) and W >= 0 and int(W) == W):
        raise ValueError(f"W must be a whole number of tokens and not negative, got {W}")
    check_mask(mask)
    check_shape("entropy", entropy, mask.shape)
    refuse_nan("entropy", entropy, mask)
    if not entropy.is_floating_point():
        raise ValueError(f"entropy must be of a floating-point type, not {entropy.dtype}")


def check_gate_input(gamma: float, max_entropy: Tensor) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and not negative, got {gamma}")
    check_shape("max_entropy", max_entropy, ())
    if not max_entropy.isfinite():
        raise ValueError("entropy or max_entropy is not finite")


def check_magnitude_input(
    teacher_logp: Tensor, student_logp: Tensor, direction: Tensor, eps: float
) -> None:
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if teacher_logp.ndim != 2:
        raise ValueError(f"teacher_logp has shape {tuple(teacher_logp.shape)}, expected (B, T)")
    check_shape("student_logp", student_logp, teacher_logp.shape)
    check_shape("direction", direction, teacher_logp.shape[:1])
    refuse_nan("teacher_logp", teacher_logp)
    refuse_nan("student_logp", student_logp)
    refuse_nan("direction", direction)


def check_product_input(advantages: Tensor, magnitude: Tensor, gate: Tensor, mask: Tensor) -> None:
    check_mask(mask)
    check_shape("advantages", advantages, mask.shape[:1])
    check_shape("magnitude", magnitude, mask.shape)
    check_shape("gate", gate, mask.shape)
    refuse_nan("advantages", advantages)
    refuse_nan("magnitude", magnitude, mask)
    refuse_nan("gate", gate, mask)


def check_head_input(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int) -> None:
    both_2d = hidden.ndim == 2 and head_weight.ndim == 2
    if not both_2d or hidden.shape[1] != head_weight.shape[1]:
        shapes = tuple(hidden.shape), tuple(head_weight.shape)
        raise ValueError(f"hidden {shapes[0]} must be (N, d), head_weight {shapes[1]} (V, d)")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number of tokens, at least 1, got {chunk}")
    refuse_nan("hidden", hidden)
    N = len(hidden)
    V = len(head_weight)
    check_shape("targets", targets, (N,))
    if targets.is_floating_point():
        raise ValueError(f"targets must be token ids, not {targets.dtype}")
    # A negative index would wrap around without a word.
    if N and not (int(targets.min()) >= 0 and int(targets.max()) < V):
        raise ValueError(f"targets must be token ids in [0, {V})")
