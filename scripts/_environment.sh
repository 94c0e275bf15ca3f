# Sourced by the scripts beside it: `make_environment FOLDER EXTRAS` leaves an activated virtual environment in FOLDER, with
# t5x_like (editable) and the versions in constraints.txt. A second run installs nothing until setup.cfg or constraints.txt change.

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

# TensorFlow Text, which seqio needs, has no wheels for later Pythons.
supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c "$supported" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  fail "t5x_like needs Python 3.11, 3.12 or 3.13; tried: ${candidates[*]}. Name yours: PYTHON=/path/to/python3.11 $0"
}

make_environment() {
  local folder=$1 extras=$2 python stamp
  if [ ! -x "$folder/bin/pip" ]; then
    python=$(find_python) || exit 1
    "$python" -m venv "$folder" || fail "'$python -m venv' failed; on Debian and Ubuntu install the package python3-venv first."
  fi
  # shellcheck disable=SC1091
  source "$folder/bin/activate"
  stamp="$PWD $extras $(cat setup.cfg pyproject.toml constraints.txt | cksum)"
  if [ "$(cat "$folder/installed" 2>/dev/null)" != "$stamp" ]; then
    echo "Installing t5x_like$extras into $folder (about a minute on a fast network) ..."
    python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".$extras" \
      || fail "the installation into $folder failed; the message above says why. Run $0 again to go on."
    echo "$stamp" > "$folder/installed"
  fi
}
