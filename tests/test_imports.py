"""Imports run downwards only; heavy packages and torch come in when they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "guerdon"
STAGES = {"sampling", "rewards", "shaping", "weighting", "advantages", "objectives", "optim", "inference", "metrics"}
# what each part may import from guerdon, beside itself
BASE = {"errors", "rollout", "stages", "typed", "members", "components"}
ALLOWED = {
    **{stage: {"errors", "rollout", "stages"} for stage in STAGES},
    "cache": set(),
    "workers": {"errors"},
    "errors": set(),
    "rollout": {"errors"},
    "stages": {"errors"},
    "typed": {"errors"},
    "members": {"errors", *STAGES},
    "components": {"errors", "members", "typed"},
    "catalogue": {"errors", "members"},
    "ledger": {"errors", "rollout", "sampling"},
    "signal": {"errors", "rollout", "stages", "rewards"},
    "recipes": {"errors", "components", "members", "typed"},
    "language": {"errors", "rollout", "stages", "objectives"},
    "diffusion": {"errors", "rollout", "stages", "objectives", "metrics", "cache"},
    "report": {"errors", "recipes"},
    "training": {
        *BASE,
        "cache",
        "workers",
        "signal",
        "ledger",
        "recipes",
        "rewards",
        "sampling",
        "objectives",
        "language",
    },
    "evidence": {
        *BASE,
        *STAGES,
        "cache",
        "workers",
        "signal",
        "ledger",
        "training",
        "recipes",
        "language",
        "diffusion",
    },
}
# plain helpers that stages share, and judges that are language models
EXCEPTIONS = {
    ("rewards/kl_penalty.py", "objectives"),
    ("advantages/adaptive_gae.py", "objectives"),
    ("weighting/hypervolume.py", "metrics"),
    # one language of rewards, whether it composes rewards or a recipe's components
    ("weighting/expression.py", "rewards"),
    # gradients of single components are taken in the loop; held-out scores have a front
    ("training/online.py", "weighting"),
    ("training/front.py", "metrics"),
    # what a policy makes of its own samples is measured as well
    ("training/evaluation.py", "inference"),
    # which points of a front no other point beats
    ("report/sections.py", "metrics"),
    ("rewards/judges/base.py", "components"),
    ("rewards/judges/local.py", "language"),
    # models that score, and one that sorts prompts, named as judges are
    ("rewards/density_ratio.py", "language"),
    ("rewards/density_ratio.py", "components"),
    ("rewards/likelihood.py", "language"),
    ("rewards/served.py", "language"),
    ("rewards/router.py", "language"),
    ("rewards/router.py", "components"),
    ("rewards/critics/program.py", "components"),
    ("rewards/critics/local.py", "language"),
    # models of feedback are trained as policies are
    ("rewards/critics/domain.py", "language"),
    ("rewards/critics/token_classifier.py", "language"),
    ("rewards/critics/token_classifier.py", "objectives"),
    # a bundled base is what the supervised loop makes of its recipe
    ("diffusion/bases.py", "training"),
    # a data file is read in the same way whatever its rows are for
    ("diffusion/domain.py", "language"),
}


def parts(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "guerdon"
            and node.level == 0
        ):
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("guerdon.")}
    return found - {"__version__"}


FILES = sorted(path for path in ROOT.rglob("*.py") if parts(path) not in ("cli", "__init__", "__main__"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path):
    part, relative = parts(path), str(path.relative_to(ROOT))
    assert part in ALLOWED, f"{part} is new: say what it may import"
    upward = {name for name in imports(path) - ALLOWED[part] - {part} if (relative, name) not in EXCEPTIONS}
    assert not upward, f"{relative} imports {sorted(upward)}"


def test_a_loop_knows_no_domain():
    loops = ["online", "supervised", "evaluation", "checkpoint", "records", "optimisation", "policy", "progress"]
    loops += ["loop", "pathwise", "forms", "front", "references", "reference_scores"]
    for name in loops:
        assert "language" not in (ROOT / "training" / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("guerdon", ["torch", "numpy"]),
        ("guerdon.recipes", ["torch"]),
        ("guerdon.catalogue", ["torch"]),
        ("guerdon.report", ["torch", "plotly"]),
        ("guerdon.advantages", ["torch"]),
        ("guerdon.language.data", ["torch", "pyarrow", "datasets"]),
        ("guerdon.signal", ["transformers", "accelerate", "peft"]),
        ("guerdon.language.policy", ["transformers", "accelerate", "peft"]),
        ("guerdon.diffusion.policy", ["diffusers", "transformers", "accelerate", "peft", "PIL"]),
        ("guerdon.training.online", ["transformers", "peft", "plotly", "datasets"]),
    ],
)
def test_importing_is_cheap(module, absent):
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
