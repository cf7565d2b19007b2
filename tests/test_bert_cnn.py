"""BERT-CNN beside transformers' BertModel and torch's own layers; what is trained; captions re-ranked by it."""

import json
import math
import random
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from blip_train.commands.train_reranker import COMMAND as TRAIN
from blip_train.reranker import Pair, RerankerRecipe, read_pairs, split_pairs, train_reranker
from hf_models import save_model, small_tokenizer
from PIL import Image

from blip_fast import cli
from blip_fast.bert_cnn import Bert, BertCnn, pack_pairs
from blip_fast.checkpoint.bert import load_bert, load_bert_cnn, save_bert_cnn
from blip_fast.commands.caption import COMMAND as CAPTION
from blip_fast.config import TextConfig
from blip_fast.metrics.binary import accuracy, area_under_roc
from blip_fast.tasks.caption import Captioner
from blip_fast.tasks.classify import Classifier
from blip_fast.tasks.rerank import related
from blip_fast.tokenizer import Tokenizer

TOKENIZER = small_tokenizer()
WORDS = ["dogs", "man", "ball", "table", "horse", "grass"]
PAIRS = [("a red ball on a table", "ball"), ("dogs", "small blue square"), ("", "man"), ("a man rides a horse " * 9,
         "the large circle " * 9), ("two dogs", "a")]


def save_bert(directory: Path, *, task: str = "BertModel", seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """transformers' BERT with weights far from their start, as it saves them, and a tokenizer."""
    sizes = {"vocab_size": TOKENIZER.vocab_size - 2, "hidden_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    model = getattr(transformers, task)(transformers.BertConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(directory)
    # BERT's own vocabulary has neither [DEC] nor [ENC].
    words = (TOKENIZER._tokenizer.id_to_token(i) for i in range(TOKENIZER.vocab_size - 2))
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return model


@pytest.fixture
def bert(tmp_path) -> Path:
    save_bert(tmp_path / "bert")
    return tmp_path / "bert"


def bert_cnn(directory: Path, seed: int = 0) -> BertCnn:
    model = load_bert(directory)[0]
    torch.manual_seed(seed)
    return BertCnn(model).eval()


def independent(bert: torch.nn.Module, convolution: torch.nn.Conv1d, output: torch.nn.Module, caption: str,
                label: str) -> torch.Tensor:
    """One pair's logit by transformers' BERT, and by torch's convolution over that pair alone."""
    first, second = TOKENIZER.encode(caption, max_tokens=40), TOKENIZER.encode(label, max_tokens=25)[1:]
    types = torch.tensor([[0] * len(first) + [1] * len(second)])
    states = bert(torch.tensor([first + second]), token_type_ids=types).last_hidden_state
    return F.linear(F.relu(convolution(states.transpose(1, 2))).amax(dim=2), output.weight, output.bias)[0, 0]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("task", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
@torch.no_grad()
def test_forward(tmp_path, task):
    """With the task's heads and without; pairs short, empty and cut at 64 tokens."""
    theirs = save_bert(tmp_path, task=task)
    model, tokenizer = bert_cnn(tmp_path), load_bert(tmp_path)[1]
    packed, types = pack_pairs(tokenizer, *zip(*PAIRS, strict=True))
    assert packed.lengths.max() == 64 and packed.lengths.min() >= 4 and not model.bert.word_embeds.weight[-2:].any()
    expected = torch.stack([independent(getattr(theirs, "bert", theirs), model.convolution, model.output, *pair)
                            for pair in PAIRS])
    torch.testing.assert_close(model(packed, types), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05
    scores = related(model, tokenizer, PAIRS * 20)  # more than pass at a time
    torch.testing.assert_close(scores, expected.double().sigmoid().repeat(20), rtol=0, atol=1e-5)
    assert related(model, tokenizer, []).shape == (0,)


def test_pairs_are_what_transformers_makes_of_them(bert_vocabulary):
    """Ids and types of BERT's own tokenizer, given two texts."""
    reference = transformers.BertTokenizer.from_pretrained(bert_vocabulary.parent)
    captions, labels = zip(*PAIRS, ("A café's “red” T-shirt, 3,000!", "Großer  Hund"), strict=False)
    short = [place for place, caption in enumerate(captions) if len(caption) < 150]
    packed, types = pack_pairs(Tokenizer.from_vocab_file(bert_vocabulary), captions, labels)
    rows, kinds = packed.token_ids.split(packed.lengths.tolist()), types.split(packed.lengths.tolist())
    expected = reference([*captions], [*labels])
    for place in short:  # others are cut
        assert rows[place].tolist() == expected["input_ids"][place]
        assert kinds[place].tolist() == expected["token_type_ids"][place]
    (cut,) = set(range(len(captions))) - {*short}
    whole = expected["input_ids"][cut]
    end = whole.index(102)
    assert rows[cut].tolist() == [*whole[:39], 102, *whole[end + 1 : end + 24], 102] and len(rows[cut]) == 64


def test_gradients(tmp_path):
    theirs = save_bert(tmp_path)
    model = bert_cnn(tmp_path)
    convolution, output = torch.nn.Conv1d(48, 32, 3), torch.nn.Linear(32, 1)
    convolution.load_state_dict(model.convolution.state_dict())
    output.load_state_dict(model.output.state_dict())
    weights = torch.randn(len(PAIRS))
    (model(*pack_pairs(TOKENIZER, *zip(*PAIRS, strict=True))) * weights).sum().backward()
    (torch.stack([independent(theirs, convolution, output, *pair) for pair in PAIRS]) * weights).sum().backward()

    def close(ours: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        assert ours is not None and expected is not None and expected.abs().max() > 1e-6
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)

    close(model.convolution.weight.grad, convolution.weight.grad)
    close(model.output.bias.grad, output.bias.grad)
    embeddings = theirs.embeddings
    close(model.bert.word_embeds.weight.grad[:-2], embeddings.word_embeddings.weight.grad)
    close(model.bert.position_embeds.weight.grad, embeddings.position_embeddings.weight.grad)
    close(model.bert.type_embeds.weight.grad, embeddings.token_type_embeddings.weight.grad)
    close(model.bert.norm.weight.grad, embeddings.LayerNorm.weight.grad)
    for ours, layer in zip(model.bert.layers, theirs.encoder.layer, strict=True):
        attention = layer.attention.self
        close(ours.self_attention["encoder"].qkv.weight.grad,
              torch.cat([part.weight.grad for part in (attention.query, attention.key, attention.value)]))
        close(ours.feed_forward.mlp_out.weight.grad, layer.output.dense.weight.grad)


@torch.no_grad()
def test_a_pair_does_not_see_its_neighbours(bert):
    model = bert_cnn(bert)
    together = model(*pack_pairs(TOKENIZER, *zip(*PAIRS, strict=True)))
    for pair, logit in zip(PAIRS, together, strict=True):
        torch.testing.assert_close(model(*pack_pairs(TOKENIZER, [pair[0]], [pair[1]])), logit[None], rtol=0, atol=1e-5)


def test_drop_out_is_for_training(bert):
    model, (packed, types) = bert_cnn(bert), pack_pairs(TOKENIZER, *zip(*PAIRS, strict=True))
    assert torch.equal(model(packed, types), model(packed, types))
    model.train()
    assert not torch.equal(model(packed, types), model(packed, types))


# ---------------------------------------------------------------- checkpoints


@torch.no_grad()
def test_checkpoints_of_2018(bert):
    """Norms called gamma and beta, a `bert.` in front, heads and position ids beside: as bert-base-uncased's."""
    expected = load_bert(bert)[0].state_dict()
    tensors = safetensors.torch.load_file(bert / "model.safetensors")
    old = {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
           tensor for name, tensor in tensors.items()}
    old |= {"cls.predictions.bias": torch.zeros(3), "cls.seq_relationship.weight": torch.zeros(2, 48),
            "bert.embeddings.position_ids": torch.arange(64)[None]}
    (bert / "model.safetensors").unlink()
    torch.save(old, bert / "pytorch_model.bin")
    found = load_bert(bert)[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_saved_and_loaded(bert, tmp_path):
    model, tokenizer = bert_cnn(bert), load_bert(bert)[1]
    save_bert_cnn(model, tokenizer, tmp_path / "saved")
    again, found = load_bert_cnn(tmp_path / "saved")
    assert not again.training and found.encode("two dogs") == tokenizer.encode("two dogs")
    assert torch.equal(related(again, found, PAIRS), related(model, tokenizer, PAIRS))


def test_what_is_no_bert(bert, tmp_path):
    def changed(name: str, **values) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file in bert.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        config = json.loads((bert / "config.json").read_text()) | values
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return directory

    lost = changed("lost")
    tensors = safetensors.torch.load_file(lost / "model.safetensors")
    del tensors["encoder.layer.1.attention.self.key.bias"]
    safetensors.torch.save_file(tensors | {"encoder.stranger": torch.zeros(1)}, lost / "model.safetensors")
    (foreign := changed("foreign") / "vocab.txt").write_text(foreign.read_text() + "surplus\n")
    for directory, said in (
        (tmp_path / "nowhere", "nowhere is no directory with a config.json"),
        (changed("kind", model_type="roberta"), "model_type of its config.json is 'roberta', not 'bert'"),
        (changed("unnamed", model_type=None), "model_type of its config.json is None, not 'bert'"),
        (changed("activation", hidden_act="relu"), "hidden_act of its config.json is 'relu', not 'gelu'"),
        (changed("positions", position_embedding_type="relative_key"), "is 'relative_key', not 'absolute'"),
        (changed("types", type_vocab_size=1), "type_vocab_size of its config.json is 1, not 2"),
        (changed("sizes", hidden_size=None), "does not describe a BERT model: 'hidden_size'"),
        (changed("short", max_position_embeddings=63), "has 63 positions, and pairs have up to 64 tokens"),
        (changed("wide", intermediate_size=64), "misshapen: encoder.layer.0.intermediate.dense.weight"),
        (lost, r"missing: encoder.layer.1.attention.self.key.bias; unexpected: encoder.stranger"),
        (foreign.parent, "they do not belong together"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            load_bert(directory)
    (bert / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="neither tokenizer"):
        load_bert(bert)
    with pytest.raises(ValueError, match="of a 'bert' model, not of a BERT-CNN"):
        load_bert_cnn(bert)
    with pytest.raises(ValueError, match="looks at no image"):
        Bert(TextConfig())


# ---------------------------------------------------------------- measures


def test_accuracy_and_area_by_count():
    rng = random.Random(0)
    for _ in range(20):
        scores = [rng.choice([0.1, 0.3, 0.5, 0.7, 0.9]) for _ in range(rng.randint(2, 30))]
        truth = [True, False, *(rng.random() < 0.4 for _ in scores[2:])]
        pairs = [(a, b) for a, yes in zip(scores, truth, strict=True) for b, no in zip(scores, truth, strict=True)
                 if yes and not no]
        area = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        given = torch.tensor(scores, dtype=torch.float64), torch.tensor(truth)
        assert area_under_roc(*given) == pytest.approx(area)
        right = sum((a > 0.5) == yes for a, yes in zip(scores, truth, strict=True)) / len(scores)
        assert accuracy(*given) == pytest.approx(right)
    nan = torch.tensor([math.nan, math.nan])
    assert accuracy(nan, torch.tensor([True, False])) == 0
    for scores, truth, said in ((nan, [True, False], "NaN"), (torch.ones(2), [True, True], "both kinds"),
                                (torch.ones(0), [], "one case at least"), (torch.ones(2), [True], "one case at least")):
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
    return cli._run("train-reranker", TRAIN, [*map(str, arguments)])


def test_a_planted_rule_is_learnt(tmp_path, capsys):
    """From the TSV by the command: told of pairs that were held out, true of pairs that the file never has."""
    save_bert(tmp_path / "bert", num_hidden_layers=2, hidden_size=64, hidden_dropout_prob=0.0)
    pairs = planted(1500, seed=1)
    assert command(write(tmp_path / "pairs.tsv", pairs), "--bert", tmp_path / "bert", "--output", tmp_path / "out",
                   "--epochs", 8, "--batch-size", 32, "--lr", 1e-3, "--json") == 0
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
    assert accuracy(related(model, tokenizer, unseen), truth) >= 0.95
    before = load_bert(tmp_path / "bert")[0]
    assert torch.equal(before.word_embeds.weight, model.bert.word_embeds.weight), "embeddings are left as they were"
    assert not torch.equal(before.layers[0].feed_forward.mlp_in.weight, model.bert.layers[0].feed_forward.mlp_in.weight)


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
    logits = torch.stack([independent(theirs, twin.convolution, twin.output, p.caption, p.label) for p in pairs])
    truth = torch.tensor([float(pair.belong) for pair in pairs])
    loss = F.softplus(torch.where(truth > 0, -logits, logits)).mean()
    assert epoch.loss == pytest.approx(loss.item(), abs=1e-5) and epoch.number == 1
    loss.backward()
    step = twin.output.weight - 1e-3 * twin.output.weight.grad / (twin.output.weight.grad.abs() + 1e-8)
    torch.testing.assert_close(model.output.weight, step, rtol=0, atol=1e-5)


def test_pairs_are_shared_out():
    pairs = planted(50, seed=3) + [Pair("man", str(i), False) for i in range(50)]
    train, held_out = split_pairs(pairs, 0.2, seed=0)
    assert sorted(train + held_out, key=str) == sorted(pairs, key=str)
    assert [sum(pair.belong == answer for pair in held_out) for answer in (True, False)] == [5, 15]
    assert split_pairs(pairs, 0.2, seed=0) == (train, held_out) != split_pairs(pairs, 0.2, seed=1)
    few = planted(4, seed=0)
    assert [len(part) for part in split_pairs(few, 0.01, 0)] == [len(part) for part in split_pairs(few, 0.99, 0)] == [
        2, 2]
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


# ---------------------------------------------------------------- captions re-ranked


LABELS = ["dog", "red ball", "man", "wooden table"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A captioner, a matcher, a BERT-CNN, labels, and three pictures with a broken one among them."""
    folder = tmp_path_factory.mktemp("rerank")
    save_model("BlipForConditionalGeneration", TOKENIZER, folder / "captioner", sep_bias=4.0, seed=2)
    save_model("BlipForImageTextRetrieval", TOKENIZER, folder / "matcher")
    save_bert(folder / "bert")
    save_bert_cnn(bert_cnn(folder / "bert"), load_bert(folder / "bert")[1], folder / "reranker")
    (folder / "labels.txt").write_text("\n".join(LABELS))
    rng = np.random.default_rng(0)
    for name in ("0.png", "2.png"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "1.png").write_bytes(b"no image")
    return folder


def rerank(folder: Path, *arguments) -> int:
    return cli._run("caption", CAPTION, ["--model", str(folder / "captioner"), "--max-length", "14", "--n-best", "5",
                                         "--rerank", "bert-cnn", *map(str, arguments)])


@torch.no_grad()
def test_captions_are_reranked(folder, capsys):
    """Each caption without its prompt, and the image's likeliest label: transformers' BERT, torch's convolution."""
    paths = [folder / f"{i}.png" for i in range(3)]
    status = rerank(folder, "--matcher", folder / "matcher", "--labels", folder / "labels.txt", "--reranker",
                    folder / "reranker", "--json", *paths)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 1 and "error" in rows.pop(1)
    captioner, classifier = (task.from_pretrained(folder / name) for task, name in (
        (Captioner, "captioner"), (Classifier, "matcher")))
    theirs = transformers.BertModel.from_pretrained(folder / "bert").eval()
    model, _ = load_bert_cnn(folder / "reranker")
    skipped = len(captioner.prompt_ids("a picture of"))
    for row, path in zip(rows, (paths[0], paths[2]), strict=True):
        context = classifier(path, LABELS, top_k=1)[0][0].label
        texts = [row, *row["others"]]
        assert len(texts) == 5 and [text["rerank"] for text in texts] == sorted(
            (text["rerank"] for text in texts), reverse=True)
        for text in texts:
            said = captioner.tokenizer.decode(text["token_ids"][skipped:]).strip()
            logit = independent(theirs, model.convolution, model.output, said, context)
            assert text["rerank"] == pytest.approx(logit.sigmoid().item() if said else 0, abs=1e-5)
        assert len({text["rerank"] for text in texts}) > 1


def test_reranking_refuses(folder):
    image, labels, matcher = folder / "0.png", ("--labels", folder / "labels.txt"), ("--matcher", folder / "matcher")
    reranker = ("--reranker", folder / "reranker")
    for said, arguments in {
        "--rerank belief or bert-cnn and --labels FILE need each other": reranker,
        "--rerank bert-cnn and --reranker DIR need each other": labels,
        "of a 'bert' model, not of a BERT-CNN": (*labels, *matcher, "--reranker", folder / "bert"),
        "no directory with a config.json": (*labels, *matcher, "--reranker", folder / "no"),
        "no contrastive head": (*labels, *reranker),
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            rerank(folder, *arguments, image)
    with pytest.raises(ValueError, match="--rerank bert-cnn and --reranker DIR need each other"):
        rerank(folder, "--rerank", "itm", *reranker, image)
