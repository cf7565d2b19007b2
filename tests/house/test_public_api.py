"""What `from blip_fast import …` gives, and what importing the package costs."""

import subprocess
import sys
from importlib.resources import files

import pytest

import blip_fast
from blip_fast.tasks.model_loading import PretrainedTask


@pytest.mark.parametrize("name", blip_fast.__all__)
def test_a_task_is_imported_by_its_name(name):
    task = getattr(blip_fast, name)
    assert issubclass(task, PretrainedTask) and task.__name__ == name and task.__doc__


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
