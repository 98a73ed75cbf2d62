"""Lists the programs of docs/preflight.md: see table.py."""

from typing import NamedTuple

KERNELS = "--config.model.vision.kernels"
PLAIN = f"{KERNELS}=none"


class Case(NamedTuple):
    """Describes one compilation.

    Attributes:
      table: key in TITLES of the table that shows it.
      config: config file and size.
      topology: slice to compile for.
      more: further flags of `fastvlm preflight`.
    """

    table: str
    config: str
    topology: str
    more: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        return self.config.rpartition(":")[2]

    @property
    def plain(self) -> bool:
        """Returns whether the program has no kernels of the encoder."""
        return PLAIN in self.more

    @property
    def name(self) -> str:
        words = [self.table, self.config.replace("/", "-"), self.topology.replace(":", "-")]
        for flag in self.more:
            name, _, value = flag.partition("=")
            if name in ("--config.mesh", "--rows", KERNELS):
                words.append(value.replace(",", "x"))
        return "_".join(words).replace("configs-", "").replace(".py:", "-")


def _batch(groups: int, images: int, length: int) -> tuple[str, ...]:
    return (
        f"--config.data.groups={groups}", f"--config.data.images_per_group={images}",
        f"--config.data.row_length={length}",
    )  # fmt: skip


STAGE2, STAGE1 = "configs/stage2_instruct.py", "configs/stage1_align.py"
STAGE15, STAGE0 = "configs/stage15_pretrain.py", "configs/stage0_clip.py"
RECAPTIONED = "--records=15000000"  # pairs of stage 1.5 (paper, Table 9)
SMALL = _batch(64, 2, 1024)  # as many groups as 64 chips, of two images each
ENCODER = ("--mode=encoder", "--top=30", "--config.mesh=1,1,1,1")
BRANCHED = ("--config.model.vision.form=branched", "--config.model.vision.batch_norm=train")
CASES = (
    *(
        Case(table, f"{STAGE2}:0.5b", "v5e:1x1", (*ENCODER, f"--rows={rows}", *form, *kernels))
        for kernels in ((), (PLAIN,))
        for table, rows, form in (
            ("encoder", 8, ()), ("encoder-branched", 8, BRANCHED),
            ("images", 1, ()), ("images", 2, ()), ("images", 4, ()), ("images", 16, ()),
        )
    ),
    Case("stage2", f"{STAGE2}:0.5b", "v5e:4x4"),
    Case("stage2", f"{STAGE2}:7b", "v5e:8x8", ("--config.mesh=1,4,16,1", *SMALL)),
    Case("stage2", f"{STAGE2}:7b", "v6e:8x8", SMALL),
    Case("stage2", f"{STAGE2}:7b", "v5p:2x2x4"),
    Case("stage15", f"{STAGE15}:7b", "v5e:8x8", ("--config.mesh=1,4,16,1", RECAPTIONED, *SMALL)),
    Case("stage15", f"{STAGE15}:7b", "v6e:8x8", (RECAPTIONED, *SMALL)),
    Case("stage15", f"{STAGE15}:7b", "v5p:2x2x4", (RECAPTIONED,)),
    Case("stage1", f"{STAGE1}:7b", "v5e:4x8"),
    Case("stage1", f"{STAGE1}:7b", "v6e:4x4"),
    Case("stage1", f"{STAGE1}:7b", "v5p:2x2x4"),
    Case("generate", f"{STAGE2}:0.5b", "v5e:1x1", ("--mode=generate", "--config.mesh=1,1,1,1")),
    Case("generate", f"{STAGE2}:1.5b", "v5e:1x1", ("--mode=generate", "--config.mesh=1,1,1,1")),
    Case("generate", f"{STAGE2}:7b", "v5e:2x2", ("--mode=generate", "--config.mesh=1,1,1,4")),
    Case("stage2", f"{STAGE2}:1.5b", "v5e:4x8"),
    Case("stage2", f"{STAGE2}:1.5b", "v5e:4x4"),
    Case("stage2", f"{STAGE2}:7b", "v5e:4x8"),
    Case("stage2", f"{STAGE2}:7b", "v5e:8x8", SMALL),
    Case("stage1", f"{STAGE1}:0.5b", "v5e:4x4"),
    Case("stage1", f"{STAGE1}:1.5b", "v5e:4x4"),
    Case("scale", f"{STAGE2}:0.5b", "v5e:4x4", ("--config.mesh=1,1,16,1", *_batch(32, 4, 2048))),
    Case("scale", f"{STAGE2}:0.5b", "v5e:8x8", ("--config.mesh=1,4,16,1", *_batch(128, 4, 2048))),
    Case("scale", f"{STAGE2}:0.5b", "v5e:16x16", ("--config.mesh=1,16,16,1", *_batch(512, 4, 2048))),
    Case("stage0", f"{STAGE0}:s3/12m", "v5e:4x4", ("--config.accumulate=2",)),
    *(Case("stage0", f"{STAGE0}:s3", slices) for slices in ("v5e:16x16", "v5p:4x4x8", "v6e:8x16")),
    Case("stage2", f"{STAGE2}:0.5b", "v5p:2x2x1"),
    Case("stage2", f"{STAGE2}:0.5b", "v6e:2x4"),
    Case("stage2", f"{STAGE2}:1.5b", "v5p:2x2x2"),
    Case("stage2", f"{STAGE2}:1.5b", "v6e:4x4"),
    Case("stage2", f"{STAGE2}:7b", "v5p:2x2x2"),
)  # fmt: skip
