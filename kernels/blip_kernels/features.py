"""Checks of the arguments of `contrastive` and `hard_negatives`, and where their kernels can run."""

from __future__ import annotations

import torch
from torch import Tensor

from blip_kernels.backends import op_backend

WIDEST = 256  # widest features of the kernels: registers hold two float32 tiles of this width


def feature_backend(queries: Tensor, requested: str | None) -> str:
    """Resolve as `op_backend`, but take the twin if features are wider than `WIDEST` or float64.

    Raises ValueError if Triton is requested by name and cannot run.
    """
    chosen = op_backend(queries, requested)
    if chosen == "triton" and (queries.shape[1] > WIDEST or queries.dtype == torch.float64):
        if requested == "triton":
            raise ValueError(f"backend 'triton' cannot run: it takes features up to {WIDEST} wide, of 16 or 32 bits, "
                             f"got {queries.shape[1]} wide {queries.dtype}; choose auto or reference")
        return "reference"
    return chosen


def check_features(queries: Tensor, temperature: Tensor, **keys: Tensor) -> None:
    """Check queries [rows, width], one temperature, and named keys [any, width]: one dtype, one device."""
    if queries.ndim != 2 or queries.shape[1] == 0 or not queries.dtype.is_floating_point:
        raise ValueError(f"queries must be floating [rows, width], got {queries.dtype} {tuple(queries.shape)}")
    for name, x in keys.items():
        if x.ndim != 2 or x.shape[1] != queries.shape[1]:
            raise ValueError(f"{name} must be [any, {queries.shape[1]}], as wide as queries, got {tuple(x.shape)}")
        if x.dtype != queries.dtype or x.device != queries.device:
            raise ValueError(f"{name} must be {queries.dtype} on {queries.device} as queries are, got {x.dtype} on "
                             f"{x.device}")
    if temperature.numel() != 1 or not temperature.dtype.is_floating_point or temperature.device != queries.device:
        raise ValueError(f"temperature must be one floating element on {queries.device}, got {temperature.dtype} "
                         f"{tuple(temperature.shape)} on {temperature.device}")


def check_own_keys(rows: int, keys: int, first_own_key: int, paired: bool) -> None:
    """Check that each row's own key exists if there are no ids; with ids there is no own key."""
    if paired and (first_own_key < 0 or first_own_key + rows > keys):
        raise ValueError(f"first_own_key {first_own_key} with {rows} rows leaves the {keys} keys: each row's own key "
                         "must be among them")
    if not paired and first_own_key != 0:
        raise ValueError(f"first_own_key {first_own_key} and ids exclude each other: ids say which keys are a row's")


def check_ids(queries: Tensor, **ids: tuple[Tensor, int]) -> None:
    """Check named ids, each given with the length that it must have."""
    for name, (x, length) in ids.items():
        if x.dtype != torch.int64 or x.shape != (length,) or x.device != queries.device:
            raise ValueError(f"{name} must be int64 [{length}] on {queries.device}, got {x.dtype} {tuple(x.shape)} on "
                             f"{x.device}")
