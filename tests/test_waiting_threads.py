"""Threads of the command line sleep while they wait, and nobody else's environment is touched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pyro_lift import cli

COMMAND = """
import os, sys
from pyro_lift.cli import main
sys.argv = ["pyro-lift", "--help"]
try:
    main()
except SystemExit:
    print(os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_the_command_line_sleep_unless_the_environment_says_otherwise(
    given: dict[str, str], found: str
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
    run = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == found


def test_a_process_that_has_torch_already_keeps_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cli._let_threads_sleep()
    assert torch.__name__ in sys.modules and "OMP_WAIT_POLICY" not in os.environ
