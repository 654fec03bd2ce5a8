"""Command lines of loglinear, one after the other, in a process that a launcher started."""

import os
import shlex
import sys
from unittest import mock

from accelerate.state import AcceleratorState, GradientState

from loglinear import cli


def main(ports: list[str], lines: list[str]) -> None:
    """Run the lines. Each has a port, at which its processes meet: the launcher's store serves one meeting alone."""
    for port, line in zip(ports, lines, strict=True):
        with mock.patch.dict(os.environ, MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False"):
            try:
                cli.main(shlex.split(line))
            except SystemExit as ended:
                if ended.code:
                    print(f"{line}: exit code {ended.code}", file=sys.stderr)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
