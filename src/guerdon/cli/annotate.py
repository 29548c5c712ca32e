"""`guerdon annotate DATA --reward NAME`, and `guerdon annotate DATA --critic NAME`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.cli.parser import Parser
from guerdon.errors import RecipeError

if TYPE_CHECKING:
    from guerdon.training.annotation import Agreement, Annotation
    from guerdon.training.feedback import Criticism

_DESCRIPTION = """\
Make preference pairs of raw completions: score them, and write for each prompt the best one and one that it beats. Or, with
--critic, records of written feedback: which phrases of a completion are good and which are poor.

  guerdon annotate samples.jsonl --reward density_ratio --strong ./dpo --weak ./sft --out pairs.jsonl
  guerdon annotate samples.jsonl --reward exact_answer --reward.ignore_case true
  guerdon annotate samples.csv --reward mymodule:score --reward.scale 2
  guerdon annotate samples.jsonl --reward tournament --reward.judge.local.model ./judge --reward.topology swiss
  guerdon annotate samples.jsonl --reward chat --reward.base_url http://127.0.0.1:8000/v1 --reward.model judge-1
  guerdon train simpo --policy.model ./model --data pairs.jsonl

DATA is .jsonl, .json, .csv, .parquet or a saved datasets folder (folder:split) with one of these sets of columns:

  prompt, completions          a list of two or more texts
  prompt, completion           a row for each completion; the rows of a prompt may stand anywhere
  prompt, chosen, rejected     two completions, the first known to be better

A prompt is a text or a list of messages. Other columns go to the reward by name, and on into the pairs. Where a column
labels, label, scores or score says what completions are worth, the agreement of the reward with it is shown at the end.

The reward is a name of `guerdon methods --stage rewards`, a judge (chat, local, pairwise, pointwise: then all pairs of a
prompt are compared and the share won is the score), or module:function. Its options are --reward.OPTION VALUE.

  guerdon annotate samples.jsonl --critic chat --critic.base_url http://127.0.0.1:8000/v1 --critic.model critic-1
  guerdon annotate samples.jsonl --critic program --critic.function mymodule:criticise --out feedback.jsonl
  guerdon train span-reward --policy.model ./model --data samples.feedback.jsonl

With --critic one completion a prompt is enough; the samples.jsonl of a run will do as well. The critic is chat, local,
classifier, program or module:attribute. Feedback that cannot be used is left out and counted.

A command that was stopped goes on where it was when it is given again, and ends in the same file.
"""
# where a reward runs and how fast, which changes no pair: free to differ when an annotation goes on
_FREE = {"api_key_env", "backoff", "batch_size", "cache", "concurrency", "device", "timeout", "tries"}


def run(words: Sequence[str]) -> int:
    """Read the options, score the completions and write the pairs."""
    from guerdon.cli.train import split

    parser = _parser()
    own, settings = split(words, parser.options())
    args = parser.parse_args(own)
    if args.critic and (args.reward or args.strong or args.weak):
        raise RecipeError("annotate: --critic makes records of feedback, --reward makes pairs; give one of them.")
    spec = _critic(args, settings, parser) if args.critic else _reward(args, settings, parser)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # so that a reward can be module:attribute of a file here
    (_criticise if args.critic else _annotate)(args, spec)
    return 0


def _parser() -> Parser:
    parser = Parser("annotate", _DESCRIPTION)
    parser.add_argument("data", metavar="DATA", help="prompts with their completions")
    parser.add_argument("--reward", metavar="NAME", help="what scores them [density_ratio where --strong is given]")
    parser.add_argument("--critic", metavar="NAME", help="what writes feedback on them, in place of pairs")
    parser.add_argument("--strong", metavar="PATH", help="of density_ratio: the model that is right more often")
    parser.add_argument(
        "--weak", metavar="PATH", help="of density_ratio: the other; by default --strong without its adapters"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the result, .jsonl [DATA with the ending .pairs.jsonl or .feedback.jsonl]",
    )
    parser.add_argument(
        "--rejected",
        choices=("random", "worst"),
        default="random",
        help="one of those that score lower, or the lowest [random]",
    )
    parser.add_argument("--exclude-longest", action="store_true", help="leave the longest completion of a prompt out")
    parser.add_argument(
        "--label", metavar="COLUMN", help="what completions are known to be worth [labels, label, scores, score]"
    )
    parser.add_argument(
        "--on-bad-score", choices=("stop", "drop"), default="stop", help="what a score that is no number does [stop]"
    )
    parser.add_argument("--batch", type=_count, default=32, metavar="N", help="prompts at a time; bounds memory [32]")
    parser.add_argument(
        "--failures-max",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of --critic: the largest share of completions without usable feedback [0.5]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of which completion is rejected [0]")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _reward(args: argparse.Namespace, words: Sequence[str], parser: Parser) -> Any:
    """The reward as a component, checked as far as that goes without importing it."""
    from guerdon.components import normalise
    from guerdon.members import members

    name, options = _named("reward", args.reward or ("density_ratio" if args.strong else ""), words, parser)
    for option in ("strong", "weak"):
        if getattr(args, option) is not None:
            _set(options, [option], getattr(args, option), f"--{option}")
    if name in members("rewards.judges"):
        judge = normalise("rewards.judges", {name: options} if options else name, "--reward")
        return {"win_rate": {"judge": judge}}
    return normalise("rewards", {name: options} if options else name, "--reward")


def _critic(args: argparse.Namespace, words: Sequence[str], parser: Parser) -> Any:
    """The critic as a component, checked likewise."""
    from guerdon.components import normalise

    name, options = _named("critic", args.critic, words, parser)
    return normalise("rewards.critics", {name: options} if options else name, "--critic")


def _named(role: str, name: str, words: Sequence[str], parser: Parser) -> tuple[str, dict[str, Any]]:
    """The name and the options of a reward or critic."""
    from guerdon.recipes.overrides import parse
    from guerdon.recipes.yaml12 import loads

    given = parse(words)
    for option in given:
        if not option.startswith(f"{role}."):
            parser.unknown(f"--{option}")
    if not name:
        raise RecipeError("annotate: --reward is needed, such as --reward density_ratio --strong ./dpo --weak ./sft.")
    component = loads(name) if name.lstrip().startswith("{") else name
    options: dict[str, Any] = {}
    if isinstance(component, Mapping):
        if len(component) != 1:
            raise RecipeError(f"annotate: --{role} is one name, or one name with its options; got {name!r:.80}.")
        name, options = next(iter(component.items()))
        options = dict(options or {})
    for path, value in given.items():
        _set(options, path.split(".")[1:], value, f"--{path}")
    return name, options


def _set(options: dict[str, Any], keys: Sequence[str], value: Any, path: str) -> None:
    for key in keys[:-1]:
        options = options.setdefault(key, {})
        if not isinstance(options, dict):
            raise RecipeError(f"annotate: {path}: {key} is {options!r:.60} already, which has no options.")
    if keys[-1] in options:
        raise RecipeError(f"annotate: {path} is given twice.")
    options[keys[-1]] = value


def _annotate(args: argparse.Namespace, spec: Any) -> None:
    from guerdon.components import build
    from guerdon.language.completions import Groups
    from guerdon.language.data import read_rows

    out = _out(args, "pairs")
    groups = Groups(read_rows(args.data), args.label)
    if groups.varying:
        print(
            f"guerdon: {', '.join(groups.varying)}: rows of one prompt differ, so the reward and the pairs do not get it.",
            file=sys.stderr,
        )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one display, our own

    from guerdon.training.annotation import annotate
    from guerdon.training.progress import Display

    reward = build("rewards", spec, "--reward")
    name, said = _settings("reward", spec)
    settings = {"data": _content(args.data), "label": groups.label, **said}
    with Display("annotate", len(groups)) as display:
        found = annotate(
            groups,
            reward,
            out,
            name=name,
            settings=settings,
            rejected=args.rejected,
            exclude_longest=args.exclude_longest,
            seed=args.seed,
            batch=args.batch,
            on_bad_score=args.on_bad_score,
            show=lambda so_far: display.update(so_far.done, {}),
        )
    _print(found, groups.label)


def _criticise(args: argparse.Namespace, spec: Any) -> None:
    from guerdon.components import build
    from guerdon.language.data import read_rows

    out = _out(args, "feedback")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one display, our own

    from guerdon.training.feedback import Responses, criticise
    from guerdon.training.progress import Display

    responses = Responses(read_rows(args.data))
    critic = build("rewards.critics", spec, "--critic")
    settings = {"data": _content(args.data), **_settings("critic", spec)[1]}
    with Display("annotate", len(responses)) as display:
        found = criticise(
            responses,
            critic,
            out,
            settings=settings,
            batch=args.batch,
            failures_max=args.failures_max,
            show=lambda so_far: display.update(so_far.done, {}),
        )
    _print_feedback(found)


def _settings(role: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """The name of a component, and what the record has of it."""
    name, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    return name, {role: name, **{f"{role}.{option}": value for option, value in _said(options).items()}}


def _out(args: argparse.Namespace, what: str) -> Path:
    """Where the result goes: what was given, or a file beside the data."""
    path = Path(args.data)
    if not path.exists() and ":" in args.data:
        path = Path(args.data.rpartition(":")[0])
    out = args.out or path.with_name(f"{path.stem}.{what}.jsonl")
    if out.suffix != ".jsonl":
        raise RecipeError(f"annotate: --out must end in .jsonl; got {out}.")
    return out


def _content(data: str) -> str:
    """A hash of the data: what they say, wherever they lie."""
    import hashlib

    path = Path(data)
    if not path.exists():
        path = Path(data.rpartition(":")[0])
    digest = hashlib.sha256(data.rpartition(":")[2].encode() if path != Path(data) else b"")
    for file in [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file()):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _said(spec: Any) -> Any:
    """A component as the record has it: without what changes no score, with the state of files and folders that it names."""
    from guerdon.rewards.likelihood import fingerprint

    if isinstance(spec, Mapping):
        return {name: _said(value) for name, value in spec.items() if name not in _FREE}
    if isinstance(spec, str) and Path(spec).is_dir():
        return fingerprint(spec)
    if isinstance(spec, str) and Path(spec).is_file():
        return f"{spec} {_content(spec)}"
    return spec


def _print(found: Annotation, label: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from guerdon.training.annotation import WHY

    console = Console(highlight=False)
    counts = dict(found.counts)
    pairs, completions = counts.pop("pairs"), counts.pop("completions")
    console.print(f"{found.prompts:,} prompts, {completions:,} completions, {pairs:,} pairs", soft_wrap=True)
    for name, why in WHY.items():
        if number := counts.pop(name):
            console.print(f"  no pair for {number:,}: {why}", soft_wrap=True)
    for name, number in counts.items():
        if number:
            console.print(f"  {name.replace('_', ' ')}: {number:,}", soft_wrap=True)
    if not pairs:
        console.print(
            "  nothing to learn from: give another reward, or more completions for each prompt", soft_wrap=True
        )
    rows = [(name or "all", agreement) for name, agreement in sorted(found.agreement.items()) if agreement.pairs]
    if rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", title=f"agreement with {label}")
        for heading in ("", "pairs", "right", "tied", "written", "right"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, agreement in rows:
            table.add_row(name, *_figures(agreement))
        console.print(table)
    print(found.pairs)


def _print_feedback(found: Criticism) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    counts = found.counts
    phrases = f"{counts['good_spans']:,} good and {counts['poor_spans']:,} poor phrases"
    console.print(f"{found.responses:,} completions, {counts['records']:,} records: {phrases}", soft_wrap=True)
    for why, number in found.skipped.items():
        console.print(f"  skipped {number:,}: {why}", soft_wrap=True)
    if found.example:
        console.print(f"  the first of them: {found.example}", soft_wrap=True)
    for name in ("without_spans", "unmatched_phrases", "critic_calls", "malformed_replies"):
        if number := counts[name]:
            console.print(f"  {name.replace('_', ' ')}: {number:,}", soft_wrap=True)
    print(found.records)


def _figures(agreement: Agreement) -> list[str]:
    written = agreement.counts["picked_right"] + agreement.counts["picked_wrong"]
    return [
        f"{agreement.pairs:,}",
        f"{agreement.accuracy:.1%}",
        f"{agreement.counts['tied'] / agreement.pairs:.1%}",
        f"{written:,}",
        f"{agreement.picked:.1%}" if written else "–",
    ]
