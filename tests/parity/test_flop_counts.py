"""FLOPs against PyTorch's counter on timm's and transformers' models, forward and backward, without weights."""

import pytest
import torch
import torch_reference
import transformers
from torch.utils.flop_counter import FlopCounterMode

from fastvlm_jax import optim
from fastvlm_jax.config import get_base
from fastvlm_jax.models import fastvlm, flops, kinds


@pytest.mark.parametrize(
    "vision, name, form",
    [
        ("mci0", "fastvit_mci0", "branched"),
        ("fastvithd", "fastvit_mci3", "folded"),
        ("clip_vit_l_336", "vit_large_patch14_clip_336", ""),
        ("convnext_l", "convnext_large", ""),
    ],
)
def test_encoders_count_as_timm_does(vision, name, form):
    config = get_base(f"tiny,{vision}").model.vision
    if form:
        config.form = form
    if config.get("family") == "vit":
        config.select_layer = -1
    side = config.get("image_size", 256)
    with torch.device("meta"):
        folded = {"inference_mode": form == "folded"} if form else {}
        reference = torch_reference.timm.create_model(name, num_classes=0, **folded)
        images = torch.empty(2, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        reference.forward_features(images)
    counted = flops.forward_flops(fastvlm.build(config.to_dict()), 2, side, side, 0, 0)
    assert counted["vision"] == counter.get_total_flops()


@pytest.mark.parametrize("name, trained", [("0.5b", True), ("7b", False)])
def test_decoders_count_as_transformers_do_forward_and_backward(name, trained):
    llm = get_base(name).model.llm
    sizes = dict(
        hidden_size=llm.width,
        num_hidden_layers=2,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        intermediate_size=llm.mlp_dim,
        vocab_size=llm.vocab_size,
        tie_word_embeddings=llm.tie_embeddings,
        attn_implementation="eager",
    )
    kind = ("Qwen2Config", "Qwen2ForCausalLM") if llm.qkv_bias else ("LlamaConfig", "LlamaForCausalLM")
    with torch.device("meta"):
        reference = getattr(transformers, kind[1])(getattr(transformers, kind[0])(**sizes)).requires_grad_(trained)
        embeddings = torch.empty(3, 40, llm.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        logits = reference(inputs_embeds=embeddings).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    llm.update(num_layers=2)
    model = fastvlm.build(get_base("tiny").model.vision.to_dict(), llm.to_dict())
    learning = "llm" if trained else "projector"
    groups = ((f"{learning}/.*", 1.0, 0.0), (".*", 0.0, 0.0))
    trainable, _ = optim.split(kinds.abstract_variables(model)["params"], groups)
    size = (0, 64, 64, 3, 40)
    assert sum(flops.forward_flops(model, *size, causal=False).values()) == forward
    assert sum(flops.train_flops(model, trainable, *size, causal=False).values()) == counter.get_total_flops()
