"""The tests that want eight devices, which a process has to ask for as it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.skipif(EIGHT in os.environ.get("XLA_FLAGS", ""), reason="this is the run")
def test_on_eight_devices():
    files = map(str, sorted(Path(__file__).parent.glob("test_sharding*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags}
    for name in [n for n in environment if n.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
