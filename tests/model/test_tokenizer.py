"""Packed texts against plain lists; the tokenizer against transformers' BertTokenizer."""

import itertools
import json
import random
from unittest.mock import MagicMock

import httpx2
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer, clean_caption, clean_question

TEXTS = [[101, 7, 8, 102], [101, 102], [5], [101, 9, 9, 9, 102]]


def unpack(packed: PackedTexts) -> list[list[int]]:
    ends = packed.offsets.tolist()
    return [packed.token_ids[start:end].tolist() for start, end in itertools.pairwise(ends)]


texts_of = st.lists(st.lists(st.integers(0, 30523), min_size=2, max_size=9), max_size=7)


@given(texts_of, st.randoms(use_true_random=False))
def test_packed_texts_do_what_lists_do(texts: list[list[int]], chance: random.Random) -> None:
    packed = PackedTexts.from_lists(texts)
    assert len(packed) == len(texts) and unpack(packed) == texts
    assert packed.lengths.tolist() == [len(text) for text in texts]
    assert packed.positions().tolist() == [i for text in texts for i in range(len(text))]
    assert packed.text_of_row().tolist() == [i for i, text in enumerate(texts) for _ in text]
    assert packed.token_ids[packed.first_rows()].tolist() == [text[0] for text in texts]
    assert unpack(packed.with_first(3)) == [[3, *text[1:]] for text in texts]
    assert unpack(packed.without_last()) == [text[:-1] for text in texts]
    assert unpack(packed.without_first()) == [text[1:] for text in texts]
    both = PackedTexts.cat([packed, packed.with_first(1)])
    assert unpack(both) == texts + [[1, *text[1:]] for text in texts]
    chosen = chance.choices(range(len(texts)), k=5) if texts else []
    assert unpack(packed.select(torch.tensor(chosen, dtype=torch.int64))) == [texts[i] for i in chosen]


def test_padded_form() -> None:
    ids, mask = PackedTexts.from_lists(TEXTS).to_padded(pad_id=0)
    assert ids.tolist() == [[101, 7, 8, 102, 0], [101, 102, 0, 0, 0], [5, 0, 0, 0, 0], [101, 9, 9, 9, 102]]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [4, 2, 1, 5]
    empty, _ = PackedTexts.from_lists([]).to_padded(pad_id=0)
    assert empty.shape == (0, 0)


def test_with_first_leaves_the_original_alone() -> None:
    packed = PackedTexts.from_lists(TEXTS)
    packed.with_first(3)
    assert unpack(packed) == TEXTS


def test_bad_texts_are_named() -> None:
    with pytest.raises(ValueError, match="text 1 has no token"):
        PackedTexts.from_lists([[1], []])
    with pytest.raises(ValueError, match="two or more"):
        PackedTexts.from_lists([[1]]).without_last()
    with pytest.raises(ValueError, match="at least one token"):
        PackedTexts.from_lists([[1], [2, 3, 4]]).without_last()
    with pytest.raises(ValueError, match="pass at least one"):
        PackedTexts.cat([])
    ids, offsets = torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.int32)
    for bad_ids, bad_offsets, words in [
        (ids.int(), offsets, "token_ids must be int64"),
        (ids, offsets.long(), "offsets must be int32"),
        (ids, offsets + 1, "from 0 to 2 rows, got 1 to 3"),
        (ids, torch.tensor([0, 2, 2], dtype=torch.int32), "rise strictly"),
        (ids, offsets[:0], "texts \\+ 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            PackedTexts(bad_ids, bad_offsets)


ODD_TEXTS = [
    "",
    "   ",
    "A dog's ball, isn't it? I don't know . 'quoted' - semi-trailer; don ' t",
    "Naïve CAFÉ Ünïcödé \u0130stanbul",
    "中文字 mixed with 日本語",
    "zero\u200bwidth\ufeff tab\tnew\nline \x00 control \u0085",
    "🐕 dog 🦮",
    "x" * 300,
    "literal [SEP] and [MASK] [ENC]",
    "1,000.5 $30 & 50% <html>&amp;</html>",
]


@pytest.fixture(scope="module")
def bert(bert_vocabulary):
    return Tokenizer.from_vocab_file(bert_vocabulary)


@pytest.fixture(scope="module")
def reference(bert_vocabulary):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizer.from_pretrained(bert_vocabulary.parent)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def test_special_ids_are_blips(bert: Tokenizer) -> None:
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id) == (0, 100, 101, 102)
    assert (bert.bos_id, bert.enc_id, bert.vocab_size) == (30522, 30523, 30524)


def test_ids_and_strings_equal_transformers(bert: Tokenizer, reference, photographs) -> None:
    captions = [caption for captions in photographs.captions for caption in captions] + ODD_TEXTS
    for max_tokens in (None, 30, 2):
        expected = reference(captions, truncation=max_tokens is not None, max_length=max_tokens)["input_ids"]
        assert unpack(bert.pack(captions, max_tokens=max_tokens)) == expected
    for ids in bert.pack(captions).without_last().with_first(bert.bos_id), bert.pack(captions, first="[ENC]"):
        for text in unpack(ids)[::7] + unpack(ids)[-len(ODD_TEXTS) :]:
            assert bert.decode(text) == reference.decode(text, skip_special_tokens=True)


def test_any_ids_decode_like_transformers(bert: Tokenizer, reference) -> None:
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(bert.vocab_size) for _ in range(draw.randrange(12))]
        assert bert.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_first_token_and_length(bert: Tokenizer) -> None:
    assert bert.encode("a dog", first="[DEC]") == [30522, 1037, 3899, 102]
    assert bert.encode("a dog", first="[ENC]", max_tokens=3) == [30523, 1037, 102]
    with pytest.raises(ValueError, match=r"'\[MASK\]' is none of"):
        bert.encode("a dog", first="[MASK]")
    with pytest.raises(ValueError, match="need 2"):
        bert.encode("a dog", max_tokens=1)


def test_saved_tokenizer_reads_back_here_and_in_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    captions = ["two red balls left of a box", "a small blue box", "a ball", "the red balls"] * 3
    ours = Tokenizer.train(captions, vocab_size=90)
    ours.save(tmp_path / "both")
    for kept in "tokenizer.json", "vocab.txt":
        alone = tmp_path / kept.replace(".", "_")
        alone.mkdir()
        (alone / kept).write_bytes((tmp_path / "both" / kept).read_bytes())
        assert unpack(Tokenizer.from_pretrained(alone).pack(captions)) == unpack(ours.pack(captions))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "both")
    assert theirs(captions + ODD_TEXTS)["input_ids"] == unpack(ours.pack(captions + ODD_TEXTS))
    assert (theirs.bos_token_id, theirs.convert_tokens_to_ids("[ENC]")) == (ours.bos_id, ours.enc_id)
    assert len(theirs) == ours.vocab_size and theirs.pad_token_id == ours.pad_id == 0
    ids = [ours.bos_id, *ours.encode("two red balls")[1:], ours.enc_id]
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == "two red balls"


def test_training_is_repeatable_and_knows_its_own_words() -> None:
    captions = [f"a {colour} {shape}" for colour in ("red", "blue",
                                                     "green") for shape in ("ball", "box", "cone")] * 2
    one, two = (Tokenizer.train(iter(captions), vocab_size=80) for _ in range(2))
    assert one._tokenizer.to_str() == two._tokenizer.to_str()
    with pytest.raises(ValueError, match="vocab_size is 20: the characters of these captions alone need"):
        Tokenizer.train(captions, vocab_size=20)
    assert one.vocab_size <= 80 and (one.bos_id, one.enc_id) == (one.vocab_size - 2, one.vocab_size - 1)
    for caption in captions:
        assert one.decode(one.encode(caption)) == caption and one.unk_id not in one.encode(caption)


def test_hub_checkpoint_without_tokenizer_json(monkeypatch, tmp_path) -> None:
    """Older checkpoints hold vocab.txt alone; being offline is another error than a file that is not
    there."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*BERT_TOKENS, "dog"]) + "\n")
    not_there = RemoteEntryNotFoundError(
        "404", response=httpx2.Response(404, request=httpx2.Request("GET", "https://x"))
    )

    def download(model: str, name: str) -> str:
        assert model == "someone/blip"
        if name != "vocab.txt":
            raise not_there
        return str(vocabulary)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert Tokenizer.from_pretrained("someone/blip").encode("dog") == [2, 5, 3]
    offline = LocalEntryNotFoundError("offline")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", MagicMock(side_effect=offline))
    with pytest.raises(FileNotFoundError, match=r"^someone/blip: no such file or directory, and the Hub.* "
                                                r"cannot be"):
        Tokenizer.from_pretrained("someone/blip")


def test_paths_that_are_not_there_are_named(tmp_path) -> None:
    """The Hub's client would call such a path a malformed model name."""
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere: no such file or directory"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


def test_bad_vocabularies_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \[MASK\]"):
        Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog"])
    with pytest.raises(ValueError, match="'dog' twice"):
        Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat", "dog"])
    cased = [*BERT_TOKENS, "[unused0]", "the", "The", "##ing", "A", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(cased) + "\n")
    for path in (tmp_path, tmp_path / "vocab.txt"):
        with pytest.raises(ValueError, match=r"vocab\.txt is a cased vocabulary \(it holds 'The'\)"):
            Tokenizer.from_pretrained(path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match="is a BPE tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    for broken in ('{"model": {"type": "Word', "{}", "[]", '{"model": []}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not what the tokenizers library writes"):
            Tokenizer.from_pretrained(tmp_path)


def test_published_clean_up() -> None:
    assert clean_caption('A "Dog" (brown), running...  FAST!\n') == "a dog brown , running fast"
    assert clean_caption(" ".join("word" for _ in range(40))).split() == ["word"] * 30
    assert clean_caption("one two three", max_words=2) == "one two"
    assert clean_caption("") == "" and clean_caption(" ... ") == ""
    assert clean_question("What's the Dog's name: Rex?  ") == "what's the dog's name rex?"
    assert clean_question("a b c", max_words=2) == "a b"


def test_words_and_their_places(bert_vocabulary) -> None:
    """Each word as it was written, and where its pieces stand in the encoded text."""
    tokenizer = Tokenizer.from_vocab_file(bert_vocabulary)
    text = "A Zürich-bound snowplough, unstoppable …  in 2024"
    words, ids = tokenizer.words(text), tokenizer.encode(text)
    assert " ".join(word for word, _ in words) == "A Zürich - bound snowplough , unstoppable … in 2024"
    assert [place for _, places in words for place in places] == list(range(1, len(ids) - 1))
    assert all([ids[place] for place in places] == tokenizer.encode(word)[1:-1] for word, places in words)
    assert max(len(places) for _, places in words) > 1
    short = tokenizer.words(text, max_tokens=6)
    assert short[-1][1].stop == 5 and tokenizer.words("") == []
