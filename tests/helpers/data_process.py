"""One process of several that read the same data set: prints a hash of every group that its devices hold, by batch.

python data_process.py PORT PROCESS PROCESSES START COUNT CONFIG.json
"""

import hashlib
import json
import sys

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fastvlm_jax.data.load.from_config import make_loader
from fastvlm_jax.processor import load_processor

port, process, processes, start, count = map(int, sys.argv[1:6])
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=60)
with open(sys.argv[6]) as file:
    settings = json.load(file)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
loader = make_loader(
    ml_collections.ConfigDict(settings["data"]),
    load_processor(settings["processor"]),
    "train",
    seed=7,
    sharding=NamedSharding(mesh, PartitionSpec("data")),
    start=start,
)
for k in range(start, start + count):
    hashes = {}
    for name, array in sorted(vars(next(loader)).items()):
        for shard in array.addressable_shards:
            first = shard.index[0].indices(array.shape[0])[0]
            for g, group in enumerate(np.asarray(shard.data), first):
                hashes.setdefault(g, hashlib.sha256()).update(
                    name.encode() + str(group.shape).encode() + group.tobytes()
                )
    print(json.dumps([k, {g: digest.hexdigest() for g, digest in hashes.items()}]), flush=True)
loader.close()
