"""BERT-CNN against transformers' BertModel and torch's own layers; its checkpoints; captions re-ranked by
it."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from bert_models import TOKENIZER, bert_cnn, independent, save_bert
from hf_models import save_model
from PIL import Image

from blip_fast import cli
from blip_fast.checkpoint.bert import load_bert, load_bert_cnn, save_bert_cnn
from blip_fast.commands.caption import COMMAND as CAPTION
from blip_fast.model.bert_cnn import Bert, pack_pairs
from blip_fast.model.config import TextConfig
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.classifier import Classifier
from blip_fast.tasks.reranking import related

PAIRS = [("a red ball on a table", "ball"), ("dogs", "small blue square"), ("", "man"),
         ("a man rides a horse " * 9,
         "the large circle " * 9), ("two dogs", "a")]


@pytest.fixture
def bert(tmp_path) -> Path:
    save_bert(tmp_path / "bert")
    return tmp_path / "bert"


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("task", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
@torch.no_grad()
def test_forward(tmp_path, task):
    """With the task's heads and without; pairs short, empty and cut at 64 tokens."""
    theirs = save_bert(tmp_path, task=task)
    model, tokenizer = bert_cnn(tmp_path), load_bert(tmp_path)[1]
    packed, types = pack_pairs(tokenizer, *zip(*PAIRS, strict=True))
    assert packed.lengths.max() == 64 and packed.lengths.min() >= 4
    assert not model.bert.word_embeds.weight[-2:].any()
    expected = torch.stack([independent(getattr(theirs, "bert", theirs), model.convolution, model.output,
                                        *pair)
                            for pair in PAIRS])
    torch.testing.assert_close(model(packed, types), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05
    # more than pass at a time
    scores = related(model, *pack_pairs(tokenizer, *zip(*PAIRS * 20, strict=True)))
    torch.testing.assert_close(scores, expected.double().sigmoid().repeat(20), rtol=0, atol=1e-5)
    assert related(model, *pack_pairs(tokenizer, [], [])).shape == (0,)


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
    (torch.stack([independent(theirs, convolution, output, *pair) for pair in PAIRS])
     * weights).sum().backward()

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
        torch.testing.assert_close(model(*pack_pairs(TOKENIZER, [pair[0]], [pair[1]])), logit[None], rtol=0,
                                   atol=1e-5)


def test_drop_out_is_for_training(bert):
    model, (packed, types) = bert_cnn(bert), pack_pairs(TOKENIZER, *zip(*PAIRS, strict=True))
    assert torch.equal(model(packed, types), model(packed, types))
    model.train()
    assert not torch.equal(model(packed, types), model(packed, types))


# ---------------------------------------------------------------- checkpoints


@torch.no_grad()
def test_checkpoints_of_2018(bert):
    """As in bert-base-uncased's file: norms called gamma and beta, a `bert.` in front, heads and position
    ids."""
    expected = load_bert(bert)[0].state_dict()
    tensors = safetensors.torch.load_file(bert / "model.safetensors")
    old = {"bert." + name.replace("LayerNorm.weight",
                                  "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
           tensor for name, tensor in tensors.items()}
    old |= {"cls.predictions.bias": torch.zeros(3), "cls.seq_relationship.weight": torch.zeros(2, 48),
            "bert.embeddings.position_ids": torch.arange(64)[None]}
    (bert / "model.safetensors").unlink()
    torch.save(old, bert / "pytorch_model.bin")
    found = load_bert(bert)[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name])
                                                   for name in expected)


def test_saved_and_loaded(bert, tmp_path):
    model, tokenizer = bert_cnn(bert), load_bert(bert)[1]
    save_bert_cnn(model, tokenizer, tmp_path / "saved")
    again, found = load_bert_cnn(tmp_path / "saved")
    assert not again.training and found.encode("two dogs") == tokenizer.encode("two dogs")
    captions, labels = zip(*PAIRS, strict=True)
    assert torch.equal(related(again, *pack_pairs(found, captions, labels)),
                       related(model, *pack_pairs(tokenizer, captions, labels)))


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
    return cli._run("caption", CAPTION, ["--model", str(folder / "captioner"), "--dtype", "float32",
                                         "--max-length",
                                         "14", "--n-best", "5", "--rerank", "bert-cnn", *map(str, arguments)])


@torch.no_grad()
def test_captions_are_reranked(folder, capsys):
    """Each caption without its prompt, and the image's likeliest label: transformers' BERT, torch's
    convolution."""
    paths = [folder / f"{i}.png" for i in range(3)]
    status = rerank(folder, "--matcher", folder / "matcher", "--labels", folder / "labels.txt", "--reranker",
                    folder / "reranker", "--json", *paths)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 1 and "error" in rows.pop(1)
    captioner, classifier = (task.from_pretrained(folder / name, dtype="float32") for task, name in (
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
    image, labels = folder / "0.png", ("--labels", folder / "labels.txt")
    matcher = ("--matcher", folder / "matcher")
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
