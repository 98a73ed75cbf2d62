"""Draws docs/kernels_stage.svg, one turn of a stage's loops: python docs/kernels_stage.py"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

KERNEL, STACK, HERE = "#dbe8f6", "#f4f4f4", "#ffe2a8"


def stack(axis, left: float, top: float, name: str, cells: list[str], marked: dict[int, str]) -> dict[int, tuple]:
    """Draws a stack of layers; returns the middle of the left and of the right side of each."""
    sides = {}
    axis.text(left + 0.65, top + 0.12, name, ha="center", va="bottom", fontsize=9)
    for i, cell in enumerate(cells):
        y = top - 0.45 * (i + 1)
        axis.add_patch(Rectangle((left, y), 1.3, 0.45, facecolor=marked.get(i, STACK), edgecolor="#555"))
        axis.text(left + 0.65, y + 0.22, cell, ha="center", va="center", fontsize=9)
        sides[i] = (left, y + 0.22), (left + 1.3, y + 0.22)
    return sides


def kernel(axis, left: float, y: float, name: str) -> tuple:
    """Draws a kernel; returns the middles of its left, right, upper and lower side."""
    box = FancyBboxPatch((left, y), 2.7, 0.62, boxstyle="round,pad=0.02", facecolor=KERNEL, edgecolor="#3465a4")
    axis.add_patch(box)
    axis.text(left + 1.35, y + 0.31, name, ha="center", va="center", fontsize=9)
    return (left, y + 0.31), (left + 2.7, y + 0.31), (left + 1.35, y + 0.64), (left + 1.35, y - 0.02)


def arrow(axis, start, end, text: str = "", bend: float = 0.0, beside: float = 0.1, style: str = "-") -> None:
    """Draws an arrow with a word beside its middle."""
    look = dict(arrowstyle="-|>", color="#333", linestyle=style, connectionstyle=f"arc3,rad={bend}")
    axis.annotate("", end, start, arrowprops=look)
    middle = (start[0] + end[0]) / 2 + beside, (start[1] + end[1]) / 2
    axis.text(*middle, text, fontsize=9, va="center")


def forward(axis) -> None:
    """Draws turn l of the forward loop."""
    axis.set_title("forward, turn l", fontsize=10, loc="left")
    xs = stack(axis, 0, 4, "xs [L, B, H, W, C]", ["x 0", "...", "x l", "x l+1"], {2: HERE, 3: HERE})
    weights = stack(axis, 6.2, 4, "weights [L, ...]", ["w 0", "...", "w l", "w l+1", "..."], {2: HERE})
    first, second, third = (kernel(axis, 2.4, y, name) for y, name in NAMES)
    arrow(axis, xs[2][1], first[0])
    arrow(axis, first[3], second[2], "y")
    arrow(axis, second[3], third[2], "h")
    arrow(axis, (2.38, 3.2), (2.38, 1.45), "+ y", bend=0.3, beside=-0.62)
    arrow(axis, third[0], (0.65, 2.2), bend=-0.35)
    for each in (first, second, third):
        arrow(axis, weights[2][0], each[1], style=":")


def backward(axis) -> None:
    """Draws turn l of the backward loop."""
    axis.set_title("backward, turn l (from the last block to the first)", fontsize=10, loc="left")
    xs = stack(axis, 0, 4, "xs", ["x 0", "...", "x l", "x l+1", "..."], {2: HERE})
    sums = stack(axis, 6.2, 3.3, "sums [L, ...]", ["dw 0", "...", "dw l", "dw l+1", "..."], {2: HERE})
    last, second, third = (kernel(axis, 2.4, y, name) for y, name in BACKWARD)
    again = kernel(axis, 2.4, 4.1, "depthwise 3x3, 7x7 again")
    arrow(axis, xs[2][1], again[0], "x", beside=-0.2)
    arrow(axis, again[3], last[2], "y, h")
    arrow(axis, last[3], second[2], "dh")
    arrow(axis, second[3], third[2], "dy")
    arrow(axis, (5.85, 4.3), (4.9, 3.45), "dx l+1", beside=0.15)
    arrow(axis, third[3], (3.75, -0.3), "dx l, carried to the next turn")
    for each in (last, second, third):
        arrow(axis, each[1], sums[2][0], style=":")


NAMES = [(3.0, "depthwise 3x3"), (2.0, "depthwise 7x7"), (1.0, "fc1, GELU, fc2")]
BACKWARD = [(2.8, "fc1, GELU, fc2 backward"), (1.7, "7x7 backward, + dx l+1"), (0.6, "3x3 backward")]


def main() -> None:
    """Draws both loops side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for axis, draw in zip(axes, (forward, backward), strict=True):
        draw(axis)
        axis.set(xlim=(-0.7, 7.7), ylim=(-0.5, 4.9), aspect="equal")
        axis.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "fastvlm_jax"}):
        figure.savefig(pathlib.Path(__file__).with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
