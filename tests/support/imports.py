"""Which modules of a package import which, read from their source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Package:
    """The modules of a package and the imports among them.

    Imports count wherever they are written, in functions and under `if TYPE_CHECKING` too. A submodule's import of its
    own parent package, which Python does by itself, does not.

    Args:
        folder: of the package, whose name is the package's.
    """

    def __init__(self, folder):
        self.files = {_module_name(file, folder): file for file in sorted(folder.rglob("*.py"))}
        self.trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in self.files.items()}
        self.imports = {name: self._imports(name) for name in self.files}

    def _imports(self, name):
        found = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(name, node)
                # `from package import module` imports the module, and otherwise a name of the package itself.
                modules = {f"{source}.{alias.name}" for alias in node.names} & self.files.keys()
                found |= modules
                if len(modules) < len(node.names):
                    found.add(source)
        return found & self.files.keys()

    def _absolute(self, name, node):
        if not node.level:
            return node.module
        is_package = self.files[name].name == "__init__.py"
        parents = name.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def folders(self):
        """The imports among the folders directly below the package, and the files beside them."""

        def folder(name):
            return ".".join(name.split(".")[:2])

        found = {folder(name): set() for name in self.files}
        for name, imported in self.imports.items():
            found[folder(name)] |= {folder(other) for other in imported} - {folder(name)}
        return found

    def that_use(self, name):
        """Modules with this name anywhere in their code."""
        return {
            module
            for module, tree in self.trees.items()
            for node in ast.walk(tree)
            if name in (getattr(node, "id", None), getattr(node, "attr", None))
        }


def cycle(imports):
    """Modules that import each other in a ring, the first one again at the end; None where there is no ring."""
    done = set()

    def search(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(imports[name]):
            ring = search(other, [*path, name])
            if ring:
                return ring
        done.add(name)
        return None

    return next((ring for name in sorted(imports) if (ring := search(name, []))), None)


def _module_name(file, folder):
    parts = file.relative_to(folder.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
