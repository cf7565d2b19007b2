"""Answers to questions: equal to transformers' token for token, but independent of the batch."""

import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer, until_sep

from blip_fast.generate import GenerationConfig
from blip_fast.media.images import evaluation_transform, load_image
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.answerer import Answerer
from blip_fast.tasks.captioner import Captioner

SAME_LENGTH = ["what is the man doing?", "how many dogs are running?", "is this a sunny day?",
               "what color is the dog?"]


@pytest.fixture(scope="module")
def on_bert(bert_vocabulary, tmp_path_factory):
    directory = tmp_path_factory.mktemp("on_bert")
    theirs = save_model("BlipForQuestionAnswering", Tokenizer.from_vocab_file(bert_vocabulary),
                        directory, sep_bias=6.0)
    return theirs, Answerer.from_pretrained(directory, dtype="float32")


@pytest.fixture(scope="module")
def answerer(tmp_path_factory) -> Answerer:
    directory = tmp_path_factory.mktemp("small")
    save_model("BlipForQuestionAnswering", small_tokenizer(), directory, sep_bias=4.0)
    return Answerer.from_pretrained(directory, dtype="float32")


@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_on_photographs(on_bert, photographs, beams):
    """With questions of one length, since transformers lets an answer see the padding of shorter ones."""
    theirs, answerer = on_bert
    images, questions = photographs.paths[:16], SAME_LENGTH * 4
    pixels = evaluation_transform([load_image(image) for image in images], IMAGE_SIZE)
    token_ids = torch.tensor([answerer.tokenizer.encode(question) for question in questions])
    expected = theirs.generate(token_ids, pixels, num_beams=beams, max_length=10, min_length=1,
                               do_sample=False)
    answers = answerer(images, questions, GenerationConfig(beams=beams, max_length=10, min_length=1),
                       batch_size=5)
    assert [answer.token_ids for answer in answers] == [until_sep(row, 102) for row in expected]
    assert len({len(answer.token_ids) for answer in answers}) > 1


def test_batch_does_not_matter(answerer):
    """Questions of different lengths get the same answers together and alone."""
    pixels = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    questions = ["dog", "a red ball on a table", "is the man left of the horse", "two dogs",
                 "a green table eat people"]
    packed = answerer.tokenizer.pack(questions)
    assert len(set(packed.lengths.tolist())) > 2
    together = answerer.answer_pixels(pixels, packed)
    for i in range(5):
        (alone,) = answerer.answer_pixels(pixels[i : i + 1], packed.select(torch.tensor([i])))
        assert alone.token_ids == together[i].token_ids
        assert alone.score == pytest.approx(together[i].score, abs=1e-5)


def test_first_token_matters(answerer):
    """A question with [ENC] and one with [CLS] get different scores."""
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    cls, enc = (answerer.answer_pixels(pixels, answerer.tokenizer.pack(["a dog"], first))[0].score
                for first in ("[CLS]", "[ENC]"))
    assert cls != pytest.approx(enc, abs=1e-6)


def test_wrong_calls(answerer, tmp_path):
    with pytest.raises(ValueError, match="2 images but 3 questions"):
        answerer([b"", b""], ["a", "b", "c"])
    save_model("BlipForConditionalGeneration", small_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="VQA"):
        Answerer(*_parts(Captioner.from_pretrained(tmp_path, dtype="float32")))


def _parts(captioner: Captioner):
    return captioner.model, captioner.tokenizer
