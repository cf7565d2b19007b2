"""A recipe is checked once before anything starts: by whoever starts its ranks, or
under torchrun by each rank."""

import os

import pytest
from blip_train import launch
from blip_train.recipe import Recipe, RuntimeRecipe


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, ["sources", "directory", "launch"]),
    ({"RANK": "1", "WORLD_SIZE": "2"}, ["sources", "directory", "rank"]),  # torchrun
    # Another process.
    ({"RANK": "1", "WORLD_SIZE": "2", launch.LAUNCHER: "1"}, ["sources", "directory", "rank"]),
    ({"RANK": "1", "WORLD_SIZE": "2", launch.LAUNCHER: str(os.getppid())}, ["rank"]),
], ids=["launcher", "torchrun", "stale", "launched"])
def test_checks_run_once(monkeypatch, tmp_path, environment, expected):
    calls = []
    for variable in ("RANK", "WORLD_SIZE", launch.LAUNCHER):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    for name in ("check_sources", "check_directory", "_launch", "_rank"):
        monkeypatch.setattr(launch, name, lambda *_, name=name: calls.append(name))
    launch.carry_out(Recipe(runs=str(tmp_path), runtime=RuntimeRecipe(ranks=2)))
    assert [name.removeprefix("check_").removeprefix("_") for name in calls] == expected
