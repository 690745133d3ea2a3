"""A script, plumbing and kernel joined into one file: `python plumbing/one_file.py train_pref.py > alone.py`."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def join(path, imports, parts):
    """Put the source of `path` into parts {path: text}, after the sources that it imports from here and without its
    import statements; those of other packages are collected in `imports`."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        package, _, module = getattr(node, "module", "").partition(".")  # `import json` has no .module
        source = ROOT / package / f"{module}.py"
        if package not in ("plumbing", "kernels"):
            imports.add(ast.unparse(node))
        elif source not in parts:
            join(source, imports, parts)
        for number in range(node.lineno, node.end_lineno + 1):
            lines[number - 1] = None  # ast counts from 1
    parts[path] = "\n".join(line for line in lines if line is not None)


def one_file(script):
    """-> the source: the script's docstring, all imports, kernel and plumbing, the rest of the script."""
    imports = set()
    parts = {}
    join(script, imports, parts)
    lines = parts.pop(script).split("\n")
    docstring = ast.parse("\n".join(lines)).body[0]
    modules = sorted(line for line in imports if line.startswith("import"))
    names = sorted(line for line in imports if line.startswith("from"))
    head = lines[: docstring.end_lineno]
    rest = lines[docstring.end_lineno :]
    return "\n".join([*head, "", *modules, *names, "", *parts.values(), *rest])


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(one_file(Path(sys.argv[1]).resolve()))
