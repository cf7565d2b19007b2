"""Attention by its formula, segment by segment."""

import torch


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def textbook(q, k, v, q_lengths, kv_lengths, causal):
    out, q_at, kv_at = [], 0, 0
    for n, m in zip(q_lengths, kv_lengths, strict=True):
        qs, ks, vs = q[q_at : q_at + n], k[kv_at : kv_at + m], v[kv_at : kv_at + m]
        for i in range(n):
            sees = m - n + i + 1 if causal else m
            rows = []
            for h in range(q.shape[1]):
                if sees <= 0:
                    rows.append(torch.zeros(q.shape[2], dtype=q.dtype))
                    continue
                logits = ks[:sees, h] @ qs[i, h] / q.shape[2] ** 0.5
                rows.append(torch.softmax(logits, 0) @ vs[:sees, h])
            out.append(torch.stack(rows))
        q_at, kv_at = q_at + n, kv_at + m
    return torch.stack(out) if out else q.new_zeros(q.shape)
