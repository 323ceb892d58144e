"""Tuned models: a traced model with adapters on it, one of them in use."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from .algebra import parts_of
from .errors import SubspanError
from .graph.traced import Signature, TracedModel, copy_graph
from .passes.base import PENALTIES, PREFIX
from .plan import Plan


@dataclass(frozen=True)
class Adapter:
    """An adapter on a model: its sites, its graphs, where its tensors are in the model, and the leaf names of constants
    that were given, not computed: files of the adapter keep those."""

    plan: Plan
    graphs: dict[str, fx.Graph]
    root: str
    given: frozenset[str] = frozenset()


class TunedModel(TracedModel):
    """A traced model with adapters: the tuned tensors are parameters named `subspan.*`, all others are frozen.

    Attributes:
        adapters: name -> adapter; the first is called `default`.
        active: name of the one that `forward` uses.
        plan: of the active adapter.
        base: the model it was made from (no submodule of it).
        penalties: name -> scalar, what the last forward in training mode adds to the loss.
        without, also: names of passes that were left out of its graphs, or run though they change numerics.
    """

    def __init__(
        self,
        base: TracedModel,
        plan: Plan,
        graphs: dict[str, fx.Graph],
        signatures: dict[str, Signature],
        aliases: dict[str, str],
        given: frozenset[str] = frozenset(),
    ):
        super().__init__(graphs, signatures, aliases)
        self._base = (base,)  # In a tuple, so that it is no submodule.
        self.adapters = {"default": Adapter(plan, graphs, PREFIX, given)}
        self.active = "default"
        self.penalties: dict[str, torch.Tensor] = {}
        self.without: tuple[str, ...] = ()
        self.also: tuple[str, ...] = ()

    @property
    def base(self) -> TracedModel:
        return self._base[0]

    @property
    def rows(self) -> int:
        return self.plan.rows

    @property
    def taken(self) -> int:
        return self.plan.rows + self.plan.moves

    @property
    def plan(self) -> Plan:
        return self.adapters[self.active].plan

    @property
    def root(self) -> str:
        """Of the names of the active adapter's tensors."""
        return self.adapters[self.active].root

    @property
    def given(self) -> frozenset[str]:
        """Of the active adapter."""
        return self.adapters[self.active].given

    @property
    def penalty_names(self) -> list[str]:
        """Of what a forward in training mode adds to the loss."""
        return self._penalties["train"]

    def _with(self, graphs: dict[str, fx.Graph]) -> Self:
        other = TunedModel(self.base, self.plan, graphs, dict(self.signatures), dict(self.aliases))
        other.adapters = self.adapters | {self.active: Adapter(self.plan, graphs, self.root, self.given)}
        other.active, other.without, other.also = self.active, self.without, self.also
        other.lowered = self.lowered
        return other

    def hold(self, name: str, other: "TunedModel") -> None:
        """Hold the active adapter of another tuned model of the same base too; `use` makes it the active one.

        The tensors' memory is shared with that model, the frozen weights stay this model's.

        Raises:
            SubspanError: the name is taken or can't be one, or the base is another model.
        """
        root = f"{PREFIX[:-1]}_{name}."
        there = name in self.adapters or any(one.startswith(root) for one, _ in self.named_parameters())
        if not name.isidentifier() or there:
            raise SubspanError(f"adapter {name!r}: the name is taken, or is not a plain word")
        replaced = {site.place for site in other.plan.sites if site.layout and site.replaces}
        own, theirs = (dict(model.base.named_parameters()) for model in (self, other))
        if own.keys() != theirs.keys() or not all(_equal(own[key], theirs[key]) for key in own.keys() - replaced):
            raise SubspanError(f"adapter {name!r} is of another model: their frozen parameters differ")
        graphs = {mode: copy_graph(graph) for mode, graph in other.graphs.items()}
        for graph in graphs.values():
            for node in graph.find_nodes(op="get_attr"):
                if node.target.startswith(other.root):
                    node.target = root + node.target.removeprefix(other.root)
        for tensor_name, tensor in adapter_tensors(other).items():
            own = nn.Parameter(tensor.detach()) if isinstance(tensor, nn.Parameter) else tensor
            self.add(root + tensor_name, own, persistent=own is not tensor)
        self.adapters[name] = Adapter(other.plan, graphs, root, other.given)
        self.use(self.active)

    def use(self, name: str) -> None:
        """Make an adapter the active one: `forward` runs its graphs, and its tensors alone take gradients.

        Raises:
            SubspanError: there is none of that name.
        """
        if name not in self.adapters:
            raise SubspanError(f"no adapter {name!r}; there are {', '.join(self.adapters)}")
        self.active, self.graphs = name, self.adapters[name].graphs
        self.requires_grad_(False)
        for tensor in tuned_parameters(self).values():
            tensor.requires_grad_(True)
        self.recompile()

    def recompile(self) -> None:
        super().recompile()
        meta = {mode: graph.output_node().meta for mode, graph in self.graphs.items()}
        self._penalties = {mode: list(one.get(PENALTIES, ())) for mode, one in meta.items()}

    def run(self, name: str, *args, **kwargs) -> Any:
        out = self._flat(name, args, kwargs)
        spec = self.signatures[name].outputs
        self.penalties = dict(zip(self._penalties[name], out[spec.num_leaves :], strict=True))
        return pytree.tree_unflatten(out[: spec.num_leaves], spec)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    parts = zip(parts_of(one), parts_of(other.to(one.device)), strict=False)
    return same and (one.is_meta or all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in parts))


def adapter_tensors(model: TunedModel) -> dict[str, torch.Tensor]:
    """Leaf name -> tensor of the active adapter, constants too, without the root of their names in the model."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name.removeprefix(model.root): value for name, value in named if name.startswith(model.root)}


def tuned_parameters(model: TunedModel) -> dict[str, nn.Parameter]:
    """Leaf name -> tuned parameter of the active adapter."""
    tuned = {name for site in model.plan.sites for name in site.tuned}
    return {name: p for name, p in adapter_tensors(model).items() if name in tuned}


def chosen_tensors(model: TunedModel) -> dict[str, torch.Tensor]:
    """Leaf name -> what a schedule or a draw decided, of the active adapter: indices (int64), as a rule."""
    chosen = {leaf.name for site in model.plan.sites for leaf in site.leaves if leaf.role == "chosen"}
    return {name: b for name, b in adapter_tensors(model).items() if name in chosen}
