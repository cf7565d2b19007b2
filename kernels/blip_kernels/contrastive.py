"""The contrastive loss with soft targets, streamed over the keys: ITC of BLIP (section 3.2, "Pre-training").

    s = queries keysᵀ / τ,   s_m = momentum_queries keysᵀ / τ,   keys = batch ∪ queue
    target = α · softmax(s_m) + (1 − α) · positives          (no gradient flows through the target)
    loss = −Σ target · log softmax(s)
         = w · lse(s) − α · Σ softmax(s_m) · s − (1 − α) · mean of s over the row's positive keys

with w = Σ target: 1, or α for a row without any positive key. Only three sums per row are needed, and all of
them can be updated while keys stream by (log-sum-exps with a running maximum), so nothing of size rows × keys
is ever stored. With g the gradient of a row's loss:

    ds = g · (w · softmax(s) − α · softmax(s_m) − (1 − α) · positives / count)
    d queries = ds keys / τ,   d keys = dsᵀ queries / τ,   dτ = −Σ queries · d queries / τ

Besides inputs and gradients the op needs memory for a few numbers per row, and for one slice of logits
(`SLICE_ELEMENTS`) or, on a GPU, at most one partial gradient tile per multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blip_kernels.constants import NO_ID
from blip_kernels.features import check_features, check_ids, check_own_keys, feature_backend

SLICE_ELEMENTS = 1 << 19  # logits in one slice of the eager twin: 2 MiB in float32


def _slices(rows: int, batch_keys: Tensor, queue_keys: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yield (keys in float32 or wider, their place in batch ∪ queue), as many as fit a slice."""
    step = max(SLICE_ELEMENTS // max(rows, 1), 16)
    wide = torch.promote_types(batch_keys.dtype, torch.float32)
    for keys, start in ((batch_keys, 0), (queue_keys, len(batch_keys))):
        for first in range(0, len(keys), step):
            part = keys[first : first + step].to(wide)
            yield part, slice(start + first, start + first + len(part))


def _equal(ids: Tensor, item_ids: Tensor) -> Tensor:
    return (ids[:, None] == item_ids[None, :]) & (ids != NO_ID)[:, None]


def _forward_reference(q: Tensor, q_m: Tensor, batch_keys: Tensor, queue_keys: Tensor, temperature: Tensor,
                       alpha: float, ids: Tensor | None, item_ids: Tensor | None,
                       first_own: int) -> tuple[Tensor, Tensor]:
    """Return losses [rows] and statistics [3, rows]: log-sum-exp of s, that of s_m, number of positives."""
    wide, rows = torch.promote_types(q.dtype, torch.float32), len(q)
    q, q_m = (x.to(wide) / temperature.to(wide) for x in (q, q_m))
    tops, sums = q.new_full((2, rows), float("-inf")), q.new_zeros(2, rows)
    mixed, positive, count = q.new_zeros(3, rows)
    for keys, place in _slices(rows, batch_keys, queue_keys):
        logits = torch.stack([q, q_m]) @ keys.T
        if ids is not None and item_ids is not None:
            equal = _equal(ids, item_ids[place])
            count += equal.sum(1)
            positive += logits[0].masked_fill(~equal, 0.0).sum(1)
        new_tops = torch.maximum(tops, logits.amax(2))
        shrink = (tops - new_tops).exp_()
        weights_m = (logits[1] - new_tops[1, :, None]).exp_()
        mixed = mixed * shrink[1] + torch.linalg.vecdot(weights_m, logits[0])
        weights = logits[0].sub_(new_tops[0, :, None]).exp_()
        sums = sums * shrink + torch.stack([weights.sum(1), weights_m.sum(1)])
        tops = new_tops
    if ids is None:
        count = torch.ones_like(count)
        positive = torch.linalg.vecdot(q, batch_keys[first_own : first_own + rows].to(wide))
    lse = tops + sums.log()
    weight = torch.where(count > 0, 1.0, alpha)
    loss = weight * lse[0] - alpha * mixed / sums[1] - (1.0 - alpha) * positive / count.clamp(min=1)
    return loss, torch.stack([*lse, count])


def _backward_reference(grad: Tensor, stats: Tensor, q: Tensor, q_m: Tensor, batch_keys: Tensor,
                        queue_keys: Tensor, temperature: Tensor, alpha: float, ids: Tensor | None,
                        item_ids: Tensor | None, first_own: int,
                        need_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, temperature [1] and the batch's keys ([0, width] without `need_keys`)."""
    wide, rows = torch.promote_types(q.dtype, torch.float32), len(q)
    grad, tau = grad.to(wide), temperature.to(wide).reshape(1)
    scaled, scaled_m = q.to(wide) / tau, q_m.to(wide) / tau
    lse, lse_m, count = stats
    weight = grad * torch.where(count > 0, 1.0, alpha)
    share = grad * (1.0 - alpha) / count.clamp(min=1)
    d_q = torch.zeros_like(scaled)
    d_keys = torch.zeros_like(batch_keys, dtype=wide) if need_keys else batch_keys.new_zeros(0, q.shape[1])
    for keys, place in _slices(rows, batch_keys, queue_keys):
        d_logits = (scaled @ keys.T).sub_(lse[:, None]).exp_().mul_(weight[:, None])
        soft = (scaled_m @ keys.T).sub_(lse_m[:, None]).exp_().mul_((alpha * grad)[:, None])
        d_logits -= soft
        if ids is not None and item_ids is not None:
            d_logits -= _equal(ids, item_ids[place]) * share[:, None]
        d_q.addmm_(d_logits, keys)
        if need_keys and place.start < len(batch_keys):
            d_keys[place] = d_logits.T @ scaled
    if ids is None:
        own = slice(first_own, first_own + rows)
        d_q -= share[:, None] * batch_keys[own].to(wide)
        if need_keys:
            d_keys[own] -= share[:, None] * scaled
    d_q /= tau
    d_temperature = -torch.linalg.vecdot(scaled, d_q).sum().reshape(1)
    return d_q.to(q.dtype), d_temperature, d_keys.to(batch_keys.dtype)


@torch.library.custom_op("blip_kernels::contrastive", mutates_args=())
def _contrastive(q: Tensor, q_m: Tensor, batch_keys: Tensor, queue_keys: Tensor, temperature: Tensor,
                 alpha: float, ids: Tensor | None, item_ids: Tensor | None, first_own: int,
                 backend: str) -> tuple[Tensor, Tensor]:
    inputs = (q, q_m, batch_keys, queue_keys, temperature, alpha, ids, item_ids, first_own)
    if backend == "triton":
        from blip_kernels.gpu.contrastive_kernels import forward

        return forward(*inputs)
    with torch.autocast(q.device.type, enabled=False):
        return _forward_reference(*inputs)


@_contrastive.register_fake
def _(q, q_m, batch_keys, queue_keys, temperature, alpha, ids, item_ids, first_own, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[0], dtype=wide), q.new_empty(3, q.shape[0], dtype=wide)


@torch.library.custom_op("blip_kernels::contrastive_backward", mutates_args=())
def _contrastive_backward(grad: Tensor, stats: Tensor, q: Tensor, q_m: Tensor, batch_keys: Tensor,
                          queue_keys: Tensor, temperature: Tensor, alpha: float, ids: Tensor | None,
                          item_ids: Tensor | None, first_own: int, need_keys: bool,
                          backend: str) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (grad, stats, q, q_m, batch_keys, queue_keys, temperature, alpha, ids, item_ids, first_own,
              need_keys)
    if backend == "triton":
        from blip_kernels.gpu.contrastive_kernels import backward

        return backward(*inputs)
    with torch.autocast(q.device.type, enabled=False):
        return _backward_reference(*inputs)


@_contrastive_backward.register_fake
def _(grad, stats, q, q_m, batch_keys, queue_keys, temperature, alpha, ids, item_ids, first_own, need_keys,
      backend):
    keys = torch.empty_like(batch_keys) if need_keys else batch_keys.new_empty(0, q.shape[1])
    return torch.empty_like(q), q.new_empty(1, dtype=stats.dtype), keys


def _setup_context(ctx, inputs, output) -> None:
    q, q_m, batch_keys, queue_keys, temperature, alpha, ids, item_ids, first_own, backend = inputs
    ctx.save_for_backward(output[1], q, q_m, batch_keys, queue_keys, temperature, ids, item_ids)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.alpha, ctx.first_own, ctx.backend = alpha, first_own, backend


def _autograd(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 10
    stats, q, q_m, batch_keys, queue_keys, temperature, ids, item_ids = ctx.saved_tensors
    need_keys = ctx.needs_input_grad[2]
    d_q, d_temperature, d_keys = _contrastive_backward(grad, stats, q, q_m, batch_keys, queue_keys,
                                                       temperature, ctx.alpha, ids, item_ids, ctx.first_own,
                                                       need_keys, ctx.backend)
    d_temperature = d_temperature.to(temperature.dtype).reshape(temperature.shape)
    return d_q, None, d_keys if need_keys else None, None, d_temperature, None, None, None, None, None


_contrastive.register_autograd(_autograd, setup_context=_setup_context)


def contrastive(
    queries: Tensor,
    momentum_queries: Tensor,
    batch_keys: Tensor,
    queue_keys: Tensor | None,
    temperature: Tensor,
    alpha: float,
    *,
    first_own_key: int = 0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One direction of ITC, a loss per row: −Σ target · log softmax(queries keysᵀ / τ).

    Take its mean over the batch.

    Without `ids` positives are pairs: row i belongs to batch key `first_own_key` + i. With `ids` they are all
    keys of the row's id, in batch and queue, with equal shares. Id −100 (an empty queue slot) equals nothing.
    The target of a row without any positive key is only its soft part.

    Gradients flow to `queries`, `temperature` and, if it requires grad, `batch_keys` (gathered features of
    all ranks, as in CLIP, with `first_own_key` = rank × rows); never to `momentum_queries`, `queue_keys` or
    the targets. A NaN in a row makes that row's loss NaN, a NaN in a key every row's. Autocast changes
    nothing: the dtype of the features decides, and statistics and losses are float32.

    Args:
        queries: [rows, width], float32, bfloat16 or float16 (the twin takes float64 as well).
        momentum_queries: [rows, width], the momentum encoder's features of the same rows.
        batch_keys: [keys, width], the other modality's features of this batch, or of all ranks' batches.
        queue_keys: [queued, width], further keys, or None.
        temperature: τ > 0, one element of any floating dtype.
        alpha: share of the soft targets, 0 to 1.
        first_own_key: the batch key of row 0; the keys of the other rows follow. Only without `ids`.
        ids: int64 [rows], or None for pairs.
        key_ids: int64 [keys]; `ids` unless given.
        queue_ids: int64 [queued], needed with `ids` where there is a queue.
        backend: auto, triton or reference (`blip_kernels.backends.op_backend`). The kernels take widths up to
            256; auto takes the twin for wider features.

    Returns:
        [rows], float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names the argument.
    """
    queue_keys = batch_keys[:0].detach() if queue_keys is None else queue_keys
    check_features(queries, temperature, momentum_queries=momentum_queries, batch_keys=batch_keys,
                   queue_keys=queue_keys)
    if momentum_queries.shape != queries.shape:
        raise ValueError(f"momentum_queries must be {tuple(queries.shape)} as queries are, got "
                         f"{tuple(momentum_queries.shape)}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    item_ids = _item_ids(queries, batch_keys, queue_keys, ids, key_ids, queue_ids, first_own_key)
    loss, _ = _contrastive(queries.contiguous(), momentum_queries.detach().contiguous(),
                           batch_keys.contiguous(), queue_keys.detach().contiguous(), temperature,
                           float(alpha), ids, item_ids, first_own_key, feature_backend(queries, backend))
    return loss


def _item_ids(queries: Tensor, batch_keys: Tensor, queue_keys: Tensor, ids: Tensor | None,
              key_ids: Tensor | None, queue_ids: Tensor | None, first_own_key: int) -> Tensor | None:
    """Concatenate the ids of batch and queue (int64, small next to the features); None for pairs."""
    check_own_keys(len(queries), len(batch_keys), first_own_key, paired=ids is None)
    if ids is None:
        if key_ids is not None or queue_ids is not None:
            raise ValueError("key_ids and queue_ids need ids: without them positives are pairs")
        return None
    if len(batch_keys) + len(queue_keys) == 0:
        raise ValueError("batch_keys and queue_keys are both empty: there is nothing to compare with")
    if queue_ids is None and len(queue_keys):
        raise ValueError(f"queue_ids are needed: ids are given, and {len(queue_keys)} queue_keys")
    key_ids = ids if key_ids is None else key_ids
    queue_ids = ids[:0] if queue_ids is None else queue_ids
    check_ids(queries, ids=(ids, len(queries)), key_ids=(key_ids, len(batch_keys)),
              queue_ids=(queue_ids, len(queue_keys)))
    return torch.cat([key_ids, queue_ids])
