"""Loads a model from any layout that a command or a stage accepts, as a whole or assembled from parts."""

import dataclasses
import functools
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from fastvlm_jax import adapted, checkpoint, convert, sharding
from fastvlm_jax.convert.heads import require_projection
from fastvlm_jax.convert.layer import layer_of
from fastvlm_jax.convert.layouts import llava, mobileclip, openclip, peft
from fastvlm_jax.convert.layouts.native import without_choices
from fastvlm_jax.convert.mapping import COUNTERS, described, read_tree
from fastvlm_jax.convert.recognise import gguf_file
from fastvlm_jax.convert.weight_files import CONFIG, DTYPES, read_json
from fastvlm_jax.gguf_file import read_contents
from fastvlm_jax.images.settings import PROCESSOR, SETTINGS
from fastvlm_jax.loaded import Loaded
from fastvlm_jax.metrics import best
from fastvlm_jax.models import clip, fastvlm, kinds
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.models.text_tower import TextTower
from fastvlm_jax.pair_processor import PairProcessor, holds_pair_processor, load_pair_processor
from fastvlm_jax.processor import Processor, load_processor
from fastvlm_jax.text.caption_tokenizer import clip_file
from fastvlm_jax.text.clip_tokenizer import load_clip_tokenizer
from fastvlm_jax.text.conversation import template_of
from fastvlm_jax.text.tokenizer import READERS as TOKENIZER_FILES
from fastvlm_jax.text.tokenizer import load_tokenizer
from fastvlm_jax.workdir import lineage_at, read_run

PARTS = ("vision", "projector", "llm", "text")
USAGE = "write vision=DIR,llm=DIR[,projector=DIR], or vision=DIR,text=DIR"
IMAGE_SIZE = 1024  # pixels a side: FastVLM's image size, for a model whose files give none


def read(source: str | os.PathLike) -> Loaded:
    """Reads a model from one place, or its parts from several.

    Args:
      source: a training workdir (its latest checkpoint; WORKDIR@best is its best one), one checkpoint in it, a model
        directory of any layout, or a GGUF file; or parts, as "vision=DIR,llm=DIR[,projector=DIR]", or for a CLIP
        "vision=DIR,text=DIR", where each DIR may hold a whole model, of which only that part is used. Adapters (a
        workdir that trained them, or a PEFT folder) are read with the model that they name as their base, or with
        another place of it as "base=MODEL,lora=DIR".

    Raises:
      FileNotFoundError: a path or a file in it does not exist; the message names it.
      ValueError: a part is unknown or missing, or a file is damaged or of an unknown layout; the message names it and
        says what to do.
    """
    return _read(source)


def _read(source: str | os.PathLike, above: tuple[pathlib.Path, ...] = ()) -> Loaded:
    """Reads a model; `above` are the folders of adapters that it is the base of, directly or through others."""
    if found := re.fullmatch(r"base=(.+),lora=([^=]+)", str(source)):
        return _read_one(found[2], above, base=found[1])
    if not re.match(rf"({'|'.join(PARTS)})=", str(source)):
        return _read_one(source, above)
    paths = {}
    for item in str(source).split(","):
        part, equals, path = item.partition("=")
        if part not in PARTS or not equals or not path or part in paths:
            raise ValueError(f"{source}: {item!r} is not a part; {USAGE}")
        paths[part] = path
    if "text" in paths and set(paths) != {"vision", "text"}:
        raise ValueError(f"{source}: a text tower needs an encoder beside it, and nothing else; {USAGE}")
    read_one = functools.cache(_read_one)
    loaded = {part: read_one(path, above) for part, path in paths.items()}
    config, variables = {"dtype": "float32"}, {}
    for part, model in loaded.items():
        if part not in model.variables["params"]:
            raise ValueError(f"{paths[part]} has no {part}: it holds {', '.join(model.variables['params'])}")
        for collection, tree in model.variables.items():
            if part in tree:
                variables.setdefault(collection, {})[part] = tree[part]
        if part in model.config:
            config[part] = model.config[part]
    for part in ("vision", "llm"):
        if "projector" in paths and part not in paths:
            raise ValueError(f"{source}: a projector needs both vision and llm: add {part}=DIR")
    if "text" in loaded:  # the factor of the logits belongs to no tower
        config["sigmoid"] = bool(loaded["text"].config.get("sigmoid"))
        variables["params"] |= {
            name: np.array(x, np.float32) for name, x in clip.initial_logits(config["sigmoid"]).items()
        }
    lineage = {"parts": {part: {"path": paths[part], **model.lineage} for part, model in loaded.items()}}
    return Loaded(str(source), config, variables, _joined_processor(loaded, config), lineage)


def _joined_processor(loaded: dict[str, Loaded], config: dict[str, Any]) -> Processor | None:
    """Returns the language model's processor with the image settings that fit the projector and the encoder."""
    processor = loaded["llm"].processor if "llm" in loaded else None
    if processor is None:
        return None
    if "vision" not in config:
        return dataclasses.replace(processor, image_size=0, tokens_per_image=0)
    vision = fastvlm.make_encoder(**config["vision"])
    known = [loaded[part].processor for part in ("projector", "vision") if part in loaded]
    sizes = [p.image_size for p in known if p is not None and p.image_size]
    size = sizes[0] if sizes else getattr(vision, "image_size", IMAGE_SIZE)
    tokens = kinds.build(**config).tokens_per_image(size)
    mean, std = tuple(vision.image_mean), tuple(vision.image_std)
    return dataclasses.replace(processor, image_size=size, tokens_per_image=tokens, image_mean=mean, image_std=std)


def _read_one(source: str | os.PathLike, above: tuple[pathlib.Path, ...], base: str = "") -> Loaded:
    path = pathlib.Path(source).expanduser()
    if path.name.endswith(best.MARK) and not path.exists():
        path = best.find_best(path.with_name(path.name.removesuffix(best.MARK)))
    if not path.exists():
        raise FileNotFoundError(f"there is no model at {path}; give a training workdir or a model directory")
    found = checkpoint.find(path) if path.is_dir() else None
    if found is not None:
        workdir, folder = found
        run = read_run(workdir)
        stored = run["config"].get("model")
        config = without_choices(stored) if isinstance(stored, dict) else stored
        model, _ = described(config, workdir / CONFIG)
        if adapted.is_adapted(run):
            loaded = _read_base(source, base or run["config"].get("parent"), workdir, above)
            variables, adapters = adapted.join_run(str(source), folder, run, model, loaded)
            own = {"model": loaded.source, "digest": adapted.base_digest(folder)}
            lineage = {**lineage_at(run, int(folder.name)), "base": own}
            return Loaded(str(source), config, variables, load_processor(workdir / "processor"), lineage, adapters)
        _refuse_base(base, source)
        variables = checkpoint.load_variables(folder, kinds.abstract_variables(model))
        read_processor = load_pair_processor if isinstance(model, CLIP) else load_processor
        processor = read_processor(workdir / "processor")
        return Loaded(str(source), config, variables, processor, lineage_at(run, int(folder.name)))
    if path.is_dir() and peft.holds_adapters(path):
        loaded = adapted.read_peft(path, _read_base(source, base or peft.read_config(path)[1], path, above))
        # Adapters need not have been trained with images as large as those of their base.
        own = any((path / name).is_file() for name in (PROCESSOR, SETTINGS)) and _processor(path, "peft", loaded.config)
        return dataclasses.replace(loaded, processor=own or loaded.processor)
    _refuse_base(base, source)
    layout = convert.recognise(path)
    config, variables = convert.load_weights(path)
    lineage = convert.read_lineage(path) if layout == "native" else {"layout": layout, "path": str(path)}
    processor = _processor(path, layout, config)
    if layout == "fastvlm" and processor is not None:
        statistics = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
        config = {**config, "vision": {**config["vision"], **statistics}}
    return Loaded(str(source), config, variables, processor, lineage)


def _read_base(source: str | os.PathLike, name: Any, folder: pathlib.Path, above: tuple[pathlib.Path, ...]) -> Loaded:
    """Reads the base of the adapters in a folder; `above`: see `_read`."""
    if (folder := folder.resolve()) in above:
        raise ValueError(f"{source} names itself as the model that it adapts: give the model as base=MODEL,lora=DIR")
    return _read(adapted.base_of(str(source), name if isinstance(name, str) else ""), (*above, folder))


def _refuse_base(base: str, source) -> None:
    """Raises ValueError if a base is given for a model without adapters."""
    if base:
        raise ValueError(f"{source} holds no adapters but a whole model: leave out base={base}")


def _processor(path: pathlib.Path, layout: str, config: dict[str, Any]) -> Processor | PairProcessor | None:
    """Reads the processor of a model directory; FastVLM's settings fill what its files omit. None if no tokenizer."""
    if config.get("text"):
        return load_pair_processor(path) if holds_pair_processor(path) else _clip_processor(path, layout, config)
    if not config.get("llm"):
        return None
    folder = gguf_file(path).parent if layout == "gguf" else path
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return _gguf_processor(gguf_file(path)) if layout == "gguf" else None
    if not config.get("vision"):
        template = "chatml" if layout == "gguf" else "qwen_2" if config["llm"].get("qkv_bias", True) else None
        processor = load_processor(folder, lambda size: 0, template, 0)
        processor = dataclasses.replace(processor, image_size=0)
    else:
        file, size, fit, grids = path / CONFIG, IMAGE_SIZE, None, ()
        if layout == "llava":
            size = llava.image_size(file, read_json(file))
            fit, grids = llava.image_fit(file, read_json(file))
        template = "qwen_2" if config["llm"].get("qkv_bias", True) else None
        processor = load_processor(path, kinds.build(**config).tokens_per_image, template, size, fit, grids)
    tokenizer, vocab_size = processor.tokenizer, fastvlm.build(llm=config["llm"]).llm_args["vocab_size"]
    # `<image>` may lie one past the last embedding row: image features take its place.
    if tokenizer.vocab_size - (tokenizer.image_id == vocab_size) > vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model {vocab_size}: "
            "put the files of this model's own tokenizer there"
        )
    return processor


def _gguf_processor(file: pathlib.Path) -> Processor:
    """Returns the processor of a GGUF file without other files beside it: its tokenizer and, if known, its template."""
    tokenizer, chat = load_tokenizer(file), read_contents(file).metadata.get("tokenizer.chat_template")
    known = template_of(chat, tokenizer) if isinstance(chat, str) else None
    return Processor(tokenizer, known or ("vicuna_v1" if tokenizer.end == "</s>" else "chatml"), 0, 0)


def _clip_processor(path: pathlib.Path, layout: str, config: dict[str, Any]) -> PairProcessor | None:
    """Returns the processor of a CLIP of open_clip or ml-mobileclip; None without CLIP's vocabulary in its folder."""
    vocabulary, layouts = clip_file(path), {"openclip": openclip, "mobileclip": mobileclip}
    if vocabulary is None or layout not in layouts:
        return None
    tokenizer, text = load_clip_tokenizer(vocabulary), TextTower(**config["text"])
    if tokenizer.vocab_size != text.vocab_size:
        raise ValueError(
            f"{vocabulary} has {tokenizer.vocab_size:,} ids and the model {text.vocab_size:,}: its text tower was "
            "trained with another vocabulary; remove the file to read it without one"
        )
    side, fit = layouts[layout].image_settings(path)
    mean, std = (tuple(config["vision"][name]) for name in ("image_mean", "image_std"))
    return PairProcessor(tokenizer, text.context_length, side, mean, std, fit)


def load(
    source: str | os.PathLike, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Model, dict[str, Any], Processor | PairProcessor | None]:
    """Loads a model from any source that `read` knows: (model, variables, processor), variables on the default device.

    The decoder's layers are not stacked, as generation is fastest; see `models.decoder.unstacked`.

    Args:
      source: see `read`.
      dtype: dtype of the parameters and of the computation, "float32", "bfloat16" or "float16"; None gives bfloat16 on
        a GPU or TPU and, on a CPU, float32 parameters and the computation dtype of the model's config. BatchNorm
        statistics are always float32.
      mesh: mesh to lay the variables out on, as training does: each process reads the parts of its own devices.

    Raises:
      FileNotFoundError: see `read`.
      ValueError: the model has an encoder and a language model but no projector, or is a CLIP without the projection of
        its images, or `dtype` is unknown; see `read`. Or the mesh does not divide the model.
    """
    loaded = read(source)
    return *put(loaded, dtype, mesh), loaded.processor


def put(
    loaded: Loaded, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Model, dict[str, Any]]:
    """Returns the model that was read, and its variables on the devices; see `load`."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if {"vision", "llm"} <= set(loaded.variables["params"]) and "projector" not in loaded.variables["params"]:
        raise ValueError(
            f"{loaded.source} has no projector: train one (configs/stage1_align.py) with it as --config.parent"
        )
    if loaded.config.get("text"):
        require_projection(loaded.config, loaded.variables, loaded.source)
    if dtype is None and jax.default_backend() != "cpu":
        dtype = "bfloat16"
    model = kinds.build(**{**loaded.config, "dtype": dtype or loaded.config.get("dtype", "float32")})
    dtypes = {name: DTYPES[dtype or "float32"] if name == "params" else np.float32 for name in loaded.variables}
    trees = {name: tree for name, tree in loaded.variables.items() if name != COUNTERS}
    whole = {name: fastvlm.unstacked(model, tree, layer_of) for name, tree in trees.items()}
    if mesh is None:
        return model, {name: read_tree(tree, dtypes[name], jax.device_put) for name, tree in whole.items()}
    if model.llm_args is not None:
        sharding.check_mesh(mesh, groups=mesh.size, num_kv_heads=model.llm_args["num_kv_heads"])
    boxed = kinds.boxed_variables(model)
    layouts = sharding.shardings_of({name: boxed[name] for name in trees}, mesh)
    layouts = {name: fastvlm.unstacked(model, tree, sharding.of_layer) for name, tree in layouts.items()}
    return model, {
        name: jax.tree.map(functools.partial(sharding.place, dtype=dtypes[name]), tree, layouts[name])
        for name, tree in whole.items()
    }
