"""Loads a checkpoint that another number of ranks or another ZeRO stage wrote: merges its
shards and divides them anew."""

from __future__ import annotations

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip_train import collectives

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, per parameter


def load_resharded(engine: Any, folder: Path, written_stage: int, updates: int) -> None:
    """Restore weights, momentum copy, queue, and AdamW's moments and step. All ranks call it together.

    Every rank assembles the weights in host memory (one copy per rank of a machine) and reads the
    moments one parameter at a time.

    Args:
        engine: DeepSpeed's engine, with ZeRO stage 1, 2 or 3 and PyTorch's AdamW.
        folder: a checkpoint's directory.
        written_stage: the stage that wrote it.
        updates: the optimiser's updates until then.

    Raises:
        ValueError: one of the two stages is 0, or the optimiser is not
            PyTorch's: their state has another form.
    """
    import deepspeed

    stage = engine.zero_optimization_stage()
    if 0 in (stage, written_stage):
        raise ValueError(f"{folder} was written with ZeRO stage {written_stage}, and this run has {stage}: "
                         f"from or to 0 a run cannot change, resume with --runtime.zero_stage {written_stage}")
    if not isinstance(engine.basic_optimizer, torch.optim.AdamW):
        raise ValueError(f"{folder} was written on other ranks, or with another optimiser, than this run's: "
                         "go on with --runtime.adamw torch, which can take its state over")
    whole = folder / "whole"
    if collectives.world()[0] == 0:
        _convert(folder, whole)
    dist.barrier()
    weights = whole_weights(folder, written_stage)
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0, enabled=stage == 3):
        engine.module.load_state_dict(weights)
    common = torch.load(whole / "zero" / "optimizer_state.pt", weights_only=False)
    engine.optimizer.loss_scaler = common["loss_scaler"]  # that of float16
    engine.global_steps = updates
    _make_moments(engine.optimizer, stage, updates)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            _restore(parameter, weights[name], None)
            for moment in MOMENTS:
                _restore(parameter, _read_tensor(whole / "zero" / name / f"{moment}.pt"), moment)
    dist.barrier()
    if collectives.world()[0] == 0:
        shutil.rmtree(whole)


def whole_weights(folder: Path, written_stage: int) -> dict[str, Tensor]:
    """Everything that a checkpoint's training step stores (model, momentum copy, queue), in host memory."""
    if written_stage == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        merge: Any = get_fp32_state_dict_from_zero_checkpoint
        with _silent():
            return merge(str(folder.parent), folder.name)
    return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]


def _convert(folder: Path, whole: Path) -> None:
    """Write a checkpoint in DeepSpeed's universal form: one file per parameter and moment."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(whole, ignore_errors=True)
    with _silent():
        ds_to_universal.main(Namespace(input_folder=str(folder), output_folder=str(whole),
                                       num_extract_workers=1,
                                       num_merge_workers=1, keep_temp_folder=False, strict=True,
                                       inject_missing_state=True))
    (folder / "latest_universal").unlink(missing_ok=True)


def _read_tensor(path: Path) -> Tensor:
    # weights_only=False: the files are this run's own, and hold more than tensors. Some
    # stages wrap the tensor in a dict.
    stored = torch.load(path, weights_only=False)
    return stored["param"] if isinstance(stored, dict) else stored


def _make_moments(optimizer: Any, stage: int, updates: int) -> None:
    """Create AdamW's state of this rank's shards, which AdamW itself would create in its first step."""
    for flat in optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups:
        step = torch.tensor(float(updates), device=flat.device)
        optimizer.optimizer.state[flat] = {"step": step} | {moment: torch.zeros_like(flat)
                                                            for moment in MOMENTS}
    if stage < 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def _restore(parameter: Any, value: Tensor, moment: str | None) -> None:
    """Set this rank's shard of a parameter's float32 weight (`moment` None) or
    moment from the whole `value`."""
    from deepspeed import utils

    value = value.flatten().to(parameter.device)
    # ZeRO 3; DeepSpeed's setter of whole tensors does not support padded shards.
    if hasattr(parameter, "ds_tensor"):
        size, rank = parameter.ds_tensor.ds_numel, collectives.world()[0]
        padded = torch.nn.functional.pad(value, (0, size * collectives.world()[1] - len(value)))
        value = padded[rank * size : (rank + 1) * size]
        setters = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
    else:
        setters = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
    if moment is None:
        setters[0](parameter, value)
    else:
        setters[1](parameter, value, moment)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress what DeepSpeed's converters print, but not what they raise."""
    with Path(os.devnull).open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield
