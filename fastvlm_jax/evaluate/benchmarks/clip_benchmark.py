"""Scores the two towers of stage 0: zero-shot classification and retrieval, by the rules of CLIP_benchmark.

zero-shot   a picture belongs to the class whose sentences fit it best: "a photo of a dog.", "a drawing of a dog." ...
retrieval   a picture finds its captions among those of all pictures, and a caption its picture among all pictures
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvlm_jax.evaluate import standard_error
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Matching, Protocol, Result, Row, ask
from fastvlm_jax.evaluate.benchmarks import named_pictures
from fastvlm_jax.evaluate.benchmarks.named_pictures import Classes, Named
from fastvlm_jax.evaluate.matching import find, mean_direction

VERSION = "CLIP_benchmark 1.6.2"
RECALLS = (1, 5, 10)


def class_rows(classes: Classes, limit: int | None) -> list[Row]:
    """Returns a row for each picture; all know the classes and the sentences."""
    fields = {"classes": classes.names, "templates": classes.templates}
    return [
        Row(
            picture.id, "", (picture.picture,), (classes.names[picture.name],), {**fields, "class": picture.name},
            {"class": classes.names[picture.name]},
        )
        for picture in evenly(classes.pictures, limit)
    ]  # fmt: skip


def caption_rows(pictures: Sequence[Named], limit: int | None) -> list[Row]:
    """Returns a row for each picture, whose references are its captions."""
    return [Row(picture.id, "", (picture.picture,), picture.name) for picture in evenly(pictures, limit)]


def evenly(items: Sequence, count: int | None) -> Sequence:
    """Returns `count` of the items, as far apart as can be; all if there are no more, or for None."""
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


def class_texts(rows: Sequence[Row]) -> list[str]:
    """Returns all sentences about the first class, then all about the second, and so on."""
    fields = rows[0].fields
    return [template.replace("{c}", name) for name in fields["classes"] for template in fields["templates"]]


def class_results(rows: Sequence[Row], images: np.ndarray, texts: np.ndarray, digests: Sequence[str]) -> list[Result]:
    """Returns the class that each picture found; see Matching."""
    names = rows[0].fields["classes"]
    classes = mean_direction(texts.reshape(len(names), -1, texts.shape[-1]))
    wanted = np.array([row.fields["class"] for row in rows])
    found = find(images, classes, wanted, np.arange(len(names)))
    prompt = f"<image> one of {len(names):,} classes"
    return [
        _result(row, prompt, names[best], rank, digest)
        for row, best, rank, digest in zip(rows, found.best, found.rank.tolist(), digests, strict=True)
    ]


def caption_texts(rows: Sequence[Row]) -> list[str]:
    """Returns the captions of all pictures, those of the first picture first."""
    return [caption for row in rows for caption in row.references]


def caption_results(rows: Sequence[Row], images: np.ndarray, texts: np.ndarray, digests: Sequence[str]) -> list[Result]:
    """Returns what each picture found among the captions, then what each caption found among the pictures."""
    owner = np.repeat(np.arange(len(rows)), [len(row.references) for row in rows])
    captions, pictures = caption_texts(rows), np.arange(len(rows))
    to_texts, to_images = find(images, texts, pictures, owner), find(texts, images, owner, pictures)
    results = []
    for i, (best, rank) in enumerate(zip(to_texts.best, to_texts.rank.tolist(), strict=True)):
        row = dataclasses.replace(rows[i], groups={"query": "picture"})
        results.append(_result(row, f"<image> one of {len(captions):,} captions", captions[best], rank, digests[i]))
    for i, caption, best, rank in zip(owner, captions, to_images.best, to_images.rank.tolist(), strict=True):
        row = dataclasses.replace(
            rows[i], id=f"{rows[i].id}: {caption}", question=caption, references=(rows[i].id,),
            groups={"query": "caption"},
        )  # fmt: skip
        results.append(_result(row, caption, rows[best].id, rank, digests[i]))
    return _numbered(results)


def _result(row: Row, prompt: str, answer: str, rank: int, digest: str) -> Result:
    row = dataclasses.replace(row, fields={**row.fields, "rank": rank})
    return Result(row, prompt, answer, Mark(float(rank == 0), answer), (digest,))


def _numbered(results: list[Result]) -> list[Result]:
    """Returns results whose ids differ, though a picture may have the same caption twice."""
    seen: dict[str, int] = {}
    found = []
    for result in results:
        count = seen[result.row.id] = seen.get(result.row.id, 0) + 1
        if count > 1:
            result = dataclasses.replace(result, row=dataclasses.replace(result.row, id=f"{result.row.id} ({count})"))
        found.append(result)
    return found


def mean_recall(results: Sequence[Result]) -> float:
    """Returns the mean of the recall at 1 of pictures and of captions, in percent; nan if one kind is missing."""
    kinds = [[r.mark.score for r in results if r.row.groups["query"] == kind] for kind in ("picture", "caption")]
    return 50 * sum(math.fsum(scores) / len(scores) if scores else math.nan for scores in kinds)


def class_figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns, in percent, the accuracy of the first five classes and the mean recall of the classes with pictures.

    Both have their standard errors beside them; the latter's takes the pictures of a class for independent.
    """
    found: dict[str, Any] = {"classes": len(results[0].row.fields["classes"])}
    if found["classes"] >= 5:  # else the first five are all
        found |= _recall(results, 5, "top_5")
    by_class: dict[int, list[float]] = {}
    for result in results:
        by_class.setdefault(result.row.fields["class"], []).append(100 * result.mark.score)
    found["mean_per_class_recall"] = math.fsum(np.mean(scores) for scores in by_class.values()) / len(by_class)
    variances = [np.var(scores, ddof=1) / len(scores) for scores in by_class.values() if len(scores) > 1]
    if len(variances) == len(by_class):
        found["mean_per_class_recall_stderr"] = math.sqrt(math.fsum(variances)) / len(by_class)
    return found


def recall_figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns recall at 1, 5 and 10, in percent, of captions and of pictures, with the names of CLIP_benchmark.

    "shared_captions" is the percentage of captions that stand with several pictures, of which each finds one at most.
    """
    pairs = [(r.row.question, r.row.references[0]) for r in results if r.row.groups["query"] == "caption"]
    pictures = collections.Counter(caption for caption, _ in set(pairs))
    shared = sum(pictures[caption] > 1 for caption, _ in pairs)
    found: dict[str, Any] = {"shared_captions": 100 * shared / max(len(pairs), 1)}
    for kind, name in (("caption", "image_retrieval"), ("picture", "text_retrieval")):
        queries = [result for result in results if result.row.groups["query"] == kind]
        for k in RECALLS:
            found |= _recall(queries, k, f"{name}_recall@{k}")
    return found


def _recall(results: Sequence[Result], k: int, name: str) -> dict[str, float | None]:
    """Returns the share of results whose rank is below k, in percent, and its standard error."""
    scores = [100.0 * (result.row.fields["rank"] < k) for result in results]
    error = standard_error.of_mean(scores, standard_error.clusters_of([result.images for result in results]))
    return {name: math.fsum(scores) / len(scores), f"{name}_stderr": error.value}


def zero_shot(split: str | None = None, limit: int | None = None) -> Benchmark:
    """Returns the benchmark of classes; see `retrieval`."""
    return Benchmark(
        name="zero-shot",
        title="zero-shot classification",
        read=lambda folder: class_rows(named_pictures.read_classes(folder, split), limit),
        protocols=(
            Protocol(
                name="clip-benchmark",
                version=VERSION,
                prompt=lambda row: ask(0),
                score=None,
                max_tokens=0,
                rule="the class whose sentences' mean direction is nearest to the picture's embedding",
                figures=class_figures,
                matching=Matching(class_texts, class_results),
            ),
        ),
        metric="accuracy of the first class, %",
        size=0,
        files=(
            "classnames.txt, zeroshot_classification_templates.txt and test/*.tar, as CLIP_benchmark exports them",
            "classnames.txt and test/CLASS/*.jpg, or test-*.parquet with image and label",
            "a folder of shards, as `fastvlm data write` writes it, whose captions are the classes",
        ),
        source="you, or Hugging Face: clip-benchmark/wds_*",
    )


def retrieval(split: str | None = None, limit: int | None = None) -> Benchmark:
    """Returns the benchmark of captions.

    Args:
      split: split to read; by default test, or validation of shards.
      limit: number of pictures, taken evenly from all; None takes all.
    """
    return Benchmark(
        name="retrieval",
        title="retrieval",
        read=lambda folder: caption_rows(named_pictures.read_captions(folder, split), limit),
        protocols=(
            Protocol(
                name="clip-benchmark",
                version=VERSION,
                prompt=lambda row: ask(0),
                score=None,
                max_tokens=0,
                rule="a right one stands first; the score is the mean of pictures' and captions' recall at 1",
                aggregate=mean_recall,
                figures=recall_figures,
                matching=Matching(caption_texts, caption_results),
            ),
        ),
        metric="mean recall at 1, %",
        size=0,
        files=(
            "test/*.tar with a picture and its captions, a line each, as CLIP_benchmark exports them",
            "test-*.parquet with image and caption",
            "a folder of shards, as `fastvlm data write` writes it",
        ),
        source="you, or Hugging Face: clip-benchmark/wds_*",
    )


BENCHMARKS = (zero_shot(), retrieval())
