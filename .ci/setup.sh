# Sourced by demo.sh and test.sh: root is the project's folder; set_up FILES makes $root/.venv with what they require.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

set_up() {
    local python=${PYTHON:-python3} stamp file
    stamp=$root/.venv/installed-$(cat "$@" | cksum | cut -d ' ' -f 1)
    if [ -e "$stamp" ]; then return; fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Error: $python is not Python 3.10 or newer: install one, or name it with PYTHON=/path/to/python." >&2
        exit 2
    }
    echo "Setting up $root/.venv (the first time only) ..."
    "$python" -m venv "$root/.venv"
    for file in "$@"; do
        "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
    done
    touch "$stamp"
}
