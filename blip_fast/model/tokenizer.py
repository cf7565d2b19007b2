"""WordPiece tokenizer with BLIP's two extra tokens, and the published clean-up of captions and questions.

The vocabulary is bert-base-uncased's 30,522 tokens, another checkpoint's, or one trained on your own
captions; `[DEC]` (bos) and `[ENC]` come after it: 30,522 and 30,523 for BERT's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import huggingface_hub
import tokenizers
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from blip_fast.model.packed_texts import PackedTexts

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BLIP_TOKENS = ("[DEC]", "[ENC]")  # in this order after BERT's vocabulary
MAX_TEXT_TOKENS = 512  # BERT's positions
# share of tokens with capitals that a vocabulary of lower-cased texts may have; it needs none
MOST_CAPITALS = 0.01
MAX_ALPHABET = 1000  # characters of a vocabulary trained here; rarer ones become [UNK]

_PUNCTUATION = re.compile(r'[.!"()*#:;~]')


def clean_caption(text: str, max_words: int = 30) -> str:
    """The published pre-processing of captions: lower case, `.!"()*#:;~` become spaces, runs of white space
    fold into one space, at most `max_words` words (BLIP, pre-training: 30)."""
    text = re.sub(r"\s{2,}", " ", _PUNCTUATION.sub(" ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """The published pre-processing of questions: lower case, `.!"()*#:;~` removed, at most `max_words`
    words."""
    return " ".join(_PUNCTUATION.sub("", text.lower()).rstrip(" ").split(" ")[:max_words])


class Tokenizer:
    """Texts to token ids and back, the same ids and strings as transformers' BertTokenizer.

    A text becomes `first, word pieces…, [SEP]`; `first` chooses the mode of the text stack: `[CLS]` unimodal,
    `[ENC]` image-grounded encoder, `[DEC]` decoder.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Tokens in the order of their ids. `[DEC]` and `[ENC]` are appended where missing.

        Raises ValueError where one of BERT's special tokens is missing or a token occurs twice.
        """
        vocabulary = [*vocabulary, *(token for token in BLIP_TOKENS if token not in vocabulary)]
        ids = {token: i for i, token in enumerate(vocabulary)}
        if len(ids) != len(vocabulary):
            twice = next(token for i, token in enumerate(vocabulary) if ids[token] != i)
            raise ValueError(f"the vocabulary holds {twice!r} twice: each token needs an id of its own")
        if missing := [token for token in BERT_TOKENS if token not in ids]:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}: is it a BERT WordPiece vocabulary?")
        self._tokenizer = _word_piece(models.WordPiece(ids, unk_token="[UNK]"))
        self._tokenizer.add_special_tokens([*BERT_TOKENS, *BLIP_TOKENS])
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (ids[token] for token in BERT_TOKENS[:4])
        self.bos_id, self.enc_id = (ids[token] for token in BLIP_TOKENS)
        self.vocab_size = len(ids)

    @classmethod
    def from_vocab_file(cls, path: str | Path) -> Tokenizer:
        """Read `vocab.txt`: one token per line, in the order of the ids.

        Raises ValueError as the constructor, and where the vocabulary is a cased one.
        """
        # Split at line feeds only: the vocabulary may hold tokens that Python's splitlines takes for line
        # ends.
        vocabulary = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        capitals = [token for token in vocabulary if token != token.lower() and not token.startswith("[")]
        if len(capitals) > MOST_CAPITALS * len(vocabulary):
            raise ValueError(f"{path} is a cased vocabulary (it holds {capitals[0]!r}), and texts are "
                             "lower-cased here: take the uncased model of its kind")
        return cls(vocabulary)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Tokenizer:
        """Read a `vocab.txt` or `tokenizer.json`, or that of a directory or of a model on the Hub
        (`Salesforce/…`).

        Raises FileNotFoundError where there is neither, or the Hub cannot be reached; ValueError where the
        tokenizer is not a lower-casing WordPiece.
        """
        path = Path(source)
        if path.is_file():
            return cls._from_json_file(path) if path.suffix == ".json" else cls.from_vocab_file(path)
        for name, read in (("tokenizer.json", cls._from_json_file), ("vocab.txt", cls.from_vocab_file)):
            file = path / name if path.is_dir() else _download(str(source), name)
            if file is not None and file.is_file():
                return read(file)
        raise FileNotFoundError(f"{source} holds neither tokenizer.json nor vocab.txt: pass a checkpoint "
                                "with either")

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a WordPiece vocabulary of at most `vocab_size` tokens, `[DEC]` and `[ENC]` included.

        The same captions give the same vocabulary. Raises ValueError where not even the characters fit.
        """
        learner = _word_piece(models.WordPiece(unk_token="[UNK]"))
        normalised = [learner.normalizer.normalize_str(caption) for caption in captions]
        counts = Counter(char for text in normalised for char in text if not char.isspace())
        alphabet = sorted(counts, key=lambda char: (-counts[char], char))[:MAX_ALPHABET]
        # The trainer numbers characters in the order of a hash table and breaks ties by number: number them
        # here.
        first_tokens = [*BERT_TOKENS, *alphabet, *(f"##{char}" for char in alphabet)]
        if vocab_size < len(first_tokens) + len(BLIP_TOKENS):
            least = len(first_tokens) + len(BLIP_TOKENS)
            raise ValueError(f"vocab_size is {vocab_size}: the characters of these captions alone need "
                             f"{least}")
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size - len(BLIP_TOKENS), special_tokens=first_tokens, show_progress=False
        )
        kept = set(alphabet)
        texts = ("".join(char if char in kept else " " for char in text) for text in normalised)
        learner.train_from_iterator(texts, trainer)
        vocabulary = learner.get_vocab()
        return cls(sorted(vocabulary, key=vocabulary.__getitem__))

    @classmethod
    def _from_json_file(cls, path: str | Path) -> Tokenizer:
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            kind, lower = stored["model"].get("type"), (stored.get("normalizer") or {}).get("lowercase")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is not what the tokenizers library writes: fetch it again") from None
        if kind != "WordPiece" or not lower:
            raise ValueError(
                f"{path} is a {kind} tokenizer, lower-casing {bool(lower)}: BLIP needs lower-casing WordPiece"
            )
        vocabulary = {**stored["model"]["vocab"],
                      **{t["content"]: t["id"] for t in stored.get("added_tokens", [])}}
        return cls(sorted(vocabulary, key=vocabulary.__getitem__))

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, `vocab.txt` and the `tokenizer_config.json` that transformers needs."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / "tokenizer.json"))
        tokens = (self._tokenizer.id_to_token(i) for i in range(self.vocab_size))
        (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": MAX_TEXT_TOKENS,
            "bos_token": "[DEC]",
            "extra_special_tokens": {"enc_token": "[ENC]"},
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n",
                                                         encoding="utf-8")

    def encode(self, text: str, first: str = "[CLS]", max_tokens: int | None = None) -> list[int]:
        """Ids of `first`, the text's pieces and `[SEP]`: at most `max_tokens` of them, `[SEP]` kept."""
        return self._encode_all([text], first, max_tokens)[0]

    def pack(self, texts: Sequence[str], first: str = "[CLS]", max_tokens: int | None = None) -> PackedTexts:
        """`encode` for many texts at once, packed."""
        return PackedTexts.from_lists(self._encode_all(texts, first, max_tokens))

    def words(self, text: str, max_tokens: int | None = None) -> list[tuple[str, range]]:
        """Each word, or mark of punctuation, as it stands in the text, and the places of its pieces among
        `encode`'s ids."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        pieces = len(encoding.ids) if max_tokens is None else min(len(encoding.ids), max_tokens - 2)
        groups = [list(group) for _, group in groupby(range(pieces), encoding.word_ids.__getitem__)]
        return [(text[encoding.offsets[group[0]][0] : encoding.offsets[group[-1]][1]],
                 range(group[0] + 1, group[-1] + 2)) for group in groups]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens skipped, word pieces joined, no space before punctuation."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode_all(self, texts: Sequence[str], first: str, max_tokens: int | None) -> list[list[int]]:
        first_ids = {"[CLS]": self.cls_id, "[ENC]": self.enc_id, "[DEC]": self.bos_id}
        if first not in first_ids:
            raise ValueError(f"first token {first!r} is none of {', '.join(first_ids)}")
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"max_tokens is {max_tokens}: the first token and [SEP] alone need 2")
        pieces = None if max_tokens is None else max_tokens - 2
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[first_ids[first], *encoding.ids[:pieces], self.sep_id] for encoding in encodings]


def _download(model: str, name: str) -> Path | None:
    """A file of a model on the Hub, from the cache if it is there; None if the model has no file of that
    name."""
    try:
        return Path(huggingface_hub.hf_hub_download(model, name))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"{model}: no such file or directory, and the Hub, which may have a model of "
                                "that name, cannot be reached") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(f"{model}: no such file or directory, and no public model of that name on "
                                "the Hub") from None


def _word_piece(model: models.WordPiece) -> tokenizers.Tokenizer:
    """bert-base-uncased's pipeline around a WordPiece model."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(  # pyright: ignore[reportAttributeAccessIssue]
        clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer
