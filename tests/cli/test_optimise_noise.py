"""`guerdon optimise-noise` on a saved pipeline and on a run, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from guerdon.cli.main import main
from tests.diffusion.pipelines import stable_diffusion

REWARDS = """
def red(images, prompts):
    assert len(prompts) == len(images)
    return images[:, 0].mean((1, 2))

def labelled(images, label):
    return images.mean((1, 2, 3)) * label[0]

def other(samples):
    return [[0.0 for _ in group] for group in samples]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "myrewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("myrewards", None)
    yield tmp_path
    sys.modules.pop("myrewards", None)


def test_a_saved_pipeline(place, capsys):
    stable_diffusion().save_pretrained(place / "pipeline")
    words = ["--prompt", "a red cat", "--prompt", "dog", "--reward", "myrewards:red", "--samples", "2"]
    words += ["--reward", "myrewards:labelled", "--column", "label=2.0", "--weight", "5", "--weight", "0"]
    assert main(["optimise-noise", "pipeline", *words, "--iterations", "4", "--batch", "3", "--refine", "2"]) == 0
    course = json.loads((place / "noise" / "trajectory.json").read_text())
    assert [one["prompt"] for one in course["samples"]] == ["a red cat"] * 2 + ["dog"] * 2
    for n, one in enumerate(course["samples"]):
        assert one["best"]["red"] >= one["before"]["red"]
        assert len(one["loss"]) == 4
        assert one["loss"][0] == pytest.approx(-5 * one["before"]["red"], abs=1e-4)
        for kind in ("before", "best", "refined"):
            assert (place / "noise" / one["images"][kind]).read_bytes()[1:4] == b"PNG"
        assert one["images"]["best"] == f"best-{n}.png"
    assert load_file(place / "noise" / "noise.safetensors")["noise"].shape == (4, 4, 8, 8)
    assert capsys.readouterr().out.count("best-") == 4
    assert main(["optimise-noise", "pipeline", *words]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["shapes/ful", "--prompt", "x", "--reward", "myrewards:red"], "Did you mean 'shapes/full'"),
        (["nowhere", "--reward", "myrewards:red"], "at least one --prompt"),
        (["nowhere", "--prompt", "x", "--reward", "myrewards:red"], "cannot be loaded"),
        (["nowhere", "--prompt", "x", "--weight", "1"], "as many --weight as --reward"),
        (["nowhere", "--prompt", "x", "--iterations", "0"], "must be at least 1"),
    ],
)
def test_errors(place, capsys, words, text):
    assert main(["optimise-noise", *words]) == 2
    assert text in capsys.readouterr().err


def test_rewards_that_cannot_be_used(place, capsys):
    stable_diffusion().save_pretrained(place / "pipeline")
    capsys.readouterr()
    for reward, text in (("other", "does not name `images`"), ("labelled", "needs the field 'label'")):
        assert main(["optimise-noise", "pipeline", "--prompt", "dog", "--reward", f"myrewards:{reward}"]) in (1, 2)
        assert text in capsys.readouterr().err


def test_its_help_needs_no_torch():
    code = "import sys; from guerdon.cli.main import main; main(['optimise-noise', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--norm-weight" in done.stdout
