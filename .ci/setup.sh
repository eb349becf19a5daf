# Sourced by demo.sh and test.sh: root is the project's folder; set_up FILES makes $root/.venv with what they require, in
# the releases of constraints.txt.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# pip without its warnings about folders of packages that this machine names and does not have. Its exit status is kept.
quiet_pip() {
    { "$root/.venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" 2>&1 >&3 |
        sed '/^WARNING: Location .* is ignored/d' >&2; } 3>&1
}

set_up() {
    local python=${PYTHON:-python3} file stamp asked
    for file in "$@"; do
        stamp=$root/.venv/installed-$(tr / - <<<"${file#"$root/"}")
        asked=$(cat "$root/constraints.txt" "$file" | cksum)
        if [ "$(cat "$stamp" 2>/dev/null)" = "$asked" ]; then continue; fi
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "Error: $python is not Python 3.10 or newer: install one, or name it with PYTHON=/path/to/python." >&2
            exit 2
        }
        echo "Setting up $root/.venv for $file (the first time only) ..."
        [ -x "$root/.venv/bin/pip" ] || "$python" -m venv "$root/.venv"
        rm -f "$stamp"
        quiet_pip install -c "$root/constraints.txt" -r "$file"
        echo "$asked" >"$stamp"
    done
}
