"""Run the tests: the fast ones first, then the slow. Further arguments go to pytest."""

import _environment

_environment.ensure("requirements-dev.txt")

import sys

import pytest


def main(arguments: list[str]) -> int:
    for marker in ("not slow", "slow"):
        status = pytest.main(["-m", marker, "--rootdir", str(_environment.ROOT), *arguments])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return int(status)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
