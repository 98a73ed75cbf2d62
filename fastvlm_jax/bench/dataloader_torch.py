"""Runs the PyTorch side of `fastvlm bench input`: a DataLoader that processes data as LLaVA does, in its own process.

    python -m fastvlm_jax.bench.dataloader_torch --folder DIR --backend pillow|torchvision --size 1024 --workers 2

DIR holds train.json (in LLaVA's format), images/, tokenizer/ and template.json. Each line on stdin is a number of
seconds to run; the answer is one line of JSON with the number of images and the seconds they took. As in LLaVA, an
image is read with Pillow, padded to a square with the mean colour and passed to CLIPImageProcessor, which makes float32
tensors. A conversation is tokenized as a whole, then again in parts to find the supervised tokens.
"""

import argparse
import json
import pathlib
import sys
import time

from PIL import Image

IMAGE, IGNORE = -200, -100  # LLaVA's ids of an image's place and of an unsupervised token
MARK = "<image>"


class Conversations:
    """Holds the entries of a LLaVA file; each item is a dictionary of tensors."""

    def __init__(self, folder: pathlib.Path, processor, fit: str):
        import transformers

        self.entries = json.loads((folder / "train.json").read_text())
        self.images, self.processor, self.fit = folder / "images", processor, fit
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.template = json.loads((folder / "template.json").read_text())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        import torch

        entry = self.entries[index]
        images = [self.pixels(Image.open(self.images / name).convert("RGB")) for name in entry["images"]]
        tokens, labels = self.text(entry["conversations"])
        return {"images": torch.stack(images), "tokens": tokens, "labels": labels}

    def pixels(self, image: Image.Image):
        """Returns an image as a float32 tensor [3, H, W], padded to a square if `fit` is "pad"."""
        if self.fit == "pad":
            image = expand2square(image, tuple(int(mean * 255) for mean in self.processor.image_mean))
        return self.processor.preprocess(image, return_tensors="pt")["pixel_values"][0]

    def text(self, turns: list[dict[str, str]]) -> tuple:
        """Returns the tokens of a conversation and its labels, which are IGNORE outside the answers."""
        import torch

        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        before, after, system = (self.template[key] for key in ("before", "after", "system"))
        pieces = [(roles[turn["from"]], turn["value"]) for turn in turns]
        if system is not None and pieces[0][0] != "system":
            pieces = [("system", system), *pieces]
        texts = [before[role] + value + after[role] for role, value in pieces]
        tokens = self.tokenize("".join(texts))
        labels, at = list(tokens), 0
        for (role, _), text in zip(pieces, texts, strict=True):
            count = len(self.tokenize(text))
            skipped = len(self.tokenize(before[role])) if role == "assistant" else count
            labels[at : at + skipped] = [IGNORE] * skipped
            at += count
        return torch.tensor(tokens), torch.tensor(labels[: len(tokens)])

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, with IMAGE for each "<image>"."""
        ids = []
        for i, part in enumerate(text.split(MARK)):
            ids += [IMAGE] * (i > 0) + self.tokenizer(part, add_special_tokens=False).input_ids
        return ids


def expand2square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Pads an image on both sides to a square of `color`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def collate(items: list[dict]) -> dict:
    """Joins items to a batch: images are concatenated, tokens and labels padded on the right."""
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "images": torch.cat([item["images"] for item in items]),
        "tokens": pad([item["tokens"] for item in items], batch_first=True),
        "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=IGNORE),
    }


def run(dataset, batch: int, workers: int, seconds: float, join=None) -> dict[str, float]:
    """Runs a DataLoader for `seconds` or a little more, after two batches per worker; returns images and seconds."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 30)
    sampler = BatchSampler(sampler, batch, drop_last=True)
    loader = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=join))
    for _ in range(2 * workers):
        next(loader)
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(workers):
            images += len(next(loader)["images"])
    return {"images": images, "seconds": time.perf_counter() - start}


def register_missing_operators():
    """Defines two operators that a torchvision built for another torch needs when it is imported; nothing calls them.

    Returns:
      The library that holds the operators, which the caller must keep alive, or None if they are not needed.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def serve(dataset, batch: int, workers: int, join=None) -> None:
    """Answers each number of seconds on stdin with a line of JSON, see `run`; `join` makes a batch of items."""
    dataset[0]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(dataset, batch, workers, float(line), join)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--backend", choices=["pillow", "torchvision"], required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--fit", default="pad")
    parser.add_argument("--mean", type=float, nargs=3, default=[0.0, 0.0, 0.0])
    parser.add_argument("--std", type=float, nargs=3, default=[1.0, 1.0, 1.0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, required=True)
    args = parser.parse_args()
    _kept = register_missing_operators()
    import transformers

    kind = transformers.CLIPImageProcessorPil if args.backend == "pillow" else transformers.CLIPImageProcessor
    processor = kind(
        size={"shortest_edge": args.size},
        crop_size={"height": args.size, "width": args.size},
        image_mean=args.mean,
        image_std=args.std,
    )
    serve(Conversations(args.folder, processor, args.fit), args.batch, args.workers, collate)


if __name__ == "__main__":
    main()
