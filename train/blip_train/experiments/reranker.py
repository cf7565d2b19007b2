"""Trains BERT-CNN to tell captions that belong to a label from those that do not (Sabir et al. 2023).

As published: binary cross-entropy, Adam at 1e-5, 5 epochs with 128 pairs per batch, a fifth of the pairs held
out; BERT's layers are trained, its embeddings are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_fast.metrics.binary import accuracy, area_under_roc
from blip_fast.model.bert_cnn import Bert, BertCnn, pack_pairs, select_pairs
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.reranking import related

PUBLISHED_COLUMNS = ("visual", "caption", "is_related")
ANSWERS = {"0": False, "1": True}


@dataclass(frozen=True)
class Pair:
    """A label, a caption, and whether the two belong together."""

    label: str
    caption: str
    belong: bool


@dataclass(frozen=True)
class RerankerRecipe:
    """How to train; the defaults are the published values. `held_out` is a share of the pairs."""

    epochs: int = 5
    batch_size: int = 128
    lr: float = 1e-5
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and "
                             f"{self.batch_size}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")


@dataclass(frozen=True)
class Epoch:
    """Mean loss of an epoch's batches, and the model's figures on the held-out pairs
    after it. `number` starts at 1."""

    number: int
    loss: float
    accuracy: float
    auc: float


def read_pairs(path: str | Path) -> list[Pair]:
    """Rows of a TSV file: label, caption, 0 or 1. If its first line names columns, as in the published file,
    the columns `visual`, `caption` and `is_related` are read.

    Raises ValueError naming the first malformed line, or if there is no row.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    header, columns = [field.strip() for field in lines[0].split("\t")], [0, 1, 2]
    has_header = set(PUBLISHED_COLUMNS) <= set(header)
    if has_header:
        columns = [header.index(name) for name in PUBLISHED_COLUMNS]
    width = len(header) if has_header else 3
    pairs = [_pair(line, columns, width, f"{path}, line {number}")
             for number, line in enumerate(lines, 1) if line.strip() and not (has_header and number == 1)]
    if not pairs:
        raise ValueError(f"{path} holds no pair")
    return pairs


def _pair(line: str, columns: Sequence[int], width: int, where: str) -> Pair:
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != width:
        raise ValueError(f"{where} has {len(fields)} fields between tabs, not {width}: a label, a caption, 0 "
                         "or 1")
    label, caption, answer = (fields[column] for column in columns)
    if not label or not caption:
        raise ValueError(f"{where} has no {'caption' if label else 'label'}")
    if answer not in ANSWERS:
        raise ValueError(f"{where} ends in {answer!r}, not in 0 or 1")
    return Pair(label, caption, ANSWERS[answer])


def split_pairs(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Returns (pairs to train on, held-out pairs), each with the same share of both answers.

    Raises ValueError if there are fewer than two pairs of one answer.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Pair], list[Pair]] = [], []
    for answer in (False, True):
        mine = [pair for pair in pairs if pair.belong == answer]
        if len(mine) < 2:
            raise ValueError(f"{len(mine)} of the pairs are marked {int(answer)}: two at least of 0 and of 1 "
                             "are needed, one to train on and one to hold out")
        count = min(max(1, round(held_out * len(mine))), len(mine) - 1)
        order = torch.randperm(len(mine), generator=generator).tolist()
        parts[1].extend(mine[place] for place in order[:count])
        parts[0].extend(mine[place] for place in order[count:])
    return parts


def train_reranker(bert: Bert, tokenizer: Tokenizer, pairs: Sequence[Pair], held_out: Sequence[Pair],
                   recipe: RerankerRecipe, *, on_epoch: Callable[[Epoch], None] = lambda epoch: None,
                   advance: Callable[[], None] = lambda: None) -> tuple[BertCnn, list[Epoch]]:
    """Train on `pairs`, on the device that `bert` is on. The same seed gives the same model on a CPU.

    Args:
        on_epoch: called with each epoch as it ends.
        advance: called after every step.

    Returns:
        The model after the last epoch, in evaluation mode, and all epochs.

    Raises:
        ValueError: the loss or a score is not finite; the held-out pairs lack one of the answers.
    """
    device, truth = bert.norm.weight.device, torch.tensor([pair.belong for pair in held_out])
    answers = torch.tensor([float(pair.belong) for pair in pairs])
    packed, unseen = _pack(tokenizer, pairs), _pack(tokenizer, held_out)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        model = BertCnn(bert).to(device)
        for embeds in (bert.word_embeds, bert.position_embeds, bert.type_embeds, bert.norm):
            embeds.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=recipe.lr)
        epochs = []
        for number in range(1, recipe.epochs + 1):
            model.train()
            losses = []
            for batch in torch.randperm(len(pairs)).split(recipe.batch_size):
                some, types = select_pairs(*packed, batch)
                loss = F.binary_cross_entropy_with_logits(model(some.to(device), types.to(device)),
                                                          answers[batch].to(device))
                _require_finite(loss, number)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                advance()
            model.eval()
            scores = related(model, *unseen)
            _require_finite(scores, number)
            epochs.append(Epoch(number, sum(losses) / len(losses), accuracy(scores, truth),
                                area_under_roc(scores, truth)))
            on_epoch(epochs[-1])
    return model.requires_grad_(True), epochs


def _pack(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> tuple[PackedTexts, Tensor]:
    return pack_pairs(tokenizer, [pair.caption for pair in pairs], [pair.label for pair in pairs])


def _require_finite(values: Tensor, epoch: int) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"the model is no longer finite in epoch {epoch}: choose a smaller lr")
