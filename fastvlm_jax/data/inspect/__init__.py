"""`fastvlm data inspect`: shows what a data set holds, how a run uses it, and samples as the model sees them."""

import dataclasses
import pathlib

from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.inspect import contents, page, text, usage
from fastvlm_jax.data.inspect.listed import Listed, take_listed
from fastvlm_jax.data.inspect.samples import take_samples
from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.sources import RecordSource, read_shards
from fastvlm_jax.files import write_json


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Names the files to write; "" = none.

    Attributes:
      page: HTML page with `samples` samples.
      json: JSON file with all numbers.
      unusable: list of all records that cannot be used, one JSON object per line; by default beside the page, if any.
      samples: number of samples on the page.
      keys: records that the page shows; () shows the first ones of the first batches.
    """

    page: str = ""
    json: str = ""
    unusable: str = ""
    samples: int = 16
    keys: tuple[Listed, ...] = ()


def inspect(folder: str, split: str, verify: bool, outputs: Outputs) -> str:
    """Returns a text that describes a split of a data set, and writes `outputs.json`.

    Args:
      folder: folder of the data set.
      split: name of the split.
      verify: True compares the checksums of all shards.
      outputs: files to write; `page` and `unusable` must be "".

    Raises:
      FileNotFoundError: there is no such data set.
      ValueError: there is no such split, it holds no records, or shards are missing or damaged.
    """
    if outputs.page or outputs.unusable:
        raise ValueError("--output and --list_unusable show how a run uses the data: name its --config")
    contents.check_shards(folder, split)
    sets = [_look(read_shards(folder, split), None, verify)]
    _write_json(outputs, sets, None)
    return text.describe(sets, None)


def inspect_run(build: BatchBuilder, images_per_group: int, verify: bool, outputs: Outputs) -> str:
    """Returns a text that describes a split of each data set of a run and how the schedule uses it; writes `outputs`.

    Args:
      build: builder of the split's batches, as from_config.make_builder returns it for a training config.
      images_per_group: `data.images_per_group` of the config.
      verify: True compares the checksums of all shards.
      outputs: files to write.

    Raises:
      FileNotFoundError, ValueError: see `inspect`.
    """
    sources, schedule, processor = build.sources, build.schedule, build.processor
    counter = Counter(processor.tokenizer, processor.template, build.turns)
    indexes = [load_index(source, counter) for source in sources]
    sets = [_look(source, index, verify) for source, index in zip(sources, indexes, strict=True)]
    used = usage.measure(build, indexes, images_per_group)
    _write_json(outputs, sets, used)
    lines = [text.describe(sets, used), ""]
    page_path = pathlib.Path(outputs.page).expanduser()
    listed = outputs.unusable
    if outputs.page and not listed:
        beside = page_path.with_suffix(".unusable.jsonl")
        beside.unlink(missing_ok=True)  # the list of an earlier inspection
        listed = beside if schedule.unusable else ""
    if listed:
        usage.write_unusable(schedule, sources, pathlib.Path(listed).expanduser())
        lines.append(f"list of all {len(schedule.unusable):,} records that cannot be used: {listed}")
    if outputs.page:
        if outputs.keys:
            samples, what = take_listed(build, outputs.keys, outputs.samples), "listed records"
        else:
            samples, what = take_samples(build, outputs.samples), "samples"
        page.write_page(page_path, sets, used, samples)
        lines.append(f"{what} as the model sees them: {page_path}")
    return "\n".join(lines).rstrip()


def _look(source: RecordSource, sizes, verify: bool) -> contents.Contents:
    if verify:
        contents.verify(source)
    return contents.look_at(source, contents.load_sizes(source) if sizes is None else sizes, verify)


def _write_json(outputs: Outputs, sets: list[contents.Contents], used: usage.Usage | None) -> None:
    if outputs.json:
        found = {"data_sets": [dataclasses.asdict(each) for each in sets]}
        found |= {"schedule": dataclasses.asdict(used)} if used else {}
        write_json(pathlib.Path(outputs.json).expanduser(), found)
