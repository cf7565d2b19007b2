"""The yardstick itself: greedy and beam search against the published captions and against transformers."""

import pytest
import torch
from reference.generate import beam_search_authors, beam_search_transformers5, greedy
from reference.samples import SMALL, published, roughened
from reference.tasks import DEC, Captioner
from reference.transformers_twin import transformers_twin
from torch import Tensor

PROMPT = [DEC, 1037, 3861, 1997]  # [DEC] a picture of
SEP = 102


@pytest.mark.parametrize("case", ["greedy", "beam3", "beam3_rep", "beam5_min10"])
def test_published_captions(case: str):
    config, weights, expected, sizes = published("caption")
    model = Captioner(sizes)
    model.load_state_dict(weights)
    options = dict(config["generate"][case]["args"])
    beams = options.pop("num_beams")
    for row, image in enumerate(expected["images"]):
        next_logits = model.next_token_logits(image)
        if beams == 1:
            ids = greedy(next_logits, PROMPT, **options)
        else:
            ids, score = beam_search_authors(next_logits, PROMPT, beams, **options)
            assert score == pytest.approx(float(expected[f"gen_{case}_scores"][row]), abs=2e-5)
        wanted = expected[f"gen_{case}_ids"][row].tolist()
        assert ids + [0] * (len(wanted) - len(ids)) == wanted


def assert_same_text(ours: list[int], theirs: list[int]) -> None:
    """transformers 5 fills a row up with [SEP] where the padding id is 0."""
    assert ours == theirs[: len(ours)]
    assert set(theirs[len(ours) :]) <= {0, SEP}


@pytest.mark.parametrize(
    ("beams", "penalty", "min_length", "max_length"), [(1, 1.0, 5, 14), (3, 1.0, 5, 14), (3, 1.1, 8, 14)]
)
def test_transformers_captions(beams: int, penalty: float, min_length: int, max_length: int):
    torch.manual_seed(0)
    model = roughened(Captioner(SMALL))
    with torch.no_grad():  # likelier [SEP], so that texts end at different lengths
        model.text_decoder.cls["predictions"].bias[SEP] += 2.4
    twin = transformers_twin("BlipForConditionalGeneration", model, SMALL)
    images = torch.randn(6, 3, 32, 32)
    options = {"max_length": max_length, "min_length": min_length, "repetition_penalty": penalty}
    prompts = torch.tensor([[*PROMPT, SEP]]).repeat(len(images), 1)
    theirs = twin.generate(images, prompts, num_beams=beams, do_sample=False, **options).tolist()
    for image, text in zip(images, theirs, strict=True):
        next_logits = model.next_token_logits(image)
        if beams == 1:
            ours = greedy(next_logits, PROMPT, **options)
        else:
            ours, _ = beam_search_transformers5(next_logits, PROMPT, beams, **options)
        assert_same_text(ours, text)


def rough_logits(texts: Tensor, spread: float, sep: float) -> Tensor:
    """A language of 104 words without meaning, rugged enough that the rules of beam search part ways."""
    last, before, words = texts[:, -1:], texts[:, -2:-1], torch.arange(104)
    waves = torch.sin(0.7 * last + 1.3 * before + 0.9 * words + 0.05 * last * words)
    logits = spread * (waves + 0.0011 * words)
    logits[:, SEP] += sep
    return logits


@pytest.mark.parametrize(
    ("spread", "sep", "beams", "max_length", "min_length", "prompt_end", "text", "score"),
    [
        (1.0, 2.0, 2, 12, 5, 7, [98, 93, 72, SEP], -2.301797),  # goes on though two texts are finished
        (2.0, 2.0, 2, 9, 1, 11, [91, 99, 96, 96, SEP], -2.278688),  # stops before a better text would end
        (0.5, 0.0, 2, 9, 1, 4, [90, 97, 96, 92, 95, 103], -2.791909),  # unfinished texts count at max_length
        # [SEP] outside the best beams does not
        (0.5, 0.0, 3, 9, 1, 7, [103, 99, 103, 99, 103, 100], -2.793345),
    ],
)
def test_authors_rule(spread, sep, beams, max_length, min_length, prompt_end, text, score):
    """Texts and scores recorded from transformers 4.15's own beam scorer."""
    prompt = [103, 5, prompt_end]
    ours = beam_search_authors(lambda texts: rough_logits(texts, spread, sep), prompt, beams, max_length,
                               min_length)
    assert ours == (prompt + text, pytest.approx(score, abs=1e-5))


@pytest.mark.parametrize(
    ("spread", "sep", "beams", "max_length", "min_length"),
    [(0.5, 0.0, 2, 12, 5), (0.5, 0.0, 5, 12, 5), (0.5, 2.0, 2, 12, 5), (1.0, 0.0, 3, 16, 8),
     (8.0, 2.0, 2, 16, 8)],
)
def test_transformers5_rule(spread, sep, beams, max_length, min_length):
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Rough(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(vocab_size=104, is_encoder_decoder=False))
            # transformers asks a model's parameters for their device
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            return CausalLMOutput(logits=rough_logits(input_ids, spread, sep)[:, None])

        def prepare_inputs_for_generation(self, input_ids, **_):
            return {"input_ids": input_ids}

    prompts = [[103, 5, end] for end in range(12)]
    theirs = Rough().generate(
        torch.tensor(prompts), num_beams=beams, max_length=max_length, min_length=min_length, do_sample=False,
        eos_token_id=SEP, pad_token_id=0, use_cache=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for prompt, text, score in zip(prompts, theirs.sequences, theirs.sequences_scores, strict=True):
        ours = beam_search_transformers5(
            lambda texts: rough_logits(texts, spread, sep), prompt, beams, max_length, min_length
        )
        assert_same_text(ours[0], text.tolist())
        assert ours[1] == pytest.approx(float(score), abs=1e-5)
