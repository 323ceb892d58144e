"""Remove nodes that no output needs; inputs stay, writes to buffers stay."""

from torch import fx

from ..base import Context


def _keep(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def remove_dead(graph: fx.Graph, context: Context | None = None) -> fx.Graph:
    """Remove nodes that no output needs."""
    graph.eliminate_dead_code(is_impure_node=_keep)
    return graph
