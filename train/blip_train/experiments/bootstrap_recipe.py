"""The recipe of the whole loop (BLIP figure 3): the recipes of its stages, their data and seeds."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import ArgumentError
from collections.abc import Set
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from blip_fast.capfilt.folder import require_pyarrow
from blip_fast.command_line.capfilt_options import add_capfilt_options, filter_config
from blip_fast.data.shards.annotated import annotated_images
from blip_fast.data.shards.shards import INDEX, is_url
from blip_train.prepare import EXPORT, check_sources
from blip_train.recipe import Recipe, load_recipe

PRETRAIN, CAPTIONER, FILTER, ANEW = "pretrain", "captioner", "filter", "bootstrapped"  # a run's folders
CLEANED, SCENES = "cleaned", "scenes"
DRAWN = "{scenes}"  # in a stage's overrides and in paths: the folder of the drawn data
LOSSES = {PRETRAIN: {"itc", "itm", "lm"}, CAPTIONER: {"lm"}, FILTER: {"itc", "itm"}}  # that each stage needs


@dataclass(frozen=True)
class StageRecipe:
    """A training recipe: a YAML file, or the name of one of `blip_train/recipes`, with values that replace its own
    (`{schedule.max_steps: 800}`)."""

    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnData:
    """Scenes for the loop, drawn anew for each seed: `web` ones, of which `noise` carry a wrong caption; clean `human`
    ones, in twins (see `recipe.ScenesRecipe`); clean ones for `calibration`, drawn separately; and held-out
    ones for the `test`. They are packed into `{scenes}/web`, `{scenes}/human`, …"""

    web: int
    human: int
    calibration: int
    test: int
    noise: float = 0.5
    image_size: int = 48

    def __post_init__(self) -> None:
        if not 0 < round(self.web * self.noise) < self.web:
            raise ValueError(f"scenes.noise {self.noise} of {self.web} web scenes: there must be right and "
                             "wrong ones")
        if min(self.human, self.calibration, self.test) < 1:
            raise ValueError("scenes: human, calibration and test must be at least 1")


@dataclass(frozen=True)
class Calibration:
    """Clean pairs, annotated or packed, of which the filter's threshold keeps the share `keep`. The filter must not
    have been trained on them."""

    data: str
    split: str | None = None
    keep: float = 0.97

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"calibration.keep is {self.keep}: it is a share, more than 0 and at most 1")


@dataclass(frozen=True)
class BootstrapRecipe:
    """The loop: pre-train; fine-tune a captioner and a filter; clean the sources `web` with them; pre-train anew.

    `pretrain` mixes `data.sources`, which include those named in `web`; these are shards. The last
    stage is the same recipe with what CapFilt kept in their place. `capfilt` are options of `blip-fast
    capfilt`; without `calibration` its `threshold` is used. Both pre-trained models are measured on the
    annotated images of `test`, in `test_split`; with `test` null they are not measured. Each of `seeds`
    is a whole loop in `runs/NAME/seed-N`, and replaces the stages' own seeds. `precision` is for
    stages, and CapFilt's models, that do not name one. `auto` is resolved on the machine that starts
    the loop, and holds to its end.
    """

    pretrain: StageRecipe
    captioner: StageRecipe
    filter: StageRecipe
    web: list[str]
    capfilt: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    scenes: DrawnData | None = None
    test: str | None = None
    test_split: str | None = "test"
    seeds: list[int] = field(default_factory=lambda: [0])
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    name: str = "bootstrap"
    runs: str = "runs"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {self.seeds}: give at least one, none twice, each 0 or more")
        if not self.web or len(set(self.web)) < len(self.web):
            raise ValueError(f"web is {self.web}: name the sources of the pre-training that CapFilt cleans, "
                             "each once")
        if self.calibration is not None and "threshold" in self.capfilt:
            raise ValueError("capfilt.threshold and calibration both set the filter's threshold: give one of "
                             "them")

    @property
    def directory(self) -> Path:
        return Path(self.runs) / self.name


@dataclass(frozen=True)
class Loop:
    """One seed's loop, checked: its stages as recipes in the order of training, and the arguments of
    `blip-fast capfilt` for each source to clean."""

    recipe: BootstrapRecipe
    seed: int
    directory: Path
    stages: dict[str, Recipe]
    capfilt: dict[str, list[str]]

    def located(self, path: str) -> str:
        """A path of the recipe, with `{scenes}` replaced by the folder of this loop's drawn data."""
        return path.replace(DRAWN, str(self.directory / SCENES))


def plan(recipe: BootstrapRecipe) -> list[Loop]:
    """Check what can be checked before the first stage starts. Returns one loop per seed.

    Raises:
        ValueError, FileNotFoundError or OSError: a stage's recipe, an option of CapFilt or a path is wrong,
            or data or a package is missing; names the stage.
    """
    if "RANK" in os.environ:
        raise ValueError("bootstrap starts the ranks of its stages itself: run it without torchrun, or carry "
                         "its stages out one by one with `blip-fast train` and `blip-fast capfilt`")
    if recipe.scenes is None and DRAWN in json.dumps(dataclasses.asdict(recipe)):
        raise ValueError(f"{DRAWN} stands in a path, but no scenes are to be drawn: set scenes, or name a "
                         "folder")
    require_pyarrow()
    loops = [_loop(recipe, seed) for seed in recipe.seeds]
    if recipe.scenes is None:
        _check_data(recipe, loops[0])
    return loops


def _loop(recipe: BootstrapRecipe, seed: int) -> Loop:
    directory = recipe.directory / f"seed-{seed}"
    pretrain = _stage(PRETRAIN, recipe.pretrain, seed, directory)
    sources = pretrain.data.sources or []
    if missing := [name for name in recipe.web if name not in [source.name for source in sources]]:
        raise ValueError(f"web names {missing[0]}, which is no source of the pre-training: its data.sources "
                         f"are {', '.join(source.name for source in sources) or 'not set'}")
    mixed = [dataclasses.replace(source, root=str(directory / CLEANED / source.name))
             if source.name in recipe.web
             else source for source in sources]
    start = {"init": str(directory / PRETRAIN / EXPORT)}
    stages = {PRETRAIN: pretrain,
              CAPTIONER: _stage(CAPTIONER, recipe.captioner, seed, directory, start),
              FILTER: _stage(FILTER, recipe.filter, seed, directory, start),
              ANEW: dataclasses.replace(pretrain, name=ANEW,
                                        data=dataclasses.replace(pretrain.data, sources=mixed))}
    stages = {name: _in_precision(stage, recipe.precision) for name, stage in stages.items()}
    for stage, losses in LOSSES.items():
        if lacking := losses - set(stages[stage].objective.losses):
            raise ValueError(f"{stage}: objective.losses lacks {', '.join(sorted(lacking))}, which this "
                             "stage needs")
    loop = Loop(recipe, seed, directory, stages, {})
    roots = {source.name: source.root for source in sources}
    return dataclasses.replace(loop, capfilt={name: _capfilt(loop, name, roots[name]) for name in recipe.web})


def _stage(stage: str, given: StageRecipe, seed: int, directory: Path,
           start: dict[str, Any] | None = None) -> Recipe:
    """The stage's recipe with its overrides, and with the values that the loop itself sets, which must not be
    overridden."""
    own = {"name": stage, "runs": str(directory), "seed": seed, "evaluation.images": 0, **(start or {})}
    _refuse(stage, own.keys() & given.overrides.keys())
    path = Path(given.recipe)
    if not path.is_file():
        path = Path(str(files("blip_train") / "recipes" / given.recipe))
    if not path.is_file():
        raise FileNotFoundError(f"{stage}: {given.recipe} is neither a file nor a recipe of blip_train: name "
                                "a YAML file")
    values = {key: value if isinstance(value, str) else json.dumps(value)  # a list as YAML
              for key, value in (given.overrides | own).items()}
    try:
        return load_recipe(path, [f"--{key}={value}".replace(DRAWN, str(directory / SCENES))
                                  for key, value in values.items()])
    except ValueError as error:
        raise ValueError(f"{stage}: {error}") from error


def _in_precision(stage: Recipe, precision: str) -> Recipe:
    """The stage's recipe, with the loop's precision if it names none."""
    if stage.runtime.precision != "auto":
        return stage
    return dataclasses.replace(stage, runtime=dataclasses.replace(stage.runtime, precision=precision))


def _capfilt(loop: Loop, name: str, root: str) -> list[str]:
    """The checked arguments of `blip-fast capfilt` for one source."""
    own = {**{task: loop.stages[task].directory / EXPORT for task in (CAPTIONER, FILTER)},
           "prompt": loop.stages[CAPTIONER].data.prompt.strip(), "seed": loop.seed,
           "output": loop.directory / CLEANED / name}
    given = loop.recipe.capfilt
    _refuse("capfilt", given.keys() & {*own, "shards", "resume", "shard", "json"})
    options = {"dtype": loop.recipe.precision} | given | own
    arguments = [root, "--resume", *(f"--{key}={value}" for key, value in options.items())]
    try:
        parsed = capfilt_options(arguments)
        filter_config(parsed)
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"capfilt: {' '.join(str(error).split())}") from error
    sizes = {loop.stages[task].model.vision.image_size for task in (CAPTIONER, FILTER)}
    if len(sizes) > 1 and parsed.image_size is None:
        raise ValueError("captioner and filter have different model.vision.image_size: give both the same, "
                         "or set capfilt.image-size")
    return arguments


def capfilt_options(arguments: list[str]) -> Namespace:
    """Arguments of `blip-fast capfilt`, parsed. Raises ArgumentError."""
    parser = ArgumentParser(exit_on_error=False)
    add_capfilt_options(parser)
    return parser.parse_args(arguments)


def _refuse(where: str, names: Set[str]) -> None:
    if names:
        raise ValueError(f"{where}: {min(names)} is set by the loop itself: leave it out")


def _check_data(recipe: BootstrapRecipe, loop: Loop) -> None:
    """Check that the data is there. (Not called if it is drawn.)"""
    for stage in (PRETRAIN, CAPTIONER, FILTER):
        try:
            check_sources(loop.stages[stage])
        except (ValueError, OSError) as error:
            raise type(error)(f"{stage}: {error}") from error
    for source in loop.stages[PRETRAIN].data.sources or []:
        if source.name in recipe.web and not is_url(source.root) and not (Path(source.root) / INDEX).is_file():
            raise FileNotFoundError(f"source {source.name}: {source.root} holds no {INDEX}: CapFilt reads "
                                    "shards, pack the images with `blip-fast data pack` first")
    if recipe.test is not None:
        annotated_images(recipe.test, recipe.test_split)
    if recipe.calibration is not None:
        annotated_images(recipe.calibration.data, recipe.calibration.split)
