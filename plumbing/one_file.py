"""A script, plumbing and kernel joined into one file: `python plumbing/one_file.py train_pref.py > alone.py`."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def join(path, imports, parts):
    """Append a source to `parts`, after those that it imports from here; collect its other imports in `imports`."""
    lines = path.read_text().splitlines(keepends=True)
    for node in ast.parse("".join(lines)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            package, _, module = getattr(node, "module", "").partition(".")
            if package not in ("plumbing", "kernels"):
                imports.add(ast.unparse(node) + "\n")
            elif (ROOT / package / f"{module}.py") not in parts:
                join(ROOT / package / f"{module}.py", imports, parts)
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    parts[path] = "".join(lines)


def one_file(script):
    """-> the source: the script's docstring, all imports, kernel and plumbing, the rest of the script."""
    imports, parts = set(), {}
    join(script, imports, parts)
    rest = parts.pop(script)
    docstring = ast.parse(rest).body[0]
    lines = rest.splitlines(keepends=True)
    head, body = lines[: docstring.end_lineno], lines[docstring.end_lineno :]
    plain = sorted(line for line in imports if line.startswith("import"))
    return "".join([*head, "\n", *plain, *sorted(imports.difference(plain)), "\n\n", *parts.values(), *body])


if __name__ == "__main__":
    sys.stdout.write(one_file(Path(sys.argv[1]).resolve()))
