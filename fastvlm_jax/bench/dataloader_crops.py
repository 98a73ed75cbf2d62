"""Runs the PyTorch side of `fastvlm bench input` for the pairs of stage 0, in its own process.

    python -m fastvlm_jax.bench.dataloader_crops --folder DIR --augment replay|random|none --size 256 --workers 2

DIR holds pictures and pictures.json: [{"name": "0.jpeg", "param_aug": [entry, ...]}, ...]. As in ml-mobileclip's and
open_clip's training, a picture is read with Pillow, cropped and changed by torchvision and becomes a float32 tensor. It
reads no text and no features. dataloader_torch.py says what is answered.
"""

import argparse
import json
import pathlib
import random

from PIL import Image

from fastvlm_jax.bench.dataloader_torch import register_missing_operators, serve
from fastvlm_jax.images.augment import at_side, read_params


class Crops:
    """Holds pictures; each item is a view of one, drawn anew."""

    def __init__(self, args: argparse.Namespace):
        from torchvision import transforms

        self.folder, self.size, self.mean, self.std = args.folder, args.size, args.mean, args.std
        self.entries = json.loads((args.folder / "pictures.json").read_text())
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = {
            "none": transforms.Compose([transforms.Resize(args.size, bicubic), transforms.CenterCrop(args.size)]),
            "random": transforms.Compose(
                [
                    transforms.RandomResizedCrop(args.size, tuple(args.crop_area), interpolation=bicubic),
                    transforms.RandAugment(*args.operations),
                ]
            ),
            "replay": None,
        }[args.augment]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        from torchvision.transforms import functional

        entry = self.entries[index]
        image = Image.open(self.folder / entry["name"]).convert("RGB")
        image = self.transform(image) if self.transform else self.replayed(image, random.choice(entry["param_aug"]))
        return {"images": functional.normalize(functional.to_tensor(image), self.mean, self.std)}

    def replayed(self, image: Image.Image, entry: list) -> Image.Image:
        """Returns the view of a picture that an entry of `param_aug` tells."""
        from torchvision.transforms import InterpolationMode, autoaugment, functional

        crop, changes = read_params(entry)
        crop = (0, 0, image.height, image.width) if crop is None else crop
        image = functional.resized_crop(image, *crop, [self.size] * 2, InterpolationMode.BICUBIC)
        for name, magnitude in at_side(changes, self.size):
            image = autoaugment._apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
        return image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--augment", choices=["none", "random", "replay"], required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--crop_area", type=float, nargs=2, required=True)
    parser.add_argument("--operations", type=int, nargs=2, required=True)
    parser.add_argument("--mean", type=float, nargs=3, required=True)
    parser.add_argument("--std", type=float, nargs=3, required=True)
    args = parser.parse_args()
    _kept = register_missing_operators()
    serve(Crops(args), args.batch, args.workers)


if __name__ == "__main__":
    main()
