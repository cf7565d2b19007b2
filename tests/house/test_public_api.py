"""The names of `from blip_fast import …`, the examples in their docstrings, and the cost of the import."""

import doctest
import subprocess
import sys
from importlib.resources import files

import pytest
from hf_models import save_model, small_tokenizer
from odd_files import save_pictures

import blip_fast
from blip_fast.tasks.model_loading import PretrainedTask


@pytest.mark.parametrize("name", blip_fast.__all__)
def test_a_task_is_imported_by_its_name(name):
    task = getattr(blip_fast, name)
    assert issubclass(task, PretrainedTask) and task.__name__ == name and task.__doc__


ARCHITECTURES = {"Answerer": "BlipForQuestionAnswering", "Captioner": "BlipForConditionalGeneration"}


@pytest.mark.parametrize("name", blip_fast.__all__)
def test_the_example_in_its_docstring(name, tmp_path):
    """Run with a small random checkpoint, so examples show shapes and types rather than values."""
    task = getattr(blip_fast, name)
    checkpoint = tmp_path / "checkpoint"
    save_model(ARCHITECTURES.get(name, "BlipForImageTextRetrieval"), small_tokenizer(), checkpoint)
    folder = save_pictures(tmp_path, 2)
    photos = [folder / "0.png", folder / "1.png"]
    given = {"checkpoint": checkpoint, "photo": photos[0], "photos": photos}
    (example,) = doctest.DocTestFinder(recurse=False).find(
        task, globs={**vars(sys.modules[task.__module__]), **given})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_all_names_are_listed():
    assert set(dir(blip_fast)) == set(blip_fast.__all__)
    scope: dict[str, object] = {}
    exec("from blip_fast import *", scope)
    assert set(blip_fast.__all__) <= set(scope)


def test_an_unknown_name():
    with pytest.raises(ImportError, match="Captioneer"):
        exec("from blip_fast import Captioneer")


def test_importing_the_package_imports_no_pytorch():
    done = subprocess.run([sys.executable, "-c", "import sys, blip_fast; print('torch' in sys.modules)"],
                          capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("package", ["blip_fast", "blip_kernels"])
def test_types_are_for_users_too(package):
    assert (files(package) / "py.typed").is_file()
