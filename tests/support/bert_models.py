"""Small random BERTs as transformers saves them, and BERT-CNN by transformers' modules and torch's."""

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from hf_models import small_tokenizer

from blip_fast.checkpoint.bert import load_bert
from blip_fast.model.bert_cnn import BertCnn

TOKENIZER = small_tokenizer()


def save_bert(directory: Path, *, task: str = "BertModel", seed: int = 0,
              **changes) -> transformers.PreTrainedModel:
    """Save transformers' BERT with weights far from their initialisation, and a tokenizer."""
    sizes = {"vocab_size": TOKENIZER.vocab_size - 2, "hidden_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    model = getattr(transformers, task)(transformers.BertConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(directory)
    # BERT's own vocabulary has neither [DEC] nor [ENC].
    words = (TOKENIZER._tokenizer.id_to_token(i) for i in range(TOKENIZER.vocab_size - 2))
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return model


def bert_cnn(directory: Path, seed: int = 0) -> BertCnn:
    model = load_bert(directory)[0]
    torch.manual_seed(seed)
    return BertCnn(model).eval()


def independent(bert: torch.nn.Module, convolution: torch.nn.Conv1d, output: torch.nn.Module, caption: str,
                label: str) -> torch.Tensor:
    """One pair's logit by transformers' BERT and torch's convolution, on that pair alone."""
    first, second = TOKENIZER.encode(caption, max_tokens=40), TOKENIZER.encode(label, max_tokens=25)[1:]
    types = torch.tensor([[0] * len(first) + [1] * len(second)])
    states = bert(torch.tensor([first + second]), token_type_ids=types).last_hidden_state
    return F.linear(F.relu(convolution(states.transpose(1, 2))).amax(dim=2), output.weight, output.bias)[0, 0]
