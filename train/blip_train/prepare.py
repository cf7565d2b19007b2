"""What a run needs before its first step: shards, a tokenizer, a model and what trains beside it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from torch import Tensor

from blip_fast.checkpoint import load_model, load_training_state
from blip_fast.checkpoint.original import QUEUES, tokenizer_directory
from blip_fast.config import BlipConfig, SpecialTokens
from blip_fast.data.annotated import ANNOTATIONS
from blip_fast.data.pack import pack
from blip_fast.data.scenes import write_scenes
from blip_fast.data.shards import INDEX, is_url, iterate, read_index
from blip_fast.data.sources import Source
from blip_fast.model import BlipModel
from blip_fast.tokenizer import Tokenizer, clean_caption
from blip_train import collectives
from blip_train.pretraining import Pretraining
from blip_train.recipe import Recipe
from blip_train.training_state import restore_state

EXPORT = "model"  # the exported model within a run's directory
TOKENIZER = "tokenizer"  # and its tokenizer


def check_sources(recipe: Recipe) -> None:
    """Raise ValueError, FileNotFoundError or OSError, before anything is started, where the recipe names data that is
    not there."""
    if recipe.data.scenes is not None:
        return
    for source in named_sources(recipe):
        if is_url(source.root):
            read_index(source.root)
            if recipe.tokenizer.source is None and recipe.init is None:
                raise ValueError(f"tokenizer.source is not set, and none is trained on captions under {source.root}: "
                                 "name a tokenizer")
        elif not any((Path(source.root) / name).is_file() for name in (ANNOTATIONS, INDEX)):
            where = "data.root" if recipe.data.sources is None else f"source {source.name}:"
            raise ValueError(f"{where} {source.root} holds neither {ANNOTATIONS} nor {INDEX}: name a folder of "
                             "annotated images or of packed shards")


def named_sources(recipe: Recipe) -> list[Source]:
    """The recipe's data sets as it names them; `data.root` is one, "data". Raises ValueError where there is none."""
    if recipe.data.sources is not None:
        return recipe.data.sources
    if recipe.data.root is None:
        raise ValueError("data.root is not set: name a folder of annotated images or of shards (--data.root DIR)")
    return [Source("data", recipe.data.root)]


def check_directory(recipe: Recipe, resume: bool) -> None:
    """Raise ValueError where the run's directory holds a run already and this one is not to go on with it."""
    if not resume and (recipe.directory / "log.jsonl").exists():
        raise ValueError(f"{recipe.directory} holds a run already: go on with --resume, or choose another --name")


def prepare_shards(recipe: Recipe) -> list[Source]:
    """The recipe's data sets as shards: where they are, or packed into the run's directory (once)."""
    if recipe.data.scenes is not None:  # drawn in random order, twins side by side
        return [_packed(recipe, Source("scenes", str(source_folder(recipe, "train"))), None, None)]
    # Rows of one folder often stand together, and training shuffles within a buffer only.
    return [source if is_url(source.root) or (Path(source.root) / INDEX).is_file()
            else _packed(recipe, source, recipe.data.train_split, recipe.seed) for source in named_sources(recipe)]


def _packed(recipe: Recipe, source: Source, split: str | None, shuffle_seed: int | None) -> Source:
    folder, shards = Path(source.root), recipe.directory / "shards" / source.name
    if not (shards / INDEX).is_file():
        pack(folder, folder / ANNOTATIONS, shards, split=split, shuffle_seed=shuffle_seed)
    return dataclasses.replace(source, root=str(shards))


def source_folder(recipe: Recipe, split: Literal["train", "test"]) -> Path:
    """The folder with the images of a split: `data.root`, or scenes drawn into the run's directory (once)."""
    if recipe.data.root is not None:
        return Path(recipe.data.root)
    scenes = recipe.data.scenes
    assert scenes is not None
    folder = recipe.directory / "scenes" / split
    if not (folder / ANNOTATIONS).is_file():
        size = recipe.model.vision.image_size
        if split == "train":
            write_scenes(folder, scenes.count, split, scenes.seed, scenes.noise, size, scenes.one_object_share,
                         scenes.twins)
        else:  # two objects each, so that no two captions are alike
            write_scenes(folder, scenes.test, split, scenes.seed, 0.0, size, one_object_share=0.0)
    return folder


def prepare_tokenizer(recipe: Recipe, shards: list[Source]) -> Tokenizer:
    """The recipe's tokenizer; the initial checkpoint's where it names none; else one trained on the captions."""
    source = recipe.tokenizer.source or recipe.init
    if source is None:
        captions = (clean_caption(caption) for each in shards for sample in iterate(each.root)
                    for caption in sample.record["captions"])
        return Tokenizer.train(captions, recipe.tokenizer.vocab_size)
    if Path(source).is_file() and Path(source).suffix == ".txt":
        return Tokenizer.from_vocab_file(source)
    if Path(source).is_file():
        beside = tokenizer_directory(Path(source))
        if not beside.is_dir():
            raise ValueError(f"{source} brings no tokenizer ({beside.name}): name one with --tokenizer.source")
        return Tokenizer.from_pretrained(beside)
    return Tokenizer.from_pretrained(source)


def prepare_pretraining(recipe: Recipe, tokenizer: Tokenizer) -> Pretraining:
    """The recipe's model with its momentum copy and queue.

    Momentum copies and queue features of the initial checkpoint are taken over, as in the published fine-tuning.
    """
    pretraining = Pretraining(prepare_model(recipe, tokenizer), recipe.objective, recipe.seed)
    if recipe.init is not None and "itc" in recipe.objective.losses:
        restore_state(pretraining, _initial_state(recipe, recipe.init, pretraining.model.config))
    return pretraining


def _initial_state(recipe: Recipe, source: str, config: BlipConfig) -> dict[str, Tensor]:
    """The checkpoint's training state, but the ids, which are of other data, and a queue of another length."""
    state = load_training_state(source, config)
    state.pop("idx_queue", None)
    length = state["image_queue"].shape[-1] if "image_queue" in state else recipe.objective.queue_size
    if length == recipe.objective.queue_size:
        return state
    if collectives.world()[0] == 0:
        print(f"blip-fast: the queue of {source} holds {length} entries, objective.queue_size is "
              f"{recipe.objective.queue_size}: it starts anew", file=sys.stderr)
    return {name: tensor for name, tensor in state.items() if name not in QUEUES}


def prepare_model(recipe: Recipe, tokenizer: Tokenizer) -> BlipModel:
    """A model of the recipe's sizes with fresh weights, or the initial checkpoint's with the recipe's parts."""
    if recipe.init is None:
        return BlipModel(with_tokenizer(recipe.model, tokenizer))
    start, _ = load_model(recipe.init, tokenizer=tokenizer, image_size=recipe.model.vision.image_size)
    parts = dataclasses.replace(
        start.config,
        vision=dataclasses.replace(start.config.vision, drop_path=recipe.model.vision.drop_path),
        text=dataclasses.replace(start.config.text, dropout=recipe.model.text.dropout),
        **{name: getattr(recipe.model, name) for name in ("text_stacks", "contrastive", "matching", "reasoning")},
    )
    return start.restricted_to(parts)


def with_tokenizer(config: BlipConfig, tokenizer: Tokenizer) -> BlipConfig:
    """The config with the tokenizer's vocabulary size and special tokens."""
    tokens = SpecialTokens(pad=tokenizer.pad_id, cls=tokenizer.cls_id, sep=tokenizer.sep_id, bos=tokenizer.bos_id,
                           enc=tokenizer.enc_id)
    return dataclasses.replace(config, tokens=tokens, text=dataclasses.replace(config.text,
                                                                               vocab_size=tokenizer.vocab_size))
