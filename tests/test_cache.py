"""What is kept under the cache folder is whole, or made again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from guerdon import cache


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"a": torch.arange(3.0), "b": torch.tensor(self.calls)}


@pytest.fixture
def make(tmp_path, monkeypatch) -> Maker:
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    return Maker()


def kept(make: Maker, **recipe: object) -> dict[str, torch.Tensor]:
    return cache.weights("things", "thing", recipe, make, "making a thing")


def test_made_once_for_a_recipe(make, capsys):
    first, again = kept(make, steps=3), kept(make, steps=3)
    assert make.calls == 1
    assert all(torch.equal(first[name], again[name]) for name in ("a", "b"))
    assert kept(make, steps=4)["b"] == 2
    said = capsys.readouterr().err
    assert said.count("making a thing; kept in ") == 2


@pytest.mark.parametrize("damage", ["cut", "other", "changed"])
def test_a_damaged_file_is_made_again_with_a_message(make, damage):
    kept(make, steps=3)
    path = cache.weights_path("things", "thing", {"steps": 3})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        save_file({"a": torch.zeros(3)}, path)
    with pytest.warns(UserWarning, match=r"is damaged \(.*\); it is made again"):
        found = kept(make, steps=3)
    assert found["b"] == 2
    assert kept(make, steps=3)["b"] == 2


def test_a_failure_leaves_nothing_behind(make, tmp_path):
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.weights("things", "thing", {}, fail)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("GUERDON_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "guerdon"
