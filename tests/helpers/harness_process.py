"""Runs a snippet beside the unpacked package of another harness; see harness.py. Modules that are missing are stubs."""

import importlib
import importlib.machinery
import json
import sys
import types


class Anything:
    """Stands for whatever a missing module would give: it can be called, indexed, decorated with and read from."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, key):
        return Anything()

    def __iter__(self):
        return iter(())

    def __or__(self, other):
        return Anything()

    __ror__ = __or__

    def __mro_entries__(self, bases):
        return (object,)


class Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Finder:
    """Finds a stub: asked first for modules that take long to load, and last for those that nothing else finds."""

    def __init__(self, wanted):
        self.wanted = wanted

    def find_spec(self, name, path=None, target=None):
        package = name.split(".")[0]
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self.wanted(package) else None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


HEAVY = {"torch", "torchvision", "transformers", "accelerate", "datasets", "pandas", "matplotlib", "wandb", "jax"}
HEAVY |= {"sklearn", "scipy"}
PACKAGES = {"lmms_eval", "llava"}  # of these nothing may be a stub
request = json.load(sys.stdin)
for name in request["before"]:
    importlib.import_module(name)
sys.meta_path.insert(0, Finder(lambda package: package in HEAVY and package not in sys.modules))
sys.meta_path.append(Finder(lambda package: package not in PACKAGES))
sys.path.insert(0, request["path"])
for name in ("llava", "lmms_eval.tasks"):  # their own __init__ loads models and all tasks
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{request['path']}/{name.replace('.', '/')}"]
out, sys.stdout = sys.stdout, sys.stderr  # what the harness prints is not the answer
space: dict = {"Anything": Anything, "Stub": Stub}
exec(compile(request["code"], "snippet", "exec"), space)
json.dump(space["main"](request["value"]), out)
