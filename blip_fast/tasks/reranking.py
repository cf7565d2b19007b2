"""Re-ranks the candidate captions of an image by what the image shows.

`ItmScorer` uses the matching head's probability that caption and image match. `BeliefScorer` revises the
probability of a caption w by the image's likeliest label c, its visual context (Blok et al. 2003; Sabir et
al., COLING 2022):

    P(w | c) = P(w)^α,    α = ((1 − sim(w, c)) / (1 + sim(w, c)))^(1 − P(c))

The published method takes P(w) from GPT-2, sim from a sentence encoder and c from an image classifier. Here
BLIP provides all three: P(w) is the decoder's probability per token (the geometric mean), sim is the cosine
of ITC's text features, and c is the zero-shot label with its confidence P(c). `BertCnnScorer` uses the
probability that w and the same c belong together, by a model that was trained on such pairs
(`blip_fast/model/bert_cnn.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from blip_fast.generate import GenerationConfig
from blip_fast.inference.encoding import evaluating
from blip_fast.media.images import ImageError
from blip_fast.model.bert_cnn import BertCnn, pack_pairs, select_pairs
from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.tasks.captioner import Caption, Captioned, Captioner
from blip_fast.tasks.classifier import Classifier, Labels, ScoredLabel
from blip_fast.tasks.matcher import MAX_TOKENS, Matcher, image_of_each, text_features, texts_at_a_time
from blip_fast.tasks.model_loading import pixels_or_error


@dataclass(frozen=True)
class Candidate:
    """A caption for a scorer: its words without the prompt, and the `Caption`'s score."""

    text: str
    score: float


class Scorer(Protocol):
    """Scores candidates of images by a probability; higher is better."""

    model: BlipModel

    def score(self, pixels: Tensor, candidates: Sequence[Sequence[Candidate]]) -> Tensor:
        """Score each image's candidates, all of which have at least one word.

        `pixels` are [images, 3, image_size, image_size] after the evaluation transform. Returns float64
        [candidates] on the CPU, image after image.
        """
        ...


class ItmScorer:
    """By the matching head."""

    def __init__(self, matcher: Matcher, first_token: str = "[CLS]") -> None:
        """`first_token` as for `Matcher.score`. Raises ValueError for any other."""
        matcher.pack([], first_token)
        self.model, self._matcher, self._first_token = matcher.model, matcher, first_token

    def score(self, pixels: Tensor, candidates: Sequence[Sequence[Candidate]]) -> Tensor:
        texts = [[candidate.text for candidate in mine] for mine in candidates]
        packed = self._matcher.pack([text for mine in texts for text in mine], self._first_token)
        return self._matcher.score_pairs(pixels, packed, image_of_each(texts)).itm.double()


class BeliefScorer:
    """By belief revision with the likeliest of a list of labels. The candidates' scores must be
    log-probabilities per token: see `check_scores`."""

    def __init__(self, classifier: Classifier, labels: Labels) -> None:
        self.model, self._classifier, self._labels = classifier.model, classifier, labels

    @staticmethod
    def check_scores(generation: GenerationConfig) -> None:
        """Raises ValueError if captions generated so have scores that are not log-probabilities per token."""
        if generation.beam_rule != "transformers5" or generation.length_penalty != 1.0 or (
                generation.repetition_penalty != 1.0):
            raise ValueError("belief revision reads scores as log-probabilities per token: leave "
                             "out beam_rule, length_penalty and repetition_penalty")

    def score(self, pixels: Tensor, candidates: Sequence[Sequence[Candidate]]) -> Tensor:
        best = _contexts(self._classifier, self._labels, pixels)
        texts = [[candidate.text for candidate in mine] for mine in candidates]
        packed = self._classifier.tokenizer.pack([text for mine in texts for text in mine],
                                                 "[CLS]", MAX_TOKENS)
        with evaluating(self.model):
            features = text_features(self.model, packed)
        images = image_of_each(texts)
        places = torch.tensor([self._labels.names.index(label.label) for label in best])[images]
        similarity = (features * self._labels.features[places.to(features.device)]).sum(dim=1).double().cpu()
        confidence = torch.tensor([label.probability for label in best], dtype=torch.float64)[images]
        scores = torch.tensor([each.score for mine in candidates for each in mine], dtype=torch.float64)
        return revised_belief(scores.exp(), similarity, confidence)


class BertCnnScorer:
    """By BERT-CNN with the likeliest of a list of labels."""

    def __init__(self, classifier: Classifier, labels: Labels, bert_cnn: BertCnn,
                 tokenizer: Tokenizer) -> None:
        """`bert_cnn` in evaluation mode, and its own `tokenizer`."""
        self.model, self._classifier, self._labels = classifier.model, classifier, labels
        self._bert_cnn, self._tokenizer = bert_cnn.to(classifier.model.vision.cls_token.device), tokenizer

    def score(self, pixels: Tensor, candidates: Sequence[Sequence[Candidate]]) -> Tensor:
        best = _contexts(self._classifier, self._labels, pixels)
        captions = [candidate.text for mine in candidates for candidate in mine]
        labels = [label.label for mine, label in zip(candidates, best, strict=True) for _ in mine]
        return related(self._bert_cnn, *pack_pairs(self._tokenizer, captions, labels))


def related(model: BertCnn, pairs: PackedTexts, types: Tensor) -> Tensor:
    """BERT-CNN's probability that the caption and the label of each pair belong together, float64 [pairs] on
    the CPU. The model must be in evaluation mode; `pairs` and `types` come from `pack_pairs`, on the CPU."""
    device, found = model.output.weight.device, [torch.empty(0, dtype=torch.float64)]
    with torch.no_grad():
        for some in torch.arange(len(pairs)).split(texts_at_a_time(device)) if len(pairs) else ():
            packed, kinds = select_pairs(pairs, types, some)
            found.append(model(packed.to(device), kinds.to(device)).double().sigmoid().cpu())
    return torch.cat(found)


def _contexts(classifier: Classifier, labels: Labels, pixels: Tensor) -> list[ScoredLabel]:
    """The visual context of each image: its likeliest label."""
    return [best[0] for best in classifier.classify_pixels(pixels, labels, top_k=1)]


def revised_belief(probability: Tensor, similarity: Tensor, confidence: Tensor) -> Tensor:
    """P(w | c) = P(w)^α with α = ((1 − sim) / (1 + sim))^(1 − P(c)) (Sabir et al. 2022, section 3).

    A caption that is unlike its context (sim < 0) becomes less likely. A context that is certain (P(c) = 1)
    changes nothing. At the limits, sim = 1 gives 1 and sim = −1 gives 0, unless P(c) or P(w) is 1.

    Args:
        probability: P(w), in [0, 1], of any shape. The other two have the same shape.
        similarity: cosines, clamped to ±1 against rounding errors.
        confidence: P(c), in [0, 1].
    """
    similarity = similarity.clamp(-1, 1)
    return probability ** (((1 - similarity) / (1 + similarity)) ** (1 - confidence))


def reranked(captioner: Captioner, stream: Iterable[Captioned], scorer: Scorer, prompt: str,
             batch_size: int) -> Iterator[Captioned]:
    """The same images with their texts ordered by a scorer. The best text becomes the caption, the rest its
    `others`, and `Caption.rerank` holds each text's score. Ties keep their order; a text without a word
    scores 0.

    Args:
        captioner: the one whose `stream` made the captions.
        stream: the captioned images, with images' own prompts.
        prompt: the prompt of images without their own.
        batch_size: images to score together. Each is read again, at the size of the scorer's model.
    """
    stream = iter(stream)
    while batch := list(islice(stream, batch_size)):
        reads = [_pixels(captioned, scorer) for captioned in batch]
        pixels = [read for read in reads if isinstance(read, Tensor)]
        texts = [_candidates(captioner, captioned, prompt)
                 for captioned, read in zip(batch, reads, strict=True) if isinstance(read, Tensor)]
        scores = _scores(scorer, pixels, texts)
        for captioned, read in zip(batch, reads, strict=True):
            result = read if isinstance(read, ImageError) else _best_first(captioned, next(scores))
            yield replace(captioned, result=result)


def _pixels(captioned: Captioned, scorer: Scorer) -> Tensor | ImageError:
    if isinstance(captioned.result, ImageError):
        return captioned.result
    return pixels_or_error(captioned.source, scorer.model.config.vision.image_size, captioned.image)


def _candidates(captioner: Captioner, captioned: Captioned, prompt: str) -> list[Candidate]:
    skipped = len(captioner.prompt_ids(prompt if captioned.prompt is None else captioned.prompt))
    return [Candidate(captioner.tokenizer.decode(text.token_ids[skipped:]).strip(), text.score)
            for text in _texts(captioned)]


def _scores(scorer: Scorer, pixels: Sequence[Tensor],
            texts: Sequence[Sequence[Candidate]]) -> Iterator[list[float]]:
    """Each image's scores, in the order of its texts."""
    worded = [[candidate for candidate in mine if candidate.text] for mine in texts]
    found = iter(scorer.score(torch.stack([*pixels]), worded).tolist() if pixels else ())
    return ([next(found) if candidate.text else 0.0 for candidate in mine] for mine in texts)


def _texts(captioned: Captioned) -> list[Caption]:
    assert isinstance(captioned.result, Caption)
    return [captioned.result, *captioned.result.others]


def _best_first(captioned: Captioned, scores: Sequence[float]) -> Caption:
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    texts = [replace(text, others=(), rerank=score)
             for text, score in zip(_texts(captioned), scores, strict=True)]
    best, *others = (texts[place] for place in order)
    return replace(best, others=tuple(others))
