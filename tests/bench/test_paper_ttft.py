"""The paper's latencies: they add up to the times to first token that it prints elsewhere."""

import pytest

from fastvlm_jax.bench.paper_ttft import FIGURE_1A, PREFILL_MS, TILES_MS, VISION_MS
from fastvlm_jax.bench.pareto import times_faster
from fastvlm_jax.models.sizes import LLM_SIZES, VISION_SIZES


@pytest.mark.parametrize(
    "llm, side, tokens, printed",
    [  # rows of table 6
        ("0.5b", 1024, 256, 166), ("1.5b", 768, 144, 152), ("1.5b", 1024, 256, 233), ("7b", 768, 144, 446),
        ("7b", 1024, 256, 641), ("vicuna-7b", 256, 16, 150), ("vicuna-7b", 768, 144, 387),
        ("vicuna-7b", 1024, 256, 577),
    ],
)  # fmt: skip
def test_encoder_and_prefill_add_up_to_the_times_of_table_6(llm, side, tokens, printed):
    assert VISION_MS["fastvithd", side] + PREFILL_MS[llm, tokens] == pytest.approx(printed, abs=1)


@pytest.mark.parametrize("llm, printed", [("0.5b", 918), ("1.5b", 1263), ("7b", 3721)])
def test_five_tiles_and_their_prefill_add_up_to_the_times_of_the_cvpr_version(llm, printed):
    tiles = TILES_MS["fastvithd", 1024, (2, 2)]
    assert tiles == pytest.approx(5 * VISION_MS["fastvithd", 1024]) and (2048 // 1024) ** 2 + 1 == 5
    assert tiles + PREFILL_MS[llm, 5 * 256] == pytest.approx(printed, abs=1)


def test_figure_1a_holds_its_claims_and_agrees_with_table_10():
    points = {(encoder, side): (ms, accuracy) for encoder, side, ms, accuracy in FIGURE_1A}
    ms, _ = points["fastvithd", 1024]
    assert ms == pytest.approx(VISION_MS["fastvithd", 1024] + PREFILL_MS["0.5b", 256], abs=2)
    own = [point for (encoder, _), point in points.items() if encoder == "fastvithd"]
    siglip = [points["siglip_so400m_384", 384]]
    assert round(times_faster(own, siglip, siglip[0][1])[0], 1) == 3.2  # the arrow of the figure


def test_names_are_those_of_the_sizes_but_for_models_that_are_not_there():
    encoders = {name for name, _ in VISION_MS} | {name for name, *_ in FIGURE_1A}
    assert encoders - VISION_SIZES.keys() == {"ViTamin-L", "DINOv2-L", "ViT-g"}
    assert {name for name, _ in PREFILL_MS} - LLM_SIZES.keys() == {"Llama-3-8B"}
