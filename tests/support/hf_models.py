"""Small random transformers models, saved with a tokenizer; our results must equal theirs."""

from pathlib import Path

import torch
import transformers

from blip_fast.model.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IMAGE_SIZE = 64


def save_model(architecture: str, tokenizer: Tokenizer, directory: Path, *, sep_bias: float = 0.0,
               seed: int = 0) -> transformers.PreTrainedModel:
    """Save a model with random weights, large enough that texts differ between images. `sep_bias` makes some
    texts end early."""
    text = {"hidden_size": 64, "encoder_hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
            "sep_token_id": tokenizer.sep_id, "eos_token_id": tokenizer.sep_id,
            "pad_token_id": tokenizer.pad_id,
            "cls_token_id": tokenizer.cls_id, "enc_token_id": tokenizer.enc_id}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": IMAGE_SIZE, "patch_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=32)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.05))
        if sep_bias:
            model.text_decoder.cls.predictions.bias[tokenizer.sep_id] += sep_bias
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return model


def until_sep(token_ids: torch.Tensor, sep_id: int, prompt_length: int = 1) -> list[int]:
    """A row of transformers' output without the padding after [SEP]."""
    ids = token_ids.tolist()
    return ids[: ids.index(sep_id, prompt_length) + 1] if sep_id in ids[prompt_length:] else ids


def small_tokenizer() -> Tokenizer:
    """A vocabulary of 120 tokens, trained on a few captions; [SEP] is its token 3."""
    captions = ["a picture of a red ball on a table", "two dogs run over the green grass",
                "a man rides a horse", "the small blue square is left of the large circle",
                "people sit at a long wooden table and eat"]
    return Tokenizer.train(captions, 120)
