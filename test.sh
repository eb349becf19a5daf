#!/usr/bin/env bash
# All checks: style, types, tests. What follows is passed on to pytest.
set -euo pipefail
source "$(dirname "$0")/.ci/setup.sh"
cd "$root"
set_up requirements.txt tests/requirements.txt

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
