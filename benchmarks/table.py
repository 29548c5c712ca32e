"""Tables out of the figures that run.py keeps: on the terminal and in docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
TITLES = {
    "short-64": "short, vocabulary 64",
    "short-1024": "short, vocabulary 1024",
    "long-64": "long, vocabulary 64",
    "long-1024": "long, vocabulary 1024",
    "kl": "short, KL to a reference (beta 0.05)",
    "passes": "short, four passes over each batch",
    "rewards": "short, three rewards",
}
PREFERENCE_TITLES = {
    "dpo": "DPO, short, vocabulary 64",
    "dpo-1024": "DPO, short, vocabulary 1024",
    "dpo-long": "DPO, long, vocabulary 64",
    "dpo-precomputed": "DPO, short, reference scored beforehand",
    "simpo": "SimPO, short, vocabulary 64",
    "simpo-1024": "SimPO, short, vocabulary 1024",
    "simpo-long": "SimPO, long, vocabulary 64",
}
# the largest share of the peer's CPU seconds that is allowed
STEP_TARGETS = {"long-64": 0.4, "long-1024": 0.4}
SHORT_TARGET, MEMORY_TARGET = 0.7, 0.8
PREFERENCE_TARGET = 0.8
FIRST_STEP_TARGET, RECORDS_TARGET = 2.5, 0.05
COMMAND_TARGET, IMPORT_TARGET = 0.15, 0.05
STAGE = "guerdon.objectives:policy_gradient"
BESIDE_TORCH_TARGET = 0.16  # CPU seconds that the stage functions may take beside torch's own import
NAIVE_TARGET = 1.4
FLOW_PHASES = ("sample", "forward", "backward")
FLOW_TARGET = 1.0  # of the published loop's CPU seconds
CHUNK_MIB = 64  # of guerdon's logits


class Section(NamedTuple):
    """A table with a heading and what to know when reading it."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _of(runs: list[dict[str, Any]], *path: str) -> list[float]:
    """One figure of every run, such as ("step", "cpu_s", "median")."""
    found: list[Any] = list(runs)
    for key in path:
        found = [value[key] for value in found]
    return found


def _verdict(value: float, limit: float, unit: str = "") -> str:
    return f"<= {limit:g}{unit}: {'met' if value <= limit else 'MISSED'}"


def sections(results: dict[str, Any]) -> list[Section]:
    """All tables for which there are figures."""
    sides = {name: record["sides"] for name, record in results.items()}
    steps = {name: pair for name, pair in sides.items() if name in TITLES}
    made = []
    if steps:
        made += [_step_section(steps), _memory_section(steps), _phase_section(steps)]
    if "records" in sides:
        made.append(_records_section(sides["records"]))
    if "logprob" in sides:
        made.append(_logprob_section(sides["logprob"]))
    pairs = {name: pair for name, pair in sides.items() if name in PREFERENCE_TITLES}
    if pairs:
        made.append(_preference_section(pairs))
    if "flow-step" in sides:
        made.append(_flow_section(sides["flow-step"]))
    if "imports" in sides:
        made.append(_import_section(sides["imports"]))
    return made


def _check_same_start(name: str, pair: dict[str, Any]) -> None:
    ours, theirs = (_of(pair[side], "model") for side in ("guerdon", "trl"))
    if ours != theirs:
        raise ValueError(f"{name}: the two sides did not start from the same weights: {ours}, {theirs}")


def _step_section(steps: dict[str, Any]) -> Section:
    rows = []
    for name, pair in steps.items():
        _check_same_start(name, pair)
        middle = {side: median(_of(runs, "step", "cpu_s", "median")) for side, runs in pair.items()}
        least = {side: min(_of(runs, "step", "cpu_s", "least")) for side, runs in pair.items()}
        ratio = middle["guerdon"] / middle["trl"]
        learned = " / ".join(f"{fmean(_of(pair[side], 'reward_last')):.2f}" for side in ("guerdon", "trl"))
        rows.append(
            (
                TITLES[name],
                f"{middle['guerdon']:.3f} ({least['guerdon']:.3f})",
                f"{middle['trl']:.3f} ({least['trl']:.3f})",
                f"{ratio:.2f} ({least['guerdon'] / least['trl']:.2f})",
                f"{median(_of(pair['guerdon'], 'new_tokens_per_cpu_s')):,.0f}",
                learned,
                _verdict(ratio, STEP_TARGETS.get(name, SHORT_TARGET)),
            )
        )
    return Section(
        "One GRPO step",
        "CPU seconds a step, the median of all runs' medians and in brackets the least step of all. A step is a batch "
        "of samples with all its passes. Final reward: mean of the last three steps over the runs' seeds, guerdon / TRL.",
        ("work", "guerdon", "TRL", "ratio", "guerdon tokens / CPU s", "final reward", "target"),
        rows,
    )


def _memory_section(steps: dict[str, Any]) -> Section:
    rows = []
    for name, pair in steps.items():
        peak = {side: median(_of(runs, "rss_peak_mib")) for side, runs in pair.items()}
        own = {side: peak[side] - median(_of(runs, "imported", "rss_mib")) for side, runs in pair.items()}
        first = {side: min(_of(runs, "first_step_ends", "cpu_s")) for side, runs in pair.items()}
        wall = {side: min(_of(runs, "first_step_ends", "wall_s")) for side, runs in pair.items()}
        ratio = peak["guerdon"] / peak["trl"]
        rows.append(
            (
                TITLES[name],
                f"{peak['guerdon']:.0f} ({own['guerdon']:.0f})",
                f"{peak['trl']:.0f} ({own['trl']:.0f})",
                f"{ratio:.2f}",
                _verdict(ratio, MEMORY_TARGET),
                f"{first['guerdon']:.2f} ({wall['guerdon']:.2f})",
                f"{first['trl']:.2f} ({wall['trl']:.2f})",
                _verdict(first["guerdon"], FIRST_STEP_TARGET, " s"),
            )
        )
    floors = [run["model_imported"] for pair in steps.values() for run in pair["guerdon"] if "model_imported" in run]
    if floors:
        memory, cpu = median(_of(floors, "rss_mib")), min(_of(floors, "cpu_s"))
        seconds = f"{cpu:.2f} ({min(_of(floors, 'wall_s')):.2f})"
        target = _verdict(cpu, FIRST_STEP_TARGET, " s")
        rows.append(
            ("`from transformers import LlamaForCausalLM`", f"{memory:.0f}", "-", "-", "-", seconds, "-", target)
        )
    return Section(
        "Memory, and from process start to the end of the first step",
        "Peak resident MiB, in brackets without what the imports take. First step: least CPU seconds (wall seconds). The "
        "last row is the floor: importing the model's class and nothing else, which both sides have to.",
        ("work", "guerdon MiB", "TRL MiB", "ratio", "target", "guerdon first step", "TRL first step", "target "),
        rows,
    )


def _phase_section(steps: dict[str, Any]) -> Section:
    phases = ("sample", "reference", "forward", "backward")
    rows = []
    for name, pair in steps.items():
        for side, runs in pair.items():
            spent = {phase: median(run["phases_cpu_s"].get(phase, 0.0) for run in runs) for phase in phases}
            rest = median(_of(runs, "step", "cpu_s", "mean")) - sum(spent.values())
            cells = [f"{spent[phase]:.3f}" if spent[phase] else "-" for phase in phases]
            rows.append((TITLES[name], side, *cells, f"{rest:.3f}"))
    return Section(
        "Where the step goes",
        "Mean CPU seconds a step. TRL's reference pass is part of its rest. The rest is the optimiser, "
        "rewards, advantages, metrics and logging.",
        ("work", "side", *phases, "rest"),
        rows,
    )


def _records_section(sides: dict[str, Any]) -> Section:
    on, off = sides["on"], sides["off"]
    step = median(_of(on, "step", "cpu_s", "median"))
    written, ledger = (median(_of(on, "records_cpu_s", part, "median")) for part in ("written", "ledger"))
    without = median(_of(off, "step", "cpu_s", "median"))
    share = (written + ledger) / step
    row = (
        f"{1000 * ledger:.2f}",
        f"{1000 * written:.2f}",
        f"{share:.1%}",
        f"{step:.3f} / {without:.3f}",
        _verdict(100 * share, 100 * RECORDS_TARGET, " %"),
    )
    return Section(
        "Ledger and logging",
        "Short step with three rewards. Milliseconds of CPU a step for splitting the advantages over the rewards, and "
        "for writing metrics, ledger and (every tenth step) samples.",
        ("ledger ms", "writing ms", "share of the step", "step with / without writing", "target"),
        [row],
    )


def _logprob_section(sides: dict[str, Any]) -> Section:
    rows = []
    naive = min(_of(sides["naive"], "cpu_s", "least"))
    for way, runs in sides.items():
        seconds = min(_of(runs, "cpu_s", "least"))
        added = median(_of(runs, "memory_added_mib"))
        limit = CHUNK_MIB + runs[0]["matrix_gradient_mib"]
        target = "-"
        if way.startswith("guerdon"):
            memory = _verdict(round(added), limit, " MiB")
            target = f"{memory}; {_verdict(seconds / naive, NAIVE_TARGET, ' x naive')}"
        rows.append(
            (
                way,
                f"{added:.0f}",
                f"{added / runs[0]['logits_mib']:.2f}",
                f"{seconds:.2f}",
                f"{seconds / naive:.2f}",
                target,
            )
        )
    naive_run = sides["naive"][0]
    size = naive_run["settings"]
    return Section(
        "Log-probabilities of chosen tokens",
        f"Forward and backward of {size['tokens']} tokens x width {size['width']} x {size['vocabulary']:,} words in "
        f"float32: all logits are {naive_run['logits_mib']:.0f} MiB, a chunk of guerdon's {CHUNK_MIB} MiB, the matrix "
        f"gradient {naive_run['matrix_gradient_mib']:.0f} MiB. Memory is what the resident peak grew by.",
        ("way", "memory added MiB", "in logits", "CPU s (least)", "x naive", "target"),
        rows,
    )


def _preference_section(cases: dict[str, Any]) -> Section:
    rows = []
    for name, pair in cases.items():
        _check_same_start(name, pair)
        middle = {side: median(_of(runs, "step", "cpu_s", "median")) for side, runs in pair.items()}
        least = {side: min(_of(runs, "step", "cpu_s", "least")) for side, runs in pair.items()}
        peak = {side: median(_of(runs, "rss_peak_mib")) for side, runs in pair.items()}
        own = {side: peak[side] - median(_of(runs, "imported", "rss_mib")) for side, runs in pair.items()}
        seconds, memory = middle["guerdon"] / middle["trl"], peak["guerdon"] / peak["trl"]
        rows.append(
            (
                PREFERENCE_TITLES[name],
                *(f"{middle[side]:.3f} ({least[side]:.3f})" for side in ("guerdon", "trl")),
                f"{seconds:.2f} ({least['guerdon'] / least['trl']:.2f})",
                _verdict(seconds, PREFERENCE_TARGET),
                *(f"{peak[side]:.0f} ({own[side]:.0f})" for side in ("guerdon", "trl")),
                f"{memory:.2f}",
                _verdict(memory, MEMORY_TARGET),
            )
        )
    work = next(iter(cases.values()))["guerdon"][0]["settings"]
    return Section(
        "One preference step",
        f"{work['pairs']} pairs a step; short: prompts of 8 tokens, both samples of 16; long: 128 and 32. CPU seconds a "
        "step, the median of all runs' medians and in brackets the least step. Peak resident MiB, in brackets without "
        "what the imports take. TRL's SimPO is its experimental CPO trainer's.",
        ("work", "guerdon s", "TRL s", "ratio", "target", "guerdon MiB", "TRL MiB", "ratio ", "target "),
        rows,
    )


def _flow_section(sides: dict[str, Any]) -> Section:
    if len({str(model) for runs in sides.values() for model in _of(runs[:1], "model")}) > 1:
        raise ValueError("flow-step: the sides did not start from the same weights")
    middle = {side: median(_of(runs, "step", "cpu_s", "median")) for side, runs in sides.items()}
    least = {side: min(_of(runs, "step", "cpu_s", "least")) for side, runs in sides.items()}
    rows = []
    for side, runs in sides.items():
        ratio = middle["guerdon"] / middle[side]
        rows.append(
            (
                side,
                f"{middle[side]:.2f} ({least[side]:.2f})",
                *(f"{median(run['phases_cpu_s'][phase] for run in runs):.2f}" for phase in FLOW_PHASES),
                f"{median(_of(runs, 'rss_peak_mib')):.0f}",
                f"{fmean(_of(runs, 'reward_last')):.2f}",
                "-" if side == "guerdon" else f"{ratio:.2f} ({least['guerdon'] / least[side]:.2f})",
                "-" if side == "guerdon" else _verdict(ratio, FLOW_TARGET),
            )
        )
    settings, loads = (
        sides["guerdon"][0]["settings"],
        [load for runs in sides.values() for load in _of(runs, "load_average")],
    )
    return Section(
        "One Flow-GRPO step",
        f"CPU seconds a step, the median of {len(sides['guerdon'])} runs' medians of {settings['steps']} steps and in brackets "
        f"the least step of all; {settings['prompts']} prompts, {settings['group']} samples each, "
        f"{settings['denoising_steps']} denoising steps, the bundled shapes' U-Net untrained. `loop` is the arithmetic of the "
        "published step loops; with channels last it has the layout of memory that guerdon gives to such networks. "
        f"Load averages of {min(loads):.1f} to {max(loads):.1f} on 2 cores. Ratio: guerdon's seconds "
        "to the row's, of medians and in brackets of least steps. Final reward: mean of the last three steps.",
        ("side", "CPU s", *FLOW_PHASES, "peak MiB", "final reward", "guerdon to it", "target"),
        rows,
    )


def _import_section(sides: dict[str, Any]) -> Section:
    rows = []
    torch = sides["guerdon"][0]["imports"]["torch"]["cpu_s"]
    limits = {"guerdon": IMPORT_TARGET, STAGE: torch + BESIDE_TORCH_TARGET}
    for side in sides.values():
        for kind in ("imports", "commands"):
            for name, found in side[0][kind].items():
                ours = name.partition(" ")[0] == "guerdon" and kind == "commands"
                limit = COMMAND_TARGET if ours else limits.get(name)
                target = "-" if limit is None else _verdict(found["cpu_s"], round(limit, 2), " s")
                shown = f"`{name}`" if kind == "commands" else f"import `{name}`"
                rows.append(
                    (shown, f"{found['cpu_s']:.3f}", str(found["modules"]), "yes" if found["torch"] else "no", target)
                )
    return Section(
        "Imports and command lines",
        "Least CPU seconds of five fresh interpreters. Imports leave the interpreter's own start out. Stage "
        f"functions may take torch's own import and {BESIDE_TORCH_TARGET} s.",
        ("what", "CPU s", "modules", "loads torch", "target"),
        rows,
    )


def show(made: list[Section]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for section in made:
        grid = Table(title=section.title, caption=section.note, title_justify="left", caption_justify="left")
        for column in section.columns:
            grid.add_column(column.strip())
        for row in section.rows:
            style = "red" if any("MISSED" in cell for cell in row) else None
            grid.add_row(*row, style=style)
        console.print(grid)


def write(page: Path, made: list[Section], results: dict[str, Any]) -> None:
    """Replace what stands between the markers of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    if not after:
        raise ValueError(f"{page.name} lacks the markers {BEGIN} and {END}")
    parts = [BEGIN, _conditions(results)]
    for section in made:
        lines = [section.columns, ["---"] * len(section.columns), *section.rows]
        grid = "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)
        parts.append(f"### {section.title}\n\n{section.note}\n\n{grid}")
    page.write_text(before + "\n\n".join(parts) + "\n\n" + END + after, encoding="utf-8")


def _conditions(results: dict[str, Any]) -> str:
    """When, where and with what the figures were taken."""
    dates = sorted({record["date"] for record in results.values()})
    machine = next(iter(results.values()))["machine"]
    versions: dict[str, str] = {}
    for record in results.values():
        for runs in record["sides"].values():
            versions |= runs[0]["versions"]
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    rounds = max(len(runs) for record in results.values() for runs in record["sides"].values())
    machine_words = f"{machine['cores']} cores of an {machine['processor']} ({machine['memory_gib']:g} GiB)"
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"Taken {days} on {machine_words}, {rounds} runs of each side in turn, one thread. {named}."
