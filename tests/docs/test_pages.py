"""Every public name has its place in the API reference."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import pyro_ssm

DOCS = str(Path(__file__).parents[2] / "docs")


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("pages")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A class, a function, a constant, a module listed by its parent, and what is not to be shown."""
    files = {
        "__init__.py": '"""Facade."""\nfrom toy.laws import Law\n__all__ = ["Law"]\n',
        "laws/__init__.py": '"""Laws."""\nfrom toy.laws import flat\nfrom toy.laws.law import Law, make\nSIZE = 3\n'
        '__all__ = ["Law", "SIZE", "flat", "make"]\n',
        "laws/law.py": 'class Law:\n    """L."""\ndef make():\n    """M."""\ndef hidden():\n    """H."""\n',
        "laws/flat.py": '"""Flat."""\n__all__ = ["even"]\ndef even():\n    """E."""\n',
        "_private.py": '__all__ = ["secret"]\nsecret = 1\n',
        "demo/__init__.py": "raise RuntimeError('a program, not a library')\n",
    }
    for name, text in files.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("toy")
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


def shown(folder: Path) -> set[str]:
    text = "\n".join(page.read_text() for page in folder.glob("*.rst"))
    return set(re.findall(r"^\.\. auto(?:class|function|data):: (\S+)$", text, flags=re.MULTILINE))


def test_pages_of_a_toy_package(pages, package, tmp_path):
    pages.write_api(package, tmp_path / "api")
    assert sorted(page.name for page in (tmp_path / "api").iterdir()) == [
        "index.rst",
        "toy.laws.flat.rst",
        "toy.laws.rst",
        "toy.rst",
    ]
    assert shown(tmp_path / "api") == {"toy.laws.Law", "toy.laws.make", "toy.laws.SIZE", "toy.laws.flat.even"}
    assert "* ``toy.Law``: :py:obj:`toy.laws.Law`" in (tmp_path / "api" / "toy.rst").read_text()


def test_a_name_that_is_not_shown_is_found(pages, package):
    have = ["toy.laws.Law", "toy.laws.make", "toy.laws.flat.even"]
    assert pages.undocumented(package, have) == ["toy.laws.SIZE"]
    assert pages.undocumented(package, [*have, "toy.laws.SIZE"]) == []


def test_every_name_of_the_package_is_shown(pages, tmp_path):
    pages.write_api(pyro_ssm, tmp_path)
    assert pages.undocumented(pyro_ssm, shown(tmp_path)) == []
    listed = (tmp_path / "index.rst").read_text()
    assert [m.__name__ for m in pages.public_modules(pyro_ssm) if m.__name__ not in listed] == []


def test_copied_pages(pages, tmp_path):
    (tmp_path / "a.md").write_text("# A\n")
    (tmp_path / "skipped.json").write_text("{}")
    pages.copy_pages(tmp_path, "*.md", tmp_path / "out", "Tables", "None yet.")
    assert sorted(page.name for page in (tmp_path / "out").iterdir()) == ["a.md", "index.rst"]
    assert (tmp_path / "out" / "index.rst").read_text().endswith("\n   a\n")
    pages.copy_pages(tmp_path / "absent", "*.md", tmp_path / "none", "Tables", "None yet.")
    assert "None yet." in (tmp_path / "none" / "index.rst").read_text()
