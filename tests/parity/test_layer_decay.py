"""Layer-wise decay against timm's own parameter groups, in the encoders that timm has."""

import numpy as np
import pytest
import torch
from torch_reference import timm, timm_tower

from fastvlm_jax.convert.tables import convnext as convnext_table
from fastvlm_jax.convert.tables import timm as timm_table
from fastvlm_jax.models import depth, fastvlm, kinds
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.fastvit import FastViT

FASTVIT = dict(layers=(2, 1, 3, 1, 2), embed_dims=(8, 16, 16, 32, 32), form="branched", head_features=8, head_bias=True)
CONVNEXT = dict(layers=(2, 1, 3, 1), embed_dims=(8, 16, 24, 32))


def rates_of(tower: torch.nn.Module, decay: float) -> dict[str, float]:
    """timm's factor of the rate of every parameter, by its name."""
    names = {id(parameter): name for name, parameter in tower.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(tower, layer_decay=decay)
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


def convnext() -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(
            "convnext_large", depths=CONVNEXT["layers"], dims=CONVNEXT["embed_dims"], num_classes=0
        )


@pytest.mark.parametrize(
    "family, sizes, rows",
    [("fastvit", FASTVIT, timm_table.tower_rows), ("convnext", CONVNEXT, convnext_table.tower_rows)],
)
def test_every_parameter_has_the_rate_of_timms(family, sizes, rows):
    ours = (FastViT if family == "fastvit" else ConvNeXt)(**sizes)
    theirs = rates_of(timm_tower(ours) if family == "fastvit" else convnext(), 0.75)
    params = kinds.abstract_variables(fastvlm.build({"family": family, **sizes}))["params"]
    factors = depth.rate_factors(params, {"vision": 0.75})
    compared = 0
    for row in rows(ours):
        if row.path and row.path.startswith("params/"):
            expected = [theirs[name] for name in row.names()]
            found = factors[row.path.removeprefix("params/")]
            np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-6, err_msg=row.path)
            compared += len(expected)
    assert compared == len(theirs)
