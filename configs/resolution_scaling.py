"""Grids of models for `fastvlm sweep`: accuracy against time to first token, as encoder, model and resolution vary.

    fastvlm data documents --output data/documents --parts numbers,large_numbers
    fastvlm sweep --config configs/resolution_scaling.py --workdir runs/reading
    fastvlm sweep --config configs/resolution_scaling.py:paper-fig1 --dry_run --topology v5e:4x4

docs/resolution.md explains the setups:

  documents     two tiny encoders learn to read numbers, on two CPU cores: 8 points; documents-short: 3 of them
  paper-fig1    Qwen2-0.5B with FastViTHD, two ConvNeXts, ViT-L/14 and SigLIP: 11 points
  paper-fig4    FastViTHD and FastViT with Qwen2-0.5B, 1.5B and 7B: 30 points
  paper-fig6    FastViTHD with Vicuna-7B, one view against tiles: 13 points
  llava15,vision=DIR    your own encoder by size with Vicuna-7B; llava15,llm=0.5b,vision=DIR with Qwen2-0.5B
"""

from fastvlm_jax.sweep import paper
from fastvlm_jax.sweep.grid import Point, Stage, sweep_config

PAPER = {"paper-fig1": paper.figure_1, "paper-fig4": paper.figure_4, "paper-fig6": paper.figure_6}
READING = {"tiny": "FastViTHD-tiny", "fastvit_tiny": "FastViT-tiny"}  # encoder of configs/reading.py -> its name


def get_config(setup: str = "documents"):
    name, _, argument = setup.partition(",")
    if name == "llava15":
        return paper.own_encoder(argument)
    if setup in PAPER:
        return PAPER[setup]()
    if setup not in ("documents", "documents-short"):
        known = ", ".join(("documents", "documents-short", *PAPER))
        raise ValueError(f"unknown setup {setup!r}: choose {known} or llava15,vision=DIR")
    whole, points = setup == "documents", []
    for encoder, label in READING.items() if whole else (("tiny", READING["tiny"]),):
        learn = Stage(f"configs/reading.py:learn,{encoder}")
        for side in (128, 192, 256, 320) if whole else (128, 256, 320):
            stages = (learn, Stage(f"configs/reading.py:read,{encoder},{side}"))
            points.append(Point(f"{label.lower()}-{side}", label, "tiny", side, stages))
    c = sweep_config(setup, "Reading numbers, by encoder and image size", points, ("documents", "documents-blind"))
    c.benchmark_data, c.evaluate_flags = "data/documents/numbers", ("--max_tokens=64",)
    return c
