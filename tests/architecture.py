"""The rules of the package's shape, read from its syntax trees; nothing is imported.

Every rule is a function ``rule(package) -> list of sentences``, one sentence a breach.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

FACADE = "<facade>"  # the package's own __init__

# Bottom to top: a part may import only from itself and from the parts before it.
PARTS = (
    "_version",
    "data",
    "ops",
    "components",
    "binding",
    "distributions",
    "blocks",
    "dynamics",
    "emissions",
    "models",
    "guides",
    "infer",
    "predict",
    "diagnostics",
    FACADE,
    "_info",
    "demo",
    "__main__",
    "testing",
)
PYRO_PRIMITIVES = frozenset({"sample", "subsample", "factor", "plate", "param", "deterministic", "module", "markov"})
# Contract tests act as a user who writes Pyro programs around the components.
PYRO_SPEAKERS = ("components", "binding", "models*", "guides*", "infer.elbo*", "infer.marginal*", "infer.fit*")
PYRO_SPEAKERS += ("infer.anneal*", "testing*")
MAX_LINES = 400

Definition = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, its source and its syntax tree."""

    name: str
    path: Path
    is_package: bool

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, filename=str(self.path))

    @property
    def part(self) -> str:
        """``ops`` for ``package.ops.kalman``."""
        return self.name.split(".")[1] if "." in self.name else FACADE

    def origin(self, node: ast.ImportFrom) -> str:
        """The module that ``from X import ...`` names, with leading dots resolved."""
        if not node.level:
            return node.module or ""
        anchor = self.name.split(".")
        anchor = anchor[: len(anchor) - node.level + self.is_package]
        return ".".join([*anchor, *([node.module] if node.module else [])])

    def exported(self) -> list[str] | None:
        """The names in ``__all__``; None where there is none, ValueError where it is not a literal."""
        for node in self.tree.body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and "__all__" in _targets(node) and node.value is not None:
                return list(ast.literal_eval(node.value))
        return None

    def exported_or_none(self) -> list[str]:
        """The names in ``__all__``, or no names; what is wrong with ``__all__`` is the business of one rule only."""
        try:
            return self.exported() or []
        except ValueError:
            return []


class Package:
    """All modules below a folder, by dotted name."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, Module] = {}
        for path in sorted(root.rglob("*.py")):
            parts = [root.name, *path.relative_to(root).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            self.modules[name] = Module(name, path, is_package)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules.values())

    def imports(self, module: Module) -> Iterator[tuple[int, str]]:
        """Each module of this package that ``module`` names in an import, wherever it stands, with its line."""
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if (found := self._deepest(alias.name)) is not None:
                        yield node.lineno, found
            elif isinstance(node, ast.ImportFrom) and (base := self._deepest(module.origin(node))) is not None:
                for alias in node.names:
                    # `from package.ops import linalg` names that module, unless the package gives the name to another.
                    meant = self.resolve(self.modules[base], alias.name)
                    yield node.lineno, meant.name if isinstance(meant, Module) else base

    def _deepest(self, dotted: str) -> str | None:
        while dotted and dotted not in self.modules:
            dotted = dotted.rpartition(".")[0]
        return dotted or None

    def resolve(self, module: Module, name: str, seen: tuple = ()) -> ast.AST | Module | None:
        """What ``name`` means in ``module``: a definition (followed through imports), a module, or None."""
        if (module, name) in seen:
            return None  # two modules that import the name from each other
        for node in reversed(_statements(module.tree)):
            if isinstance(node, Definition) and node.name == name:
                return node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return node
            if isinstance(node, ast.Import) and any((a.asname or a.name.split(".")[0]) == name for a in node.names):
                return node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) != name:
                        continue
                    source = self.modules.get(module.origin(node))
                    if source is None:
                        return node  # a third party's
                    if source is not module:
                        return self.resolve(source, alias.name, (*seen, (module, name)))
        return self.modules.get(f"{module.name}.{name}")

    def public_modules(self) -> list[Module]:
        """The facade, the parts, and every module that one of them lists in its ``__all__``."""
        found = [m for m in self if m.name.count(".") <= 1 and not m.part.startswith("_")]
        for module in found:  # grows while it runs
            below = [self.resolve(module, name) for name in module.exported_or_none()]
            found += [m for m in below if isinstance(m, Module) and m not in found]
        return found


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """The statements of a module's top level, also those under ``if`` and ``try``."""
    found: list[ast.stmt] = []
    queue: list[ast.stmt] = list(tree.body)
    while queue:
        node = queue.pop(0)
        found.append(node)
        if isinstance(node, ast.If):
            queue = [*node.body, *node.orelse, *queue]
        elif isinstance(node, ast.Try):
            handled = [statement for handler in node.handlers for statement in handler.body]
            queue = [*node.body, *handled, *node.orelse, *node.finalbody, *queue]
    return found


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def unknown_parts(package: Package) -> list[str]:
    """Every file belongs to a part that has a place in the order."""
    return sorted({f"{m.name}: part {m.part!r} has no place in PARTS" for m in package if m.part not in PARTS})


def folders_without_init(package: Package) -> list[str]:
    """A folder without ``__init__.py`` can be imported in the repository and is missing from what is installed."""
    parents = {module.name.rpartition(".")[0] for module in package} - {""}
    return [f"{name} has no __init__.py" for name in sorted(parents - package.modules.keys())]


def downward_imports(package: Package) -> list[str]:
    """A part imports only from itself and from the parts before it."""
    breaches = []
    for module in package:
        for line, target in package.imports(module):
            part = package.modules[target].part
            if {part, module.part} <= set(PARTS) and PARTS.index(part) > PARTS.index(module.part):
                breaches.append(f"{module.name}:{line} imports {target}, which stands above it")
    return breaches


def cycles(package: Package) -> list[str]:
    """No module imports itself by way of others; imports inside functions count."""
    graph = {m.name: {target for _, target in package.imports(m)} - {m.name} for m in package}
    breaches: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            breaches.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return breaches


def testing_imports(package: Package) -> list[str]:
    """Nothing of the package imports its contract tests."""
    return [
        f"{module.name}:{line} imports {target}"
        for module in package
        for line, target in package.imports(module)
        if module.part != "testing" and package.modules[target].part == "testing"
    ]


def pyro_primitives(package: Package) -> list[str]:
    """``pyro.sample`` and its kin are written only where a part may speak Pyro."""
    forbidden = {f"{root}.{name}" for name in PYRO_PRIMITIVES for root in ("pyro", "pyro.primitives")}
    breaches = set()
    for module in package:
        if any(fnmatch(module.name.partition(".")[2], place) for place in PYRO_SPEAKERS):
            continue
        meaning: dict[str, str] = {}  # local name -> dotted origin
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    head = alias.name.split(".")[0]
                    meaning[alias.asname or head] = alias.name if alias.asname else head
            elif isinstance(node, ast.ImportFrom) and not node.level:
                meaning |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.Attribute, ast.Name)):
                head, dot, tail = ast.unparse(node).partition(".")
                dotted = meaning.get(head, "") + dot + tail
                if dotted in forbidden:
                    breaches.add(f"{module.name}:{node.lineno} speaks Pyro: {dotted}")
    return sorted(breaches)


def missing_names(package: Package) -> list[str]:
    """Every part has a literal ``__all__``, without repeats, and every name in it exists."""
    breaches = []
    for module in package.public_modules():
        try:
            names = module.exported()
        except ValueError:
            breaches.append(f"{module.name}.__all__ is not a literal list of strings")
            continue
        if names is None:
            breaches.append(f"{module.name} has no __all__")
            continue
        twice = sorted({name for name in names if names.count(name) > 1})
        breaches += [f"{module.name}.__all__ has {name!r} twice" for name in twice]
        absent = [name for name in names if package.resolve(module, name) is None]
        breaches += [f"{module.name}.__all__ has {name!r}, which is not there" for name in absent]
    return breaches


def undocumented(package: Package) -> list[str]:
    """A public module has a docstring; a public class or function has one with an example that runs."""
    breaches = []
    for module in package.public_modules():
        if not ast.get_docstring(module.tree):
            breaches.append(f"{module.name} has no docstring")
        for name in module.exported_or_none():
            node = package.resolve(module, name)
            if isinstance(node, Definition):
                text = ast.get_docstring(node) or ""
                if ">>>" not in text:
                    breaches.append(f"{module.name}.{name} has no {'doctest' if text else 'docstring'}")
    return breaches


def long_files(package: Package) -> list[str]:
    """A file is about one noun."""
    lines = {module.name: len(module.source.splitlines()) for module in package}
    return [f"{name} has {n} lines, more than {MAX_LINES}" for name, n in lines.items() if n > MAX_LINES]


RULES = (
    unknown_parts,
    folders_without_init,
    downward_imports,
    cycles,
    testing_imports,
    pyro_primitives,
    missing_names,
    undocumented,
    long_files,
)
