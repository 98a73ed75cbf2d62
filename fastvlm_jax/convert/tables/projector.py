"""Maps the projector's two linear layers to tensor names, which every layout chooses for itself."""

from fastvlm_jax.convert.mapping import LINEAR, SAME, Row


def projector_rows(first: str, second: str) -> list[Row]:
    """Returns the rows of the projector.

    Args:
      first, second: tensor names of its two layers, without `.weight` and `.bias`.
    """
    return [
        Row(f"{torch}.{kind}", f"params/projector/{ours}/{name}", transform)
        for torch, ours in ((first, "fc1"), (second, "fc2"))
        for kind, name, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ]
