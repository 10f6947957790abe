"""Which versions of DeepSpeed are accepted: those that the private parts in use were tested with."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmclip_dist.engine.deepspeed_inside import TESTED, check_version


def test_the_installed_version_is_accepted_and_others_are_refused_with_the_mend() -> None:
    check_version()
    check_version(version("deepspeed"))
    for other in ("0.18.9", "0.20.0", "1.0"):
        with pytest.raises(ValueError, match=rf"deepspeed {other} is installed, but .*pip install 'deepspeed{TESTED}'"):
            check_version(other)


def test_the_package_asks_for_the_tested_versions() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (asked,) = (found for text in project["dependencies"] if (found := Requirement(text)).name == "deepspeed")
    assert asked.specifier == SpecifierSet(TESTED)


def test_an_engine_loads_no_compiler_to_learn_that_its_optimizer_is_not_muon() -> None:
    program = (
        "import sys; from mmclip_dist.engine import deepspeed_inside; deepspeed_inside.leave_muon_uncompiled();"
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam; from deepspeed.runtime import compiler;"
        "import torch; print('compiles', compiler.compile() is torch.compile, 'torch._inductor.lowering' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1:] == ["compiles True False"], ran.stdout + ran.stderr
