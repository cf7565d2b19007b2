"""VQA by ranking: which answer of a list is the likeliest (BLIP section 5.3).

The published algorithm takes the `top_k` answers whose first tokens are the likeliest, repeats the question's
states for each of them, and computes all their tokens, padded to one length. Here the answers share the
question's keys and values, and they share common beginnings: they form a tree of tokens. Each distinct prefix
of the `top_k` answers is one decoder row, and the vocabulary is multiplied once per row, however many tokens
follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from blip_kernels import linear_cross_entropy
from torch import Tensor

from blip_fast.model.blip import BlipModel
from blip_fast.model.image_kv import ImageKV
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream

LABEL_SMOOTHING = 0.1  # as in the published loss, which the published ranking uses too


@dataclass(frozen=True, eq=False)
class AnswerList:
    """Candidate answers as a tree of tokens. A node is a distinct prefix, node 0 is [DEC], parents come
    first.

    `texts` are the answers. `tokens` and `depths`, int64 [nodes]: a prefix's last token, and its number of
    tokens. `prefixes`, int64 [nodes, longest]: the nodes on the path to each node. The node itself is at
    `depths` − 1, and zeros follow. `ends`, int64 [answers]: each answer's node.
    """

    texts: Sequence[str]
    tokens: Tensor
    depths: Tensor
    prefixes: Tensor
    ends: Tensor

    @classmethod
    def of(cls, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> AnswerList:
        """The tree of texts and their token ids, [DEC] to [SEP]. Raises ValueError if there is no text, or
        one has no token."""
        if not answers:
            raise ValueError("there is no answer to choose from: the list of answers is empty")
        for text, answer in zip(texts, answers, strict=True):
            if len(answer) < 3:
                raise ValueError(f"the answer {text!r} has no token: every answer needs a word")
        node_of: dict[tuple[int, int], int] = {}
        tokens, ways, ends = [answers[0][0]], [[0]], []
        for answer in answers:
            node = 0
            for token in answer[1:]:
                child = node_of.setdefault((node, token), len(tokens))
                if child == len(tokens):
                    tokens.append(token)
                    ways.append([*ways[node], child])
                node = child
            ends.append(node)
        longest = max(map(len, ways))
        prefixes = torch.tensor([way + [0] * (longest - len(way)) for way in ways])
        return cls(texts, torch.tensor(tokens), torch.tensor([len(way) for way in ways]), prefixes,
                   torch.tensor(ends))

    def __len__(self) -> int:
        """The number of answers."""
        return len(self.ends)

    def to(self, device: torch.device) -> AnswerList:
        return AnswerList(self.texts,
                          *(x.to(device) for x in (self.tokens, self.depths, self.prefixes, self.ends)))

    def token_ids(self, answer: int) -> list[int]:
        """An answer's token ids, [DEC] to [SEP]."""
        end = self.ends[answer]
        return self.tokens[self.prefixes[end, : self.depths[end]]].tolist()


def rank_answers(model: BlipModel, question_kv: ImageKV, answers: AnswerList,
                 top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest answers of each question.

    Args:
        question_kv: `model.question_kv(…)`.
        answers: on the model's device.
        top_k: how many answers are compared in full (published: 128), or all if there are fewer. They are
            chosen by the probability of their first token; ties go to the answer that comes first in the
            list.

    Returns:
        Places in the list, int64 [questions, top_k], best first, and their scores, float32 [questions,
        top_k]: minus the loss (with label smoothing, as published), summed over an answer's tokens and [SEP].
    """
    chosen = _shortlist(model, question_kv, answers, top_k)
    tree = _Tree.of(answers, chosen)
    hidden = model.stack("decoder").decode_tree(tree.token_ids, tree.paths, tree.depths,
                                                tree.questions, question_kv)
    scores = -_losses(model, hidden, tree)[tree.edges_of_answer].mul(tree.is_edge).sum(dim=2)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order), scores


def _shortlist(model: BlipModel, question_kv: ImageKV, answers: AnswerList, top_k: int) -> Tensor:
    """The answers with the likeliest first tokens, int64 [questions, k]."""
    questions = torch.arange(len(question_kv.offsets) - 1, device=answers.ends.device)
    starts = PackedTexts(answers.tokens[0].repeat(len(questions)), F.pad(questions + 1, (1, 0)).int())
    (hidden,) = model.stack("decoder")([TextStream(starts, "decoder", questions)], question_kv)
    states, weight, bias = model.vocabulary_projection(hidden)
    firsts, which = answers.tokens[answers.prefixes[answers.ends, 1]].unique(return_inverse=True)
    logits = F.linear(states, weight[firsts], bias[firsts])[:, which]
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


@dataclass(frozen=True, eq=False)
class _Tree:
    """Rows and edges of each question's tree. A row is a distinct prefix that has a next token (sorted by
    question); an edge is a distinct prefix with its next token."""

    token_ids: Tensor  # int64 [rows]
    depths: Tensor  # int64 [rows]
    paths: Tensor  # int64 [rows, longest]: the rows on the path to each row
    questions: Tensor  # int64 [rows]
    edge_rows: Tensor  # int64 [edges]: the row that each edge starts from
    edge_tokens: Tensor  # int64 [edges]
    edges_of_answer: Tensor  # int64 [questions, k, longest − 1]
    is_edge: Tensor  # bool, the same shape: false after an answer's end

    @classmethod
    def of(cls, answers: AnswerList, chosen: Tensor) -> _Tree:
        nodes = len(answers.tokens)
        ends = answers.ends[chosen]
        # `question` + node is a number for each node of each question.
        question = torch.arange(len(chosen), device=ends.device) * nodes
        way = question[:, None, None] + answers.prefixes[ends]  # [questions, k, longest]
        is_edge = torch.arange(1, way.shape[2], device=ends.device) < answers.depths[ends][..., None]
        rows = way[..., :-1][is_edge].unique()
        edges, edge_of_token = way[..., 1:][is_edge].unique(return_inverse=True)
        edges_of_answer = torch.zeros(is_edge.shape, dtype=torch.int64, device=ends.device)
        edges_of_answer[is_edge] = edge_of_token
        node, edge_node = rows % nodes, edges % nodes
        before = answers.prefixes[edge_node, answers.depths[edge_node] - 2]
        return cls(answers.tokens[node], answers.depths[node],
                   torch.searchsorted(rows, (rows - node)[:, None] + answers.prefixes[node]), rows // nodes,
                   torch.searchsorted(rows, edges - edge_node + before), answers.tokens[edge_node],
                   edges_of_answer, is_edge)


def _losses(model: BlipModel, hidden: Tensor, tree: _Tree) -> Tensor:
    """Label-smoothed loss of every edge, float32 [edges].

    The loss of token t is C − (1 − ε) · logit[t], with the same C for all edges of a row. So the vocabulary
    is multiplied once per row, for the first of its edges; the losses of the others follow from their own
    logits.
    """
    states, weight, bias = model.vocabulary_projection(hidden)
    edge = torch.arange(len(tree.edge_rows), device=hidden.device)
    first = edge.new_full((len(hidden),), len(edge)).scatter_reduce(0, tree.edge_rows, edge, "amin")
    losses = linear_cross_entropy(states, weight, bias, tree.edge_tokens[first], reduction="none",
                                  label_smoothing=LABEL_SMOOTHING)
    own = weight[tree.edge_tokens].float()
    logits = (states[tree.edge_rows].float() * own).sum(dim=1) + bias[tree.edge_tokens].float()
    return losses[tree.edge_rows] + (1 - LABEL_SMOOTHING) * (logits[first[tree.edge_rows]] - logits)
