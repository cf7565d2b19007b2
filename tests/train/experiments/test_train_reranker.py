"""Training BERT-CNN: its TSV, a planted rule, the seed, the first step by hand,
refused input, and its measures."""

import json
import math
import random
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from bert_models import bert_cnn, independent, save_bert
from blip_train.commands.train_reranker import COMMAND
from blip_train.experiments.reranker import Pair, RerankerRecipe, read_pairs, split_pairs, train_reranker

from blip_fast import cli
from blip_fast.checkpoint.bert import load_bert, load_bert_cnn
from blip_fast.metrics.binary import accuracy, area_under_roc
from blip_fast.model.bert_cnn import pack_pairs
from blip_fast.tasks.reranking import related

WORDS = ["dogs", "man", "ball", "table", "horse", "grass"]


@pytest.fixture
def bert(tmp_path) -> Path:
    save_bert(tmp_path / "bert")
    return tmp_path / "bert"


# ---------------------------------------------------------------- measures


def test_accuracy_and_area_by_count():
    rng = random.Random(0)
    for _ in range(20):
        scores = [rng.choice([0.1, 0.3, 0.5, 0.7, 0.9]) for _ in range(rng.randint(2, 30))]
        truth = [True, False, *(rng.random() < 0.4 for _ in scores[2:])]
        pairs = [(a, b) for a, yes in zip(scores, truth, strict=True)
                 for b, no in zip(scores, truth, strict=True)
                 if yes and not no]
        area = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        given = torch.tensor(scores, dtype=torch.float64), torch.tensor(truth)
        assert area_under_roc(*given) == pytest.approx(area)
        right = sum((a > 0.5) == yes for a, yes in zip(scores, truth, strict=True)) / len(scores)
        assert accuracy(*given) == pytest.approx(right)
    nan = torch.tensor([math.nan, math.nan])
    assert accuracy(nan, torch.tensor([True, False])) == 0
    for scores, truth, said in ((nan, [True, False], "NaN"), (torch.ones(2), [True, True], "both kinds"),
                                (torch.ones(0), [], "one case at least"),
                                (torch.ones(2), [True], "one case at least")):
        with pytest.raises(ValueError, match=said):
            area_under_roc(scores, torch.tensor(truth, dtype=torch.bool))


# ---------------------------------------------------------------- training


def planted(count: int, seed: int) -> list[Pair]:
    """A caption belongs to a label that is one of its words."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        words = rng.sample(WORDS, 3)
        belong = number % 2 == 0
        label = rng.choice(words if belong else [word for word in WORDS if word not in words])
        pairs.append(Pair(label, " ".join(words), belong))
    return pairs


def write(path: Path, pairs: list[Pair]) -> Path:
    path.write_text("".join(f"{pair.label}\t{pair.caption}\t{int(pair.belong)}\n" for pair in pairs))
    return path


def command(*arguments) -> int:
    return cli._run("train-reranker", COMMAND, [*map(str, arguments)])


def test_a_planted_rule_is_learnt(tmp_path, capsys):
    """Trained by the command from a TSV: good figures on held-out pairs, and on
    pairs that the file never has."""
    save_bert(tmp_path / "bert", num_hidden_layers=2, hidden_size=64, hidden_dropout_prob=0.0)
    pairs = planted(1500, seed=1)
    capsys.readouterr()  # of transformers, which imports DeepSpeed, which writes to standard output
    assert command(write(tmp_path / "pairs.tsv", pairs), "--bert", tmp_path / "bert", "--output",
                   tmp_path / "out", "--epochs", 8, "--batch-size", 32, "--lr", 1e-3, "--json") == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["pairs"], said["held_out"], said["chance"]) == (1200, 300, {"accuracy": 0.5, "auc": 0.5})
    assert said["accuracy"] >= 0.97 and said["auc"] >= 0.99
    assert err.count("\n") == 8 and "epoch 8: loss" in err
    model, tokenizer = load_bert_cnn(tmp_path / "out")
    seen = {(pair.caption, pair.label) for pair in pairs}
    unseen = [(" ".join(words), label) for words in permutations(WORDS, 3) for label in WORDS
              if (" ".join(words), label) not in seen]
    truth = torch.tensor([label in caption.split() for caption, label in unseen])
    assert len(unseen) > 50 and 0.2 < truth.double().mean() < 0.8
    assert accuracy(related(model, *pack_pairs(tokenizer, *zip(*unseen, strict=True))), truth) >= 0.95
    before = load_bert(tmp_path / "bert")[0]
    assert torch.equal(before.word_embeds.weight, model.bert.word_embeds.weight), "embeddings are left as they were"
    assert not torch.equal(before.layers[0].feed_forward.mlp_in.weight,
                           model.bert.layers[0].feed_forward.mlp_in.weight)


def test_the_seed_decides(bert):
    pairs, held_out = split_pairs(planted(60, seed=1), 0.2, seed=0)

    def trained(seed: int) -> tuple[dict, list]:
        recipe = RerankerRecipe(epochs=2, batch_size=16, lr=1e-3, seed=seed)
        model, epochs = train_reranker(*load_bert(bert), pairs, held_out, recipe)
        return model.state_dict(), epochs

    torch.manual_seed(5)
    (first, epochs), state = trained(0), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left as it was"
    (again, told), (other, _) = trained(0), trained(1)
    assert told == epochs and all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_first_epoch_by_an_independent_loop(bert):
    """One step of Adam on all pairs at once, without drop-out, by torch's functions."""
    pairs, held_out = split_pairs(planted(20, seed=1), 0.5, seed=0)
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))
    recipe = RerankerRecipe(epochs=1, batch_size=64, lr=1e-3, seed=7)
    model, (epoch,) = train_reranker(*load_bert(bert), pairs, held_out, recipe)
    twin = bert_cnn(bert, seed=7)
    theirs = transformers.BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    logits = torch.stack([independent(theirs, twin.convolution, twin.output, p.caption, p.label)
                          for p in pairs])
    truth = torch.tensor([float(pair.belong) for pair in pairs])
    loss = F.softplus(torch.where(truth > 0, -logits, logits)).mean()
    assert epoch.loss == pytest.approx(loss.item(), abs=1e-5) and epoch.number == 1
    loss.backward()
    step = twin.output.weight - 1e-3 * twin.output.weight.grad / (twin.output.weight.grad.abs() + 1e-8)
    torch.testing.assert_close(model.output.weight, step, rtol=0, atol=1e-5)


def test_texts_are_tokenised_once(bert, monkeypatch):
    pairs, held_out = split_pairs(planted(60, seed=1), 0.2, seed=0)
    model, tokenizer = load_bert(bert)
    packed, pack = [], tokenizer.pack
    monkeypatch.setattr(tokenizer, "pack",
                        lambda texts, **options: (packed.extend(texts), pack(texts, **options))[1])
    train_reranker(model, tokenizer, pairs, held_out, RerankerRecipe(epochs=3, batch_size=16))
    assert sorted(packed) == sorted(text for pair in [*pairs, *held_out]
                                    for text in (pair.caption, pair.label))


def test_pairs_are_shared_out():
    pairs = planted(50, seed=3) + [Pair("man", str(i), False) for i in range(50)]
    train, held_out = split_pairs(pairs, 0.2, seed=0)
    assert sorted(train + held_out, key=str) == sorted(pairs, key=str)
    assert [sum(pair.belong == answer for pair in held_out) for answer in (True, False)] == [5, 15]
    assert split_pairs(pairs, 0.2, seed=0) == (train, held_out) != split_pairs(pairs, 0.2, seed=1)
    few = planted(4, seed=0)
    for held_out in (0.01, 0.99):
        assert [len(part) for part in split_pairs(few, held_out, 0)] == [2, 2]
    with pytest.raises(ValueError, match="1 of the pairs are marked 1"):
        split_pairs([*few[:2], Pair("a", "b", False)], 0.2, 0)


def test_rows_are_read(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('﻿dog\ta "big" dog\t1\r\n\n  ball , red \t x\t0\n', encoding="utf-8")
    assert read_pairs(path) == [Pair("dog", 'a "big" dog', True), Pair("ball , red", "x", False)]
    path.write_text("id\tid1\tvisual\tcaption\tis_related\n7\t8\tox barrel\ta horse\t1\n")  # as published
    assert read_pairs(path) == [Pair("ox barrel", "a horse", True)]


@pytest.mark.parametrize(("content", "said"), [
    ("dog\ta dog\t1\ndog\ta dog\n", "pairs.tsv, line 2 has 2 fields between tabs, not 3"),
    ("dog\ta\tdog\t1\n", "line 1 has 4 fields"),
    ("dog\ta dog\tyes\n", "line 1 ends in 'yes', not in 0 or 1"),
    ("dog\ta dog\t1\n\n\t a dog\t1\n", "line 3 has no label"),
    ("dog\t \t1\n", "line 1 has no caption"),
    ("visual\tcaption\tis_related\ndog\t1\n", "line 2 has 2 fields between tabs, not 3"),
    ("visual\tcaption\tis_related\n", "holds no pair"),
    ("\n", "holds no pair"),
    ("dog\ta dog\t1\ndog\ta cat\t1\n", "0 of the pairs are marked 0"),
])
def test_command_refuses_rows(bert, tmp_path, content, said):
    (tmp_path / "pairs.tsv").write_text(content)
    with pytest.raises(ValueError, match=said):
        command(tmp_path / "pairs.tsv", "--bert", bert, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_refuses_options(bert, tmp_path):
    tsv = write(tmp_path / "pairs.tsv", planted(20, seed=0))
    for said, options in {"must be at least 1, got 0": ("--epochs", 0), "lr must be above 0": ("--lr", -1),
                          "held_out must lie between 0 and 1": ("--held-out", 1),
                          "no longer finite in epoch 1": ("--lr", 1e30),
                          "device 'abacus' cannot be used": ("--device", "abacus"),
                          "exists already": ("--output", bert),
                          "no directory with a config.json": ("--bert", tsv)}.items():
        given = {"--bert": bert, "--output": tmp_path / "out", options[0]: options[1]}
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            command(tsv, *(part for option in given.items() for part in option))
    assert not (tmp_path / "out").exists()
