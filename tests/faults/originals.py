"""Makes small whole files of every kind that is read, and reads folders of such files as the commands do.

Each kind has `make`, which returns folders as {name: content}, and `use`, which reads a folder, writes what it makes of
it to another one, and returns the lines in which entries were refused. A file as a whole is refused by an error.
"""

import base64
import gzip
import io
import json
import pathlib
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import gguf
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from fastvlm_jax import checkpoint, convert, guard, model_io
from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.readers import Options, tfds
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import Settings, write
from fastvlm_jax.evaluate import published, table
from fastvlm_jax.images import decode
from fastvlm_jax.images.inputs import to_pixels
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer
from fastvlm_jax.train_state import TrainState
from tests.faults.mutations import Files
from tests.helpers import tokenizer_files
from tests.helpers.pdf_files import pdf
from tests.helpers.pictures import FORMATS, PHOTO, encode

ASKED = "what is this?"
TALK = [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": "a smooth picture"}]
LLM = dict(vocab_size=400, width=32, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=32)
TOWER = dict(layers=[1], embed_dims=[8], mixers=["repmixer"], form="folded")
PNG = encode(PHOTO, format="PNG")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Kind(NamedTuple):
    """Describes a kind of file: `make()` returns folders, `use(folder, out)` reads one."""

    make: Callable[[], list[Files]]
    use: Callable[[pathlib.Path, pathlib.Path], list[str]]


def read_back(folder: pathlib.Path) -> Files:
    """Returns the files in and below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Pictures, alone


def pictures() -> list[Files]:
    return [{"picture": data} for data in FORMATS.values()]


def use_picture(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    for path in folder.iterdir():
        to_pixels(path, "image", "white")
        data = path.read_bytes()
        decode.shrink(data, 16)
        decode.views_into(data, np.empty((5, 8, 8, 3), np.uint8), (2, 2))
        decode.views_into(data, np.empty((1, 8, 8, 3), np.uint8))
    return []


# Sources of data


def lists() -> list[Files]:
    entries = [{"id": str(i), "image": "0.png", "conversations": TALK} for i in range(3)]
    rows = "".join(f'0.png,"picture {i}"\n' for i in range(4)).encode()
    beside = {"images/0.png": PNG}
    return [
        {"source.json": json.dumps(entries).encode(), **beside},
        {"source.jsonl": "".join(json.dumps(entry) + "\n" for entry in entries).encode(), **beside},
        {"source.csv": b"image,caption\n" + rows, **beside},
        {"source.tsv": rows.replace(b",", b"\t"), **beside},
        {"source.csv.gz": gzip.compress(b"image,caption\n" + rows), **beside},
        {"source.jsonl": json.dumps({"image": "0.png", "conversations": TALK}).encode("utf-16"), **beside},
    ]


def tars() -> list[Files]:
    array = io.BytesIO()
    np.savez(array, image_emb=np.ones((1, 3), np.float32), text_emb=np.ones((3, 3), np.float16))
    members = {
        "0.png": PNG, "0.txt": b"a picture", "0.json": b'{"caption": "a picture"}', "1.jpg": FORMATS["jpeg"],
        "1.json": json.dumps({"conversations": TALK}).encode(), "2.png": PNG, "2.txt": b"b", "2.npz": array.getvalue(),
        "2.syn.json": b'{"syn_text": ["a", "b"]}', "2.paug.json": b'{"param_aug": [[[0, 0, 2, 2], [[1, 2.5]]]]}',
    }  # fmt: skip
    found = []
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=layout) as archive:
            for name, data in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        found.append({"source.tar": file.getvalue()})
    return found


def parquets() -> list[Files]:
    image = {"bytes": PNG, "path": "0.png"}
    talks = [{"image": image, "id": str(i), "conversations": TALK} for i in range(40)]
    asked = [{"images": [image], "texts": [{"user": "a?", "assistant": str(i)}], "mark": "x"} for i in range(20)]
    flat = [{"image": PNG, "question": "a?", "answer": ["b", "c"], "number": i} for i in range(20)]
    found = []
    for rows in (talks, asked, flat):
        for how in (dict(compression="snappy"), dict(compression="zstd", data_page_version="2.0", row_group_size=7),
                    dict(compression="none", use_dictionary=False), dict(compression="gzip")):  # fmt: skip
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), file, **how)
            found.append({"source.parquet": file.getvalue()})
    return found


def pdfs() -> list[Files]:
    lines = "".join(f"BT /F1 14 Tf 72 {700 - 20 * i} Td (the line {i} of a page) Tj ET\n" for i in range(5)).encode()
    drawn = b"0.5 g 10 10 200 30 re f 0 0 m 99 99 l S\n" + lines
    return [{"source.pdf": pdf(lines, drawn)}, {"source.pdf": pdf(lines, drawn, packed=True)}]


def prepared() -> list[Files]:
    """Data sets as TFDS stores them."""
    part = {"image": {"pythonClassName": "tfds.Image"}, "caption": {"pythonClassName": "tfds.Text"},
            "label": {"pythonClassName": "tfds.ClassLabel"}}  # fmt: skip
    split = {
        "name": "train",
        "shardLengths": ["5"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    folder = pathlib.Path("made")
    folder.mkdir(exist_ok=True)
    name = "set-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
    for i in range(5):
        example = tfds._Example()
        example.features.feature["image"].BytesList.value.append(PNG)
        example.features.feature["caption"].BytesList.value.append(b"a picture %d" % i)
        example.features.feature["label"].Int64List.value.append(i % 2)
        writer.write(example.SerializeToString())
    writer.close()
    return [{
        "dataset_info.json": json.dumps({"name": "set", "fileFormat": "array_record", "splits": [split]}).encode(),
        "features.json": json.dumps(
            {"pythonClassName": "tfds.FeaturesDict", "featuresDict": {"features": part}}).encode(),
        "label.labels.txt": b"cat\ndog\n", name: (folder / name).read_bytes(),
    }]  # fmt: skip


def shards() -> list[Files]:
    folder = pathlib.Path("shards")
    source, kept = folder / "source", folder / "written"
    source.mkdir(parents=True)
    for name, data in lists()[0].items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    tokenizer_files.train_like_llama(source / "tokenizer.model")
    write(source / "source.json", kept, settings=Settings(tokenizer=str(source / "tokenizer.model")), workers=1,
          options=_options(source))  # fmt: skip
    return [read_back(kept)]


def _options(folder: pathlib.Path) -> Options:
    return Options(images=str(folder / "images")) if (folder / "images").is_dir() else Options()


def use_source(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    found = [path for path in folder.iterdir() if path.name.startswith("source")]
    source, settings = found[0] if len(found) == 1 else folder, Settings(verify=True, max_side=16)
    write(source, out, settings=settings, options=_options(folder), workers=1)
    rejected = out / "rejected.jsonl"
    return rejected.read_text().splitlines() if rejected.exists() else []


def use_shards(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    told = []
    source = read_shards(folder, "train")
    for i in range(len(source)):
        try:
            source[i]
        except ValueError as error:
            told.append(str(error))
    load_index(source, Counter(load_tokenizer(_plain_tokenizer()), "vicuna_v1", "separate"))
    return told + use_source(folder, out)


def _plain_tokenizer() -> pathlib.Path:
    return pathlib.Path("shards/source/tokenizer.model").absolute()


# Tokenizers and models


def tokenizers() -> list[Files]:
    folder = pathlib.Path("tokenizers")
    folder.mkdir(exist_ok=True)
    tokenizer_files.train_like_llama(folder / "tokenizer.model")
    llama = (folder / "tokenizer.model").read_bytes()
    tokenizer_files.train_sentencepiece(tokenizer_files.LINES, folder / "own.model", 400)
    own = (folder / "own.model").read_bytes()
    tokenizer_files.train_json(folder / "qwen.json")
    qwen = (folder / "qwen.json").read_bytes()
    made = folder / "llama"
    made.mkdir(exist_ok=True)
    load_tokenizer(folder / "tokenizer.model").save(made)
    model = json.loads(qwen)["model"]
    added = {str(i): {"content": name, "special": True} for i, name in enumerate(SPECIAL, len(model["vocab"]))}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "added_tokens_decoder": added}
    merges = "".join(" ".join(merge) + "\n" for merge in model["merges"]).encode()
    vocab = {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges}
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)) + b"YWI= 256\nYWJj 257\n"
    return [
        {"tokenizer.model": llama}, {"tokenizer.model": own}, {"tokenizer.json": qwen}, read_back(made),
        {"tokenizer.json": qwen, "tokenizer_config.json": json.dumps(settings).encode()},
        {**vocab, "tokenizer_config.json": json.dumps(settings).encode()}, vocab, {"qwen.tiktoken": ranks},
        {"model.gguf": _gguf(folder / "model.gguf", model)},
    ]  # fmt: skip


def _gguf(path: pathlib.Path, model: dict) -> bytes:
    """Returns a Llama in GGUF with the tokenizer `model` of the library `tokenizers`."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *SPECIAL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_token_types([1] * len(model["vocab"]) + [3] * 3)
    writer.add_eos_token_id(len(tokens) - 1)
    for add, value in ((writer.add_embedding_length, 32), (writer.add_block_count, 2), (writer.add_head_count, 2),
                       (writer.add_head_count_kv, 1), (writer.add_feed_forward_length, 32),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_context_length, 64)):  # fmt: skip
        add(value)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{x}": (size, 32) for x, size in (("q", 32), ("k", 16), ("v", 16), ("output", 32))}
        shapes |= {f"blk.{i}.ffn_{x}": (32, 32) for x in ("gate", "up", "down")}
        shapes |= {f"blk.{i}.{x}_norm": (32,) for x in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def use_tokenizer(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    for text in ("what color is it?  ▁ünïcode\n\n" * 3, "a" * 200 + "!", " " * 300, "0123456789" * 20):
        ids, _ = tokenizer.encode_with_offsets(text)
        tokenizer.decode(ids)
    out.mkdir()
    tokenizer.save(out)
    load_tokenizer(out)
    tokenizer.with_image(500)
    return []


def models() -> list[Files]:
    folder = pathlib.Path("models")
    folder.mkdir(exist_ok=True)
    tokenizer_files.train_sentencepiece(tokenizer_files.LINES, folder / "tokenizer.model", LLM["vocab_size"])
    processor = Processor(load_tokenizer(folder / "tokenizer.model"), "qwen_2", image_size=8, tokens_per_image=4)
    whole, found = {"vision": TOWER, "llm": LLM, "dtype": "float32"}, []
    for layout, config in (("native", whole), ("hf", whole), ("hf", {"llm": LLM, "dtype": "float32"}),
                           ("timm", {"vision": TOWER, "dtype": "float32"})):  # fmt: skip
        target = folder / f"{layout}{len(found)}"
        rng = np.random.default_rng(0)
        shapes = kinds.abstract_variables(fastvlm.build(**config))
        variables = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
        convert.write(target, layout, variables, config, processor if "llm" in config else None, {})
        found.append(read_back(target))
    return [*found, tokenizers()[-1]]


def use_model(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    read = model_io.read(folder)
    fastvlm.build(**read.config)
    jax.tree.map(np.asarray, read.variables)
    if read.processor is not None:
        image = [PHOTO] if read.processor.image_size else None
        read.processor(image, ASKED)
    convert.write(out, "native", read.variables, read.config, read.processor, read.lineage)
    return []


def checkpoints() -> list[Files]:
    """A training workdir with one checkpoint of a tiny language model, its processor and its config."""
    folder = pathlib.Path("workdirs/run")
    config = {"llm": LLM, "dtype": "float32"}
    rng = np.random.default_rng(0)
    shapes = kinds.abstract_variables(fastvlm.build(**config))
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes["params"])
    known = guard.Guard(np.zeros(guard.WINDOW, np.float32), np.int32(1), np.int32(0))
    state = jax.device_put(TrainState(np.int32(4), params, {}, ({"count": np.int32(4)},), known))
    folder.mkdir(parents=True)
    checkpointer = checkpoint.open_checkpointer(folder.absolute(), checkpoint.Retention(2))
    checkpoint.save(checkpointer, state, 4, passed_over=(), lineage={"stage": "small"})
    checkpointer.close()
    run = {"format": "fastvlm_jax workdir", "config": {"model": config}, "lineage": {"stage": "small"}}
    (folder / "config.json").write_text(json.dumps(run))
    tokenizer_files.train_sentencepiece(tokenizer_files.LINES, folder / "tokenizer.model", LLM["vocab_size"])
    Processor(load_tokenizer(folder / "tokenizer.model"), "qwen_2", 0, 0).save(folder / "processor")
    (folder / "tokenizer.model").unlink()
    return [read_back(folder)]


def use_checkpoint(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    told = []
    for step in checkpoint.steps_of(folder):
        try:
            checkpoint.verify(folder / checkpoint.FOLDER / str(step))
        except checkpoint.Damaged as error:
            told.append(str(error))
    return told + use_model(folder, out)


# Benchmarks


def benchmarks() -> list[Files]:
    image = {"bytes": PNG, "path": "0.png"}
    rows = [{"id": i, "question": "a?", "image": image, "answers": ["b"]} for i in range(9)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    lines = b"".join(json.dumps({"id": i, "image": "0.png", "question": "a?"}).encode() + b"\n" for i in range(5))
    cells = b"index\timage\tquestion\n" + b"".join(b'%d\t%s\t"a?"\n' % (i, base64.b64encode(PNG)) for i in range(4))
    return [{"test.parquet": file.getvalue()}, {"test.jsonl": lines}, {"test.tsv": cells},
            {"test.json": json.dumps({"questions": rows and [{"id": 1, "question": "a?"}]}).encode()}]  # fmt: skip


def use_benchmark(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    told = []
    for path in map(epath.Path, sorted(folder.iterdir())):
        match path.suffix:
            case ".parquet":
                rows = published.read_parquet([path], ("id", "question"), ("image",), ("answers",))
            case ".jsonl":
                rows = published.read_lines(path)
            case ".tsv":
                rows = table.read_table(path, ("index", "question"), ("image",))
            case _:
                rows = published.read_objects(path, "questions")
        for row in rows:
            picture = row.get("image")
            try:
                if hasattr(picture, "read"):
                    decode.decode(picture.read())
            except ValueError as error:
                told.append(str(error))
    return told


KINDS = {
    "pictures": Kind(pictures, use_picture),
    "lists": Kind(lists, use_source),
    "tars": Kind(tars, use_source),
    "parquet": Kind(parquets, use_source),
    "pdf": Kind(pdfs, use_source),
    "tfds": Kind(prepared, use_source),
    "shards": Kind(shards, use_shards),
    "tokenizers": Kind(tokenizers, use_tokenizer),
    "models": Kind(models, use_model),
    "checkpoints": Kind(checkpoints, use_checkpoint),
    "benchmarks": Kind(benchmarks, use_benchmark),
}
