"""The house: who may know what, which way imports run, and how long a file and a function are."""

import ast
from pathlib import Path

from rewriter.tasks import TASKS, task_of
from rewriter.transforms import TRANSFORMS

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "rewriter").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")])
BENCHES = ("bench.py", "beside.py", "convert.py", "performance.py", "results.py")
# Words of other libraries that options are called by too.
FOREIGN = {
    ("graph/sublayers.py", "alpha"),  # of aten.baddbmm
    ("passes/fuse/accumulate.py", "alpha"),  # of aten.addmm
    ("passes/fuse/accumulate_in_place.py", "alpha"),
    ("passes/insert/insert_attention_rows.py", "scale"),  # of scaled_dot_product_attention
    ("tasks/question_answering.py", "start"),  # of a span
    ("tasks/question_answering.py", "end"),
    ("training/generation.py", "prompt"),  # of a row of the data
    ("training/reports.py", "prompt"),
    ("training/reports.py", "samples"),  # of what was written
    ("training/loop.py", "samples"),
    ("adapters/from_peft.py", "dropout"),  # the end of keys of PEFT
    ("adapters/to_peft.py", "dropout"),
    ("exchange.py", "density"),  # of TIES and DARE
    ("export.py", "lora"),  # a kind of adapter for others
    ("packed.py", "group"),  # of compressed-tensors
    ("packed.py", "scale"),
    ("report/page.py", "prompt"),  # of what was written
    ("report/page.py", "samples"),
    ("report/picture.py", "dropout"),  # an op
    ("report/picture.py", "start"),  # of SVG's text-anchor
}
# Rooms in the order of the flow: each may use those before it.
ORDER = (
    "errors", "files", "resources", "algebra", "transforms", "methods", "graph", "tasks", "spec", "plan", "passes",
    "kept", "trace", "svd", "tuned", "rewrite", "base", "gguf", "packed", "quantise", "pretrained", "smoke", "sources",
    "chats", "data", "adapters", "fit", "greedy", "training", "export", "answer",
    "report", "folder",
    "session", "exchange",
)  # fmt: skip


def named(file):
    return str(file.relative_to(ROOT / "rewriter")) if (ROOT / "rewriter") in file.parents else file.name


def texts(tree):
    """String constants that are no docstrings."""
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]


def knowledge(file):
    """What a file says of a transform or of an option: (line, what)."""
    tree = ast.parse(file.read_text())
    names, options = set(TRANSFORMS), {o for one in TRANSFORMS.values() for o in one.options.model_fields}
    for node in texts(tree):
        words = set(node.value.replace(",", " ").replace(".", " ").split())
        if (words & names or node.value in options) and (named(file), node.value) not in FOREIGN:
            yield node.lineno, node.value
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.arg) and getattr(node, "id", getattr(node, "arg", "")) in names:
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Attribute) and node.attr in options and "options" in ast.unparse(node.value):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Import | ast.ImportFrom) and "methods" in ast.unparse(node):
            yield node.lineno, ast.unparse(node)


OUTSIDE = [file for file in SOURCES if "methods" not in file.parts and file.name not in BENCHES]


def test_no_transform_is_known_outside_its_file():
    """A column that a task reads may be called like one."""
    found = {named(file): {word for _, word in knowledge(file)} for file in OUTSIDE}
    roles = {f"tasks/{name.replace('-', '_')}.py": set(task_of(name).roles) for name in TASKS}
    assert not {file: what - roles.get(file, set()) for file, what in found.items() if what - roles.get(file, set())}


def words_of(tree):
    """Texts, names and modules of imports in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Name | ast.Attribute | ast.ClassDef):
            yield getattr(node, "id", getattr(node, "attr", getattr(node, "name", "")))
    yield from (node.value for node in texts(tree))


def test_no_task_is_known_outside_its_file_and_the_table():
    """By its name, its module, its class: in no text, name or import."""
    files = {named(file): list(words_of(ast.parse(file.read_text()))) for file in SOURCES}
    for name, kind in TASKS.items():
        module = name.replace("-", "_")
        knowing = {
            file for file, words in files.items() if any(name in one or module in one or one == kind for one in words)
        }
        assert knowing == {f"tasks/{module}.py", "tasks/__init__.py"}, name


def test_the_search_finds_what_it_should(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("""\
from rewriter.methods.rows import mam
def f(options, chain):
    return options.rank if chain[0].name == "full" else getattr(options, "length")
""")
    found = {what for _, what in knowledge(wrong)}
    assert found == {"from rewriter.methods.rows import mam", "options.rank", "full", "length"}


def imports(file):
    """The rooms of this package that a file imports from."""
    package = ["rewriter", *file.relative_to(ROOT / "rewriter").parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            if path[:1] == ["rewriter"]:
                yield from [path[1]] if len(path) > 1 and path[1] else [alias.name for alias in node.names]


def test_imports_run_one_way():
    for file in (ROOT / "rewriter").rglob("*.py"):
        room = named(file).split("/")[0].removesuffix(".py")
        if room != "__init__":
            later = {other for other in imports(file) if ORDER.index(other) > ORDER.index(room)}
            assert not later, f"{named(file)} imports from {later}"


def test_no_circle_of_files():
    """Dynamic imports apart: the registry loads the methods by name."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in SOURCES}
    edges: dict[str, set[str]] = {}
    for name, file in names.items():
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                path = ".".join([*base, *(node.module.split(".") if node.module else [])])
                found = [one for one in (f"{path}.{alias.name}" for alias in node.names) if one in names]
                edges.setdefault(name, set()).update(found or ([path] if path in names else []))
    left = set(names)
    while free := {name for name in left if not (edges.get(name, set()) - {name}) & left}:
        left -= free
    assert not left, f"in a circle, or on top of one: {sorted(left)}"


def test_files_and_functions_are_short():
    for file in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        text = file.read_text()
        assert len(text.splitlines()) <= 500, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, f"{file}: {node.name} has more than 60 lines"
