"""Checkpoint files: found in a directory or on the Hub, read without running anything, written whole or not
at all."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
           "pytorch_model.bin.index.json")


def find(source: str | Path, name: str) -> Path | None:
    """A file of a checkpoint directory or of a model on the Hugging Face Hub (`Salesforce/…`); None if it has
    none."""
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or Path(source).suffix in (".pth", ".pt", ".bin"):
        raise FileNotFoundError(f"{source}: no such file or directory, nor the name of a model on the Hub "
                                "(OWNER/NAME)")
    try:
        return Path(huggingface_hub.hf_hub_download(str(source), name))
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"{source}: no such directory, and the Hub, which may have a model of that "
                                "name, cannot be reached") from None
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{source}: no such directory, and no public model of that name on the "
                                "Hub") from None


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a directory or Hub model: one safetensors file or pickle, or shards that an index
    lists."""
    for name in WEIGHTS:
        if (path := find(source, name)) is None:
            continue
        if path.suffix != ".json":
            return read_tensors(path)
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(read_json(path).get("weight_map", {}).values())):
            if (shard_path := find(source, shard)) is None:
                raise ValueError(f"{source}: {name} lists {shard}, which is missing")
            tensors |= read_tensors(shard_path)
        return tensors
    raise ValueError(f"{source} holds no weights: none of {', '.join(WEIGHTS)} is there")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of a pickled state dict."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}): fetch or write it "
                             "again") from None
    return state_dict(read_pickle(path), path)


def read_pickle(path: Path) -> Any:
    """Read what torch.save wrote: tensors and plain containers only, never code (`weights_only`).

    The tensors of a zip file (torch 1.6 and newer) stay on the disk until they are read.
    """
    # OSError where the file cannot be read at all; what is raised below is about its content
    path.open("rb").close()
    try:
        # about old pickle protocols, before the error that follows
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling raises whatever a broken file leads it to
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(f"{path} holds pickled Python objects besides tensors: refused, since reading "
                             "them could run code") from error
        raise ValueError(f"{path} is no whole checkpoint that torch.save wrote: fetch or write it "
                         "again") from error


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """`content` if it is a dict of named tensors; ValueError otherwise."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict of named tensors: it is no BLIP checkpoint")
    strange = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        raise ValueError(f"{path}: {strange!r} is no tensor: not a BLIP checkpoint's state dict")
    return dict(content)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises ValueError naming the file where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


@contextmanager
def naming_config(path: str | Path, kind: str = "BLIP") -> Iterator[None]:
    """Values of a wrong kind in a config file become a ValueError that names the file."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: the config does not describe a {kind} model: {error}") from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with whole_file(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={"format": "pt"})


def write_json(content: dict[str, Any], path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to. It is moved to `path` after the block has succeeded, so readers never see half a
    file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors makes files that nobody else may read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
