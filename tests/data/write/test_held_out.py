"""`--validation_share` splits by picture: none stands in both splits, no split is empty by chance."""

import hashlib
import io
import json
import random

import numpy as np
import PIL.Image
import pytest
from command import fastvlm

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import Settings, write, write_shards
from fastvlm_jax.data.write.settle import choose


def picture(number):
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (number % 256, number // 256, 90)).save(file, "PNG")
    return file.getvalue()


def entry(key, *pictures, text="what?"):
    return Record(
        key, tuple(map(picture, pictures)), (("user", (*range(len(pictures)), text)), ("assistant", ("yes",)))
    )


def written(folder, entries, share, workers=1, shard_bytes=1 << 20, num_shards=1):
    """(records of train, records of validation) of a data set made from `entries`."""
    folder.mkdir(exist_ok=True)
    if not (folder / "in").exists():
        write_shards(folder / "in", "train", entries, num_shards)
    out = folder / f"out-{share}-{workers}"
    write(folder / "in", out, settings=Settings(validation_share=share, shard_bytes=shard_bytes), workers=workers)
    sources = [read_shards(out, split) for split in ("train", "validation")]
    return [[source[i] for i in range(len(source))] for source in sources]


def pictures_of(records):
    return {image for record in records for image in record.images}


def keys(records):
    return [record.key for record in records]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_picture_goes_by_its_bytes_with_all_its_entries(tmp_path):
    """Below 0.3 of the range of 64-bit BLAKE2b: worked out here with hashlib."""
    entries = [entry(f"{number}-{turn}", number, text=f"question {turn}") for turn in range(3) for number in range(40)]
    train, validation = written(tmp_path, entries, 0.3)
    low = {n for n in range(40) if hashlib.blake2b(picture(n), digest_size=8).digest().hex() < "4ccccccccccccccc"}
    assert 4 < len(low) < 20
    assert keys(validation) == [f"{n}-{turn}" for turn in range(3) for n in range(40) if n in low]
    assert keys(train) == [f"{n}-{turn}" for turn in range(3) for n in range(40) if n not in low]


def test_a_picture_stays_in_its_split_when_others_come_and_go(tmp_path):
    _, few = written(tmp_path / "few", [entry(str(n), n) for n in range(0, 200, 2)], 0.1)
    _, many = written(tmp_path / "many", [entry(str(n), n) for n in range(200)], 0.1)
    assert len(few) > 3 and keys(few) == [key for key in keys(many) if int(key) % 2 == 0]


def halves(upper, lower):
    """A hash whose upper half, of 16, says whether it is below a share, and whose lower half picks the lead."""
    return upper << 60 | lower


@pytest.mark.parametrize(
    "share, entries, expected",
    [
        (0.5, [[halves(7, 1)], [halves(8, 2)], [halves(7, 1)]], [True, False, True]),
        # The lead has the lowest lower half: the second picture of the first entry, the first of the second.
        (0.5, [[halves(9, 4), halves(1, 3)], [halves(9, 1), halves(1, 2)]], [True, False]),
        # 0-1-2 hang together by shared pictures, led by (1, 0): three of five pictures are no more than 0.6 of them.
        (0.6, [[halves(1, 0), halves(9, 5)], [halves(9, 5), halves(9, 6)], [halves(9, 6)], [halves(12, 9)],
               [halves(12, 8)]], [True, True, True, False, False]),
        # ... but more than 0.5 of them: they stay in training, and the lowest of the small groups goes.
        (0.5, [[halves(1, 0), halves(9, 5)], [halves(9, 5), halves(9, 6)], [halves(9, 6)], [halves(13, 9)],
               [halves(12, 8)]], [False, False, False, False, True]),
        # Nobody is below 0.05: the lowest goes. Everybody is below 0.9: the highest stays.
        (0.05, [[halves(3, 1)], [halves(2, 2)], [halves(8, 0)]], [False, True, False]),
        (0.9, [[halves(3, 1)], [halves(2, 2)], [halves(8, 0)]], [True, True, False]),
        # One group alone cannot be split.
        (0.5, [[halves(1, 1)], [halves(1, 1)]], [False, False]),
        (0.5, [[halves(1, 1), halves(2, 2)], [halves(2, 2), halves(3, 3)]], [False, False]),
    ],
    ids=["by picture", "by lead", "a group", "a large group", "none below", "all below", "one picture", "one group"],
)  # fmt: skip
def test_groups_of_pictures_go_together(share, entries, expected):
    owner = [number for number, pictures in enumerate(entries) for _ in pictures]
    chosen = choose(
        np.array(owner, np.uint64), np.concatenate([np.array(pictures, np.uint64) for pictures in entries]), share
    )
    assert chosen.tolist() == [expected[number] for number in owner]


@pytest.mark.parametrize("seed", range(3))
def test_pictures_shared_by_entries_of_several_stand_in_one_split(seed, tmp_path):
    draw = random.Random(seed)
    entries = [entry(str(n), *draw.sample(range(400), draw.choice([1, 1, 1, 2, 3]))) for n in range(200)]
    train, validation = written(tmp_path, entries, 0.2, shard_bytes=2000, num_shards=3)
    assert not pictures_of(train) & pictures_of(validation)
    assert 10 < len(validation) < 100 and len(train) + len(validation) == 200
    order = [str(i) for shard in range(3) for i in range(shard, 200, 3)]  # of the source's shards
    assert [keys(train), keys(validation)] == [sorted(keys(part), key=order.index) for part in (train, validation)]
    written(tmp_path, entries, 0.2, workers=2, shard_bytes=2000)
    assert files(tmp_path / "out-0.2-1") == files(tmp_path / "out-0.2-2")


def test_stopped_behind_the_last_move_it_ends_in_the_same_bytes(tmp_path):
    entries = [entry(str(n), n, (n + 1) % 30) for n in range(0, 30, 2)] + [entry(f"b{n}", n, n + 40) for n in range(9)]
    written(tmp_path, entries, 0.3, num_shards=2)
    other = tmp_path / "other"
    (other / "train-00000-of-00002.array_record").mkdir(parents=True)  # where a shard must go
    with pytest.raises(OSError):
        write(tmp_path / "in", other, settings=Settings(validation_share=0.3, shard_bytes=1 << 20), workers=1)
    assert list((other / ".train.writing").glob("*-settled-*"))
    (other / "train-00000-of-00002.array_record").rmdir()
    write(tmp_path / "in", other, settings=Settings(validation_share=0.3, shard_bytes=1 << 20), workers=1)
    assert files(other) == files(tmp_path / "out-0.3-1")


def test_small_sets_have_both_splits(tmp_path):
    for count in (2, 3, 5, 20):
        for share in (0.05, 0.95):
            folder = tmp_path / f"{count}-{share}"
            train, validation = written(folder, [entry(str(n), n + 10 * count) for n in range(count)], share)
            assert train and validation and len(train) + len(validation) == count


def test_records_without_a_picture_go_by_their_text(tmp_path):
    entries = [entry(str(n), text=f"say {n % 30}") for n in range(90)]
    train, validation = written(tmp_path, entries, 0.3)
    said = [{record.turns[0][1][0] for record in part} for part in (train, validation)]
    assert said[0] and said[1] and not said[0] & said[1] and len(train) + len(validation) == 90


def test_of_a_repeated_key_the_first_of_the_source_stays_whatever_its_split(tmp_path):
    entries = [entry(f"{n % 15}", n) for n in range(30)]  # each key twice, with two pictures
    train, validation = written(tmp_path, entries, 0.5)
    assert train and validation
    assert pictures_of(train + validation) == {picture(n) for n in range(15)}


def test_the_command_tells_both_splits_and_an_empty_one(monkeypatch, capsys, tmp_path):
    for number, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(picture(number))

    def run(name, *images):
        talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "it"}]
        source = tmp_path / f"{name}.json"
        source.write_text(json.dumps([{"id": str(i), "image": x, "conversations": talk} for i, x in enumerate(images)]))
        flags = (f"--source={source}", f"--output={tmp_path / name}", "--validation_share=0.05", "--workers=1")
        return fastvlm(monkeypatch, capsys, "data", "write", *flags)

    status, out, _ = run("two", "a.png", "b.png", "b.png")
    assert status == 0 and {line.split(": ")[1].split(",")[0] for line in out.splitlines()} == {
        "1 records",
        "2 records",
    }
    status, out, _ = run("one", "a.png", "a.png")
    lines = out.splitlines()
    assert status == 0 and " train: 2 records" in lines[0] and " validation: 0 records" in lines[1]
    assert lines[2].startswith("validation is empty: ") and lines[2].endswith("training will run without validation")
