"""The pages that are written anew with every build: the API reference, the tutorials, the tables of the benchmarks.

No page of the reference is kept by hand, so none can forget a name: each public module gets a page
with every name of its ``__all__``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

NOT_A_LIBRARY = ("demo",)  # a program that stands in the package so that it can be run


def public_modules(package: ModuleType) -> list[ModuleType]:
    """The package, its public parts, and every module that one of them lists in its ``__all__``."""
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    found = [package, *(importlib.import_module(f"{package.__name__}.{n}") for n in names if n not in NOT_A_LIBRARY)]
    for module in found:  # grows while it runs
        below = [getattr(module, name) for name in getattr(module, "__all__", ())]
        found += [m for m in below if inspect.ismodule(m) and m not in found]
    return found


def public_names(module: ModuleType) -> list[str]:
    """The names of ``__all__`` that are not modules: those have pages of their own."""
    return [name for name in getattr(module, "__all__", ()) if not inspect.ismodule(getattr(module, name))]


def title(text: str, underline: str = "=") -> list[str]:
    """A heading of reStructuredText."""
    return [text, underline * len(text), ""]


def home(name: str, module: ModuleType, parts: Iterable[ModuleType]) -> ModuleType | None:
    """The first of ``parts`` that shows what ``module`` calls ``name``: a thing is described once, then linked."""
    thing = getattr(module, name)
    return next((p for p in parts if name in public_names(p) and getattr(p, name) is thing), None)


def api_page(module: ModuleType, parts: Iterable[ModuleType]) -> str:
    """The module's own words, then every public name: described here, or a link to the part that describes it."""
    lines = [*title(module.__name__), f".. automodule:: {module.__name__}", "   :no-members:", ""]
    links = []
    for name in public_names(module):
        thing, full, where = getattr(module, name), f"{module.__name__}.{name}", home(name, module, parts)
        if where is not module:
            links.append(f"* ``{full}``" + (f": :py:obj:`{where.__name__}.{name}`" if where else ""))
        elif inspect.isclass(thing):
            lines += [f".. autoclass:: {full}", "   :members:", "   :show-inheritance:", ""]
        else:
            lines += [f".. {'autofunction' if callable(thing) else 'autodata'}:: {full}", ""]
    return "\n".join([*lines, *links]) + "\n"


def write_api(package: ModuleType, folder: Path) -> None:
    """Write ``index.rst`` and one page a public module."""
    modules = public_modules(package)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [module for module in modules if module is not package]
    for module in modules:
        (folder / f"{module.__name__}.rst").write_text(api_page(module, parts), encoding="utf-8")
    index = [*title("API reference"), ".. toctree::", "   :maxdepth: 1", ""]
    index += [f"   {module.__name__}" for module in modules]
    (folder / "index.rst").write_text("\n".join(index) + "\n", encoding="utf-8")


def undocumented(package: ModuleType, documented: Iterable[str]) -> list[str]:
    """The public names of the parts that a finished documentation lacks, given the names that it has."""
    parts = [module for module in public_modules(package) if module is not package]
    wanted = {f"{m.__name__}.{n}" for m in parts for n in public_names(m) if home(n, m, parts) is m}
    return sorted(wanted - set(documented))


def copy_pages(source: Path, pattern: str, folder: Path, heading: str, empty: str) -> None:
    """Copy the files of ``source`` that match, and write an ``index.rst`` that lists them, or says ``empty``."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = sorted(source.glob(pattern))
    for page in pages:
        shutil.copyfile(page, folder / page.name)
    lines = title(heading)
    lines += [".. toctree::", "   :maxdepth: 1", "", *(f"   {page.stem}" for page in pages)] if pages else [empty]
    (folder / "index.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_all(package: ModuleType, root: Path) -> None:
    """Write every generated page of the repository at ``root``; what an earlier build wrote is removed."""
    docs = root / "docs"
    for folder in (docs / "generated", docs / "tutorials"):
        shutil.rmtree(folder, ignore_errors=True)
    write_api(package, docs / "generated" / "api")
    copy_pages(root / "tutorials", "*.ipynb", docs / "tutorials", "Tutorials", "There is no tutorial yet.")
    results = root / "benchmarks" / "results"
    empty = "No benchmark has been recorded yet."
    copy_pages(results, "*.md", docs / "generated" / "benchmarks", "Benchmark tables", empty)
