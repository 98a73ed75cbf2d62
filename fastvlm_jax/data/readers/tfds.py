"""Reads TFDS data sets stored as ArrayRecord, without TensorFlow and without tensorflow_datasets.

DIR/dataset_info.json names the splits and their files, DIR/features.json the features; an entry is a tf.train.Example.
Images keep their encoded bytes. columns.py says which features become images, questions and answers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from fastvlm_jax.data.readers import Options, Part, columns, pictures
from fastvlm_jax.data.readers.array_records import entries
from fastvlm_jax.data.readers.files import images_folder
from fastvlm_jax.data.readers.rows import to_record
from fastvlm_jax.data.record import Record, Rejected
from fastvlm_jax.files import read_small

_INFO, _FEATURES = "dataset_info.json", "features.json"
_ENTRIES = 20_000  # entries of a part


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` holds a prepared TFDS data set, or versions of one in its subfolders."""
    try:
        return _version(path) is not None
    except (OSError, ValueError):
        return False


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns ranges of entries in the files of a split.

    Raises:
      FileNotFoundError: `path` holds no data set, or a file of the data set is missing.
      ValueError: the data set has another file format, no such split, a damaged description, or features that no record
        can be made from.
    """
    folder = _version(path)
    if folder is None:
        raise FileNotFoundError(f"{path} is no prepared TFDS data set: it has no {_INFO}")
    info = _json(folder / _INFO)
    _plan(folder, _layout(folder))
    if info.get("fileFormat") != "array_record":
        raise ValueError(
            f"{folder} is stored as {str(info.get('fileFormat', 'tfrecord'))[:20]!r}, not as array_record: prepare it "
            "with file_format='array_record' (tfds.data_source does so)"
        )
    try:
        splits = {split["name"]: [int(n) for n in split["shardLengths"]] for split in info["splits"]}
        templates = {split["name"]: split.get("filepathTemplate") or _TEMPLATE for split in info["splits"]}
        if options.split not in splits:
            raise KeyError(f"no split {options.split!r}: it has {', '.join(sorted(splits))}")
        lengths = splits[options.split]
        files = [
            folder / _file_name(templates[options.split], info["name"], options.split, i, len(lengths))
            for i in range(len(lengths))
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _INFO}: {str(error.args[0] if error.args else error)[:200]}") from error
    for file, length in zip(files, lengths, strict=True):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: prepare the data set again")
        if not 0 <= length <= file.stat().length:
            raise ValueError(f"{folder / _INFO}: {file.name} cannot hold {length} entries: prepare the data set again")
    return [
        Part(str(file), start, min(start + _ENTRIES, length))
        for file, length in zip(files, lengths, strict=True)
        for start in range(0, length, _ENTRIES)
    ]


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the examples of a part as records; a damaged example is a Rejected."""
    path = epath.Path(part.path)
    layout = _layout(path.parent)
    plan, folder = _plan(path.parent, layout), images_folder(path, options)
    for number, data, reason in entries(part.path, part.start, part.stop):
        key = f"{path.name}/{number}"
        if data is not None:
            try:
                values = _values(data)
                row = {name: _value(values, name, layout[name]) for name in plan.needed}
                row |= {name: _untyped(values.get(layout[name].path, [])) for name in plan.others}
                yield to_record(key, row, plan, folder, options)
                continue
            except ValueError as error:
                reason = str(error)
        yield Rejected(part.path, key, reason)


def _plan(folder: epath.Path, layout: dict[str, "_Feature"]) -> columns.Plan:
    try:
        return columns.plan({name: feature.kind for name, feature in layout.items()})
    except ValueError as error:
        raise ValueError(f"{folder / _FEATURES}: {error}") from error


_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def _file_name(template: str, dataset: str, split: str, number: int, count: int) -> str:
    # The template may include the folder that the data set was written to, which need not be where it lies now.
    name = template.rpartition("/")[2]
    values = {
        "DATASET": dataset, "SPLIT": split, "FILEFORMAT": "array_record", "SHARD_INDEX": f"{number:05d}",
        "NUM_SHARDS": f"{count:05d}", "SHARD_X_OF_Y": f"{number:05d}-of-{count:05d}",
    }  # fmt: skip
    name = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], name)
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{name[:80]!r} is not a file name")
    return name


def _version(path: epath.Path) -> epath.Path | None:
    """Returns the folder with dataset_info.json: `path`, or its subfolder with the highest version; None if neither."""
    if (path / _INFO).is_file():
        return path
    if not path.is_dir():
        return None
    below = [child for child in path.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", child.name)]
    below = [child for child in below if (child / _INFO).is_file()]
    return max(below, key=lambda child: [int(part) for part in child.name.split(".")], default=None)


def _json(path: epath.Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: prepare the data set again")
    try:
        content = json.loads(read_small(path))
        if isinstance(content, dict):
            return content
        reason = "it holds no JSON object"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{path} is damaged ({reason[:100]}): prepare the data set again")


class _Feature(NamedTuple):
    path: str  # its name in the examples: "qa/question"
    kind: str  # "image", "text", "label", "messages" or "other"
    many: bool  # whether it is inside a sequence
    labels: tuple[str, ...] = ()


def _layout(folder: epath.Path) -> dict[str, _Feature]:
    """Returns the features by name: the last part of their path, or the whole path if two features share that part.

    A sequence of {"from", "value"} or {"role", "content"} is one feature of messages; in other dicts, such as
    {"question", "answer"}, each key is a feature.
    """
    found: list[_Feature] = []
    try:
        _flatten("", _json(folder / _FEATURES), False, found)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / _FEATURES} is damaged: prepare the data set again") from error
    names = [feature.path.rpartition("/")[2] for feature in found]
    layout = {}
    for name, feature in zip(names, found, strict=True):
        if feature.kind == "label":
            file = folder / f"{feature.path.replace('/', '-')}.labels.txt"
            labels = tuple(read_small(file).decode(errors="replace").splitlines()) if file.is_file() else ()
            feature = feature._replace(labels=labels, kind="text" if labels else "other")
        layout[name if names.count(name) == 1 else feature.path] = feature
    return layout


def _flatten(path: str, feature: dict[str, Any], many: bool, found: list[_Feature]) -> None:
    kind = feature["pythonClassName"].rpartition(".")[2]
    if "featuresDict" in feature:
        features = feature["featuresDict"]["features"]
        if many and columns.is_messages(features):
            found.append(_Feature(path, "messages", many))
            return
        for key, child in features.items():
            _flatten(f"{path}/{key}" if path else key, child, many, found)
    elif "sequence" in feature:
        _flatten(path, feature["sequence"]["feature"], True, found)
    else:
        dtype = feature.get("tensor", {}).get("dtype")
        text = kind == "Text" or (kind in ("Tensor", "Scalar") and dtype in ("string", "object"))
        found.append(
            _Feature(path, {"Image": "image", "ClassLabel": "label"}.get(kind, "text" if text else "other"), many)
        )


def _value(values: Mapping[str, list], name: str, feature: _Feature) -> Any:
    """Returns the value of a feature in an example, in the form that columns.py takes."""
    if feature.kind == "messages":
        pairs = ("from", "value") if f"{feature.path}/from" in values else ("role", "content")
        texts = [_texts(values.get(f"{feature.path}/{key}", []), key) for key in pairs]
        return [dict(zip(pairs, pair, strict=True)) for pair in zip(*texts, strict=True)]
    found = values.get(feature.path, [])
    if feature.kind == "image":
        if any(not isinstance(image, bytes) for image in found):
            raise ValueError(f"{name} is no encoded image")
        return found
    if feature.labels:
        if any(not isinstance(label, int) or not 0 <= label < len(feature.labels) for label in found):
            raise ValueError(f"{name} is {str(found)[:20]}, but the {len(feature.labels)} labels are numbered from 0")
        found = [feature.labels[label] for label in found]
    elif feature.kind == "text":
        found = _texts(found, name)
    return found if feature.many else next(iter(found), None)


def _untyped(values: list) -> list:
    return [value.decode(errors="replace") if _is_text(value) else value for value in values]


def _is_text(value: Any) -> bool:
    return isinstance(value, bytes) and not pictures.is_picture(value)


def _texts(values: list, name: str) -> list[str | bytes]:
    """Returns the texts of a feature; encoded pictures, which are strings to TFDS too, as they are."""
    try:
        return [value if pictures.is_picture(value) else value.decode() for value in values]
    except (UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} is not text in UTF-8") from error


def _example_class() -> type:
    """Builds the class of tf.train.Example: a map of names to lists of bytes, floats or int64s."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="example", syntax="proto3")
    repeated, optional = (descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED, 1)
    kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}  # protobuf's numbers for these types
    for name, kind in kinds.items():
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=repeated)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(kinds, start=1):
        feature.field.add(
            name=name, number=number, type=11, label=optional, type_name=f".example.{name}", oneof_index=0
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, type=9, label=optional)
    entry.field.add(name="value", number=2, type=11, label=optional, type_name=".example.Feature")
    features.field.add(name="feature", number=1, type=11, label=repeated, type_name=".example.Features.FeatureEntry")
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=11, label=optional, type_name=".example.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("example.Example"))


_Example = _example_class()


def _values(data: bytes) -> dict[str, list]:
    try:
        features = _Example.FromString(data).features.feature
    except DecodeError as error:
        raise ValueError("it is no tf.train.Example") from error
    found = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        found[name] = list(getattr(feature, kind).value) if kind else []
    return found
