"""The projector's weights: two layers, whose names each layout gives."""

from fastvlm_jax.convert.mapping import LINEAR, SAME, Row


def projector_rows(first: str, second: str) -> list[Row]:
    """The rows of the projector, whose two layers have these names."""
    return [
        Row(f"{torch}.{kind}", f"params/projector/{ours}/{name}", transform)
        for torch, ours in ((first, "fc1"), (second, "fc2"))
        for kind, name, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ]
