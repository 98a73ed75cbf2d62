"""Times the forms of the encoder's kernels on this machine: `fastvlm bench kernels`

Prints markdown tables of milliseconds: XLA's depthwise convolution against `depthwise_conv`, which on a CPU is the
shifted form, then the plain perceptron and attention against this platform's forms of the forward pass. The forms take
turns, call by call, so that other work on the machine slows both. Each time is a median.
"""

import functools
import statistics
import time

import jax

from fastvlm_jax.kernels import depthwise, mlp
from fastvlm_jax.kernels.self_attention import by_heads, self_attention

# (B, H, W, C), kernel size, stride, outputs per channel: the tiny tower at 64 px, then its larger maps at 128 px, then
# maps of larger towers, at last of FastViTHD at 512 px.
SHAPES = [
    ((32, 32, 32, 16), 3, 2, 1),
    ((32, 16, 16, 16), 7, 1, 1),
    ((32, 16, 16, 16), 3, 1, 1),
    ((32, 16, 16, 16), 7, 2, 2),
    ((32, 8, 8, 32), 7, 1, 1),
    ((32, 8, 8, 32), 3, 1, 1),
    ((32, 8, 8, 32), 7, 2, 2),
    ((32, 4, 4, 64), 7, 1, 1),
    ((32, 4, 4, 64), 7, 2, 2),
    ((32, 2, 2, 128), 7, 1, 1),
    ((32, 2, 2, 128), 7, 2, 2),
    ((32, 1, 1, 256), 7, 1, 1),
    ((32, 1, 1, 256), 3, 1, 2),
    ((32, 64, 64, 16), 3, 2, 1),
    ((32, 32, 32, 16), 7, 1, 1),
    ((32, 32, 32, 16), 7, 2, 2),
    ((4, 64, 64, 96), 7, 1, 1),
    ((8, 32, 32, 192), 7, 1, 1),
    ((1, 64, 64, 192), 7, 1, 1),
    ((1, 32, 32, 384), 7, 1, 1),
]
# (B, H, W, C): maps of FastViTHD at 1024 px, the last two with attention.
MAPS = [(1, 256, 256, 96), (1, 128, 128, 192), (1, 64, 64, 384), (1, 32, 32, 768), (1, 16, 16, 1536)]


def forward_and_backward(conv, x, kernel, dy):
    """Returns the output of `conv` and the gradients of its input and kernel."""
    y, vjp = jax.vjp(conv, x, kernel)
    return y, vjp(dy)


def milliseconds(shape, k, stride, multiplier, rounds=9):
    """Returns the median ms of [conv forward, depthwise_conv forward, conv both passes, depthwise_conv both passes]."""
    convs = [
        functools.partial(depthwise._conv, stride=stride, padding=((k // 2, k // 2),) * 2),
        functools.partial(depthwise.depthwise_conv, stride=stride),
    ]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (k, k, 1, shape[3] * multiplier))
    dy = jax.random.normal(keys[2], convs[1](x, kernel).shape)
    both = [functools.partial(forward_and_backward, conv) for conv in convs]
    calls = [functools.partial(jax.jit(conv), x, kernel) for conv in convs]
    calls += [functools.partial(jax.jit(conv), x, kernel, dy) for conv in both]
    return in_turns(calls, rounds)


def in_turns(calls, rounds):
    """Returns the median milliseconds of each call."""
    times = [[] for _ in calls]
    for _ in range(rounds + 1):  # the first round compiles
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds[1:]) for seconds in times]


def milliseconds_of_perceptron(shape, rounds=5):
    """Returns the median ms of [plain, mlp], forward, with four times as many hidden channels."""
    C = shape[3]
    sizes = [shape, (C, 4 * C), (4 * C,), (4 * C, C), (C,)]
    arrays = [jax.random.normal(jax.random.key(i), size) for i, size in enumerate(sizes)]
    forms = [jax.jit(form) for form in (mlp.plain, mlp.mlp)]
    return in_turns([functools.partial(form, *arrays) for form in forms], rounds)


def milliseconds_of_attention(shape, rounds=5):
    """Returns the median ms of [by_heads, self_attention], forward, with heads of 32 channels."""
    B, H, W, C = shape
    qkv = jax.random.normal(jax.random.key(0), (B, H * W, 3 * C))
    forms = [jax.jit(functools.partial(form, head_dim=32)) for form in (by_heads, self_attention)]
    return in_turns([functools.partial(form, qkv) for form in forms], rounds)


def main():
    """Prints the tables, row by row."""
    print("| x | k | stride | m | fwd: conv | depthwise_conv | ratio | fwd+bwd: conv | depthwise_conv | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape, k, stride, multiplier in SHAPES:
        conv, ours, conv_both, ours_both = milliseconds(shape, k, stride, multiplier)
        cells = ["x".join(map(str, shape)), k, stride, multiplier]
        cells += [f"{conv:.2f}", f"{ours:.2f}", f"{conv / ours:.1f}"]
        cells += [f"{conv_both:.2f}", f"{ours_both:.2f}", f"{conv_both / ours_both:.1f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    print("\n| x | forward pass of | plain | this platform's | ratio |")
    print("|---|---|---|---|---|")
    timed = [(shape, "mlp", milliseconds_of_perceptron) for shape in MAPS]
    timed += [(shape, "self_attention", milliseconds_of_attention) for shape in MAPS[3:]]
    for shape, name, time_forms in timed:
        plain, ours = time_forms(shape)
        print(f"| {'x'.join(map(str, shape))} | {name} | {plain:.1f} | {ours:.1f} | {plain / ours:.2f} |", flush=True)
