"""Training data of VQA, NLVR2 and VisDial, from annotations to batches: questions with answers, pairs of
images, dialogues."""

import json
from pathlib import Path

import numpy as np
import odd_files
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the training input needs the extra `train`")
from blip_train.steps.answering import QuestionBatch
from blip_train.steps.dialogues import WRONG, DialogueBatch
from blip_train.steps.reasoning import PairBatch

from blip_fast.data.input.pipeline import InputConfig, TrainInput
from blip_fast.data.input.sources import Source
from blip_fast.data.shards.annotated import annotated_images
from blip_fast.data.shards.pack import pack
from blip_fast.data.shards.shards import iterate, read_index
from blip_fast.media.images import evaluation_transform, load_image
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer

SIZE, ROWS = 32, 9


def write(folder: Path, rows: list[dict]) -> Path:
    (folder / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "annotations.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(ROWS):
        odd_files.picture(40, 40, seed=i).save(folder / f"{i}.png")
        odd_files.picture(40, 40, seed=100 + i).save(folder / f"{i}.webp", lossless=True)
    return folder


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Path:
    """Pairs of a PNG and a WebP; some of the sentences are true."""
    rows = [{"image": f"{i}.png", "second_image": f"{i}.webp", "caption": f"Sentence {i}.",
             "label": i % 3 == 0}
            for i in range(ROWS)]
    pack(folder, write(folder, rows), folder / "pairs", samples_per_shard=4)
    return folder / "pairs"


def config(shards: Path, **options) -> InputConfig:
    return InputConfig([Source("data", str(shards))], image_size=SIZE, batch_size=3, crop_scale=None,
                       flip=False, rand_augment=False, shuffle_buffer=4, threads=1, **options)


def test_a_pair_is_read_as_two_images_in_their_order(folder, pairs):
    assert (read_index(pairs).samples, read_index(pairs).pairs) == (ROWS, ROWS)
    seen = set()
    for batch in TrainInput(config(pairs, pairs=True, max_words=40)):
        assert batch.images.shape == (3, 2, 3, SIZE, SIZE)
        for images, record, caption in zip(batch.images, batch.records, batch.captions, strict=True):
            number = int(Path(record["image"]).stem)
            expected = evaluation_transform([load_image(folder / f"{number}{end}")
                                             for end in (".png", ".webp")], SIZE)
            assert (images - expected).abs().mean() < 0.02 < (images - expected.flip(0)).abs().mean()
            assert (caption, record["label"]) == (f"sentence {number}", number % 3 == 0)
            seen.add(number)
    assert seen == set(range(ROWS))
    assert [image.load().size for image in annotated_images(pairs, None)] == [(40, 40)] * ROWS
    assert all(sample.second == (folder / sample.record["second_image"]).read_bytes()
               for sample in iterate(pairs))


def test_labels_and_sentences_become_a_batch(pairs):
    tokenizer = Tokenizer([*BERT_TOKENS, "sentence", *map(str, range(ROWS))])
    read = next(iter(TrainInput(config(pairs, pairs=True))))
    batch = PairBatch.collate(read, tokenizer, 64)
    assert batch.labels.tolist() == [int(record["label"]) for record in read.records]
    assert batch.sentences.token_ids[batch.sentences.first_rows().long()].tolist() == [tokenizer.enc_id] * 3


@pytest.mark.parametrize("end", [".png", ".webp"])
def test_a_pair_with_a_damaged_image_is_replaced_whole(pairs, tmp_path, end):
    for path in pairs.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = next(sample for sample in iterate(tmp_path) if sample.key == "000000005")
    content = victim.image if end == ".png" else victim.second
    tar = tmp_path / "000001.tar"
    tar.write_bytes(tar.read_bytes().replace(content[60:90], bytes(30)))
    train = TrainInput(config(tmp_path, pairs=True))
    keys = [key for batch in train for key in batch.keys]
    assert len(keys) == ROWS and "000000005" not in keys
    assert [line["key"] for line in train.quarantine] == ["000000005"]


def test_a_broken_second_image_is_named_and_its_pair_left_out(folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"no picture")
    rows = [{"image": "0.png", "second_image": second, "caption": "a", "label": True}
            for second in ("1.png", "broken.jpg", "0.png")]
    report = pack(folder, write(folder, rows), tmp_path / "shards")
    assert (report.samples, report.quarantined) == (2, 1)
    (line,) = map(json.loads, (tmp_path / "shards" / "quarantine.jsonl").read_text().splitlines())
    assert line["image"] == "broken.jpg"
    assert [sample.record["second_image"] for sample in iterate(tmp_path / "shards")] == ["1.png", "0.png"]


def test_shards_without_second_images_are_refused(folder, tmp_path):
    rows = [{"image": f"{i}.png", "caption": "a"} for i in range(3)]
    pack(folder, write(folder, rows), tmp_path / "shards")
    with pytest.raises(ValueError, match="holds 3 samples without a second image"):
        TrainInput(config(tmp_path / "shards", pairs=True))


def test_questions_of_one_picture_are_samples_of_their_own(folder, tmp_path):
    answers = [["Red", "red", "red"], {"two": 0.2}, ["a dog", "dog"]]
    rows = [{"image": "3.png", "question": f'What is "it" #{i}?', "answers": given}
            for i, given in enumerate(answers)]
    pack(folder, write(folder, rows), tmp_path / "shards")
    assert (read_index(tmp_path / "shards").samples,
            read_index(tmp_path / "shards").without_caption) == (3, 0)
    read = next(iter(TrainInput(config(tmp_path / "shards"))))
    words = ["what", "is", "it", "0", "1", "2", "?", "red", "two", "a", "dog"]
    tokenizer = Tokenizer([*BERT_TOKENS, *words])
    batch = QuestionBatch.collate(read, tokenizer, max_tokens=6, max_words=50)
    assert len(set(read.ids.tolist())) == 1
    order = [record["answers"] for record in read.records]
    for i, question in enumerate(rows_of(batch.questions)):
        number = answers.index(order[i])
        assert question == [tokenizer.enc_id, *tokenizer.encode(f"what is it {number} ?")[1:5],
                            tokenizer.sep_id]
    given = {(tokenizer.decode(text), round(weight, 6)) for text, weight in
             zip(rows_of(batch.answers), batch.weights.tolist(), strict=True)}
    assert given == {("red", round(1 / 3, 6)), ("red", round(2 / 3, 6)), ("two", 0.2), ("a dog", 0.5),
                     ("dog", 0.5)}
    assert batch.question_of.tolist() == [i for i, of in enumerate(order) for _ in dict.fromkeys(of)]
    np.testing.assert_allclose(torch.bincount(batch.question_of, batch.weights).numpy(),
                               [0.2 if isinstance(of, dict) else 1.0 for of in order], rtol=1e-6)


def rows_of(texts) -> list[list[int]]:
    return [part.tolist() for part in texts.token_ids.split(texts.lengths.tolist())]


def test_captions_are_no_questions(folder, tmp_path):
    pack(folder, write(folder, [{"image": f"{i}.png", "caption": "a"} for i in range(3)]),
         tmp_path / "shards")
    read = next(iter(TrainInput(config(tmp_path / "shards"))))
    with pytest.raises(ValueError, match=r'png has no question with answers: VQA needs rows with "question"'):
        QuestionBatch.collate(read, Tokenizer([*BERT_TOKENS]), 35, 50)


ANSWERS = ["red", "two", "a dog", "left", "dog", "what"]
SPEAKER = Tokenizer([*BERT_TOKENS, "what", "is", "it", "red", "two", "a", "dog", "left", "?",
                     *map(str, range(ROWS))])


def test_dialogues_become_texts_with_right_and_wrong_answers(folder, tmp_path):
    """Each round has its right answer first, then other candidates, which are drawn again for another batch.
    A round without candidates is only history."""
    dialog = [{"question": "what is it?", "answer": "a dog", "candidates": ANSWERS, "right": 2},
              {"question": "is it red?", "answer": "red"},
              {"question": "left?", "candidates": ANSWERS[::-1], "right": 1}]
    rows = [{"image": f"{i}.png", "caption": f"It is {i}.", "dialog": dialog} for i in range(ROWS)]
    pack(folder, write(folder, rows), tmp_path / "shards")
    batches = list(TrainInput(config(tmp_path / "shards")))
    drawn = []
    for read in batches:
        batch = DialogueBatch.collate(read, SPEAKER, 40)
        again = DialogueBatch.collate(read, SPEAKER, 40)
        assert torch.equal(batch.texts.token_ids, again.texts.token_ids)
        assert [SPEAKER.decode(text) for text in rows_of(batch.captions)] == [
            f"it is {Path(record['image']).stem}" for record in read.records]
        assert batch.captions.token_ids[0] == SPEAKER.cls_id
        each = 2 * (1 + WRONG)
        assert batch.image_of.tolist() == [i for i in range(3) for _ in range(each)]
        assert batch.labels.tolist() == [1, *[0] * WRONG] * 6
        texts = [tuple(text) for text in rows_of(batch.texts)]
        starts = [[SPEAKER.enc_id, *turn("what is it?")], [SPEAKER.enc_id, *turn("what is it? a dog", True),
                  *turn("is it red? red", True), *turn("left?")]]
        for i in range(3):
            for number, right in ((0, "a dog"), (1, "dog")):
                here = texts[i * each + number * (1 + WRONG) :][: 1 + WRONG]
                ends = [SPEAKER.decode(text[len(starts[number]) :]) for text in here]
                assert all(list(text[: len(starts[number])]) == starts[number] for text in here)
                assert ends[0] == right and len(set(ends)) == 1 + WRONG and set(ends) <= set(ANSWERS)
                drawn.append(tuple(ends))
    assert len(set(drawn)) > len(drawn) / 2

    # the first round is dropped to fit
    short = DialogueBatch.collate(batches[0], SPEAKER, len(starts[1]) + 1)
    assert int(short.texts.lengths.max()) <= len(starts[1]) + 1
    assert rows_of(short.texts)[1 + WRONG][:2] == [SPEAKER.enc_id, *SPEAKER.encode("is")[1:2]]


def turn(text: str, ended: bool = False) -> list[int]:
    return SPEAKER.encode(text)[1 : None if ended else -1]


@pytest.mark.parametrize("dialog", [None, [{"question": "a", "answer": "b"}],
                                    [{"question": "a", "candidates": ["b"]}]])
def test_rows_without_rounds_to_rank_are_no_training_data_of_dialogues(folder, tmp_path, dialog):
    rows = [{"image": f"{i}.png", "caption": "a", **({} if dialog is None else {"dialog": dialog})}
            for i in range(3)]
    pack(folder, write(folder, rows), tmp_path / "shards")
    read = next(iter(TrainInput(config(tmp_path / "shards"))))
    with pytest.raises(ValueError,
                       match=r'png has no round with "candidates" and "right": VisDial needs rows'):
        DialogueBatch.collate(read, Tokenizer([*BERT_TOKENS, "a", "b"]), 35)


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "what?"}, 'row 1: a "question".* needs "answers"'),
    ({"question": "what?", "answers": []}, 'needs "answers"'),
    ({"question": "what?", "answers": ["a", 3]}, 'needs "answers"'),
    ({"question": "what?", "answers": {"a": 0}}, "weights above 0"),
    ({"question": ["what?"], "answers": ["a"]}, 'a "question"'),
    ({"second_image": "1.png"}, 'a "second_image".* needs a "label", true or false'),
    ({"second_image": "1.png", "label": "True"}, "true or false"),
])
def test_rows_that_are_not_understood_are_named(folder, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        pack(folder, write(folder, [{"image": "0.png", **row}]), tmp_path / "shards")
