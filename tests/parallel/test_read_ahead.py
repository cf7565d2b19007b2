"""A stream of images through a captioner: order, bounds, errors, prompts, every kind of image."""

import itertools
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import odd_files
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer
from patience import until
from PIL import Image

from blip_fast.generate import GenerationConfig
from blip_fast.media.images import ImageError, StoredImage, evaluation_transform, image_pixels, load_image
from blip_fast.parallel.read_ahead import in_order, read_ahead
from blip_fast.tasks.captioner import Captioner

SHORT = GenerationConfig(beams=2, max_length=10)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Captioner:
    directory = tmp_path_factory.mktemp("captioning")
    save_model("BlipForConditionalGeneration", small_tokenizer(), directory, sep_bias=4.0, seed=2)
    return Captioner.from_pretrained(directory, dtype="float32")


def pictures(count: int) -> list[Image.Image]:
    return [odd_files.picture(40, 30, seed=i) for i in range(count)]


def test_read_ahead_keeps_order_and_its_bound():
    """At most threads × ahead wait, two more are on their way in and one out; an error comes at its place."""
    drawn = 0

    def numbers():
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    def read(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return 10 * number

    others = set(threading.enumerate())  # of streams of other tests that nobody has collected yet
    stream = read_ahead(numbers(), read, threads=3, ahead=2)
    for taken, (item, done) in enumerate(itertools.islice(stream, 50), 1):
        assert (item, done) == (taken, 10 * taken)
        assert drawn - taken <= 3 * 2 + 2
    stream.close()
    until(lambda: not any(thread.name == "feed" for thread in set(threading.enumerate()) - others))
    assert drawn - taken <= 3 * 2 + 2

    broken = read_ahead(iter([1, 0, 2]), lambda number: 1 / number)
    assert next(broken) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(broken)


def test_what_the_source_raises_comes_behind_its_items():
    def source():
        yield 1
        raise OSError("the disk went away")

    stream = read_ahead(source(), str)
    assert next(stream) == (1, "1")
    with pytest.raises(OSError, match="the disk went away"):
        next(stream)


def test_a_signal_leaves_nothing_locked():
    """Hundreds of signals that raise anywhere in a main thread: each ends its stream, none hangs."""
    interrupted = """if True:
        import faulthandler, random, signal
        from blip_fast.parallel.read_ahead import read_ahead

        def stop(number, frame):
            raise KeyboardInterrupt

        faulthandler.dump_traceback_later(100, exit=True)
        signal.signal(signal.SIGALRM, stop)
        random.seed(0)
        for _ in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.01))
                for _ in read_ahead(range(10**9), lambda number: number):
                    pass
            except KeyboardInterrupt:
                pass
    """
    subprocess.run([sys.executable, "-c", interrupted], check=True)


def test_in_order():
    assert list(in_order([2, 0, 1, 4, 3], lambda place: place)) == [0, 1, 2, 3, 4]


def test_neighbours_order_and_batch_leave_a_caption_as_it_is(captioner):
    """To the bit, score included; results come in order, or as they are finished with their places."""
    images = pictures(11)
    alone = [captioner(image, generation=SHORT)[0] for image in images]
    for size, ordered in ((1, True), (4, True), (16, True), (3, False)):
        results = list(captioner.stream(iter(images), generation=SHORT, batch_size=size, ordered=ordered))
        places = [captioned.place for captioned in results]
        assert places == list(range(11)) if ordered else sorted(places) == list(range(11))
        assert [captioned.result for captioned in results] == [alone[place] for place in places]
    turned = captioner(images[::-1], generation=SHORT, batch_size=5)
    assert turned == alone[::-1]


def test_memory_is_bounded_by_the_batch(captioner):
    """Of an endless stream no more is drawn than is being read, captioned or put in order."""
    drawn = 0

    def endless():
        nonlocal drawn
        for image in itertools.cycle(pictures(5)):
            drawn += 1
            yield image

    stream = captioner.stream(endless(), generation=SHORT, batch_size=4)
    for taken, captioned in enumerate(itertools.islice(stream, 60)):
        assert captioned.place == taken
        assert drawn - taken < 120
    stream.close()


def test_an_unreadable_image_is_a_result(captioner, tmp_path):
    """Also when nothing else comes: errors wait for no caption."""
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    good = pictures(1)[0]
    images = [tmp_path / "bad.jpg", good, "missing.jpg", good]
    results = list(captioner.stream(images, generation=SHORT))
    assert [isinstance(captioned.result, ImageError) for captioned in results] == [True, False, True, False]
    assert [captioned.image for captioned in results] == [str(tmp_path / "bad.jpg"), "image 1", "missing.jpg",
                                                          "image 3"]
    assert "bad.jpg" in str(results[0].result) and "no such file" in str(results[2].result)
    stream = captioner.stream(itertools.repeat("missing.jpg"), generation=SHORT)
    assert all(isinstance(captioned.result, ImageError) for captioned in itertools.islice(stream, 100))


def test_prompts_of_all_or_of_each(captioner):
    images, prompts = pictures(3), ["a man", "", "two dogs run over"]
    each = captioner(images, prompts, SHORT)
    assert each == [captioner(image, prompt, SHORT)[0] for image, prompt in zip(images, prompts, strict=True)]
    streamed = list(captioner.stream([(images[0], "a man"), images[1]], "", SHORT))
    assert [captioned.result for captioned in streamed] == each[:2]
    assert [captioned.prompt for captioned in streamed] == ["a man", None]
    with pytest.raises(ValueError, match="3 images but 2 prompts"):
        captioner(images, prompts[:2], SHORT)
    with pytest.raises(ValueError, match="max_length"):
        captioner.stream(images, "the large blue circle is left of the small table", SHORT)
    long = list(captioner.stream([(images[0], "the large blue circle is left of the small table"), images[1]],
                                 "", SHORT))
    assert "image 0: the prompt has" in str(long[0].result) and long[1].result == each[1]


def test_n_best_and_banned(captioner):
    image, config = pictures(1)[0], GenerationConfig(beams=4, max_length=10, n_best=3)
    (best,) = captioner(image, generation=config)
    assert len(best.others) == 2 and best.score >= best.others[0].score >= best.others[1].score
    assert replace(best, others=()) == captioner(image, generation=replace(config, n_best=1))[0]
    written = captioner.tokenizer.decode([best.token_ids[6]])
    (other,) = captioner(image, generation=config, banned=[written])
    banned = captioner.tokenizer.encode(written)[1]
    assert all(banned not in text.token_ids[6:] for text in (other, *other.others))
    with pytest.raises(ValueError, match="no token"):
        captioner(image, banned=[" "])


def test_every_kind_of_image_is_one_picture(tmp_path):
    image, path = odd_files.picture(), tmp_path / "a picture #1 ü.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    expected = evaluation_transform([image], IMAGE_SIZE)[0]
    for source in (path, str(path), path.as_uri(), path.read_bytes(), image, array, tensor.permute(2, 0, 1),
                   expected, StoredImage("named", path)):
        assert torch.equal(image_pixels(source, IMAGE_SIZE), expected)
    assert path.as_uri().startswith("file:///") and "%20" in path.as_uri()
    assert load_image(tensor[..., 0]).size == image.size


def test_many_images_in_one_array(captioner):
    images = pictures(3)
    arrays = np.stack([np.asarray(image) for image in images])
    expected = captioner(images, generation=SHORT)
    assert captioner(arrays, generation=SHORT) == expected
    assert captioner(torch.from_numpy(arrays).permute(0, 3, 1, 2), generation=SHORT) == expected
    assert captioner(evaluation_transform(images, IMAGE_SIZE), generation=SHORT) == expected


@pytest.mark.parametrize(("source", "said"), [
    (torch.zeros(30, 40, 3, dtype=torch.uint8), r"tensors must be uint8 \[\(1, 3 or 4,\) height, width\]"),
    (torch.rand(3, IMAGE_SIZE, IMAGE_SIZE), "do not look normalised"),
    (255 * torch.rand(3, IMAGE_SIZE, IMAGE_SIZE), "do not look normalised"),
    (torch.full((3, IMAGE_SIZE, IMAGE_SIZE), float("nan")), "do not look normalised"),
    (torch.randn(3, 8, 8), r"must be \[3, 64, 64\]"),
    (torch.zeros(3, 8, 8, dtype=torch.int32), "tensors must be uint8"),
    (np.zeros((8, 8, 3), np.float32), "arrays must be uint8"),
    ("https://example.org/photo.jpg", "download it first"),
    ("file://elsewhere/photo.jpg", "files on this machine"),
    ("file:///nowhere/photo.jpg", "no such file"),
])
def test_ambiguous_or_foreign_input_is_refused(source, said):
    with pytest.raises(ImageError, match=said):
        image_pixels(source, IMAGE_SIZE)


def test_what_is_done_between_two_results_is_left_alone(captioner):
    """A consumer that trains in between finds its modes and gradients as they were."""
    captioner.model.train()
    for _ in captioner.stream(pictures(2), generation=SHORT):
        assert captioner.model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    captioner.model.eval()


def test_paths_need_no_list(captioner, tmp_path):
    path = Path(tmp_path / "one.png")
    pictures(1)[0].save(path)
    assert captioner(path, generation=SHORT) == captioner([str(path)], generation=SHORT)
