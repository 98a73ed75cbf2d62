"""Grids of models for `fastvlm sweep`: accuracy against time to first token, as encoder, model and resolution vary.

    fastvlm sweep --config configs/resolution_scaling.py:paper-fig1 --dry_run --topology v5e:4x4
    fastvlm sweep --config configs/resolution_scaling.py:paper-fig1 --workdir DIR --config.weights.fastvithd=DIR ...

  paper-fig1    Qwen2-0.5B with FastViTHD, two ConvNeXts, ViT-L/14 and SigLIP: 11 points
  paper-fig4    FastViTHD and FastViT with Qwen2-0.5B, 1.5B and 7B: 30 points
  paper-fig6    FastViTHD with Vicuna-7B, one view against tiles: 13 points
  llava15,vision=DIR    your own encoder by resolution with Vicuna-7B; llava15,llm=0.5b,vision=DIR with Qwen2-0.5B

docs/resolution.md tells what each needs, and how to write your own grid.
"""

from fastvlm_jax.sweep import paper

SETUPS = {"paper-fig1": paper.figure_1, "paper-fig4": paper.figure_4, "paper-fig6": paper.figure_6}


def get_config(setup: str = "paper-fig1"):
    name, _, argument = setup.partition(",")
    if name == "llava15":
        return paper.own_encoder(argument)
    if setup not in SETUPS:
        raise ValueError(f"unknown setup {setup!r}: choose {', '.join(SETUPS)} or llava15,vision=DIR")
    return SETUPS[setup]()
