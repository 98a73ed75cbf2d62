"""Writes easy-VQA (PyPI `easy-vqa` 1.0, MIT): 5,000 drawings of one shape each, 48,248 questions, 13 answers."""

import os
import pathlib
from collections import defaultdict
from collections.abc import Iterator

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_manifest
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.data.write.tokenizer import TEMPLATE_WORDS
from fastvlm_jax.text.tokenizer import train_sentencepiece

IMAGES = {"train": 4000, "test": 1000}
QUESTIONS = {"train": 38_575, "test": 9_673}
COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
VOCAB_SIZE = 512

Talks = dict[int, list[tuple[str, str]]]  # image number -> its (question, answer) pairs


def write_easy_vqa(output: str | os.PathLike, validation_images: int = 200) -> dict[str, int]:
    """Writes the splits `train`, `validation` and `test` and a `tokenizer.model` to the folder `output`.

    A record is one image: its PNG bytes and all of its questions as one conversation. `validation` is every n-th image
    of the published training split, `test` is the published test split. The tokenizer is trained on the texts of
    `train` only. The subfolder `captions` is a second data set: the same `train` and `validation` images with captions
    made from their own questions and answers, such as "a blue rectangle". A complete data set is left as it is.

    Args:
      output: local folder.
      validation_images: number of images in `validation`.

    Returns:
      Number of records in each split.

    Raises:
      ValueError: the package is missing or another version than the published one, or `output` is a file or holds
        another choice of images.
    """
    if not 0 < validation_images < IMAGES["train"]:
        raise ValueError(f"validation_images {validation_images} must be between 1 and {IMAGES['train'] - 1}")
    try:
        import easy_vqa
    except ImportError as error:
        raise ValueError("the package easy-vqa is missing: pip install 'fastvlm_jax[demo]'") from error
    train = _talks("train", *easy_vqa.get_train_questions())
    test = _talks("test", *easy_vqa.get_test_questions())
    train_images, test_images = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    held_out = {i * IMAGES["train"] // validation_images for i in range(validation_images)}
    splits = {
        "train": ("train", [i for i in sorted(train) if i not in held_out], train, train_images),
        "validation": ("train", sorted(held_out), train, train_images),
        "test": ("test", sorted(test), test, test_images),
    }
    output = pathlib.Path(output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: choose a folder")
    present = read_manifest(output)["splits"]
    for split, written in present.items():
        if split not in splits or written["records"] != len(splits[split][1]):
            raise ValueError(
                f"{output} already holds another dataset ({split}: {written['records']} records): choose another folder"
            )
    output.mkdir(parents=True, exist_ok=True)
    if not present or not (output / "tokenizer.model").is_file():
        pairs = [pair for i in splits["train"][1] for pair in train[i]]
        texts = [text for pair in pairs for text in pair] + TEMPLATE_WORDS * len(pairs)
        texts += [caption(train[i]) for i in splits["train"][1]]
        train_sentencepiece(texts, output / "tokenizer.model", VOCAB_SIZE)
    for split, (published, numbers, talks, images) in splits.items():
        write_shards(output, split, _records(published, numbers, talks, images))
        if split != "test":
            captions = {number: caption(talks[number]) for number in numbers}
            described = {number: [("", text)] for number, text in captions.items()}
            write_shards(output / "captions", split, _records(published, numbers, described, images))
    return {split: len(numbers) for split, (_, numbers, _, _) in splits.items()}


def caption(talks: list[tuple[str, str]]) -> str:
    """Returns what the questions and answers about an image say about it: "a blue rectangle", or less if they say less.

        ("what color is the circle?", "red")            a red circle
        ("is there not a teal shape?", "no")            a teal shape
        ("is there a circle?", "no")                    a shape

    Raises:
      ValueError: the answers contradict each other.
    """
    true = set()
    for question, answer in talks:
        words = set(question.rstrip("?").split())
        if answer in ("yes", "no"):
            negated = bool(words & {"not", "no"})
            true |= words & (COLORS | SHAPES) if (answer == "yes") != negated else set()
        else:
            true |= {answer} | words & (COLORS | SHAPES)
    colors, shapes = sorted(true & COLORS), sorted(true & SHAPES)
    if len(colors) > 1 or len(shapes) > 1:
        raise ValueError(f"the answers about one image contradict each other: {colors + shapes}")
    return " ".join(["a", *colors, *(shapes or ["shape"])])


def _talks(split: str, questions: list[str], answers: list[str], numbers: list[int]) -> Talks:
    """Groups a split's questions and answers by image; raises ValueError if there are not as many as published."""
    talks = defaultdict(list)
    for question, answer, number in zip(questions, answers, numbers, strict=True):
        talks[number].append((question, answer))
    if len(questions) != QUESTIONS[split] or sorted(talks) != list(range(IMAGES[split])):
        raise ValueError(
            f"easy-vqa's {split} split has {len(questions)} questions on {len(talks)} images, not "
            f"{QUESTIONS[split]} on {IMAGES[split]}: pip install easy-vqa==1.0"
        )
    return talks


def _records(split: str, numbers: list[int], talks: Talks, images: dict[int, str]) -> Iterator[Record]:
    for number in numbers:
        turns = [turn for pair in talks[number] for turn in (("user", (pair[0],)), ("assistant", (pair[1],)))]
        turns[0] = ("user", (0, *filter(None, turns[0][1])))  # a caption has no question, only the image
        yield Record(f"{split}/{number}", (pathlib.Path(images[number]).read_bytes(),), tuple(turns))
