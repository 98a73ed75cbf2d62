"""Imports run downwards: a room imports from rooms below it alone, and no two files import each other in a circle."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest
from paths import ROOT

# From the roof to the ground, one floor a line. A file belongs to the longest name that it begins with.
PLAN = """
__main__
cli
finetune
sweep
preflight.table
preflight.table_cases
preflight
preflight.hlo
preflight.topology
report lmms_eval chat
train
bench
reinforce
stage
faults
parent
fastvlm_jax
model_io
adapted
adapt
metrics
checkpoint
workdir
changes
evaluate.samples
evaluate.validation
evaluate.suite evaluate.contamination
evaluate.looked_for
evaluate.benchmarks
evaluate
evaluate.scores
distributed
data.inspect data.sets
data.load data.write
data.readers.apart
data.readers.recognise
data.readers
data.index data.rejected data.captions
data.sources
data.features
data.record
data
train_step
pair_loss
losses
train_state
guard
config_checks
config_values
config
convert
convert.layouts
convert.tables convert.heads convert.vocabulary convert.new_folder convert.prefixes convert.squeezed
convert.recognise
convert.weight_files
convert.mapping
generate
sampling
loaded
models
pair_processor
processor
kernels
text images
gguf_file
lock
optim sharding batch chips disk files xla_flags
"""
FLOOR = {room: number for number, line in enumerate(PLAN.splitlines()) for room in line.split()}
# Comparisons with PyTorch, and the TPU compiler, are asked for in these rooms only, and there inside functions.
FOREIGN = {"torch", "torchvision", "transformers", "libtpu"}
FOREIGN_ROOMS = ("bench", "preflight")


def module_name(path: pathlib.Path) -> str:
    """fastvlm_jax/data/load/loader.py -> data.load.loader; a package has the name of its folder."""
    parts = path.relative_to(ROOT / "fastvlm_jax").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "fastvlm_jax"


MODULES = {module_name(path): path for path in (ROOT / "fastvlm_jax").rglob("*.py")}


def room_of(module: str) -> str:
    return max((room for room in FLOOR if f"{module}.".startswith(f"{room}.")), key=len, default="")


def imports_of(path: pathlib.Path) -> list[tuple[str, bool]]:
    """(imported module, whether a function imports it) of a file, in dotted names."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                own = whole.removeprefix("fastvlm_jax.") in MODULES
                found.append((whole if own else node.module, id(node) in inside))
    return found


def own_imports() -> list[tuple[str, str]]:
    """(importing, imported) modules of the package, inside functions too."""
    pairs = []
    for module, path in MODULES.items():
        for name, _ in imports_of(path):
            if name.split(".")[0] == "fastvlm_jax":
                pairs.append((module, name.removeprefix("fastvlm_jax.")))
    return pairs


def test_every_file_has_its_room():
    assert [module for module in MODULES if not room_of(module)] == []
    assert sorted(set(FLOOR) - {room_of(module) for module in MODULES}) == []


def test_imports_run_downwards():
    uphill = [
        f"{importing} imports {imported}"
        for importing, imported in own_imports()
        if (a := room_of(importing)) != (b := room_of(imported)) and FLOOR[a] >= FLOOR[b]
    ]
    assert uphill == []


def test_no_files_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for importing, imported in own_imports():
        if importing != imported:
            graph.setdefault(importing, set()).add(imported)
    graphlib.TopologicalSorter(graph).prepare()


def test_pytorch_and_the_tpu_compiler_stay_inside_functions_of_their_rooms_and_tensorflow_nowhere():
    files = [*MODULES.values(), *(ROOT / "configs").glob("*.py")]
    wrong = []
    for path in files:
        room = room_of(module_name(path)) if path in MODULES.values() else "configs"
        for name, inside in imports_of(path):
            package = name.split(".")[0]
            allowed = inside and room.split(".")[0] in FOREIGN_ROOMS
            # lmms-eval imports its model from one folder, which nothing else imports.
            if package in ("tensorflow", "timm", "open_clip") or (package in FOREIGN and not allowed):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if "lmms_eval" in (package, *name.split(".")[1:2]) and room != "lmms_eval":
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded behind `code`."""
    script = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import fastvlm_jax.model_io, fastvlm_jax.generate, fastvlm_jax.convert, fastvlm_jax.processor",
        "import fastvlm_jax.evaluate.suite",
    ],
)
def test_asking_a_model_imports_nothing_of_the_training_pipeline(code):
    loaded = imported_by(code)
    training = ("data.load", "data.write", "data.inspect", "data.sets", "train", "train_step", "losses", "stage")
    assert "fastvlm_jax.processor" in loaded
    own = [name.removeprefix("fastvlm_jax.") for name in loaded if name.startswith("fastvlm_jax.")]
    assert [name for name in own if f"{name}.".startswith(tuple(f"{room}." for room in training))] == []
    assert not {"tensorflow", "torch", "transformers", "grain"} & loaded


def test_training_loads_no_pytorch_where_there_is_one():
    assert not {"tensorflow", "torch", "transformers"} & imported_by("import fastvlm_jax.train")


def test_help_loads_no_jax():
    loaded = imported_by("import fastvlm_jax.cli")
    assert not {"jax", "numpy", "flax", "ml_collections"} & loaded


def test_files_are_short_enough_to_read():
    long = {module: count for module, path in MODULES.items() if (count := len(path.read_text().splitlines())) > 350}
    assert long == {}
