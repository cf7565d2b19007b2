"""A recipe: everything that defines a training run. Read from YAML, overridden by
options, saved with the run."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from blip_fast.data.input.sources import Source, check_mix
from blip_fast.data.shards.shard_cache import CACHE
from blip_fast.data.shards.shards import is_url
from blip_fast.model.config import BlipConfig
from blip_train.schedule import Schedule
from blip_train.steps.pretraining import Objective
from blip_train.steps.table import StepKind, step_kind

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")


@dataclass(frozen=True)
class TokenizerRecipe:
    """Where token ids come from. They set the model's vocabulary size and special tokens.

    `source`: a vocab.txt, a directory with tokenizer files, or a Hub id. Without it a WordPiece vocabulary of
    `vocab_size` is trained on the training captions. `max_tokens` truncates captions and keeps [SEP].
    """

    source: str | None = None
    vocab_size: int = 4000
    max_tokens: int = 30


@dataclass(frozen=True)
class ScenesRecipe:
    """Drawn pictures: `count` for training, of which a share `noise` has a wrong caption and a share
    `one_object_share` shows a single object, and `test` held-out ones with two objects.

    With `twins` each training scene is followed by one that differs in one word. A `shuffle_buffer` of 1
    keeps the two in one batch, where each is the other's hardest negative.
    """

    count: int = 20000
    noise: float = 0.3
    test: int = 200
    one_object_share: float = 0.1
    twins: bool = False
    seed: int = 0


@dataclass(frozen=True)
class DataRecipe:
    """The pairs to train on, and how their pictures are changed.

    One of three: `root`, webdataset shards in a directory or under a URL (`s3://…`), or a folder with
    annotations.jsonl and its images, which the first run packs into shards; `sources`, several of
    these, each with a name and optionally a weight; or `scenes`, drawn into the run's directory. Shards
    under URLs are fetched into the directory `cache`, which is limited to `cache_gb`. `crop_scale`:
    area share of the random resized crop; null only resizes. Samples are shuffled within
    `shuffle_buffer`. `prompt` is put before every caption.
    """

    root: str | None = None
    sources: list[Source] | None = None
    scenes: ScenesRecipe | None = None
    cache: str = CACHE
    cache_gb: float = 100.0
    train_split: str | None = "train"
    test_split: str | None = "test"
    crop_scale: tuple[float, float] | None = (0.2, 1.0)
    flip: bool = True
    rand_augment: bool = True
    shuffle_buffer: int = 4096
    threads: int = 2
    max_words: int = 30
    prompt: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("root", "sources", "scenes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"data.{' and data.'.join(given)} are given together: train on one data set, on "
                             "several sources or on drawn scenes")
        if self.sources is not None:
            check_mix(self.sources)


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW with decoupled weight decay, on `all` parameters as published or on `matrices` alone (no norms, no biases,
    no [CLS], no temperature). `clip` is a gradient norm; 0: no clipping.

    `frozen` parameters are not trained. They are given by their names or first parts, where `*` stands for
    any part and `0-5` for numbers (`vision.blocks.0-5`, `text.*.word_embeds`).
    """

    weight_decay: float = 0.05
    decay: Literal["all", "matrices"] = "all"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))


@dataclass(frozen=True)
class AdapterRecipe:
    """Low-rank adapters (LoRA) next to linear layers; only they are trained. `targets` name the layers in the
    form of `optimizer.frozen`. An adapter's output is scaled by `alpha` / `rank`. Needs peft."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("vision.blocks.*.qkv", "text.*.layers.*.self_attention.*.qkv",
                                "text.*.layers.*.cross_attention.query")

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or self.alpha < 1 or not self.targets:
            raise ValueError("adapters.rank and alpha must be at least 1 and targets name a layer, got "
                             f"{self.rank}, {self.alpha} and {list(self.targets)}")


@dataclass(frozen=True)
class RuntimeRecipe:
    """How the run is carried out. `batch_size` is one rank's; `ranks` processes are started where no launcher did.

    An optimiser step averages the gradients of `accumulation` batches per rank; ITC's keys and ITM's
    negatives are still those of one batch and the queue. `streams` readers divide the data, each with its own
    shuffle buffer (0: one per rank). A run continues, with the same batches, on any number of ranks that
    divides `streams`, as long as ranks × accumulation stays the same. The last `recomputed_blocks` blocks of
    the vision transformer and of the text stack keep no activations and recompute them in the backward.
    `compile` passes each block to torch.compile (on GPUs; not with ZeRO 3). `offload` keeps optimiser state,
    and updates weights, in host memory (ZeRO 1 to 3). `adamw` names the optimiser's implementation (see
    adamw.py). `patience` batches in a row may be left out because a loss is not finite. Each phase of a step,
    and saving, may take `timeout` seconds; a rank that hangs longer ends the run. `precision` `auto` is what
    the first rank's device multiplies best; a resumed run keeps its precision. With `background_saves` steps
    continue while a copy of the checkpoint in host memory is written.
    """

    ranks: int = 1
    batch_size: int = 75
    accumulation: int = 1
    streams: int = 0
    recomputed_blocks: int = 0
    compile: bool = False
    offload: bool = False
    adamw: Literal["auto", "torch", "deepspeed", "apex"] = "auto"
    patience: int = 10
    timeout: float = 600.0
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    log_every: int = 10
    save_every: int = 1000
    keep_checkpoints: int = 2
    background_saves: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.ranks < 1:
            raise ValueError(f"runtime.batch_size and ranks must be at least 1, got {self.batch_size} and "
                             f"{self.ranks}")
        if self.accumulation < 1 or min(self.streams, self.recomputed_blocks, self.patience) < 0:
            raise ValueError("runtime.accumulation must be at least 1, streams, recomputed_blocks and "
                             "patience at least 0")
        if self.compile and self.zero_stage == 3:
            raise ValueError("runtime.compile is set with zero_stage 3, whose gathering of weights breaks "
                             "every graph: choose stage 0, 1 or 2")
        if self.offload and self.zero_stage == 0:
            raise ValueError("runtime.offload is set with zero_stage 0, which has no shards to keep: choose "
                             "1, 2 or 3")
        if self.timeout <= 0:
            raise ValueError(f"runtime.timeout must be more than 0 seconds, got {self.timeout}")
        if self.log_every < 1 or self.save_every < 1 or self.keep_checkpoints < 1:
            raise ValueError("runtime.log_every, save_every and keep_checkpoints must be at least 1")


@dataclass(frozen=True)
class EvaluationRecipe:
    """What is measured on the test split when the run has ended; 0 images: nothing. `rerank` candidates of each image
    and text are re-ranked by ITM; 0: ITC's order is kept."""

    images: int = 0
    rerank: int = 16
    captions: int = 24
    beams: int = 3


@dataclass(frozen=True)
class Recipe:
    """One run. `init` names a checkpoint (any layout) to start from; its sizes then replace those of `model`."""

    name: str = "pretrain"
    runs: str = "runs"
    seed: int = 0
    init: str | None = None
    model: BlipConfig = field(default_factory=BlipConfig)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    objective: Objective = field(default_factory=Objective)
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    adapters: AdapterRecipe | None = None
    runtime: RuntimeRecipe = field(default_factory=RuntimeRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self) -> None:
        kind = self.step_kind
        own_negatives = "itm" in self.objective.losses and self.objective.negatives == "local"
        if own_negatives and self.runtime.batch_size < 2:
            raise ValueError("runtime.batch_size must be at least 2: ITM draws its negatives from the rank's "
                             "own batch")
        if self.evaluation.images and (self.data.sources is not None or is_url(self.data.root or "")):
            raise ValueError("data.sources and shards under a URL have no test split: set evaluation.images "
                             "to 0, and measure the model with `blip-fast evaluate`")
        for name in self.objective.losses:
            if not kind.losses[name].fits(self.model):
                raise ValueError(f"objective.losses has {name}, which needs a model with "
                                 f"{kind.losses[name].needs}")
        if self.adapters is not None and self.init is None:
            raise ValueError("adapters are set but init is not: they train little among weights that know "
                             "something; name a checkpoint")
        if self.evaluation.images and not kind.of_pairs:
            raise ValueError("evaluation.images must be 0 for VQA, NLVR2 and VisDial: a run's report "
                             "measures retrieval and captions")

    @property
    def step_kind(self) -> StepKind:
        """The training step that the objective's losses choose. Raises
        ValueError if no step computes them."""
        return step_kind(self.objective.losses)

    @property
    def directory(self) -> Path:
        return Path(self.runs) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML; `overrides` are command-line options (`["--schedule.lr=1e-4"]`).

    Raises ValueError naming the key that is unknown or has a bad value.
    """
    parser = ArgumentParser(exit_on_error=False)
    add_recipe_arguments(parser, Recipe)
    try:
        return read_recipe(parser.parse_args(["--config", str(path), *(overrides or [])]), Recipe)
    except ArgumentError as error:
        raise ValueError(f"recipe {path}: {' '.join(str(error).split())}") from error


def add_recipe_arguments(parser: ArgumentParser, kind: type) -> None:
    """Add every key of a recipe, which is a dataclass, as an option, and
    `--config` to read them from a file."""
    parser.add_argument("--config", action="config",
                        help="recipe (YAML); options after it override its values")
    parser.add_class_arguments(kind, fail_untyped=True)


def read_recipe(arguments: Namespace, kind: type[Kind]) -> Kind:
    """The recipe that parsed arguments describe."""
    parser = ArgumentParser(exit_on_error=False)
    add_recipe_arguments(parser, kind)
    names = [f.name for f in dataclasses.fields(kind)]
    values = parser.instantiate(Namespace({name: arguments[name] for name in names}))
    return kind(**{name: values[name] for name in names})


def _plain(value: Any) -> Any:
    """Tuples as lists, so that any YAML reader can read them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
