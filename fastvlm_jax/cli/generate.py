"""Runs `fastvlm generate`: lets a model answer prompts."""

import sys

from absl import flags

from fastvlm_jax.cli.arguments import define_answers, parse


def generate(argv: list[str]) -> None:
    """Prints the answer to each prompt on a line of its own, on a terminal as it is written."""
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
    flags.DEFINE_enum(
        "sampling",
        "greedy",
        ["greedy", "model"],
        "how tokens are chosen: always the likeliest, or as the model's generation_config.json says; the four flags "
        "below replace single settings",
        flag_values=fv,
    )
    define_answers(fv, "", "", "prompt, images and answer")
    parse(fv, argv, required=("model", "prompt"))
    import fastvlm_jax
    from fastvlm_jax.generate import generate, stream

    model, variables, processor = fastvlm_jax.load(fv.model, fv.dtype)
    stored = fv.sampling == "model" and processor is not None
    if stored and processor.generation is None:
        raise ValueError(f"{fv.model} has no generation_config.json for --sampling=model: give --temperature instead")
    options = ("temperature", "top_p", "top_k", "repetition_penalty")
    sampling = {name: fv[name].value for name in options if fv[name].present}
    asked = (model, variables, processor, fv.image, fv.prompt)
    options = dict(max_tokens=fv.max_tokens, seed=fv.seed, max_length=fv.max_length)
    options |= (processor.sampling if stored else {}) | sampling
    if not sys.stdout.isatty():
        print("\n".join(generate(*asked, **options)))
        return
    shown = 0
    for number, piece in stream(*asked, **options):
        print("\n" * (number - shown) + piece, end="", flush=True)
        shown = number
    print("\n" * (len(fv.prompt) - 1 - shown))
