# Sourced by demo.sh and test.sh: root is the project's folder; set_up FILES makes $root/.venv with what they require.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

set_up() {
    local python=${PYTHON:-python3} file stamp
    for file in "$@"; do
        stamp=$root/.venv/installed-$(cksum <"$file" | cut -d ' ' -f 1)
        if [ -e "$stamp" ]; then continue; fi
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "Error: $python is not Python 3.10 or newer: install one, or name it with PYTHON=/path/to/python." >&2
            exit 2
        }
        echo "Setting up $root/.venv for $file (the first time only) ..."
        [ -x "$root/.venv/bin/pip" ] || "$python" -m venv "$root/.venv"
        "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
        touch "$stamp"
    done
}
