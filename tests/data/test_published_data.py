"""Small versions of published annotation files, and the rows that they become."""

import json
from pathlib import Path

import pytest

from blip_fast.cli import main
from blip_fast.data.shards.annotated import read_annotations
from blip_fast.data.shards.published import FORMATS, published_rows


def written(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def rows(name, *files, **options):
    return list(published_rows(name, list(files), **options))


KARPATHY = {"dataset": "coco", "images": [
    {"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "sentids": [770337], "imgid": 0,
     "cocoid": 391895, "split": "test", "sentences": [
         {"tokens": ["a"], "raw": "A man, riding.", "sentid": 770337},
         {"tokens": ["a"], "raw": "A moped.", "sentid": 771687}]},
    {"filepath": "val2014", "filename": "b.jpg", "imgid": 1, "cocoid": 7, "split": "restval",
     "sentences": []}]}
FLICKR = {"dataset": "flickr30k", "images": [
    {"filename": "1000092795.jpg", "imgid": 5, "sentids": [1], "split": "val",
     "sentences": [{"raw": "Zwei Männer"}]}]}


def test_karpathy(tmp_path):
    assert rows("karpathy", written(tmp_path / "dataset_coco.json", KARPATHY), prefix="coco") == [
        {"image": "coco/val2014/COCO_val2014_000000391895.jpg", "captions": ["A man, riding.", "A moped."],
         "split": "test", "id": 391895},
        {"image": "coco/val2014/b.jpg", "captions": [], "split": "train", "id": 7}]
    assert rows("karpathy", written(tmp_path / "dataset_flickr30k.json", FLICKR), split="ignored") == [
        {"image": "1000092795.jpg", "captions": ["Zwei Männer"], "split": "val", "id": 5}]


def test_karpathy_as_beside_the_published_blip(tmp_path):
    """Training captions are separate entries, in any order."""
    train = [{"caption": "one", "image": "val2014/a.jpg", "image_id": "coco_1"},
             {"caption": "two", "image": "val2014/b.jpg", "image_id": "coco_2"},
             {"caption": "three", "image": "val2014/a.jpg", "image_id": "coco_1"}]
    assert rows("karpathy", written(tmp_path / "train.json", train), split="train") == [
        {"split": "train", "image": "val2014/a.jpg", "captions": ["one", "three"], "id": 0},
        {"split": "train", "image": "val2014/b.jpg", "captions": ["two"], "id": 1}]
    test = [{"image": "val2014/a.jpg", "caption": ["one", "two"]}]
    assert rows("karpathy", written(tmp_path / "test.json", test)) == [
        {"image": "val2014/a.jpg", "captions": ["one", "two"], "id": 0}]


def test_nocaps(tmp_path):
    images = [{"id": 0, "open_images_id": "x", "file_name": "0013ea2087020901.jpg", "domain": "in-domain"},
              {"id": 1, "file_name": "b.jpg", "domain": "out-domain"}]
    captions = [{"image_id": 1, "id": 3, "caption": "A baby."}, {"image_id": 0, "id": 4, "caption": "One"},
                {"image_id": 1, "id": 5, "caption": "Two"}]
    expected = [{"image": "0013ea2087020901.jpg", "captions": ["One"], "id": 0, "domain": "in-domain"},
                {"image": "b.jpg", "captions": ["A baby.", "Two"], "id": 1, "domain": "out-domain"}]
    assert rows("coco", written(tmp_path / "val.json",
                                {"images": images, "annotations": captions})) == expected
    assert rows("coco", written(tmp_path / "test.json", {"images": images})) == [
        {**row, "captions": []} for row in expected]
    of_blip = [{"image": "val/b.jpg", "img_id": 1, "domain": "near-domain"}]
    assert rows("coco", written(tmp_path / "nocaps_test.json", of_blip)) == [
        {"image": "val/b.jpg", "captions": [], "id": 0, "domain": "near-domain"}]


QUESTIONS = {"data_type": "mscoco", "data_subtype": "val2014", "questions": [
    {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
    {"image_id": 262148, "question": "What colour?", "question_id": 262148001}]}
ANNOTATIONS = {"data_subtype": "val2014", "annotations": [
    {"question_id": 262148000 + i, "image_id": 262148, "question_type": "what", "answer_type": "other",
     "multiple_choice_answer": "down", "answers": [
         {"answer": answer, "answer_confidence": "yes", "answer_id": 1 + j}
         for j, answer in enumerate(("down", "at table")[: 2 - i])]}
    for i in (1, 0)]}


def test_vqa(tmp_path):
    questions = written(tmp_path / "questions.json", QUESTIONS)
    known = {"image": "val2014/COCO_val2014_000000262148.jpg", "answer_type": "other",
             "question_type": "what"}
    assert rows("vqa", questions, written(tmp_path / "annotations.json", ANNOTATIONS)) == [
        {**known, "question": "Where is he looking?", "question_id": 262148000,
         "answers": ["down", "at table"]},
        {**known, "question": "What colour?", "question_id": 262148001, "answers": ["down"]}]
    test = written(tmp_path / "test.json", {**QUESTIONS, "data_subtype": "test-dev2015"})
    assert [(row["image"], row["answers"]) for row in rows("vqa", test)] == [
        ("test2015/COCO_test2015_000000262148.jpg", None)] * 2
    with pytest.raises(ValueError,
                       match=r"entry 2 of questions: question 262148001 has no annotation in .*less\.json"):
        rows("vqa", questions, written(tmp_path / "less.json",
                                       {"annotations": ANNOTATIONS["annotations"][1:]}))


def test_vqa_and_visual_genome_as_beside_the_published_blip(tmp_path):
    content = [{"question_id": 1, "question": "What?", "answer": ["net", "net"], "image": "train2014/a.jpg",
                "dataset": "vqa"},
               {"image": "VG_100K/1.jpg", "question": "Where?", "answer": "here", "dataset": "vg"},
               {"question_id": 3, "question": "Who?", "image": "test2015/c.jpg", "dataset": "vqa"}]
    assert rows("vqa", written(tmp_path / "vqa.json", content)) == [
        {"image": "train2014/a.jpg", "question": "What?", "answers": ["net", "net"], "question_id": 1},
        {"image": "VG_100K/1.jpg", "question": "Where?", "answers": {"here": 0.2}},
        {"image": "test2015/c.jpg", "question": "Who?", "answers": None, "question_id": 3}]


def test_visual_genome(tmp_path):
    questions = written(tmp_path / "question_answers.json", [{"id": 1, "qas": [
        {"image_id": 1, "qa_id": 986768, "question": "What colour is the clock?", "answer": "Green."}]}])
    images = written(tmp_path / "image_data.json", [
        {"image_id": 1, "url": "https://example.org/people/VG_100K_2/1.jpg", "width": 800}])
    assert rows("visual-genome", questions, images, prefix="vg") == [
        {"image": "vg/VG_100K_2/1.jpg", "question": "What colour is the clock?", "answers": {"Green.": 0.2}}]
    with pytest.raises(ValueError, match="image 1 is not in"):
        rows("visual-genome", questions, written(tmp_path / "none.json", []))


def test_nlvr2(tmp_path):
    dev = {"sentence": "Both show a dog.", "label": "False", "identifier": "dev-850-0-1", "left_url": "",
           "writer": "1"}
    train = {"sentence": "One dog.", "label": "True", "identifier": "train-10171-2-0", "directory": 22}
    lines = json.dumps(dev) + "\n\n" + json.dumps(train) + "\n"
    assert rows("nlvr2", written(tmp_path / "dev.json", lines), prefix="nlvr2") == [
        {"image": "nlvr2/dev/dev-850-0-img0.png", "second_image": "nlvr2/dev/dev-850-0-img1.png",
         "caption": "Both show a dog.", "label": False, "identifier": "dev-850-0-1",
         "sentence_id": "dev-850-1"},
        {"image": "nlvr2/images/train/22/train-10171-2-img0.png", "label": True, "caption": "One dog.",
         "second_image": "nlvr2/images/train/22/train-10171-2-img1.png", "identifier": "train-10171-2-0",
         "sentence_id": "train-10171-0"}]
    of_blip = [{"sentence": "A dog.", "label": "True", "images": ["dev/x-img0.png", "dev/x-img1.png"]}]
    assert rows("nlvr2", written(tmp_path / "nlvr_dev.json", of_blip)) == [
        {"image": "dev/x-img0.png", "second_image": "dev/x-img1.png", "caption": "A dog.", "label": True}]


def test_msrvtt(tmp_path):
    """The CSV of the 1k-A test, and captions as separate entries in any order."""
    lines = ('key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a person, connecting"\n'
             'ret1,msr1,video1,a dog\n')
    assert rows("msrvtt", written(tmp_path / "MSRVTT_JSFUSION_test.csv", lines), prefix="videos") == [
        {"image": "videos/video9770.mp4", "captions": ["a person, connecting"], "id": 0},
        {"image": "videos/video1.mp4", "captions": ["a dog"], "id": 1}]
    captions = [{"caption": "one", "clip_name": "video7", "retrieval_key": "ret1"},
                {"caption": "two", "clip_name": "video8", "sen_id": 0},
                {"caption": "three", "clip_name": "video7"}]
    listed = written(tmp_path / "msrvtt_test.jsonl", "".join(json.dumps(entry) + "\n" for entry in captions))
    assert rows("msrvtt", listed) == [{"image": "video7.mp4", "captions": ["one", "three"], "id": 0},
                                      {"image": "video8.mp4", "captions": ["two"], "id": 1}]


def test_questions_about_videos(tmp_path):
    asked = written(tmp_path / "test_qa.json", [
        {"answer": "couch", "category_id": 14, "id": 158581, "question": "what did he lie on?",
         "video_id": 6513}])
    row = {"question": "what did he lie on?", "question_id": 158581, "answers": ["couch"]}
    assert rows("msrvtt-qa", asked, split="test") == [{"split": "test", "image": "video6513.mp4", **row}]
    names = written(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1\nmv89psg6zh4_33_46 vid6513\n")
    assert rows("msvd-qa", asked, names, prefix="YouTubeClips") == [
        {"image": "YouTubeClips/mv89psg6zh4_33_46.avi", **row}]
    for content, message in (("a vid1\n", r"entry 1: vid6513 is not in .*mapping\.txt"),
                             ("a vid1\n\n", r"mapping\.txt, line 2 is not a video's name and number")):
        with pytest.raises(ValueError, match=message):
            rows("msvd-qa", asked, written(tmp_path / "mapping.txt", content))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("karpathy", "{", "is no JSON in UTF-8"),
    ("karpathy", {"annotations": []}, 'has no list "images": it is of another format'),
    ("karpathy", {"images": [{"filename": "a.jpg", "sentences": []}]},
     'entry 1 of images has no "split", a text'),
    ("karpathy", {"images": [{"filename": "a.jpg", "split": "test", "sentences": [{}]}]},
     'has no "raw", a text'),
    ("karpathy", [{"image": "a.jpg", "caption": [3]}],
     'entry 1: "caption" must be a text or a list of texts'),
    ("karpathy", [3], "entry 1 is no object"),
    ("coco", {"images": [{"id": "7", "file_name": "a.jpg"}]}, 'has no "id", a whole number'),
    ("vqa", "3", 'has no list "questions"'),
    ("vqa", {"questions": []}, 'has no "data_subtype", a text'),
    ("vqa", [{"image": "a.jpg"}], 'entry 1 has no "question", a text'),
    ("nlvr2", '{"sentence": "a"}', 'entry 1 has no "label", a text'),
    ("nlvr2", '{"sentence": "a", "label": "maybe"}', """"label" is 'maybe', not "True" or "False\""""),
    ("nlvr2", '{"sentence": "a", "label": "True", "identifier": "dev-1"}', "not SPLIT-SET-PAIR-SENTENCE"),
    ("nlvr2", '{"sentence": "a", "label": "True", "images": ["a.png"]}', "must be two paths"),
    ("nlvr2", '{"sentence": "a"}\n{', "row 2 is not JSON"),
    ("msrvtt", '{"caption": "a"}', 'entry 1 has no "clip_name", a text'),
    ("msrvtt-qa", [{"video_id": "video7"}], 'entry 1 has no "video_id", a whole number'),
    ("msrvtt-qa", [{"video_id": 7, "question": "a?", "id": 1}], 'entry 1 has no "answer", a text'),
])
def test_what_is_not_understood_is_named(tmp_path, name, content, message):
    path = written(tmp_path / "file.json", content)
    with pytest.raises(ValueError) as error:
        rows(name, path)
    assert message in str(error.value) and path in str(error.value)


def test_formats_and_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError,
                       match="karpathy, coco, vqa, visual-genome, nlvr2, visdial, msrvtt, msrvtt-qa, "
                             "msvd-qa, got 'flickr'"):
        rows("flickr", "a.json")
    for name, files in (("karpathy", ["a", "b"]), ("nlvr2", []), ("visual-genome", ["a"])):
        with pytest.raises(ValueError,
                           match=f"{name} takes {FORMATS[name].files[:4]}.*, got {len(files)} files"):
            rows(name, *files)
    with pytest.raises(FileNotFoundError):
        rows("nlvr2", str(tmp_path / "lost.json"))


def test_the_command_writes_rows_that_are_read(tmp_path, capsys):
    """An existing file is not overwritten, and no file is left after an error."""
    folder = tmp_path / "data"
    questions = written(tmp_path / "q.json", QUESTIONS), written(tmp_path / "a.json", ANNOTATIONS)
    output = folder / "annotations.jsonl"
    assert main(["data", "annotations", "vqa", *questions, "--output", str(output), "--split", "val",
                 "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"annotations": str(output), "rows": 2}
    assert read_annotations(output) == [{"split": "val", **row, "captions": []}
                                        for row in rows("vqa", *questions)]
    assert main(["data", "annotations", "vqa", *questions, "--output", str(output)]) == 2
    assert "exists" in capsys.readouterr().err
    test = written(tmp_path / "test.json", {**QUESTIONS, "data_subtype": "test2015"})
    assert main(["data", "annotations", "vqa", test, "--output", str(folder / "test.jsonl")]) == 0
    assert [row["answers"] for row in read_annotations(folder / "test.jsonl")] == [None, None]
    broken = written(tmp_path / "broken.json", [{"image": "a", "question": "b"}, {}])
    assert main(["data", "annotations", "vqa", broken, "--output", str(folder / "new.jsonl")]) == 2
    assert "entry 2" in capsys.readouterr().err and not (folder / "new.jsonl").exists()
