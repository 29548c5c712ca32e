"""The loops: they move records along the road and know no method and no domain."""

from guerdon.stages import lazy

MEMBERS = {
    "Online": "online",
    "Pathwise": "pathwise",
    "Truncation": "pathwise",
    "Preference": "preference",
    "Supervised": "supervised",
    "Performance": "bilevel",
    "outer_loop": "bilevel",
    "InnerRuns": "inner_runs",
    "Optim": "optimisation",
    "evaluate": "evaluation",
    "train": "run",
    "resume": "run",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
