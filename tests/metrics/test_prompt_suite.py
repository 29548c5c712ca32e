"""The prompt suite: what is in it, how answers are read, how judgements are pooled, and files of others."""

from __future__ import annotations

import csv
import json
import math
import warnings

import pytest

from guerdon.errors import DataError, ScoreError
from guerdon.metrics import PromptSuite, SuiteReport, judge_suite
from guerdon.metrics.prompt_suite import CRITERIA, FORMS, SUBJECTS, TEST_POINTS, THEMES, SuitePrompt

PROMPT = SuitePrompt(3, "two red cubes", ("Attribute - Color", "Attribute - Quantity"), ("red", "two"))


class TestStructure:
    def test_ten_criteria_and_27_points(self):
        assert len(CRITERIA) == 10
        assert len(TEST_POINTS) == len(set(TEST_POINTS)) == 27
        assert TEST_POINTS[3:5] == ("Text Generation", "Attribute - Color")
        assert len(THEMES) == 5
        assert sum(map(len, THEMES.values())) == 20

    def test_the_bundled_prompts(self):
        suite = PromptSuite.bundled()
        assert len(suite) == 40
        assert set(suite.counts()) == set(TEST_POINTS)
        assert min(suite.counts().values()) >= 3
        assert sum(suite.counts().values()) == 146
        assert {(p.theme, p.sub_theme) for p in suite} == {(t, s) for t, subs in THEMES.items() for s in subs}
        assert [p.index for p in suite] == list(range(40))
        for prompt in suite:
            assert prompt.form in FORMS
            assert set(prompt.subjects) <= set(SUBJECTS)
            assert all(prompt.descriptions)
            assert len(prompt.descriptions) == len(prompt.points)
        assert len({p.prompt for p in suite}) == 40

    def test_selection(self):
        suite = PromptSuite.bundled()
        assert {p.sub_theme for p in suite.select(theme="Film & Story")} == {"Animation", "Realism", "Sci-Fi"}
        assert len(suite.select(theme="Art", form="imperative")) == 2
        assert isinstance(suite[2:4], PromptSuite)
        assert [p.index for p in suite[2:4]] == [2, 3]

    @pytest.mark.parametrize("count", [0, 11])
    def test_numbers_of_points(self, count):
        with pytest.raises(DataError, match=f"prompt 0 must have 1 to 10 test points; it has {count}"):
            PromptSuite([SuitePrompt(0, "p", ("Style",) * count)])


class TestAnswers:
    def test_the_question(self):
        text = PROMPT.question()
        assert "two red cubes" in text
        assert "1. Attribute - Color: red\n2. Attribute - Quantity: two" in text
        assert "1. Style\n" in SuitePrompt(0, "p", ("Style",)).question()

    @pytest.mark.parametrize(
        ("answer", "scores"),
        [
            ([1, 0], [1, 0]),
            ({"analyses": ["a", "b"], "scores": [0, 1]}, [0, 1]),
            ('```json\n{"analyses": ["a", "b"], "scores": [1, 1]}\n```', [1, 1]),
            ([1.0, 0.0], [1, 0]),
            ([1], None),
            ([1, 2], None),
            ([1, 0, 1], None),
            ({"scores": [0, 1]}, None),
            ({"analyses": ["a"], "scores": [0, 1]}, None),
            ({"analyses": ["a", "b"], "scores": [0]}, None),
            ("both are right", None),
            ('{"analyses": ["a", "b"], "scores": ', None),
            (None, None),
        ],
    )
    def test_reading(self, answer, scores):
        assert PROMPT.read_scores(answer) == scores


class TestReport:
    def test_points_are_pooled(self):
        report = SuiteReport.from_judgements(
            [["Attribute - Size"], ["Attribute - Color"] * 3, ["Style"]], [[1], [0, 0, 0], [1]]
        )
        assert report.primary == {"Attribute": 0.25, "Style": 1.0}
        assert report.sub == {"Attribute - Size": 1.0, "Attribute - Color": 0.0, "Style": 1.0}
        assert report.overall == 0.625
        assert report.judged == {"Attribute - Size": 1, "Attribute - Color": 3, "Style": 1}

    def test_the_criterion_ends_at_the_first_hyphen(self):
        names = ["Action - Full-body", "Action - Non-contact Interaction", "Entity Layout - Two-Dimensional"]
        report = SuiteReport.from_judgements([names], [[1, 0, 1]])
        assert report.primary == {"Action": 0.5, "Entity Layout": 1.0}

    def test_rounding(self):
        report = SuiteReport.from_judgements([["Style"]] * 3, [[1], [1], [0]])
        assert (report.sub, report.overall) == ({"Style": 0.6667}, 0.6667)

    def test_what_could_not_be_read_is_left_out(self):
        report = SuiteReport.from_judgements([["Style"], ["World Knowledge"]], [[1], None])
        assert (report.sub, report.skipped) == ({"Style": 1.0}, 1)
        nothing = SuiteReport.from_judgements([["Style"]], [None])
        assert nothing.sub == nothing.primary == {}
        assert math.isnan(nothing.overall)

    def test_a_name_of_ones_own(self):
        with pytest.warns(
            UserWarning, match=r"'Attribute - Colour' is no test point.*Did you mean 'Attribute - Color'"
        ):
            report = SuiteReport.from_judgements([["Attribute - Colour", "Style"]], [[1, 0]])
        assert report.sub == {"Attribute - Colour": 1.0, "Style": 0.0}
        assert report.overall == 0.5
        with pytest.warns(UserWarning, match="'Mood' is no test point"):
            report = SuiteReport.from_judgements([["Mood", "Style"]], [[1, 0]])
        assert report.primary == {"Mood": 1.0, "Style": 0.0}
        assert report.overall == 0.0  # Mood is no criterion of the suite

    def test_a_bare_criterion_is_known(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert SuiteReport.from_judgements([["Attribute"]], [[1]]).primary == {"Attribute": 1.0}

    def test_themes(self):
        report = SuiteReport.from_judgements([["Style"]] * 3, [[1], [0], [1]], ["Art", "Art", "Design"])
        assert report.themes == {"Art": 0.5, "Design": 1.0}

    def test_the_table(self):
        report = SuiteReport.from_judgements([["Attribute - Size", "Attribute - Color", "Style"]], [[1, 0, 1]], ["Art"])
        lines = [line.split() for line in report.table().splitlines()]
        assert lines == [
            ["Attribute", "50.00%"],
            ["Size", "100.00%"],
            ["Color", "0.00%"],
            ["Style", "100.00%"],
            ["Art", "66.67%"],
            ["overall", "75.00%"],
        ]

    @pytest.mark.parametrize(
        ("points", "scores", "message"),
        [
            ([["Style"], ["Style"]], [[1]], "2 lists of test points for 1 of scores"),
            ([["Style"], ["Style", "Style"]], [[1], [1]], "prompt 1 has 1 scores for 2 test points"),
            ([["Style"]], [[2]], "prompt 0: a score must be 0 or 1; got 2 for 'Style'"),
        ],
    )
    def test_errors(self, points, scores, message):
        with pytest.raises(DataError, match=message):
            SuiteReport.from_judgements(points, scores)


class TestJudging:
    IMAGES = (["red ball", "two red"], ["two", "blue"])
    SUITE = PromptSuite([PROMPT, SuitePrompt(4, "p", ("Style",), ("two",), theme="Art")])

    @staticmethod
    def looks(asked):
        return [[int(about in image) for about in prompt.descriptions] for prompt, image in asked]

    def test_every_image(self):
        report = judge_suite(self.SUITE, self.IMAGES, self.looks)
        assert report.sub == {"Attribute - Color": 1.0, "Attribute - Quantity": 0.5, "Style": 0.5}
        assert report.themes == {"Art": 0.5}

    def test_what_cannot_be_read_is_asked_for_again(self):
        rounds = []

        def stutters(asked):
            rounds.append(len(asked))
            return [None if len(rounds) == 1 and i % 2 else a for i, a in enumerate(self.looks(asked))]

        report = judge_suite(self.SUITE, self.IMAGES, stutters)
        assert rounds == [4, 2]
        assert report.skipped == 0
        assert report == judge_suite(self.SUITE, self.IMAGES, self.looks)

    def test_only_so_often(self):
        rounds = []
        report = judge_suite(self.SUITE, self.IMAGES, lambda asked: rounds.append(1) or ["?"] * len(asked), tries=2)
        assert (len(rounds), report.skipped) == (2, 4)

    def test_errors(self):
        with pytest.raises(DataError, match="1 lists of images for 2 prompts"):
            judge_suite(self.SUITE, [["x"]], self.looks)
        with pytest.raises(ScoreError, match="one answer for each of 4 images; got 1"):
            judge_suite(self.SUITE, self.IMAGES, lambda asked: [[1]])


class TestFiles:
    def test_json_lines(self, tmp_path):
        path = tmp_path / "suite.jsonl"
        path.write_text(json.dumps({"prompt": "p", "points": {"Style": "ink"}, "subjects": "Animal"}) + "\n\n")
        (prompt,) = PromptSuite.read(path)
        assert prompt == SuitePrompt(0, "p", ("Style",), ("ink",), subjects=("Animal",))

    def test_a_table_with_a_column_of_json_and_other_names(self, tmp_path):
        path = tmp_path / "suite.csv"
        rest = {"tests": ["Style", "Style"], "about": ["ink", "wash"], "Theme": "Art"}
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["index", "prompt_en", "dims"])
            writer.writerow([7, "a {curly}, text", json.dumps(rest)])
        keys = {"prompt": "prompt_en", "points": "tests", "descriptions": "about", "theme": "Theme"}
        (prompt,) = PromptSuite.read(path, keys=keys)
        assert prompt == SuitePrompt(7, "a {curly}, text", ("Style", "Style"), ("ink", "wash"), "Art")
        with pytest.raises(
            DataError, match=r"row 0 needs prompt and points; it has index, prompt_en, tests.*with keys"
        ):
            PromptSuite.read(path)

    def test_faults(self, tmp_path):
        with pytest.raises(DataError, match="there is no file"):
            PromptSuite.read(tmp_path / "no.csv")
        path = tmp_path / "suite.jsonl"
        path.write_text('{"prompt": "p", "points": ["Style"]}\n{"prompt": \n')
        with pytest.raises(DataError, match="row 1"):
            PromptSuite.read(path)
        path.write_text('{"prompt": "p", "points": ["Style"], "descriptions": ["a", "b"]}\n')
        with pytest.raises(DataError, match="prompt 0 has 2 descriptions of 1 test points"):
            PromptSuite.read(path)
