"""Times both forms of the depthwise convolution on this machine: python -m fastvlm_jax.bench.kernels

Prints a markdown table of milliseconds: XLA's convolution against `depthwise_conv`, which on a CPU is the shifted form.
The forms take turns, call by call, so that other work on the machine slows both. Each time is a median.
"""

import functools
import statistics
import time

import jax

from fastvlm_jax.kernels import depthwise

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
    times = [[] for _ in calls]
    for _ in range(rounds + 1):  # the first round compiles
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds[1:]) for seconds in times]


def main():
    print("| x | k | stride | m | fwd: conv | depthwise_conv | ratio | fwd+bwd: conv | depthwise_conv | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape, k, stride, multiplier in SHAPES:
        conv, ours, conv_both, ours_both = milliseconds(shape, k, stride, multiplier)
        cells = ["x".join(map(str, shape)), k, stride, multiplier]
        cells += [f"{conv:.2f}", f"{ours:.2f}", f"{conv / ours:.1f}"]
        cells += [f"{conv_both:.2f}", f"{ours_both:.2f}", f"{conv_both / ours_both:.1f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
