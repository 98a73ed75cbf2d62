"""Estimates from a compiled program whether it fits, how long a step takes, and what limits its speed."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax

from fastvlm_jax import optim
from fastvlm_jax.config_values import rows_of
from fastvlm_jax.models import flops
from fastvlm_jax.preflight import kernels
from fastvlm_jax.preflight.compile import Compiled, device_bytes, needed
from fastvlm_jax.preflight.hlo import cost, network
from fastvlm_jax.preflight.hlo.cost import Operation, Program
from fastvlm_jax.preflight.hlo.parse import parse
from fastvlm_jax.preflight.topology import Slice

# Records in the data sets that the stage files name (paper, Tables 8 and 9, appendix D; 11.9M and 12.5M are sums).
RECORDS = {
    "llava_558k": 558_000, "recap_cc3m": 3_000_000, "recap_cc12m": 12_000_000, "llava_665k": 665_000,
    "internvl_1.1m": 1_100_000, "cambrian_5.4m": 5_400_000, "onevision_single_image": 5_400_000,
    "docmatix_0.6m": 600_000, "mammoth_vl_10.6m": 10_600_000, "datacompdr_12m": 12_800_000,
    "datacompdr_1b": 1_280_000_000,
}  # fmt: skip
PARTS = ("vision", "projector", "llm", "text", "loss", "optimizer", "other")


FETCHES = ("copy-start", "async-start")  # opcodes of copies into on-chip memory beside the computation


def part_of(path: str) -> str:
    """Returns the part of the model, one of PARTS, to which an operation belongs by its op_name."""
    if "/seldom/" in path:
        return "other"
    if "loss_of_pairs" in path:
        return "loss"
    if "CLIP" in path:
        return "vision" if "/vision" in path or "image_head" in path else "text" if "/text" in path else "other"
    if "FastVLM" not in path:
        return "optimizer" if path.startswith(("jit(train_step)/", "state.")) else "other"
    if "/vision" in path:
        return "vision"
    if "/projector" in path:
        return "projector"
    return "loss" if "/llm/shard_map" in path or "cross_entropy" in path else "llm"


def memory(compiled: Compiled, slices: Slice, state, batch) -> dict[str, Any]:
    """Estimates the bytes on one device: state, batch, activations, total, and the limit.

    "activations" is the rest of the total: all else that lives during a step. "compiler" has the compiler's own figures
    or, if it refused the program, its message.
    """
    own, given = device_bytes(state), device_bytes(batch)
    if compiled.memory:
        m = compiled.memory
        total = m["arguments"] + m["outputs"] - m["aliased"] + m["temporaries"] + m["code"]
    else:
        total = max(needed(compiled.out_of_memory), own + given)
    limit = slices.generation.hbm_limit
    return {
        "state": own,
        "batch": given,
        "activations": total - own - given,
        "total": total,
        "limit": limit,
        "fits": not compiled.out_of_memory and total <= limit,
        "compiler": compiled.memory or compiled.out_of_memory,
    }


def parameters(params, groups: optim.Groups) -> dict[str, int]:
    """Counts the parameters: of each module, "all", and "trainable"."""
    trainable, frozen = optim.split(params, groups)
    counted = collections.Counter()
    for path, leaf in {**trainable, **frozen}.items():
        counted[path.split("/")[0]] += math.prod(leaf.shape)
    learning = sum(math.prod(leaf.shape) for leaf in trainable.values())
    return {**counted, "all": sum(counted.values()), "trainable": learning}


def step_flops(model, config, params) -> dict[str, dict[str, float]]:
    """Counts the FLOPs of a step over all devices, by part.

    "model" is the count that MFU is based on; "hardware" adds recomputation.
    """
    data = config.data
    rows, length = rows_of(config)
    sizes = (data.groups * data.images_per_group, data.image_size, data.image_size, data.groups * rows, length)
    trainable = optim.split(params, config.groups)[0].keys()
    return {
        "model": flops.train_flops(model, trainable, *sizes),
        "hardware": flops.hardware_flops(model, trainable, *sizes),
    }


def cycles_of(operation: Operation, slices: Slice) -> float:
    """Estimates the cycles of all trips of an operation.

    The compiler gives none for Pallas kernels: see `kernels.cycles`.
    """
    if operation.cycles is not None:
        return float(operation.cycles * operation.trips)
    if not operation.kernel:
        return 0.0
    return kernels.cycles(operation, slices)[0] * operation.trips


def hbm_seconds(operation: Operation, slices: Slice) -> float:
    """Estimates how long HBM is busy with all trips of an operation, at most the operation's own time.

    Transfers that run in pieces beside computations name their whole buffer in each piece. They have no cycles, so they
    count as 0. Copies into on-chip memory (FETCHES) have no cycles either, but their traffic is real and counts.
    """
    seconds = operation.traffic * operation.trips / slices.device_bandwidth
    if operation.opcode in FETCHES:
        return seconds
    return min(seconds, cycles_of(operation, slices) / slices.generation.clock)


def fetching_s(found: Program, slices: Slice) -> float:
    """Estimates how long a program that HBM limits takes, if HBM serves one operation after another.

    An operation that reads HBM itself keeps it busy for all its cycles; what is fetched beside the computation takes
    its bytes over the bandwidth.
    """
    cycles = sum(cycles_of(o, slices) for o in found.operations if o.traffic and o.opcode not in FETCHES)
    fetched = sum(hbm_seconds(o, slices) for o in found.operations if o.opcode in FETCHES)
    return cycles / slices.generation.clock + fetched


def timing(found: Program, slices: Slice, devices: Sequence) -> dict[str, Any]:
    """Estimates the seconds of a program on each device.

    In each loop, and outside all loops, transfers that the schedule starts early run beside the computation there:

        compute   ======  ======         scheduled = compute + blocking + max(0, early - compute)
        early       ~~~~~~~~~~~~         hidden    = max(compute, ICI, DCN), if every transfer ran beside computation
        blocking        ##      ##       serial    = the sum, if none did
    """
    clock, rows = slices.generation.clock, collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for operation in found.operations:
        rows[operation.loop][0] += cycles_of(operation, slices) / clock
    for collective in found.collectives:
        seconds = network.seconds(collective, slices, devices) * collective.trips
        rows[collective.loop][1 if collective.group else 2] += seconds
        rows[collective.loop][3] += 0.0 if collective.asynchronous else seconds
    compute, ici, dcn, stops = (sum(row[i] for row in rows.values()) for i in range(4))
    left = sum(max(0.0, row[1] + row[2] - row[3] - row[0]) for row in rows.values())
    operations = found.operations
    return {
        "scheduled_s": compute + stops + left,
        "hidden_s": sum(max(row[0], row[1], row[2]) for row in rows.values()),
        "serial_s": compute + ici + dcn,
        "compute_s": compute,
        "roofline": {
            "matrix units": sum((o.flops or o.kernel_flops) * o.trips for o in operations) / slices.device_flops,
            "HBM": sum(hbm_seconds(o, slices) for o in operations),
            "ICI": ici,
            "DCN": dcn,
        },
        "kernels": kernels.listed(found, slices),
    }


def binding(times: dict[str, Any]) -> str:
    """Returns what limits the step: the longest term of the roofline, or the vector units.

    It is the vector units if the computation takes over 1.5 times as long as the longest term: the compiler's cycles
    include vector work, padding and copies, which no term of the roofline counts.
    """
    name, most = max(times["roofline"].items(), key=lambda item: item[1])
    if times["compute_s"] > 1.5 * most:
        return "vector units and layout (compute beyond the matrix units' and HBM's share)"
    return name


def by_part(found: Program, slices: Slice) -> dict[str, float]:
    """Estimates the seconds of computation in each part of the model."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for operation in found.operations:
        seconds[part_of(operation.path)] += cycles_of(operation, slices) / slices.generation.clock
    return seconds


def top_operations(found: Program, slices: Slice, count: int) -> list[dict[str, Any]]:
    """Returns the `count` operations that cost most: name in the model, estimated cycles, share of all cycles."""
    cycles = collections.Counter()
    for operation in found.operations:
        cycles[operation.path or operation.opcode] += cycles_of(operation, slices)
    total = sum(cycles.values()) or 1.0
    return [{"operation": name, "cycles": n, "share": n / total} for name, n in cycles.most_common(count)]


def transfers(found: Program, slices: Slice, mesh: jax.sharding.Mesh) -> list[dict[str, Any]]:
    """Returns the collectives of a step by kind and mesh axes, longest first: count, bytes and estimated seconds."""
    rows, devices = {}, list(mesh.devices.flat)
    for c in found.collectives:
        axes = "x".join(cost.axes_of(c.group, dict(mesh.shape))) if c.group else "slices (DCN)"
        row = rows.setdefault((c.kind, axes), {"count": 0, "bytes": 0.0, "asynchronous": 0, "seconds": 0.0})
        row["count"] += c.trips
        row["asynchronous"] += c.trips * c.asynchronous
        row["bytes"] += c.payload * c.trips
        row["seconds"] += network.seconds(c, slices, devices) * c.trips
    found = [{"kind": kind, "axes": axes, **row} for (kind, axes), row in rows.items()]
    return sorted(found, key=lambda row: -row["seconds"])


def records_of(config, records: int | None) -> float | None:
    """Returns how many records the stage trains on in all epochs.

    Args:
      records: records in one epoch; None sums the data sets of the config that RECORDS knows.

    Returns:
      The number, or None if `records` is None and RECORDS does not have all data sets of the config.
    """
    names = [str(name).rsplit("/", 1)[-1] for name, _ in config.data.mixture]
    if records is None and not config.data.path and names and all(name in RECORDS for name in names):
        records = sum(RECORDS[name] for name in names)
    return None if records is None else records * config.epochs


def train_report(config, model, slices: Slice, mesh, compiled: Compiled, state, batch, records, top) -> dict[str, Any]:
    """Returns all figures of a compiled train step, JSON-ready; every time is an estimate."""
    data = config.data
    rows, length = rows_of(config)
    images, rows = data.groups * data.images_per_group, data.groups * rows
    counts = parameters(state.params, config.groups)
    report = {
        "parameters": counts,
        "batch": {
            "groups": data.groups, "images": images, "image_size": data.image_size, "rows": rows,
            "row_length": length, "tokens": rows * length, "accumulate": config.accumulate,
        },
        "memory": memory(compiled, slices, state, batch),
        "flops": step_flops(model, config, state.params),
    }  # fmt: skip
    if not compiled.text:
        return report
    found = cost.analyse(parse(compiled.text), mesh.devices.size, compiled.schedules)
    times = timing(found, slices, list(mesh.devices.flat))
    times["binding"] = binding(times)
    by_module = by_part(found, slices)
    whole = sum((o.flops or o.kernel_flops) * o.trips for o in found.operations) * mesh.devices.size
    report["flops"] |= {
        "compiled": whole,
        "compiled_over_hardware": whole / sum(report["flops"]["hardware"].values()),
        "compiler_without_trips": compiled.flops,
    }
    report |= {
        "time": {**times, "by_part": by_module},
        "rates": rates(report["flops"]["model"], times, by_module, slices, images, rows * length),
        "collectives": transfers(found, slices, mesh),
        "operations": top_operations(found, slices, top),
    }
    amount = records_of(config, records)
    steps = config.steps or (math.ceil(amount / images) if amount is not None and images else None)
    if steps:
        hours = steps * times["scheduled_s"] / 3600
        report["stage"] = {"records": amount, "steps": steps, "hours": hours, "chip_hours": hours * slices.chips}
    return report


def rates(model_flops, times, by_module, slices: Slice, images: int, tokens: int) -> dict[str, float]:
    """Estimates images/s, tokens/s and MFU.

    MFU is the model FLOPs / the FLOPs that the matrix units can do in the step; for the encoder and the LLM, or the
    text tower, in the computing time of that part.
    """
    peak, step = slices.generation.flops * slices.chips, times["scheduled_s"]
    found = {
        "images/s": images / step,
        "tokens/s": tokens / step,
        "mfu": sum(model_flops.values()) / step / peak,
        "mfu_encoder": model_flops["vision"] / peak / max(by_module["vision"], 1e-12),
    }
    if model_flops["text"]:
        return {**found, "mfu_text": model_flops["text"] / peak / max(by_module["text"], 1e-12)}
    llm = model_flops["llm"] + model_flops["loss"]
    return {**found, "mfu_llm": llm / peak / max(by_module["llm"] + by_module["loss"], 1e-12)}


def encoder_report(
    config, model, slices: Slice, mesh, compiled: Compiled, variables, batch, top: int
) -> dict[str, Any]:
    """Returns the figures of the encoder's forward and backward pass alone; every time is an estimate."""
    images, side = batch.shape[0], config.data.image_size
    counted = flops.forward_flops(model, images, side, side, 0, 0)["vision"]
    report = {
        "batch": {"images": images, "image_size": side},
        "memory": memory(compiled, slices, variables, batch),
        "flops": {"model": {"vision": 3 * counted}},
    }
    if not compiled.text:
        return report
    found = cost.analyse(parse(compiled.text), mesh.devices.size, compiled.schedules)
    times = timing(found, slices, list(mesh.devices.flat))
    report["flops"]["compiled"] = (
        sum((o.flops or o.kernel_flops) * o.trips for o in found.operations) * mesh.devices.size
    )
    report["time"] = {**times, "binding": binding(times)}
    return report | {"operations": top_operations(found, slices, top)}


def generate_report(config, model, slices: Slice, mesh, compiled: Compiled, variables, batch, asked) -> dict[str, Any]:
    """Returns the estimated time to the first token and the time of each further one, with memory and transfers.

    "weights_s" is the least time of a further token: that in which HBM brings the LLM's weights once.

    Args:
      asked: {"rows", "prompt_tokens", "max_tokens"}; see run.Options.
    """
    tokens = batch.tokens.shape[-1]
    report = {
        "batch": {**asked, "tokens_of_a_row": tokens, "image_size": config.data.image_size},
        "memory": memory(compiled, slices, variables, batch),
        "flops": {
            "prefill": flops.forward_flops(
                model, asked["rows"], config.data.image_size, config.data.image_size, asked["rows"], tokens
            )
        },
    }
    if not compiled.text:
        return report
    found = cost.analyse(parse(compiled.text), mesh.devices.size, compiled.schedules)
    devices = list(mesh.devices.flat)
    prefill = timing(found, slices, devices)
    report["time"] = {"prefill": {**prefill, "binding": binding(prefill), "by_part": by_part(found, slices)}}
    if found.unknown:
        step = timing(found.unknown[0], slices, devices)
        step["scheduled_s"] = max(step["scheduled_s"], fetching_s(found.unknown[0], slices))
        weights = dict(variables["params"]["llm"])
        if "lm_head" in weights:  # then one row of the embedding table is read, not the table
            del weights["embedding"]
        step["weights_s"] = device_bytes(weights) / slices.device_bandwidth
        report["time"]["decode"] = {**step, "binding": binding(step)}
        report["rates"] = {"tokens/s": asked["rows"] / step["scheduled_s"]}
        report["collectives"] = transfers(found, slices, mesh) + transfers(found.unknown[0], slices, mesh)
    return report
