"""Runs `fastvlm convert`: writes a model in another layout."""

import pathlib

from absl import flags

from fastvlm_jax.cli.arguments import parse


def convert(argv: list[str]) -> None:
    """Writes a model, or one put together from parts, in another layout."""
    fv = flags.FlagValues()
    flags.DEFINE_string("source", None, "model to convert, or its parts; the layout is recognised", flag_values=fv)
    flags.DEFINE_string("target", None, "folder to write", flag_values=fv)
    flags.DEFINE_enum(
        "layout",
        "native",
        ["native", "hf", "llava", "timm", "openclip", "gguf", "peft"],
        "layout to write",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "dtype of the stored weights; default: as in the source",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "gguf_type",
        None,
        ["f16", "f32", "bf16", "q8_0"],
        "type of the matrices in a GGUF file; default: f16",
        flag_values=fv,
    )
    flags.DEFINE_bool("fold", False, "fold the encoder's training form (hf and llava always do)", flag_values=fv)
    flags.DEFINE_bool("overwrite", False, "replace the model at the target", flag_values=fv)
    parse(fv, argv, required=("source", "target"))
    from fastvlm_jax import convert, model_io

    target = pathlib.Path(fv.target).expanduser().resolve()
    for path in fv.source.split(","):
        if pathlib.Path(path.rpartition("=")[2]).expanduser().resolve() == target:
            raise ValueError(f"--target {fv.target} is the source: name another folder")
    loaded = model_io.read(fv.source)
    convert.write(
        fv.target, fv.layout, loaded.variables, loaded.config, loaded.processor, loaded.lineage,
        dtype=fv.dtype, fold=fv.fold, overwrite=fv.overwrite, gguf_type=fv.gguf_type,
        adapters=loaded.adapters,
    )  # fmt: skip
    alone = fv.layout == "gguf" and loaded.config.get("vision")
    print(f"wrote {fv.target} ({fv.layout}{', the language model alone: no encoder, no projector' if alone else ''})")
