"""A picture of one layer's graph before and after the rewrite: frozen nodes grey, inserted ones by their class."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from grandalf.graphs import Edge, Graph, Vertex
from grandalf.layouts import SugiyamaLayout
from torch import fx

from ..errors import SubspanError
from ..graph.sublayers import modules, paths
from ..graph.traced import TracedModel
from ..passes.base import PREFIX, SITE
from ..plan import Plan
from ..tuned import TunedModel

COLOURS = {
    "frozen": "#d9d9d9",
    "reconstruction": "#9ecae1",
    "extension": "#a1d99b",
    "combination": "#fdae6b",
    "input": "#ffffff",
}
_HIDDEN = {
    "view", "reshape", "_unsafe_view", "view_as", "contiguous", "clone", "to", "_to_copy", "expand", "unsqueeze",
    "squeeze", "slice", "alias", "transpose", "permute", "t", "numpy_T", "sym_size", "detach", "unflatten", "flatten",
    "split", "getitem", "select", "dropout", "_assert_tensor_metadata",
}  # fmt: skip
_WIDE, _HIGH, _GAP = 7.0, 34.0, 40.0


@dataclass(frozen=True)
class Picture:
    """A drawing: `nodes` are (id, lines of text, class of `COLOURS`), `edges` pairs of ids."""

    title: str
    nodes: tuple[tuple[str, tuple[str, ...], str], ...]
    edges: tuple[tuple[str, str], ...]


def layer_of(graph: fx.Graph, plan: Plan, index: int) -> str:
    """The module that is layer `index` of the first stack of layers that has a site; of the first stack if none has.

    Raises:
        SubspanError: there is no such layer.
    """
    stacks: dict[str, list[int]] = {}
    for module in modules(graph):
        if found := re.fullmatch(r"((?:[^.]*[^.\d][^.]*\.)*)(\d+)", module):
            stacks.setdefault(found[1], []).append(int(found[2]))
    stacks = {stack: numbers for stack, numbers in stacks.items() if index in numbers}
    if not stacks:
        raise SubspanError(f"--layer {index}: the model has no such layer")
    touched = [stack for stack in stacks if any(site.place.startswith(f"{stack}{index}") for site in plan.sites)]
    return f"{(touched or list(stacks))[0]}{index}"


def picture(model: TracedModel, plan: Plan, module: str, title: str) -> Picture:
    """One module's eval graph. Ops that only change a view are left out; tensors are named in the op that reads them.

    Args:
        model: traced, or rewritten by the plan.
        plan: for the classes of what was inserted.
        module: the layer.
        title: written above.
    """
    classes = {site.label: _class(site.classes) for site in plan.sites}
    graph = model.graphs["eval"]
    frozen = {
        _text(node, "")
        for node in (model.base if isinstance(model, TunedModel) else model).graphs["eval"].nodes
        if _reads(node)
    }
    shown = {node: str(i) for i, node in enumerate(graph.nodes) if module in paths(node) and not _hidden(node)}
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes: dict[str, tuple[tuple[str, ...], str]] = {}
    edges = []
    for node, key in shown.items():
        kept = SITE not in node.meta or (_reads(node) and _text(node, "") in frozen)
        nodes[key] = _text(node, module), "frozen" if kept else classes[node.meta[SITE]]
        for source in dict.fromkeys(_sources(node, shown, module)):
            entry = shown.get(source, f"in{order[source]}")
            if source not in shown:
                nodes[entry] = (source.name,), "input"
            edges.append((entry, key))
    return Picture(title, tuple((key, *value) for key, value in nodes.items()), tuple(edges))


def _class(classes: str) -> str:
    """A chain of several classes is phi = g(f(W)), a combination."""
    return "combination" if "," in classes else classes


def _hidden(node: fx.Node) -> bool:
    tensor = isinstance(node.meta.get("val"), torch.Tensor) or SITE in node.meta
    return node.op not in ("call_function", "call_method") or _op(node) in _HIDDEN or not tensor


def _op(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).removeprefix("aten.").partition(".")[0]


def _reads(node: fx.Node) -> list[str]:
    """The tensors that a node reads, through ops that only change their view; `subspan.*` are tuned."""
    found: list[str] = []
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            found.append(source.target)
        elif _op(source) in _HIDDEN and _op(source) != "dropout" and len(source.all_input_nodes) == 1:
            found += _reads(source)
    return found


def _text(node: fx.Node, module: str) -> tuple[str, ...]:
    names = [name.removeprefix(PREFIX).removeprefix(f"{module}.") for name in _reads(node)]
    return (_op(node), *(name for name in names if not name.endswith(".bias") or len(names) == 1))


def _sources(node: fx.Node, shown: dict[fx.Node, str], module: str) -> Iterable[fx.Node]:
    """The shown nodes, or the tensors from outside, that a node reads through hidden ones."""
    # Of an op that changes a view, the other inputs only say a size.
    for source in node.all_input_nodes[:1] if _op(node) in _HIDDEN else node.all_input_nodes:
        if source in shown:
            yield source
        elif source.op == "get_attr" or _op(source) == "sym_size":
            continue
        elif module in paths(source):
            yield from _sources(source, shown, module)
        elif isinstance(source.meta.get("val"), torch.Tensor):
            yield source


def to_dot(pictures: Iterable[Picture]) -> str:
    """Graphviz's language, a cluster for each picture."""
    lines = ["digraph subspan {", '  node [shape=box, style="filled,rounded", fontname="sans-serif"];']
    for i, one in enumerate(pictures):
        lines += [f"  subgraph cluster_{i} {{", f"    label={_quoted(one.title)};"]
        for key, text, kind in one.nodes:
            label = _quoted("\n".join(text))
            lines.append(f'    "{i}_{key}" [label={label}, fillcolor="{COLOURS[kind]}"];')
        lines += [f'    "{i}_{start}" -> "{i}_{end}";' for start, end in one.edges]
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def to_mermaid(pictures: Iterable[Picture]) -> str:
    """A Mermaid flowchart, a subgraph for each picture."""
    lines = ["flowchart TB"]
    for i, one in enumerate(pictures):
        lines.append(f'  subgraph p{i}["{html.escape(one.title)}"]')
        lines += [f'    n{i}_{key}["{"<br/>".join(map(html.escape, text))}"]:::{kind}' for key, text, kind in one.nodes]
        lines += [f"    n{i}_{start} --> n{i}_{end}" for start, end in one.edges]
        lines.append("  end")
    lines += [f"  classDef {kind} fill:{colour},stroke:#555,color:#000" for kind, colour in COLOURS.items()]
    return "\n".join(lines) + "\n"


def to_svg(pictures: Iterable[Picture]) -> str:
    """SVG, the pictures side by side, laid out in layers (Sugiyama's method)."""
    parts, left, height = [], _GAP, 0.0
    for one in pictures:
        drawn, width, tall = _drawn(one)
        parts.append(f'<g transform="translate({left:.1f},70)">{drawn}</g>')
        parts.append(_label(left, 52, one.title, 15, "start"))
        left, height = left + width + _GAP, max(height, tall)
    for i, (kind, colour) in enumerate(COLOURS.items()):
        parts.append(f'<rect x="{_GAP + 130 * i}" y="12" width="14" height="14" fill="{colour}" stroke="#555"/>')
        parts.append(_label(_GAP + 130 * i + 20, 24, kind, 12, "start"))
    left = max(left, _GAP + 130 * len(COLOURS))
    size = f'width="{left:.0f}" height="{height + 110:.0f}" viewBox="0 0 {left:.0f} {height + 110:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, arrow, *parts, "</svg>"]) + "\n"


class _Box:
    """What the layout library reads and writes of a node: size and centre."""

    def __init__(self, text: tuple[str, ...]):
        self.w, self.h = max(map(len, text)) * _WIDE + 16, _HIGH + 14 * (len(text) - 1)
        self.xy = (0.0, 0.0)


def _drawn(one: Picture) -> tuple[str, float, float]:
    """The drawing from (0, 0), its width and height."""
    vertices = {key: Vertex(key) for key, _, _ in one.nodes}
    for key, text, _ in one.nodes:
        vertices[key].view = _Box(text)
    graph = Graph(list(vertices.values()), [Edge(vertices[start], vertices[end]) for start, end in one.edges])
    boxes, left, tall = {}, 0.0, 0.0
    for component in graph.C:
        layout = SugiyamaLayout(component)
        layout.xspace, layout.yspace = 14, 22
        layout.init_all()
        layout.draw()
        found = [vertex.view for vertex in component.sV]
        shift = left - min(box.xy[0] - box.w / 2 for box in found)
        down = -min(box.xy[1] - box.h / 2 for box in found)
        for vertex in component.sV:
            boxes[vertex.data] = (vertex.view.xy[0] + shift, vertex.view.xy[1] + down, vertex.view.w, vertex.view.h)
        left = max(boxes[vertex.data][0] + vertex.view.w / 2 for vertex in component.sV) + _GAP
        tall = max(tall, *(boxes[vertex.data][1] + vertex.view.h / 2 for vertex in component.sV))
    parts = []
    for start, end in one.edges:
        (x1, y1, _, h1), (x2, y2, _, h2) = boxes[start], boxes[end]
        top, bottom = y1 + h1 / 2, y2 - h2 / 2
        bend = (bottom - top) / 2
        path = f"M{x1:.1f},{top:.1f} C{x1:.1f},{top + bend:.1f} {x2:.1f},{bottom - bend:.1f} {x2:.1f},{bottom:.1f}"
        parts.append(f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#arrow)"/>')
    for key, text, kind in one.nodes:
        x, y, w, h = boxes[key]
        rect = f'x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}"'
        parts.append(f'<rect {rect} rx="5" fill="{COLOURS[kind]}" stroke="#555"/>')
        first = y + 4 - 7 * (len(text) - 1)
        parts += [_label(x, first + 14 * i, line, 11, "middle") for i, line in enumerate(text)]
    return "".join(parts), max(left - _GAP, 0.0), tall


def _label(x: float, y: float, text: str, size: int, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{html.escape(text)}</text>'


WRITERS = {"svg": to_svg, "dot": to_dot, "mermaid": to_mermaid}
