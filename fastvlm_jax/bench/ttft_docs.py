"""Writes the tables of docs/ttft.md: `python -m fastvlm_jax.bench.ttft_docs [--folder DIR] [--only WORD]`.

Each case is one `fastvlm bench ttft` in its own process, with its JSON in the folder. A case that has its JSON is not
run again, so the command can be stopped and continued, and --only=none runs none. Results of other machines count too:
copy their JSON files into the folder. The estimates take hours on two cores; the tables are written after each case.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from fastvlm_jax.bench import ttft_page
from fastvlm_jax.bench.page import markdown_table
from fastvlm_jax.bench.paper_ttft import MACHINE
from fastvlm_jax.files import write_whole

CONFIG = "--config=configs/stage2_instruct.py:0.5b"
CPU = (CONFIG, "--dtype=float32")
# Four layers of the language model, so that two models fit into memory beside each other.
AGAINST = (*CPU, "--config.model.llm.num_layers=4", "--against=transformers")
SIZES = (256, 512, 768, 1024, 1536)
# Name of the JSON file -> flags of `fastvlm bench ttft`.
CASES = {
    **{f"cpu-{side}": (*CPU, f"--image_size={side}") for side in (256, 512, 768)},
    "cpu-1024": (*CPU, "--image_size=1024", "--runs=10"),
    "against-512": (*AGAINST, "--image_size=512"),
    "against-1024": (*AGAINST, "--image_size=1024", "--runs=10"),
    **{
        f"{chip[:3]}-{side}": (CONFIG, f"--image_size={side}", f"--topology={chip}")
        for side in SIZES
        for chip in ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")
    },
}
BEGIN, END = "<!-- tables: python -m fastvlm_jax.bench.ttft_docs -->", "<!-- end of the tables -->"


def main(argv: Sequence[str]) -> None:
    """Runs the missing cases and writes the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    folder, page = pathlib.Path(flags.FLAGS.folder), pathlib.Path(flags.FLAGS.output)
    missing = {
        name: case
        for name, case in CASES.items()
        if flags.FLAGS.only in name and not (folder / f"{name}.json").is_file()
    }
    for name, case in missing.items():
        print(name, flush=True)
        command = [sys.executable, "-m", "fastvlm_jax", "bench", "ttft", *case, f"--output={folder / name}.json"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # what fails says why, and has no file
        fill(page, folder)
    fill(page, folder)
    if failed := [name for name in missing if not (folder / f"{name}.json").is_file()]:
        raise SystemExit(f"no result of {', '.join(failed)}; the other tables are written")


def fill(page: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the tables of the results in a folder between the marks in a page."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    before, _, rest = page.read_text().partition(BEGIN)
    written = f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{rest.partition(END)[2]}"
    write_whole(page, written.encode())


def tables(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns all tables in markdown: a resolution of every machine, then the parts on each, then the comparisons."""
    points = sorted((point for result in found for point in result["points"]), key=_order)
    against = sorted((row for result in found for row in result["against"]), key=_order)
    if not points:
        return "No results yet."
    machines: dict[str, list] = {}
    for point in points:
        machines.setdefault(machine(point), []).append(point)
    whole = {name: own for name, own in machines.items() if " of " not in own[0]["llm"]}
    blocks = [f"### Encoder and prefill of the image tokens (the paper's TTFT), ms\n\n{side_by_side(whole)}"]
    for name, own in machines.items():
        blocks.append(f"### {name}\n\n{ttft_page.about(own)}\n\n{ttft_page.parts_table(own)}")
        if own[0]["measured"]:
            blocks.append(ttft_page.sums_table(own))
    if against:
        blocks.append(f"### Against transformers: measured, medians\n\n{ttft_page.against_table(against)}")
    return "\n\n".join(blocks)


def _order(point: Mapping[str, Any]) -> tuple:
    return not point["measured"], point["device"], point["llm"], point["image_size"], point["grid"] or []


def machine(point: Mapping[str, Any]) -> str:
    """Returns what a column is about: machine, model, dtype, and whether its times are measured or estimated."""
    how = "measured" if point["measured"] else "estimated by the TPU compiler"
    return f"{point['device']}, {point['encoder']} and {point['llm']}, {point['dtype']}: {how}"


def side_by_side(machines: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns a row a resolution and a column a machine, the paper's last."""
    by_name = {name: {ttft_page.resolution(point): point for point in own} for name, own in machines.items()}
    shown = {ttft_page.resolution(point): point for own in machines.values() for point in own}
    rows = []
    for size in sorted(shown, key=lambda size: (shown[size]["image_tokens"], size)):
        cells = [ttft_page.paper_sum(own[size]) if size in own else "-" for own in by_name.values()]
        rows.append([size, f"{shown[size]['image_tokens']:,}", *cells, ttft_page.printed(shown[size])])
    header = ["image", "tokens", *by_name, f"the paper's Table 10 ({MACHINE}): measured by its authors"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    flags.DEFINE_string("folder", "runs/ttft", "folder of the results, one JSON file per case")
    flags.DEFINE_string("output", "docs/ttft.md", "page whose tables are written")
    flags.DEFINE_string("only", "", "run only cases whose name contains this word; empty = all")
    app.run(main)
