"""Times how long this package and transformers take to read Qwen2-0.5B: random bfloat16 weights, read as float32.

    python -m fastvlm_jax.bench.weights [--rounds 5] [--folder DIR]

Both read the same file, warm in the page cache, each in a process of its own, and take turns; every element is touched.
The clock starts after the libraries are imported.
"""

import json
import statistics
import subprocess
import sys
import tempfile

from absl import app, flags

ROUNDS = flags.DEFINE_integer("rounds", 5, "runs of each, which take turns; medians are printed", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "model directory to read; by default one is made, then removed")

OURS = """
import time, jax, jax.numpy as jnp
from fastvlm_jax import convert
from fastvlm_jax.convert.mapping import read_tree
jnp.zeros(1).block_until_ready()
start = time.perf_counter()
_, variables = convert.load_weights(FOLDER)
variables = jax.block_until_ready(read_tree(variables, put=jax.device_put))
seconds = time.perf_counter() - start
assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
"""
# A torchvision built for another torch lacks these operators; transformers only needs their names.
IMPORTS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in () if torch.cuda.is_available() else ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
THEIRS = """
import time
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
total = sum(p.sum().item() for p in model.parameters())
seconds = time.perf_counter() - start
"""


MAKE = """
from transformers import Qwen2Config, Qwen2ForCausalLM
config = Qwen2Config(vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                     num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True)
Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(FOLDER)
seconds = 0
"""


def seconds(code: str, folder: str) -> float:
    """Runs a snippet in a new process and returns the seconds that it measured."""
    program = f"FOLDER = {folder!r}\n{code}\nprint('seconds', seconds)"
    out = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(out.split()[-1])


def main(_):
    with tempfile.TemporaryDirectory() as scratch:
        folder = FOLDER.value or scratch
        if FOLDER.value is None:
            seconds(IMPORTS + MAKE, folder)
        rounds = [(seconds(OURS, folder), seconds(IMPORTS + THEIRS, folder)) for _ in range(ROUNDS.value)]
    ours, theirs = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = [a / b for a, b in rounds]
    print(
        json.dumps(
            {"ratio": round(statistics.median(ratios), 2), "ours_s": round(ours, 2), "transformers_s": round(theirs, 2)}
        )
    )


if __name__ == "__main__":
    app.run(main)
