"""What a run needs of each GPU, before one is rented: memory, bytes sent, and
the speed that a roofline allows.

`--dry-run` prints it, `docs/scaling.md` explains it, and `tests/train/engine/test_scaling.py`
compares memory and traffic with what two and four ranks really allocate and send. Units: bytes,
seconds, FLOPs; all of one rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens
from blip_train.engine.engine import KEPT_WHOLE, REDUCE_BUCKET
from blip_train.forecast.gpus import Gpu
from blip_train.forecast.step_costs import BYTES, FLOAT32, BatchSizes, Work, step_work, vision_work
from blip_train.prepare import prepare_model, prepare_tokenizer
from blip_train.recipe import Recipe
from blip_train.steps.pretraining import Pretraining

CAPTION_TOKENS = 14.0  # mean of web and COCO captions, [CLS] and [SEP] included
# DeepSpeed's defaults, in elements, which the engine does not change.
PREFETCH = 50_000_000  # weights that ZeRO 3 gathers ahead, and copies out of what arrives
REUSE_DISTANCE = 1_000_000_000  # ZeRO 3 keeps a gathered weight that is read again within this many elements
# Assumptions, not measurements: the shares of the data sheet's rates that are reached, …
PRODUCTS, MEMORY, LINKS = 0.5, 0.75, 0.75
# … and how often each saved byte passes the memory outside the products. With one kernel per operation a
# vision block's forward moves 104 bytes per element of width and keeps 24; the backward moves twice as much
# as the forward, and 28 for what it recomputes.
MOVED_FORWARD, MOVED = 104 / 24, 340 / 24
PUBLISHED_PAIRS_PER_SECOND = 29  # per GPU: 32 A100s, 14 M pairs × 20 epochs in 3–4 days (BLIP section 4.1)


@dataclass(frozen=True)
class Plan:
    """A recipe on `ranks` GPUs at a ZeRO stage, with captions of `caption_tokens` on average.

    `pretraining` is the recipe's model with its momentum copy on the meta device (`meta_pretraining`).
    """

    recipe: Recipe
    pretraining: Pretraining
    ranks: int
    stage: int
    caption_tokens: float = CAPTION_TOKENS
    kept_whole: int = KEPT_WHOLE
    reduce_bucket: int = REDUCE_BUCKET
    prefetch: int = PREFETCH
    reuse_distance: int = REUSE_DISTANCE

    @property
    def trained(self) -> list[int]:
        """Elements of each trained parameter."""
        return [p.numel() for p in self.pretraining.parameters() if p.requires_grad]

    @property
    def momentum(self) -> list[int]:
        return [p.numel() for p in self.pretraining.parameters() if not p.requires_grad]

    @property
    def fetched(self) -> float:
        """Images (and as many texts) that a batch's negatives fetch from other
        ranks, if all are equally likely."""
        pairs, objective = self.recipe.runtime.batch_size, self.recipe.objective
        if self.ranks == 1 or objective.negatives == "local" or "itm" not in objective.losses:
            return 0.0
        missed = (1 - 1 / (self.ranks * pairs - 1)) ** pairs
        return (self.ranks - 1) * pairs * (1 - missed)

    @property
    def precision(self) -> str:
        """The recipe's. `auto` means bfloat16, which every GPU in `GPUS` multiplies."""
        named = self.recipe.runtime.precision
        return "bfloat16" if named == "auto" else named

    @property
    def batch(self) -> BatchSizes:
        pairs = self.recipe.runtime.batch_size
        return BatchSizes(pairs, pairs * self.caption_tokens, BYTES[self.precision], self.fetched)

    @property
    def work(self) -> Work:
        """One batch's work, recomputed blocks included."""
        return step_work(self.pretraining.model.config, self.recipe.objective, self.batch,
                         self.recipe.runtime.recomputed_blocks)


def meta_pretraining(recipe: Recipe) -> Pretraining:
    """The recipe's model, momentum copy and queue on the meta device.

    No data is read, so the vocabulary has `tokenizer.vocab_size` words if the run would train it, and
    `model.text.vocab_size` if a tokenizer is named. `init` is read for its sizes.
    """
    with torch.device("meta"):
        return Pretraining(BlipModel(_config(recipe)), recipe.objective, recipe.seed)


def _config(recipe: Recipe) -> BlipConfig:
    if recipe.init is not None:
        return prepare_model(recipe, prepare_tokenizer(recipe, [])).config
    if recipe.tokenizer.source is not None:
        return recipe.model
    text = dataclasses.replace(recipe.model.text, vocab_size=recipe.tokenizer.vocab_size)
    return dataclasses.replace(recipe.model, text=text, tokens=SpecialTokens(0, 1, 2, 3, 4))


def memory(plan: Plan) -> dict[str, float]:
    """Bytes by what they hold. Their sum estimates the step's peak. It lies early in the backward, when the
    first gradients are exchanged; later, activations are freed while gradients are added."""
    trained, momentum, ranks, runtime = plan.trained, plan.momentum, plan.ranks, plan.recipe.runtime
    whole, shard = sum(trained), _updated(plan)
    # ZeRO 1 and 2 update a second copy of the rank's part, ZeRO 3 its shard.
    weights = {0: whole, 1: ranks * shard + shard, 2: ranks * shard + shard, 3: shard}[plan.stage]
    gradients = whole if plan.stage == 0 else plan.reduce_bucket + shard
    if plan.stage == 3:  # another copy for the update
        gradients += shard
    if runtime.offload and plan.stage == 3:  # the updated weights and their gradients are in host memory
        gradients -= shard
    elif runtime.offload:  # ZeRO 1 and 2 send gradients to the host through a buffer as large as the largest
        weights, gradients = weights - shard, gradients - shard + max(trained)
    if runtime.accumulation > 1:  # gradients of earlier batches: all, or the rank's part
        gradients += {0: 0, 1: whole, 2: shard, 3: 0}[plan.stage]
    parts = {
        "weights": FLOAT32 * weights,
        "gradients": FLOAT32 * gradients,
        "optimiser": 0.0 if runtime.offload else 2 * FLOAT32 * shard,
        "momentum": FLOAT32 * (_shards(momentum, ranks) if plan.stage == 3 else sum(momentum)),
        "queue": sum(buffer.nbytes for buffer in plan.pretraining.buffers()),
        "activations": plan.work.saved,
    }
    if plan.stage == 3:
        # The bucket, copied in the order of the ranks.
        parts["exchange"] = FLOAT32 * min(plan.reduce_bucket, whole)
        parts["gathered weights"] = FLOAT32 * (gathered(plan)[1] + min(plan.prefetch, whole + sum(momentum)))
    return parts


def host_memory(plan: Plan) -> float:
    """Bytes in host memory with `runtime.offload`: the updated weights, their gradients and two moments, and
    with ZeRO 1 and 2 buffers for transfers in both directions."""
    if not plan.recipe.runtime.offload:
        return 0.0
    return FLOAT32 * (4 * _updated(plan) + (_updated(plan) + max(plan.trained)) * (plan.stage < 3))


def _updated(plan: Plan) -> int:
    """Elements that this rank updates. ZeRO 1 and 2 pad the whole to a multiple of two per rank."""
    whole = sum(plan.trained)
    part = -(-whole // (2 * plan.ranks)) * 2
    return {0: whole, 1: part, 2: part, 3: _shards(plan.trained, plan.ranks)}[plan.stage]


def traffic(plan: Plan) -> dict[str, float]:
    """Bytes that one rank sends in an optimiser step, by content, if collectives are rings: all-reduce
    sends 2 (N − 1) / N of its tensor, all-gather and reduce-scatter (N − 1) / N of the whole,
    all-to-all what others get."""
    trained, ranks, runtime = plan.trained, plan.ranks, plan.recipe.runtime
    ring, batches, pairs = (ranks - 1) / ranks, runtime.accumulation, runtime.batch_size
    whole, padded = FLOAT32 * sum(trained), FLOAT32 * ranks * _shards(trained, ranks)
    kept = FLOAT32 * sum(n for n in trained if n <= plan.kept_whole)
    reduced = {0: 2 * whole, 1: 2 * whole, 2: 2 * whole * batches, 3: padded * batches}[plan.stage]
    parts = {"gradients": reduced * ring, "weights": 0.0, "features": 0.0, "negatives": 0.0}
    if plan.stage in (1, 2):
        parts["weights"] = whole * ring
    elif plan.stage == 3:  # small weights are gathered once more after the update
        parts["weights"] = (FLOAT32 * gathered(plan)[0] * batches + kept) * ring
    if "itc" in plan.recipe.objective.losses:
        config = plan.pretraining.model.config
        features = pairs * (2 * FLOAT32 * config.embed_dim + 8)  # both modalities, and ids
        copies = 2 if plan.fetched else 1  # for the queue, and for drawing negatives
        parts["features"] = batches * copies * (ranks - 1) * features
        parts["negatives"] = batches * exchange_bytes(plan, plan.fetched)
    return parts


def exchange_bytes(plan: Plan, fetched: float) -> float:
    """Bytes that a rank sends if each rank fetches `fetched` images, and as many texts, for a batch: visual
    tokens and later their gradients, token ids and lengths, and the row numbers that it asks for."""
    vision = plan.pretraining.model.config.vision
    return fetched * (2 * FLOAT32 * vision.tokens * vision.width + 8 * (plan.caption_tokens + 3))


def gathered(plan: Plan) -> tuple[float, float]:
    """ZeRO 3: elements gathered for one batch, and the most that are present at a time.

    DeepSpeed's rule, module by module in the order of forward and backward: a weight that is not present is
    gathered. It is released after its module has run, unless a module reads it again before `reuse_distance`
    elements have been read. Small weights (`kept_whole`) stay.
    """
    own = {name: [(id(p), p.numel()) for p in module.parameters(recurse=False)]
           for name, module in plan.pretraining.named_modules()}
    trace = [own[name] for name in _modules_in_order(plan, [name for name, weights in own.items()
                                                            if weights])]
    there = {key for weights in own.values() for key, n in weights if n <= plan.kept_whole}
    total = float(sum(n for weights in own.values() for key, n in weights if key in there))
    here, most = total, total
    staying = frozenset(there)
    for step, weights in enumerate(trace):
        for key, n in weights:
            if key not in there:
                there.add(key)
                total, here = total + n, here + n
        most = max(most, here)
        leaving = {key: n for key, n in weights if key not in staying}
        distance = 0
        for later in trace[step + 1 :]:
            if distance >= plan.reuse_distance or not leaving:
                break
            for key, n in later:
                leaving.pop(key, None)
                distance += n
        there -= leaving.keys()
        here -= sum(leaving.values())
    return total, most


def _modules_in_order(plan: Plan, names: list[str]) -> list[str]:
    """Modules that own weights, in the order in which a batch runs them: forward, then backward."""
    losses = plan.recipe.objective.losses

    def starting(prefix: str, *without: str) -> list[str]:
        return [name for name in names if name.startswith(prefix)
                and not any(part in name for part in without)]

    forward, copy = starting("model.vision", "projection"), []
    if "itc" in losses:
        forward += starting("model.vision_projection")
        forward += starting("model.text", "cross_attention", "self_attention.decoder", "image_to_kv")
        copy = starting("momentum.")
    second = starting("model.text", "projection", *([] if "itm" in losses else ["self_attention.encoder"]))
    second += starting("model.itm_head") * ("itm" in losses)
    if "lm" in losses:
        second += starting("model.lm_head") + [name for name in starting("model.text")
                                               if name.endswith("word_embeds")]
    return forward + copy + second + (forward + second)[::-1]


def _shards(numels: list[int], ranks: int) -> int:
    """Elements that one rank holds when ZeRO 3 cuts each parameter into equal parts."""
    return sum(-(-n // ranks) for n in numels)


@dataclass(frozen=True)
class Forecast:
    """Pairs/s of one GPU, and an optimiser step's seconds.

    `bound`: pairs/s if all rates were reached and overlapped. `expected`: pairs/s with the
    assumed shares of the rates, nothing overlapping. `products`, `memory`, `communication`: the
    seconds of each under these assumptions.
    """

    bound: float
    expected: float
    products: float
    memory: float
    communication: float


def forecast(plan: Plan, gpu: Gpu) -> Forecast:
    """The roofline of a plan on a GPU. Nothing in it is measured, and input is assumed to keep up."""
    runtime, config, work = plan.recipe.runtime, plan.pretraining.model.config, plan.work
    batches, trained, momentum = runtime.accumulation, sum(plan.trained), sum(plan.momentum)
    copies = vision_work(config, plan.batch).saved if momentum else 0.0
    # AdamW reads four numbers and writes three per weight of the rank's part, EMA two and one. Gradients are
    # written, copied into the bucket and read. Casts read 4 and write 2 bytes.
    update = (28 * trained / (1 if plan.stage == 0 else plan.ranks) + 16 * trained
              + 12 * momentum / (plan.ranks if plan.stage == 3 else 1) + 6 * (trained + momentum))
    seconds = (batches * (work.forward + work.backward) / gpu.peak(plan.precision),
               (batches * (MOVED * work.saved + MOVED_FORWARD * copies) + update) / gpu.bandwidth,
               sum(traffic(plan).values()) / gpu.link(plan.ranks))
    shares = tuple(s / share for s, share in zip(seconds, (PRODUCTS, MEMORY, LINKS), strict=True))
    pairs = batches * runtime.batch_size
    return Forecast(pairs / max(seconds), pairs / sum(shares), *shares)


def assumptions(plan: Plan) -> list[str]:
    """The assumptions behind a plan's figures, one sentence each."""
    offload = ["the update in host memory (runtime.offload) is not in the speed"] * plan.recipe.runtime.offload
    return [
        f"captions of {plan.caption_tokens:g} tokens on average, a vocabulary of "
        f"{plan.pretraining.model.config.text.vocab_size:,} words",
        f"matrix products reach {PRODUCTS:.0%} of the data sheet's dense peak, everything else {MEMORY:.0%} "
        f"of the memory's bandwidth (saved bytes pass it {MOVED:.1f} times), collectives {LINKS:.0%} of a "
        "link: NVLink within 8 GPUs, 25 GB/s a GPU (A100) or 50 (H100, H200, B200) beyond",
        "communication does not overlap with the backward; the input keeps up; nothing of the speed is "
        "measured",
        "memory comes without CUDA's context, fragmentation and workspaces: leave 10 % free",
        f"the published code: {PUBLISHED_PAIRS_PER_SECOND} pairs/s a GPU (32 A100s, 14 M pairs × 20 epochs, "
        "3–4 days)",
        *offload,
    ]
