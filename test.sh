#!/usr/bin/env bash
# Style, types, tests: bash test.sh [full] [options of pytest]. full: the slow tests too.
set -euo pipefail
source "$(dirname "$0")/.ci/setup.sh"
cd "$root"
set_up requirements.txt tests/requirements.txt

wanted='not slow'
if [ "${1-}" = full ]; then
    wanted='slow or not slow'
    shift
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy

# Nothing is collected by one of the two calls if the options name a few tests.
status=0 found=0
tests() {
    local result=0
    OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@" || result=$?
    case $result in
        0) found=1 ;;
        5) ;;
        *) status=$result ;;
    esac
}
tests -n 2 --dist loadfile -m "($wanted) and not serial" "$@"
tests -m "($wanted) and serial" "$@"
[ "$status" != 0 ] || [ "$found" = 1 ] || status=5
exit "$status"
