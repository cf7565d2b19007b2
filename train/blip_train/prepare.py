"""What a run needs before its first step: shards, a tokenizer, a model and its training step."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from blip_fast.checkpoint import load_model, load_training_state, reasoning_model
from blip_fast.checkpoint.original import QUEUES, tokenizer_directory
from blip_fast.data.input.decoding import ReadBatch
from blip_fast.data.input.sources import Source
from blip_fast.data.shards.annotated import ANNOTATIONS
from blip_fast.data.shards.pack import pack
from blip_fast.data.shards.shards import INDEX, is_url, iterate, read_index
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens
from blip_fast.model.tokenizer import Tokenizer, clean_caption
from blip_fast.scenes.scenes import write_scenes
from blip_train import collectives
from blip_train.adapters import adapt
from blip_train.checkpoint.training_state import restore_state
from blip_train.freezing import freeze
from blip_train.recipe import Recipe
from blip_train.steps.step import TrainingStep
from blip_train.steps.table import TextLimits

# In a run's directory:
EXPORT = "model"  # the exported model
ADAPTERS = "adapters"  # the trained adapters, in peft's format
TOKENIZER = "tokenizer"


def check_sources(recipe: Recipe) -> None:
    """Raise ValueError, FileNotFoundError or OSError if the recipe needs data or
    a package that is not there."""
    if recipe.adapters is not None and find_spec("peft") is None:
        raise ValueError("adapters need peft, which is not installed: pip install 'blip-fast[peft]'")
    if recipe.data.scenes is not None:
        return
    for source in named_sources(recipe):
        if is_url(source.root):
            read_index(source.root)
            if recipe.tokenizer.source is None and recipe.init is None:
                raise ValueError(f"tokenizer.source is not set, and none is trained on captions under "
                                 f"{source.root}: name a tokenizer")
        elif not any((Path(source.root) / name).is_file() for name in (ANNOTATIONS, INDEX)):
            where = "data.root" if recipe.data.sources is None else f"source {source.name}:"
            raise ValueError(f"{where} {source.root} holds neither {ANNOTATIONS} nor {INDEX}: name a folder "
                             "of annotated images or of packed shards")


def named_sources(recipe: Recipe) -> list[Source]:
    """The recipe's data sets as it names them; `data.root` is one called "data". Raises
    ValueError if there is none."""
    if recipe.data.sources is not None:
        return recipe.data.sources
    if recipe.data.root is None:
        raise ValueError("data.root is not set: name a folder of annotated images or of shards (--data.root "
                         "DIR)")
    return [Source("data", recipe.data.root)]


def check_directory(recipe: Recipe, resume: bool) -> None:
    """Raise ValueError if the run's directory already holds a run that is not to be resumed."""
    if not resume and (recipe.directory / "log.jsonl").exists():
        raise ValueError(f"{recipe.directory} holds a run already: go on with --resume, or choose another "
                         "--name")


def prepare_shards(recipe: Recipe) -> list[Source]:
    """The recipe's data sets as shards: those that it names, or packed into the run's directory (once)."""
    if recipe.data.scenes is not None:  # already in random order, twins next to each other
        return [_pack_source(recipe, Source("scenes", str(source_folder(recipe, "train"))), None, None)]
    # Packing shuffles: similar rows are often next to each other, and training shuffles only within a buffer.
    return [source if is_url(source.root) or (Path(source.root) / INDEX).is_file()
            else _pack_source(recipe, source, recipe.data.train_split, recipe.seed)
            for source in named_sources(recipe)]


def _pack_source(recipe: Recipe, source: Source, split: str | None, shuffle_seed: int | None) -> Source:
    folder, shards = Path(source.root), recipe.directory / "shards" / source.name
    if not (shards / INDEX).is_file():
        pack(folder, folder / ANNOTATIONS, shards, split=split, shuffle_seed=shuffle_seed)
    return dataclasses.replace(source, root=str(shards))


def source_folder(recipe: Recipe, split: Literal["train", "test"]) -> Path:
    """The folder of a split's images: `data.root`, or scenes drawn into the run's directory (once)."""
    if recipe.data.root is not None:
        return Path(recipe.data.root)
    scenes = recipe.data.scenes
    assert scenes is not None
    folder = recipe.directory / "scenes" / split
    if not (folder / ANNOTATIONS).is_file():
        size = recipe.model.vision.image_size
        if split == "train":
            write_scenes(folder, scenes.count, split, scenes.seed, scenes.noise, size,
                         scenes.one_object_share, scenes.twins)
        else:  # two objects each, so that no two captions are alike
            write_scenes(folder, scenes.test, split, scenes.seed, 0.0, size, one_object_share=0.0)
    return folder


def prepare_tokenizer(recipe: Recipe, shards: list[Source]) -> Tokenizer:
    """The recipe's tokenizer; if it names none, the initial checkpoint's; else
    one trained on the captions."""
    source = recipe.tokenizer.source or recipe.init
    if source is None:
        texts = (clean_caption(text) for each in shards for sample in iterate(each.root)
                 for text in _texts(sample.record))
        return Tokenizer.train(texts, recipe.tokenizer.vocab_size)
    if Path(source).is_file() and Path(source).suffix == ".txt":
        return Tokenizer.from_vocab_file(source)
    if Path(source).is_file():
        directory = tokenizer_directory(Path(source))
        if not directory.is_dir():
            raise ValueError(f"{source} brings no tokenizer ({directory.name}): name one with "
                             "--tokenizer.source")
        return Tokenizer.from_pretrained(directory)
    return Tokenizer.from_pretrained(source)


def _texts(record: dict[str, Any]) -> list[str]:
    return [*record["captions"], *record.get("answers", []),
            *([record["question"]] if "question" in record else [])]


def prepare_step(recipe: Recipe, tokenizer: Tokenizer) -> TrainingStep:
    """The recipe's training step, frozen and adapted as the recipe says.

    It takes over the initial checkpoint's momentum copies and queue features,
    as in the published fine-tuning.
    """
    step = make_step(prepare_model(recipe, tokenizer), recipe)
    if recipe.init is not None and step.momentum_state() is not None:
        restore_state(step, _initial_state(recipe, recipe.init, step.model.config))
    freeze(step, recipe.optimizer.frozen)
    if recipe.adapters is not None:
        adapt(step, recipe.adapters)
    return step


def make_step(model: BlipModel, recipe: Recipe) -> TrainingStep:
    """The recipe's training step around a model."""
    return recipe.step_kind.make(model, recipe.objective, recipe.seed)


def collation(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[ReadBatch], Any]:
    """The function that turns samples that were read into the step's batch."""
    limits = TextLimits(recipe.tokenizer.max_tokens, recipe.data.max_words)
    return lambda read: recipe.step_kind.collate(read, tokenizer, limits)


def _initial_state(recipe: Recipe, source: str, config: BlipConfig) -> dict[str, Tensor]:
    """The checkpoint's training state without ids, which belong to other data, and
    without a queue of another length."""
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
    """A model of the recipe's sizes with fresh weights, or the initial checkpoint's, with the
    parts that the recipe names."""
    if recipe.init is None:
        return BlipModel(with_tokenizer(recipe.model, tokenizer))
    start, _ = load_model(recipe.init, tokenizer=tokenizer, image_size=recipe.model.vision.image_size)
    twins = recipe.model.reasoning and not start.config.reasoning
    # VQA's decoder attends to questions. If images have another width, its keys and
    # values start anew, as published.
    keys = (recipe.model.text_stacks == "untied" != start.config.text_stacks
            and start.config.vision.width != start.config.text.width)
    if recipe.adapters is not None and (twins or keys):
        raise ValueError(f"{recipe.init} lacks weights of this task, which would start anew but not be "
                         "trained together with adapters: fine-tune it without them first")
    if twins:
        start = reasoning_model(start, recipe.seed)
    parts = dataclasses.replace(
        start.config,
        vision=dataclasses.replace(start.config.vision, drop_path=recipe.model.vision.drop_path),
        text=dataclasses.replace(start.config.text, dropout=recipe.model.text.dropout),
        **{name: getattr(recipe.model, name)
           for name in ("text_stacks", "contrastive", "matching", "reasoning")},
    )
    return start.restricted_to(parts, ["text.decoder.image_to_kv.0.weight"] if keys else [])


def with_tokenizer(config: BlipConfig, tokenizer: Tokenizer) -> BlipConfig:
    """The config with the tokenizer's vocabulary size and special tokens."""
    tokens = SpecialTokens(pad=tokenizer.pad_id, cls=tokenizer.cls_id, sep=tokenizer.sep_id,
                           bos=tokenizer.bos_id, enc=tokenizer.enc_id)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(config, tokens=tokens, text=text)
