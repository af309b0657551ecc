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


def api_page(module: ModuleType) -> str:
    """The module's own words, then every public name."""
    lines = [*title(module.__name__), f".. automodule:: {module.__name__}", "   :no-members:", ""]
    for name in public_names(module):
        thing, full = getattr(module, name), f"{module.__name__}.{name}"
        if inspect.isclass(thing):
            lines += [f".. autoclass:: {full}", "   :members:", "   :show-inheritance:", ""]
        else:
            lines += [f".. {'autofunction' if callable(thing) else 'autodata'}:: {full}", ""]
    return "\n".join(lines)


def facade_page(package: ModuleType, parts: Iterable[ModuleType]) -> str:
    """The names at the top of the package, each with a link to the part that it comes from."""
    parts = [part for part in parts if part is not package]
    lines = [*title(package.__name__), f".. automodule:: {package.__name__}", "   :no-members:", ""]
    for name in public_names(package):
        thing = getattr(package, name)
        home = next((p for p in parts if name in public_names(p) and getattr(p, name) is thing), None)
        lines.append(f"* ``{package.__name__}.{name}``" + (f": :py:obj:`{home.__name__}.{name}`" if home else ""))
    return "\n".join(lines) + "\n"


def write_api(package: ModuleType, folder: Path) -> None:
    """Write ``index.rst`` and one page a public module."""
    modules = public_modules(package)
    folder.mkdir(parents=True, exist_ok=True)
    for module in modules:
        page = facade_page(package, modules) if module is package else api_page(module)
        (folder / f"{module.__name__}.rst").write_text(page, encoding="utf-8")
    index = [*title("API reference"), ".. toctree::", "   :maxdepth: 1", ""]
    index += [f"   {module.__name__}" for module in modules]
    (folder / "index.rst").write_text("\n".join(index) + "\n", encoding="utf-8")


def undocumented(package: ModuleType, documented: Iterable[str]) -> list[str]:
    """The public names of the parts that a finished documentation lacks, given the names that it has."""
    wanted = [f"{m.__name__}.{n}" for m in public_modules(package) if m is not package for n in public_names(m)]
    return sorted(set(wanted) - set(documented))


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
