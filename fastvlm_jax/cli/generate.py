"""`fastvlm generate`: answers of a model to prompts."""

from absl import flags

from fastvlm_jax.cli.arguments import parse


def generate(argv: list[str]) -> None:
    """fastvlm generate"""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to ask", flag_values=fv)
    flags.DEFINE_multi_string("image", [], "image file; repeat it for several", flag_values=fv)
    flags.DEFINE_multi_string(
        "prompt", None, "question; repeat it for several, each about its image or the one image", flag_values=fv
    )
    flags.DEFINE_integer("max_tokens", 256, "longest answer, tokens", flag_values=fv)
    flags.DEFINE_float("temperature", 0.0, "0 = greedy", flag_values=fv)
    flags.DEFINE_float("top_p", 1.0, "probability mass to draw from", flag_values=fv)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=fv)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"], "of parameters and computation", flag_values=fv
    )
    flags.DEFINE_integer("max_length", 8192, "context: tokens of prompt, image and answer", flag_values=fv)
    parse(fv, argv, required=("model", "prompt"))
    import fastvlm_jax
    from fastvlm_jax.generate import generate

    model, variables, processor = fastvlm_jax.load(fv.model, fv.dtype)
    answers = generate(
        model, variables, processor, fv.image, fv.prompt, max_tokens=fv.max_tokens, temperature=fv.temperature,
        top_p=fv.top_p, seed=fv.seed, max_length=fv.max_length,
    )  # fmt: skip
    print("\n".join(answers))
