"""A suite of prompts with test points, and the scores of a generator by criterion: the structure of UniGenBench.

Each prompt says in words what an image must get right, as points under 27 names in 10 criteria; a judge answers every
point of every image with right or wrong, and accuracies are pooled by name and by criterion.
Y. Wang et al. 2025, Pref-GRPO, arXiv 2508.20751. The prompts that come with the library are our own.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, ScoreError, nearest

CRITERIA: dict[str, tuple[str, ...]] = {
    "Style": (),
    "World Knowledge": (),
    "Logical Reasoning": (),
    "Text Generation": (),
    "Attribute": ("Color", "Expression", "Material", "Quantity", "Shape", "Size"),
    "Action": ("Animal", "Contact Interaction", "Non-contact Interaction", "Full-body", "Hand", "State"),
    "Relationship": ("Comparison", "Composition", "Inclusion", "Similarity"),
    "Compound": ("Feature Matching", "Imagination"),
    "Grammar": ("Consistency", "Negation", "Pronoun Reference"),
    "Entity Layout": ("Two-Dimensional", "Three-Dimensional"),
}
TEST_POINTS: tuple[str, ...] = tuple(
    name for primary, subs in CRITERIA.items() for name in ([f"{primary} - {sub}" for sub in subs] or [primary])
)
# the five themes are UniGenBench's; of its twenty sub-themes those of Design and Film & Story, the others are ours
THEMES: dict[str, tuple[str, ...]] = {
    "Art": ("Painting", "Photography", "Sculpture", "Ink"),
    "Film & Story": ("Animation", "Realism", "Sci-Fi"),
    "Illustration": ("Book", "Editorial", "Scientific"),
    "Design": ("Advertising/E-commerce", "Assets", "Fashion", "Game", "IP", "Logo/Icon", "Poster", "Spatial", "UI"),
    "Creative Divergence": ("Surreal",),
}
SUBJECTS = ("Character", "Animal", "Other Entity", "Scene", "Anthropomorphic")
FORMS = ("descriptive", "imperative")
MOST_POINTS = 10


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        index: its number in the suite.
        prompt: the text a generator is given.
        points: names of its test points, in the order of scores; one may occur twice.
        descriptions: what must be seen for each to be right.
        theme: what it is about, such as Design.
        sub_theme: such as Logo/Icon.
        subjects: kinds of things in it.
        form: `descriptive` or `imperative`.
    """

    index: int
    prompt: str
    points: tuple[str, ...]
    descriptions: tuple[str, ...] = ()
    theme: str = ""
    sub_theme: str = ""
    subjects: tuple[str, ...] = ()
    form: str = ""

    def question(self) -> str:
        """What a language model that sees the image can be asked; `read_scores` reads its answer."""
        both = zip(self.points, self.descriptions or [""] * len(self.points), strict=True)
        points = "\n".join(f"{i}. {name}: {about}".rstrip(": ") for i, (name, about) in enumerate(both, 1))
        return (
            f"An image was made for this prompt:\n{self.prompt}\n\nCheck it on {len(self.points)} points:\n{points}\n\n"
            "For each point in order write one sentence of analysis, then 1 if the image gets it right, else 0. Answer "
            'with JSON alone: {"analyses": ["...", ...], "scores": [1, ...]}'
        )

    def read_scores(self, answer: Any) -> list[int] | None:
        """The scores of an answer, or None for one that is no answer to the question.

        Args:
            answer: a text with a JSON object in it, such an object, or a list of 0 and 1.
        """
        if isinstance(answer, str):
            start, end = answer.find("{"), answer.rfind("}")
            try:
                answer = json.loads(answer[start : end + 1])
            except (ValueError, RecursionError):  # what is no JSON is no answer
                return None
        analyses: Any = None
        if isinstance(answer, Mapping):
            analyses, answer = answer.get("analyses"), answer.get("scores")
            if not isinstance(analyses, (list, tuple)) or len(analyses) != len(self.points):
                return None
        if not isinstance(answer, (list, tuple)) or len(answer) != len(self.points):
            return None
        return [int(score) for score in answer] if all(score in (0, 1) for score in answer) else None


class PromptSuite(Sequence[SuitePrompt]):
    """Prompts with test points.

    Args:
        prompts: in order.

    Raises:
        DataError: a prompt has no test point, or more than 10.

    Example:
        >>> suite = PromptSuite.bundled()
        >>> len(suite), len(suite.counts()), suite[9].theme
        (40, 27, 'Film & Story')

    Source:
        The structure of UniGenBench, arXiv 2508.20751: themes, kinds of subject, form, 1 to 5 test points (1 to 10 in its
        long form). The prompts are our own.
    """

    def __init__(self, prompts: Iterable[SuitePrompt]) -> None:
        self.prompts = list(prompts)
        for prompt in self.prompts:
            if not 1 <= len(prompt.points) <= MOST_POINTS:
                raise DataError(
                    f"metrics.prompt_suite: prompt {prompt.index} must have 1 to {MOST_POINTS} test points; it has "
                    f"{len(prompt.points)}."
                )
            if prompt.descriptions and len(prompt.descriptions) != len(prompt.points):
                raise DataError(
                    f"metrics.prompt_suite: prompt {prompt.index} has {len(prompt.descriptions)} descriptions of "
                    f"{len(prompt.points)} test points."
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return PromptSuite(self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __iter__(self) -> Iterator[SuitePrompt]:
        return iter(self.prompts)

    @classmethod
    def bundled(cls) -> PromptSuite:
        """The 40 prompts that come with the library: every theme, sub-theme and test point, 3 or 4 points each."""
        text = files("guerdon.metrics").joinpath("data/prompt_suite.jsonl").read_text(encoding="utf-8")
        return cls(_entry(json.loads(line), n, "the bundled suite", {}) for n, line in enumerate(text.splitlines()))

    @classmethod
    def read(cls, path: str | Path, *, keys: Mapping[str, str] | None = None) -> PromptSuite:
        """A suite from a file.

        Args:
            path: `.jsonl` with an object a line, or `.csv` with columns index, prompt and one of JSON that holds the rest.
                An object has prompt, points (name -> what must be seen, or a list of names, with a list `descriptions`
                beside it) and, if it likes, index, theme, sub_theme, subjects, form.
            keys: one of those names -> what the file calls it.

        Raises:
            DataError: the file is not there or a row is not of that form; it names the row.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"metrics.prompt_suite: there is no file {path}.")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream)) if path.suffix == ".csv" else stream.read().splitlines()
        named = {**(keys or {})}
        return cls(
            _entry(_loads(row, n, path), n, str(path), named) for n, row in enumerate(row for row in rows if row)
        )

    def counts(self) -> dict[str, int]:
        """How often each test point occurs, in the order of TEST_POINTS."""
        found = Counter(name for prompt in self for name in prompt.points)
        return {name: found[name] for name in (*TEST_POINTS, *(set(found) - set(TEST_POINTS))) if found[name]}

    def select(self, **wanted: str) -> PromptSuite:
        """The prompts whose attributes have these values, such as theme="Art"."""
        return PromptSuite(p for p in self if all(getattr(p, name) == value for name, value in wanted.items()))


@dataclass(frozen=True)
class SuiteReport:
    """Accuracies of a generator on a suite, in [0, 1], rounded to 4 digits.

    Attributes:
        primary: criterion -> accuracy over all of its judged points: pooled, not the mean of its names' accuracies.
        sub: test point -> accuracy.
        overall: mean over the criteria of UniGenBench that were judged; NaN if there is none. Our reading: the authors'
            scorer prints none.
        judged: test point -> number of points judged.
        skipped: answers that could not be read.
        themes: theme -> accuracy over all of its points, where themes are known.
    """

    primary: dict[str, float]
    sub: dict[str, float]
    overall: float
    judged: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    themes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_judgements(
        cls,
        testpoints: Sequence[Sequence[str]],
        scores: Sequence[Sequence[int] | None],
        themes: Sequence[str] | None = None,
    ) -> SuiteReport:
        """Pool judgements.

        Args:
            testpoints: for each judged prompt (one entry for each of its images) the names of its points.
            scores: for each 0 or 1 for each of its points; None = the answer could not be read.
            themes: for each its theme.

        Returns:
            The report; names come in the order in which they were met, and one that was never judged is absent.

        Raises:
            DataError: the numbers of entries or of points differ, or a score is neither 0 nor 1; it names the entry.

        Example:
            >>> names = ["Attribute - Size"], ["Attribute - Color"] * 3
            >>> SuiteReport.from_judgements(names, [[1], [0, 0, 0]]).primary
            {'Attribute': 0.25}

        Source:
            The authors' scorer of UniGenBench, arXiv 2508.20751.
        """
        where = "metrics.prompt_suite"
        groups = list(themes) if themes is not None else [""] * len(testpoints)
        if not len(testpoints) == len(scores) == len(groups):
            raise DataError(f"{where}: {len(testpoints)} lists of test points for {len(scores)} of scores.")
        sub, primary, by_theme = _Tally(), _Tally(), _Tally()
        skipped = 0
        for n, (names, found, theme) in enumerate(zip(testpoints, scores, groups, strict=True)):
            if found is None:
                skipped += 1
                continue
            if len(names) != len(found):
                raise DataError(f"{where}: prompt {n} has {len(found)} scores for {len(names)} test points.")
            for name, score in zip(names, found, strict=True):
                if score not in (0, 1):
                    raise DataError(f"{where}: prompt {n}: a score must be 0 or 1; got {score!r} for {name!r}.")
                sub.add(name, score)
                primary.add(_primary(name), score)
                by_theme.add(theme, score)
        for name in sub.count:
            if name not in TEST_POINTS and name not in CRITERIA:
                warnings.warn(
                    f"{where}: {name!r} is no test point of the suite; it is counted by itself.{nearest(name, TEST_POINTS)}",
                    UserWarning,
                    stacklevel=2,
                )
        known = [value for name, value in primary.shares().items() if name in CRITERIA]
        overall = sum(known) / len(known) if known else float("nan")
        by_theme.count.pop("", None)
        return cls(
            _rounded(primary.shares()),
            _rounded(sub.shares()),
            round(overall, 4),
            dict(sub.count),
            skipped,
            _rounded(by_theme.shares()),
        )

    def table(self) -> str:
        """The accuracies as text: criteria with their test points below them."""
        width = max(map(len, (*self.primary, *self.sub, "overall")), default=0) + 2
        lines = []
        for name, share in self.primary.items():
            lines.append(f"{name:<{width}}{share:7.2%}")
            inside = [sub for sub in self.sub if _primary(sub) == name and sub != name]
            lines += [f"  {sub.partition('-')[2].strip():<{width - 2}}{self.sub[sub]:7.2%}" for sub in inside]
        lines += [f"{theme:<{width}}{share:7.2%}" for theme, share in self.themes.items()]
        return "\n".join([*lines, f"{'overall':<{width}}{self.overall:7.2%}"])


Answers = Sequence[Any]


def judge_suite(
    suite: Sequence[SuitePrompt],
    images: Sequence[Sequence[Any]],
    judge: Callable[[list[tuple[SuitePrompt, Any]]], Answers],
    *,
    tries: int = 3,
) -> SuiteReport:
    """Score a generator's images of a suite.

    Args:
        suite: the prompts.
        images: for each prompt its images; UniGenBench has 4. Anything that the judge can look at.
        judge: from a list of (prompt, image) to an answer for each, of any form that `SuitePrompt.read_scores` reads.
        tries: how often an answer that cannot be read is asked for.

    Returns:
        The report; what could not be read in all tries is left out and counted in `skipped`.

    Raises:
        DataError: there are not images for every prompt.
        ScoreError: the judge does not give one answer for each image.

    Example:
        >>> suite = PromptSuite([SuitePrompt(0, "a red cube", ("Attribute - Color", "Attribute - Shape"), ("red", "cube"))])
        >>> report = judge_suite(suite, [["red ball", "red cube"]], lambda asked: [
        ...     [int(about in image) for about in prompt.descriptions] for prompt, image in asked])
        >>> report.sub, report.primary
        ({'Attribute - Color': 1.0, 'Attribute - Shape': 0.5}, {'Attribute': 0.75})
    """
    if len(images) != len(suite):
        raise DataError(f"metrics.judge_suite: {len(images)} lists of images for {len(suite)} prompts.")
    asked = [(prompt, image) for prompt, group in zip(suite, images, strict=True) for image in group]
    scores: list[list[int] | None] = [None] * len(asked)
    for _ in range(tries):
        missing = [n for n, found in enumerate(scores) if found is None]
        if not missing:
            break
        answers = judge([asked[n] for n in missing])
        if len(answers) != len(missing):
            raise ScoreError(
                f"metrics.judge_suite: the judge must give one answer for each of {len(missing)} images; got "
                f"{len(answers)}."
            )
        for n, answer in zip(missing, answers, strict=True):
            scores[n] = asked[n][0].read_scores(answer)
    names = [list(prompt.points) for prompt, _ in asked]
    return SuiteReport.from_judgements(names, scores, [prompt.theme for prompt, _ in asked])


class _Tally:
    """Right ones and all, by name."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.count: Counter[str] = Counter()

    def add(self, name: str, score: int) -> None:
        self.right[name] += score
        self.count[name] += 1

    def shares(self) -> dict[str, float]:
        return {name: self.right[name] / count for name, count in self.count.items()}


def _primary(name: str) -> str:
    """What stands before the first hyphen; a bare name is its own criterion."""
    return name.partition("-")[0].strip()


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: round(share, 4) for name, share in shares.items()}


def _loads(row: Any, number: int, path: Path) -> dict[str, Any]:
    """A row of a file as one flat object: a line of JSON, or a row of columns of which some may be JSON."""
    if isinstance(row, str):
        try:
            return json.loads(row)
        except ValueError as error:
            raise DataError(f"metrics.prompt_suite: {path}, row {number}: {error}.") from None
    whole: dict[str, Any] = {}
    for name, text in row.items():
        try:
            value = json.loads(text) if str(text).lstrip().startswith(("{", "[")) else text
        except ValueError as error:
            raise DataError(f"metrics.prompt_suite: {path}, row {number}, column {name}: {error}.") from None
        whole |= value if isinstance(value, dict) and name not in ("points", "prompt") else {name: value}
    return whole


def _entry(row: Mapping[str, Any], number: int, where: str, keys: Mapping[str, str]) -> SuitePrompt:
    def get(name: str, otherwise: Any = None) -> Any:
        return row.get(keys.get(name, name), otherwise)

    points, about = get("points"), get("descriptions", ())
    if isinstance(points, Mapping):
        points, about = list(points), list(points.values())
    if not isinstance(points, (list, tuple)) or not isinstance(about, (list, tuple)) or not get("prompt"):
        raise DataError(
            f"metrics.prompt_suite: {where}, row {number} needs prompt and points; it has {', '.join(map(str, row))}. "
            "Say with keys what the file calls them."
        )
    subjects = get("subjects", ())
    return SuitePrompt(
        int(get("index", number)),
        str(get("prompt")),
        tuple(map(str, points)),
        tuple(map(str, about)),
        str(get("theme", "")),
        str(get("sub_theme", "")),
        tuple(map(str, [subjects] if isinstance(subjects, str) else subjects)),
        str(get("form", "")),
    )
