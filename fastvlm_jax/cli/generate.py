"""Runs `fastvlm generate`: lets a model answer prompts."""

from absl import flags

from fastvlm_jax.cli.arguments import parse


def generate(argv: list[str]) -> None:
    """Prints the answer to each prompt on a line of its own."""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model that answers", flag_values=fv)
    flags.DEFINE_multi_string("image", [], "image file; repeat it for several images", flag_values=fv)
    flags.DEFINE_multi_string(
        "prompt",
        None,
        "question; <image> marks the place of an image. One question is about all images; repeat it for several, "
        "all about the one image or question i about image i",
        flag_values=fv,
    )
    flags.DEFINE_integer("max_tokens", 256, "length of the longest answer, tokens", flag_values=fv)
    flags.DEFINE_float("temperature", 0.0, "sampling temperature; 0 = greedy decoding", flag_values=fv)
    flags.DEFINE_float("top_p", 1.0, "probability mass of the likeliest tokens to sample from", flag_values=fv)
    flags.DEFINE_integer("seed", 0, "seed of the sampling", flag_values=fv)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "dtype of parameters and computation; default: float32 parameters, the model's computation",
        flag_values=fv,
    )
    flags.DEFINE_integer("max_length", 8192, "context length: tokens of prompt, images and answer", flag_values=fv)
    parse(fv, argv, required=("model", "prompt"))
    import fastvlm_jax
    from fastvlm_jax.generate import generate

    model, variables, processor = fastvlm_jax.load(fv.model, fv.dtype)
    answers = generate(
        model, variables, processor, fv.image, fv.prompt, max_tokens=fv.max_tokens, temperature=fv.temperature,
        top_p=fv.top_p, seed=fv.seed, max_length=fv.max_length,
    )  # fmt: skip
    print("\n".join(answers))
