"""Defines what a step of stage 0 minimises: how well each image and each text of a batch finds its partner."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from fastvlm_jax.batch import PairBatch, joined, parts_of
from fastvlm_jax.kernels import contrastive, sigmoid_loss
from fastvlm_jax.kernels.contrastive import Teachers
from fastvlm_jax.losses import Loss
from fastvlm_jax.models import clip
from fastvlm_jax.models.clip import CLIP


def pairs(
    model: CLIP,
    *,
    hard: float = 1.0,
    soft: float = 0.0,
    teachers: Sequence[tuple[int, float]] = (),
    block: int = 0,
    ring: bool = False,
    accumulate: int = 1,
    logged: Callable[[jax.Array], jax.Array] = lambda step: jnp.bool_(True),
) -> Loss:
    """Returns the contrastive loss of a batch of pairs: each image and each text is to find its partner among all.

    With several texts an image, the loss is the sum of the losses of the first texts, of the second, and so on, as in
    DataCompDR (arXiv 2311.17049). A model with `sigmoid` has the loss of SigLIP. The factor of the logits is clamped
    behind every update. The loss of held-out pairs is that against the pairs alone, with any weights.

    The report holds, with teachers, "loss_hard" and "loss_soft", the two terms without their weights, and
    "loss_soft_excess", the second minus the least that it can be; "logit_scale"; the shares of images and of texts
    that find their partner, "top1_images" and "top1_texts"; and "equal_captions", the share of captions of which the
    batch holds another copy.

    Args:
      hard: weight of the cross-entropy against the pairs.
      soft: weight of the cross-entropy against the mean of the teachers' probabilities.
      teachers: (width of the features, factor of the logits) of each teacher.
      block, ring: see kernels.contrastive.blocked; they change no result.
      accumulate: number of parts in which held-out pairs are embedded, one after another.
      logged: number of steps before -> whether the step is logged; "loss_soft_excess" and "equal_captions", which take
        time, are NaN in others.
    """
    widths, factors = tuple(w for w, _ in teachers), tuple(float(c) for _, c in teachers)

    def shaped(part: PairBatch, images, texts):
        """Returns embeddings of all images and texts of a part as [G, N, F] and [G, N, S, F]."""
        return images.reshape(*part.texts.shape[:2], -1), texts.reshape(*part.texts.shape[:3], -1)

    def embed(variables, part: PairBatch, rng):
        rngs = {"drop_path": rng} if model.vision_args.get("drop_path") else None
        texts = part.texts.reshape(-1, part.texts.shape[-1])
        found, updated = model.apply(variables, part.images, texts, train=True, mutable=["batch_stats"], rngs=rngs)
        return shaped(part, *found), updated.get("batch_stats", {})

    def taught(batch: PairBatch, text: int) -> Teachers:
        images, texts = batch.teacher_images, batch.teacher_texts[:, :, text]
        return Teachers(*(x.reshape(-1, x.shape[-1]).astype(model.dtype) for x in (images, texts)))

    def terms(params, batch: PairBatch, features, distilled: bool):
        """Returns (loss against the pairs, loss against the teachers or 0, further outputs)."""
        images, texts = features
        images, scale = images.reshape(-1, images.shape[-1]), jnp.exp(params["logit_scale"])
        against_pairs = against_teachers = jnp.zeros((), jnp.float32)
        outputs = {"logit_scale": scale}
        for s in range(texts.shape[2]):
            own = texts[:, :, s].reshape(images.shape)
            if model.sigmoid:
                with jax.named_scope("loss_of_pairs"):
                    against_pairs += sigmoid_loss.blocked(images, own, scale, params["logit_bias"], block, ring)
                continue
            teaching = (taught(batch, s), widths, factors) if distilled else (None, (), ())
            with jax.named_scope("loss_of_pairs"):  # the name in traces
                found = contrastive.blocked(images, own, scale, *teaching, block, ring)
            against_pairs += found.hard
            against_teachers += found.soft
            if s == 0:
                outputs |= dict(zip(("top1_images", "top1_texts"), found.found, strict=True))
        return against_pairs, against_teachers, outputs

    def compare(params, batch: PairBatch, features):
        first, second, outputs = terms(params, batch, features, bool(widths))
        outputs |= {"loss_hard": first, "loss_soft": second} if widths else {}
        return hard * first + soft * second, outputs

    def value(variables, batch: PairBatch, _, rng):
        features, batch_stats = embed(variables, batch, rng)
        loss, outputs = compare(variables["params"], batch, features)
        return loss, (outputs, batch_stats)

    def report(batch: PairBatch, _, outputs, step) -> dict[str, jax.Array]:
        def seldom():
            found = {"equal_captions": equal_share(batch.texts[:, :, 0])}
            if widths:
                least = [contrastive.teacher_entropy(taught(batch, s), widths, factors, block, ring)
                         for s in range(batch.texts.shape[2])]  # fmt: skip
                found["loss_soft_excess"] = outputs["loss_soft"] - sum(least)
            return found

        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(seldom))
        with jax.named_scope("seldom"):
            return {**outputs, **jax.lax.cond(logged(step), seldom, lambda: nothing)}

    def held_out(variables, batch: PairBatch):
        def embed_part(part: PairBatch):
            return shaped(part, *model.apply(variables, part.images, part.texts.reshape(-1, part.texts.shape[-1])))

        features = jax.lax.map(embed_part, jax.tree.map(partial(parts_of, count=accumulate), batch))
        features = jax.tree.map(joined, features)
        return terms(variables["params"], batch, features, False)[0] * size(batch), size(batch)

    def size(batch: PairBatch) -> jax.Array:
        return jnp.int32(batch.texts.shape[0] * batch.texts.shape[1])

    def settle(trainable: dict) -> dict:
        if "logit_scale" not in trainable:
            return trainable
        return {**trainable, "logit_scale": clip.clamped(trainable["logit_scale"])}

    return Loss(size, value, report, held_out, embed, compare, settle)


def equal_share(texts: jax.Array) -> jax.Array:
    """Returns the share of texts, int32 [G, N, T], of which the batch holds another copy: float32 [].

    Such texts are no wrong partners, though the labels say so. They are compared by two sums of 32 bits.
    """
    tokens = texts.reshape(-1, texts.shape[-1]).astype(jnp.uint32)
    factors = jax.random.bits(jax.random.key(0), (2, tokens.shape[1]), jnp.uint32) | 1
    first, second = (jnp.sum((tokens + 1) * factor, axis=1, dtype=jnp.uint32) for factor in factors)
    first, second = jax.lax.sort((first, second), num_keys=2)
    same = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
    none = jnp.zeros(1, bool)
    return jnp.mean(jnp.append(same, none) | jnp.append(none, same), dtype=jnp.float32)
