"""What can be said of a run before weights load."""

from ..errors import SpecError
from ..plan import Plan
from ..spec import Spec
from ..transforms import Schedule
from .generation import check_libraries
from .loop import label_weights
from .optimisers import check_schedule
from .packing import PATH as PACKING
from .reports import check_trackers


def check_training(spec: Spec, found: Plan, labels: list[str]) -> None:
    """What a `train` section says that can be known without weights.

    Raises:
        SpecError: at its place.
    """
    settings = spec.train
    if settings.packing and found.rows:
        rule = next(site.rule for site in found.sites if site.kind == "embeddings" and site.rows)
        said = f"rules[{rule}] puts rows before each sequence, where only the first packed row would see them"
        raise SpecError(said, PACKING)
    check_schedule(settings, spec.task.lower(spec.metric))
    check_trackers(spec)
    check_libraries(spec)
    if isinstance(settings.class_weights, dict):
        label_weights(spec, labels, [])
    if spec.strict and spec.export.checkpoint and not found.merges:
        stays = next(site.transform for site in found.sites if not site.merges)
        said = f"{stays} can't merge into plain weights, so there is no checkpoint; set export.checkpoint: false"
        raise SpecError(said, ("export", "checkpoint") if "checkpoint" in spec.export.model_fields_set else ())
    moving = [
        (site.rule, name)
        for site in found.sites
        for name, one in site.schedules
        if type(one).after_step is not Schedule.after_step
    ]
    if settings.keep == "best" and moving:
        where = f"rules[{moving[0][0]}]"
        said = f"{where} moves its budget from step to step, and only the last state has what it asks for; keep: last"
        raise SpecError(said, ("train", "keep"))
