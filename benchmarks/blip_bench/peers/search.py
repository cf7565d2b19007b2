"""Greedy and beam search over a peer's steps, as in transformers' `generate` while no caption can end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from blip_bench.models import TOKENS
from blip_bench.peers.modules import Peer, Step


def captions(peer: Peer, prompt: Tensor, end: int, beams: int, pixels: Tensor) -> list[list[int]]:
    """From pixels to captions of `TOKENS` tokens; the other arguments are those of `search`."""
    if peer.begin is None:
        raise ValueError("this peer was built without captions: build it with captions=True")
    with one_torch_thread() if peer.own_threads else nullcontext():
        return search(peer.begin(peer.encode(pixels)), prompt, end, len(pixels), beams, TOKENS)


@torch.inference_mode()
def search(step: Step, prompt: Tensor, end: int, images: int, beams: int, length: int) -> list[list[int]]:
    """The best caption of each image, with `length` tokens including the prompt's.

    Args:
        prompt: int64 [tokens], the beginning of every caption.
        end: the token that must not be chosen.
    """
    texts = prompt.repeat(images, 1)
    logits = step(texts, 0, torch.arange(images))
    scores = torch.zeros(images, 1)  # of the rows: [images, rows of an image]
    while True:
        order, chosen, scores = _best(logits, scores, end, beams)
        texts = torch.cat([texts[order], chosen[:, None]], 1)
        if texts.shape[1] == length:
            return texts[::beams].tolist()
        logits = step(chosen[:, None], texts.shape[1] - 1, order)


def _best(logits: Tensor, scores: Tensor, end: int, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The row that each beam continues, its next token, and sums of log-probabilities [images, beams]."""
    if beams == 1:
        logits[:, end] = -float("inf")
        return torch.arange(len(logits)), logits.argmax(1), scores
    (images, width), vocabulary = scores.shape, logits.shape[1]
    total = logits.log_softmax(1)
    total[:, end] = -float("inf")
    scores, places = (total + scores.reshape(-1, 1)).reshape(images, -1).topk(beams)
    rows = torch.arange(images)[:, None] * width + places // vocabulary
    return rows.flatten(), (places % vocabulary).flatten(), scores


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For a peer with its own thread pool: torch's workers spin for a while after each product, on cores that
    the pool needs, so torch finds a step's best tokens without them. `OMP_WAIT_POLICY=PASSIVE` would also
    stop the spinning, but for ours as well, whose users have the default policy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
