"""Retrieval among many: memory and disk are bounded, and scores equal those of each pair alone."""

import pytest
import torch
from counting import Counting
from reference import tasks
from reference.model import Sizes
from test_retrieve import CONFIG, images, model, texts

from blip_fast.checkpoint.names import original_layout
from blip_fast.tasks import matcher
from blip_fast.tasks import retriever as retrieve_module
from blip_fast.tasks.candidates import EmbedsFile
from blip_fast.tasks.retriever import retrieve

EMBEDS_BYTES = CONFIG.vision.tokens * CONFIG.vision.width * 4  # per image


def textbook():
    sizes = Sizes(image_size=16, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2,
                  vocabulary=40,
                  positions=24, text_width=32, text_layers=2, text_heads=2,
                  text_feed_forward=48, projection=8)
    reference = tasks.Matcher(sizes)
    layout = original_layout(CONFIG)
    state = layout.split(model().state_dict())
    missing, _ = reference.load_state_dict(state | layout.stored_twice(state), strict=False)
    assert not missing
    return reference.eval()


@pytest.fixture
def file_sizes(monkeypatch):
    """The sizes of the embeds' files."""
    sizes, close = [], EmbedsFile.close

    def measured(self):
        sizes.append(self._file.seek(0, 2))
        close(self)

    monkeypatch.setattr(EmbedsFile, "close", measured)
    return sizes


@pytest.mark.parametrize("count, texts_count, top_k, together", [
    (200, 6000, 2, 64), pytest.param(2000, 10_000, 16, 512, marks=pytest.mark.slow)])
def test_memory_is_bounded_and_scores_are_those_of_each_pair(count, texts_count, top_k, together, monkeypatch,
                                                             file_sizes):
    monkeypatch.setattr(matcher, "CPU_TEXTS", together)
    monkeypatch.setattr(retrieve_module, "BLOCK_IMAGES", count // 12)
    packed = texts(texts_count)
    stream = (images(50, seed=start) for start in range(0, count, 50))
    with Counting() as counters:
        before = counters.alive()
        result = retrieve(model(), stream, packed, top_k)
    dense = count * texts_count * 4
    candidates = (count + texts_count) * top_k * (8 + 4)
    # A block of cosines and its best; several copies of the candidates while pairs are made unique; one pass
    # of texts.
    bound = dense / 6 + 8 * candidates + 40_000 * together
    assert counters.peak - before < bound < dense  # less than a single table of all pairs
    assert file_sizes == [count * EMBEDS_BYTES]
    assert count * top_k < result.pairs < (count + texts_count) * top_k

    reference, generator = textbook(), torch.Generator().manual_seed(0)
    pixels = torch.cat([images(50, seed=start) for start in range(0, count, 50)])
    padded, mask = (x.long() for x in packed.to_padded(0))
    queries = torch.randint(texts_count, (40,), generator=generator)
    items, scores = (x[queries] for x in (result.text_to_image.items, result.text_to_image.scores))
    with torch.no_grad():
        ids, text_mask = (x[queries].repeat_interleave(top_k, 0) for x in (padded, mask))
        embeds = reference.visual_encoder(pixels[items.flatten()])
        cosines = (reference.image_features(embeds) * reference.text_features(ids, text_mask)).sum(1)
        ids[:, 0] = CONFIG.tokens.enc
        expected = reference.matching_logits(embeds, ids, text_mask)[:, 1] + cosines
        torch.testing.assert_close(scores.flatten(), expected, atol=1e-4, rtol=0)
        all_cosines = reference.text_features(padded[queries], mask[queries]) @ torch.cat(
            [reference.image_features(reference.visual_encoder(some)) for some in pixels.split(50)]).T
        least = all_cosines.topk(top_k).values[:, -1]
        assert (all_cosines.gather(1, items) >= least[:, None] - 1e-5).all()


def test_a_stream_of_images_takes_no_more_disk_than_its_candidates(monkeypatch, file_sizes):
    monkeypatch.setattr(retrieve_module, "BLOCK_IMAGES", 100)
    count, asked, top_k = 3000, 5, 8
    result = retrieve(model(), (images(50, seed=start) for start in range(0, count, 50)), texts(asked), top_k,
                      directions="text_to_image")
    assert result.pairs <= asked * top_k and result.text_to_image.gallery == count
    assert file_sizes[0] <= (asked * top_k + 100) * EMBEDS_BYTES
    assert int(result.text_to_image.items.max()) > 1000  # a late image, in a reused slot


def test_a_full_disk_is_named(monkeypatch):
    class Full:
        def seek(self, place):
            pass

        def write(self, content):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"embeds of 1 images do not fit into .*: set TMPDIR"):
        retrieve(model(), images(2), texts(3), 1)
